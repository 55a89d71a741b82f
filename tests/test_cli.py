"""Every command on a small trained model: the figures it prints are recomputed here from the embeddings it writes."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from faces import faces
from PIL import Image

from facenet_ext import cli, data, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of people, and a run on part of them."""
    top = tmp_path_factory.mktemp("cli")
    root = faces(top / "faces", people=40, singletons=0)
    threads = torch.get_num_threads()
    cli.main(["train", "--data", str(root), "--out", str(top / "run"), "--steps", "60", "--size", "16", "--dim", "16",
              "--threads", "1", "--people-per-batch", "8", "--images-per-person", "4"])
    yield root, top / "run"
    torch.set_num_threads(threads)


@pytest.fixture
def some(trained, tmp_path):
    """Three of the people, in a folder of their own."""
    for name in ("p01", "p02", "p03"):
        shutil.copytree(trained[0] / name, tmp_path / "some" / name)
    return tmp_path / "some"


def embedded(folder, run, tmp_path):
    cli.main(["embed", str(folder), "--model", str(run), "--out", str(tmp_path / "e.npz")])
    return np.load(tmp_path / "e.npz")


def test_embed(trained, some, tmp_path, capsys):
    (some / "p01" / "broken.jpg").write_text("no image")
    with pytest.warns(UserWarning, match="broken.jpg: skipped"):
        found = embedded(some, trained[1], tmp_path)
    assert found["embeddings"].shape == (15, 16) and found["names"].tolist() == ["p01"] * 5 + ["p02"] * 5 + ["p03"] * 5
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, rtol=1e-5)
    assert found["paths"][0].endswith("p01/p01_0001.png") and "wrote 15 embeddings" in capsys.readouterr().out


def test_loose_images_beside_folders_are_read_or_named(trained, some, tmp_path):
    shutil.copy(some / "p01" / "p01_0001.png", some / "loose.png")
    with pytest.warns(UserWarning, match="1 files beside the people's folders skipped, for example loose.png"):
        assert len(embedded(some, trained[1], tmp_path)["names"]) == 15
    (some / "p01" / "empty").mkdir()  # no folder that holds a file, so nobody: the images count
    found = embedded(some / "p01", trained[1], tmp_path)
    assert found["names"].tolist() == [""] * 5


def test_compare_prints_the_distances_of_the_embeddings(trained, some, tmp_path, capsys):
    vectors = embedded(some, trained[1], tmp_path)["embeddings"]
    files = [str(some / name) for name in ("p01/p01_0001.png", "p01/p01_0002.png", "p02/p02_0001.png")]
    cli.main(["compare", *files, "--model", str(trained[1]), "--threshold", "0.7", "--plot", str(tmp_path / "c.png")])
    text = capsys.readouterr().out
    for (i, j), (a, b) in {(0, 1): (0, 1), (0, 2): (0, 5), (1, 2): (1, 5)}.items():
        distance, verdict = re.search(rf"^\[{i}\] \[{j}\] (\S+) (\w+)$", text, re.M).groups()
        expected = np.square(vectors[a] - vectors[b]).sum()
        assert float(distance) == pytest.approx(expected, abs=2e-3)
        assert verdict == ("same" if float(distance) <= 0.7 else "different")
    assert Image.open(tmp_path / "c.png").size[0] > 300


def test_cluster_counts_pairs(trained, some, tmp_path, capsys):
    out = tmp_path / "c.json"
    cli.main(["cluster", str(some), "--model", str(trained[1]), "--threshold", "0.7", "--json", str(out)])
    result = json.loads(out.read_text())
    truth = np.array([path.split("/")[-2] for path in result["groups"]])
    group = np.array([*result["groups"].values()])
    together, same = group[:, None] == group, truth[:, None] == truth
    off = ~np.eye(len(truth), dtype=bool)
    assert result["precision"] == pytest.approx((together & same & off).sum() / (together & off).sum())
    assert result["recall"] == pytest.approx((together & same & off).sum() / (same & off).sum())
    assert result["people"] == 3 and result["recall"] > 0.6 and "nmi" in capsys.readouterr().out
    everything = ["cluster", str(some), "--model", str(trained[1]), "--threshold"]
    cli.main([*everything, "5", "--json", str(out)])
    assert json.loads(out.read_text())["clusters"] == 1
    cli.main([*everything, "0", "--json", str(out)])
    assert json.loads(out.read_text())["clusters"] == 15
    with pytest.raises(SystemExit):
        cli.main([*everything, "-1"])
    assert "--threshold: -1 is not" in capsys.readouterr().err


def test_cluster_of_a_folder_without_people_lists_the_groups(trained, some, capsys):
    cli.main(["cluster", str(some / "p01"), "--model", str(trained[1])])
    text = capsys.readouterr().out
    assert "group 0: " in text and "nmi" not in text


