"""The networks against the paper's tables: parameters, shapes, pools and multiply-adds of every block."""

import dataclasses

import pytest
import torch
from torch import nn

from facenet_ext import models
from facenet_ext.models import tables
from facenet_ext.models.layers import L2Pool, Maxout


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this narrow run faster on one thread than they can wake a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# name: (parameters without batch norm, with it, multiply-adds)
TOTALS = {
    "nn1": (140_025_664, 140_030_784, 1_608_287_104),
    "nn2": (7_456_304, 7_472_144, 1_599_771_872),
    "nn3": (7_456_304, 7_472_144, 816_274_400),
    "nn4": (6_607_888, 6_622_640, 285_330_432),
    "nn4_small2": (3_724_656, 3_733_968, 207_420_928),
}
# Every block in order: weights + biases, output channels, side of the map (from the paper's Tables 1 and 2).
NN1 = {
    "conv1": (9_472, 64, 110), "pool1": (0, 64, 55), "norm1": (0, 64, 55), "conv2a": (4_160, 64, 55),
    "conv2": (110_784, 192, 55), "norm2": (0, 192, 55), "pool2": (0, 192, 28), "conv3a": (37_056, 192, 28),
    "conv3": (663_936, 384, 28), "pool3": (0, 384, 14), "conv4a": (147_840, 384, 14), "conv4": (884_992, 256, 14),
    "conv5a": (65_792, 256, 14), "conv5": (590_080, 256, 14), "conv6a": (65_792, 256, 14), "conv6": (590_080, 256, 14),
    "pool4": (0, 256, 7), "fc1": (102_768_640, 4096, None), "fc2": (33_562_624, 4096, None),
    "head": (524_416, 128, None),
}
NN2 = {
    "conv1": (9_472, 64, 112), "pool1": (0, 64, 56), "norm1": (0, 64, 56), "2": (114_944, 192, 56),
    "norm2": (0, 192, 56), "pool2": (0, 192, 28), "3a": (163_696, 256, 28), "3b": (227_776, 320, 28),
    "3c": (397_792, 640, 14), "4a": (545_536, 640, 14), "4b": (595_216, 640, 14), "4c": (654_112, 640, 14),
    "4d": (722_224, 640, 14), "4e": (717_408, 1024, 7), "5a": (1_588_464, 1024, 7), "5b": (1_588_464, 1024, 7),
    "head": (131_200, 128, None),
}


def at(blocks, sides, **changed):
    """NN2's blocks with the maps of another input: ``sides`` maps a side at 224 pixels to the one there."""
    return {name: (*row[:2], sides.get(row[2])) for name, row in {**blocks, **changed}.items()}


NN4_SIDES = {112: 48, 56: 24, 28: 12, 14: 6, 7: 3}
BLOCKS = {
    "nn1": NN1,
    "nn2": NN2,
    "nn3": at(NN2, {112: 80, 56: 40, 28: 20, 14: 10, 7: 5}),
    "nn4": at(NN2, NN4_SIDES, **{"4e": (471_456, 896, 7), "5a": (1_295_424, 896, 7), "5b": (1_295_424, 896, 7),
                                 "head": (114_816, 128, None)}),
    "nn4_small2": at({name: row for name, row in NN2.items() if name not in ("4b", "4c", "4d")}, NN4_SIDES, **{
        "5a": (791_360, 736, 7), "5b": (662_336, 736, 7), "head": (94_336, 128, None)}),
}
# Outputs of a block's convolutions, reductions and projections included: batch norm adds a pair of numbers for each.
CONVOLVED = {
    "2": 64 + 192, "3a": 64 + 96 + 128 + 16 + 32 + 32, "3b": 64 + 96 + 128 + 32 + 64 + 64,
    "3c": 128 + 256 + 32 + 64, "4a": 256 + 96 + 192 + 32 + 64 + 128, "4b": 224 + 112 + 224 + 32 + 64 + 128,
    "4c": 192 + 128 + 256 + 32 + 64 + 128, "4d": 160 + 144 + 288 + 32 + 64 + 128, "4e": 160 + 256 + 64 + 128,
    "5a": 384 + 192 + 384 + 48 + 128 + 128, "5b": 384 + 192 + 384 + 48 + 128 + 128,
}
SMALL2 = {"5a": 256 + 96 + 384 + 96, "5b": 256 + 96 + 384 + 96}
HIGHER = {"4e": 160 + 256, "5a": 384 + 192 + 384 + 128, "5b": 384 + 192 + 384 + 128}  # without 5 x 5


def convolved(name, block):
    if block.startswith("conv"):
        return BLOCKS[name][block][1]
    return {**CONVOLVED, **{"nn4": HIGHER, "nn4_small2": SMALL2}.get(name, {})}.get(block, 0)


