"""Why a batch teaches little, in a table and one sentence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _options
from .functional import mine_triplets

__all__ = ["Explanation", "explain"]


class Explanation(NamedTuple):
    """What ``explain`` found; ``print`` shows it as a table. Shares are of 1, distances in the unit of ``distance``."""

    rows: int  # N
    people: int  # different labels
    anchors: int  # rows with a positive and a negative
    pairs: int  # ordered (anchor, positive)
    semi_hard: float  # share of the pairs whose closest farther negative is within the margin
    easy: float  # share whose closest farther negative is beyond the margin
    fallback: float  # share without a negative farther than the positive
    anchors_without: float  # share of the anchors without a semi-hard negative for any of their positives
    mean_d_ap: float
    mean_d_an: float  # to the negatives that semi-hard mining takes
    max_d_ap: float
    dimensions: float  # (sum l)² / sum l² over the eigenvalues l of the covariance: 1 to D
    dim: int  # D
    verdict: str

    def __str__(self) -> str:
        def percent(share):
            return f"{100 * share:.0f} %"

        table = (
            ("images, people", f"{self.rows}, {self.people}"),
            ("anchors, pairs", f"{self.anchors}, {self.pairs}"),
            ("pairs with a semi-hard negative", percent(self.semi_hard)),
            ("pairs whose negatives are beyond the margin", percent(self.easy)),
            ("pairs with no negative farther than the positive", percent(self.fallback)),
            ("anchors without any semi-hard negative", percent(self.anchors_without)),
            ("distance to positives, mean and largest", f"{self.mean_d_ap:.3g}, {self.max_d_ap:.3g}"),
            ("distance to chosen negatives, mean", f"{self.mean_d_an:.3g}"),
            ("dimensions in use", f"{self.dimensions:.1f} of {self.dim}"),
        )
        width = max(len(name) for name, _ in table)
        return "\n".join([*(f"{name:<{width}}  {value}" for name, value in table), self.verdict])


def explain(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    distance: str = "sqeuclidean",
    normalize: bool = False,
) -> Explanation:
    """Of every pair (a, p) the closest n with d(a, n) > d(a, p), judged by the gap g = d(a, n) - d(a, p): semi-hard
    where g < margin, easy where it is more, fallback where there is no such n.

    Args:
        embeddings, labels, margin, distance, normalize: as for ``triplet_loss``; give those of the training.

    Returns:
        ``Explanation``, numbers of Python; its ``verdict`` names the first of these that holds: values that are not
        finite; no two images of one person; one person only; a collapse (every d(a, p), and d(a, n) on average, at most
        1 % of the margin); half of the anchors or more without a semi-hard negative, and why; half of the pairs or more
        without a farther negative; half of the images or more without a second one of their person; fewer than two
        dimensions in use.

    Raises:
        TypeError, ValueError, RuntimeError: as ``triplet_loss``.

    Notes:
        Not for the inner loop: it waits for the device and lists all pairs; memory N·D + D² + pairs.

    Source: the cases are those that users of triplet losses ask about; "dimensions" is the participation ratio.
    """
    _checks.check_batch(embeddings, labels)
    _checks.check_margin(margin)
    _checks.check_choice("distance", distance, _options.DISTANCES)
    x = embeddings.detach().double()
    mined = mine_triplets(embeddings.detach(), labels, normalize=normalize or distance == "cosine")
    d_ap, d_an = (_in_unit(d2.double(), distance) for d2 in (mined.d2_ap, mined.d2_an))
    gap = d_an - d_ap
    semi_hard = ~mined.fallback & (gap < margin)
    easy = ~mined.fallback & ~semi_hard
    rows, pairs = len(labels), len(gap)

    def per_anchor(of_pairs: Tensor) -> Tensor:
        """Does any pair of the row have it?"""
        return torch.zeros(rows, dtype=torch.bool, device=labels.device).index_fill_(0, mined.anchor[of_pairs], True)

    is_anchor, has_semi_hard = per_anchor(torch.ones_like(semi_hard)), per_anchor(semi_hard)
    without = is_anchor & ~has_semi_hard
    anchors = int(is_anchor.sum())
    people, images_of = torch.unique(labels.long(), return_counts=True)
    finite = bool(x.isfinite().all())
    numbers = dict(
        rows=rows,
        people=len(people),
        anchors=anchors,
        pairs=pairs,
        semi_hard=_share(semi_hard),
        easy=_share(easy),
        fallback=_share(mined.fallback),
        anchors_without=int(without.sum()) / max(anchors, 1),
        mean_d_ap=float(d_ap.mean()) if pairs else 0.0,
        mean_d_an=float(d_an.mean()) if pairs else 0.0,
        max_d_ap=float(d_ap.max()) if pairs else 0.0,
        dimensions=_dimensions(x) if finite else float("nan"),
        dim=x.shape[1],
    )
    easy_anchors = int((without & per_anchor(easy)).sum())
    verdict = _verdict(numbers, margin, finite, int((images_of == 1).sum()), easy_anchors)
    return Explanation(**numbers, verdict=verdict)


def _verdict(of: dict, margin: float, finite: bool, alone: int, easy_anchors: int) -> str:
    people, without = of["people"], f"{100 * of['anchors_without']:.0f} % of the anchors have no semi-hard negative"
    if not finite:
        return "Some embeddings are not finite: the loss and its gradient are NaN."
    if of["rows"] == alone:
        return "No person has two images: there is no pair, and the loss is 0."
    if people == 1:
        return "All images are of one person: there is no negative, and the loss is 0."
    if max(of["max_d_ap"], of["mean_d_an"]) <= 0.01 * margin:
        return (
            "The embedding has collapsed: all distances are near 0, and the loss stays at the margin. Use a lower "
            "learning rate, batch norm, or a rule with easier negatives; start anew."
        )
    if of["anchors_without"] >= 0.5:
        if 2 * easy_anchors >= of["anchors_without"] * of["anchors"]:
            return (
                f"{without}, because their negatives are beyond the margin: the batch holds too few people ({people}), "
                "or the margin is small for what was learned."
            )
        return (
            f"{without}, because every negative is nearer than the positive: these people are not told apart yet, or "
            "labels are wrong."
        )
    if of["fallback"] >= 0.5:
        return (
            f"{100 * of['fallback']:.0f} % of the pairs have no negative farther than the positive: the embedding does "
            "not tell these people apart yet, or labels are wrong."
        )
    if alone >= 0.5 * of["rows"]:
        return (
            f"{100 * alone / of['rows']:.0f} % of the images are the only one of their person: they serve as negatives "
            "only. Sample several images of each person."
        )
    if of["dimensions"] < 2 <= of["dim"]:
        return f"The embeddings lie on a line: {of['dimensions']:.1f} of {of['dim']} dimensions are in use."
    return f"Healthy: {100 * (1 - of['anchors_without']):.0f} % of the anchors have a semi-hard negative."


def _in_unit(d2: Tensor, distance: str) -> Tensor:
    return {"sqeuclidean": d2, "euclidean": d2.sqrt(), "cosine": d2 / 2}[distance]


def _share(of_pairs: Tensor) -> float:
    return int(of_pairs.sum()) / max(len(of_pairs), 1)


def _dimensions(x: Tensor) -> float:
    """(sum l)² / sum l² of the covariance's eigenvalues l is (trace C)² / trace C²: no eigenvalue is needed."""
    centred = x - x.mean(dim=0)
    covariance = centred.T @ centred
    square = covariance.square().sum()
    return float(covariance.trace().square() / square) if square > 0 else 0.0
