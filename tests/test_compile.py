"""torch.compile, export, opcheck, gradcheck, second derivatives, autocast: how the rest of PyTorch sees the op."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from facenet_ext import (
    SemiHardTripletLoss,
    TripletLoss,
    TripletStats,
    _backend,
    functional,
    mine_triplets,
    triplet_loss,
)
from facenet_ext._options import Options

OP_OPTIONS = Options(band=0.0)
X = torch.randn(1, 24, 8)


def op_arguments(x, y, need_grad, need_stats):
    """The op's arguments for a plain batch."""
    return *_backend.Problem(x, y)[:-1], *OP_OPTIONS, need_grad, False, need_stats


def batch(device, dtype=torch.float32, n=24, dim=8):
    return torch.randn(n, dim, device=device, dtype=dtype), torch.arange(n, device=device) // 4


@pytest.mark.parametrize("need_stats", [False, True])
@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(device, dtype, need_grad, need_stats):
    x, y = batch(device, dtype)
    x.requires_grad_(need_grad)
    torch.library.opcheck(torch.ops.facenet_ext.triplet_loss, op_arguments(x, y, need_grad, need_stats))


def test_opcheck_backward(device):
    for dtype in (torch.float32, torch.float16):
        x, _ = batch(device, dtype)
        torch.library.opcheck(
            torch.ops.facenet_ext.triplet_loss_backward, (x.float(), torch.tensor(2.0, device=device), x)
        )


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("return_stats", [False, True])
def test_fullgraph(device, fresh_compiler, backend, return_stats):
    layer = torch.nn.Linear(8, 6, device=device)
    criterion = SemiHardTripletLoss(margin=0.3, distance="euclidean")

    def step(x, y):
        out = criterion(layer(x), y, return_stats=return_stats)
        return out if return_stats else (out, None)

    x, y = batch(device)
    want, want_stats = step(x, y)
    want_grads = torch.autograd.grad(want, layer.parameters())
    got, got_stats = torch.compile(step, fullgraph=True, backend=backend)(x, y)
    grads = torch.autograd.grad(got, layer.parameters())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)
    if return_stats:
        assert list(got_stats) == list(want_stats)
        for name in want_stats:
            torch.testing.assert_close(got_stats[name], want_stats[name])
            assert not got_stats[name].requires_grad
        torch.testing.assert_close(got_stats.active, want_stats["active"])


def test_fullgraph_without_gradient(device, fresh_compiler):
    compiled = torch.compile(lambda x, y: triplet_loss(x, y), fullgraph=True, backend="aot_eager")
    x, y = batch(device)
    assert torch.equal(compiled(x, y), triplet_loss(x, y))
    x.requires_grad_()
    with torch.no_grad():
        assert not compiled(x, y).requires_grad
    assert compiled(x, y).requires_grad


def test_fullgraph_dynamic_batch(device, fresh_compiler):
    graphs = CompileCounter()
    compiled = torch.compile(lambda x, y: triplet_loss(x * 2, y), fullgraph=True, backend=graphs, dynamic=True)
    for n in (12, 20, 31):
        x, y = batch(device, n=n)
        assert torch.equal(compiled(x, y), triplet_loss(x * 2, y))
    assert graphs.frame_count == 1  # one graph for every size


def test_second_derivative_raises_compiled(device, fresh_compiler):
    x, y = batch(device)
    x.requires_grad_()
    loss = torch.compile(lambda x, y: triplet_loss(x, y), fullgraph=True, backend="aot_eager")(x, y)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(grad.sum(), x)


def test_mining_breaks_the_graph_and_works(device, fresh_compiler):
    x, y = batch(device)
    compiled = torch.compile(lambda x, y: mine_triplets(x + 0, y).negative + 1, backend="aot_eager")
    assert torch.equal(compiled(x, y), mine_triplets(x, y).negative + 1)


def test_export(device):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 6)
            self.criterion = SemiHardTripletLoss()

        def forward(self, x, y):
            return self.criterion(self.layer(x), y)

    step = Step().to(device)
    x, y = batch(device)
    program = torch.export.export(step, (x, y))
    assert any("facenet_ext.triplet_loss" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, y), step(x, y))


def test_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, y = torch.empty(10, 4, device=device, requires_grad=True), torch.empty(10, dtype=torch.int64, device=device)
        loss, stats = triplet_loss(x, y, return_stats=True)
        assert loss.shape == () and stats.pairs.dtype == torch.int64 and loss.requires_grad


# ---- gradcheck and second derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "mean_active", "sum"])
@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean"])
def test_gradcheck(device, distance, reduction, normalize):
    x, y = batch(device, torch.float64, n=15, dim=5)
    x.requires_grad_()

    def function(x):
        return triplet_loss(x, y, margin=0.4, distance=distance, reduction=reduction, normalize=normalize)

    assert torch.autograd.gradcheck(function, (x,), nondet_tol=0.0)


