"""The rules that draw: uniform, and the same draws for equal seeds, whatever computes them. Whole selections against
the reference index by index: test_rules.py, and here over several tiles, passes and dtypes."""

from __future__ import annotations

import pytest
import torch

from facenet_ext import TripletLoss, _options, mine_triplets, reference, triplet_loss


def drawn(function, x, y, seed: int, **options):
    return function(x, y, generator=torch.Generator().manual_seed(seed), **options)


def lattice(n: int, dim: int, classes: int, dtype=torch.float64):
    """Small integers: distances are exact in every dtype, ties abound."""
    return torch.randint(-3, 4, (n, dim)).to(dtype), torch.randint(0, classes, (n,))


@pytest.mark.parametrize("negatives", _options.RANDOM)
@pytest.mark.parametrize(
    ("dtype", "n", "classes", "options"),
    [
        (torch.float32, 450, 9, dict(margin=4.0)),
        (torch.float32, 400, 150, dict(margin=1.0, distance="euclidean", pairs="unordered")),
        (torch.float64, 300, 3, dict(margin=9.0)),
        (torch.bfloat16, 210, 30, dict(margin=2.0, positives="hardest")),
        (torch.float16, 210, 30, dict(margin=2.0, positives="easiest")),
    ],
    ids=str,
)
def test_several_tiles_and_any_number_of_threads(negatives, dtype, n, classes, options):
    x, y = lattice(n, 5, classes, dtype)
    r, z = lattice(40, 5, classes, dtype)
    for more in ({}, *(dict(reference_embeddings=r, reference_labels=z, references=w) for w in _options.REFERENCES)):
        if more.get("references") == "only" and "pairs" in options:
            continue
        want = drawn(reference.mine_triplets, x, y, 5, negatives=negatives, **options, **more)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = drawn(mine_triplets, x, y, 5, negatives=negatives, **options, **more)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (more, threads)
            own = x.clone().requires_grad_()
            loss = drawn(triplet_loss, own, y, 5, negatives=negatives, **options, **more)
            results.append((loss.detach(), *torch.autograd.grad(loss, own)))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("negatives", _options.RANDOM)
def test_a_class_that_takes_several_passes(negatives):
    """1,200 positives an anchor: their thresholds exceed the memory of one pass."""
    x, y = lattice(1300, 4, 1)
    y[1200:] = torch.arange(100)
    got = drawn(mine_triplets, x, y, 1, negatives=negatives, margin=3.0)
    want = drawn(reference.mine_triplets, x, y, 1, negatives=negatives, margin=3.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and len(got.anchor) > 1_000_000


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected).square() / expected).sum())


@pytest.mark.parametrize("negatives", _options.RANDOM)
def test_every_eligible_negative_is_equally_likely(negatives):
    """Per pair, chi-square over 3,000 seeds, within 5 standard deviations; over all pairs, within 4 of its mean."""
    x, y = torch.rand(14, 1, dtype=torch.float64), torch.arange(14) // 2
    seeds, margin = 3000, 0.15
    draws = torch.stack(
        [drawn(mine_triplets, x, y, s, negatives=negatives, margin=margin).negative for s in range(seeds)]
    )
    pairs = drawn(mine_triplets, x, y, 0, negatives=negatives, margin=margin)
    d2 = (x - x.T).square()
    total, freedom = 0.0, 0
    for i, (a, p) in enumerate(zip(pairs.anchor, pairs.positive, strict=True)):
        gap = d2[a] - d2[a, p]
        eligible = (y != y[a]) & (gap < margin) & ((gap > 0) | (negatives == "random_active"))
        counts = torch.bincount(draws[:, i], minlength=14).double()
        assert (counts[~eligible] == 0).all()
        if eligible.sum() > 1:
            k = int(eligible.sum()) - 1
            value = chi_square(counts[eligible])
            assert value < k + 5 * (2 * k) ** 0.5 + 5, (a, p, counts)
            total, freedom = total + value, freedom + k
    assert freedom > 20 and abs(total - freedom) < 4 * (2 * freedom) ** 0.5, (total, freedom)


@pytest.mark.parametrize("negatives", _options.RANDOM)
def test_a_generator_repeats_the_draws(negatives):
    x, y = torch.rand(60, 3), torch.arange(60) // 6
    generator = torch.Generator()

    def three(seed):
        generator.manual_seed(seed)
        criterion = TripletLoss(negatives=negatives, generator=generator)
        return [float(criterion(x, y)) for _ in range(3)]

    assert three(1) == three(1) and three(1) != three(2) and len(set(three(1))) == 3  # a new draw every call
    torch.manual_seed(4)
    first = triplet_loss(x, y, negatives=negatives)
    assert not torch.equal(triplet_loss(x, y, negatives=negatives), first)
    torch.manual_seed(4)
    assert torch.equal(triplet_loss(x, y, negatives=negatives), first)  # torch's own generator where none is given


def test_other_rules_leave_the_generator_alone():
    x, y = torch.rand(12, 3), torch.arange(12) // 3
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    for negatives in _options.NEGATIVES:
        if negatives not in _options.RANDOM:
            triplet_loss(x, y, negatives=negatives, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("negatives", _options.RANDOM)
def test_nan_is_never_drawn_nor_looked_from(negatives):
    x, y = torch.rand(40, 3), torch.arange(40) // 4
    x[7, 1], x[22] = torch.nan, torch.nan
    for distance in _options.DISTANCES:
        got = drawn(mine_triplets, x, y, 3, negatives=negatives, distance=distance, margin=0.3)
        want = drawn(reference.mine_triplets, x, y, 3, negatives=negatives, distance=distance, margin=0.3)
        broken = torch.tensor([7, 22])
        assert len(got.anchor) and not any(torch.isin(column, broken).any() for column in got[:3])
        assert torch.equal(got.anchor, want.anchor) and torch.equal(got.positive, want.positive)


def test_pairs_without_an_eligible_negative_do_not_count():
    """Two classes far apart: no hinge is active, nothing is drawn, the loss is 0 with a gradient of 0."""
    x, y = torch.rand(20, 2), torch.arange(20) // 10
    x[10:] += 100
    x.requires_grad_()
    for negatives in _options.RANDOM:
        loss, stats = triplet_loss(x, y, negatives=negatives, return_stats=True)
        assert float(loss.detach()) == 0 and int(stats.pairs) == 0 and int(stats.fallback) == 180
        assert float(stats.fallback_rate) == 1 and not torch.autograd.grad(loss, x)[0].any()
        assert len(mine_triplets(x, y, negatives=negatives).anchor) == 0
