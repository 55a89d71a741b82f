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


def check_batch(embeddings: Tensor, labels: Tensor, rows: str = "embeddings", of_rows: str = "labels") -> None:
    """embeddings [N, D] floating, labels [N] integer, both dense and on one device, which is the CPU or a CUDA GPU.
    `rows`, `of_rows`: what the caller's caller calls them."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"{rows} is a {_kind(embeddings)}; accepted: a torch.Tensor [N, D]")
    if not isinstance(labels, Tensor):
        raise TypeError(f"{of_rows} is a {_kind(labels)}; accepted: a torch.Tensor [N] of integers")
    if embeddings.dtype not in EMBEDDING_DTYPES:
        raise TypeError(f"{rows} has dtype {embeddings.dtype}; accepted: {_names(EMBEDDING_DTYPES)}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"{of_rows} has dtype {labels.dtype}; accepted: {_names(LABEL_DTYPES)}")
    if embeddings.layout != torch.strided:
        raise TypeError(f"{rows} has layout {embeddings.layout}; accepted: torch.strided (dense)")
    if labels.layout != torch.strided:
        raise TypeError(f"{of_rows} has layout {labels.layout}; accepted: torch.strided (dense)")
    if embeddings.dim() != 2:
        raise ValueError(f"{rows} has shape {list(embeddings.shape)}; accepted: [N, D]")
    if labels.dim() != 1:
        raise ValueError(f"{of_rows} has shape {list(labels.shape)}; accepted: [N]")
    if embeddings.shape[1] < 1:
        raise ValueError(f"{rows} has shape {list(embeddings.shape)}; accepted: [N, D] with D >= 1")
    if embeddings.shape[0] > MAX_ROWS:
        raise ValueError(f"{rows} has {embeddings.shape[0]} rows; accepted: at most {MAX_ROWS}")
    if labels.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"{of_rows} has length {labels.shape[0]}; accepted: {embeddings.shape[0]}, the number of rows of {rows}"
        )
    if labels.device != embeddings.device:
        raise ValueError(f"{of_rows} is on {labels.device}; accepted: {embeddings.device}, the device of {rows}")
    if embeddings.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{rows} is on {embeddings.device}; accepted: a tensor on cpu or cuda")


def check_references(
    embeddings: Tensor,
    reference_embeddings: Tensor | None,
    reference_labels: Tensor | None,
    references: str,
    options: Options,
    process_group: object,
) -> None:
    """Further candidates beside checked embeddings, and what excludes them."""
    check_choice("references", references, _options.REFERENCES)
    if reference_embeddings is None and reference_labels is None:
        if references == "only":
            raise ValueError("references is 'only' without reference_embeddings; accepted: 'only' with them")
        return
    check_reference_rows(embeddings, reference_embeddings, reference_labels)
    if references == "only" and options.pairs == "unordered":
        raise ValueError(
            "pairs is 'unordered' with references='only', where anchors and positives are not of one order; accepted: "
            "'ordered'"
        )
    if references == "only" and options.negatives in _options.RANDOM and process_group is not None:
        raise ValueError(
            f"negatives is {options.negatives!r} with references='only' and a process_group, where draws would depend "
            "on the ranks; accepted: a rule that does not draw, or references 'negatives' or 'all'"
        )


def check_reference_rows(
    embeddings: Tensor,
    reference_embeddings: Tensor,
    reference_labels: Tensor,
    rows: str = "reference_embeddings",
    of_rows: str = "reference_labels",
) -> None:
    """A batch of its own that fits checked embeddings. `rows`, `of_rows`: what the caller's caller calls them."""
    check_batch(reference_embeddings, reference_labels, rows, of_rows)
    if reference_embeddings.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"{rows} has shape {list(reference_embeddings.shape)}; accepted: [M, {embeddings.shape[1]}], "
            "as wide as embeddings"
        )
    if reference_embeddings.device != embeddings.device:
        raise ValueError(
            f"{rows} is on {reference_embeddings.device}; accepted: {embeddings.device}, the device of embeddings"
        )


def check_group(process_group: object) -> None:
    """None or a process group that this rank belongs to."""
    if process_group is None:
        return
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group is a {_kind(process_group)}; accepted: None or a torch.distributed.ProcessGroup that this "
            "rank belongs to, such as torch.distributed.group.WORLD"
        )


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


def check_band(band: float, negatives: str, argument: str = "band") -> None:
    if isinstance(band, bool) or not isinstance(band, (int, float, numbers.Real)):
        raise TypeError(f"{argument} is a {_kind(band)}; accepted: None or a number > 0, in the unit of distance")
    if not 0 < _as_float(band) < math.inf:
        raise ValueError(f"{argument} is {band}; accepted: None or a finite number > 0, in the unit of distance")
    if negatives not in _options.BANDED:
        raise ValueError(
            f"{argument} is {band} with negatives={negatives!r}; accepted: None, or negatives one of "
            f"{_names(_options.BANDED)}"
        )


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {_kind(generator)}; accepted: None or a torch.Generator")


def check_margin(margin: float) -> None:
    if isinstance(margin, bool) or not isinstance(margin, (int, float, numbers.Real)):
        raise TypeError(f"margin is a {_kind(margin)}; accepted: a number >= 0, in the unit of distance")
    if not 0 <= _as_float(margin) < math.inf:
        raise ValueError(f"margin is {margin}; accepted: a finite number >= 0, in the unit of distance")


def check_choice(argument: str, value: str, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument} is a {_kind(value)}; accepted: {_names(accepted)}")
    if value not in accepted:
        raise ValueError(f"{argument} is {value!r}; accepted: {_names(accepted)}")


def check_switch(argument: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{argument} is a {_kind(value)}; accepted: True or False")


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # of an integer or a fraction
        return math.inf


def _kind(value: object) -> str:
    kind = type(value)
    return "numpy.bool" if kind.__module__ == "numpy" and kind.__name__.startswith("bool") else kind.__name__


def _names(accepted: tuple) -> str:
    return ", ".join(repr(item) if isinstance(item, str) else str(item) for item in accepted)
