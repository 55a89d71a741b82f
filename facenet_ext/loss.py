"""The loss as an nn.Module: the options once, the batch at every call."""

from __future__ import annotations

from torch import Tensor, nn

from . import _checks
from .functional import TripletStats, triplet_loss

__all__ = ["SemiHardTripletLoss"]


class SemiHardTripletLoss(nn.Module):
    """mean over all ordered pairs (a, p), a != p, of equal labels, of  max(0, d(a, p) - d(a, n) + margin),
    where n is the closest row of another label with d(a, n) > d(a, p).

    Arguments, results, errors and edges are those of :func:`facenet_ext.triplet_loss`. The module has no parameters and
    no state. Options are checked here, at construction.

        criterion = SemiHardTripletLoss(margin=0.2)
        loss = criterion(embeddings, labels)
        loss, stats = criterion(embeddings, labels, return_stats=True)
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negatives: str = "semi_hard",
        fallback: str = "farthest",
        distance: str = "sqeuclidean",
        reduction: str = "mean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        _checks.check_options(margin, negatives, fallback, distance, reduction)
        _checks.check_switch("normalize", normalize)
        self.margin = float(margin)
        self.negatives = negatives
        self.fallback = fallback
        self.distance = distance
        self.reduction = reduction
        self.normalize = normalize

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, TripletStats]:
        return triplet_loss(
            embeddings,
            labels,
            margin=self.margin,
            negatives=self.negatives,
            fallback=self.fallback,
            distance=self.distance,
            reduction=self.reduction,
            normalize=self.normalize,
            return_stats=return_stats,
        )

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin}, negatives={self.negatives!r}, fallback={self.fallback!r}, "
            f"distance={self.distance!r}, reduction={self.reduction!r}, normalize={self.normalize}"
        )
