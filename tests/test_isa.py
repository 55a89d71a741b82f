"""Every CPU path that this machine can run goes through the same battery, in a process of its own: FACENET_EXT_ISA is
read once, at the first call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import facenet_ext

HERE = Path(__file__).parent
ISAS = facenet_ext.build_info()["cpu_isa"]

BATTERY = """
import sys, random
import torch
from cases import DTYPES, geometry, random_case
from oracle import assert_case
import facenet_ext

assert facenet_ext.cpu_isa_active() == sys.argv[1], facenet_ext.cpu_isa_active()
for seed in range(150):
    case = random_case(50_000 + seed, 60, 300)
    try:
        assert_case(case.embeddings, case.labels, **case.options)
    except AssertionError as error:
        raise AssertionError(f"{case.name}: {error}") from error
# Every width near a vector's or tile's border, in every dtype.
for dim in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 257):
    for n in (2, 7, 47, 48, 49, 97):
        for dtype in DTYPES[:2] if n > 7 else DTYPES:
            labels = torch.arange(n) // 3
            x = geometry(random.Random(dim), torch.Generator().manual_seed(dim * n), labels, dim, "mid")
            assert_case(x.to(dtype), labels, margin=0.2)
# Distances of small integers are exact: the draws are the reference's, over several tiles and in every dtype.
for seed in range(24):
    generator = torch.Generator().manual_seed(seed)
    n, dim, classes = (12, 60, 230)[seed % 3], 1 + seed % 9, (2, 5, 20, 60)[seed % 4]
    x = torch.randint(-3, 4, (n, dim), generator=generator).to(DTYPES[seed % 4])
    y = torch.randint(0, classes, (n,), generator=generator)
    for negatives in ("random_semi_hard", "random_active"):
        distance = ("sqeuclidean", "euclidean")[seed // 4 % 2]
        options = dict(negatives=negatives, margin=float(seed % 7), distance=distance)
        got, want = (
            mine(x, y, generator=torch.Generator().manual_seed(seed), **options)
            for mine in (facenet_ext.mine_triplets, facenet_ext.reference.mine_triplets)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (seed, options)
# Threads change no bit on this path either.
x, y = torch.randn(500, 40), torch.arange(500) // 9
results = []
for threads in (1, 3):
    torch.set_num_threads(threads)
    z = x.clone().requires_grad_()
    loss = facenet_ext.triplet_loss(z, y)
    results.append((loss.detach(), *torch.autograd.grad(loss, z), *facenet_ext.mine_triplets(x, y)))
assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
print("passed")
"""


# A negative that thousands of anchors share: equal differences round alike, and what their sum loses adds up.
HUB = """
import sys
import torch
from oracle import gradient_error, loss_and_gradient
import facenet_ext

assert facenet_ext.cpu_isa_active() == sys.argv[1], facenet_ext.cpu_isa_active()
pairs, dim, margin = 4096, 16, 1.0
for seed in range(1, 4):
    # Every pair stands on the same two points, sqrt(0.8) apart, and the hub, 1 from both, is all that is farther.
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.linalg.qr(torch.randn(dim, 2, generator=generator))[0].T
    x = torch.cat([torch.stack([a, 0.6 * a + 0.8 * b]).repeat(pairs, 1), torch.zeros(1, dim)])
    y = torch.arange(len(x)) // 2
    grads = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        z = x.clone().requires_grad_()
        grads += torch.autograd.grad(facenet_ext.triplet_loss(z, y, margin=margin), z)
    assert torch.equal(*grads)
    mined = facenet_ext.mine_triplets(x, y)
    assert (mined.negative == 2 * pairs).sum() > 0.9 * pairs
    error = gradient_error(grads[0], loss_and_gradient(x, mined, margin=margin))
    assert error <= 1e-6, (seed, error)
print("passed")
"""


def run(code: str, isa: str, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "FACENET_EXT_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_battery(isa):
    done = run(BATTERY, isa, isa)
    assert done.returncode == 0 and done.stdout == "passed\n", done.stderr[-3000:]


# In a large class the positives add up to a total that the negatives then all but take away.
LARGE_CLASSES = """
import sys
import torch
from oracle import gradient_error, loss_and_gradient
import facenet_ext

assert facenet_ext.cpu_isa_active() == sys.argv[1], facenet_ext.cpu_isa_active()
for seed, size in enumerate((300, 300, 200, 100)):
    x = torch.nn.functional.normalize(torch.randn(600, 16, generator=torch.Generator().manual_seed(seed)))
    y = torch.arange(len(x)) // size
    grads = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        z = x.clone().requires_grad_()
        grads += torch.autograd.grad(facenet_ext.triplet_loss(z, y), z)
    assert torch.equal(*grads)
    error = gradient_error(grads[0], loss_and_gradient(x, facenet_ext.mine_triplets(x, y)))
    assert error <= 1e-6, (seed, size, error)
print("passed")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_large_classes(isa):
    done = run(LARGE_CLASSES, isa, isa)
    assert done.returncode == 0 and done.stdout == "passed\n", done.stderr[-3000:]


@pytest.mark.parametrize("isa", ISAS)
def test_a_negative_of_thousands_of_anchors(isa):
    done = run(HUB, isa, isa)
    assert done.returncode == 0 and done.stdout == "passed\n", done.stderr[-3000:]


# What a sieve holds back (csrc/cpu/sieve.h, made after 192 candidates), no bucket wanted. Distances of small integers
# are exact, so the selection has to be the reference's, index by index, for every number of cells and at every width.
SIEVES = """
import sys
import torch
import facenet_ext
from facenet_ext import mine_triplets, reference

assert facenet_ext.cpu_isa_active() == sys.argv[1], facenet_ext.cpu_isa_active()
kinds = {
    "spread": lambda x, y: x,
    "scaled": lambda x, y: x * 2.0**-30,
    "lone positives": lambda x, y: torch.where((torch.arange(len(x)) % 37 == 0)[:, None], x + 300, x),
    "far from the origin": lambda x, y: x + 500,
    "classes apart": lambda x, y: x + 8 * (y % 12)[:, None],
    "ties": lambda x, y: x.clamp(-1, 1),
    "one point": lambda x, y: x * 0 + 1,
    "one is not a number": lambda x, y: torch.where((torch.arange(len(x)) == 99)[:, None], torch.nan, x),
}
for seed, (kind, change) in enumerate(kinds.items()):
    generator = torch.Generator().manual_seed(seed)
    for size, n in ((2, 400), (16, 800), (40, 400), (120, 380)):
        y = torch.arange(n) // size
        y = y[torch.randperm(n, generator=generator)]
        x = change(torch.randint(-3, 4, (n, 1 + (size + 3 * seed) % 6), generator=generator).float(), y)
        ask = [{"fallback": ("farthest", "skip")[(seed + size) % 2]}]
        for options in ask + [{"negatives": "hard"}] * (size == 2):
            got, want = (mine(x, y, **options) for mine in (mine_triplets, reference.mine_triplets))
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and ((a == b) | (a != a) & (b != b)).all(), (kind, size, options)
print("passed")
"""


@pytest.mark.skipif("avx2" not in ISAS, reason="no path with sieves here")
def test_sieves():
    done = run(SIEVES, "avx2", "avx2")
    assert done.returncode == 0 and done.stdout == "passed\n", done.stderr[-3000:]


def test_best_is_the_default():
    done = run("import facenet_ext; print(facenet_ext.cpu_isa_active())", "")
    assert done.stdout.split() == ISAS[:1], done.stderr


def test_unknown_path_is_an_error_that_says_what_there_is():
    done = run(
        """
import torch, facenet_ext
facenet_ext.build_info()  # still works: it is what the message points to
try:
    facenet_ext.triplet_loss(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]))
except ValueError as error:
    print(error)
""",
        "sse9",
    )
    assert "FACENET_EXT_ISA" in done.stdout and "cpu_isa" in done.stdout, done.stderr


def test_paths_agree():
    """Not bit for bit: the paths sum in different orders. But on data without near-ties they choose alike."""
    code = """
import torch, facenet_ext
torch.manual_seed(3)
x, y = torch.randint(-4, 5, (120, 24)).float(), torch.arange(120) % 11
t = facenet_ext.mine_triplets(x, y)
print(t.negative.tolist(), t.d2_an.tolist(), facenet_ext.triplet_loss(x, y, margin=30.0).item())
"""
    answers = {isa: run(code, isa) for isa in ISAS}
    assert all(done.returncode == 0 for done in answers.values())
    assert len({done.stdout for done in answers.values()}) == 1  # small integers: every sum is exact
