"""What the fused op is held against. Selection is discontinuous: one near-tie resolved the other way moves the gradient
by a percent, so one tolerance on the whole would fail at random or hide bugs. The two parts are therefore tested apart:

    check_selection     every chosen negative is legal, and its float64 distance within rounding of the best legal one
    loss_and_gradient   loss and gradient in float64 for the op's own selection, to be met tightly

The embeddings' stored (rounded) values, read as float64, are the truth for every dtype.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import facenet_ext
from facenet_ext import Triplets

# Error of a distance in units of |a|² + |n|²: what float32 (float64) can do for an expanded square.
SELECTION_TOLERANCE = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# Distances of the winners are recomputed in direct form: relative error.
DIRECT_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def rows64(x: Tensor, normalize: bool = False) -> Tensor:
    x = x.detach().double()
    return torch.nn.functional.normalize(x, dim=1, eps=1e-12) if normalize else x


def pairwise_d2(x64: Tensor) -> Tensor:
    """Direct form, so that near-duplicates keep their relative accuracy in the oracle too."""
    return torch.cdist(x64, x64, compute_mode="donot_use_mm_for_euclid_dist").square()


# ---- the selection ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SelectionReport:
    """Counts of what is wrong, and the worst distance beyond the best legal choice in units of |a|² + |n|²."""

    pairs: int = 0
    illegal: int = 0  # wrong label, surely not farther than the positive, or a flag that contradicts the distances
    suboptimal: int = 0  # legal, but beyond rounding of the best
    worst_excess: float = 0.0

    @property
    def ok(self) -> bool:
        return self.illegal == 0 and self.suboptimal == 0


def expected_pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs that count, in order of anchor, then positive."""
    same = labels[:, None] == labels[None, :]
    counted = same & ~same.all(dim=1, keepdim=True)
    counted.fill_diagonal_(False)
    anchor, positive = counted.nonzero(as_tuple=True)
    return anchor, positive


def check_selection(
    x64: Tensor, labels: Tensor, triplets: Triplets, tolerance: float, chunk: int = 256
) -> SelectionReport:
    """Judges a selection by float64 distances. A negative at rounding distance of the border may fall on either side of
    it; `tolerance` times |a|² + |n|² is what rounding may move a distance by."""
    anchor, positive, negative, _, _, fallback = (column.cpu() for column in triplets)
    x64, labels = x64.cpu(), labels.cpu()
    want_anchor, want_positive = expected_pairs(labels)
    assert torch.equal(anchor, want_anchor) and torch.equal(positive, want_positive), "not exactly the pairs that count"
    report = SelectionReport(pairs=len(anchor))
    if not report.pairs:
        return report
    assert 0 <= int(negative.min()) and int(negative.max()) < len(x64), "negative outside the batch"
    d2 = pairwise_d2(x64)
    scale = x64.square().sum(dim=1)
    scale = scale[:, None] + scale[None, :]  # [N, N]
    for begin in range(0, report.pairs, chunk):
        part = slice(begin, begin + chunk)
        a, p, n, is_fallback = anchor[part], positive[part], negative[part], fallback[part]
        row, unit = d2[a], scale[a]  # [T, N]
        slack = tolerance * (unit + unit.gather(1, p[:, None]))  # both distances that are compared may be off
        other = labels[None, :] != labels[a][:, None]
        d2_ap = row.gather(1, p[:, None])
        surely_farther = other & (row > d2_ap + slack)
        maybe_farther = other & (row > d2_ap - slack)
        d2_an, slack_n, unit_n = (m.gather(1, n[:, None]).squeeze(1) for m in (row, slack, unit))

        wrong_label = ~other.gather(1, n[:, None]).squeeze(1)
        too_near = ~is_fallback & ~maybe_farther.gather(1, n[:, None]).squeeze(1)
        false_fallback = is_fallback & surely_farther.any(dim=1)
        report.illegal += int((wrong_label | too_near | false_fallback).sum())

        best_near = torch.where(surely_farther, row, torch.inf).amin(dim=1)
        best_far = torch.where(other, row, -torch.inf).amax(dim=1)
        excess = torch.where(is_fallback, best_far - d2_an, d2_an - best_near).nan_to_num(nan=0.0, neginf=0.0)
        report.suboptimal += int((excess > slack_n).sum())
        report.worst_excess = max(report.worst_excess, float((excess / unit_n.clamp_min(1e-300)).max()))
    return report


