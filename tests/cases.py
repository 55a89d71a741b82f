"""Batches to test with: random ones of mixed shapes, dtypes and regimes, and the shapes that go wrong by themselves."""

from __future__ import annotations

import dataclasses
import random

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS = {
    "fallback": ("farthest", "skip"),
    "distance": ("sqeuclidean", "euclidean"),
    "reduction": ("mean", "mean_active", "sum"),
    "normalize": (False, True),
}


@dataclasses.dataclass
class Case:
    name: str
    embeddings: Tensor
    labels: Tensor
    options: dict


def grouped_labels(rng: random.Random, n: int) -> Tensor:
    """Classes of every mix: even, all singletons, one class, one huge among singletons, ragged."""
    kind = rng.choice(("even", "even", "ragged", "singletons", "one", "huge", "pairs"))
    if kind == "even":
        k = rng.choice((2, 3, 4, 8, 16, 40))
        labels = torch.arange(n) // k
    elif kind == "ragged":
        labels = torch.tensor([int(rng.expovariate(4.0 / max(n, 1)) % max(n, 1)) for _ in range(n)], dtype=torch.int64)
    elif kind == "singletons":
        labels = torch.arange(n)
        if n > 2:
            labels[rng.randrange(n)] = labels[rng.randrange(n)]
    elif kind == "one":
        labels = torch.zeros(n, dtype=torch.int64)
        if n > 1 and rng.random() < 0.7:
            labels[rng.randrange(n)] = 1
    elif kind == "huge":
        labels = torch.arange(n)
        labels[: n * 3 // 4] = -1
    else:
        labels = torch.arange(n) // 2
    if rng.random() < 0.6:
        order = list(range(n))
        rng.shuffle(order)
        labels = labels[order]
    return labels.to(torch.int64) * rng.choice((1, -7, 2**40)) + rng.choice((0, 3, -(2**33)))


def geometry(rng: random.Random, generator: torch.Generator, labels: Tensor, dim: int, kind: str) -> Tensor:
    """float64 rows of one regime; init, mid and separated are those of the benchmark."""
    n = len(labels)
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    _, class_of = torch.unique(labels, return_inverse=True)
    classes = int(class_of.max()) + 1 if n else 1
    centres = F.normalize(torch.randn(classes, dim, generator=generator, dtype=torch.float64))
    if kind in ("mid", "separated"):
        return F.normalize(centres[class_of] + {"mid": 1.9, "separated": 1.0}[kind] * noise / dim**0.5)
    unit = F.normalize(noise)
    if kind == "duplicates":
        return unit[torch.randint(0, max(n // 3, 1), (n,), generator=generator)] if n else unit
    if kind == "near_duplicates":
        base = unit[torch.randint(0, max(n // 3, 1), (n,), generator=generator)] if n else unit
        return base + 10.0 ** rng.uniform(-6, -2) * noise / dim**0.5
    if kind == "grid":  # small integers: exact in every dtype, full of ties
        return torch.randint(-2, 3, (n, dim), generator=generator).double()
    if kind == "antipodes":
        return unit * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)[:, None] if n else unit
    if kind == "scaled":
        return noise * 10.0 ** rng.uniform(-3, 3)
    if kind == "norms":  # rows of very different length
        return unit * 10.0 ** (torch.rand(n, 1, generator=generator, dtype=torch.float64) * 4 - 2)
    if kind == "offset":
        away = F.normalize(torch.randn(1, dim, generator=generator, dtype=torch.float64))
        return unit + rng.choice((1.0, 3.0, 10.0)) * away
    return unit


def at_the_margin(rng: random.Random, generator: torch.Generator, labels: Tensor, dim: int, distance: float) -> Tensor:
    """float64 rows: classes of near duplicates, every second class at `distance` from the one before, but for as little
    as the duplicates differ."""
    n = len(labels)
    noise, away = F.normalize(torch.randn(2, n, dim, generator=generator, dtype=torch.float64), dim=2)
    _, class_of = torch.unique(labels, return_inverse=True)
    centre = F.normalize(torch.randn(n + 1, dim, generator=generator, dtype=torch.float64))[class_of // 2]
    size = 10.0 ** rng.uniform(-5, -2)
    beyond = distance + size * (2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 0.5)
    return centre + size * noise + torch.where(class_of[:, None] % 2 == 1, beyond, 0.0) * away


GEOMETRIES = (
    "init",
    "mid",
    "separated",
    "duplicates",
    "near_duplicates",
    "grid",
    "antipodes",
    "scaled",
    "norms",
    "offset",
)


def random_case(seed: int, max_rows: int, max_dim: int, dtype: torch.dtype | None = None) -> Case:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    n = rng.choice((rng.randrange(0, 6), rng.randrange(2, min(40, max_rows)), rng.randrange(2, max_rows)))
    usual = rng.choice((8, 16, 17, 31, 32, 33, 48, 64, 96, 100, 128, 200))
    dim = rng.choice((1, 2, 3, rng.randrange(1, max_dim), usual))
    dim = min(dim, max_dim)
    kind = rng.choice(GEOMETRIES)
    dtype = dtype or rng.choice((torch.float32, torch.float32, *DTYPES))
    labels = grouped_labels(rng, n)
    options = {name: rng.choice(values) for name, values in OPTIONS.items()}
    x = geometry(rng, generator, labels, dim, kind).to(dtype)
    scale = float(x.double().square().sum(dim=1).mean()) if n and not options["normalize"] else 1.0
    unit = scale if options["distance"] == "sqeuclidean" else scale**0.5
    options["margin"] = rng.choice((0.0, 0.05, 0.2, 1.0, 5.0)) * unit
    if kind == "near_duplicates" and rng.random() < 0.5:
        kind, options["normalize"], options["margin"] = "at_the_margin", False, rng.choice((0.05, 0.2, 1.0))
        reach = options["margin"] if options["distance"] == "euclidean" else options["margin"] ** 0.5
        x = at_the_margin(rng, generator, labels, dim, reach).to(dtype)
    name = f"seed={seed} n={n} dim={dim} {kind} {dtype} classes={len(labels.unique())} {options}"
    return Case(name, x, labels, options)
