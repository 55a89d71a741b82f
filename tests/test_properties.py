"""What must not change the result, or must change it in a known way, for batches that hypothesis makes up."""

from __future__ import annotations

import random

import pytest
import torch
from cases import GEOMETRIES, geometry, grouped_labels
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from oracle import assert_case, loss_and_gradient

from facenet_ext import mine_triplets, triplet_loss

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

batches = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "n": st.integers(0, 70),
        "dim": st.integers(1, 140),
        "kind": st.sampled_from(GEOMETRIES),
        "options": st.fixed_dictionaries(
            {
                "margin": st.sampled_from([0.0, 0.2, 1.5]),
                "fallback": st.sampled_from(["farthest", "skip"]),
                "distance": st.sampled_from(["sqeuclidean", "euclidean"]),
                "reduction": st.sampled_from(["mean", "mean_active", "sum"]),
                "normalize": st.booleans(),
            }
        ),
    }
)


def make(batch: dict, device, dtype=torch.float32):
    rng, generator = random.Random(batch["seed"]), torch.Generator().manual_seed(batch["seed"])
    labels = grouped_labels(rng, batch["n"])
    x = geometry(rng, generator, labels, batch["dim"], batch["kind"]).to(dtype)
    return x.to(device), labels.to(device), batch["options"], generator


def value_and_grad(x, y, **options):
    x = x.detach().requires_grad_()
    loss = triplet_loss(x, y, **options)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


def works_in_passes(device) -> bool:
    """csrc/cuda/README.md; test_as_backend.py puts those kernels, emulated, in the place of the CPU's."""
    return device.type == "cuda"


@given(batches)
@QUICK
def test_permuting_the_batch_permutes_the_gradient(device, batch):
    """To rounding, where no tie is broken by the index. float64, so that near-ties are rare enough never to matter."""
    x, y, options, generator = make({**batch, "kind": "init", "dim": max(2, batch["dim"])}, device, torch.float64)
    order = torch.randperm(len(x), generator=generator).to(device)
    loss, grad = value_and_grad(x, y, **options)
    loss_p, grad_p = value_and_grad(x[order], y[order], **options)
    torch.testing.assert_close(loss_p, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_p, grad[order], rtol=1e-9, atol=1e-11)


@given(batches, st.integers(-(2**62), 2**62))
@QUICK
@example({"seed": 1, "n": 30, "dim": 8, "kind": "init", "options": {}}, -(2**62))
@example({"seed": 26, "n": 36, "dim": 3, "kind": "init", "options": {}}, 0)  # a class larger than a pass
def test_relabelling_changes_no_bit(device, batch, start):
    x, y, options, generator = make(batch, device)
    _, class_of = torch.unique(y, return_inverse=True)
    classes = int(class_of.max()) + 1 if len(y) else 0
    names = start + torch.randperm(max(classes, 1), generator=generator).to(device) * 1_000_003
    # Labels decide which anchors a pass holds, where there are several, and sums are added in order of the passes.
    several_passes = works_in_passes(device) and len(y) > 0 and int(class_of.bincount().max()) > 24 + x.shape[1] // 2
    for a, b in zip(value_and_grad(x, y, **options), value_and_grad(x, names[class_of], **options), strict=True):
        if several_passes:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)
    normalize = options.get("normalize", False)
    renamed = mine_triplets(x, names[class_of], normalize=normalize)
    for a, b in zip(mine_triplets(x, y, normalize=normalize), renamed, strict=True):
        assert torch.equal(a, b)


@given(batches)
@QUICK
def test_rotation_rotates_the_gradient(device, batch):
    x, y, options, generator = make({**batch, "kind": "init", "dim": max(2, batch["dim"])}, device, torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64))
    rotation = rotation.to(device)
    loss, grad = value_and_grad(x, y, **options)
    loss_r, grad_r = value_and_grad(x @ rotation, y, **options)
    torch.testing.assert_close(loss_r, loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad_r, grad @ rotation, rtol=1e-8, atol=1e-10)


