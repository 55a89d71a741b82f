"""The whole family of rules as plain float64 loops over anchors, positives and negatives, in numpy: written from the
docstring of facenet_ext.triplet_loss and from nothing else. Every legal combination of options is held against it.

    combinations    every legal one, and which rule forbids the others
    check           one batch: the mined selection is legal and, within rounding, the best (or the one drawn);
                    loss, gradients, counts and means are those of the selection, in float64

What rounding may decide stands apart. A distance is known to `slack`; a negative within it of a band's edge may be
taken or not, a hinge within it of 0 may be active or not. Of few such terms every outcome is tried, and one of them
must fit the counts, the loss and the gradient together; of many (near-duplicates) only bounds are checked, and counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import torch
from cases import DTYPES, GEOMETRIES, geometry, grouped_labels

import facenet_ext
from facenet_ext import _options

# In units of what cancels: a squared distance of |a|² + |n|²; a gradient's row of the sum of |weight| |difference|.
DISTANCE_TOLERANCE = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRADIENT_TOLERANCE = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
LOSS_TOLERANCE = {torch.float64: 4e-15, torch.float32: 3e-7, torch.bfloat16: 3e-7, torch.float16: 3e-7}
TRIED = 6  # uncertain terms of which every outcome is tried

CHOICES = {
    "negatives": _options.NEGATIVES,
    "positives": _options.POSITIVES,
    "pairs": _options.PAIRS,
    "fallback": _options.FALLBACKS,
    "distance": _options.DISTANCES,
    "soft_margin": (False, True),
    "band": (False, True),
    "reduction": _options.REDUCTIONS,
    "normalize": (False, True),
    "references": (None, *_options.REFERENCES),
}


def forbidden(option: dict) -> str | None:
    """The keyword that the refusal of a combination has to name, or None: it is legal."""
    if option["soft_margin"] and option["negatives"] in ("all", "all_semi_hard"):
        return "soft_margin"
    if option["band"] and option["negatives"] not in ("random_semi_hard", "all_semi_hard"):
        return "band"
    if option["pairs"] == "unordered" and option["references"] == "only":
        return "pairs"
    return None


def combinations() -> list[dict]:
    """Every legal combination, in an order that any part of is a sample of."""
    every = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    every = [option for option in every if not forbidden(option)]
    random.Random(0).shuffle(every)
    return every


@dataclasses.dataclass
class Case:
    name: str
    x: torch.Tensor  # [N, D]
    y: torch.Tensor  # [N]
    r: torch.Tensor | None  # [M, D] references
    z: torch.Tensor | None  # [M]
    references: str | None
    options: dict  # of triplet_loss
    seed: int
    exact: bool  # every squared distance is exact in every dtype

    def arguments(self) -> dict:
        more = dict(generator=torch.Generator().manual_seed(self.seed))
        if self.references:
            more |= dict(reference_embeddings=self.r, reference_labels=self.z, references=self.references)
        return more


def random_case(seed: int, combination: dict, max_rows: int = 26, max_dim: int = 40) -> Case:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    n = rng.randrange(0, 5) if rng.random() < 0.1 else rng.randrange(4, max_rows)
    m = rng.choice((0, 1, rng.randrange(max_rows // 2), rng.randrange(max_rows // 2)))
    dim = rng.choice((1, 2, 3, 16, 17, rng.randrange(1, max_dim)))
    kind, dtype = rng.choice(GEOMETRIES), rng.choice((torch.float32, *DTYPES))
    options = {name: value for name, value in combination.items() if name not in ("references", "band")}
    labels = grouped_labels(rng, n + m)
    if rng.random() < 0.7:  # fewer classes: long lists of positives and of negatives
        labels = torch.randint(0, rng.choice((2, 3, 5)), (n + m,), generator=generator)
    rows = geometry(rng, generator, labels, dim, kind).to(dtype)
    unit_rows = options["normalize"] or options["distance"] == "cosine"
    scale = float(rows.double().square().sum(dim=1).mean()) if n + m and not unit_rows else 1.0
    unit = scale**0.5 if options["distance"] == "euclidean" else scale
    options["margin"] = rng.choice((0.0, 0.05, 0.2, 1.0, 5.0)) * unit
    if combination["band"]:
        options["band"] = rng.choice((0.03, 0.2, 1.0)) * max(unit, 1e-3)
    order = torch.randperm(n + m, generator=generator)
    rows, labels = rows[order], labels[order]
    references = combination["references"]
    name = f"seed={seed} n={n} m={m if references else 0} dim={dim} {kind} {dtype} references={references} {options}"
    r, z = (rows[n:], labels[n:]) if references else (None, None)
    return Case(name, rows[:n], labels[:n], r, z, references, options, seed, kind == "grid" and not unit_rows)


# ---- the definition --------------------------------------------------------------------------------------------------


class Truth:
    """Distances of a batch in float64, and who may be whose positive and negative. Rows: the batch, then references."""

    def __init__(self, case: Case):
        self.case, o = case, case.options
        self.n = len(case.x)
        given = case.x if case.r is None else torch.cat([case.x, case.r])
        self.given = given.double().numpy()
        self.labels = (case.y if case.r is None else torch.cat([case.y, case.z])).numpy()
        self.unit_rows = o["normalize"] or o["distance"] == "cosine"
        self.lengths = np.sqrt((self.given**2).sum(axis=1))
        self.rows = self.given / np.maximum(self.lengths, 1e-12)[:, None] if self.unit_rows else self.given
        self.first = self.n if case.references == "only" else 0  # the first candidate
        candidates = range(self.first, len(self.rows))
        self.d2 = np.zeros((self.n, len(self.rows)))
        self.slack = np.zeros_like(self.d2)  # what rounding may move a squared distance by
        norms = (self.rows**2).sum(axis=1)
        if o["negatives"] in _options.EVERY and len(self.rows):  # all rows are moved to a point amid them first
            middle = (self.rows.min(axis=0) + self.rows.max(axis=0)) / 2
            norms += ((self.rows - middle) ** 2).sum(axis=1)
        self.norms = norms
        for a in range(self.n):
            for c in candidates:
                self.d2[a, c] = ((self.rows[a] - self.rows[c]) ** 2).sum()
                self.slack[a, c] = DISTANCE_TOLERANCE[case.x.dtype] * (norms[a] + norms[c])
        if case.exact:
            self.slack[:] = 0
        self.eps = np.finfo(np.float64 if case.x.dtype == torch.float64 else np.float32).eps
        self.least = self.most = 0  # terms that there may be
        self.vague = False  # more outcomes than are listed
        self.doubtful = []  # terms of which rounding decides whether they are hard, semi-hard or easy
        may_be_positive = self.n if case.references in (None, "negatives") else len(self.rows)
        self.positives, self.negatives = [], []
        for a in range(self.n):
            same = [c for c in candidates if self.labels[c] == self.labels[a]]
            positives = [c for c in same if c != a and c < may_be_positive]
            if o["pairs"] == "unordered":
                positives = [c for c in positives if c > a]
            self.negatives.append([c for c in candidates if self.labels[c] != self.labels[a]])
            self.positives.append(positives if self.negatives[a] else [])

    def unit(self, d2: float) -> float:
        return {"sqeuclidean": d2, "euclidean": math.sqrt(d2), "cosine": d2 / 2}[self.case.options["distance"]]

    def gap(self, a: int, p: int, n: int) -> float:
        return self.unit(self.d2[a, n]) - self.unit(self.d2[a, p])

    def gap_range(self, a: int, p: int, n: int) -> tuple[float, float]:
        """The gap as it may come out, the edge compared with included."""
        low = self.unit(max(self.d2[a, n] - self.slack[a, n], 0)) - self.unit(self.d2[a, p] + self.slack[a, p])
        high = self.unit(self.d2[a, n] + self.slack[a, n]) - self.unit(max(self.d2[a, p] - self.slack[a, p], 0))
        return low, high

    def in_band(self, a: int, p: int, n: int) -> tuple[bool, bool]:
        """Whether n is surely, and whether it may be, one of the negatives that the rule wants for (a, p)."""
        o, (low, high) = self.case.options, self.gap_range(a, p, n)
        if o["negatives"] in ("all", "hard"):
            return True, True
        edge = o.get("band") or o["margin"]
        rounding = self.edge_rounding(a, p, n, edge)
        sure, maybe = high < edge - rounding, low < edge + rounding
        if o.get("band") and self.case.exact and o["distance"] == "sqeuclidean":
            maybe = low <= edge + rounding
        if o["negatives"] == "semi_hard":
            sure = maybe = True
        if o["negatives"] != "random_active":
            sure, maybe = sure and low > 0, maybe and high > 0
        return sure, maybe

    def edge_rounding(self, a: int, p: int, n: int, edge: float) -> float:
        return 4 * self.eps * (self.unit(self.d2[a, n]) + self.unit(self.d2[a, p]) + edge)


def priority(seed: int, anchor: int, negative: int) -> int:
    """The upper half of two rounds of splitmix64's finaliser, in Python's integers."""

    def mix(h: int) -> int:
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ h >> 27) * 0x94D049BB133111EB % 2**64
        return h ^ h >> 31

    key = mix((seed + 0x9E3779B97F4A7C15 * (anchor + 1)) % 2**64)
    return mix(key ^ (negative * 0xD1342543DE82EF95 + 1) % 2**64) >> 32


# ---- the selection ---------------------------------------------------------------------------------------------------


def wrong_choices(truth: Truth, mined: facenet_ext.Triplets) -> list[str]:
    """What is illegal, or surely not the best, in what mine_triplets lists."""
    case, rule, wrong = truth.case, truth.case.options["negatives"], []
    listed: dict[int, dict[int, list[tuple[int, bool]]]] = {}
    columns = (column.tolist() for column in (mined.anchor, mined.positive, mined.negative, mined.fallback))
    rows = list(zip(*columns, strict=True))
    if [row[:3] for row in rows] != sorted(row[:3] for row in rows) or len({row[:3] for row in rows}) != len(rows):
        wrong.append("not in order of anchor, positive, negative")
    for a, p, n, fallback in rows:
        listed.setdefault(a, {}).setdefault(p + truth.first, []).append((n + truth.first, fallback))
    (seed,) = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(case.seed)).tolist()
    for a in range(truth.n):
        chosen = listed.pop(a, {})
        kept = kept_positives(truth, a, list(chosen), wrong)
        for p in kept:
            wrong += [f"({a}, {p}): {what}" for what in wrong_negatives(truth, a, p, chosen.pop(p, []), rule, seed)]
        if chosen:
            wrong.append(f"anchor {a} has no such positive: {chosen}")
    if listed:
        wrong.append(f"no such anchors: {listed}")
    return wrong


def kept_positives(truth: Truth, a: int, listed: list[int], wrong: list[str]) -> list[int]:
    """The positives that `positives` keeps; where rounding decides which, the op's own if it is among the best."""
    kind, best = truth.case.options["positives"], best_positives(truth, a)
    if kind == "all" or not best:
        return truth.positives[a]
    if any(p not in best for p in listed) or len(listed) > 1:
        wrong.append(f"positives {listed} of anchor {a} are not the {kind}: {best}")
    return [p for p in best if p in listed] or (best if len(best) == 1 else [])