# ---- loss and gradient with a given selection ------------------------------------------------------------------------


@dataclasses.dataclass
class Exact:
    """float64 values for one selection. Pairs whose hinge is within rounding of its corner have no certain gradient:
    their contributions stand apart, and either choice is right."""

    loss: Tensor
    grad: Tensor  # [N, D], without the uncertain pairs
    uncertain: list[Tensor]  # [N, D] each
    likely: Tensor  # [uncertain] bool: active, going by the distances that the op reports
    loss_unit: float  # the size of what cancels inside the hinges: an error of eps times this is unavoidable
    grad_unit: float  # with normalize, the size of what cancels between unit rows; else 0
    counts: tuple[int, int, int]  # pairs, surely active, fallbacks
    d2_stats: tuple[float, float, float]


def loss_and_gradient(
    embeddings: Tensor,
    triplets: Triplets,
    *,
    margin: float = 0.2,
    fallback: str = "farthest",
    distance: str = "sqeuclidean",
    reduction: str = "mean",
    normalize: bool = False,
    corner: float = 1e-6,
    active: int | None = None,
) -> Exact:
    """`corner`: a hinge smaller than this times its distances may be active or not. `active`: the op's own count, which
    "mean_active" divides by."""
    x = embeddings.detach().cpu().double().requires_grad_()
    rows = torch.nn.functional.normalize(x, dim=1, eps=1e-12) if normalize else x
    fallbacks = int(triplets.fallback.sum())
    counted = [column.cpu() for column in triplets]
    if fallback == "skip":
        counted = [column[~counted[-1]] for column in counted]
    anchor, positive, negative, own_ap, own_an, _ = counted
    d2_ap = (rows[anchor] - rows[positive]).square().sum(dim=1)
    d2_an = (rows[anchor] - rows[negative]).square().sum(dim=1)
    d_ap, d_an = (_sqrt(d2_ap), _sqrt(d2_an)) if distance == "euclidean" else (d2_ap, d2_an)
    hinge = d_ap - d_an + margin
    # Normalising rounds each unit row: near-duplicates are then known to eps of the row, not of their difference.
    size = (d_ap + d_an + margin + (1.0 if normalize else 0.0)).detach()
    pairs = len(hinge)
    uncertain = hinge.detach().abs() <= corner * size
    if not normalize:  # a hinge of exactly 0 comes from equal differences, which every precision finds equal
        uncertain &= hinge.detach() != 0
    sure_active = (hinge.detach() > 0) & ~uncertain
    surely = int(sure_active.sum())
    active = surely if active is None else active
    factor = 1.0
    if reduction == "mean":
        factor = 1.0 / max(pairs, 1)
    elif reduction == "mean_active":
        factor = 1.0 / max(active, 1)
    total = (hinge * sure_active).sum() * factor + (rows * 0).sum()
    (grad,) = torch.autograd.grad(total, x, retain_graph=True)
    doubtful = uncertain.nonzero().flatten()
    contributions = [torch.autograd.grad(hinge[i] * factor, x, retain_graph=True)[0] for i in doubtful]
    own_ap, own_an = (_sqrt(d2.double()) if distance == "euclidean" else d2.double() for d2 in (own_ap, own_an))
    likely = (own_ap - own_an + margin > 0)[uncertain]
    summed = torch.relu(hinge.detach()).sum() * factor
    grad_unit = 0.0
    if normalize and pairs:
        pulling = (sure_active | uncertain) * factor
        pull_p, pull_n = _slope(d_ap.detach(), distance) * pulling, _slope(d_an.detach(), distance) * pulling
        total_pull = torch.zeros(len(x), dtype=torch.float64)
        for index, pull in ((anchor, pull_p + pull_n), (positive, pull_p), (negative, pull_n)):
            total_pull.index_add_(0, index, pull)
        grad_unit = float((total_pull / x.detach().norm(dim=1).clamp_min(1e-12)).max())
    with torch.no_grad():
        d2_stats = (float(d2_ap.mean()), float(d2_an.mean()), float(d2_ap.max())) if pairs else (0.0, 0.0, 0.0)
    return Exact(
        loss=summed,
        grad=grad,
        uncertain=contributions,
        likely=likely,
        loss_unit=float(size.max()) * factor * max(active, 1) if pairs else 0.0,
        grad_unit=grad_unit,
        counts=(pairs, surely, fallbacks),
        d2_stats=d2_stats,
    )


