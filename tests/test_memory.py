"""The memory of earlier batches: which rows it holds, and that a loss with it equals the same loss on plain tensors."""

from __future__ import annotations

import pytest
import torch

from facenet_ext import CrossBatchMemory, SemiHardTripletLoss, _options, mine_triplets, reference, triplet_loss


def batch(n: int, seed: int, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("sizes", [[3, 4], [7], [6, 6, 1], [20], [5, 20, 3], [0, 2, 0], [7, 7, 7]])
def test_holds_the_last_rows(sizes):
    memory = CrossBatchMemory(7, 5)
    rows, labels = [], []
    for seed, n in enumerate(sizes):
        x, y = batch(n, seed)
        memory.add(x, y)
        rows += x.tolist()
        labels += y.tolist()
    kept = min(7, len(rows))
    assert len(memory) == kept
    held = memory.references()
    if kept:
        have = sorted(zip(held["reference_embeddings"].tolist(), held["reference_labels"].tolist(), strict=True))
        assert have == sorted(zip(rows[-kept:], labels[-kept:], strict=True))
    else:
        assert held == {}


@pytest.mark.parametrize("positives", [False, True])
def test_loss_and_gradient_are_those_of_the_rows(positives):
    memory = CrossBatchMemory(16, 5, positives=positives, dtype=torch.float64)
    old, old_labels = batch(12, 1)
    memory.add(old, old_labels)
    x, y = batch(10, 2)
    x = x.double().requires_grad_()
    criterion = SemiHardTripletLoss(margin=0.5)
    loss = criterion(x, y, **memory.references())
    memory.add(x, y)  # must not disturb the graph made before
    (gradient,) = torch.autograd.grad(loss, x)
    plain = x.detach().clone().requires_grad_()
    expected = reference.triplet_loss(
        plain,
        y,
        margin=0.5,
        reference_embeddings=old.double(),
        reference_labels=old_labels,
        references="all" if positives else "negatives",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0], rtol=1e-11, atol=1e-12)
    assert not memory.embeddings.requires_grad