def best_positives(truth: Truth, a: int) -> list[int]:
    """Those that may come out as the hardest or easiest; one, where distances are exact."""
    sign = 1 if truth.case.options["positives"] == "hardest" else -1
    least = max((sign * truth.d2[a, p] - truth.slack[a, p] for p in truth.positives[a]), default=0.0)
    best = [p for p in truth.positives[a] if sign * truth.d2[a, p] + truth.slack[a, p] >= least]
    return best[:1] if truth.case.exact else best


def wrong_negatives(truth: Truth, a: int, p: int, taken: list[tuple[int, bool]], rule: str, seed: int) -> list[str]:
    d2, slack, case, others = truth.d2[a], truth.slack[a], truth.case, truth.negatives[a]
    chosen = [n for n, _ in taken]
    if any(n not in others for n in chosen):
        return [f"{chosen}: not of another label"]
    bands = {n: truth.in_band(a, p, n) for n in others}
    sure, maybe = [n for n in others if bands[n][0]], [n for n in others if bands[n][1]]
    flags = [fallback for _, fallback in taken]
    if rule in _options.EVERY:
        if set(sure) - set(chosen) or set(chosen) - set(maybe) or any(flags):
            return [f"{chosen} instead of {sure}"]
        return []
    if len(chosen) > 1:
        return [f"several negatives: {chosen}"]
    if rule == "semi_hard" and case.options["fallback"] == "farthest" and not chosen:
        return ["the pair is missing"]
    if not chosen:
        return [f"left out, although {sure} may be taken"] if sure else []
    (n,), (fallback,) = chosen, flags
    if fallback:
        if rule != "semi_hard" or case.options["fallback"] == "skip":
            return ["a fallback that the rule does not know"]
        if sure:
            return [f"a fallback, although {sure} are farther than the positive"]
        farthest = max(d2[c] - slack[c] for c in others)
        if d2[n] + slack[n] < farthest or (case.exact and n != min(c for c in others if d2[c] == d2[n])):
            return [f"{n} is not the farthest"]
        return []
    if n not in maybe:
        return [f"{n} is not eligible"]
    if rule in _options.RANDOM:
        anchor = a if case.references != "only" else len(truth.rows) - truth.n + a
        first = min(sure, key=lambda c: (priority(seed, anchor, c - truth.first), c), default=n)
        mine = (priority(seed, anchor, n - truth.first), n)
        return [f"{n} drawn instead of {first}"] if (priority(seed, anchor, first - truth.first), first) < mine else []
    closest = min((d2[c] + slack[c] for c in sure), default=math.inf)
    if d2[n] - slack[n] > closest or (case.exact and n != min(c for c in sure if d2[c] == d2[n])):
        return [f"{n} is not the closest"]
    return []


