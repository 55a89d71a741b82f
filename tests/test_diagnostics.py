"""explain: its numbers against a plain loop, its verdict where the cause was built in."""

from __future__ import annotations

import pytest
import torch

from facenet_ext import explain


def plain(x, y, margin, root):
    """Pairs by class, anchors without a semi-hard negative: one anchor and positive at a time."""
    x, y = x.double(), y.tolist()
    semi_hard = easy = fallback = 0
    anchors, served = set(), set()
    for a in range(len(y)):
        d = (x - x[a]).square().sum(1)
        d = (d.sqrt() if root else d).tolist()
        for p in range(len(y)):
            negatives = [d[n] for n in range(len(y)) if y[n] != y[a]]
            if p == a or y[p] != y[a] or not negatives:
                continue
            anchors.add(a)
            farther = [value for value in negatives if value > d[p]]
            if not farther:
                fallback += 1
            elif min(farther) - d[p] < margin:
                semi_hard += 1
                served.add(a)
            else:
                easy += 1
    return semi_hard, easy, fallback, len(anchors), len(anchors - served)


@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("seed", range(5))
def test_numbers(device, distance, seed):
    n = (3, 12, 25, 40, 60)[seed]
    centre = torch.randn(7, 5)
    y = torch.randint(0, 7, (n,))
    x = centre[y] * seed + torch.randn(n, 5)
    got = explain(x.to(device), y.to(device), margin=0.7, distance=distance)
    semi_hard, easy, fallback, anchors, without = plain(x, y, 0.7, distance == "euclidean")
    pairs = semi_hard + easy + fallback
    assert (got.rows, got.people, got.anchors, got.pairs) == (n, len(set(y.tolist())), anchors, pairs)
    assert got.semi_hard == semi_hard / max(pairs, 1)
    assert got.easy == easy / max(pairs, 1) and got.fallback == fallback / max(pairs, 1)
    assert got.anchors_without == without / max(anchors, 1)


def people(count, images, spread, dim=8):
    """`count` people far apart, their images `spread` around them."""
    y = torch.arange(count * images) // images
    return 10 * torch.randn(count, dim)[y] + spread * torch.randn(len(y), dim), y


def test_verdicts():
    def verdict(x, y, **options):
        return explain(x, y, **options).verdict

    x, y = people(4, 6, 0.1)
    assert verdict(x, y).startswith("100 % of the anchors have no semi-hard negative")
    assert "too few people (4)" in verdict(x, y)
    crossed = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # each one's positive stands opposite
    assert "every negative is nearer" in verdict(crossed, torch.tensor([0, 0, 1, 1]))
    assert "is no pair" in verdict(x, torch.arange(len(x))) and "is no pair" in verdict(x[:0], y[:0])
    assert "one person" in verdict(x, torch.zeros_like(y))
    assert "collapsed" in verdict(torch.ones(9, 4) + 1e-5 * torch.randn(9, 4), torch.arange(9) // 3)
    assert "not finite" in verdict(torch.where(torch.rand(x.shape) < 0.1, torch.nan, x), y)
    noise, labels = torch.randn(40, 16), torch.arange(40) // 4
    assert verdict(noise, labels, margin=3.0).startswith("Healthy")
    assert "the only one of their person" in verdict(
        noise, (labels * 4 + torch.arange(40) % 4).clamp(max=30), margin=3.0
    )
    line = torch.randn(40, 1) * torch.randn(1, 16)
    assert "on a line" in verdict(line, labels, margin=30.0)


def test_dimensions_and_table():
    x = torch.zeros(4, 3)
    x[0, 0], x[1, 0], x[2, 1], x[3, 1] = 1, -1, 1, -1  # two directions of equal variance
    found = explain(x, torch.tensor([0, 0, 1, 1]))
    assert found.dimensions == pytest.approx(2) and found.dim == 3
    assert str(found).endswith(found.verdict) and "dimensions in use                                 2.0 of 3" in str(
        found
    )


def test_errors():
    x, y = people(2, 2, 1.0)
    for options, name in (
        (dict(margin=-1), "margin"),
        (dict(distance="L1"), "distance"),
        (dict(normalize=1), "normalize"),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            explain(x, y, **options)
