"""The rules that give every negative a term, against the reference, which lists the triplets: on small integers, whose
distances are exact, so that counts agree to the unit; and the same bits for any number of threads."""

from __future__ import annotations

import pytest
import torch
from test_rules import integers

from facenet_ext import autograd, functional, reference

RULES = ("all", "all_semi_hard")


def loss_and_gradients(problem, x, r, options, need_stats):
    x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
    loss, counts, d2 = autograd.triplet_loss(problem(x, r), options, need_stats)
    return loss, counts, d2, torch.autograd.grad(loss, (x, r), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("part", range(3))
def test_every_term_equals_the_reference(part):
    terms = 0
    for seed in range(50 * part, 50 * part + 50):
        x, r, problem, plain, options = integers(seed, RULES, 40)
        x.requires_grad_(), r.requires_grad_()
        loss, stats = plain(reference.triplet_loss, x, r, **options._asdict(), return_stats=True)
        grads = torch.autograd.grad(loss, (x, r), allow_unused=True, materialize_grads=True)
        got, counts, d2, got_grads = loss_and_gradients(problem, x, r, options, True)
        alone, _, _, alone_grads = loss_and_gradients(problem, x, r, options, False)
        assert torch.equal(got, alone) and all(map(torch.equal, got_grads, alone_grads)), (seed, options)
        torch.testing.assert_close(got, loss, rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(got_grads, grads, rtol=1e-10, atol=1e-10)
        got_stats = functional.stats_of(counts, d2, options)
        for name, value in stats.items():
            torch.testing.assert_close(got_stats[name], value, rtol=1e-12, atol=1e-12)
        single, single_counts, _, single_grads = loss_and_gradients(problem, x.float(), r.float(), options, True)
        assert torch.equal(single_counts, counts), (seed, options)
        torch.testing.assert_close(single.double(), loss, rtol=2e-6, atol=2e-6 * float(loss.detach() + options.margin))
        scale = max(float(g.abs().max()) if g.numel() else 0.0 for g in grads)
        for one, want in zip(single_grads, grads, strict=True):
            torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=1e-5 * scale + 1e-9)
        terms += int(stats.pairs)
    assert terms > 5_000  # the cases are not empty ones


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
def test_unit_rows_in_float32_over_several_tiles(rule, distance):
    generator = torch.Generator().manual_seed(7)
    x = torch.nn.functional.normalize(torch.randn(230, 30, generator=generator), dim=1)
    x = x + 3 if distance == "sqeuclidean" else x  # far from the origin
    y = torch.randint(0, 40, (230,), generator=generator)
    exact = x.double().requires_grad_()
    want = reference.triplet_loss(exact, y, negatives=rule, distance=distance)
    (want_grad,) = torch.autograd.grad(want, exact)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = x.clone().requires_grad_()
            loss, _ = functional.triplet_loss(own, y, negatives=rule, distance=distance, return_stats=True)
            results.append((loss.detach(), *torch.autograd.grad(loss, own)))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])
    # Of the band's terms a few lie within rounding of d(a, n) = d(a, p), where a whole margin is counted or not.
    rtol = 2e-6 if rule == "all" else 5e-5
    torch.testing.assert_close(results[0][0].double(), want.detach(), rtol=rtol, atol=0)
    error = (results[0][1].double() - want_grad).norm() / want_grad.norm()
    assert error < 1e-3, error


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_near_duplicates_of_other_labels_keep_their_direction(spread):
    """A Euclidean distance's gradient divides by it: from |a|² + |n|² - 2 a.n a small one would be noise."""
    generator = torch.Generator().manual_seed(1)
    base = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=1)
    x = base.repeat(4, 1) + spread * torch.randn(80, 16, generator=generator) / 4
    y = torch.arange(80) // 5
    gradients = []
    for rows in (x, x.double()):
        rows = rows.requires_grad_()
        triplet = functional.triplet_loss if rows.dtype == torch.float32 else reference.triplet_loss
        loss = triplet(rows, y, negatives="all", distance="euclidean", margin=3.0)
        gradients.append(torch.autograd.grad(loss, rows)[0].double())
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("form", ["plain", "offset", "beside_a_long_row"])
def test_near_pairs_keep_the_accuracy_of_their_difference(form):
    """Euclidean, twins a thousandth of their length apart, all terms active: a row's gradient is a sum of unit vectors.
    Moving the rows must not round what is left of their differences: not where one long row alone lies far away."""
    generator = torch.Generator().manual_seed(8)
    x = torch.nn.functional.normalize(torch.randn(40, 24, generator=generator)).repeat_interleave(3, 0)
    x += 1e-3 * torch.nn.functional.normalize(torch.randn(x.shape, generator=generator))
    if form == "offset":
        x += 3
    if form == "beside_a_long_row":
        x[7] *= 1e3
    labels = torch.randint(6, (len(x),), generator=generator)
    margin = 9 * float(x.norm(dim=1).max())
    grads = []
    for rows in (x.clone().requires_grad_(), x.double().requires_grad_()):
        loss = functional.triplet_loss(
            rows, labels, negatives="all", distance="euclidean", reduction="sum", margin=margin
        )
        grads.append(torch.autograd.grad(loss, rows)[0].double())
    # Two weights of a pair for each of N rows and up to N / 6 positives bound the sum of a row's terms.
    unit = 2 * len(x) * len(x) / 6
    assert float((grads[0] - grads[1]).norm(dim=1).max()) < 3e-7 * unit


def assert_gradient(x, y, limit, **options):
    """The gradient against the reference in float64, by each row's own largest element."""
    exact = x.double().requires_grad_()
    (want,) = torch.autograd.grad(reference.triplet_loss(exact, y, **options), exact)
    x = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(functional.triplet_loss(x, y, **options), x)
    own = want.abs().amax(1).clamp_min(want.abs().amax() * 1e-6)
    error = (got.double() - want).abs().amax(1) / own
    assert want.abs().amax() > 0 and float(error.max()) < limit, float(error.max())


@pytest.mark.parametrize("rule", RULES)
def test_short_rows_among_long_ones(rule):
    """One unit for all rows, as products in bytes have it, would leave nothing of the short ones, whose terms alone
    are active."""
    generator = torch.Generator().manual_seed(3)
    short = 1e-3 * torch.randn(64, 20, generator=generator)
    long = 10 * torch.randn(40, 20, generator=generator)
    y = torch.cat([torch.arange(64) // 8, torch.arange(100, 140)])
    assert_gradient(torch.cat([short, long]), y, 2e-5, negatives=rule, margin=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "sizes", [(15,), (16,), (47,), (60,), (62,), (64,), (65,), (121,), (122,), (128, 128), (129, 129)]
)
def test_classes_of_every_width(rule, sizes):
    """Where ranks leave the registers (64), counts a byte of one sign (60, 120), two anchors' weights one byte (128).
    Distances are whole numbers: no term is within rounding of its edge."""
    generator = torch.Generator().manual_seed(sum(sizes))
    y = torch.cat([torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), torch.arange(5, 20)])
    x = torch.randint(-3, 4, (len(y), 6), generator=generator).float()
    assert_gradient(x, y, 1e-5, negatives=rule, margin=9.5)
