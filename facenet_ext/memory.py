"""Rows of earlier batches, kept to be mined against: more negatives than a batch holds, at no cost in activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks

__all__ = ["CrossBatchMemory"]


class CrossBatchMemory(nn.Module):
    """The last ``size`` rows that were added, as references of the next batch:
    loss(batch) over terms (a, p, n) with a from the batch, n from batch and memory, p from the batch (or from both).

        memory = CrossBatchMemory(size=8192, dim=128)
        loss = criterion(embeddings, labels, **memory.references())
        memory.add(embeddings, labels)

    Args:
        size: rows kept, >= 1.
        dim: D, >= 1.
        warmup: rows that must have been added before the memory gives any, >= 0: early embeddings move too fast.
        positives: whether rows of the memory also serve as positives; by default only as negatives.
        dtype: of the rows kept, floating; the loss converts them to the dtype of its embeddings.

    State: ``state_dict`` holds the rows [size, D], their labels [size] int64 and how many were ever added, so that a
    resumed run goes on with the same memory. One of another size or dim, or without a part, leaves it as it was.
    Memory: size·(D + 2) numbers.

    Notes:
        Rows are detached: the gradient flows through the batch alone. Nothing waits for the device. A row that is not
        finite makes every loss NaN while it is kept: add a batch only once its loss was finite. Under
        torch.distributed each rank keeps the rows it added; losses with a ``process_group`` want the same references on
        every rank, so add what ``facenet_ext.distributed.gather`` returns there.

    Source: Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        warmup: int = 0,
        positives: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value, least in (("size", size, 1), ("dim", dim, 1), ("warmup", warmup, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is a {type(value).__name__}; accepted: an integer >= {least}")
            if value < least:
                raise ValueError(f"{name} is {value}; accepted: an integer >= {least}")
        if dtype not in _checks.EMBEDDING_DTYPES:
            raise TypeError(f"dtype is {dtype!r}; accepted: {', '.join(map(str, _checks.EMBEDDING_DTYPES))}")
        _checks.check_switch("positives", positives)
        self.size, self.dim, self.warmup, self.positives = size, dim, warmup, positives
        self.register_buffer("embeddings", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.added = 0  # rows ever; the next one goes to place `added % size`

    def __len__(self) -> int:
        """Rows in the memory."""
        return min(self.added, self.size)

    def references(self) -> dict:
        """Keyword arguments for a loss or a miner of this package; none before the warm-up is over.

        The rows are a copy: a graph made with them outlives the next ``add``.
        """
        rows = len(self)
        if rows == 0 or self.added < self.warmup:
            return {}
        return {
            "reference_embeddings": self.embeddings[:rows].clone(),
            "reference_labels": self.labels[:rows].clone(),
            "references": "all" if self.positives else "negatives",
        }

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Keeps [N, D] embeddings and [N] labels in place of the oldest rows; of more than ``size`` the last ones."""
        _checks.check_batch(embeddings, labels)
        if embeddings.shape[1] != self.dim:
            raise ValueError(
                f"embeddings has shape {list(embeddings.shape)}; accepted: [N, {self.dim}], the memory's dim"
            )
        if embeddings.device != self.embeddings.device:
            raise ValueError(
                f"embeddings is on {embeddings.device}; accepted: {self.embeddings.device}, the memory's device"
            )
        count = len(labels)
        kept = min(count, self.size)
        first = (self.added + count - kept) % self.size
        before_wrap = min(kept, self.size - first)
        rows, of_rows = embeddings[count - kept :], labels[count - kept :]
        for place, begin, end in ((first, 0, before_wrap), (0, before_wrap, kept)):
            self.embeddings[place : place + end - begin] = rows[begin:end].to(self.embeddings.dtype)
            self.labels[place : place + end - begin] = of_rows[begin:end].to(torch.int64)
        self.added += count

    def get_extra_state(self) -> dict:
        return {"added": self.added}

    def set_extra_state(self, state: dict) -> None:
        added = state.get("added") if isinstance(state, dict) else None
        if isinstance(added, bool) or not isinstance(added, int) or added < 0:
            raise ValueError(f"state of the memory is {state!r}; accepted: {{'added': an integer >= 0}}")
        self.added = added

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """torch's, but all or nothing: it goes on after a mismatch, and rows without their count are another memory."""
        added, buffers = self.added, dict(self._buffers)
        rows = {name: buffer.clone() for name, buffer in buffers.items()}
        known, loaded = len(error_msgs) + len(missing_keys), False
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            loaded = len(error_msgs) + len(missing_keys) == known
        finally:
            if not loaded:
                self.added = added
                for name, buffer in buffers.items():
                    buffer.copy_(rows[name])
                    self._buffers[name] = buffer

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, warmup={self.warmup}, positives={self.positives}"
