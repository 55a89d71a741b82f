"""The emulation proves itself: each planted bug, in a copy of the kernels, must be caught."""

from __future__ import annotations

import pytest
import work_ahead
from emulation import Finding
from planted_bugs import BUGS, try_it


def without_a_bug(sanitizer: str) -> None:
    try_it(None, sanitizer, work_ahead.folder())


def with_bug(name: str) -> None:
    try_it(name, BUGS[name][3], work_ahead.folder())


@pytest.mark.ahead(work=without_a_bug, of=("sanitizer",))
@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan", "init"])
def test_without_a_bug_nothing_is_found(ahead, sanitizer):
    ahead()


@pytest.mark.ahead(work=with_bug, of=("name",))
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(ahead, name):
    with pytest.raises((Finding, AssertionError)) as caught:
        ahead()
    assert "no longer contains" not in str(caught.value)
    if BUGS[name][3] == "tsan":
        assert "ThreadSanitizer" in str(caught.value)
    if BUGS[name][3] == "init":
        assert "initcheck" in str(caught.value)
