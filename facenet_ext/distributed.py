"""The loss of all ranks' rows: every rank mines its own anchors among the rows of all.

    embeddings [n, D] of this rank
            |
            v   _gather: sizes, then labels and rows in one collective
    rows of all ranks [G, D], own ones at an offset
            |
            v   the kernels: own anchors against all rows and the references
    sum of own terms, counts, d sum / d rows [G, D]
            |                              |
            v   _totals, float64           v   _reduce_scatter: starts after _totals, is awaited in backward
    loss, the same bits on every rank      gradient of own rows [n, D]

What overlaps: the reduce-scatter runs beside all that the caller does between the loss and backward(), other losses and
logging, and the value of the loss does not wait for it (gloo, two ranks of [1500, 1024] on one core: of 32 ms in
backward 3 are left where other work came between). Where backward() follows at once nothing hides it; the gather before
the kernels is never hidden.

The gradient of a rank's embeddings is world_size times d loss / d embeddings: DistributedDataParallel averages, so that
its parameter gradients are those of one process that has the whole batch. Where a rank is gone, or waits elsewhere, the
others get an error of torch.distributed, after the group's timeout at the latest.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from . import _backend, _checks
from ._backend import Problem
from ._options import Options
from .autograd import ScaledGradient, refuse_transforms, scaled

__all__ = ["Gathered", "gather"]


class Gathered(NamedTuple):
    """The rows of all ranks, in order of rank."""

    rows: Tensor  # [G, D]
    labels: Tensor  # [G] int64
    counts: list[int]  # rows of each rank
    offset: int  # own rows are offset .. offset + n
    seed: Tensor | None  # [1] int64, rank 0's
    need_grad: bool  # of any rank


def gather(embeddings: Tensor, labels: Tensor, process_group) -> Gathered:
    """rows = the embeddings of all ranks, one rank after another: differentiable, for a loss of your own.

    Args:
        embeddings: [n, D] and
        labels: [n] of this rank, as for ``triplet_loss``; n may differ between ranks and be 0.
        process_group: as for ``triplet_loss``.

    Returns:
        ``Gathered``. The gradient of ``embeddings`` is the sum over ranks of the gradient of their rows, one
        reduce-scatter. DistributedDataParallel averages: give every rank world_size times its share of the loss.

    Raises:
        TypeError, ValueError: as ``triplet_loss``; the widths or dtypes of ranks differ, on every rank.

    Notes:
        Two collectives forward: sizes, for which the host waits, then labels and rows together, as bytes.
    """
    _checks.check_batch(embeddings, labels)
    _checks.check_group(process_group)
    gathered = _gather(embeddings, labels, process_group)
    return gathered._replace(rows=_GatheredRows.apply(embeddings, gathered.rows, gathered.counts, process_group))


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, rows, counts, group):
        ctx.n, ctx.counts, ctx.group = len(embeddings), counts, group
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        own, work = _reduce_scatter(grad, ctx.counts, ctx.group)
        _wait(work)
        return own[: ctx.n], None, None, None


def _gather(
    embeddings: Tensor,
    labels: Tensor,
    group,
    *,
    seed: Tensor | None = None,
    need_grad: bool = False,
    agree: object = (),
    references: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Gathered:
    """No gradient. `agree`, `references`: what must be the same on all ranks; ValueError on each of them if not."""
    world, rank, device = dist.get_world_size(group), dist.get_rank(group), embeddings.device
    n, dim = embeddings.shape
    check = zlib.crc32(repr((dim, embeddings.dtype, agree)).encode())
    header = torch.tensor([n, check, need_grad, 0, 0], device=device)
    if seed is not None:
        header[3:4] = seed
    if references[0] is not None:
        header[4] = _fingerprint(*references)
    headers = header.new_empty(world, 5)
    _all_gather(headers.view(-1), header, group=group)
    counts, checks, needs, _, prints = headers.T.tolist()
    odd = [r for r in range(world) if (checks[r], prints[r]) != (checks[0], prints[0])]
    if odd:
        raise ValueError(
            f"process_group: rank {', '.join(map(str, odd))} has another width or dtype of embeddings, other "
            "references or another option than rank 0; accepted: the same on every rank"
        )

    most = max(counts)
    label_bytes, row_bytes = 8 * most, most * dim * embeddings.element_size()
    size = max(8, -(-(label_bytes + row_bytes) // 8) * 8)  # so that every rank's labels are aligned
    packed = torch.zeros(size, dtype=torch.uint8, device=device)
    packed[: 8 * n].view(torch.int64).copy_(labels)
    packed[label_bytes : label_bytes + row_bytes].view(embeddings.dtype)[: n * dim].view(n, dim).copy_(
        embeddings.detach()
    )
    of_all = packed.new_empty(world, size)
    if most:
        _all_gather(of_all.view(-1), packed, group=group)
    every_label = of_all[:, :label_bytes].view(torch.int64)
    every_row = of_all[:, label_bytes : label_bytes + row_bytes].view(embeddings.dtype).unflatten(1, (most, dim))
    return Gathered(
        rows=torch.cat([every_row[r, :count] for r, count in enumerate(counts)]),
        labels=torch.cat([every_label[r, :count] for r, count in enumerate(counts)]),
        counts=counts,
        offset=sum(counts[:rank]),
        seed=None if seed is None else headers[0, 3:],
        need_grad=any(needs),
    )


def _fingerprint(rows: Tensor, labels: Tensor) -> Tensor:
    """[] int64 on the device: the bits of rows and labels, each times its place, so that memories that a rank filled
    with rows of its own do not pass for one. Integer sums wrap and do not depend on their order."""
    bits = rows.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    bits = torch.cat([bits.flatten().long(), labels])
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    references: tuple[Tensor, Tensor] | None,
    which: str,
    options: Options,
    seed: Tensor | None,
    group,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, counts [5], d2 [3] of all ranks, of checked arguments; differentiable in embeddings and references[0]."""
    rows, row_labels = references or (None, None)
    refuse_transforms(embeddings, rows)
    need_grad = torch.is_grad_enabled() and (embeddings.requires_grad or (rows is not None and rows.requires_grad))
    return _GlobalTripletLoss.apply(embeddings, rows, labels, row_labels, which, options, seed, group, need_grad)


