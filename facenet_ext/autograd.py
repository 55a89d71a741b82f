"""How autograd and torch.compile see the loss: one forward that already yields the gradient, one backward to scale it.

    eager       _TripletLoss.apply                  backward: _backend.scale_gradient, whose own backward raises
    compiled    op facenet_ext::triplet_loss        backward: op facenet_ext::triplet_loss_backward, likewise

The eager path calls the autograd.Function itself, not the custom op: the dispatcher's way round costs more than a small
batch. The selection is a constant of the loss, so a second derivative would leave out how the selection moves, and the
saved first one does not know its own slope: asking for it is an error in both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backend

_SECOND_DERIVATIVE = (
    "facenet_ext.triplet_loss has no second derivative: its gradient is computed in the forward pass, with the "
    "selection of negatives as a constant; use facenet_ext.reference.triplet_loss where one is needed"
)


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    fallback: str,
    distance: str,
    reduction: str,
    normalize: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss, counts, d2 of checked arguments; the gradient is computed only where someone can ask for it."""
    need_grad = torch.is_grad_enabled() and embeddings.requires_grad
    # A tensor subclass (a fake tensor, for one) has no memory to point at: the dispatcher knows what to do with it.
    if torch.compiler.is_compiling() or type(embeddings) not in _PLAIN:
        loss, _, counts, d2 = torch.ops.facenet_ext.triplet_loss(
            embeddings, labels, margin, fallback, distance, reduction, normalize, need_grad, need_stats
        )
        return (loss, counts, d2) if need_stats else (loss, None, None)
    options = (margin, fallback, distance, reduction, normalize)
    if need_grad:
        return _TripletLoss.apply(embeddings, labels, options, need_stats)
    loss, _, counts, d2 = _backend.triplet_loss(embeddings, labels, *options, False, need_stats)
    return loss, counts, d2


_PLAIN = (Tensor, torch.nn.Parameter)


class _TripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, labels, options, need_stats):
        loss, grad, counts, d2 = _backend.triplet_loss(embeddings, labels, *options, True, need_stats)
        ctx.set_materialize_grads(False)
        if need_stats:
            ctx.mark_non_differentiable(counts, d2)
        # embeddings brings no value into backward, only its dtype and the link by which a second derivative is noticed
        ctx.save_for_backward(grad, embeddings)
        return loss, counts, d2

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return None, None, None, None
        grad, embeddings = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: what comes out must be differentiable, or say that it is not
            return _ScaledGradient.apply(grad, upstream, embeddings), None, None, None
        return _backend.scale_gradient(grad, upstream, embeddings.dtype), None, None, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, upstream, embeddings):
        return _backend.scale_gradient(grad, upstream, embeddings.dtype)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_SECOND_DERIVATIVE)


# ---- custom ops: what torch.compile and torch.export keep in their graphs --------------------------------------------
# A custom op returns tensors only: what is not needed comes as an empty one. Sizes follow from N and D alone.


@torch.library.custom_op("facenet_ext::triplet_loss", mutates_args=())
def _triplet_loss_op(
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    fallback: str,
    distance: str,
    reduction: str,
    normalize: bool,
    need_grad: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, grad, counts, d2 = _backend.triplet_loss(
        embeddings, labels, margin, fallback, distance, reduction, normalize, need_grad, need_stats
    )
    return (
        loss,
        loss.new_empty(0) if grad is None else grad,
        loss.new_empty(0, dtype=torch.int64) if counts is None else counts,
        loss.new_empty(0) if d2 is None else d2,
    )


@_triplet_loss_op.register_fake
def _(embeddings, labels, margin, fallback, distance, reduction, normalize, need_grad, need_stats):
    dtype = _backend.loss_dtype(embeddings.dtype)
    return (
        embeddings.new_empty((), dtype=dtype),
        embeddings.new_empty(embeddings.shape if need_grad else 0, dtype=dtype),
        embeddings.new_empty(5 if need_stats else 0, dtype=torch.int64),
        embeddings.new_empty(3 if need_stats else 0, dtype=dtype),
    )


def _save_gradient(ctx, inputs, output):
    loss, grad, counts, d2 = output
    need_grad = inputs[-2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(() if need_grad else (loss,)), grad, counts, d2)
    ctx.save_for_backward(grad, inputs[0])


def _scale_saved_gradient(ctx, upstream, *_):
    grad, embeddings = ctx.saved_tensors
    inputs = 9
    if upstream is None:
        return (None,) * inputs
    return (torch.ops.facenet_ext.triplet_loss_backward(grad, upstream, embeddings), *(None,) * (inputs - 1))


_triplet_loss_op.register_autograd(_scale_saved_gradient, setup_context=_save_gradient)


@torch.library.custom_op("facenet_ext::triplet_loss_backward", mutates_args=())
def _triplet_loss_backward_op(grad: Tensor, upstream: Tensor, embeddings: Tensor) -> Tensor:
    return _backend.scale_gradient(grad, upstream, embeddings.dtype)


@_triplet_loss_backward_op.register_fake
def _(grad, upstream, embeddings):
    return torch.empty_like(grad, dtype=embeddings.dtype)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(_SECOND_DERIVATIVE)


_triplet_loss_backward_op.register_autograd(_no_second_derivative)
