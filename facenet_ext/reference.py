"""The triplet loss and its rules in plain PyTorch, in their plainest form: the definition that the kernels are held to.

The functions take the arguments of facenet_ext's, but for ``process_group``: one process is the definition.

It imports nothing of this package and is written to be read, not to be fast: one anchor at a time, distances as the sum
of squared differences, the selection under no_grad, the gradient left to autograd. Time O(N² (D + K)) in Python steps
of one anchor, memory O((N K + T) D) for T triplets, of which negatives="all" has N³.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import register_pytree_node

__all__ = ["TripletStats", "Triplets", "mine_triplets", "triplet_loss"]


class Triplets(NamedTuple):
    """What ``mine_triplets`` returns: T triplets, in order of anchor, then positive, then negative."""

    anchor: Tensor  # [T] int64, row of the batch
    positive: Tensor  # [T] int64, candidate of the same label, another row
    negative: Tensor  # [T] int64, candidate of another label
    d2_ap: Tensor  # [T] squared distance of anchor and positive
    d2_an: Tensor  # [T] squared distance of anchor and negative
    fallback: Tensor  # [T] bool: no negative was farther than the positive, so `negative` is the farthest there is


class TripletStats(dict):
    """What ``return_stats=True`` adds: 0-d tensors on the input's device, by key or by attribute.

    pairs          int64   counted terms: (anchor, positive) pairs, or triplets where every negative makes one
    active         int64   those with a loss above 0
    fallback       int64   pairs for which the rule found no negative: counted with the farthest one where the rule is
                           "semi_hard" with fallback "farthest", else left out; 0 where every negative makes a term
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
        near_d2 = {"sqeuclidean": near, "euclidean": near * near, "cosine": 2 * near}[distance]
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


# What torch.export, and whatever else walks through containers, makes of it; as of a dict.
register_pytree_node(
    TripletStats,
    lambda stats: ([*stats.values()], [*stats]),
    lambda values, names: TripletStats(zip(names, values, strict=True)),
    serialized_type_name="facenet_ext.TripletStats",
)


def mine_triplets(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "semi_hard",
    positives: str = "all",
    pairs: str = "ordered",
    fallback: str = "farthest",
    distance: str = "sqeuclidean",
    band: float | None = None,
    normalize: bool = False,
    generator: torch.Generator | None = None,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    references: str = "negatives",
) -> Triplets:
    """The triplets that the loss counts; arguments: facenet_ext.mine_triplets. Ties: the lowest index."""
    with torch.no_grad():
        rows = _rows(
            embeddings, labels, normalize or distance == "cosine", reference_embeddings, reference_labels, references
        )
        mined = _mine(rows, margin, negatives, positives, pairs, distance, band, generator)
        return _counted(mined, negatives, fallback)


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "semi_hard",
    positives: str = "all",
    pairs: str = "ordered",
    fallback: str = "farthest",
    distance: str = "sqeuclidean",
    soft_margin: bool = False,
    band: float | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    generator: torch.Generator | None = None,
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    references: str = "negatives",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TripletStats]:
    """reduction over the triplets of ``mine_triplets`` of max(0, d(a, p) - d(a, n) + margin), or with ``soft_margin``
    of log(1 + exp(d(a, p) - d(a, n))).

    The selection is a constant; the gradient goes through both distances. Arguments: facenet_ext.triplet_loss.
    """
    rows = _rows(
        embeddings, labels, normalize or distance == "cosine", reference_embeddings, reference_labels, references
    )
    with torch.no_grad():
        mined = _mine(rows, margin, negatives, positives, pairs, distance, band, generator)
        counted = _counted(mined, negatives, fallback)

    d2_ap = (rows.anchors[counted.anchor] - rows.candidates[counted.positive]).square().sum(dim=1)  # [T]
    d2_an = (rows.anchors[counted.anchor] - rows.candidates[counted.negative]).square().sum(dim=1)
    gap = _unit(d2_ap, distance) - _unit(d2_an, distance)
    hinge = torch.relu(gap + margin)
    term = torch.logaddexp(gap, torch.zeros_like(gap)) if soft_margin else hinge
    active = ((term > 0) | soft_margin).sum()  # a soft term is above 0, if only in exact arithmetic

    # Attached to the graph also where there is no triplet; 0 times a NaN or an infinity is NaN, in the gradient too.
    total = term.sum() + (rows.anchors * 0).sum() + (rows.candidates * 0).sum()
    if reduction == "mean":
        loss = total / max(len(term), 1)
    elif reduction == "mean_active":
        loss = total / active.clamp_min(1)
    else:
        loss = total

    finite = bool(torch.isfinite(rows.given).all())
    if not finite:
        loss = loss + (rows.anchors * torch.nan).sum() + (rows.candidates * torch.nan).sum()
    if not return_stats:
        return loss

    terms = torch.full_like(active, len(term))
    farther = d2_an > d2_ap
    counts = torch.stack([terms, active, mined.fallback.sum(), (~farther).sum(), (farther & (hinge > 0)).sum()])
    d2 = torch.stack([d2_ap.sum(), d2_an.sum(), torch.cat([d2_ap, d2_ap.new_zeros(1)]).max()]).detach()
    d2 = d2 / torch.stack([terms, terms, torch.ones_like(terms)]).clamp_min(1)
    if not finite:
        counts, d2 = counts * 0, d2 * torch.nan
    fallback_counts = negatives == "semi_hard" and fallback == "farthest"
    return loss, TripletStats.of(counts, d2, margin=margin, distance=distance, fallback_counts=fallback_counts)


