"""Kill a training at random moments, resume it, and compare every checkpoint with the uninterrupted run, bit for bit.

    python tests/kills.py [--kills 20] [--seed 0] [further options of facenet-ext train, such as --chunk 10]

Not collected by pytest, which has one such kill (test_train.py): twenty take a few minutes.
"""

import argparse
import hashlib
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

OPTIONS = ["--size", "8", "--people-per-batch", "6", "--images-per-person", "4", "--dim", "8", "--threads", "1",
           "--save-every", "1", "--verify-every", "50"]


def digest(path):
    """Step, and a hash of all that a run consists of; the clock and the name of its folder are its own."""
    saved = torch.load(path, weights_only=True)
    parts = [saved["step"], saved["best"], saved["before"]]
    parts += [(name, value.numpy().tobytes()) for name, value in saved["model"].items()]
    for key, slots in saved["optimizer"]["state"].items():
        parts += [(key, name, torch.as_tensor(value).numpy().tobytes()) for name, value in slots.items()]
    return saved["step"], hashlib.sha256(pickle.dumps(parts)).hexdigest()


def reference(out, options):
    """{step: digests} of the run that nobody disturbs: the last step is saved before and after its verification."""
    from facenet_ext import cli, train

    found, save = {}, train.Run.save

    def save_and_note(self, name="last.pt"):
        save(self, name)
        if name == "last.pt":
            step, value = digest(self.out / name)
            found.setdefault(step, set()).add(value)

    train.Run.save = save_and_note
    cli.main(["train", "--out", str(out), *options])
    train.Run.save = save
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options, more = parser.parse_known_args()
    draw, kills, wrong, midway = random.Random(options.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as top:
        whole = reference(Path(top) / "whole", [*OPTIONS, "--steps", str(options.steps), *more])
        out = Path(top) / "cut"
        while True:
            go = ["--resume", str(out)] if (out / "last.pt").exists() else \
                ["--out", str(out), *OPTIONS, "--steps", str(options.steps), *more]
            old = stamp(out / "last.pt")
            child = subprocess.Popen([sys.executable, "-m", "facenet_ext.train", *go], stdout=subprocess.DEVNULL,
                                     stderr=subprocess.PIPE)
            if kills < options.kills:
                deadline = time.monotonic() + 60
                while child.poll() is None and time.monotonic() < deadline and stamp(out / "last.pt") == old:
                    time.sleep(0.02)
                time.sleep(draw.uniform(0, 0.8))  # somewhere among the steps and the writing of checkpoints
                child.kill()
            _, error = child.communicate()
            if child.returncode == 0:
                break
            if child.returncode != -9:
                sys.exit(f"the run failed by itself:\n{error.decode()}")
            kills += 1
            step, value = digest(out / "last.pt")
            midway += (out / "last.pt.part").exists()
            wrong += value not in whole[step]
            print(f"kill {kills:2d} at step {step:4d}: {'same bits' if value in whole[step] else 'DIFFERENT'}",
                  flush=True)
        step, value = digest(out / "last.pt")
        wrong += value not in whole[step]
        print(f"end at step {step}: {'same bits' if value in whole[step] else 'DIFFERENT'}; {kills} kills, "
              f"{midway} of them while a checkpoint was being written, {wrong} differences")
    sys.exit(wrong > 0 or kills < options.kills)


def stamp(path):
    return path.stat().st_mtime_ns if path.exists() else 0


if __name__ == "__main__":
    main()
