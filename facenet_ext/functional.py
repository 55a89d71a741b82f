"""The loss and the miner as functions. What they mean stands here; csrc/triplet.h says it once more for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backend, _checks, _options, autograd, distributed
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
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    references: str = "negatives",
    process_group: torch.distributed.ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TripletStats]:
    r"""reduction over the terms (a, p, n) of  max(0, d(a, p) - d(a, n) + margin),  or, with ``soft_margin``, of
    log(1 + exp(d(a, p) - d(a, n))).  By default the mean over all ordered pairs (a, p), a != p, of equal labels, with
    n = argmin { d(a, n) : label of n differs, d(a, n) > d(a, p) }.

    Args:
        embeddings: [N, D] float32, float64, bfloat16 or float16, on the CPU or a CUDA GPU, any strides; N >= 0, D >= 1.
        labels: [N] of any integer dtype, in any order, on the device of ``embeddings``; equal number, equal identity
            (uint64 numbers from 2^63 on pass for the int64 of the same bits).
        margin: in the unit of ``distance``, >= 0. With ``soft_margin`` it only bounds bands and statistics.
        negatives: which rows of another label make a term with (a, p), by their gap g = d(a, n) - d(a, p):
            "semi_hard"         the closest with g > 0; ``fallback`` where there is none
            "hard"              the closest
            "random_semi_hard"  one of those with 0 < g < margin, all equally likely
            "random_active"     one of those with g < margin, all equally likely
            "all"               every one, a term each
            "all_semi_hard"     every one with 0 < g < margin, a term each
            A pair for which a random rule finds none does not count.
        positives: which p each anchor has: "all" rows of its label but itself, the "hardest" (farthest) of them only,
            or the "easiest" (closest).
        pairs: "ordered": (a, p) and (p, a) both. "unordered": only positives of a higher index than the anchor's.
        fallback: what a pair does under "semi_hard" that has no negative farther than its positive. "farthest": it
            takes the farthest negative. "skip": it does not count. Other rules do not look at it.
        distance: "sqeuclidean", squared L2 (the paper's); "euclidean", L2; "cosine", 1 - cos, which implies
            ``normalize``. All three select the same negatives where no margin or band enters.
        soft_margin: the second form of the term, above 0 and so active everywhere. Not for "all" and "all_semi_hard".
        band: the last of the gaps g that "random_semi_hard" and "all_semi_hard" take, > 0, in the unit of ``distance``:
            0 < g <= band in place of 0 < g < margin.
        reduction: "mean" over all terms, those of loss 0 included; "mean_active" over the terms of loss > 0; "sum" (the
            paper's).
        normalize: divide every row by max(its L2 norm, 1e-12) first; the gradient goes through the division.
        generator: draws the random rules' seed, one number a call; default: torch's own of the device. Equal seed and
            batch, equal draws, for any number of threads and ranks; on another device too, but for negatives within
            rounding of the band's edge. Other rules do not look at it. One of your own breaks a compiled graph.
        reference_embeddings, reference_labels: [M, D] and [M], further candidates on the same device, converted to the
            dtype of ``embeddings``; no anchors. Their gradient is made and returned where they require one.
        references: what they serve as. "negatives": negatives beside the batch's; of an anchor's own label they count
            for nothing. "all": positives too. "only": positives and negatives are references alone.
        process_group: mines this rank's rows among the rows of all ranks of the group, in order of rank; numbers of
            rows may differ and be 0. Loss and stats are those of one process with the whole batch, the same on every
            rank; the gradient is world size times its own, so that DistributedDataParallel's average is exact. The host
            waits for one small collective. References must be the same rows on every rank, or it is an error; under
            "only", where nothing is gathered, it is not checked. Breaks a compiled graph.
        return_stats: also return a ``TripletStats``.

    Returns:
        The loss, 0-d, float32 (float64 for float64 input); with ``return_stats`` a pair of it and the stats, 0-d
        tensors on the same device. The gradient has the dtype of ``embeddings``.

    Raises:
        TypeError: an argument is not of an accepted type or dtype.
        ValueError: a shape, length, device, option or margin is not accepted, or two options exclude each other.
        RuntimeError: ``embeddings`` is on a GPU and the CUDA backend is not compiled in, or the GPU reports an error;
            a second derivative is asked for, or, outside of a compiled graph, one in forward mode or of torch.func.

    Notes:
        Distances have float32 accuracy (float64 for float64 input), also of half-precision input, whose gradient is
        rounded once, at the end. Rows that are identical are at distance exactly 0.
        Of equally close negatives, or equally far or close positives, the one of lowest index is taken. A hinge of
        exactly 0 has gradient 0, and so has the Euclidean distance at 0.
        An anchor with no negative has no term. Where nothing counts (an empty batch, one class, all labels different)
        the loss is 0, attached to the graph, with a gradient of 0. Any non-finite embedding makes the loss and the
        whole gradient NaN.
        The selection is a constant: the gradient goes through d(a, p) and d(a, n) only.
        The random rules give every pair (a, n) a number, hashed of the seed and the two indices, and take the least of
        the eligible ones: each pair's draw is uniform, but the pairs of one anchor draw by the same numbers.
        Memory grows with N·D, never with N², whatever the rule. On the CPU a thread keeps its workspace for the next
        call, up to 256 MB. The result does not depend on the number of threads and
        is the same from run to run, bit for bit. On a GPU nothing waits for the device.
        On the CPU Ctrl-C ends a running call.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, equations 3 (loss) and 4 (semi-hard); Hermans, Beyer,
    Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017 (hard, all, soft margin).
    """
    _checks.check_batch(embeddings, labels)
    options = Options(margin, negatives, positives, pairs, fallback, distance, soft_margin, band, reduction, normalize)
    _checks.check_options(options)
    _checks.check_generator(generator)
    _checks.check_switch("return_stats", return_stats)
    _checks.check_group(process_group)
    _checks.check_references(embeddings, reference_embeddings, reference_labels, references, options, process_group)
    rows = _as_candidates(embeddings, reference_embeddings, reference_labels)
    seed = draw_seed(options, generator, embeddings.device)
    if process_group is not None:
        loss, counts, d2 = _of_all_ranks(embeddings, labels, rows, references, options, seed, process_group)
    else:
        loss, counts, d2 = autograd.triplet_loss(
            problem_of(embeddings, labels, rows, references, seed), options, return_stats
        )
    return (loss, stats_of(counts, d2, options)) if return_stats else loss


@torch.compiler.disable  # collectives whose sizes other ranks decide
def _of_all_ranks(*arguments):
    return distributed.triplet_loss(*arguments)


def _as_candidates(embeddings: Tensor, rows: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """References as the batch's kin: of its dtype, labels int64."""
    return None if rows is None else (rows.to(embeddings.dtype), labels.to(torch.int64))


def problem_of(
    embeddings: Tensor, labels: Tensor, rows: tuple[Tensor, Tensor] | None, references: str, seed: Tensor | None
) -> Problem:
    """The batch among itself and references (`_as_candidates`)."""
    if rows is None:
        return Problem(embeddings, labels, seed=seed)
    if references == "only":
        return Problem(*rows, embeddings, labels, anchor_offset=-1, seed=seed)
    # Rows of earlier steps are constants: no gradient of thousands of them is made to be dropped.
    are_constants = autograd.runs_eagerly(embeddings) and not rows[0].requires_grad
    return Problem(
        torch.cat([embeddings.detach() if are_constants else embeddings, rows[0]]),
        torch.cat([labels.to(torch.int64), rows[1]]),
        num_anchors=embeddings.shape[0],
        negatives_only=rows[0].shape[0] if references == "negatives" else 0,
        seed=seed,
        own=embeddings if are_constants else None,
    )


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


@torch.compiler.disable  # the number of triplets depends on the data
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
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Triplets:
    """The terms (a, p, n) of ``triplet_loss`` under the same options; by default every ordered (a, p), a != p, of equal
    labels, with  n = argmin { d2(a, n) : other label, d2(a, n) > d2(a, p) }.

    Args:
        embeddings: [N, D], as for ``triplet_loss``.
        labels: [N], as for ``triplet_loss``.
        margin, distance, band: decide what "random_semi_hard", "random_active" and "all_semi_hard" take.
        negatives, positives, pairs, normalize, generator: as for ``triplet_loss``.
        fallback: under "semi_hard", where no negative is farther than the positive: "farthest": the farthest one, with
            ``fallback`` set. "skip": such pairs are left out. Other rules do not look at it.
        reference_embeddings, reference_labels, references, process_group: as for ``triplet_loss``. Indices count the
            batch (of all ranks), then the references; with references="only" positives and negatives are indices of
            those, anchors of the batch.

    Returns:
        ``Triplets``: anchor, positive, negative [T] int64; d2_ap, d2_an [T] squared distances, float32 (float64 for
        float64 input); fallback [T] bool. In order of anchor, positive, negative. On the device of ``embeddings``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``triplet_loss``; a RuntimeError also under torch.jit.trace and the
            transforms of torch.func, all of them.

    Notes:
        T depends on the data, so on a GPU this waits for the device, and torch.compile leaves its graph here;
        ``triplet_loss`` does neither. Not differentiable: index ``embeddings`` with the result for a loss of your own.
        A NaN distance is never farther than anything; nor is it the farthest or closest while there are others. Ties,
        accuracy and reproducibility are those of ``triplet_loss``.
        Memory grows with N·D + T. Under "all" T is of the order N³ and under "all_semi_hard" can be: these lists are
        made of torch operations, slice by slice, in time O(N²·D + P·N) for P pairs. The loss itself needs none of it.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, equation 4.
    """
    _checks.check_batch(embeddings, labels)
    options = Options(margin, negatives, positives, pairs, fallback, distance, band=band, normalize=normalize)
    _checks.check_options(options)
    _checks.check_generator(generator)
    _checks.check_group(process_group)
    _checks.check_references(embeddings, reference_embeddings, reference_labels, references, options, process_group)
    autograd.refuse_tracers()
    rows = _as_candidates(embeddings, reference_embeddings, reference_labels)
    seed = draw_seed(options, generator, embeddings.device)
    if process_group is None or references == "only":
        return mine(problem_of(embeddings, labels, rows, references, seed), options)
    problem = distributed.mine_problem(embeddings, labels, rows, references, options, seed, process_group)
    triplets = mine(problem, options)
    return triplets._replace(anchor=triplets.anchor + problem.anchor_offset)


def mine(problem: Problem, options: Options) -> Triplets:
    """The triplets of checked arguments; indices are those of anchors and of candidates."""
    if options.negatives in _options.EVERY:
        return _mine_every(problem, options)
    triplets = Triplets(*_backend.mine_triplets(problem, options))
    if options.negatives in _options.RANDOM or (options.negatives == "semi_hard" and options.fallback == "skip"):
        found = ~triplets.fallback
        triplets = Triplets(*(column[found] for column in triplets))
    return triplets


_SLICE = 1 << 22  # elements of the largest array that _mine_every makes at a time


@torch.no_grad()
def _mine_every(problem: Problem, options: Options) -> Triplets:
    """The rules that give every negative a term. The caller wants a list of all of them, so their number is the cost
    and torch's own operations serve: distances of some anchors to all candidates, then some pairs and all negatives."""
    candidates, labels = _as_computed(problem.candidates, options), problem.candidate_labels
    count, offset = len(candidates), problem.anchor_offset
    if offset < 0:
        anchors, anchor_labels = _as_computed(problem.anchors, options), problem.anchor_labels
    else:
        own = slice(offset, count if problem.num_anchors < 0 else offset + problem.num_anchors)
        anchors, anchor_labels = candidates[own], labels[own]
    index = torch.arange(count, device=candidates.device)
    none = index[:0], index[:0], index[:0], candidates.new_empty(0), candidates.new_empty(0)
    columns = [none]
    step = max(1, _SLICE // max(1, candidates.numel()))
    for begin in range(0, len(anchors) if count else 0, step):
        rows = anchors[begin : begin + step]  # [S, D]
        d2 = (rows[:, None] - candidates).square().sum(dim=2)  # [S, C]
        same = anchor_labels[begin : begin + step, None] == labels
        positive = same & (index < count - problem.negatives_only)
        if offset >= 0:
            own = offset + begin + torch.arange(len(rows), device=index.device)[:, None]
            positive &= index > own if options.pairs == "unordered" else index != own
        if options.positives != "all":
            hardest = options.positives == "hardest"
            key = d2.nan_to_num(nan=-1.0 if hardest else torch.inf, posinf=torch.inf)
            key = torch.where(positive, key, -2.0 if hardest else torch.inf)
            # The first positive that has the extreme distance: the extreme itself may be infinite.
            extreme = key.amax(dim=1, keepdim=True) if hardest else key.amin(dim=1, keepdim=True)
            positive &= key == extreme
            positive &= positive.cumsum(dim=1) == 1
        anchor, positive = positive.nonzero(as_tuple=True)  # [P]
        for a, p in zip(anchor.split(max(1, _SLICE // count)), positive.split(max(1, _SLICE // count)), strict=True):
            d2_ap, d2_an, every = d2[a, p][:, None], d2[a], ~same[a]  # [P, 1], [P, C], [P, C]
            if options.negatives == "all_semi_hard":
                every &= _in_band(d2_ap, d2_an, options)
            pair, negative = every.nonzero(as_tuple=True)  # [T]
            a, p = a[pair], p[pair]
            columns.append((begin + a, p, negative, d2[a, p], d2[a, negative]))
    anchor, positive, negative, d2_ap, d2_an = (torch.cat(column) for column in zip(*columns, strict=True))
    return Triplets(anchor, positive, negative, d2_ap, d2_an, torch.zeros_like(anchor, dtype=torch.bool))


def _in_band(d2_ap: Tensor, d2_an: Tensor, options: Options) -> Tensor:
    if options.distance == "euclidean":
        gap = d2_an.sqrt() - d2_ap.sqrt()
    else:
        gap = (d2_an - d2_ap) * (0.5 if options.distance == "cosine" else 1.0)
    return (d2_an > d2_ap) & (gap < options.margin if options.band is None else gap <= options.band)


def _as_computed(embeddings: Tensor, options: Options) -> Tensor:
    x = embeddings.to(_backend.loss_dtype(embeddings.dtype))
    normalize = options.normalize or options.distance == "cosine"
    return torch.nn.functional.normalize(x, dim=1, eps=1e-12) if normalize else x
