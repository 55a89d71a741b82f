"""Work outside of this process that tests wait for: compilers, emulated kernels. It is begun when the tests have been
collected, behind everything else in priority, for most tests leave a core free; those that wait are last (conftest.py).

    @pytest.mark.ahead(work=function, of=("parameter", ...))
    def test_something(ahead, parameter, ...):
        ahead()  # function(parameter, ...): what it returns or raises
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


def step_back() -> None:
    """This thread, and what it starts, where priorities are threads'."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, initializer=step_back)


WORKERS = pool()
BEGUN: dict[tuple, Future] = {}


def begin(work, *arguments) -> Future:
    """``work(*arguments)``, once in a session."""
    key = (work, *arguments)
    if key not in BEGUN:
        BEGUN[key] = WORKERS.submit(work, *arguments)
    return BEGUN[key]


SCRATCH = tempfile.TemporaryDirectory(prefix="facenet_ext-tests-")


def folder() -> Path:
    """A new one, which goes when the session ends."""
    return Path(tempfile.mkdtemp(dir=SCRATCH.name))