# ---- loss and gradient of a selection --------------------------------------------------------------------------------


class Sums:
    """What a set of terms adds up to, before the reduction."""

    def __init__(self, shape: tuple[int, int]):
        self.loss, self.loss_unit, self.terms, self.active, self.hard, self.semi_hard = 0.0, 0.0, 0, 0, 0, 0
        self.grad, self.bound = np.zeros(shape), np.zeros(shape[0])
        self.d2_ap, self.d2_an, self.max_d2_ap = 0.0, 0.0, 0.0

    def __add__(self, other: Sums) -> Sums:
        out = Sums(self.grad.shape)
        for name, value in vars(self).items():
            setattr(out, name, value + getattr(other, name))
        out.max_d2_ap = max(self.max_d2_ap, other.max_d2_ap)
        return out


def soft_plus(g: float) -> float:
    return max(g, 0.0) + math.log1p(math.exp(-abs(g)))


def add_term(sums: Sums, truth: Truth, a: int, p: int, n: int, active: bool) -> None:
    o, gap = truth.case.options, truth.gap(a, p, n)
    d_ap, d_an = truth.unit(truth.d2[a, p]), truth.unit(truth.d2[a, n])
    sums.terms += 1
    sums.d2_ap += truth.d2[a, p]
    sums.d2_an += truth.d2[a, n]
    sums.max_d2_ap = max(sums.max_d2_ap, truth.d2[a, p])
    sums.hard += gap <= 0
    sums.semi_hard += 0 < gap < o["margin"]
    if not active:
        return
    sums.active += 1
    every = o["negatives"] in _options.EVERY
    rounding = 1.0 if truth.unit_rows else 0.0  # a unit row is rounded once: its differences carry that
    if every:  # moved rows too
        rounding += math.sqrt(truth.norms.max())
    value, slope = (
        (soft_plus(-gap), 1 / (1 + math.exp(min(gap, 709)))) if o["soft_margin"] else (o["margin"] - gap, 1.0)
    )
    size = d_ap + d_an + o["margin"] + value + rounding
    if every:  # expanded squares
        size += truth.norms[[a, a, p, n]].sum()
    sums.loss += value
    sums.loss_unit += size
    for c, d, sign in ((p, d_ap, 1.0), (n, d_an, -1.0)):
        weight = {"sqeuclidean": 2.0, "cosine": 1.0, "euclidean": 1 / d if d > 0 else 0.0}[o["distance"]] * slope
        difference = truth.rows[a] - truth.rows[c]
        sums.grad[a] += sign * weight * difference
        sums.grad[c] -= sign * weight * difference
        length = math.sqrt((difference**2).sum())
        bound = weight * (length * (1 + (1 - slope) * size) + 0.2 * rounding)
        if o["distance"] == "euclidean" and d < 64 * truth.eps * rounding:  # no direction is known, or 0
            bound += 2 / GRADIENT_TOLERANCE[truth.case.x.dtype]
        if every and o["distance"] == "euclidean" and d > 0:  # whose square was expanded, unless it is small
            bound += weight * length * min(16, truth.norms[[a, c]].sum() / d**2 / 4)
        sums.bound[[a, c]] += bound


