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

import torch
from torch import Tensor

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


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    fallback: str,
    distance: str,
    reduction: str,
    normalize: bool,
    need_grad: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss [], its gradient [N, D] before the upstream factor, counts [5] int64, d2 [3]; None for what is not needed.

    All but the counts are in ``loss_dtype``. Without the counts the kernels may stop at the margin, which is faster.
    """
    x, y = _rows(embeddings), _labels(labels)
    dtype, device = loss_dtype(x.dtype), x.device
    loss = torch.empty((), dtype=dtype, device=device)
    grad = torch.empty(x.shape, dtype=dtype, device=device) if need_grad else None
    counts = torch.empty(5, dtype=torch.int64, device=device) if need_stats else None
    d2 = torch.empty(3, dtype=dtype, device=device) if need_stats else None
    _launch(
        x,
        y,
        (_C.distances[distance], _C.fallbacks[fallback], _C.reductions[reduction], normalize, margin),
        (_address(loss), _address(grad), 0, _address(counts), _address(d2)),
        (0, 0, 0, 0, 0, 0),
    )
    return loss, grad, counts, d2


def scale_gradient(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * upstream in grad's precision, rounded once, to ``dtype``.

    Always multiplies: whether upstream is 1 cannot be asked without waiting for the device.
    """
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))


def mine_triplets(embeddings: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, ...]:
    """anchor, positive, negative [P] int64, d2_ap, d2_an [P], is_fallback [P] bool of all pairs, flagged ones included.

    P is counted from the labels and decides the outputs' sizes: on a GPU this waits for the device.
    """
    x, y = _rows(embeddings), _labels(labels)
    # Pairs of an anchor: its class without itself, or none where that class is the whole batch and leaves no negative.
    _, class_of, class_size = torch.unique(y, return_inverse=True, return_counts=True)
    size = class_size[class_of]
    pairs = torch.where(size < size.numel(), size - 1, 0)
    pair_begin = torch.zeros(len(y) + 1, dtype=torch.int64, device=y.device)
    torch.cumsum(pairs, 0, out=pair_begin[1:])
    total = int(pair_begin[-1])

    dtype = loss_dtype(x.dtype)
    anchor = torch.repeat_interleave(pairs, output_size=total)
    positive, negative = torch.empty_like(anchor), torch.empty_like(anchor)
    d2_ap, d2_an = torch.empty_like(anchor, dtype=dtype), torch.empty_like(anchor, dtype=dtype)
    is_fallback = torch.empty_like(anchor, dtype=torch.bool)  # one byte each, as the kernels write it
    if total:
        _launch(
            x,
            y,
            (_C.distances["sqeuclidean"], _C.fallbacks["farthest"], _C.reductions["mean"], normalize, 0.0),
            (0, 0, 0, 0, 0),
            tuple(map(_address, (pair_begin, positive, negative, d2_ap, d2_an, is_fallback))),
        )
    return anchor, positive, negative, d2_ap, d2_an, is_fallback


def _launch(x: Tensor, y: Tensor, options: tuple, loss_outputs: tuple, mining_outputs: tuple) -> None:
    """Runs the kernels of x's device, the batch being its own candidates; groups as in TripletArgs (csrc/triplet.h)."""
    rows, dim = x.shape
    dtype, device = _DTYPE_CODES[x.dtype], x.device
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
    with guard:
        if on_cuda:
            stream = torch.cuda.current_stream().cuda_stream
        workspace_bytes = _workspace_bytes(on_cuda, rows, rows, dim, 0, dtype, threads, multiprocessors, capability)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        stride = x.stride(0) if rows > 1 else dim
        x_address, y_address = x.data_ptr(), y.data_ptr()
        _C.launch_triplet(
            on_cuda,
            *(x_address, x_address, y_address, y_address),
            *(rows, rows, dim, stride, stride, 0, dtype),
            *options,
            *loss_outputs,
            *mining_outputs,
            *(workspace.data_ptr(), workspace_bytes, threads, stream, multiprocessors, capability),
        )


# Each thread keeps its last CPU workspace, if small: fresh memory costs a page fault per 4 KiB touched, at N = 1800
# several hundred a call. torch caches GPU memory itself.
_KEPT_BYTES = 64 << 20
_kept = threading.local()


def _cpu_workspace(size: int) -> Tensor:
    workspace = getattr(_kept, "workspace", None)
    if workspace is None or workspace.numel() < size:
        workspace = torch.empty(size, dtype=torch.uint8)
        if size <= _KEPT_BYTES:
            _kept.workspace = workspace
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
