"""Other libraries' triplet losses by name: their options in ours, so that a number can be carried over and compared."""

from __future__ import annotations

from . import _checks, _options
from .loss import TripletLoss

__all__ = ["like"]

_PML = dict(distance="euclidean", normalize=True, margin=0.05, reduction="mean_active")  # TripletMarginLoss's defaults
_HARD = dict(positives="hardest", negatives="hard", distance="euclidean")
_DRAWN = dict(pairs="unordered", distance="sqeuclidean")  # a < p only, and the mean of what was chosen

_PEERS = {
    # equations 3 and 4: a sum over all pairs, rows of unit length, no word on pairs without a semi-hard negative
    "paper": dict(margin=0.2, normalize=True, fallback="skip", reduction="sum"),
    # triplet_semihard_loss
    "tensorflow-addons": dict(margin=1.0, distance="euclidean"),
    # BatchSemiHardTripletLoss
    "sentence-transformers": dict(margin=5.0, distance="euclidean"),
    # triplet_hard_loss
    "tensorflow-addons-hard": dict(_HARD, margin=1.0),
    # BatchHardTripletLoss
    "sentence-transformers-batch-hard": dict(_HARD, margin=5.0),
    # TripletMarginLoss()(e, y, TripletMarginMiner(margin=0.2, type_of_triplets="semihard")(e, y))
    "pytorch-metric-learning": dict(_PML, negatives="all_semi_hard", band=0.2),
    # TripletMarginLoss()(e, y, BatchEasyHardMiner()(e, y))
    "pytorch-metric-learning-easy-hard": dict(_PML, positives="easiest", fallback="skip"),
    # TripletMarginLoss()(e, y, BatchHardMiner()(e, y))
    "pytorch-metric-learning-batch-hard": dict(_PML, positives="hardest", negatives="hard"),
    # BatchAllTripletLoss; omoindrot's batch_all_triplet_loss
    "sentence-transformers-batch-all": dict(negatives="all", margin=5.0, distance="euclidean", reduction="mean_active"),
    # TripletLoss(distance="cosine") with its margin of 1
    "tensorflow-similarity": dict(positives="hardest", distance="cosine", margin=1.0),
    # facenet's select_triplets and triplet_loss
    "davidsandberg": dict(_DRAWN, negatives="random_active", margin=0.2, normalize=True),
    "openface": dict(_DRAWN, negatives="random_active", margin=0.2, normalize=True),
    # SemihardNegativeTripletSelector and OnlineTripletLoss
    "adambielski": dict(_DRAWN, negatives="random_semi_hard", margin=1.0),
    # batch_hard with the soft margin, its default; sentence-transformers' BatchHardSoftMarginTripletLoss
    "triplet-reid": dict(_HARD, soft_margin=True),
}


def like(name: str, **overrides) -> TripletLoss:
    """A ``TripletLoss`` whose value is that of another library's loss under its defaults.

        criterion = facenet_ext.like("sentence-transformers-batch-hard", margin=2.0)

    Args:
        name: "paper", "tensorflow-addons", "tensorflow-addons-hard", "sentence-transformers",
            "sentence-transformers-batch-hard", "sentence-transformers-batch-all", "pytorch-metric-learning",
            "pytorch-metric-learning-easy-hard", "pytorch-metric-learning-batch-hard", "tensorflow-similarity",
            "davidsandberg", "openface", "adambielski" or "triplet-reid".
        overrides: keywords of ``TripletLoss`` in place of the peer's defaults; and, with "pytorch-metric-learning",
            ``mine_margin``, the margin of its miner, which is ``band`` here.

    Raises:
        TypeError, ValueError: an unknown name; ``mine_margin`` elsewhere; as ``TripletLoss``.

    Notes:
        Equal where every anchor has a positive and a negative, no two distances tie and no hinge is exactly 0. At those
        edges ours holds: tied negatives go to the lowest index, where TensorFlow Addons splits the gradient; a hinge of
        exactly 0 has gradient 0, where TensorFlow Addons gives 1, sentence-transformers 1 and its semi-hard loss a
        half; an anchor without a positive or a negative has no term, where batch-hard losses, TF-similarity and
        triplet-reid still count it with a distance of 0, and semi-hard losses one without a negative; no pair at all is
        loss 0, where TensorFlow Addons gives NaN. "paper" skips pairs without a
        semi-hard negative. The drawn rules ("davidsandberg", "openface", "adambielski") have the peer's eligible set,
        not its random numbers. TensorFlow Addons up to 0.10 meant squared distances by "L2": override ``distance``.
    """
    _checks.check_choice("name", name, tuple(_PEERS))
    options = dict(_PEERS[name])
    negatives = overrides.get("negatives", options.get("negatives", "semi_hard"))
    _checks.check_choice("negatives", negatives, _options.NEGATIVES)
    if negatives not in _options.BANDED:
        options.pop("band", None)  # the peer's, of its own rule
    if "mine_margin" in overrides:
        margin = options["band"] = overrides.pop("mine_margin")
        if name != "pytorch-metric-learning" or "band" in overrides:
            raise ValueError(f"mine_margin is {margin!r}; accepted: with 'pytorch-metric-learning', and without band")
        if margin is not None:
            _checks.check_band(margin, negatives, "mine_margin")
    return TripletLoss(**{**options, **overrides})