@pytest.mark.parametrize("call", ["eager", "op"])
def test_second_derivative_raises(device, call):
    x, y = batch(device)
    x.requires_grad_()
    if call == "eager":
        loss = triplet_loss(x, y)
    else:
        loss = torch.ops.facenet_ext.triplet_loss(*op_arguments(x, y, True, False))[0]
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)  # that alone is fine: others in the graph may need it
    assert grad.requires_grad
    for options in ({}, {"allow_unused": True}):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), x, retain_graph=True, **options)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (grad.square().sum() + x.sum()).backward()


# ---- autocast and loss scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(device, fresh_compiler, dtype, compiled):
    """Under autocast the network's half-precision output comes in; the loss is what it is of those values outside."""
    layer = torch.nn.Linear(8, 6, device=device)
    x, y = batch(device)
    function = torch.compile(triplet_loss, fullgraph=True, backend="aot_eager") if compiled else triplet_loss
    with torch.autocast(device.type, dtype=dtype):
        out = layer(x)
        loss = function(out, y)
    assert out.dtype == dtype and loss.dtype == torch.float32
    assert torch.equal(loss, triplet_loss(out, y))
    loss.backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


def test_grad_scaler_sees_infinity(device):
    layer = torch.nn.Linear(8, 6, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    x, y = batch(device)
    x[3, 2] = torch.inf
    before = layer.weight.detach().clone()
    scaler.scale(triplet_loss(layer(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before) and scaler.get_scale() == 2.0**9


# ---- every rule, and references --------------------------------------------------------------------------------------

RULES = [
    dict(negatives="hard", positives="hardest", soft_margin=True),
    dict(negatives="random_semi_hard", band=0.5, pairs="unordered", reduction="mean_active"),
    dict(negatives="random_active", distance="cosine", positives="easiest", reduction="sum"),
    dict(negatives="all", distance="euclidean", normalize=True),
    dict(negatives="all_semi_hard", band=0.7, reduction="mean_active"),
    dict(fallback="skip", soft_margin=True, distance="euclidean"),
]
IDS = [rule.get("negatives", "semi_hard") for rule in RULES]


@pytest.fixture
def cpu():
    return torch.device("cpu")  # where every rule is


def kept(references, rows, labels, options):
    """Keywords for reference rows; None: no references. Unordered pairs exclude "only"."""
    if references is None:
        return {}
    references = "all" if references == "only" and "pairs" in options else references
    return dict(reference_embeddings=rows, reference_labels=labels, references=references)


def flat_arguments(options, x, y, r, z, references, need_grad):
    """The op's arguments under these options, as autograd.triplet_loss gives them."""
    options = Options(**options)
    draw = functional.draw_seed(options, torch.Generator().manual_seed(1), x.device)
    problem = functional.problem_of(x, y, None if references is None else (r, z), references, draw)
    flat = options._replace(band=options.band or 0.0)
    return *problem[:-1], *flat, need_grad, need_grad and problem.anchors is not None, True


@pytest.mark.parametrize("references", [None, "negatives", "all", "only"])
@pytest.mark.parametrize("options", RULES, ids=IDS)
def test_opcheck_of_every_rule(cpu, options, references):
    x, y = batch(cpu, n=12)
    r, z = batch(cpu, n=8)
    x.requires_grad_(), r.requires_grad_()
    arguments = flat_arguments(options, x, y, r, z, kept(references, r, z, options).get("references"), True)
    torch.library.opcheck(torch.ops.facenet_ext.triplet_loss, arguments)


@pytest.mark.parametrize(
    ("options", "references"),
    list(zip(RULES, ["only", None, "negatives", "all", "negatives", None], strict=True)),
    ids=IDS,
)
def test_fullgraph_of_every_rule(cpu, fresh_compiler, options, references):
    """Eager and compiled alike, gradients of batch and references too; another number of rows makes no new graph."""
    graphs = CompileCounterWithBackend("aot_eager")

    def loss(x, y, r, z):
        more = kept(references, r, z, options)
        return triplet_loss(x * 2, y, margin=0.6, **options, **more, return_stats=True)

    compiled, first = torch.compile(loss, fullgraph=True, backend=graphs, dynamic=True), None
    for n, m in ((12, 7), (19, 11), (32, 5)):
        (x, y), (r, z) = batch(cpu, n=n), batch(cpu, n=m)
        x.requires_grad_(), r.requires_grad_()
        results = []
        for function in (loss, compiled):
            torch.manual_seed(7)  # draws the random rules' seed
            value, stats = function(x, y, r, z)
            grads = torch.autograd.grad(value, (x, r), allow_unused=True, materialize_grads=True)
            results.append((value.detach(), *grads, *stats.values()))
        assert all(map(torch.equal, *results))
        first = first or graphs.frame_count
    assert graphs.frame_count == first


@pytest.mark.parametrize("options", RULES, ids=IDS)
def test_batches_of_any_size_take_four_graphs(cpu, fresh_compiler, options):
    """torch.compile's default: one for the first size, one for every size, and 0 and 1 always stand for themselves."""
    graphs, criterion = CompileCounterWithBackend("aot_eager"), TripletLoss(margin=0.6, **options)
    compiled = torch.compile(criterion, fullgraph=True, backend=graphs)
    for n in (12, 7, 32, 0, 1, 2, 19, 64, 33, 5, 3):
        x, y = batch(cpu, n=n)
        x.requires_grad_()
        results = []
        for function in (compiled, criterion):
            torch.manual_seed(n)
            loss = function(x, y)
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
        assert all(map(torch.equal, *results))
    assert graphs.frame_count == 4


def test_a_margin_is_a_constant_of_its_graph(cpu, fresh_compiler):
    """A new one is a new graph, never the old number."""
    criterion = SemiHardTripletLoss(margin=0.1)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    x, y = batch(cpu)
    for margin in (0.1, 0.2, 0.4, 0.2):
        criterion.margin = margin
        assert torch.equal(compiled(x, y), triplet_loss(x, y, margin=margin))


@pytest.mark.parametrize("references", [None, "negatives", "all", "only"])
@pytest.mark.parametrize("options", RULES, ids=IDS)
def test_gradcheck_of_every_rule(cpu, options, references):
    (x, y), (r, z) = batch(cpu, torch.float64, n=11, dim=4), batch(cpu, torch.float64, n=7, dim=4)
    x.requires_grad_(), r.requires_grad_(references is not None)

    def function(x, r):
        generator = torch.Generator().manual_seed(2)
        return triplet_loss(x, y, margin=0.6, **options, **kept(references, r, z, options), generator=generator)

    assert torch.autograd.gradcheck(function, (x, r), nondet_tol=0.0)


def test_compiled_draws_follow_torchs_seed(cpu, fresh_compiler):
    """The seed is drawn inside the graph: every call of the compiled loss draws anew."""
    x, y = batch(cpu, n=40)
    compiled = torch.compile(lambda x, y: triplet_loss(x, y, negatives="random_active"), fullgraph=True)
    torch.manual_seed(3)
    first = [float(compiled(x, y)) for _ in range(4)]
    torch.manual_seed(3)
    assert [float(compiled(x, y)) for _ in range(4)] == first and len(set(first)) > 1


def test_modes_and_tracers_see_an_op(cpu):
    """Not memory that was filled behind their back, which replays as garbage or ends the process."""
    x, y = batch(cpu)

    def loss(x):
        return triplet_loss(x, y, margin=1.0)

    want, other = loss(x), loss(3 * x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert loss(x).shape == () and type(loss(x)) is FakeTensor
    with FlopCounterMode(display=False):
        assert torch.equal(loss(x), want)
    assert torch.equal(torch.func.functionalize(loss)(x), want)
    with pytest.warns(torch.jit.TracerWarning, match="Python boolean"):  # the checks of shapes
        script = torch.jit.trace(loss, x)
    for traced in (make_fx(loss)(x), script):
        assert torch.equal(traced(3 * x), other)
    needs = x.clone().requires_grad_()
    want = torch.autograd.grad(loss(3 * needs), needs)[0]
    graph = make_fx(lambda x: torch.autograd.grad(loss(3 * x), x)[0])(torch.randn_like(x).requires_grad_())
    torch.testing.assert_close(graph(needs), want)
    assert torch.equal(torch.func.vmap(loss)(torch.stack([x, 3 * x])), torch.stack([loss(x), other]))


def test_batches_of_upstream_gradients(cpu):
    x, y = batch(cpu, torch.float64)
    x.requires_grad_()
    loss = triplet_loss(x, y, margin=1.0)
    one = torch.autograd.grad(loss, x, retain_graph=True)[0]
    three = torch.autograd.grad(loss, x, torch.tensor([1.0, 2.0, -3.0], dtype=x.dtype), is_grads_batched=True)[0]
    torch.testing.assert_close(three, torch.stack([one, 2 * one, -3 * one]))
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(lambda x: triplet_loss(x, y, margin=1.0), x, vectorize=True), one)


def test_transforms_that_differentiate_say_that_they_cannot(cpu):
    x, y = batch(cpu)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="not differentiated by torch.func.*torch.autograd.grad"):
            transform(lambda x: triplet_loss(x, y))(x)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: triplet_loss(x, y), (x,), (x,))


@pytest.mark.parametrize("strict", [False, True])
def test_stats_are_exported(cpu, strict):
    class Step(torch.nn.Module):
        def forward(self, x, y):
            return triplet_loss(x, y, return_stats=True)

    x, y = batch(cpu)
    loss, stats = torch.export.export(Step(), (x, y), strict=strict).module()(x, y)
    want, want_stats = triplet_loss(x, y, return_stats=True)
    assert torch.equal(loss, want) and type(stats) is TripletStats
    assert all(torch.equal(stats[key], value) for key, value in want_stats.items())
    assert type(tree_map(torch.clone, want_stats)) is TripletStats


@pytest.mark.parametrize("over", [torch.func.functionalize, torch.func.vmap, lambda mine: torch.jit.trace(mine, X)])
def test_the_miner_refuses_what_cannot_see_it(cpu, over):
    with pytest.raises(RuntimeError, match="mine_triplets returns as many triplets as there are"):
        over(lambda x: mine_triplets(x.view(24, 8), torch.arange(24) // 4).d2_ap)(X)