class _Rows(NamedTuple):
    """Anchors and candidates as distances are taken of them."""

    given: Tensor  # all elements, as they came
    anchors: Tensor  # [A, D]
    anchor_labels: Tensor  # [A]
    candidates: Tensor  # [C, D]
    candidate_labels: Tensor  # [C]
    own: Tensor  # [A] the candidate that an anchor is; where it is none, a number beyond all candidates
    may_be_positive: int  # so many candidates, from the first on


def _rows(
    embeddings: Tensor,
    labels: Tensor,
    normalize: bool,
    reference_embeddings: Tensor | None,
    reference_labels: Tensor | None,
    references: str,
) -> _Rows:
    x, index = _prepared(embeddings, normalize), torch.arange(len(embeddings), device=embeddings.device)
    if reference_embeddings is None:
        return _Rows(embeddings, x, labels, x, labels, index, len(x))
    reference_embeddings = reference_embeddings.to(embeddings.dtype)
    r = _prepared(reference_embeddings, normalize)
    given = torch.cat([embeddings.flatten(), reference_embeddings.flatten()])
    if references == "only":
        return _Rows(given, x, labels, r, reference_labels, len(r) + index, len(r))
    may_be_positive = len(x) if references == "negatives" else len(x) + len(r)
    return _Rows(given, x, labels, torch.cat([x, r]), torch.cat([labels, reference_labels]), index, may_be_positive)


