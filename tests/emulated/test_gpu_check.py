"""What of benchmarks/gpu_check.py can be rehearsed without a GPU: report, table, choice of steps, exit status."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "machine", lambda: {"date": "2000-01-02T03:04:05+00:00", "gpu": "Some GPU"})
    for name in ("build", "tests", "sanitizers", "accuracy", "graphs", "repeats", "times"):
        step = lambda name=name: {"saw": name}  # noqa: E731
        step.__name__ = name
        monkeypatch.setattr(module, name, step)
    return module


def test_report_and_table(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--results", str(tmp_path)])
    assert gpu_check.main() == 0
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert list(report["steps"]) == ["build", "tests", "sanitizers", "accuracy", "graphs", "repeats", "times"]
    assert report["steps"]["graphs"]["seen"] == {"saw": "graphs"}
    assert "times        passed" in capsys.readouterr().out


def test_a_failed_step_fails_the_check_and_stops_no_other(gpu_check, monkeypatch, tmp_path, capsys):
    def tests():
        raise RuntimeError("one test failed")

    monkeypatch.setattr(gpu_check, "tests", tests)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--quick", "--results", str(tmp_path)])
    assert gpu_check.main() == 1
    (path,) = tmp_path.iterdir()
    results = {name: step["result"] for name, step in json.loads(path.read_text())["steps"].items()}
    assert results == {"build": "passed", "tests": "FAILED", "sanitizers": "passed"}
    assert "one test failed" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "machine", lambda: {"date": "2000-01-02T03:04:05+00:00"})
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "needs a machine with a GPU" in capsys.readouterr().err
