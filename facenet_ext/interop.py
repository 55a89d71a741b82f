"""For pytorch-metric-learning: this package's miner among theirs. Import it by its full name: it needs theirs."""

from __future__ import annotations

from torch import Tensor

from . import _checks
from ._options import Options
from .functional import mine_triplets

try:
    from pytorch_metric_learning.miners import BaseMiner
except ImportError as error:
    raise ImportError(
        "facenet_ext.interop needs pytorch-metric-learning: pip install pytorch-metric-learning"
    ) from error

__all__ = ["SemiHardMiner"]


class SemiHardMiner(BaseMiner):
    """(a, p, n) for every ordered pair (a, p):  n = argmin { d(a, n) : other label, d(a, n) > d(a, p) }.

        miner = SemiHardMiner()
        loss = losses.TripletMarginLoss()(embeddings, labels, miner(embeddings, labels))

    Args:
        negatives, positives, pairs, fallback: as for ``facenet_ext.mine_triplets``. By default a pair without a
            semi-hard negative is skipped, as their miners do.
        normalize: by default True, as their distances are.

    Called with embeddings [N, D] and labels [N], returns anchor, positive, negative, [T] int64 each. With ``ref_emb``
    and ``ref_labels`` positives and negatives are indices of those rows alone, none of which is an anchor.

    Notes: one negative a pair, where their semi-hard miner takes every one inside its margin: T <= pairs, in memory
    N·D + T. For the loss alone ``facenet_ext.like`` needs no list of triplets at all.
    """

    def __init__(
        self,
        negatives: str = "semi_hard",
        positives: str = "all",
        pairs: str = "ordered",
        fallback: str = "skip",
        normalize: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        _checks.check_choice("negatives", negatives, ("semi_hard", "hard"))
        _checks.check_options(
            Options(negatives=negatives, positives=positives, pairs=pairs, fallback=fallback, normalize=normalize)
        )
        self.negatives, self.positives, self.pairs = negatives, positives, pairs
        self.fallback, self.normalize_rows = fallback, normalize

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        others = {}
        if ref_emb is not embeddings:
            # Here, where they still have the names that the caller gave them.
            _checks.check_batch(embeddings, labels)
            _checks.check_reference_rows(embeddings, ref_emb, ref_labels, "ref_emb", "ref_labels")
            if self.pairs == "unordered":
                raise ValueError(
                    "pairs is 'unordered' with ref_emb, where anchors and positives are not of one order; accepted: "
                    "'ordered'"
                )
            others = dict(reference_embeddings=ref_emb.detach(), reference_labels=ref_labels, references="only")
        mined = mine_triplets(
            embeddings.detach(),
            labels,
            negatives=self.negatives,
            positives=self.positives,
            pairs=self.pairs,
            fallback=self.fallback,
            normalize=self.normalize_rows,
            **others,
        )
        return mined.anchor, mined.positive, mined.negative