@pytest.mark.parametrize("rule", _options.NEGATIVES)
@pytest.mark.parametrize("which", _options.REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_without_gradient_change_no_bit_of_the_batches(device, rule, which, dtype):
    """Of constants no gradient is made; where they ask for one, the batch's is the same."""
    x, y = (rows.to(device) for rows in batch(70, 3, 40))
    old, old_labels = (rows.to(device) for rows in batch(250, 4, 40))
    x, old = x.to(dtype), old.to(dtype)
    for options in ({}, {"normalize": True, "distance": "cosine"}, {"reduction": "mean_active", "fallback": "skip"}):
        results = []
        for is_constant in (True, False):
            own, rows = x.clone().requires_grad_(), old.clone().requires_grad_(not is_constant)
            more = dict(reference_embeddings=rows, reference_labels=old_labels, references=which)
            generator = torch.Generator().manual_seed(5)
            loss = triplet_loss(own * 1, y, margin=30.0, negatives=rule, generator=generator, **options, **more)
            (2 * loss).backward()
            assert own.grad.shape == x.shape and own.grad.dtype == dtype and own.grad.any()
            assert (rows.grad is None) == is_constant
            results.append((loss.detach(), own.grad))
        assert all(map(torch.equal, *results)), options


def test_rows_without_gradient_and_who_asks_for_one():
    x, y = batch(9, 3)
    old, old_labels = batch(12, 4)
    more = dict(reference_embeddings=old, reference_labels=old_labels)
    assert not triplet_loss(x, y, **more).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not triplet_loss(x, y, **more).requires_grad
    loss = triplet_loss(x, y, margin=9.0, **more)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
    broken = old.clone()
    broken[3, 1] = torch.nan
    loss = triplet_loss(x, y, reference_embeddings=broken, reference_labels=old_labels)
    assert loss.isnan() and torch.autograd.grad(loss, x)[0].isnan().all()


@pytest.mark.parametrize("function", [triplet_loss, reference.triplet_loss])
def test_references_are_taken_in_the_dtype_of_the_batch(function):
    x, y = batch(9, 3)
    old, old_labels = batch(12, 4)
    rounded = dict(reference_embeddings=old.bfloat16(), reference_labels=old_labels, references="all")
    loss = function(x.bfloat16(), y, **{**rounded, "reference_embeddings": old})
    assert torch.equal(loss, function(x.bfloat16(), y, **rounded))


def test_miner_takes_negatives_from_the_memory():
    memory = CrossBatchMemory(4, 1)
    memory.add(torch.tensor([[3.0]]), torch.tensor([7]))
    mined = mine_triplets(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([1, 1, 2]), **memory.references())
    assert mined.negative.tolist() == [3, 3]  # the row after the batch's three


def test_state_comes_back_and_goes_on():
    memory = CrossBatchMemory(6, 5)
    memory.add(*batch(4, 1))
    other = CrossBatchMemory(6, 5)
    other.load_state_dict(memory.state_dict())
    for one in (memory, other):
        one.add(*batch(5, 2))
    assert len(other) == 6 and other.added == 9
    assert torch.equal(memory.embeddings, other.embeddings) and torch.equal(memory.labels, other.labels)


@pytest.mark.parametrize("change", ["size", "dim", "no labels", "no count", "a foreign count", "a count below 0"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_of_another_memory_changes_nothing(change, assign):
    """Rows of one memory with the count of another would be neither."""
    state = CrossBatchMemory(6 + (change == "size"), 5 + (change == "dim"))
    state.add(*batch(4, 1, state.dim))
    state = state.state_dict()
    if change == "no labels":
        del state["labels"]
    elif change == "no count":
        del state["_extra_state"]
    elif change == "a foreign count":
        state["_extra_state"] = {}
    elif change == "a count below 0":
        state["_extra_state"] = {"added": -4}
    memory = CrossBatchMemory(6, 5)
    memory.add(*batch(3, 2))
    buffers, before = dict(memory.named_buffers()), {name: b.clone() for name, b in memory.named_buffers()}
    with pytest.raises((RuntimeError, ValueError), match="state"):
        memory.load_state_dict(state, assign=assign)
    assert memory.added == 3
    for name, buffer in memory.named_buffers():
        assert buffer is buffers[name] and torch.equal(buffer, before[name])


def test_state_inside_a_model_that_may_lack_parts():
    """strict=False lets keys be missing or too many; a memory then takes what is whole."""
    for missing in ("", "labels"):
        memory, other = CrossBatchMemory(6, 5), CrossBatchMemory(6, 5)
        memory.add(*batch(4, 1))
        state = torch.nn.ModuleDict({"memory": memory}).state_dict() | {"memory.more": torch.zeros(1)}
        state.pop("memory." + missing, None)
        torch.nn.ModuleDict({"memory": other}).load_state_dict(state, strict=False)
        assert other.added == (0 if missing else 4)
        assert torch.equal(other.embeddings, torch.zeros(6, 5) if missing else memory.embeddings)


def test_warm_up():
    memory = CrossBatchMemory(6, 5, warmup=5)
    memory.add(*batch(4, 1))
    assert memory.references() == {}
    memory.add(*batch(1, 2))
    assert len(memory.references()["reference_labels"]) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 5), ValueError, "size is 0"),
        ((4, 2.5), TypeError, "dim is a float"),
    ],
)
def test_bad_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        CrossBatchMemory(*arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float32", None])
def test_bad_dtypes_are_named(dtype):
    """Integers would keep the rows, rounded to nothing."""
    with pytest.raises(TypeError, match="dtype is .*; accepted: torch.float32, torch.float64"):
        CrossBatchMemory(4, 5, dtype=dtype)


def test_bad_rows_are_named():
    memory = CrossBatchMemory(4, 5)
    with pytest.raises(ValueError, match=r"embeddings has shape \[2, 3\]; accepted: \[N, 5\]"):
        memory.add(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels has dtype torch.float32"):
        memory.add(torch.zeros(2, 5), torch.zeros(2))
