from __future__ import annotations

import pytest
import torch
from devices import why_not_cuda

import facenet_ext


def pytest_report_header() -> list[str]:
    info = facenet_ext.build_info()
    reason = why_not_cuda()
    return [
        f"facenet_ext {info['version']} from {facenet_ext.__file__}, torch {torch.__version__}",
        f"CPU paths: {', '.join(info['cpu_isa'])}; CUDA: {'skipped: ' + reason if reason else 'tested'}",
    ]


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """Every test of what the op computes runs on both backends; the CUDA one is skipped, with the reason, where it
    cannot."""
    reason = why_not_cuda() if request.param == "cuda" else None
    if reason:
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def thread_count_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