def count(name, batch_norm=False):
    with torch.device("meta"):
        model = models.create(name, batch_norm=batch_norm)
    return sum(p.numel() for p in model.parameters()), models.summary(model)


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name):
    plain, with_norm, multiply_adds = TOTALS[name]
    for batch_norm, total in ((False, plain), (True, with_norm)):
        parameters, rows = count(name, batch_norm)
        assert parameters == total == sum(row["parameters"] for row in rows)
        assert sum(row["multiply_adds"] for row in rows) == multiply_adds


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, batch_norm):
    found = [(row["name"], row["parameters"], row["shape"]) for row in count(name, batch_norm)[1]]
    assert found == [(block, parameters + 2 * batch_norm * convolved(name, block), (width, *[side] * 2 * bool(side)))
                     for block, (parameters, width, side) in BLOCKS[name].items()]


@pytest.mark.parametrize("dropped, small, parameters", [
    (("5a", "5b"), (), 6_959_088), (("5a", "5b"), ("4c", "4d"), 5_579_520), (("4e", "5a", "5b"), (), 6_622_640)])
def test_openface_counts_and_the_5x5_convolutions_that_nn4_drops(dropped, small, parameters):
    """OpenFace's nn4 and nn4.small1 keep the 5 x 5 branch in 4e, so they are not the paper's NN4."""
    rows = [dataclasses.replace(row, five=None) if row.name in dropped else row
            for row in models.NETWORKS["nn2"].rows if row.name not in small]
    with torch.device("meta"):
        model = models.FaceNet("nn4", tables.Table((96, 96), tuple(rows), ""), 128, True, (96, 96))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name, parameters, multiply_adds", [("nns1", 26e6, 220e6), ("nns2", 4.3e6, 20e6)])
def test_unpublished_networks_meet_the_published_budget(name, parameters, multiply_adds):
    counted, rows = count(name)
    assert 0.97 * parameters < counted <= 1.005 * parameters
    assert 0.97 * multiply_adds < sum(row["multiply_adds"] for row in rows) <= multiply_adds


def pools(model):
    """{block: (kind, kernel, stride, padding)}: what parameter counts cannot see."""
    return {name.split(".")[1]: (type(m).__name__, m.kernel_size, m.stride, m.padding)
            for name, m in model.named_modules() if isinstance(m, nn.MaxPool2d | L2Pool)}


def test_pools_of_the_paper():
    with torch.device("meta"):
        nn1, nn2, nn3, nn4, small = (pools(models.create(name)) for name in BLOCKS)
    halve, keep = ("MaxPool2d", 3, 2, 1), ("L2Pool", 3, 1, 1)
    assert nn1 == dict.fromkeys(("pool1", "pool2", "pool3", "pool4"), halve)
    assert nn2 == {"pool1": halve, "pool2": halve, "3a": ("MaxPool2d", 3, 1, 1), "3b": keep, "3c": halve, "4a": keep,
                   "4b": keep, "4c": keep, "4d": keep, "4e": halve, "5a": keep, "5b": ("MaxPool2d", 3, 1, 1)}
    assert nn3 == nn4 == nn2 == {**nn2, **small} and nn2.keys() - small.keys() == {"4b", "4c", "4d"}