def test_identify_names_the_nearest_or_nobody(trained, some, tmp_path, capsys):
    probe = shutil.move(some / "p02" / "p02_0005.png", tmp_path / "who.png")
    arguments = ["identify", str(some), str(probe), "--model", str(trained[1]), "--threshold"]
    cli.main([*arguments, "4"])
    path, name, _ = capsys.readouterr().out.strip().split("\t")
    assert path.endswith("who.png") and name == "p02"
    cli.main([*arguments, "0"])
    assert "\tunknown\t" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["identify", str(probe), str(some), "--model", str(trained[1])])
    assert "gallery needs people" in capsys.readouterr().err


def test_triplets_finds_the_image_under_the_wrong_name(trained, some, tmp_path, capsys):
    shutil.copy(some / "p03" / "p03_0001.png", some / "p01" / "wrong.png")
    cli.main(["triplets", str(some), "--model", str(trained[1]), "--count", "4", "--out", str(tmp_path / "t.png")])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines() if line.count("\t") == 3]
    assert len(rows) == 4 and "wrong.png" in rows[0][1] + rows[0][2]
    distances = [float(row[0].split()[0]) for row in rows]
    assert distances == sorted(distances, reverse=True) and Image.open(tmp_path / "t.png").size[1] > 400


@pytest.mark.filterwarnings("ignore:VAL at FAR")
def test_evaluate_on_a_list_and_on_random_pairs(trained, some, tmp_path, capsys):
    lines = [f"p{p:02d}\t1\t2" for p in range(30)] + [f"p{p:02d}\t1\tp{p + 1:02d}\t1" for p in range(30)]
    (tmp_path / "pairs.txt").write_text("30\n" + "\n".join(lines) + "\n")
    out = tmp_path / "e.json"
    cli.main(["evaluate", "--model", str(trained[1]), "--pairs", str(tmp_path / "pairs.txt"), "--far", "0.1",
              "--json", str(out), "--plot", str(tmp_path / "e.png")])
    result = json.loads(out.read_text())
    assert result["pairs"] == 60 and result["accuracy"] > 0.7 and len(result["thresholds"]) == 10
    assert f"accuracy          {100 * result['accuracy']:6.2f} %" in capsys.readouterr().out
    assert Image.open(tmp_path / "e.png").size[0] > 800
    lists = "2\t15\n" + "\n".join(lines[:15] + lines[30:45] + lines[15:30] + lines[45:]) + "\n"
    (tmp_path / "view2.txt").write_text(lists)
    cli.main(["evaluate", "--model", *[str(trained[1])] * 2, "--pairs", str(tmp_path / "view2.txt"), "--far", "0.1",
              "--json", str(out), "--plot", str(tmp_path / "e2.png")])
    assert len(json.loads(out.read_text())["thresholds"]) == 2 and (tmp_path / "e2.png").exists()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--model", *[str(trained[1])] * 3, "--pairs", str(tmp_path / "view2.txt")])
    assert "3 models for 2 folds" in capsys.readouterr().err
    gap = lines[:6] + lines[30:36] + ["nobody\t1\t2"] * 12 + lines[12:18] + lines[42:48]
    (tmp_path / "gap.txt").write_text("3\t6\n" + "\n".join(gap) + "\n")
    for number, model in enumerate([["run"] * 3, ["run"]]):  # the fold without images has no say, its model neither
        with pytest.warns(UserWarning, match="12 of 36 pairs left out"):
            cli.main(["evaluate", "--model", *[str(trained[1])] * len(model), "--pairs", str(tmp_path / "gap.txt"),
                      "--far", "0.1", "--json", str(tmp_path / f"{number}.json"), "--plot", str(tmp_path / "e3.png")])
    several, one = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert len(several["thresholds"]) == 2 and several["accuracy"] == one["accuracy"]
    with pytest.warns(UserWarning), pytest.raises(SystemExit):
        cli.main(["evaluate", "--model", *[str(trained[1])] * 2, "--pairs", str(tmp_path / "gap.txt")])
    assert "2 models for 3 folds" in capsys.readouterr().err
    cli.main(["evaluate", "--model", str(trained[1] / "best.pt"), "--data", str(some), "--far", "0.5", "--flip"])
    assert "equal error rate" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:VAL at FAR")