def gradient_error(grad: Tensor, exact: Exact) -> float:
    """max |grad - exact| / max |exact|; of the uncertain pairs those count in that fit best.

    A half-precision gradient is allowed, element by element, the one rounding to its dtype that it cannot avoid.
    """
    got = grad.detach().cpu().double()
    if not exact.uncertain:
        return _gradient_error(got, exact.grad, exact.grad_unit, grad.dtype)
    parts = torch.stack(exact.uncertain)
    flat, aim = parts.flatten(1), (got - exact.grad).flatten()
    choices = [exact.likely.double(), torch.zeros(len(parts)).double(), torch.ones(len(parts)).double()]
    if bool(aim.isfinite().all()):
        choices.append(_closest_subset(flat, aim))
        choices += [_flipped(choice, flat, aim) for choice in choices]
    sums = ((choice @ flat).reshape(got.shape) for choice in choices)
    return min(_gradient_error(got, exact.grad + part, exact.grad_unit, grad.dtype) for part in sums)


def _gradient_error(got: Tensor, truth: Tensor, unit: float, dtype: torch.dtype) -> float:
    if truth.numel() == 0:
        return 0.0
    error = (got - truth).abs()
    if dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        half_ulp = (truth.abs() * info.eps / 2).clamp_min(info.smallest_normal * info.eps / 2)
        error = (error - half_ulp * (1 + 1e-6)).clamp_min(0)
        error[(truth.abs() >= info.max) & (got == truth.sign() * torch.inf)] = 0
    worst, unit = float(error.max()), max(float(truth.abs().max()), unit)
    return worst / unit if unit > 0 else (0.0 if worst == 0 else float("inf"))


def _closest_subset(parts: Tensor, target: Tensor) -> Tensor:
    """Which of the parts [k, M] add up to what comes closest to the target [M]: of few, all 2^k sums are tried."""
    k = len(parts)
    if k <= 12:
        choice = (torch.arange(2**k)[:, None] >> torch.arange(k) & 1).double()  # [2^k, k]
        distance = ((choice @ (parts @ parts.T)) * choice).sum(1) - 2 * choice @ (parts @ target)
        return choice[distance.argmin()]
    return torch.linalg.lstsq(parts.T, target[:, None]).solution.flatten().round().clamp(0, 1)


def _flipped(choice: Tensor, parts: Tensor, target: Tensor) -> Tensor:
    """The same, taken in or left out one by one while that comes closer: where parts depend on each other, least
    squares spread over all of them what a few have done, and how rounding falls decides what is left of that."""
    products, aims = parts @ parts.T, parts @ target
    for _ in range(4 * len(parts)):
        change = (1 - 2 * choice) * 2 * (products @ choice - aims) + products.diagonal()
        best = change.argmin()
        if change[best] >= 0:
            break
        choice = choice.clone()
        choice[best] = 1 - choice[best]
    return choice


