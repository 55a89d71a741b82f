from __future__ import annotations

import pytest
import torch
import work_ahead
from devices import why_not_cuda

import facenet_ext


def pytest_report_header() -> list[str]:
    info = facenet_ext.build_info()
    reason = why_not_cuda()
    return [
        f"facenet_ext {info['version']} from {facenet_ext.__file__}, torch {torch.__version__}",
        f"CPU paths: {', '.join(info['cpu_isa'])}; CUDA: {'skipped: ' + reason if reason else 'tested'}",
    ]


def pytest_collection_modifyitems(items) -> None:
    """What work_ahead.py begins is waited for last."""
    items.sort(key=lambda item: "emulated" in item.path.parent.name)


def work_of(item) -> tuple | None:
    mark = item.get_closest_marker("ahead")
    return mark and (mark.kwargs["work"], *(item.callspec.params[name] for name in mark.kwargs.get("of", ())))


def pytest_collection_finish(session) -> None:
    for item in session.items:
        work = work_of(item)
        if work and not session.config.option.collectonly and not any(m.args[0] for m in item.iter_markers("skipif")):
            work_ahead.begin(*work)


def pytest_sessionfinish() -> None:
    work_ahead.WORKERS.shutdown(cancel_futures=True)


@pytest.fixture
def ahead(request):
    """The work of the test's mark: what it returns or raises."""
    return lambda: work_ahead.begin(*work_of(request.node)).result()


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
