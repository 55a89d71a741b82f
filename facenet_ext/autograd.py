"""How autograd and torch.compile see the loss: one forward that already yields the gradient, one backward to scale it.

    eager       _TripletLoss.apply                  backward: _backend.scale_gradient, whose own backward raises
    compiled    op facenet_ext::triplet_loss        backward: op facenet_ext::triplet_loss_backward, likewise

The eager path calls the autograd.Function itself, not the custom op: the dispatcher's way round costs more than a small
batch. The selection is a constant of the loss, so a second derivative would leave out how the selection moves, and the
saved first one does not know its own slope: asking for it is an error in both ways.
"""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import _backend
from ._backend import Problem
from ._options import Options

functorch = torch._C._functorch

_FORWARD_MODE = (
    "facenet_ext.triplet_loss has no forward-mode derivative: its gradient is computed in the forward pass; use "
    "backward(), or facenet_ext.reference.triplet_loss where one is needed"
)
_TRANSFORM = (
    "facenet_ext.triplet_loss is not differentiated by torch.func (grad, vjp, jacrev): its gradient is computed in the "
    "forward pass; use backward() or torch.autograd.grad"
)
_SECOND_DERIVATIVE = (
    "facenet_ext.triplet_loss has no second derivative: its gradient is computed in the forward pass, with the "
    "selection of negatives as a constant; use facenet_ext.reference.triplet_loss where one is needed"
)


def triplet_loss(problem: Problem, options: Options, need_stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss, counts [5], d2 [3] of checked arguments, differentiable in problem.candidates and problem.anchors.

    A gradient is computed only where someone can ask for it; counts and d2 are None if not `need_stats`.
    """
    candidates, anchors = problem.candidates if problem.own is None else problem.own, problem.anchors
    need_grad = torch.is_grad_enabled()
    need_grad = need_grad and candidates.requires_grad, need_grad and anchors is not None and anchors.requires_grad
    if not torch.compiler.is_compiling():
        refuse_transforms(candidates, problem.candidates, anchors)
    if not runs_eagerly(candidates):
        # Not _replace(), which the compiler of torch 2.5 does not know.
        o = options
        rule = float(o.margin), o.negatives, o.positives, o.pairs, o.fallback, o.distance, o.soft_margin
        flat = *rule, 0.0 if o.band is None else float(o.band), o.reduction, o.normalize
        loss, _, _, counts, d2 = torch.ops.facenet_ext.triplet_loss(*problem[:-1], *flat, *need_grad, need_stats)
        return (loss, counts, d2) if need_stats else (loss, None, None)
    if True in need_grad:
        return _TripletLoss.apply(candidates, anchors, problem, options, need_grad, need_stats)
    loss, _, _, counts, d2 = _backend.triplet_loss(problem, options, need_grad, need_stats)
    return loss, counts, d2


def refuse_transforms(*all_rows: Tensor | None) -> None:
    """Derivatives that are not there. Inside a compiled graph nobody sees them asked for."""
    transform = functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == functorch.TransformType.Grad:
        raise RuntimeError(_TRANSFORM)
    for rows in all_rows:
        if rows is not None and unpack_dual(rows).tangent is not None:
            raise RuntimeError(_FORWARD_MODE)


def refuse_tracers() -> None:
    """Of the miner, which is no op: a fake or a proxy tensor stops it by itself, where its length is asked for."""
    if torch.jit.is_tracing() or functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "facenet_ext.mine_triplets returns as many triplets as there are: torch.jit.trace and the transforms of "
            "torch.func cannot see it; call it outside of them"
        )


def runs_eagerly(rows: Tensor) -> bool:
    """Whether `rows` are memory and nobody watches. A fake tensor has none to point at; a tracer, a mode (one that
    counts FLOPs, say) or a transform has to see an op: for these there is the dispatcher's way."""
    return (
        not torch.compiler.is_compiling()
        and type(rows) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


class _TripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, candidates, anchors, problem, options, need_grad, need_stats):
        loss, *grads, counts, d2 = _backend.triplet_loss(problem, options, need_grad, need_stats)
        ctx.set_materialize_grads(False)
        if need_stats:
            ctx.mark_non_differentiable(counts, d2)
        # The inputs bring no value into backward, only dtypes and the link by which a second derivative is noticed
        ctx.save_for_backward(*grads, candidates, anchors)
        return loss, counts, d2

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 6
        grad_candidates, grad_anchors, candidates, anchors = ctx.saved_tensors
        return scaled(grad_candidates, upstream, candidates), scaled(grad_anchors, upstream, anchors), *(None,) * 4


def scaled(grad: Tensor | None, upstream: Tensor, rows: Tensor) -> Tensor | None:
    if grad is None:
        return None
    if not runs_eagerly(upstream) or functorch.is_legacy_batchedtensor(upstream):  # the batch of is_grads_batched
        return torch.ops.facenet_ext.triplet_loss_backward(grad, upstream, rows)
    if torch.is_grad_enabled():  # create_graph=True: what comes out must be differentiable, or say that it is not
        return ScaledGradient.apply(grad, upstream, rows)
    if grad.dtype == rows.dtype and not upstream.is_cuda and upstream.item() == 1:
        # loss.backward(): the saved gradient is the answer. Where the graph is retained, the engine copies it, and
        # autograd's version check refuses a second backward over one that was changed in place. (A GPU would have to be
        # waited for.)
        return grad
    return _backend.scale_gradient(grad, upstream, rows.dtype)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, upstream, rows):
        return _backend.scale_gradient(grad, upstream, rows.dtype)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_SECOND_DERIVATIVE)