@given(batches)
@QUICK
def test_translation_changes_nothing(device, batch):
    options = {**batch["options"], "normalize": False}
    x, y, _, generator = make({**batch, "kind": "init"}, device, torch.float64)
    shift = torch.randn(1, x.shape[1], generator=generator, dtype=torch.float64).to(device)
    loss, grad = value_and_grad(x, y, **options)
    loss_t, grad_t = value_and_grad(x + shift, y, **options)
    torch.testing.assert_close(loss_t, loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad_t, grad, rtol=1e-8, atol=1e-10)
    total = grad.sum(dim=0)  # the same said of the gradient: no net force
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-10)


@given(batches, st.sampled_from([2.0**-100, 2.0**-40, 2.0**-3, 2.0**7, 2.0**40, 2.0**60]))
@QUICK
def test_scaling_by_a_power_of_two(device, batch, factor):
    """Scaling rows and margin alike changes no choice: the loss scales with the distance, exactly, while nothing under-
    or overflows. float32, distances down to 1e-60 and up to 1e36: inside the kernel's range by its own rescaling."""
    x, y, options, _ = make({**batch, "kind": "init"}, device)
    options = {**options, "normalize": False, "distance": "euclidean"}
    loss, grad = value_and_grad(x, y, **options)
    loss_s, grad_s = value_and_grad(x * factor, y, **{**options, "margin": options["margin"] * factor})
    torch.testing.assert_close(loss_s.double(), loss.double() * factor, rtol=1e-6, atol=3e-7 * factor)
    torch.testing.assert_close(grad_s, grad, rtol=1e-5, atol=1e-5)


@given(batches)
@QUICK
def test_repeated_calls_are_bitwise_equal(device, batch):
    x, y, options, _ = make(batch, device)
    first = value_and_grad(x, y, **options)
    for _ in range(2):
        for a, b in zip(first, value_and_grad(x, y, **options), strict=True):
            assert torch.equal(a, b)


@given(batches)
@QUICK
def test_strides_change_no_bit(device, batch):
    x, y, options, _ = make(batch, device)
    want_loss, want_grad = value_and_grad(x, y, **options)
    n, dim = x.shape
    wide = torch.full((n, dim + 5), torch.nan, device=device)
    wide[:, 3 : 3 + dim] = x
    spaced = torch.full((n, 2 * dim), torch.nan, device=device)
    spaced[:, ::2] = x
    apart = torch.full((2 * n, dim), torch.nan, device=device)
    apart[::2] = x
    reversed_twice = x.flip(0).flip(0)
    for same in (wide[:, 3 : 3 + dim], spaced[:, ::2], apart[::2], x.t().contiguous().t(), reversed_twice):
        loss, grad = value_and_grad(same, y, **options)
        assert torch.equal(loss, want_loss) and torch.equal(grad, want_grad), same.stride()
    labels = torch.stack([y, y + 1], dim=1)[:, 0]
    assert torch.equal(triplet_loss(x, labels, **options), want_loss)


@given(batches)
@QUICK
def test_duplicated_rows_are_at_distance_zero(device, batch):
    x, y, options, _ = make(batch, device)
    assume(len(x) > 0 and not options["normalize"])
    x, y = torch.cat([x, x]), torch.cat([y, y])
    t = mine_triplets(x, y)
    twin = (t.positive - t.anchor).abs() == len(x) // 2
    assert not t.d2_ap[twin].any()
    assert_case(x, y, **options)


def test_expanded_rows(device):
    """All rows are one row in memory, stride 0: collapse."""
    x = torch.randn(1, 12, device=device).expand(15, 12)
    y = torch.arange(15, device=device) // 3
    loss, grad = value_and_grad(x, y)
    assert loss.item() == pytest.approx(0.2, rel=1e-7) and not grad.any()
    base = torch.randn(1, 12, device=device, requires_grad=True)
    triplet_loss(base.expand(15, 12), y).backward()
    assert base.grad.shape == (1, 12) and not base.grad.any()


