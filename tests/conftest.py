from __future__ import annotations

import pytest
import torch

import facenet_ext


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """Every test of what the op computes runs on both backends; the CUDA one is skipped, with the reason, where it cannot."""
    if request.param == "cuda":
        if not facenet_ext.build_info()["cuda"]:
            pytest.skip(f"CUDA backend not compiled in: {facenet_ext.build_info()['cuda_reason']}")
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def thread_count_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