def outcomes(truth: Truth, mined: facenet_ext.Triplets) -> tuple[Sums, list[list[Sums]]]:
    """The sums of the certain terms; for each uncertain one what it may add."""
    shape, o = truth.rows.shape, truth.case.options
    certain, uncertain = Sums(shape), []
    if o["negatives"] in _options.EVERY:  # the list is not made of what the loss chose: both are within rounding
        triplets = []
        for a in range(truth.n):
            positives = truth.positives[a] if o["positives"] == "all" else best_positives(truth, a)
            if len(positives) > 1 and o["positives"] != "all":
                uncertain.append(one_of(truth, a, positives))
                continue
            triplets += [(a, p, n, *truth.in_band(a, p, n)) for p in positives for n in truth.negatives[a]]
    else:
        columns = (mined.anchor, mined.positive + truth.first, mined.negative + truth.first)
        triplets = [(*row, True, True) for row in zip(*(column.tolist() for column in columns), strict=True)]
    for a, p, n, surely_in, maybe_in in triplets:
        if not maybe_in:
            continue
        truth.least += surely_in
        truth.most += 1
        hinge = o["margin"] - truth.gap(a, p, n)
        low, high = truth.gap_range(a, p, n)
        if o["negatives"] not in _options.EVERY:  # distances of what was chosen are recomputed in direct form
            low = high = truth.gap(a, p, n)
        rounding = truth.edge_rounding(a, p, n, o["margin"])
        if truth.unit_rows:
            rounding += 8 * truth.eps
        if low - rounding <= 0 <= high + rounding or low - rounding <= o["margin"] <= high + rounding:
            truth.doubtful.append((a, p, n))
        is_exact = truth.case.exact and o["distance"] == "sqeuclidean" and hinge == 0
        if o["soft_margin"]:
            active, corner = True, False
        else:
            active, corner = hinge > 0, not is_exact and low - rounding <= o["margin"] <= high + rounding
        states = []
        if not surely_in:
            states.append(Sums(shape))
        for on in (True, False) if corner else (active,):
            state = certain if surely_in and not corner else Sums(shape)
            add_term(state, truth, a, p, n, on)
            states.append(state)
        if len(states) > 1 or not surely_in:
            uncertain.append(states)
    return certain, uncertain