# ---- custom ops: what torch.compile and torch.export keep in their graphs --------------------------------------------
# A custom op takes tensors and plain values: Problem and Options come spelt out (band 0: none). It returns tensors:
# what is not needed comes as an empty one. Sizes follow from A, C and D alone. (torch 2.4 reads annotations as they
# are, so this file does not postpone them.)


@torch.library.custom_op("facenet_ext::triplet_loss", mutates_args=())
def _triplet_loss_op(
    candidates: Tensor,
    candidate_labels: Tensor,
    anchors: Tensor | None,
    anchor_labels: Tensor | None,
    anchor_offset: int,
    num_anchors: int,
    negatives_only: int,
    seed: Tensor | None,
    margin: float,
    negatives: str,
    positives: str,
    pairs: str,
    fallback: str,
    distance: str,
    soft_margin: bool,
    band: float,
    reduction: str,
    normalize: bool,
    need_grad_candidates: bool,
    need_grad_anchors: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(
        candidates, candidate_labels, anchors, anchor_labels, anchor_offset, num_anchors, negatives_only, seed
    )
    options = Options(
        margin, negatives, positives, pairs, fallback, distance, soft_margin, band or None, reduction, normalize
    )
    need_grad = need_grad_candidates, need_grad_anchors
    loss, grad_candidates, grad_anchors, counts, d2 = _backend.triplet_loss(problem, options, need_grad, need_stats)
    return (
        loss,
        loss.new_empty(0) if grad_candidates is None else grad_candidates,
        loss.new_empty(0) if grad_anchors is None else grad_anchors,
        loss.new_empty(0, dtype=torch.int64) if counts is None else counts,
        loss.new_empty(0) if d2 is None else d2,
    )


@_triplet_loss_op.register_fake
def _(candidates, candidate_labels, anchors, *rest):
    need_grad_candidates, need_grad_anchors, need_stats = rest[-3:]
    dtype = _backend.loss_dtype(candidates.dtype)
    return (
        candidates.new_empty((), dtype=dtype),
        candidates.new_empty(candidates.shape if need_grad_candidates else 0, dtype=dtype),
        candidates.new_empty(anchors.shape if need_grad_anchors else 0, dtype=dtype),
        candidates.new_empty(5 if need_stats else 0, dtype=torch.int64),
        candidates.new_empty(3 if need_stats else 0, dtype=dtype),
    )


def _save_gradient(ctx, inputs, output):
    loss, grad_candidates, grad_anchors, counts, d2 = output
    ctx.need_grad = inputs[-3:-1]
    ctx.set_materialize_grads(False)
    no_graph = () if True in ctx.need_grad else (loss,)
    ctx.mark_non_differentiable(*no_graph, grad_candidates, grad_anchors, counts, d2)
    ctx.save_for_backward(grad_candidates, grad_anchors, inputs[0], inputs[2])


def _scale_saved_gradient(ctx, upstream, *_):
    grads = [None] * 21  # one for every argument of the op
    if upstream is not None:
        grad_candidates, grad_anchors, candidates, anchors = ctx.saved_tensors
        backward = torch.ops.facenet_ext.triplet_loss_backward
        if ctx.need_grad[0]:
            grads[0] = backward(grad_candidates, upstream, candidates)
        if ctx.need_grad[1]:
            grads[2] = backward(grad_anchors, upstream, anchors)
    return tuple(grads)


_triplet_loss_op.register_autograd(_scale_saved_gradient, setup_context=_save_gradient)


@torch.library.custom_op("facenet_ext::triplet_loss_backward", mutates_args=())
def _triplet_loss_backward_op(grad: Tensor, upstream: Tensor, rows: Tensor) -> Tensor:
    return _backend.scale_gradient(grad, upstream, rows.dtype)


@_triplet_loss_backward_op.register_fake
def _(grad, upstream, rows):
    return torch.empty_like(grad, dtype=rows.dtype)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(_SECOND_DERIVATIVE)


_triplet_loss_backward_op.register_autograd(_no_second_derivative)
