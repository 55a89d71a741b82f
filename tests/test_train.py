"""The driver end to end, small: it learns, resumes bit for bit, says what is wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from faces import faces
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data import BAD, picture

from facenet_ext import cli, train

SMALL = ["--size", "8", "--people-per-batch", "4", "--images-per-person", "4", "--dim", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    """--threads is the process's: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_state(one, two):
    assert one["step"] == two["step"] and one["before"] == two["before"] and one["best"] == two["best"]
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    for key, slot in one["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(two["optimizer"]["state"][key][k]))
                   for k, v in slot.items())


def test_training_separates_people_it_never_saw(tmp_path):
    root, out = faces(tmp_path / "faces", people=60), tmp_path / "out"
    left = cli.main(["train", "--data", str(root), "--out", str(out), "--steps", "100", "--hold-out", "0.3",
                     "--singletons", "2", "--verify-every", "20", *SMALL, "--size", "16"])
    assert left is None  # the console script exits with it: anything else is a failure to the shell
    log = records(out)
    accuracy = [r["accuracy"] for r in log if r["kind"] == "verification"]
    assert accuracy[0] < 0.7 and accuracy[-1] > 0.85
    steps = [r for r in log if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(100))
    assert np.mean([r["loss"] for r in steps[-10:]]) < 0.5 * np.mean([r["loss"] for r in steps[:10]])
    assert {"active", "fallback", "images/s", "d2_ap", "d2_an", "lr", "images"} <= set(steps[0])
    assert [r["step"] for r in log if r["kind"] == "verification"] == list(range(0, 101, 20))
    board = EventAccumulator(str(out)).Reload()
    assert {"step/loss", "step/active", "step/fallback", "step/d2_ap", "step/d2_an", "step/images/s",
            "verification/accuracy"} <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Scalars("step/loss")] == list(range(100))
    assert (out / "best.pt").exists() and not list(out.glob("*.part"))


@pytest.mark.parametrize("extra", [[], ["--preset", "paper"], ["--offline", "4"], ["--chunk", "5"],
                                   ["--negatives", "random_active"]])
def test_resume_after_kill_is_bit_identical(tmp_path, extra):
    options = [*SMALL, "--steps", "14", "--save-every", "3", "--verify-every", "6", *extra]
    cli.main(["train", "--out", str(tmp_path / "whole"), *options])
    script = ("import os, signal, sys; from facenet_ext import train\n"
              "go = train.Run.step\n"
              "def die(self, step, *rest):\n"
              "    shown = go(self, step, *rest)\n"
              "    step == 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
              "    return shown\n"
              "train.Run.step = die; from facenet_ext import cli; cli.main(['train', *sys.argv[1:]])")
    killed = subprocess.run([sys.executable, "-c", script, "--out", str(tmp_path / "cut"), *options])
    assert killed.returncode == -signal.SIGKILL
    assert weights(tmp_path / "cut")["step"] == 6
    cli.main(["train", "--resume", str(tmp_path / "cut")])
    assert_same_state(weights(tmp_path / "cut"), weights(tmp_path / "whole"))

    def without_clock(out):
        return [{k: v for k, v in r.items() if k != "images/s"} for r in records(out)]
    assert str(without_clock(tmp_path / "cut")) == str(without_clock(tmp_path / "whole"))
    board = EventAccumulator(str(tmp_path / "cut")).Reload()
    assert {event.step for event in board.Scalars("step/loss")} == set(range(14))  # none was lost with the process
    assert [event.step for event in board.Scalars("verification/accuracy")] == [0, 6, 12, 14]


