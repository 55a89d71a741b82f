"""Every precondition of the public functions. Each failure has its own message: argument, what came, what is accepted.

TypeError: the kind of thing is wrong (no tensor, a dtype). ValueError: the kind is right, the value is not (shape,
length, device, option, margin). Only metadata is looked at, so nothing here waits for a device.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from . import _options
from ._options import Options

EMBEDDING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
MAX_ROWS = 2**31 - 1  # the kernels pack a row's index into 32 bits


def check_batch(embeddings: Tensor, labels: Tensor) -> None:
    """embeddings [N, D] floating, labels [N] integer, both dense and on one device, which is the CPU or a CUDA GPU."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"embeddings is a {_kind(embeddings)}; accepted: a torch.Tensor [N, D]")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {_kind(labels)}; accepted: a torch.Tensor [N] of integers")
    if embeddings.dtype not in EMBEDDING_DTYPES:
        raise TypeError(f"embeddings has dtype {embeddings.dtype}; accepted: {_names(EMBEDDING_DTYPES)}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels has dtype {labels.dtype}; accepted: {_names(LABEL_DTYPES)}")
    if embeddings.layout != torch.strided:
        raise TypeError(f"embeddings has layout {embeddings.layout}; accepted: torch.strided (dense)")
    if labels.layout != torch.strided:
        raise TypeError(f"labels has layout {labels.layout}; accepted: torch.strided (dense)")
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings has shape {list(embeddings.shape)}; accepted: [N, D]")
    if labels.dim() != 1:
        raise ValueError(f"labels has shape {list(labels.shape)}; accepted: [N]")
    if embeddings.shape[1] < 1:
        raise ValueError(f"embeddings has shape {list(embeddings.shape)}; accepted: [N, D] with D >= 1")
    if embeddings.shape[0] > MAX_ROWS:
        raise ValueError(f"embeddings has {embeddings.shape[0]} rows; accepted: at most {MAX_ROWS}")
    if labels.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"labels has length {labels.shape[0]}; accepted: {embeddings.shape[0]}, the number of rows of embeddings"
        )
    if labels.device != embeddings.device:
        raise ValueError(f"labels is on {labels.device}; accepted: {embeddings.device}, the device of embeddings")
    if embeddings.device.type not in ("cpu", "cuda"):
        raise ValueError(f"embeddings is on {embeddings.device}; accepted: a tensor on cpu or cuda")


def check_options(options: Options) -> None:
    """Every option by itself, then those that exclude each other."""
    check_margin(options.margin)
    check_choice("negatives", options.negatives, _options.NEGATIVES)
    check_choice("positives", options.positives, _options.POSITIVES)
    check_choice("pairs", options.pairs, _options.PAIRS)
    check_choice("fallback", options.fallback, _options.FALLBACKS)
    check_choice("distance", options.distance, _options.DISTANCES)
    check_choice("reduction", options.reduction, _options.REDUCTIONS)
    check_switch("soft_margin", options.soft_margin)
    check_switch("normalize", options.normalize)
    if options.soft_margin and options.negatives in _options.EVERY:
        # A sum of hinges over sorted distances is a difference of prefix sums; one of softplus is not.
        one_each = tuple(rule for rule in _options.NEGATIVES if rule not in _options.EVERY)
        raise ValueError(
            f"soft_margin is True with negatives={options.negatives!r}; accepted: False, or negatives one of "
            f"{_names(one_each)}, which take one negative a pair"
        )
    if options.band is not None:
        check_band(options.band, options.negatives)


def check_band(band: float, negatives: str) -> None:
    if isinstance(band, bool) or not isinstance(band, (int, float, numbers.Real)):
        raise TypeError(f"band is a {_kind(band)}; accepted: None or a number > 0, in the unit of distance")
    if not 0 < band < math.inf:
        raise ValueError(f"band is {band}; accepted: None or a finite number > 0, in the unit of distance")
    if negatives not in _options.BANDED:
        raise ValueError(
            f"band is {band} with negatives={negatives!r}; accepted: None, or negatives one of "
            f"{_names(_options.BANDED)}"
        )


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {_kind(generator)}; accepted: None or a torch.Generator")


def check_margin(margin: float) -> None:
    if isinstance(margin, bool) or not isinstance(margin, (int, float, numbers.Real)):
        raise TypeError(f"margin is a {_kind(margin)}; accepted: a number >= 0, in the unit of distance")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}; accepted: a finite number >= 0, in the unit of distance")


def check_choice(argument: str, value: str, accepted: tuple[str, ...]) -> None:
    if value in accepted and isinstance(value, str):
        return
    if not isinstance(value, str):
        raise TypeError(f"{argument} is a {_kind(value)}; accepted: {_names(accepted)}")
    raise ValueError(f"{argument} is {value!r}; accepted: {_names(accepted)}")


def check_switch(argument: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{argument} is a {_kind(value)}; accepted: True or False")


def _kind(value: object) -> str:
    return type(value).__name__


def _names(accepted: tuple) -> str:
    return ", ".join(repr(item) if isinstance(item, str) else str(item) for item in accepted)
