"""The emulation proves itself: each planted bug, in a copy of the kernels, must be caught."""

from __future__ import annotations

import pytest
from emulation import Finding
from planted_bugs import BUGS


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan", "init"])
def test_without_a_bug_nothing_is_found(attempt, sanitizer):
    attempt(None, sanitizer)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(attempt, name):
    with pytest.raises((Finding, AssertionError)) as caught:
        attempt(name, BUGS[name][3])
    assert "no longer contains" not in str(caught.value)
    if BUGS[name][3] == "tsan":
        assert "ThreadSanitizer" in str(caught.value)
    if BUGS[name][3] == "init":
        assert "initcheck" in str(caught.value)