def test_overlapping_rows(device):
    """as_strided windows: row stride 1, below D."""
    base = torch.randn(40, device=device)
    windows = base.as_strided((20, 8), (1, 1))
    y = torch.arange(20, device=device) % 4
    assert torch.equal(triplet_loss(windows, y), triplet_loss(windows.contiguous(), y))


def test_lazily_negated_input(device):
    z = torch.randn(20, 8, dtype=torch.complex64, device=device).conj()
    y = torch.arange(20, device=device) % 4
    assert z.imag.is_neg()
    assert torch.equal(triplet_loss(z.imag, y, margin=1.0), triplet_loss(z.imag.clone(), y, margin=1.0))
    assert torch.equal(mine_triplets(z.imag, y).negative, mine_triplets(z.imag.clone(), y).negative)


@pytest.mark.parametrize("row_offset", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_unaligned_storage(device, dtype, row_offset):
    flat = torch.randn(20 * 9 + 8, device=device).to(dtype)
    x = flat[row_offset : row_offset + 180].view(20, 9)
    y = torch.arange(20, device=device) % 4
    assert torch.equal(triplet_loss(x, y), triplet_loss(x.clone(), y))


@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean"])
def test_antipodes(device, distance):
    """x and -x in one class: the positive is the farthest point of the sphere, so everything falls back."""
    half = torch.nn.functional.normalize(torch.randn(10, 16), dim=1)
    x, y = torch.cat([half, -half]).to(device), torch.arange(10).repeat(2).to(device)
    report = assert_case(x, y, distance=distance)
    assert report.selection.pairs == 20
    assert mine_triplets(x, y).fallback.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-140, -120, -70, -40, 40, 60])
def test_huge_and_tiny_norms(device, dtype, exponent):
    """Squares of 2^-140 (denormal in float32) underflow and of 2^60 reach 2^120: the choice must be that of the
    shape."""
    x = torch.randn(24, 10)
    y = torch.arange(24) // 4
    small = (x * 2.0**exponent).to(dtype)
    shape = (small.double() * 2.0**-exponent).to(torch.float64)  # with the bits that denormals have left
    got = mine_triplets(small.to(device), y.to(device))
    want = mine_triplets(shape, y)
    assert torch.equal(got.negative.cpu(), want.negative) and torch.equal(got.fallback.cpu(), want.fallback)
    loss, grad = value_and_grad(small.to(device), y.to(device), margin=0.2 * 2.0**exponent, distance="euclidean")
    exact = loss_and_gradient(shape, want, margin=0.2, distance="euclidean")
    grain = 2.0 ** (-149 - exponent) if dtype == torch.float32 else 0.0  # the loss itself may be a denormal number
    assert float(loss) * 2.0**-exponent == pytest.approx(float(exact.loss), rel=2e-6, abs=2e-6 + grain)
    torch.testing.assert_close(grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3.4e38])
def test_extreme_elements_do_not_crash(device, value):
    x = torch.randn(30, 20)
    x[::3, ::2] = value
    x[1::3] = -value
    y = torch.arange(30) % 5
    x, y = x.to(device), y.to(device)
    loss, _ = value_and_grad(x, y)
    t = mine_triplets(x, y)
    assert loss.shape == () and ((t.negative >= 0) & (t.negative < 30)).all()
    assert (y[t.negative] != y[t.anchor]).all()


@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(1, 40), st.booleans())
@QUICK
def test_non_finite_anywhere(device, seed, n, dim, normalize):
    rng = random.Random(seed)
    x = torch.randn(n, dim)
    x[rng.randrange(n), rng.randrange(dim)] = rng.choice([torch.nan, torch.inf, -torch.inf])
    y = grouped_labels(rng, n).to(device)
    loss, grad = value_and_grad(x.to(device), y, normalize=normalize)
    assert loss.isnan() and grad.isnan().all()
    t = mine_triplets(x.to(device), y, normalize=normalize)
    assert (y[t.negative] != y[t.anchor]).all() and (y[t.positive] == y[t.anchor]).all()
