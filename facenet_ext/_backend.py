"""The only caller of the compiled module: allocates outputs and workspace, hands over pointers, stream, thread count.

    embeddings, labels (checked) --> unit inner stride, int64 labels --> torch.empty outputs --> _C.launch_triplet

The same lines serve the CPU and CUDA; on a GPU nothing here waits for the device, and every size is known from shapes
alone, so that a CUDA graph can capture a call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ._options import EVERY, Options

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"facenet_ext in {os.path.dirname(__file__)} has no compiled module for this Python: in a checkout, build it "
        "with 'pip install .' or 'python setup.py build_ext --inplace'"
    ) from error

_DTYPE_CODES = {getattr(torch, name): code for name, code in _C.dtypes.items()}
_INFO = _C.build_info()
_HAS_CUDA = _INFO["cuda"]
_NO_STREAM = contextlib.nullcontext()


def build_info() -> dict:
    """What was compiled in, and what of it this machine can run.

    Returns a dict: ``version`` (str), ``cuda`` (bool: CUDA backend compiled in), ``cuda_archs`` (list of str),
    ``cuda_reason`` (str: nvcc's version, or why CUDA is off), ``cpu_isa`` (list of str, best first: the paths this
    machine can run), ``compiler`` (str). Needs no GPU and looks for none.
    """
    return _C.build_info()


def cpu_isa_active() -> str:
    """The CPU path in use: the best of ``build_info()["cpu_isa"]``, or the one that FACENET_EXT_ISA forces."""
    return _C.cpu_isa_active()


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision computes, and reports the loss, in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem(NamedTuple):
    """Who is an anchor and who a candidate: the inputs of TripletArgs, whose header (csrc/triplet.h) tells the cases.

    Candidates alone, the default, are a plain batch: each row is an anchor too.
    """

    candidates: Tensor  # [C, D]
    candidate_labels: Tensor  # [C]
    anchors: Tensor | None = None  # [A, D], exactly where anchor_offset is -1
    anchor_labels: Tensor | None = None  # [A], likewise
    anchor_offset: int = 0  # anchor i is candidate anchor_offset + i; -1: anchors are no candidates
    num_anchors: int = -1  # A where anchors are candidates; -1: all candidates are anchors
    negatives_only: int = 0  # the last so many candidates are never positives
    seed: Tensor | None = None  # [1] int64 on the device of candidates; random rules only
    own: Tensor | None = None  # [G, D] the first G candidates, of which alone the gradient is asked for; None: of all


def triplet_loss(
    problem: Problem, options: Options, need_grad: tuple[bool, bool], need_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """loss [], d loss / d candidates [C, D], of which only problem.own's rows if it has any, d loss / d anchors [A, D],
    counts [5] int64, d2 [3]; None for what is not needed. The gradients are those before the upstream factor;
    need_grad: of candidates, of anchors.

    All but the counts are in ``loss_dtype``. Without the counts the kernels may stop at the margin, which is faster.
    """
    candidates, anchors = problem.candidates, problem.anchors
    dtype, device = loss_dtype(candidates.dtype), candidates.device
    loss = torch.empty((), dtype=dtype, device=device)
    wanted = candidates.shape[0] if problem.own is None else problem.own.shape[0]
    rows = candidates.shape[0] if options.negatives in EVERY else wanted  # these rules know no constants
    grad_candidates = torch.empty((rows, candidates.shape[1]), dtype=dtype, device=device) if need_grad[0] else None
    grad_anchors = torch.empty(anchors.shape, dtype=dtype, device=device) if need_grad[1] else None
    counts = torch.empty(5, dtype=torch.int64, device=device) if need_stats else None
    d2 = torch.empty(3, dtype=dtype, device=device) if need_stats else None
    outputs = tuple(map(_address, (loss, grad_candidates, grad_anchors, counts, d2)))
    _launch(problem, options, candidates.shape[0] - rows, outputs, (0, 0, 0, 0, 0, 0))
    if rows > wanted and need_grad[0]:
        grad_candidates = grad_candidates[:wanted]
    return loss, grad_candidates, grad_anchors, counts, d2


def scale_gradient(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * upstream in grad's precision, rounded once, to ``dtype``."""
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))