def loss_error(loss: Tensor, exact: Exact) -> float:
    """|loss - exact| / the size of what cancels in it: a hinge is a difference of distances."""
    error = abs(float(loss.detach()) - float(exact.loss))
    return error / exact.loss_unit if exact.loss_unit > 0 else (0.0 if error == 0 else float("inf"))


def _sqrt(d2: Tensor) -> Tensor:
    zero = d2 == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, d2).sqrt())


def _slope(d: Tensor, distance: str) -> Tensor:
    """What one unit of x_a - x_b adds to the gradient."""
    return torch.full_like(d, 2.0) if distance == "sqeuclidean" else torch.where(d > 0, 1 / d, 0.0)


# ---- both parts, for one batch ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class CaseReport:
    selection: SelectionReport
    grad_error: float
    loss_error: float
    d2_error: float
    uncertain: int


def run_case(embeddings: Tensor, labels: Tensor, *, normalize: bool = False, **options) -> CaseReport:
    """Runs the op on one batch and measures both parts; `assert_case` says what is good enough."""
    x = embeddings.detach().clone().requires_grad_()
    mined = facenet_ext.mine_triplets(x, labels, normalize=normalize)
    loss, stats = facenet_ext.triplet_loss(x, labels, normalize=normalize, return_stats=True, **options)
    plain = facenet_ext.triplet_loss(x, labels, normalize=normalize, **options)
    (grad,) = torch.autograd.grad(loss, x)
    (plain_grad,) = torch.autograd.grad(plain, x)
    assert torch.equal(loss, plain) and torch.equal(grad, plain_grad), "return_stats changes the loss or its gradient"
    assert grad.dtype == x.dtype and grad.shape == x.shape

    x64 = rows64(x, normalize)
    selection = check_selection(x64, labels, mined, SELECTION_TOLERANCE[x.dtype])
    corner = 1e-14 if x.dtype == torch.float64 else 1e-6
    exact = loss_and_gradient(x, mined, normalize=normalize, corner=corner, active=int(stats.active), **options)

    pairs, active, fallbacks = exact.counts
    assert int(stats.pairs) == pairs and int(stats.fallback) == fallbacks, (stats, exact.counts)
    assert active <= int(stats.active) <= active + len(exact.uncertain), (stats, exact.counts)
    d2 = torch.stack([stats.mean_d2_ap, stats.mean_d2_an, stats.max_d2_ap]).cpu().double()
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    row_rounding = 2 * eps if normalize else 0.0
    d2_error = relative(d2, torch.tensor(exact.d2_stats, dtype=torch.float64), row_rounding)
    for value, column in ((mined.d2_ap, mined.positive), (mined.d2_an, mined.negative)):
        direct = (x64.cpu()[mined.anchor.cpu()] - x64.cpu()[column.cpu()]).square().sum(dim=1)
        d2_error = max(d2_error, relative(value.cpu().double(), direct, row_rounding))
    return CaseReport(selection, gradient_error(grad, exact), loss_error(loss, exact), d2_error, len(exact.uncertain))


def relative(value: Tensor, exact: Tensor, row_rounding: float = 0.0) -> float:
    """Largest error of squared distances, each relative to itself, beyond what `row_rounding` of the rows does."""
    if value.numel() == 0:
        return 0.0
    difference = (value - exact).abs() - row_rounding * (2 * exact.sqrt() + row_rounding)
    return float(torch.where(difference <= 0, 0.0, difference / exact.abs()).max())


GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
LOSS_TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 3e-7, torch.float16: 3e-7}


def assert_case(embeddings: Tensor, labels: Tensor, **options) -> CaseReport:
    report = run_case(embeddings, labels, **options)
    dtype = embeddings.dtype
    assert report.selection.ok, report
    assert report.grad_error <= GRADIENT_TOLERANCE[dtype], report
    assert report.loss_error <= LOSS_TOLERANCE[dtype], report
    assert report.d2_error <= DIRECT_TOLERANCE[dtype], report
    return report