def test_evaluate_takes_the_pairs_of_the_training_and_not_people_it_trained_on(trained, tmp_path, capsys):
    cli.main(["evaluate", "--model", str(trained[1]), "--far", "0.1"])
    shown = capsys.readouterr().out
    records = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "verification"][-1]
    assert f"accuracy          {100 * last['accuracy']:6.2f} %" in shown
    assert "pairs, random pairs of people held out of training, 10 folds" in shown
    (tmp_path / "pairs.txt").write_text("2\np01\t1\t2\np02\t1\t3\np01\t1\tp02\t1\np02\t2\tp03\t1\n")
    cli.main(["evaluate", "--model", str(trained[1]), "--pairs", str(tmp_path / "pairs.txt"), "--far", "0.1"])
    assert f"4 pairs, {tmp_path / 'pairs.txt'}, 2 folds" in capsys.readouterr().out
    cli.main(["evaluate", "--model", str(trained[1]), "--data", str(trained[0]), "--far", "0.1"])
    assert "random pairs of everybody" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [
    (["embed", "nowhere"], "nowhere: no such file or folder"), (["compare", "nowhere.jpg"], "no such file or folder"),
])
def test_errors_are_one_line(trained, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--model", str(trained[1])])
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and "Traceback" not in error
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--model", str(tmp_path)])
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    "embed . --crop 3", "embed . --crop 0", "embed . --crop nan", "evaluate --far 2", "evaluate --seed -1",
    "evaluate --plot x.pdf", "compare . --plot x", "triplets . --out x.jpg",
    "triplets . --count 0", "triplets . --count 9999", "cluster . --threshold -1", "train --steps 0",
    "train --chunk -1", "train --save-every 0", "train --verify-every 0",
    "train --people-per-batch 0",
    "train --singletons -1", "train --dim 0", "train --threads 0", "train --minutes 0", "train --lr -1",
    "train --margin -1", "train --margin inf", "train --weight-decay -1", "train --hold-out 1.5", "train --offline 0",
    "train --seed -1", "train --size 0", "train --size 1x2x3", "train --without-set 0", "train --steps x"])
def test_values_out_of_range_are_named(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments.split() + ([] if arguments.startswith("train") else ["--model", "run"]))
    name = next(word for word in arguments.split() if word.startswith("--"))
    assert left.value.code == 2 and f"argument {name}: " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "meta"])
def test_a_device_that_is_not_there_is_named(trained, capsys, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments in (["embed", str(trained[0]), "--model", str(trained[1])], ["train"], ["train", "--data", "."]):
        with pytest.raises(SystemExit) as left:
            cli.main([*arguments, "--device", device])
        assert left.value.code == 2 and f"facenet-ext: device: {device!r} is" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_named(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(SystemExit) as left:
            cli.main(["embed", str(tmp_path), "--model", str(tmp_path / name)])
        assert left.value.code == 2 and f"{name}: no checkpoint of facenet-ext train" in capsys.readouterr().err


def test_every_command_has_help(capsys):
    for name in ("train", "evaluate", "embed", "compare", "cluster", "identify", "triplets"):
        with pytest.raises(SystemExit) as left:
            cli.main([name, "--help"])
        assert left.value.code == 0 and len(capsys.readouterr().out) > 200


def test_the_view_2_option_leaves_out_one_set(tmp_path):
    root = faces(tmp_path / "faces", people=6, singletons=0)
    (tmp_path / "people.txt").write_text("3\n" + "".join(f"2\np{k:02d}\t5\np{k + 1:02d}\t5\n" for k in (0, 2, 4)))
    people = "--people", str(tmp_path / "people.txt"), "--size", "16", "--hold-out", "0"

    def load(*argv):
        return train.load_data(train.complete(train.parse(["--data", str(root), *argv])))

    images, indices, pairs = load(*people, "--without-set", "2")
    assert {images.names[images.labels[i]] for i in indices} == {"p00", "p01", "p04", "p05"} and pairs is None
    with pytest.raises(data.DataError, match="--without-set: got 4; accepted are 1 to 3, the sets of .*people.txt"):
        load(*people, "--without-set", "4")
    with pytest.raises(data.DataError, match="--without-set: got 2 without --people"):
        load("--without-set", "2")


@pytest.mark.parametrize("option", ["--people", "--pairs"])
def test_lists_without_a_folder_are_refused(capsys, option):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", option, "list.txt"])
    assert left.value.code == 2 and f"{option}: got " in (said := capsys.readouterr().err) and "without --data" in said


def test_evaluate_does_not_claim_a_list_that_it_cannot_use(trained, tmp_path, capsys):
    saved = torch.load(trained[1] / "last.pt", weights_only=True)
    saved["options"]["data"] = None  # as of a run on the digits
    torch.save(saved, tmp_path / "digits.pt")
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", "--model", str(tmp_path / "digits.pt"), "--pairs", "list.txt"])
    assert left.value.code == 2 and "--pairs: got list.txt without --data" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "missing"), [("train", "tqdm"), ("cli", "tqdm"), ("cli", "scipy.spatial.distance")])
def test_the_extra_is_named_where_it_is_missing(module, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import facenet_ext.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs the packages of the extra: pip install '.[train]'" in done.stderr, done.stderr
