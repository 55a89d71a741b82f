"""The values of other libraries' semi-hard losses, from their description (not their code), in plain float64 loops.

Both take, for every ordered pair (a, p) of one label, the closest negative with D_an > D_ap, without an upper bound, or
the farthest one where there is none, and average [D_ap - D_an + margin]+ over all pairs, zeros included:

    TensorFlow Addons triplet_semihard_loss                 margin 1, L2 ("squared-L2" selectable), no normalisation
    sentence-transformers BatchSemiHardTripletLoss          margin 5, L2
"""

from __future__ import annotations

import math

import pytest
import torch

from facenet_ext import triplet_loss


def described(rows: list[list[float]], labels: list[int], margin: float, squared: bool):
    """Value and gradient, one triplet at a time."""
    n, dim = len(rows), len(rows[0])

    def difference(i, j):
        return [u - v for u, v in zip(rows[i], rows[j], strict=True)]

    def distance(i, j):
        square = sum(d * d for d in difference(i, j))
        return square if squared else math.sqrt(square)

    total, count = 0.0, 0
    grad = [[0.0] * dim for _ in rows]

    def add(i, j, sign):
        """The gradient of sign * distance(i, j)."""
        d = distance(i, j)
        slope = 2.0 if squared else (1 / d if d > 0 else 0.0)
        for k, value in enumerate(difference(i, j)):
            grad[i][k] += sign * slope * value
            grad[j][k] -= sign * slope * value

    for a in range(n):
        negatives = [j for j in range(n) if labels[j] != labels[a]]
        if not negatives:
            continue
        for p in range(n):
            if p == a or labels[p] != labels[a]:
                continue
            count += 1
            farther = [j for j in negatives if distance(a, j) > distance(a, p)]
            if farther:
                negative = min(farther, key=lambda j: distance(a, j))
            else:
                negative = max(negatives, key=lambda j: distance(a, j))
            hinge = distance(a, p) - distance(a, negative) + margin
            if hinge > 0:
                total += hinge
                add(a, p, +1)
                add(a, negative, -1)
    return total / max(count, 1), [[value / max(count, 1) for value in row] for row in grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("squared", [False, True], ids=["L2", "squared L2"])
@pytest.mark.parametrize("margin", [1.0, 5.0], ids=["TensorFlow Addons", "sentence-transformers"])
@pytest.mark.parametrize("seed", range(4))
def test_semihard_of_others(device, margin, squared, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    n, dim = 40, (3, 8, 32, 7)[seed]
    x = torch.randn(n, dim, generator=generator)
    x = torch.nn.functional.normalize(x) if seed % 2 else x
    y = torch.randint(0, 8, (n,), generator=generator)
    loss, grad = described(x.double().tolist(), y.tolist(), margin, squared)

    embeddings = x.to(device=device, dtype=dtype).requires_grad_()
    distance = "sqeuclidean" if squared else "euclidean"
    got, stats = triplet_loss(embeddings, y.to(device), margin=margin, distance=distance, return_stats=True)
    (got_grad,) = torch.autograd.grad(got, embeddings)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert got.item() == pytest.approx(loss, rel=tolerance)
    torch.testing.assert_close(
        got_grad.cpu().double(), torch.tensor(grad, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    assert int(stats.fallback) > 0  # both rules were needed


@pytest.mark.parametrize("squared", [False, True], ids=["L2", "squared L2"])
def test_where_we_part_from_them(device, squared):
    """On purpose: one class only is 0 here (they give mean(D_ap + margin)); all different is 0 (TensorFlow Addons:
    NaN)."""
    x = torch.randn(6, 4, device=device)
    distance = "sqeuclidean" if squared else "euclidean"
    for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6)):
        assert triplet_loss(x, labels.to(device), margin=1.0, distance=distance).item() == 0
