"""The options of the loss: their names, values and defaults stand here and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

NEGATIVES = ("semi_hard", "hard", "random_semi_hard", "random_active", "all", "all_semi_hard")
POSITIVES = ("all", "hardest", "easiest")
PAIRS = ("ordered", "unordered")
FALLBACKS = ("farthest", "skip")
DISTANCES = ("sqeuclidean", "euclidean", "cosine")
REFERENCES = ("negatives", "all", "only")
REDUCTIONS = ("mean", "mean_active", "sum")

RANDOM = ("random_semi_hard", "random_active")  # draw a negative
EVERY = ("all", "all_semi_hard")  # a term for each negative, not one for each pair
BANDED = ("random_semi_hard", "all_semi_hard")  # look at `band`


class Options(NamedTuple):
    """What facenet_ext.triplet_loss documents, in the order of csrc/triplet.h; hashable, so that it can key a cache."""

    margin: float = 0.2
    negatives: str = "semi_hard"
    positives: str = "all"
    pairs: str = "ordered"
    fallback: str = "farthest"
    distance: str = "sqeuclidean"
    soft_margin: bool = False
    band: float | None = None
    reduction: str = "mean"
    normalize: bool = False
