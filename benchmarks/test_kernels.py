"""Single calls under pytest-benchmark, to see a regression between two commits on one machine:

    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare

Nothing here fails for being slow, and only the sizes of results are checked. Comparisons with other libraries and
memory are mining_bench.py's business. FACENET_EXT_ISA=portable (or avx2, avx512) before the command measures that path.
"""

import pytest
import torch
from batches import REGIMES, Size, make_batch
from torch.nn.functional import normalize

import facenet_ext

BASE = Size(2048, 16, 128)


def forward_and_backward(embeddings, labels, **options):
    embeddings.grad = None
    loss = facenet_ext.triplet_loss(embeddings, labels, **options)
    loss.backward()
    return loss


def check(loss):
    assert loss.shape == () and torch.isfinite(loss)


@pytest.mark.parametrize("regime", REGIMES)
def test_loss_and_gradient(benchmark, regime):
    x, y = make_batch(BASE, regime)
    check(benchmark(forward_and_backward, x.requires_grad_(), y))


def test_loss_without_gradient(benchmark):
    x, y = make_batch(BASE, "init")
    check(benchmark(facenet_ext.triplet_loss, x, y))


@pytest.mark.parametrize(
    "options",
    [
        {"distance": "euclidean"},
        {"fallback": "skip"},
        {"reduction": "mean_active"},
        {"normalize": True},
    ],
    ids=lambda options: "-".join(str(value) for item in options.items() for value in item),
)
def test_options(benchmark, options):
    x, y = make_batch(BASE, "init")
    check(benchmark(forward_and_backward, x.requires_grad_(), y, **options))


def test_stats(benchmark):
    x, y = make_batch(BASE, "init")
    loss, stats = benchmark(facenet_ext.triplet_loss, x.requires_grad_(), y, return_stats=True)
    check(loss)
    assert int(stats["pairs"]) == BASE.n * (BASE.k - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_dtypes(benchmark, dtype):
    x, y = make_batch(BASE, "init")
    check(benchmark(forward_and_backward, x.to(dtype).requires_grad_(), y))


@pytest.mark.parametrize("dim", [3, 64, 100, 512])
def test_dimensions(benchmark, dim):
    x, y = make_batch(Size(BASE.n, BASE.k, dim), "init")
    check(benchmark(forward_and_backward, x.requires_grad_(), y))


@pytest.mark.parametrize("k", [2, 64, 512])
def test_class_sizes(benchmark, k):
    x, y = make_batch(Size(BASE.n, k, BASE.d), "init")
    check(benchmark(forward_and_backward, x.requires_grad_(), y))


def test_one_huge_class_among_singletons(benchmark):
    x, _ = make_batch(BASE, "init")
    y = torch.arange(BASE.n).clamp(max=BASE.n // 2)
    check(benchmark(forward_and_backward, x.requires_grad_(), y))


def test_collapsed(benchmark):
    x = normalize(torch.ones(BASE.n, BASE.d), dim=1)  # every distance 0: nothing but fallbacks
    check(benchmark(forward_and_backward, x.requires_grad_(), torch.arange(BASE.n) // BASE.k))


def test_small_batch(benchmark):
    x, y = make_batch(Size(64, 4, 128), "init")  # the cost of a call: Python, checks, threads
    check(benchmark(forward_and_backward, x.requires_grad_(), y))


def test_references(benchmark):
    x, y = make_batch(Size(128 + 16384, 16, 128), "init")
    earlier = dict(reference_embeddings=x[128:], reference_labels=y[128:])
    check(benchmark(forward_and_backward, x[:128].clone().requires_grad_(), y[:128], **earlier))


@pytest.mark.parametrize("regime", REGIMES)
def test_mine_triplets(benchmark, regime):
    x, y = make_batch(BASE, regime)
    triplets = benchmark(facenet_ext.mine_triplets, x, y)
    assert len(triplets.anchor) == BASE.n * (BASE.k - 1)


def test_yardstick(benchmark):
    x, _ = make_batch(BASE, "init")
    assert benchmark(lambda: x @ x.T).shape == (BASE.n, BASE.n)