def test_norms_stand_where_the_paper_puts_them():
    for name in ("nn1", "nn2", "nn4"):
        rows = [row.name for row in models.NETWORKS[name].rows]
        assert rows.index("norm1") == rows.index("pool1") + 1 and rows.index("norm2") == rows.index("pool2") - 1
    with torch.device("meta"):
        norm = models.create("nn4").blocks.norm1
    assert (norm.size, norm.alpha, norm.beta, norm.k) == (5, 1e-4, 0.75, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_l2_pool_is_the_root_of_the_sum_of_squares(dtype, stride):
    x = torch.randn(2, 3, 6, 7).to(dtype)
    wide = nn.functional.pad(x.double() ** 2, (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride).sum((4, 5)).sqrt()
    y = L2Pool(stride)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_l2_pool_gradient_is_zero_on_an_all_zero_window(dtype):
    x = torch.zeros(1, 1, 9, 9, dtype=dtype, requires_grad=True)
    L2Pool()(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    x = torch.zeros(1, 1, 9, 9, dtype=dtype)
    x[0, 0, 0, 0] = 3
    x.requires_grad_()
    L2Pool()(x).sum().backward()
    assert x.grad[0, 0, 0, 0] == 4 and x.grad.count_nonzero() == 1  # four windows hold it alone: slope 1 each


def test_l2_pool_gradcheck():
    assert torch.autograd.gradcheck(L2Pool(), torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True))


def test_large_half_precision_values_do_not_overflow_in_the_l2_pool():
    assert L2Pool()(torch.full((1, 1, 3, 3), 1000.0, dtype=torch.float16))[0, 0, 1, 1] == 3000


def test_maxout_takes_the_larger_piece():
    layer = Maxout(5, 4)
    x = torch.randn(3, 5)
    pieces = layer.linear(x)
    assert torch.equal(layer(x), torch.maximum(pieces[:, 0::2], pieces[:, 1::2]))


SMALL = {"nn2": 33, "nn4": 33, "nn4_small2": 33, "nns1": 33, "nns2": 33, "nn1": 33, "mini": 32}


def tiny(name, **options):
    """The network with every width divided by 8: the same graph, quick to run."""
    def narrow(value):
        return tuple(map(narrow, value)) if isinstance(value, tuple) else value if isinstance(value, str | None) else \
            -(-value // 8)

    table = models.NETWORKS[name]
    rows = tuple(type(row)(**{key: narrow(value) if key in ("out", "one", "three", "five", "pool") else value
                              for key, value in vars(row).items()}) for row in table.rows)
    torch.manual_seed(0)
    return models.FaceNet(name, tables.Table(table.size, rows, ""), 16, options.get("batch_norm", True),
                          (SMALL[name],) * 2)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_unit_length_gradients_and_channels_last(name, batch_norm):
    model = tiny(name, batch_norm=batch_norm)
    x = torch.randn(3, 3, SMALL[name], SMALL[name])
    x[0, :, :16] = 0  # whole windows of zeros
    y = model(x)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(3))
    y[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    before = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nn1", "nn4"])
def test_bfloat16_gives_finite_unit_embeddings(name):
    model = tiny(name)
    x = torch.randn(2, 3, SMALL[name], SMALL[name])
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.norm(dim=1), torch.ones(2))
    y[:, 0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture(scope="module", params=["nn1", "nn4", "nns2", "mini"])  # every kind of row stands in one of them
def exported(request):
    """A network, what torch.export makes of it with any number of images, and images in another number."""
    size = SMALL[request.param]
    model = tiny(request.param).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, size, size),), dynamic_shapes=({0: batch},))
    return model, program, torch.randn(5, 3, size, size)


def test_torch_export_gives_equal_outputs(exported, tmp_path):
    model, program, x = exported
    torch.export.save(program, tmp_path / "model.pt2")
    for graph in (program, torch.export.load(tmp_path / "model.pt2")):
        torch.testing.assert_close(graph.module()(x), model(x))


def test_onnx_gives_equal_outputs(exported, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, to run what was exported, is not installed")
    model, program, x = exported
    torch.onnx.export(program, f=tmp_path / "model.onnx", input_names=["images"], output_names=["embeddings"],
                      dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for images in (x, x[:1], torch.zeros_like(x)):  # the last one: nothing but empty windows in the L2 pools
        (got,) = session.run(["embeddings"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(images).detach(), rtol=1e-4, atol=1e-5)


# one row of each kind: what the compiler's C++ is asked for, in seconds instead of minutes
EVERY_ROW = tables.Table((16, 16), (
    tables.Conv("conv1", 8, 3, 2), tables.Pool("pool1"), tables.Norm("norm1"),
    tables.Mix("3b", 4, (4, 8), (2, 4), ("l2", 4)), tables.Max("fc1", 16)), "this test's")


@pytest.mark.parametrize("name, backend", [("nn4", "eager"), ("nns2", "eager"), ("every row", "inductor")])
def test_compiles_without_a_graph_break(name, backend):
    torch.compiler.reset()
    model = tiny(name) if name in SMALL else models.FaceNet(name, EVERY_ROW, 8, True, EVERY_ROW.size)
    x = torch.randn(2, 3, *model.input_size)
    x[0, :, :8] = 0
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    if backend == "eager":
        want = torch.autograd.grad(model(x)[:, 0].sum(), model.parameters())
        torch.testing.assert_close(torch.autograd.grad(compiled(x)[:, 0].sum(), model.parameters()), want)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()


def test_input_size_and_embedding_dim():
    assert models.create("nn4_small2", 64, input_size=64)(torch.zeros(2, 3, 64, 64)).shape == (2, 64)
    assert models.create("nns2").input_size == (140, 116)
    assert models.create("nns2")(torch.randn(2, 3, 140, 116)).shape == (2, 128)
    assert models.create("mini", input_size=(24, 16))(torch.randn(2, 3, 24, 16)).shape == (2, 128)


@pytest.mark.parametrize("arguments, named", [
    ({"name": "nn5"}, "name.*nn5.*nn4"), ({"name": "nn4", "embedding_dim": 0}, "embedding_dim.*0"),
    ({"name": "nn4", "input_size": 0}, "input_size.*0"), ({"name": "nn4", "input_size": (96,)}, "input_size.*96"),
    ({"name": "nn4", "embedding_dim": True}, "embedding_dim.*True"),
    ({"name": "nn4", "input_size": True}, "input_size.*True"), ({"name": "nn4", "input_size": 9.5}, "input_size.*9.5"),
    ({"name": "nn4", "batch_norm": "no"}, "batch_norm.*'no'"),
])
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        models.create(**arguments)
