import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

# (sanitizer, warps per side, sort chunk)
PROGRAMS = (("plain", 2, 64), ("asan", 2, 64), ("tsan", 2, 64), ("init", 2, 64), ("plain", 4, 8192))


@pytest.fixture(scope="session")
def ahead(request, tmp_path_factory):
    """What the session's tests will ask for, begun while earlier tests run: those wait for one process at a time, and
    leave the other cores free. Futures: the runner by its key in PROGRAMS, and the attempt to catch a planted bug by
    (name, sanitizer)."""
    from emulation import build
    from planted_bugs import BUGS, try_it

    items = [item for item in request.session.items if Path(__file__).parent in item.path.parents]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        begun = {}
        if sum("programs" in item.fixturenames for item in items) > len(PROGRAMS):
            for key in PROGRAMS:
                begun[key] = pool.submit(build, tmp_path_factory.mktemp("-".join(map(str, key))), *key)
        for item in items:
            if "attempt" in item.fixturenames:
                name = item.callspec.params.get("name")
                key = (name, BUGS[name][3] if name else item.callspec.params["sanitizer"])
                begun[key] = pool.submit(try_it, *key, tmp_path_factory.mktemp(name or key[1]))
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def programs(ahead, tmp_path_factory):
    """(sanitizer, warps per side, sort chunk) -> the runner, compiled once per session."""
    from emulation import build

    built = {}

    def get(sanitizer: str = "plain", warps_per_side: int = 2, sort_chunk: int = 64) -> Path:
        key = (sanitizer, warps_per_side, sort_chunk)
        if key not in built:
            built[key] = (
                ahead[key].result() if key in ahead else build(tmp_path_factory.mktemp("-".join(map(str, key))), *key)
            )
        return built[key]

    return get


@pytest.fixture(scope="session")
def attempt(ahead):
    """(name of a planted bug or None, sanitizer): raises what was found."""
    return lambda *key: ahead[key].result()
