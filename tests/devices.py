"""Which devices the tests can run on."""

from __future__ import annotations

import torch

import facenet_ext


def why_not_cuda() -> str | None:
    info = facenet_ext.build_info()
    if not info["cuda"]:
        return f"CUDA backend not compiled in: {info['cuda_reason']}"
    return None if torch.cuda.is_available() else "no GPU"
