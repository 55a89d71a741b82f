import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """(sanitizer, warps per side, sort chunk) -> the runner, compiled once per session."""
    from emulation import build

    built = {}

    def get(sanitizer: str = "plain", warps_per_side: int = 2, sort_chunk: int = 64) -> Path:
        key = (sanitizer, warps_per_side, sort_chunk)
        if key not in built:
            built[key] = build(tmp_path_factory.mktemp("-".join(map(str, key))), *key)
        return built[key]

    return get
