"""One step on a batch whose activations do not fit: embed by chunks, take the loss's gradient, run every chunk again.

pass 1, no graph    chunk -> model -> embeddings [n, D]          RNG state before each chunk kept
loss                criterion(all embeddings) -> d loss / d embeddings [N, D]
pass 2, graph       chunk -> model -> backward(its rows of that) RNG state put back; DDP exchanges with the last
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["cached_step"]


def cached_step(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    criterion: Callable,
    *,
    chunk: int | None,
    scaler: torch.amp.GradScaler | None = None,
):
    r"""``criterion(model(images), labels).backward()`` with the activations of ``chunk`` images at a time:
    d loss / d weights = sum over chunks c of  (d loss / d e_c) (d e_c / d weights),  e_c = model(images of c).

    Args:
        model: maps [n, ...] to embeddings [n, D]; an nn.Module, DistributedDataParallel or compiled one included.
        images: [N, ...], N >= 0, what ``model`` takes.
        labels: [N], or whatever ``criterion`` takes as its second argument.
        criterion: ``criterion(embeddings, labels)`` gives the loss, or a tuple that begins with it. Any loss of whole
            embeddings, those of this package with ``process_group`` and ``reference_embeddings`` included.
        chunk: images at a time at most, >= 1. None, or N and more: the plain step, once through the network.
        scaler: its scale multiplies the loss before the backward pass; ``scaler.step`` and ``update`` stay yours.

    Returns:
        What ``criterion`` returned (any tuple as a plain one), the loss detached. Gradients were added to ``.grad`` of
        the model's parameters, and of the criterion's if it has any; zero them before, step the optimizer after.

    Raises:
        TypeError, ValueError: ``chunk`` is neither None nor an integer >= 1; images or embeddings are no tensor.

    Notes:
        Equal to the plain step for every network that treats rows alone. Batch norm does not: it normalises by the
        chunk, and updates its running statistics twice a step. Dropout repeats in pass 2 what it drew in pass 1.
        Costs one more forward pass; memory is the activations of a chunk and 2·N·D numbers.
        Call it inside ``torch.autocast`` as you would the model. Under DistributedDataParallel gradients are exchanged
        once, with the last chunk, and the ranks may hold different numbers of images. Nothing waits for the device.

    Source: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int)):
        raise TypeError(f"chunk is a {type(chunk).__name__}; accepted: an integer >= 1, or None")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; accepted: an integer >= 1, or None")

    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}; accepted: a torch.Tensor [N, ...]")
    if images.dim() == 0:
        raise ValueError("images has shape []; accepted: [N, ...]")

    if chunk is None or len(images) <= chunk:
        return _backward(criterion(model(images), labels), scaler)

    count = -(-len(images) // chunk)
    chunks = images.tensor_split(count)  # equal to one image: batch norm has no use for a rest of one
    states, parts = [], []
    with torch.no_grad():
        for part in chunks:
            states.append(_rng_states())
            parts.append(model(part))
            if not isinstance(parts[-1], Tensor):
                raise TypeError(f"embeddings is a {type(parts[-1]).__name__}; accepted: a torch.Tensor [n, D] of model")
    # autocast keeps the half-precision copies of weights that it made; those made without a graph would cut pass 2 off.
    torch.clear_autocast_cache()
    embeddings = torch.cat(parts).requires_grad_()
    del parts
    result = _backward(criterion(embeddings, labels), scaler)

    after = _rng_states()
    for number, (part, gradient) in enumerate(zip(chunks, embeddings.grad.tensor_split(count), strict=True), 1):
        _set_rng_states(states[number - 1])
        # DDP exchanges what has been added up, during the backward pass of the last chunk.
        with nullcontext() if number == count else getattr(model, "no_sync", nullcontext)():
            model(part).backward(gradient)
    _set_rng_states(after)
    return result


def _backward(result, scaler: torch.amp.GradScaler | None):
    loss, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach() if rest is None else (loss.detach(), *rest)


def _rng_states() -> tuple[Tensor, list[Tensor]]:
    """Of the CPU, where some layers draw whatever their device, and of every GPU: the model may span several."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_rng_states(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
