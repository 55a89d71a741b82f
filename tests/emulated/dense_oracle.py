"""What is right for the rules that give every negative a term: all of them, one anchor at a time, in float64.

Whether a term is active is discontinuous in the distances. Where one is within rounding of its edge, either answer is
right: such terms are in doubt, and loss, counts and gradient may differ by what they bring. On rows whose distances are
exact in the kernels' arithmetic (`exact`), nothing is in doubt.
"""

from __future__ import annotations

import numpy as np
from emulation import Case, Outputs

EPS = {"float64": 2.0**-52}


def prepared(x: np.ndarray, case: Case) -> np.ndarray:
    if not case.normalize:
        return x
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def kept_positives(case: Case) -> np.ndarray:
    """[A, C] bool: the pairs that the labels and `pairs` leave; `positives` is chosen by distance."""
    anchors, anchor_labels = case.anchor_rows()
    index = np.arange(len(case.x))
    own = np.full(len(anchors), -1) if case.anchors is not None else case.offset + np.arange(len(anchors))
    keep = (case.labels[None, :] == anchor_labels[:, None]) & (index[None, :] != own[:, None])
    keep &= index[None, :] < len(case.x) - case.negatives_only
    if case.pairs == "unordered":
        keep &= index[None, :] > own[:, None]
    return keep


