"""The semi-hard triplet loss in plain PyTorch, in its plainest form: the definition that the kernels are held to.

It imports nothing of this package and is written to be read, not to be fast: one anchor at a time, distances as the sum
of squared differences, the selection under no_grad, the gradient left to autograd. Time O(N² (D + K)) in Python steps
of one anchor, memory O((N + T) D) for T triplets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TripletStats", "Triplets", "mine_triplets", "triplet_loss"]


class Triplets(NamedTuple):
    """What ``mine_triplets`` returns: T triplets, in order of anchor, then positive."""

    anchor: Tensor  # [T] int64, row of the batch
    positive: Tensor  # [T] int64, same label, another row
    negative: Tensor  # [T] int64, another label
    d2_ap: Tensor  # [T] squared distance of anchor and positive
    d2_an: Tensor  # [T] squared distance of anchor and negative
    fallback: Tensor  # [T] bool: no negative was farther than the positive, so `negative` is the farthest there is


class TripletStats(dict):
    """What ``return_stats=True`` adds: 0-d tensors on the input's device, by key or by attribute.

    pairs          int64   counted terms: (anchor, positive) pairs, or triplets where every negative makes one
    active         int64   those with a loss above 0
    fallback       int64   pairs for which the rule found no negative: counted with the farthest one where the rule is
                           "semi_hard" with fallback "farthest", else left out
    hard           int64   terms whose negative is no farther than the positive:  d(a, n) <= d(a, p)
    semi_hard      int64   terms with  0 < d(a, n) - d(a, p) < margin
    easy           int64   the other terms: a hinge of 0
    fallback_rate          fallback / all pairs that looked for a negative
    mean_d2_ap             mean squared distance of anchor and positive over the terms
    mean_d2_an             the same of anchor and negative
    max_d2_ap              the largest squared distance of a term's pair
    collapsed      bool    there are terms, and of none is d(a, p), nor of their mean d(a, n), above a hundredth of the
                           margin: all embeddings are one point as far as the loss can see, and it is the margin

    The rates and distances have the loss's dtype and are 0 where no term counts; the distances are NaN where an
    embedding is not finite.
    """

    @classmethod
    def of(cls, counts: Tensor, d2: Tensor, *, margin: float, distance: str, fallback_counts: bool) -> TripletStats:
        """From counts [5] (pairs, active, fallback, hard, semi-hard) and d2 [3] (mean ap, mean an, max ap)."""
        pairs, active, fallback, hard, semi_hard = counts.unbind()
        mean_d2_ap, mean_d2_an, max_d2_ap = d2.unbind()
        looked = pairs if fallback_counts else pairs + fallback
        near = 0.01 * margin
        near_d2 = {"sqeuclidean": near, "euclidean": near**2, "cosine": 2 * near}[distance]
        return cls(
            pairs=pairs,
            active=active,
            fallback=fallback,
            hard=hard,
            semi_hard=semi_hard,
            easy=pairs - hard - semi_hard,
            fallback_rate=fallback.to(d2.dtype) / looked.clamp_min(1),
            mean_d2_ap=mean_d2_ap,
            mean_d2_an=mean_d2_an,
            max_d2_ap=max_d2_ap,
            collapsed=(pairs > 0) & (max_d2_ap <= near_d2) & (mean_d2_an <= near_d2),
        )

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"stats have {', '.join(self)}; not {name!r}") from None


def mine_triplets(
    embeddings: Tensor,
    labels: Tensor,
    *,
    negatives: str = "semi_hard",
    fallback: str = "farthest",
    normalize: bool = False,
) -> Triplets:
    """Every ordered pair (a, p), a != p, of equal labels, with its negative n of another label:
    argmin d2(a, n) over d2(a, n) > d2(a, p); argmax d2(a, n), flagged, where there is none. Ties: the lowest index."""
    _require_semi_hard(negatives)
    with torch.no_grad():
        x = _prepared(embeddings, normalize)
        found = []
        for a in range(len(x)):
            same = labels == labels[a]
            positive = torch.nonzero(same & (torch.arange(len(x), device=x.device) != a)).flatten()  # [K]
            negative = torch.nonzero(~same).flatten()  # [M]
            if len(positive) == 0 or len(negative) == 0:
                continue
            d2 = (x - x[a]).square().sum(dim=1)  # [N]
            d2_ap, d2_an = d2[positive], d2[negative]
            farther = d2_an > d2_ap[:, None]  # [K, M]; strictly
            closest_farther = torch.where(farther, d2_an, torch.inf).argmin(dim=1)  # [K], first of equals
            is_fallback = ~farther.any(dim=1)
            chosen = torch.where(is_fallback, d2_an.nan_to_num(nan=-1.0, posinf=torch.inf).argmax(), closest_farther)
            found.append(
                Triplets(torch.full_like(positive, a), positive, negative[chosen], d2_ap, d2_an[chosen], is_fallback)
            )
        if not found:
            index, distance = labels.new_empty(0, dtype=torch.int64), x.new_empty(0)
            return Triplets(index, index, index, distance, distance, labels.new_empty(0, dtype=torch.bool))
        triplets = Triplets(*(torch.cat(column) for column in zip(*found, strict=True)))
        if fallback == "skip":
            triplets = Triplets(*(column[~triplets.fallback] for column in triplets))
        return triplets


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "semi_hard",
    fallback: str = "farthest",
    distance: str = "sqeuclidean",
    reduction: str = "mean",
    normalize: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TripletStats]:
    """reduction over the triplets of ``mine_triplets`` of max(0, d(a, p) - d(a, n) + margin).

    The selection is a constant; the gradient goes through both distances. Arguments: facenet_ext.triplet_loss.
    """
    x = _prepared(embeddings, normalize)
    mined = mine_triplets(embeddings, labels, negatives=negatives, normalize=normalize)
    counted = mined if fallback == "farthest" else Triplets(*(column[~mined.fallback] for column in mined))

    if not torch.isfinite(embeddings).all():
        loss = (x * torch.nan).sum()  # the gradient is NaN too, in every element
        nothing, unknown = torch.zeros_like(mined.anchor.sum()), loss.detach()
        stats = TripletStats(
            pairs=nothing, active=nothing, fallback=nothing, mean_d2_ap=unknown, mean_d2_an=unknown, max_d2_ap=unknown
        )
        return (loss, stats) if return_stats else loss

    anchor, positive, negative = x[counted.anchor], x[counted.positive], x[counted.negative]  # [T, D] each
    d2_ap = (anchor - positive).square().sum(dim=1)
    d2_an = (anchor - negative).square().sum(dim=1)
    if distance == "euclidean":
        hinge = torch.relu(_sqrt(d2_ap) - _sqrt(d2_an) + margin)
    else:
        hinge = torch.relu(d2_ap - d2_an + margin)
    active = (hinge > 0).sum()

    total = hinge.sum() + (x * 0).sum()  # attached to the graph also where there is no triplet
    if reduction == "mean":
        loss = total / max(len(hinge), 1)
    elif reduction == "mean_active":
        loss = total / active.clamp_min(1)
    else:
        loss = total
    if not return_stats:
        return loss

    count = max(len(hinge), 1)
    stats = TripletStats(
        pairs=torch.full_like(active, len(hinge)),
        active=active,
        fallback=mined.fallback.sum(),
        mean_d2_ap=d2_ap.detach().sum() / count,
        mean_d2_an=d2_an.detach().sum() / count,
        max_d2_ap=torch.cat([d2_ap.detach(), d2_ap.new_zeros(1)]).max(),
    )
    return loss, stats


def _prepared(embeddings: Tensor, normalize: bool) -> Tensor:
    """The rows that distances are taken of: half precision computes in float32."""
    x = embeddings if embeddings.dtype in (torch.float32, torch.float64) else embeddings.float()
    return F.normalize(x, dim=1, eps=1e-12) if normalize else x


def _sqrt(d2: Tensor) -> Tensor:
    """Square root with gradient 0, not infinity, at 0."""
    is_zero = d2 == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, d2).sqrt())


def _require_semi_hard(negatives: str) -> None:
    if negatives != "semi_hard":
        raise ValueError(f"negatives is {negatives!r}; accepted: 'semi_hard'")
