"""benchmarks/experiments.py on made-up people: what it writes, and that it keeps what is finished."""

import json
import subprocess
import sys
from pathlib import Path

from faces import faces

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "experiments.py"


def study(top, *options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--lfw", str(top), "--out", str(top / "out"), "--only", "margin", "jpeg",
         "--budget", "0.1", "--device", "cpu", "--base",
         "--size 16 --people-per-batch 4 --images-per-person 4 --dim 8 --threads 1", *options],
        capture_output=True, text=True, timeout=120)


def test_rows_tables_plots_and_resume(tmp_path):
    faces(tmp_path / "images", people=40, singletons=0)
    (tmp_path / "peopleDevTrain.txt").write_text("20\n" + "".join(f"p{p:02d}\t5\n" for p in range(20)))
    pairs = [f"p{p:02d}\t1\t2" for p in range(20, 40)] + [f"p{p:02d}\t1\tp{p + 1:02d}\t1" for p in range(19, 39)]
    (tmp_path / "pairsDevTest.txt").write_text("20\n" + "\n".join(pairs) + "\n")
    done = study(tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "experiments.json"
    first = json.loads(path.read_text())
    rows = first["results"]
    assert [*rows["margin"]] == ["0.05", "0.1", "0.2", "0.5"]
    assert [*rows["jpeg"]] == ["10", "20", "30", "50", "70", "90"]
    assert rows["margin"]["0.2"] == rows["base"]["base"] and rows["base"]["base"]["steps"] > 0
    assert rows["jpeg"]["30"]["paper"] == 83.9 and str(tmp_path) not in path.read_text()
    text = (tmp_path / "out" / "experiments.md").read_text()
    assert "### Table 4: JPEG quality" in text and "| 83.9 |" in text and "260 million" in text
    assert (tmp_path / "out" / "jpeg.png").stat().st_size > 5000

    del first["results"]["margin"]["0.5"]
    first["results"]["margin"]["0.1"]["accuracy"] = 0.123  # kept, so not measured again
    path.write_text(json.dumps(first))
    assert study(tmp_path).returncode == 0
    again = json.loads(path.read_text())["results"]["margin"]
    assert again["0.1"]["accuracy"] == 0.123 and again["0.5"]["steps"] > 0
    other = study(tmp_path, "--seed", "1")
    assert other.returncode == 1 and "other settings" in other.stderr