def check_dense(case: Case, out: Outputs, exact: bool = False) -> float:
    """Raises AssertionError; returns the largest error of the gradient over its largest element, 0 where a term is in
    doubt."""
    anchors, anchor_labels = case.anchor_rows()
    n = len(case.x) + (0 if case.plain else len(anchors))
    assert out.workspace_bytes <= 24 * n * case.x.shape[1] + 1024 * n
    eps = EPS.get(case.dtype, 2.0**-23)
    above, closed = case.negatives == "all_semi_hard", case.negatives == "all_semi_hard" and case.band > 0
    euclidean, unit = case.distance == "euclidean", 0.5 if case.distance == "cosine" else 1.0
    xa, xc = prepared(anchors, case), prepared(case.x, case)
    every = np.concatenate([xa, xc])
    apart, length = ((every - xc[0]) ** 2).sum(axis=1).max(), (every**2).sum(axis=1).max()
    moves = 4 * apart < (xc[0] ** 2).sum()
    centre = xc[0] if moves else np.zeros_like(xc[0])
    scale = apart if moves else length
    rounding = 0.0 if exact else 16 * eps * scale + eps**2 * length  # of a squared distance by the expansion
    if case.normalize:
        rounding += 8 * eps * np.sqrt(scale) + 8 * eps**2

    weight, maybe = np.zeros((2, len(xa), len(xc)))  # of (a, j): d loss / d (d2 or d) and what is in doubt
    loss = slack = 0.0
    counts, doubts = np.zeros((2, 5))
    sums, max_ap = np.zeros(2), 0.0
    keep = kept_positives(case)
    for a in range(len(xa)):
        positive, negative = np.flatnonzero(keep[a]), np.flatnonzero(case.labels != anchor_labels[a])
        if len(positive) == 0 or len(negative) == 0:
            continue
        d2 = ((xc - xa[a]) ** 2).sum(axis=1)
        off = rounding / (np.sqrt(d2) + np.sqrt(rounding)) if euclidean and rounding > 0 else np.full(len(d2), rounding)
        d = np.sqrt(d2) if euclidean else d2 * unit
        if case.positives != "all":
            extreme = d2[positive].max() if case.positives == "hardest" else d2[positive].min()
            near = positive[np.abs(d2[positive] - extreme) <= 2 * rounding]
            # Of nearly equal ones the kernel may take any; the cases leave no doubt where it matters.
            assert len(near) == 1 or exact or np.ptp(d2[near]) == 0, "the case leaves a choice"
            positive = near[:1]
        gap = d[None, negative] - d[positive][:, None]  # [K, M]
        unsure = off[None, negative] + off[positive][:, None] + (0 if exact else 4 * eps * (case.margin + np.abs(gap)))
        hinge = case.margin - gap
        term, term_doubt = np.ones_like(gap, bool), np.zeros_like(gap, bool)
        if above:
            term = (gap > 0) & ((gap <= case.band) if closed else (hinge > 0))
            term_doubt = (np.abs(gap) < unsure) | (np.abs(gap - case.band if closed else hinge) < unsure)
            twins = (case.x[negative][None, :] == case.x[positive][:, None]).all(axis=2)
            term_doubt &= ~twins  # equal rows are equally far
        active, active_doubt = term & (hinge > 0), term_doubt | (term & (np.abs(hinge) < unsure))
        hard, hard_doubt = term & (gap <= 0), np.abs(gap) < unsure
        semi = term & (gap > 0) & (hinge > 0)
        for i, (value, doubt) in enumerate(
            ((term, term_doubt), (active, active_doubt), (term & False, term & False), (hard, hard_doubt),
             (semi, hard_doubt | active_doubt))
        ):  # fmt: skip
            counts[i] += value.sum()
            doubts[i] += doubt.sum()
        loss += hinge[active].sum()
        slack += unsure[active | active_doubt].sum() + (np.abs(hinge) + unsure)[active_doubt].sum()
        slack += 4 * eps * active.sum() * (np.abs(gap).max() + case.margin)  # sums in blocks of the working precision
        sums += (term.sum(axis=1) @ d2[positive], term.sum(axis=0) @ d2[negative])
        if term.any():
            max_ap = max(max_ap, d2[positive][term.any(axis=1)].max())
        with np.errstate(divide="ignore"):
            factor = np.where(d2 > 0, 1 / np.sqrt(d2), 0) if euclidean else np.full(len(d2), 2 * unit)
        for target, which in ((weight, active), (maybe, active_doubt)):
            target[a, positive] += which.sum(axis=1) * factor[positive]
            target[a, negative] += (-1 if target is weight else 1) * which.sum(axis=0) * factor[negative]
        if euclidean and rounding > 0:  # the factor is as inexact as the distance
            maybe[a] += np.abs(weight[a]) * np.where(d2 > 0, off / np.maximum(np.sqrt(d2), off + 1e-300), 0)

    if case.stats:
        for i in range(5):
            assert abs(out.stat_counts[i] - counts[i]) <= doubts[i], f"counts {out.stat_counts}, expected {counts}"
        terms = max(out.stat_counts[0], 1)
        room = 64 * eps * sums / terms + rounding + doubts[0] * 8 * length / terms + 1e-300
        assert (np.abs(out.stat_d2[:2] - sums / terms) <= room).all(), f"stat_d2 {out.stat_d2}, expected {sums / terms}"
        if not doubts[0]:
            assert abs(out.stat_d2[2] - max_ap) <= rounding + 8 * eps * max_ap
    count = {"mean": counts[0], "mean_active": counts[1], "sum": 1}[case.reduction]
    if case.reduction != "sum" and doubts.any():
        assert case.stats, "the check needs the kernel's own counts"
        count = out.stat_counts[0 if case.reduction == "mean" else 1]
    count = max(count, 1)
    assert abs(out.loss - loss / count) <= slack / count + 8 * eps * abs(loss) / count + 1e-300, (
        f"loss {out.loss}, expected {loss / count} within {slack / count}"
    )
    if not case.gradient:
        return 0.0

    def pull(weights: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        return weights.sum(axis=1, keepdims=True) * rows - weights @ others

    grad_a, grad_c = pull(weight, xa - centre, xc - centre), pull(weight.T, xc - centre, xa - centre)
    ca, cc = np.linalg.norm(xa - centre, axis=1), np.linalg.norm(xc - centre, axis=1)

    def room(rows: np.ndarray, others: np.ndarray, mine: np.ndarray, theirs: np.ndarray, w: np.ndarray, m: np.ndarray):
        """[R, 1]: rounding of the sums, of sums that cancel, and what terms in doubt bring."""
        distance = np.linalg.norm(rows[:, None] - others[None], axis=2)
        off = eps if case.normalize else 0
        rounded = 6 * eps * (np.abs(w) @ theirs + np.abs(w).sum(axis=1) * mine) + off * np.abs(w).sum(axis=1)
        return (rounded + (m * distance).sum(axis=1))[:, None]

    room_a, room_c = room(xa, xc, ca, cc, weight, maybe), room(xc, xa, cc, ca, weight.T, maybe.T)
    if case.anchors is None:
        rows = slice(case.offset, case.offset + len(anchors))
        grad_c[rows] += grad_a
        room_c[rows] += room_a
    error = 0.0
    for result, x, y, gradient, size in (
        (out.grad_candidates, case.x, xc, grad_c, room_c),
        (out.grad_anchors, anchors, xa, grad_a, room_a),
    ):
        if result is None:
            continue
        if case.normalize:
            norm = np.linalg.norm(x, axis=1, keepdims=True)
            along = (gradient * y).sum(axis=1, keepdims=True)
            size = (2 * size + 8 * eps * np.linalg.norm(gradient, axis=1, keepdims=True)) / np.maximum(norm, 1e-12)
            gradient = np.where(norm > 1e-12, (gradient - along * y) / np.maximum(norm, 1e-12), gradient / 1e-12)
        size = size + 4 * eps * np.abs(gradient)
        if gradient.any() and not doubts.any():
            error = max(error, np.abs(result - gradient / count).max() / np.abs(gradient / count).max())
        wrong = ~(np.abs(result - gradient / count) <= size / count + 1e-30)
        assert not wrong.any(), (
            f"{wrong.sum()} gradient elements differ, first {np.argwhere(wrong)[0]}: {result[wrong][0]}, "
            f"expected {(gradient / count)[wrong][0]} within {np.broadcast_to(size / count, wrong.shape)[wrong][0]}"
        )
    return error
