import sys
from pathlib import Path

import pytest
import work_ahead

sys.path.insert(0, str(Path(__file__).resolve().parent))

# (sanitizer, warps per side, sort chunk)
PROGRAMS = (("plain", 2, 64), ("asan", 2, 64), ("tsan", 2, 64), ("init", 2, 64), ("plain", 4, 8192))


def program(*key) -> Path:
    from building import build

    return build(work_ahead.folder(), *key)


def pytest_collection_finish(session) -> None:
    asked = sum("programs" in getattr(item, "fixturenames", ()) for item in session.items)
    if asked > len(PROGRAMS) and not session.config.option.collectonly:  # not for a single test
        for key in PROGRAMS:
            work_ahead.begin(program, *key)


@pytest.fixture(scope="session")
def programs():
    """(sanitizer, warps per side, sort chunk) -> the runner, compiled once per session."""
    return lambda sanitizer="plain", warps_per_side=2, sort_chunk=64: work_ahead.begin(
        program, sanitizer, warps_per_side, sort_chunk
    ).result()