def mine_problem(
    embeddings: Tensor,
    labels: Tensor,
    references: tuple[Tensor, Tensor] | None,
    which: str,
    options: Options,
    seed: Tensor | None,
    group,
) -> Problem:
    """Own rows against the rows of all ranks, for the miner."""
    rows, row_labels = references or (None, None)
    agree = options, which, None if rows is None else len(rows)
    gathered = _gather(embeddings, labels, group, seed=seed, agree=agree, references=(rows, row_labels))
    return _problem(gathered, len(labels), rows, row_labels, which)


class _GlobalTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, references, labels, reference_labels, which, options, seed, group, need_grad):
        ctx.set_materialize_grads(False)
        ctx.n = len(labels)
        if which == "only":  # all that a rank's anchors meet is on every rank already
            of_all, counts_of_ranks = 0, None
            problem = Problem(references, reference_labels, embeddings, labels, anchor_offset=-1)
        else:
            agree = options, which, None if references is None else len(references)
            gathered = _gather(
                embeddings,
                labels,
                group,
                seed=seed,
                need_grad=need_grad,
                agree=agree,
                references=(references, reference_labels),
            )
            of_all, counts_of_ranks, need_grad = len(gathered.rows), gathered.counts, gathered.need_grad
            problem = _problem(gathered, ctx.n, references, reference_labels, which)
        loss, grad, own, counts, d2 = _backend.triplet_loss(
            problem, options._replace(reduction="sum"), (need_grad, need_grad and which == "only"), True
        )
        loss, counts, d2 = _totals(loss, counts, d2, group)  # first, as NCCL takes a group's collectives one by one
        ctx.own, ctx.work = own, None  # not among the saved tensors: the collective still writes to it
        if need_grad and which != "only":
            ctx.own, ctx.work = _reduce_scatter(grad[:of_all], counts_of_ranks, group)
        terms, active = counts[:2].double()
        denominator = {"mean": terms, "mean_active": active, "sum": torch.ones_like(terms)}[options.reduction]
        denominator = denominator.clamp_min(1)
        factor = dist.get_world_size(group) / denominator
        ctx.save_for_backward(grad[of_all:] if need_grad else None, factor, embeddings, references)
        ctx.mark_non_differentiable(counts, d2)
        return (loss / denominator).to(d2.dtype), counts, d2

    @staticmethod
    def backward(ctx, upstream, *_):
        grads = [None] * 9
        if upstream is not None:
            _wait(ctx.work)
            ctx.work = None
            grad_references, factor, embeddings, references = ctx.saved_tensors
            factor = (upstream * factor).to(upstream.dtype)
            if ctx.needs_input_grad[0]:
                # Never ctx.own itself: no saved tensor, so nothing would notice that the caller adds to what it got.
                grads[0] = ScaledGradient.apply(ctx.own[: ctx.n], factor, embeddings)
            if ctx.needs_input_grad[1]:
                grads[1] = scaled(grad_references, factor, references)
        return tuple(grads)


def _problem(gathered: Gathered, n: int, references: Tensor | None, reference_labels: Tensor | None, which: str):
    """Own rows against the rows of all ranks, then the references."""
    rows, labels, negatives_only = gathered.rows, gathered.labels, 0
    own = None if references is None or references.requires_grad else rows
    if references is not None:
        rows, labels = torch.cat([rows, references]), torch.cat([labels, reference_labels])
        negatives_only = len(references) if which == "negatives" else 0
    return Problem(
        rows,
        labels,
        anchor_offset=gathered.offset,
        num_anchors=n,
        negatives_only=negatives_only,
        seed=gathered.seed,
        own=own,
    )


def _totals(loss: Tensor, counts: Tensor, d2: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of losses in float64, counts, d2 of all ranks; added in order of rank, so equal on every rank."""
    terms = counts[:1].double()
    own = torch.cat([loss.double().view(1), counts.double(), d2[:2].double() * terms, d2[2:].double()])  # [9]
    of_all = own.new_empty(dist.get_world_size(group), 9)
    _all_gather(of_all.view(-1), own, group=group)
    sums = of_all.sum(dim=0)
    mean_d2 = sums[6:8] / sums[1].clamp_min(1)
    return sums[0], sums[1:6].long(), torch.cat([mean_d2, of_all[:, 8:].amax(dim=0)]).to(d2.dtype)


def _reduce_scatter(grad: Tensor, counts: list[int], group):
    """Starts the sum over ranks of grad [G, D]: [largest n, D], of which own rows come first, and the work to await."""
    most, dim = max(counts), grad.shape[1]
    own = grad.new_empty(most, dim)
    if most == 0:
        return own, None
    if any(count != most for count in counts):
        padded = grad.new_zeros(len(counts), most, dim)
        for to, part in zip(padded, grad.split(counts), strict=True):
            to[: len(part)] = part
        grad = padded
    return own, _reduce_scatter_single(own, grad.reshape(-1, dim), group=group, async_op=True)


def _wait(work) -> None:
    if work is not None:
        work.wait()


# torch 2.13 renamed both; a torch without torch.distributed has neither, and no process group to come here with.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
