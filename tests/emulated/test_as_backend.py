"""The package's Python over the emulated kernels, by the loops of triplet_loop.py: a slice of what
tests/campaign.py --rules --emulated does."""

from __future__ import annotations

import pytest
import test_loss
import test_properties
import torch
import triplet_loop
from as_backend import emulated
from emulation import Finding

import facenet_ext
from facenet_ext import _backend


def test_combinations_over_the_emulated_kernels(programs):
    combinations, terms = triplet_loop.combinations(), 0
    with emulated(programs()) as launcher:
        for seed in range(100):
            case = triplet_loop.random_case(seed, combinations[seed])
            launcher.next_case(seed)
            report = triplet_loop.check(case)
            assert not triplet_loop.failed(case, report), (case.name, report)
            terms += report.terms
    assert terms > 2000 and _backend._C is launcher.module


def test_what_the_runner_says_comes_back(programs):
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    with emulated(programs()) as launcher:
        launcher.shared_kib = -1
        with pytest.raises(Finding, match="exit status"):
            facenet_ext.triplet_loss(x, y)


@pytest.mark.parametrize("dtype", test_loss.DTYPES, ids=str)
def test_non_finite_is_seen_where_one_side_is_empty_over_the_emulated_kernels(programs, dtype):
    with emulated(programs()):
        test_loss.test_non_finite_is_seen_where_one_side_is_empty(torch.device("cpu"), dtype)


PROPERTIES = (
    "test_relabelling_changes_no_bit",
    "test_scaling_by_a_power_of_two",
)


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_hold_over_the_emulated_kernels(programs, monkeypatch, name):
    """The tests of test_properties.py that bits or exponents decide."""
    monkeypatch.setattr(test_properties, "works_in_passes", lambda device: True)
    with emulated(programs()) as launcher:
        launcher.capability, launcher.shared_kib = 90, 99
        getattr(test_properties, name)(device=torch.device("cpu"))