def one_of(truth: Truth, a: int, positives: list[int]) -> list[Sums]:
    """Sums of an anchor's terms with each positive that may be the one."""
    states, least, most = [], [], []
    for p in positives:
        states.append(Sums(truth.rows.shape))
        bands = {n: truth.in_band(a, p, n) for n in truth.negatives[a]}
        least.append(sum(sure for sure, _ in bands.values()))
        most.append(sum(maybe for _, maybe in bands.values()))
        truth.doubtful += [(a, p, n) for n in bands]
        for n in bands:
            if bands[n][0]:
                add_term(states[-1], truth, a, p, n, truth.gap(a, p, n) < truth.case.options["margin"])
    truth.least, truth.most = truth.least + min(least), truth.most + max(most)
    truth.vague |= least != most
    return states


@dataclasses.dataclass
class Report:
    illegal: list[str]  # of the selection
    terms: int
    wrong: list[str] = dataclasses.field(default_factory=list)  # of the rest
    gradient: float = 0.0  # worst row, in units of its bound
    loss: float = 0.0  # in units of what cancels in it
    mean: float = 0.0  # mean and largest squared distances
    uncertain: int = 0
    only_bounds: bool = False


def check(case: Case, device: torch.device | str = "cpu", judged_as: dict | None = None) -> Report:
    """Runs the op and holds it against the loops. `judged_as`: options of the loops, if not the op's own."""
    o, dtype = case.options, case.x.dtype
    x, y = case.x.to(device, copy=True).requires_grad_(), case.y.to(device)
    r = None if case.r is None else case.r.to(device, copy=True).requires_grad_()
    leaves = [x] if r is None else [x, r]
    live = dataclasses.replace(case, x=x, r=r, z=None if r is None else case.z.to(device))
    mining = {name: value for name, value in o.items() if name not in ("soft_margin", "reduction")}
    mined = facenet_ext.Triplets(*(c.cpu() for c in facenet_ext.mine_triplets(x, y, **mining, **live.arguments())))
    loss, stats = facenet_ext.triplet_loss(x, y, **o, **live.arguments(), return_stats=True)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    alone = facenet_ext.triplet_loss(x, y, **o, **live.arguments())
    alone_grads = torch.autograd.grad(alone, leaves, allow_unused=True, materialize_grads=True)
    truth = Truth(case if judged_as is None else dataclasses.replace(case, options=judged_as))
    report = Report(wrong_choices(truth, mined), int(stats.pairs))
    if not (torch.equal(loss, alone) and all(map(torch.equal, grads, alone_grads))):
        report.wrong.append("return_stats changes the loss or its gradient")
    if any(g.dtype != dtype for g in grads) or loss.dtype != (dtype if dtype == torch.float64 else torch.float32):
        report.wrong.append("dtypes")
    if report.wrong or report.illegal:
        return report
    certain, uncertain = outcomes(truth, mined)
    report.uncertain = len(uncertain)
    if truth.case.options["negatives"] not in _options.EVERY and int(stats.pairs) != len(mined.anchor):
        report.wrong.append(f"stats count {int(stats.pairs)} terms of {len(mined.anchor)} listed")
    got = torch.cat([g.double().cpu() for g in grads]).numpy()
    if len(uncertain) > TRIED or math.prod(map(len, uncertain)) > 3**TRIED or truth.vague:
        report.only_bounds = True
        least, most = truth.least, truth.most
        if not least <= int(stats.pairs) <= most or np.isnan(got).any() or not float(loss.detach()) >= 0:
            report.wrong.append(f"{int(stats.pairs)} terms, not {least} to {most}")
        return report
    best = None
    for states in itertools.product(*uncertain):
        sums = sum(states, certain)
        if sums.terms != int(stats.pairs) or sums.active != int(stats.active):
            continue
        fit = fits(truth, sums, float(loss.detach()), got, stats)
        best = min(best or fit, fit, key=lambda f: beyond(f[:3], dtype))
    if best is None:
        report.wrong.append(
            f"{int(stats.pairs)} terms, {int(stats.active)} active; expected {certain.terms}, {certain.active}, "
            f"{len(uncertain)} uncertain"
        )
        return report
    report.gradient, report.loss, report.mean, sums = best
    check_counts(truth, sums, stats, mined, report)
    return report


