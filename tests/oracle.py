"""What the fused op is held against. Selection is discontinuous: one near-tie resolved the other way moves the gradient by a
percent, so one tolerance on the whole would fail at random or hide bugs. The two parts are therefore tested apart:

    check_selection   every negative the op chose is legal, and its float64 distance is within rounding of the best legal one
    loss_and_gradient loss and gradient in float64 for the op's own selection, to be met tightly

The embeddings' stored (rounded) values, read as float64, are the truth for every dtype.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import facenet_ext
from facenet_ext import Triplets

# Error of a distance in units of |a|² + |n|²: what float32 (float64) can do for an expanded square, see check_selection.
SELECTION_TOLERANCE = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# Distances of the winners are recomputed in direct form: relative error.
DIRECT_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def rows64(x: Tensor, normalize: bool = False) -> Tensor:
    x = x.detach().double()
    return torch.nn.functional.normalize(x, dim=1, eps=1e-12) if normalize else x


def pairwise_d2(x64: Tensor) -> Tensor:
    """Direct form, so that near-duplicates keep their relative accuracy in the oracle too."""
    return torch.cdist(x64, x64, compute_mode="donot_use_mm_for_euclid_dist").square()


# ---- the selection ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SelectionReport:
    """Counts of what is wrong, and the worst distance beyond the best legal choice in units of |a|² + |n|²."""

    pairs: int = 0
    illegal: int = 0  # wrong label, not farther than the positive beyond rounding, or a flag that contradicts the distances
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


def check_selection(x64: Tensor, labels: Tensor, triplets: Triplets, tolerance: float, chunk: int = 4096) -> SelectionReport:
    """Judges a selection by float64 distances. A negative at rounding distance of the border may fall on either side of it;
    `tolerance` times |a|² + |n|² is what rounding may move a distance by."""
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


# ---- loss and gradient with a given selection ---------------------------------------------------------------------------


@dataclasses.dataclass
class Exact:
    """float64 values for one selection. Pairs whose hinge is within rounding of its corner have no certain gradient: their
    contributions stand apart, and either choice is right."""

    loss: Tensor
    grad: Tensor  # [N, D], without the uncertain pairs
    uncertain: list[Tensor]  # [N, D] each
    loss_scale: float  # the largest term of the sums that cancel inside a hinge
    counts: tuple[int, int, int]
    uncertain_active: int
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
) -> Exact:
    """`corner`: a hinge smaller than this times the distances in it may be active or not."""
    x = embeddings.detach().cpu().double().requires_grad_()
    rows = torch.nn.functional.normalize(x, dim=1, eps=1e-12) if normalize else x
    anchor, positive, negative, _, _, is_fallback = (column.cpu() for column in triplets)
    fallbacks = int(is_fallback.sum())
    if fallback == "skip":
        anchor, positive, negative = (column[~is_fallback] for column in (anchor, positive, negative))
    d2_ap = (rows[anchor] - rows[positive]).square().sum(dim=1)
    d2_an = (rows[anchor] - rows[negative]).square().sum(dim=1)
    d_ap, d_an = (_sqrt(d2_ap), _sqrt(d2_an)) if distance == "euclidean" else (d2_ap, d2_an)
    hinge = d_ap - d_an + margin
    size = (d_ap + d_an + margin).detach()
    pairs = len(hinge)
    # Equal bit patterns (0 and duplicates) are exact in any precision, so a hinge of exactly 0 is certain.
    uncertain = (hinge.detach().abs() <= corner * size) & (hinge.detach() != 0)
    sure_active = (hinge.detach() > 0) & ~uncertain
    active = int(sure_active.sum())
    factor = 1.0
    if reduction == "mean":
        factor = 1.0 / max(pairs, 1)
    elif reduction == "mean_active":
        factor = 1.0 / max(active, 1)
    total = (hinge * sure_active).sum() * factor + (rows * 0).sum()
    (grad,) = torch.autograd.grad(total, x, retain_graph=True)
    contributions = [torch.autograd.grad(hinge[i] * factor, x, retain_graph=True)[0] for i in uncertain.nonzero().flatten()]
    summed = torch.relu(hinge.detach()).sum() * factor
    d2_stats = (float(d2_ap.mean()), float(d2_an.mean()), float(d2_ap.max())) if pairs else (0.0, 0.0, 0.0)
    return Exact(
        loss=summed,
        grad=grad,
        uncertain=contributions,
        loss_scale=float(size.max()) * factor * max(active, 1) if pairs else 0.0,
        counts=(pairs, active, fallbacks),
        uncertain_active=len(contributions),
        d2_stats=d2_stats,
    )


def gradient_error(grad: Tensor, exact: Exact) -> float:
    """max |grad - exact| / max |exact|, with the uncertain pairs counted in where that fits better."""
    residual = grad.detach().cpu().double() - exact.grad
    for contribution in exact.uncertain:
        with_it = residual - contribution
        if with_it.square().sum() < residual.square().sum():
            residual = with_it
    if residual.numel() == 0:
        return 0.0
    worst = float(residual.abs().max())
    largest = float(exact.grad.abs().max())
    return worst / largest if largest > 0 else (0.0 if worst == 0 else float("inf"))


def loss_error(loss: Tensor, exact: Exact) -> float:
    """|loss - exact| / the size of what cancels in it: a hinge is a difference of distances."""
    error = abs(float(loss) - float(exact.loss))
    return error / exact.loss_scale if exact.loss_scale > 0 else (0.0 if error == 0 else float("inf"))


def _sqrt(d2: Tensor) -> Tensor:
    zero = d2 == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, d2).sqrt())


# ---- both parts, for one batch ------------------------------------------------------------------------------------------


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

    half = x.dtype in (torch.float16, torch.bfloat16)
    x64 = rows64(x, normalize)
    selection = check_selection(x64, labels, mined, SELECTION_TOLERANCE[x.dtype])
    corner = 1e-13 if x.dtype == torch.float64 else 1e-5
    exact = loss_and_gradient(x, mined, normalize=normalize, corner=corner, **options)
    error = gradient_error(grad, exact)
    if half and error > 0:
        error = max(0.0, error - rounding(x.dtype))  # the gradient is rounded to the input's dtype, once

    pairs, active, fallbacks = exact.counts
    assert int(stats.pairs) == pairs and int(stats.fallback) == fallbacks, (stats, exact.counts)
    assert active <= int(stats.active) <= active + exact.uncertain_active, (stats, exact.counts)
    d2 = torch.stack([stats.mean_d2_ap, stats.mean_d2_an, stats.max_d2_ap]).cpu().double()
    d2_error = relative(d2, torch.tensor(exact.d2_stats, dtype=torch.float64))
    for value, column in ((mined.d2_ap, mined.positive), (mined.d2_an, mined.negative)):
        direct = (x64.cpu()[mined.anchor.cpu()] - x64.cpu()[column.cpu()]).square().sum(dim=1)
        d2_error = max(d2_error, relative(value.cpu().double(), direct))
    return CaseReport(selection, error, loss_error(loss, exact), d2_error, exact.uncertain_active)


def relative(value: Tensor, exact: Tensor) -> float:
    """Largest error, each relative to its own exact value."""
    if value.numel() == 0:
        return 0.0
    difference = (value - exact).abs()
    return float(torch.where(difference == 0, 0.0, difference / exact.abs()).max())


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


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
