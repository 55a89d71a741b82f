"""The cases: ragged sizes, label mixes, geometries, types, options. Everything is drawn from one seed per case."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from emulation import (
    DISTANCES,
    DTYPES,
    FALLBACKS,
    NEGATIVES,
    PAIR_ORDERS,
    POSITIVES,
    REDUCTIONS,
    SCHEDULES,
    Case,
    exact,
)


def make_labels(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    if kind == "balanced":
        labels = np.arange(n) // max(1, int(rng.integers(2, 9)))
    elif kind == "one_class":
        labels = np.full(n, 5)
    elif kind == "all_different":
        labels = np.arange(n)
    elif kind == "two_classes":
        labels = (rng.random(n) < 0.4).astype(np.int64)
    elif kind == "long_tail":
        labels = np.minimum(rng.zipf(1.6, n), 20)
    else:
        raise ValueError(kind)
    labels = rng.permutation(labels).astype(np.int64)
    if rng.random() < 0.5:  # any integers will do
        values = rng.integers(-(2**62), 2**62, size=int(labels.max(initial=0)) + 1)
        labels = values[labels]
    return labels


def make_rows(rng: np.random.Generator, kind: str, labels: np.ndarray, d: int) -> np.ndarray:
    n = len(labels)
    x = rng.standard_normal((n, d))
    centres = {label: rng.standard_normal(d) for label in np.unique(labels)}
    centre = np.array([centres[label] for label in labels]).reshape(n, d)
    unit = lambda v: v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30)  # noqa: E731
    if kind == "random":
        return unit(x)
    if kind == "separated":
        return unit(unit(centre) + 0.3 * x / np.sqrt(d))
    if kind == "mid":
        return unit(unit(centre) + 1.9 * x / np.sqrt(d))
    if kind == "collapsed":
        return np.tile(unit(x[:1]), (n, 1)) if n else x
    if kind == "nearly_collapsed":
        return unit(x[:1] + 1e-4 * x) if n else x
    if kind == "duplicates":
        return unit(x)[rng.integers(0, max(1, n // 3), n)] if n else x
    if kind == "antipodes":
        return unit(x[:1]) * rng.choice([-1.0, 1.0], (n, 1)) if n else x
    if kind == "grid":  # many exact ties
        return rng.integers(-2, 3, (n, d)) / 4.0
    if kind == "norms":  # from tiny to large rows in one batch
        return unit(x) * 10.0 ** rng.uniform(-3, 3, (n, 1))
    if kind == "some_zero":
        return unit(x) * (rng.random((n, 1)) < 0.7)
    if kind == "wide":  # elements of one row differ by many powers of two
        return x * 2.0 ** rng.integers(-30, 1, (n, d))
    raise ValueError(kind)


LABELS = ("balanced", "balanced", "balanced", "long_tail", "two_classes", "one_class", "all_different")
ROWS = (
    "random",
    "random",
    "mid",
    "separated",
    "duplicates",
    "collapsed",
    "nearly_collapsed",
    "antipodes",
    "grid",
    "norms",
)
ROWS += ("some_zero", "wide")
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 48, 63, 64, 65, 70, 90, 127, 128, 130)
DIMS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 130)


def draw(seed: int, largest: int = 130) -> Case:
    """One case, mixed over everything."""
    rng = np.random.default_rng(seed)
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    n, d = pick([s for s in SIZES if s <= largest]), pick(DIMS)
    dtype = pick(DTYPES if seed % 2 else ("float32",))
    label_kind, row_kind = pick(LABELS), pick(ROWS)
    labels = make_labels(rng, label_kind, n)
    x = make_rows(rng, row_kind, labels, d)
    if row_kind not in ("norms", "wide", "grid") and dtype in ("float32", "float64") and rng.random() < 0.2:
        x = x * pick((1e-15, 1e-6, 1e5, 1e15))
    if dtype == "float16" and row_kind == "norms":
        x = x.clip(-100, 100)
    x = exact(x, dtype)
    if row_kind == "duplicates" or row_kind == "grid":
        margin = 0.25
    else:
        margin = pick((0.0, 0.05, 0.2, 1.0, 3.0))
    anchors = anchor_labels = count = None
    offset = 0
    form = rng.random()
    if form < 0.15:
        a = pick([s for s in SIZES if s <= largest])
        chosen = rng.integers(0, n, a)
        anchor_labels = np.where(rng.random(a) < 0.8, labels[chosen], rng.integers(0, 9, a))
        anchors = exact(x[chosen] + 0.1 * np.abs(x).max() * rng.standard_normal((a, d)), dtype)
    elif form < 0.3 and n > 1:
        offset = int(rng.integers(0, n - 1))
        count = int(rng.integers(1, n - offset + 1))
        if offset == 0 and count == n:
            count = n - 1
    reduction = pick(REDUCTIONS)
    nonfinite = rng.random() < 0.04
    if nonfinite:
        x = x.copy()
        x[int(rng.integers(n)), int(rng.integers(d))] = pick((np.nan, np.inf, -np.inf))
    return Case(
        name=f"seed {seed}: {dtype} {n} x {d} {label_kind} {row_kind}"
        + (" separate anchors" if anchors is not None else f" rows {offset}+{count}" if count is not None else ""),
        x=x, labels=labels, anchors=anchors, anchor_labels=anchor_labels, offset=offset, count=count, dtype=dtype,
        distance=pick(DISTANCES[:2]), fallback=pick(FALLBACKS), reduction=reduction, normalize=bool(rng.random() < 0.3),
        margin=margin, stats=bool(reduction == "mean_active" or rng.random() < 0.5),
        gradient=bool(rng.random() < 0.85), padding=pick((0, 0, 1, 5)),
        multiprocessors=pick((1, 2, 3)), capability=pick((75, 80, 90, 90)), schedule=pick(SCHEDULES), seed=seed,
        late_copies=bool(rng.random() < 0.5), shared_kib=pick((64, 99, 227)),
    )  # fmt: skip


def draw_rule(seed: int, largest: int = 130) -> Case:
    """The same with the rules of the family mixed over it."""
    case = draw(seed, largest)
    rng = np.random.default_rng([seed, 1])
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    distance = pick(DISTANCES)
    options = {
        "negatives": pick(NEGATIVES[:4]),
        "positives": pick(("all", *POSITIVES)),
        "pairs": pick(PAIR_ORDERS) if case.anchors is None else "ordered",
        "soft_margin": bool(rng.random() < 0.3),
        "band": pick((0, 0, 0.1, 0.25, 1.0)),
        "negatives_only": 0 if rng.random() < 0.6 else int(rng.integers(0, len(case.x) + 1)),
        "draw_seed": int(rng.integers(-(2**63), 2**63)),
        "constants": 0 if rng.random() < 0.6 else int(rng.integers(0, len(case.x) + 1)),
        "distance": distance,
        "normalize": case.normalize or distance == "cosine",
    }
    return replace(case, name=f"{case.name} {options}", **options)


def simple(n: int, d: int, classes: int, seed: int = 0, **options) -> Case:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes).astype(np.int64)
    dtype = options.get("dtype", "float32")
    x = exact(make_rows(rng, options.pop("rows", "random"), labels, d), dtype)
    return Case(name=f"{dtype} {n} x {d}, {classes} classes, {options}", x=x, labels=labels, seed=seed + 1, **options)


def with_nan(case: Case) -> Case:
    """One row of it is not finite."""
    x = case.x.copy()
    x[len(x) // 2] = np.nan
    return replace(case, name=f"{case.name}, NaN", x=x)