def beyond(errors: tuple[float, float, float], dtype: torch.dtype) -> float:
    """The worst error of gradient, loss and means in units of what is accepted."""
    tolerances = (GRADIENT_TOLERANCE, LOSS_TOLERANCE, DISTANCE_TOLERANCE)
    return max(error / tolerance[dtype] for error, tolerance in zip(errors, tolerances, strict=True))


def fits(truth: Truth, sums: Sums, loss: float, got: np.ndarray, stats) -> tuple[float, float, float, Sums]:
    """Errors of gradient, loss and mean distances in their units."""
    dtype, reduction = truth.case.x.dtype, truth.case.options["reduction"]
    count = {"mean": sums.terms, "mean_active": sums.active, "sum": 1}[reduction]
    factor = 1 / count if count else 0.0
    grad, bound = sums.grad * factor, sums.bound * factor
    if truth.unit_rows:
        along = (grad * truth.rows).sum(axis=1) * (truth.lengths >= 1e-12)
        lengths = np.maximum(truth.lengths, 1e-12)
        grad, bound = (grad - along[:, None] * truth.rows) / lengths[:, None], bound / lengths
    error = np.abs(got - grad)
    if dtype in (torch.float16, torch.bfloat16):  # the one rounding that cannot be avoided
        info = torch.finfo(dtype)
        error -= (1 + 1e-6) * np.maximum(np.abs(grad) * info.eps / 2, info.smallest_normal * info.eps / 2)
        error[(np.abs(grad) >= info.max) & np.isinf(got) & (np.sign(got) == np.sign(grad))] = 0
        error = np.maximum(error, 0)
    tiny = float(np.finfo(np.float64 if dtype == torch.float64 else np.float32).tiny)
    worst = float((np.sqrt((error**2).sum(axis=1)) / (bound + tiny / 1e-6)).max(initial=0.0))
    loss_error = abs(loss - sums.loss * factor) / (sums.loss_unit * factor + tiny / 1e-6)
    means = sums.d2_ap / max(sums.terms, 1), sums.d2_an / max(sums.terms, 1), sums.max_d2_ap
    direct = truth.case.options["negatives"] not in _options.EVERY and not truth.unit_rows
    mean_error = 0.0
    for name, mean in zip(("mean_d2_ap", "mean_d2_an", "max_d2_ap"), means, strict=True):
        size = mean if direct else 4 * truth.norms.max(initial=0.0)
        mean_error = max(mean_error, abs(float(stats[name]) - mean) / (size + tiny / 1e-6))
    return worst, loss_error, mean_error, sums


def check_counts(truth: Truth, sums: Sums, stats, mined, report: Report) -> None:
    o = truth.case.options
    if o["negatives"] not in _options.EVERY:
        looked = sum(min(len(p), 1) if o["positives"] != "all" else len(p) for p in truth.positives)
        none = int(mined.fallback.sum()) if o["negatives"] == "semi_hard" and o["fallback"] == "farthest" else None
        none = looked - len(mined.anchor) if none is None else none
        if int(stats.fallback) != none:
            report.wrong.append(f"{int(stats.fallback)} fallbacks, expected {none}")
    doubt = len(truth.doubtful)
    for name in ("hard", "semi_hard"):
        if abs(int(stats[name]) - getattr(sums, name)) > doubt:
            report.wrong.append(
                f"stats.{name} is {int(stats[name])}, expected {getattr(sums, name)}, {doubt} uncertain"
            )
    if int(stats.easy) != int(stats.pairs) - int(stats.hard) - int(stats.semi_hard):
        report.wrong.append("easy is not the rest")


def failed(case: Case, report: Report) -> bool:
    return bool(report.wrong or report.illegal) or beyond((report.gradient, report.loss, report.mean), case.x.dtype) > 1