def _mine(
    rows: _Rows,
    margin: float,
    negatives: str,
    positives: str,
    pairs: str,
    distance: str,
    band: float | None,
    generator: torch.Generator | None,
) -> Triplets:
    """Every pair that looked for a negative, with what it found: flagged where the rule had none, and then with the
    farthest there is (semi_hard) or -1. The rules that take every negative give as many triplets as they find."""
    device = rows.candidates.device
    index = torch.arange(len(rows.candidates), device=device)
    if negatives in ("random_semi_hard", "random_active"):
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device if generator else device)
        seed = seed.to(device)
    found = []
    for a in range(len(rows.anchors)):
        same = rows.candidate_labels == rows.anchor_labels[a]
        positive = same & (index != rows.own[a]) & (index < rows.may_be_positive)
        if pairs == "unordered":
            positive &= index > rows.own[a]
        positive, negative = positive.nonzero().flatten(), (~same).nonzero().flatten()  # [K], [M]
        if len(positive) == 0 or len(negative) == 0:
            continue
        d2 = (rows.candidates - rows.anchors[a]).square().sum(dim=1)  # [C]
        if positives == "hardest":
            positive = positive[_never_farthest(d2[positive]).argmax()][None]
        elif positives == "easiest":
            positive = positive[_never_closest(d2[positive]).argmin()][None]
        d2_ap, d2_an = d2[positive][:, None], d2[negative][None, :]  # [K, 1], [1, M]
        farther = d2_an > d2_ap  # [K, M]; strictly, so that a NaN is not
        gap = _unit(d2_an, distance) - _unit(d2_ap, distance)
        in_band = farther & ((gap < margin) if band is None else (gap <= band))
        is_fallback = torch.zeros_like(positive, dtype=torch.bool)  # [K]

        if negatives in ("all", "all_semi_hard"):
            every = in_band if negatives == "all_semi_hard" else torch.ones_like(farther)
            pair, chosen = every.nonzero(as_tuple=True)  # [T] each
            positive, is_fallback = positive[pair], is_fallback[pair]
            negative = negative[chosen]
        elif negatives == "hard":
            negative = negative[_never_closest(d2_an[0]).argmin()].expand_as(positive)
        elif negatives == "semi_hard":
            is_fallback = ~farther.any(dim=1)
            closest_farther = torch.where(farther, d2_an, torch.inf).argmin(dim=1)  # [K], first of equals
            negative = negative[torch.where(is_fallback, _never_farthest(d2_an[0]).argmax(), closest_farther)]
        else:
            eligible = in_band if negatives == "random_semi_hard" else gap < margin
            is_fallback = ~eligible.any(dim=1)
            draw = torch.where(eligible, _priority(seed, rows.own[a], negative), 2**32).argmin(dim=1)
            negative = torch.where(is_fallback, -1, negative[draw])
        found.append(
            Triplets(torch.full_like(positive, a), positive, negative, d2[positive], d2[negative], is_fallback)
        )
    if not found:
        none, distance = index[:0], rows.candidates.new_empty(0)
        return Triplets(none, none, none, distance, distance, none.bool())
    return Triplets(*(torch.cat(column) for column in zip(*found, strict=True)))


def _counted(mined: Triplets, negatives: str, fallback: str) -> Triplets:
    """Without the pairs that found no negative, unless the farthest one stands in."""
    if negatives == "semi_hard" and fallback == "farthest":
        return mined
    return Triplets(*(column[~mined.fallback] for column in mined))


def _priority(seed: Tensor, anchor: Tensor, negative: Tensor) -> Tensor:
    """[M] int64 in [0, 2³²): the draw's order of preference. Counter-based: it depends on the seed and on the two
    indices alone, so everybody who computes it gets the same. Two rounds of splitmix64's finaliser; int64 wraps."""
    key = _mix(seed + _int64(0x9E3779B97F4A7C15) * (anchor + 1))
    return _mix(key ^ (negative * _int64(0xD1342543DE82EF95) + 1)) >> 32 & 0xFFFFFFFF


def _mix(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _int64(0xBF58476D1CE4E5B9)  # a shift of int64 copies the sign: masked away
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _int64(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def _never_farthest(d2: Tensor) -> Tensor:
    return d2.nan_to_num(nan=-1.0, posinf=torch.inf)


def _never_closest(d2: Tensor) -> Tensor:
    return d2.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _unit(d2: Tensor, distance: str) -> Tensor:
    """Squared distances in the unit of `distance`; 1 - cos of unit rows is half of theirs."""
    return {"sqeuclidean": lambda: d2, "euclidean": lambda: _sqrt(d2), "cosine": lambda: d2 / 2}[distance]()


def _prepared(embeddings: Tensor, normalize: bool) -> Tensor:
    """The rows that distances are taken of: half precision computes in float32."""
    x = embeddings if embeddings.dtype in (torch.float32, torch.float64) else embeddings.float()
    return F.normalize(x, dim=1, eps=1e-12) if normalize else x


def _sqrt(d2: Tensor) -> Tensor:
    """Square root with gradient 0, not infinity, at 0."""
    is_zero = d2 == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, d2).sqrt())