def test_every_verification_is_recorded_once_and_the_best_is_kept(tmp_path, monkeypatch):
    """Killed before its first checkpoint, resumed, resumed when finished, resumed to train on and killed again."""
    accuracies = iter([0.5, 0.9, 0.8, 0.95, 0.6])

    def verify(*_):
        return train.evaluate.Verification(next(accuracies), 0, [], 0, 0, 0, 0, 0), None

    def run(*options, until=None):
        def step(self, number, *rest):
            if number == until:
                raise OSError("killed")
            return go(self, number, *rest)
        monkeypatch.setattr(train.Run, "step", step)
        with contextlib.suppress(SystemExit):
            cli.main(["train", *options])
        best = torch.load(tmp_path / "best.pt", weights_only=True)
        assert best["best"] == weights(tmp_path)["best"]  # a resumed run knows what it has to beat
        return [(r["step"], r["accuracy"]) for r in records(tmp_path) if r["kind"] == "verification"], best["step"]

    go = train.Run.step
    monkeypatch.setattr(train.evaluate, "verify", verify)
    run("--out", str(tmp_path), "--steps", "2", *SMALL, until=1)
    assert weights(tmp_path)["step"] == 0
    resume = "--resume", str(tmp_path)
    assert run(*resume) == ([(0, 0.5), (2, 0.9)], 2)
    assert run(*resume) == ([(0, 0.5), (2, 0.8)], 2)  # verified again, it may be on other pairs
    assert run(*resume, "--steps", "4", "--verify-every", "3", until=3) == ([(0, 0.5), (2, 0.8), (3, 0.95)], 3)
    assert run(*resume) == ([(0, 0.5), (2, 0.8), (3, 0.95), (4, 0.6)], 3)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Scalars("step/loss")] == [0, 1, 2, 3]
    assert [event.step for event in board.Scalars("verification/accuracy")] == [0, 2, 3, 4]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of 7 steps at --margin 0.5 that made none; every test has to leave it so."""
    out = tmp_path_factory.mktemp("begun")
    train.Run(train.complete(train.parse(["--out", str(out), "--steps", "7", "--margin", "0.5", "--save-every", "9",
                                          "--weight-decay", "0.5", *SMALL]))).save()
    return out


@pytest.fixture
def resumed(begun, monkeypatch):
    """The options that ``--resume`` goes on with."""
    def run(*argv):
        seen = []
        monkeypatch.setattr(train.Run, "train", lambda run: seen.append(run))
        train.start(train.parse(["--resume", str(begun), *argv]))
        return seen[0]
    return run


def test_options_given_anew_count_on_a_resumed_run(resumed, begun):
    kept = resumed("--device", "cpu").options
    assert (kept.steps, kept.margin, kept.save_every, kept.out) == (7, 0.5, 9, str(begun))
    run = resumed("--margin", "0.2", "--save-every", "100", "--lr", "0.5", "--weight-decay", "0")  # two are defaults
    assert (run.options.margin, run.options.save_every, run.options.lr) == (0.2, 100, 0.5)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0, 0]


def test_a_new_length_of_a_resumed_run_replaces_the_old_one(resumed, begun, capsys):
    timed = resumed("--minutes", "2")
    assert timed.options.minutes == 2
    old = (begun / "last.pt").read_bytes()
    try:
        timed.save()
        assert resumed().options.minutes == 2
        counted = resumed("--steps", "9").options
    finally:
        (begun / "last.pt").write_bytes(old)
    assert (counted.steps, counted.minutes) == (9, None)
    with pytest.raises(SystemExit):
        train.parse(["--steps", "9", "--minutes", "2"])
    assert "argument --minutes: not allowed with argument --steps" in capsys.readouterr().err


@pytest.mark.parametrize("given, said", [
    ("--network nn4", "--network: got 'nn4', but the run in {} has 'mini'"),
    ("--size 16", "--size: got (16, 16), but"), ("--dim 16", "--dim: got 16, but"), ("--seed 1", "--seed: got 1, but"),
    ("--no-batch-norm", "--no-batch-norm: got True, but the run in {} has False"),
    ("--preset paper", "--preset: got 'paper', but the run in {} has 'modern'"),
    ("--hold-out 0.5", "--hold-out: got 0.5, but"),
    ("--without-set 2", "--without-set: got 2, but the run in {} has None"),
    ("--out elsewhere", "--out: got 'elsewhere', but the run in {} has "),
])
def test_what_a_resumed_run_cannot_change_is_refused(begun, capsys, given, said):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--resume", str(begun), *given.split()])
    assert left.value.code == 2 and said.format(begun) in capsys.readouterr().err


def test_a_resumed_run_may_be_told_what_it_has(resumed, begun):
    same = ["--network", "mini", "--seed", "0", "--preset", "modern", "--hold-out", "0.1", "--crop", "1", "--out",
            f"{begun}/."]
    assert resumed(*SMALL, *same).options.out == str(begun)


def test_a_new_run_does_not_overwrite_another(begun, capsys):
    old = (begun / "last.pt").read_bytes()
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--out", str(begun), "--steps", "1", *SMALL])
    assert left.value.code == 2 and (begun / "last.pt").read_bytes() == old
    assert capsys.readouterr().err == f"facenet-ext: --out: {begun} holds a run; --resume {begun} goes on with it\n"


@pytest.mark.parametrize("given, said", [("--hold-out 0.3", "--hold-out: got 0.3"), ("--crop 0.7", "--crop: got 0.7")])
def test_what_the_digits_have_no_use_for_is_refused(begun, tmp_path, capsys, given, said):
    for where in ("--out", str(tmp_path / "out")), ("--resume", str(begun)):
        with pytest.raises(SystemExit) as left:
            cli.main(["train", *where, *given.split(), "--steps", "1", *SMALL])
        assert left.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_named(tmp_path):
    """As an OSError, which the command line prints as one line."""
    run = train.Run(train.complete(train.parse(["--out", str(tmp_path), *SMALL])))
    run.save()
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'last.pt'}'"):
        run.save()
    assert weights(tmp_path)["step"] == 0


def test_a_malformed_record_does_not_stop_a_resumed_run(tmp_path):
    good = '{"step": 0, "kind": "step", "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(good + '\0\0\n{"step": 1, "kind"\n[3]\n' + good.replace("0,", "1,")
                                            + '{"step": 1, "ki')
    with pytest.warns(UserWarning) as warned:
        train.Log(tmp_path, 2, True)
    said = [str(w.message) for w in warned if "dropped" in str(w.message)]
    assert said == [f"{tmp_path}/metrics.jsonl, line {n}: dropped, it is no record of a run" for n in (2, 3, 4)]
    assert [r["step"] for r in records(tmp_path)] == [0, 1]


def test_tensorboard_reads_a_run_that_was_resumed_at_once_in_order(tmp_path):
    for _ in range(2):
        train.Log(tmp_path, 0, False)
    assert len({path.name.split(".")[3] for path in tmp_path.glob("events.*")}) == 2  # seconds, which it sorts by


def test_interrupt_saves_and_leaves_cleanly(tmp_path, monkeypatch, capsys):
    go = train.Run.step

    def interrupt(self, step, *rest):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return go(self, step, *rest)
    monkeypatch.setattr(train.Run, "step", interrupt)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--out", str(tmp_path), "--steps", "20", *SMALL])
    assert left.value.code == 130 and weights(tmp_path)["step"] == 8
    assert f"--resume {tmp_path}" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_bfloat16_learns_too(tmp_path):
    """At 16 pixels: at 8 the last convolution, of stride 2, sees a map of 1 x 1, whose weight gradient oneDNN takes in
    part from memory that nobody wrote."""
    cli.main(["train", "--out", str(tmp_path), "--steps", "30", "--bf16", *SMALL, "--size", "16"])
    loss = [r["loss"] for r in records(tmp_path) if r["kind"] == "step"]
    assert np.mean(loss[-5:]) < 0.9 * np.mean(loss[:5])
    assert all(v.dtype != torch.bfloat16 for v in weights(tmp_path)["model"].values())


def test_minutes_end_the_run(tmp_path):
    cli.main(["train", "--out", str(tmp_path), "--minutes", "0.02", *SMALL])
    assert 0 < weights(tmp_path)["step"] and weights(tmp_path)["seconds"] > 1.1  # noted before the last look


def test_collapse_is_said(tmp_path):
    run = train.Run(train.complete(train.parse(["--out", str(tmp_path), "--lr", "0", *SMALL])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step(30, *run.read(0))
        with torch.no_grad():
            run.model.head.weight.zero_()
            run.model.head.bias.fill_(1)
        run.step(0, *run.read(0))  # a fresh network may be as flat without batch norm, and recovers
    with pytest.warns(UserWarning, match="collapsed to a point"):
        run.step(30, *run.read(0))


@pytest.mark.parametrize("extra", [["--negatives", "hard", "--positives", "hardest"], ["--negatives", "all_semi_hard"],
                                   ["--offline", "3", "--negatives", "hard"]])
def test_other_rules_of_mining_train(tmp_path, extra):
    cli.main(["train", "--out", str(tmp_path), "--steps", "5", *SMALL, *extra])
    assert all(0 < r["loss"] < 4 and 0 < r["active"] <= 1 for r in records(tmp_path) if r["kind"] == "step")


def test_learning_rate_of_the_presets():
    assert [train.rate(p, "paper") for p in (0, 0.5, 0.9)] == [1, 1, 0.1]
    modern = [train.rate(p / 100, "modern") for p in range(101)]
    assert 0 < modern[0] < 0.1 and 0.9 < max(modern) <= 1 and modern[100] == 0
    assert modern[8:] == sorted(modern[8:], reverse=True)


@pytest.mark.parametrize("make, options, said", [
    (lambda root: None, [], "no such folder"),
    (lambda root: root.mkdir(), [], "no images"),
    (lambda root: faces(root, people=0), [], "0 with two or more"),
    (lambda root: faces(root, people=4), ["--people-per-batch", "1"], "at least 2 x 2"),
    (lambda root: faces(root, people=4), ["--resume", "nowhere"], "last.pt: no checkpoint of facenet-ext train"),
    (lambda root: faces(root, people=4), ["--people", "nowhere.txt"], "No such file or directory: '"),
])
def test_data_that_cannot_serve_is_a_clear_error(tmp_path, capsys, make, options, said):
    make(tmp_path / "faces")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--data", str(tmp_path / "faces"), "--out", str(tmp_path / "out"), *SMALL, *options])
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.data, "augment", lambda pixels, *_, **__: torch.full((len(pixels), 3, 8, 8), torch.nan))
    nothing = train.evaluate.Verification(0, 0, [], 0, 0, 0, 0, 0)
    monkeypatch.setattr(train.evaluate, "verify", lambda *_: (nothing, None))  # the embeddings are NaN, too
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--out", str(tmp_path), "--steps", "3", *SMALL])
    assert left.value.code == 2 and weights(tmp_path)["step"] == 0
    assert capsys.readouterr().err.endswith(f"facenet-ext: step 0: the loss is nan; the last checkpoint is {tmp_path}"
                                            f"/last.pt: --resume {tmp_path} with a lower --lr, or start anew\n")


def test_chunks_give_the_gradient_of_the_whole_batch(tmp_path):
    """To float32's rounding; test_cached.py has it to float64's."""
    def gradients(*extra):
        run = train.Run(train.complete(train.parse(["--out", str(tmp_path), "--no-batch-norm", *SMALL, *extra])))
        return run.step(0, *run.read(0)), [p.grad for p in run.model.parameters()]

    whole, chunked = gradients(), gradients("--chunk", "5")
    assert whole[0]["loss"] == pytest.approx(chunked[0]["loss"], rel=1e-5)
    for one, two in zip(whole[1], chunked[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * one.abs().max().item())


def test_offline_triplets_are_what_they_claim(tmp_path):
    run = train.Run(train.complete(train.parse(["--out", str(tmp_path), "--offline", "2", *SMALL])))
    run.mine(0)
    labels = torch.from_numpy(run.images.labels)
    anchor, positive, negative = run.state["mined"].T
    assert len(anchor.unique()) == len(anchor) > 100 and (anchor != positive).all()
    assert (labels[anchor] == labels[positive]).all() and (labels[anchor] != labels[negative]).all()
    vectors = torch.from_numpy(train.evaluate.embed(run.model, run.images, np.arange(len(labels))))
    d2_ap, d2_an = ((vectors[anchor] - vectors[other]).square().sum(1) for other in (positive, negative))
    assert (d2_ap - d2_an + 0.2 > -1e-5).all()
    pixels, batch_labels = run.read(1)
    third = len(batch_labels) // 3
    assert torch.equal(batch_labels[:third], batch_labels[third:2 * third])
    assert (batch_labels[:third] != batch_labels[2 * third:]).all()


def test_a_run_says_that_nobody_is_held_out(tmp_path, capsys):
    root = faces(tmp_path / "faces", people=4)
    cli.main(["train", "--data", str(root), "--out", str(tmp_path / "out"), "--steps", "1", "--hold-out", "0", *SMALL])
    assert "; nobody is held out, so nothing is verified; files in" in capsys.readouterr().out
    assert [r["kind"] for r in records(tmp_path / "out")] == ["step"]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--model", str(tmp_path / "out")])
    assert "nobody was held out of the training" in capsys.readouterr().err


def test_two_ranks_train_one_model(tmp_path):
    """torchrun with gloo: it ends, one rank writes, and gradients are exchanged (the ranks draw different batches)."""
    options = ["--out", str(tmp_path / "out"), "--steps", "4", "--chunk", "7", *SMALL]
    script = ("import sys; from facenet_ext import cli, train\n"
              "end = train.Run.train\n"
              "def report(self):\n"
              "    end(self)\n"
              "    total = sum(p.double().sum().item() for p in self.model.parameters())\n"
              "    open(f'{self.options.out}.{self.rank}', 'w').write(repr(total))\n"
              "train.Run.train = report; cli.main(['train', *sys.argv[1:]])")
    (tmp_path / "ranks.py").write_text(script)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(tmp_path / "ranks.py"), *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sums = [(tmp_path / f"out.{rank}").read_text() for rank in range(2)]  # not printed: two ranks share one line
    assert sums[0] == sums[1]
    assert weights(tmp_path / "out")["step"] == 4 and done.stdout.count("before: accuracy") == 1
    cli.main(["train", "--out", str(tmp_path / "alone"), "--steps", "4", "--chunk", "7", *SMALL])
    assert any(not torch.equal(v, weights(tmp_path / "alone")["model"][k])
               for k, v in weights(tmp_path / "out")["model"].items())


def test_sizes_of_the_command_line():
    def size(*argv):
        return train.complete(train.parse([*argv, "--device", "cpu"])).size

    assert size() == (16, 16) and size("--data", "x") == (48, 48) and size("--data", "x", "--size", "70x50") == (70, 50)
    assert size("--data", "x", "--network", "nns2") == (140, 116)
    assert size("--data", "x", "--network", "nn4", "--size", "64") == (64, 64)
    paper = train.complete(train.parse(["--data", "x", "--device", "cuda:0", "--preset", "paper"]))
    assert (paper.network, paper.people_per_batch, paper.images_per_person, paper.lr) == ("nn4", 45, 40, 0.05)
    assert paper.optimizer == "adagrad" and paper.singletons > 0


def test_a_folder_with_every_kind_of_bad_file_trains(tmp_path, capsys):
    """Each one is named once with its reason and none is used; what is merely unusual is used and not named."""
    root = faces(tmp_path / "faces", people=6)
    for kind, make in BAD.items():
        make(root / "p00" / f"{kind}.jpg")
    for mode, name in (("L", "grey.jpg"), ("RGBA", "alpha.png"), ("CMYK", "cmyk.jpg"), ("P", "palette.gif")):
        picture(root / "p00" / name, mode)
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(root / "p00" / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(root / "p00" / "turned.jpg", exif=turned)
    (root / "loop").symlink_to(root)
    (root / "p01" / "up").symlink_to(root)
    with pytest.warns(UserWarning) as warned:
        cli.main(["train", "--data", str(root), "--out", str(tmp_path / "out"), "--steps", "2", "--hold-out", "0.1",
                  "--images-per-person", "20", *SMALL])
    said = [str(w.message) for w in warned if "skipped" in str(w.message)]
    for name in (*(f"{kind}.jpg" for kind in BAD), "loop", "up"):
        assert sum(f"{name}: skipped (" in text for text in said) == 1
    assert len(said) == len(BAD) + 2
    assert weights(tmp_path / "out")["step"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = train.data.Images(*train.data.scan(root), (8, 8))
        assert len(images.preload(np.flatnonzero(images.labels == 0))) == 5 + 6


def test_only_what_is_used_is_read_and_people_who_are_missing_are_said(tmp_path):
    root = faces(tmp_path / "faces", people=8, singletons=0)
    (tmp_path / "people.txt").write_text("3\np00\t5\np01\t5\nzoe\t2\n")
    (tmp_path / "pairs.txt").write_text("2\np02\t1\t2\np03\t1\t2\np02\t1\tp04\t1\np03\t1\tp04\t1\n")
    options = train.complete(train.parse(["--data", str(root), "--people", str(tmp_path / "people.txt"), "--pairs",
                                          str(tmp_path / "pairs.txt"), *SMALL]))
    with pytest.warns(UserWarning, match="1 of 3 people have no images in .* for example zoe"):
        images, indices, pairs = train.load_data(options)
    assert {images.names[images.labels[i]] for i in indices} == {"p00", "p01"} and len(pairs.a) == 4
    assert set(images._cache) == set(indices) | set(pairs.a) | set(pairs.b) and len(images._cache) == 15


@pytest.fixture
def load(tmp_path):
    """Names of the people to train on and of those in the pairs, and the options, of a run on a folder in tmp_path."""
    root = faces(tmp_path / "faces", people=8, singletons=0)
    (tmp_path / "people.txt").write_text("3\np00\t5\np02\t5\np05\t5\n")
    (tmp_path / "pairs.txt").write_text("2\np02\t1\t2\np03\t1\t2\np02\t1\tp03\t1\np03\t2\tp02\t2\n")

    def run(*argv, **kept):
        options = train.complete(train.parse(["--data", str(root), *SMALL, *(str(a) for a in argv)]))
        vars(options).update(kept)
        images, indices, pairs = train.load_data(options)
        used = np.concatenate([pairs.a, pairs.b])
        return *({images.names[images.labels[i]] for i in some} for some in (indices, used)), options
    return run


def test_people_of_the_pairs_are_left_out_of_training(load, tmp_path):
    pairs = "--pairs", tmp_path / "pairs.txt"
    with pytest.warns(UserWarning, match="^2 people of --pairs are left out of training$"):
        trained, judged, options = load(*pairs)
    assert trained == {"p00", "p01", "p04", "p05", "p06", "p07"} and judged == {"p02", "p03"}
    with pytest.warns(UserWarning, match="^1 people of --pairs are left out of training$"):
        assert load(*pairs, "--people", tmp_path / "people.txt")[0] == {"p00", "p05"}
    (tmp_path / "people.txt").write_text("1\np02\t5\n")
    with pytest.raises(train.data.DataError, match="--pairs: everybody to train on is in "):
        load(*pairs, "--people", tmp_path / "people.txt")
    (tmp_path / "people.txt").write_text("2\np00\t5\np05\t5\n")
    assert load(*pairs, "--people", tmp_path / "people.txt")[0] == {"p00", "p05"}  # and nothing to say
    notes = {key: getattr(options, key) for key in ("held_out", "trained_on")}
    (tmp_path / "pairs.txt").write_text("1\np02\t1\t2\np02\t1\tp05\t1\n")  # given anew to the first run
    with pytest.raises(train.data.DataError, match="the run was trained on 1 of the 2 people of .* example p05"):
        load(*pairs, **notes)
    (tmp_path / "faces" / "new").mkdir()
    for i in (1, 2):
        shutil.copy(tmp_path / "faces" / "p00" / f"p00_000{i}.png", tmp_path / "faces" / "new" / f"new_000{i}.png")
    lines = "new\t1\t2", "p02\t1\t2", "new\t1\tp02\t1", "new\t2\tp02\t2"
    (tmp_path / "pairs.txt").write_text("\n".join(["2", *lines, ""]))  # it was trained on neither
    trained, judged, options = load(*pairs, **notes)
    assert judged == {"new", "p02"} and not trained & {"new", "p02", "p03"}
    assert options.held_out == ["new", "p02", "p03"] and options.trained_on == notes["trained_on"]


def test_people_of_the_pairs_are_left_out_where_an_image_of_theirs_is_missing(load, tmp_path):
    (tmp_path / "pairs.txt").write_text("2\np02\t1\t2\np03\t1\t2\np02\t1\tp03\t1\np02\t3\tp03\t1\np04\t99\tp02\t2\n")
    with pytest.warns(UserWarning, match="3 people of --pairs"), pytest.warns(UserWarning, match="1 of 5 pairs left"):
        trained, judged, options = load("--pairs", tmp_path / "pairs.txt")
    assert judged == {"p02", "p03"} and "p04" not in trained and options.held_out == ["p02", "p03", "p04"]


def test_a_run_that_goes_on_in_a_folder_without_whom_it_holds_out_says_so(load, tmp_path):
    *_, options = load("--hold-out", "0.3")
    for name in options.held_out:
        shutil.rmtree(tmp_path / "faces" / name)
    with pytest.raises(train.data.DataError, match="--data: .*faces has no images of the 2 people whom"):
        load(held_out=options.held_out, trained_on=options.trained_on)


def test_a_checkpoint_that_does_not_say_whom_it_was_trained_on_takes_no_pairs(load, tmp_path):
    *_, options = load("--out", tmp_path / "out")
    del options.trained_on
    train.Run(options, loaded=train.load_data(options))
    saved = {"options": {key: value for key, value in vars(options).items() if key != "trained_on"}}
    with pytest.raises(train.data.DataError, match="--pairs: the run in .*out does not say whom it was trained on"):
        train.resumed(saved, train.parse(["--resume", str(tmp_path / "out"), "--pairs", "list.txt"]))
    assert train.resumed(saved, train.parse(["--resume", str(tmp_path / "out")])).held_out == options.held_out


def test_pairs_for_a_run_on_the_digits_need_a_folder(begun, load, tmp_path, capsys):
    pairs = "--pairs", str(tmp_path / "pairs.txt")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--resume", str(begun), *pairs])
    assert left.value.code == 2 and "without --data, which it needs" in capsys.readouterr().err
    given = train.parse(["--resume", str(begun), "--data", str(tmp_path / "faces"), *pairs])
    options = train.complete(train.resumed(train.read_checkpoint(begun), given))
    with pytest.warns(UserWarning, match="2 people of --pairs"):  # it was trained on nobody of that folder
        train.load_data(options)
    assert options.held_out == ["p02", "p03"] and len(options.trained_on) == 6


def test_hold_out_beside_pairs_is_refused(load, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--data", str(tmp_path / "faces"), "--hold-out", "0.5", "--pairs", "pairs.txt"])
    assert left.value.code == 2 and "--hold-out: got 0.5 beside --pairs" in capsys.readouterr().err


def test_the_best_of_other_pairs_is_forgotten(load, tmp_path, monkeypatch):
    names = sorted(load()[2].held_out)
    lists = []
    for k in (1, 2):
        (tmp_path / f"{k}.txt").write_text(f"2\n{names[0]}\t1\t2\n{names[0]}\t1\t3\n" + "".join(
            f"{names[0]}\t{i}\t{names[1]}\t{k}\n" for i in (1, 2)))
        lists.append(("--pairs", str(tmp_path / f"{k}.txt")))
    accuracy = [0.95]
    verify = train.evaluate.verify
    monkeypatch.setattr(train.evaluate, "verify", lambda *a: (verify(*a)[0]._replace(accuracy=accuracy[0]), None))
    out = "--out", str(tmp_path / "out")
    with pytest.warns(UserWarning, match="people of --pairs are left out"):
        cli.main(["train", "--data", str(tmp_path / "faces"), *out, "--steps", "1", *lists[0], *SMALL])
    accuracy[0] = 0.6
    for pairs, best in (((), 0.95), (lists[1], 0.6)):
        cli.main(["train", "--resume", out[1], *pairs])
        assert weights(tmp_path / "out")["best"] == best


def test_a_run_that_goes_on_holds_out_the_same_people_in_a_folder_that_grew(load, tmp_path):
    trained, judged, options = load("--hold-out", "0.3", "--out", tmp_path / "out")
    assert trained | judged == {f"p{k:02d}" for k in range(8)} and not trained & judged
    train.Run(options).save()
    for k in range(5):
        shutil.copytree(tmp_path / "faces" / f"p{k:02d}", tmp_path / "faces" / f"a{k:02d}")
    kept = train.resumed(train.read_checkpoint(options.out), train.parse(["--resume", options.out]))
    again = load("--hold-out", "0.3", held_out=kept.held_out)
    assert again[1] == judged and again[0] == trained | {f"a{k:02d}" for k in range(5)}
    assert load("--hold-out", "0.3")[1] != judged  # a run of its own
    one = sorted(judged)[0]
    (tmp_path / "pairs.txt").write_text(f"2\n{one}\t1\t2\n{one}\t1\t3\n" + "".join(
        f"{one}\t{i}\t{other}\t1\n" for other in judged - {one} for i in (1, 2)))
    assert load("--pairs", tmp_path / "pairs.txt", held_out=kept.held_out)[0] == again[0]  # pairs of these are welcome


def test_pairs_that_nothing_can_be_verified_on_leave_no_folder(load, tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text("1\np02\t1\t2\np02\t2\t3\n")
    with pytest.warns(UserWarning, match="1 people of"), pytest.raises(SystemExit) as left:
        cli.main(["train", "--data", str(tmp_path / "faces"), "--pairs", str(tmp_path / "pairs.txt"), "--out",
                  str(tmp_path / "out"), *SMALL])
    assert left.value.code == 2 and "2 same and 0 different pairs; both kinds are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
