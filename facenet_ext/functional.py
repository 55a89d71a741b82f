"""The loss and the miner as functions. What they mean stands here; csrc/triplet.h says it once more for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backend, _checks, _options, autograd
from ._backend import Problem
from ._options import Options
from .reference import Triplets, TripletStats

__all__ = ["TripletStats", "Triplets", "mine_triplets", "triplet_loss"]


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
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TripletStats]:
    r"""mean over all ordered pairs (a, p), a != p, of equal labels, of  max(0, d(a, p) - d(a, n) + margin),
    where  n = argmin { d(a, n) : label of n differs, d(a, n) > d(a, p) }.

    Args:
        embeddings: [N, D] float32, float64, bfloat16 or float16, on the CPU or a CUDA GPU, any strides; N >= 0, D >= 1.
        labels: [N] of any integer dtype, in any order, on the device of ``embeddings``; equal number, equal identity.
        margin: in the unit of ``distance``, >= 0.
        negatives: "semi_hard", the rule above.
        fallback: what a pair does that has no negative farther than its positive. "farthest": it takes the farthest
            negative. "skip": it does not count.
        distance: "sqeuclidean", squared L2 (the paper's), or "euclidean", L2. Both select the same negatives.
        reduction: "mean" over all counted pairs, those of loss 0 included; "mean_active" over the pairs of loss > 0;
            "sum" (the paper's).
        normalize: divide every row by max(its L2 norm, 1e-12) first; the gradient goes through the division.
        return_stats: also return a ``TripletStats``.

    Returns:
        The loss, 0-d, float32 (float64 for float64 input); with ``return_stats`` a pair of it and the stats, 0-d
        tensors on the same device. The gradient has the dtype of ``embeddings``.

    Raises:
        TypeError: an argument is not of an accepted type or dtype.
        ValueError: a shape, length, device, option or margin is not accepted.
        RuntimeError: ``embeddings`` is on a GPU and the CUDA backend is not compiled in, or the GPU reports an error;
            a second derivative is asked for.

    Notes:
        Distances have float32 accuracy (float64 for float64 input), also of half-precision input, whose gradient is
        rounded once, at the end. Rows that are identical are at distance exactly 0.
        Of equally close negatives the one of lowest index is taken. A hinge of exactly 0 has gradient 0, and so has the
        Euclidean distance at 0.
        An anchor with no negative counts no pair. Where nothing counts (an empty batch, one class, all labels
        different) the loss is 0, attached to the graph, with a gradient of 0. Any non-finite embedding makes the loss
        and the whole gradient NaN.
        The selection is a constant: the gradient goes through d(a, p) and d(a, n) only.
        Memory grows with N·D, never with N². The result does not depend on the number of threads and is the same from
        run to run, bit for bit. On a GPU nothing waits for the device.
        On the CPU Ctrl-C ends a running call.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, equations 3 (loss) and 4 (semi-hard).
    """
    _checks.check_batch(embeddings, labels)
    options = Options(margin, negatives, positives, pairs, fallback, distance, soft_margin, band, reduction, normalize)
    _checks.check_options(options)
    _checks.check_generator(generator)
    _checks.check_switch("return_stats", return_stats)
    problem = Problem(embeddings, labels, seed=draw_seed(options, generator, embeddings.device))
    loss, counts, d2 = autograd.triplet_loss(problem, options, return_stats)
    return (loss, stats_of(counts, d2, options)) if return_stats else loss


def draw_seed(options: Options, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """[1] int64 on `device` for a rule that draws, else None; a generator of another device draws on its own."""
    if options.negatives not in _options.RANDOM:
        return None
    where = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (1,), generator=generator, device=where).to(device, non_blocking=True)


def stats_of(counts: Tensor, d2: Tensor, options: Options) -> TripletStats:
    """What counts [5] and d2 [3] of the op say under these options."""
    counted = options.negatives == "semi_hard" and options.fallback == "farthest"
    return TripletStats.of(counts, d2, margin=options.margin, distance=options.distance, fallback_counts=counted)


@torch.compiler.disable(reason="the number of triplets depends on the data")
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
) -> Triplets:
    """Every ordered (a, p), a != p, of equal labels, with  n = argmin { d2(a, n) : other label, d2(a, n) > d2(a, p) }.

    Args:
        embeddings: [N, D], as for ``triplet_loss``.
        labels: [N], as for ``triplet_loss``.
        negatives: "semi_hard", the rule above.
        fallback: "farthest": where no negative is farther than the positive, the farthest one, with ``fallback`` set.
            "skip": such pairs are left out.
        normalize: distances of the rows divided by max(L2 norm, 1e-12).

    Returns:
        ``Triplets``: anchor, positive, negative [T] int64; d2_ap, d2_an [T] squared distances, float32 (float64 for
        float64 input); fallback [T] bool. In order of anchor, then positive. On the device of ``embeddings``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``triplet_loss``.

    Notes:
        T depends on the data, so on a GPU this waits for the device, and torch.compile leaves its graph here;
        ``triplet_loss`` does neither. Not differentiable: index ``embeddings`` with the result for a loss of your own.
        A NaN distance is never farther than anything. Ties, accuracy and reproducibility are those of ``triplet_loss``.
        Memory grows with N·D + T.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, equation 4.
    """
    _checks.check_batch(embeddings, labels)
    options = Options(margin, negatives, positives, pairs, fallback, distance, band=band, normalize=normalize)
    _checks.check_options(options)
    _checks.check_generator(generator)
    return mine(Problem(embeddings, labels, seed=draw_seed(options, generator, embeddings.device)), options)


def mine(problem: Problem, options: Options) -> Triplets:
    """The triplets of checked arguments; indices are those of anchors and of candidates."""
    triplets = Triplets(*_backend.mine_triplets(problem, options))
    if options.negatives in _options.RANDOM or (options.negatives == "semi_hard" and options.fallback == "skip"):
        found = ~triplets.fallback
        triplets = Triplets(*(column[found] for column in triplets))
    return triplets