def mine_triplets(problem: Problem, options: Options) -> tuple[Tensor, ...]:
    """anchor, positive, negative [P] int64, d2_ap, d2_an [P], is_fallback [P] bool of all pairs, flagged ones included.

    P is counted from the labels and decides the outputs' sizes: on a GPU this waits for the device.
    """
    pairs = _pairs_of_anchors(problem, options)
    pair_begin = torch.zeros(len(pairs) + 1, dtype=torch.int64, device=pairs.device)
    torch.cumsum(pairs, 0, out=pair_begin[1:])
    total = int(pair_begin[-1])

    dtype = loss_dtype(problem.candidates.dtype)
    anchor = torch.repeat_interleave(pairs, output_size=total)
    positive, negative = torch.empty_like(anchor), torch.empty_like(anchor)
    d2_ap, d2_an = torch.empty_like(anchor, dtype=dtype), torch.empty_like(anchor, dtype=dtype)
    is_fallback = torch.empty_like(anchor, dtype=torch.bool)  # one byte each, as the kernels write it
    if total:
        outputs = tuple(map(_address, (pair_begin, positive, negative, d2_ap, d2_an, is_fallback)))
        _launch(problem, options, 0, (0, 0, 0, 0, 0), outputs)
    return anchor, positive, negative, d2_ap, d2_an, is_fallback


def _pairs_of_anchors(problem: Problem, options: Options) -> Tensor:
    """[A] int64: how many positives each anchor keeps; 0 where no candidate has another label."""
    labels, offset = _labels(problem.candidate_labels), problem.anchor_offset
    count = len(labels)
    if offset < 0:
        foreign = _labels(problem.anchor_labels)
        labels = torch.cat([labels, foreign])
    classes, class_of = torch.unique(labels, return_inverse=True)
    candidate_class = class_of[:count]
    eligible_class = candidate_class[: count - problem.negatives_only]  # of those that may be positives
    size = torch.bincount(candidate_class, minlength=len(classes))
    pairs_of_class = torch.where(size < count, torch.bincount(eligible_class, minlength=len(classes)), 0)
    if offset < 0:
        pairs = pairs_of_class[class_of[count:]]
    else:
        # Of the eligible ones, an anchor leaves out itself; unordered, also those before it in its class.
        left_out = torch.ones_like(eligible_class)
        if options.pairs == "unordered":
            by_class = torch.argsort(eligible_class, stable=True)
            ends = torch.bincount(eligible_class, minlength=len(classes)).cumsum(0)
            place = torch.empty_like(by_class)
            place[by_class] = torch.arange(len(by_class), device=by_class.device)
            starts = torch.nn.functional.pad(ends[:-1], (1, 0))
            left_out = place - starts[eligible_class] + 1
        # A row at the end, where only negatives stand, comes after every positive of its class.
        none = pairs_of_class[candidate_class[len(eligible_class) :]] if options.pairs == "unordered" else 0
        pairs = pairs_of_class[candidate_class]
        pairs[: len(eligible_class)] -= left_out
        pairs[len(eligible_class) :] -= none
        pairs = pairs.clamp_(min=0)[offset:][: _num_anchors(problem)]
    return pairs if options.positives == "all" else pairs.clamp(max=1)


def _num_anchors(problem: Problem) -> int:
    if problem.anchors is not None:
        return problem.anchors.shape[0]
    return problem.candidates.shape[0] if problem.num_anchors < 0 else problem.num_anchors


@functools.lru_cache(maxsize=256)
def _option_codes(options: Options) -> tuple:
    """The options group of TripletArgs, in its order. The cosine is of normalised rows."""
    return (
        _C.distances[options.distance],
        _C.fallbacks[options.fallback],
        _C.reductions[options.reduction],
        options.normalize or options.distance == "cosine",
        float(options.margin),
        _C.negatives[options.negatives],
        _C.positives[options.positives],
        _C.pairs[options.pairs],
        options.soft_margin,
        float(options.band or 0.0),
    )


