"""The losses as nn.Modules: the options once, the batch at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks
from ._options import Options
from .functional import TripletStats, triplet_loss

__all__ = ["BatchAllTripletLoss", "BatchHardTripletLoss", "SemiHardTripletLoss", "TripletLoss"]


class TripletLoss(nn.Module):
    """mean over the terms that the options choose of  max(0, d(a, p) - d(a, n) + margin),  or, with ``soft_margin``, of
    log(1 + exp(d(a, p) - d(a, n))).

    Options, arguments, results, errors and edges are those of :func:`facenet_ext.triplet_loss`. The module has no
    parameters and no state. Options are checked here, at construction; as attributes they may be set between calls.
    Under torch.compile each value set is a new graph: leave a loss whose margin moves every step outside, as one op it
    has nothing to gain.

        criterion = TripletLoss(margin=0.3, negatives="hard", distance="euclidean")
        loss = criterion(embeddings, labels)
        loss, stats = criterion(embeddings, labels, return_stats=True)
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
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
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        options = Options(
            margin, negatives, positives, pairs, fallback, distance, soft_margin, band, reduction, normalize
        )
        _checks.check_options(options)
        _checks.check_generator(generator)
        _checks.check_group(process_group)
        for name, value in options._replace(margin=float(margin))._asdict().items():
            setattr(self, name, value)
        self.generator = generator
        self.process_group = process_group

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
        references: str = "negatives",
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, TripletStats]:
        options = {name: getattr(self, name) for name in Options._fields}
        return triplet_loss(
            embeddings,
            labels,
            **options,
            generator=self.generator,
            reference_embeddings=reference_embeddings,
            reference_labels=reference_labels,
            references=references,
            process_group=self.process_group,
            return_stats=return_stats,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in Options._fields)


class SemiHardTripletLoss(TripletLoss):
    """mean over all ordered pairs (a, p), a != p, of equal labels, of  max(0, d(a, p) - d(a, n) + margin),
    where n is the closest row of another label with d(a, n) > d(a, p).

    A :class:`TripletLoss` whose ``negatives`` is "semi_hard"; or "random_semi_hard" (one of those inside the margin) or
    "all_semi_hard" (each of them). Source: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, equations 3 and 4.

        criterion = SemiHardTripletLoss(margin=0.2)
        loss = criterion(embeddings, labels)
        loss, stats = criterion(embeddings, labels, return_stats=True)
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
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
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        _checks.check_choice("negatives", negatives, ("semi_hard", "random_semi_hard", "all_semi_hard"))
        super().__init__(
            margin,
            negatives=negatives,
            positives=positives,
            pairs=pairs,
            fallback=fallback,
            distance=distance,
            soft_margin=soft_margin,
            band=band,
            reduction=reduction,
            normalize=normalize,
            generator=generator,
            process_group=process_group,
        )


class BatchHardTripletLoss(TripletLoss):
    """mean over the anchors a of  max(0, max_p d(a, p) - min_n d(a, n) + margin):  one term for every row that has a
    positive and a negative, the farthest of the one and the closest of the other.

    A :class:`TripletLoss` with positives="hardest", negatives="hard". Source: Hermans, Beyer, Leibe, "In Defense of the
    Triplet Loss for Person Re-Identification", 2017, equation 5; there with distance="euclidean" and, as its best,
    soft_margin=True.

        criterion = BatchHardTripletLoss(margin=0.3, distance="euclidean")
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        distance: str = "sqeuclidean",
        soft_margin: bool = False,
        reduction: str = "mean",
        normalize: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            margin,
            negatives="hard",
            positives="hardest",
            distance=distance,
            soft_margin=soft_margin,
            reduction=reduction,
            normalize=normalize,
            process_group=process_group,
        )


class BatchAllTripletLoss(TripletLoss):
    """sum over all (a, p, n), a and p != a of one label, n of another, of  max(0, d(a, p) - d(a, n) + margin),
    divided by the number of those above 0.

    A :class:`TripletLoss` with negatives="all", exact in time O(N² log N) and memory O(N·D) although it sums N³ terms.
    Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 6;
    there reduction="mean" too.

        criterion = BatchAllTripletLoss(margin=0.2)
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        pairs: str = "ordered",
        distance: str = "sqeuclidean",
        reduction: str = "mean_active",
        normalize: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            margin,
            negatives="all",
            pairs=pairs,
            distance=distance,
            reduction=reduction,
            normalize=normalize,
            process_group=process_group,
        )