def _launch(problem: Problem, options: Options, constants: int, loss_outputs: tuple, mining_outputs: tuple) -> None:
    """Runs the kernels of the candidates' device; groups of arguments as in TripletArgs (csrc/triplet.h)."""
    x, y = _rows(problem.candidates), _labels(problem.candidate_labels)
    count, dim = x.shape
    dtype, device = _DTYPE_CODES[x.dtype], x.device
    x_address, y_address = x.data_ptr(), y.data_ptr()
    stride = x.stride(0) if count > 1 else dim
    offset, num_anchors = problem.anchor_offset, _num_anchors(problem)
    if offset < 0:
        a, b = _rows(problem.anchors), _labels(problem.anchor_labels)
        a_address, b_address = a.data_ptr(), b.data_ptr()
        anchor_stride = a.stride(0) if num_anchors > 1 else dim
    else:
        a_address, b_address = x_address + offset * stride * x.element_size(), y_address + 8 * offset
        anchor_stride = stride
    on_cuda = device.type == "cuda"
    if on_cuda:
        index = device.index
        multiprocessors, capability = _cuda_device(index)
        threads = 1
        guard = _NO_STREAM if torch.cuda.current_device() == index else torch.cuda.device(index)
    else:
        multiprocessors = capability = stream = 0
        threads = torch.get_num_threads()
        guard = _NO_STREAM
    codes = _option_codes(options)
    sizes = (num_anchors, count, dim)
    with guard:
        if on_cuda:
            stream = torch.cuda.current_stream().cuda_stream
        workspace_bytes = _workspace_bytes(
            on_cuda, *sizes, offset, dtype, *codes, problem.negatives_only, threads, multiprocessors, capability
        )
        workspace = (
            torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
            if on_cuda
            else _take_cpu_workspace(workspace_bytes)
        )
        _C.launch_triplet(
            on_cuda,
            *(a_address, x_address, b_address, y_address),
            *sizes,
            *(anchor_stride, stride, offset, dtype),
            *codes,
            *(problem.negatives_only, constants, _address(problem.seed)),
            *loss_outputs,
            *mining_outputs,
            *(workspace.data_ptr(), workspace_bytes, threads, stream, multiprocessors, capability),
        )
    if not on_cuda and workspace.numel() <= _KEPT_BYTES:
        _kept.workspace = workspace


# Each thread keeps its last CPU workspace, unless it is very large: fresh memory costs a page fault per 4 KiB touched,
# at N = 1800 several hundred a call, with a memory of 65,536 rows of 128 a third of it. torch caches GPU memory itself.
# A call takes it away while it runs: a signal handler that runs inside of it may call the loss as well.
_KEPT_BYTES = 256 << 20
_kept = threading.local()


def _take_cpu_workspace(size: int) -> Tensor:
    workspace = _kept.__dict__.pop("workspace", None)
    if workspace is None or workspace.numel() < size:
        workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    return workspace


# A training loop asks for the same few sizes again and again.
_workspace_bytes = functools.lru_cache(maxsize=64)(_C.workspace_bytes)


@functools.cache
def _cuda_device(index: int) -> tuple[int, int]:
    """Multiprocessors and 10 * major + minor of a GPU; asked once, when the first tensor on it arrives."""
    if not _HAS_CUDA:
        raise RuntimeError(
            f"embeddings is on cuda:{index}, but this facenet_ext has no CUDA backend ({_INFO['cuda_reason']}); "
            "install it anew where nvcc is on PATH, with FACENET_EXT_CUDA=ON pip install --no-cache-dir "
            "--force-reinstall --no-deps, or move embeddings and labels to the cpu"
        )
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def _rows(embeddings: Tensor) -> Tensor:
    """The values as rows that are contiguous inside and do not overlap; a copy only where the strides ask for one."""
    x = embeddings
    if x.is_neg():  # a lazy negation (of a conjugate's imaginary part) that the memory does not show
        x = x.resolve_neg()
    rows, dim = x.shape
    inner, outer = x.stride(1), x.stride(0)
    if (inner == 1 or dim == 1) and (outer >= dim or rows <= 1):
        return x
    return x.contiguous()


def _labels(labels: Tensor) -> Tensor:
    return (labels if labels.dtype is torch.int64 else labels.to(torch.int64)).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
