"""The paper's experiments on LFW alone: the same questions, on data ten thousand times smaller.

    python benchmarks/experiments.py --lfw FOLDER --budget 40

FOLDER holds ``images/NAME/NAME_0001.jpg`` and the published lists. Every network is trained from nothing on the people
of View 1 (peopleDevTrain.txt) for an equal share of the budget and verified on pairsDevTest.txt, whose people it never
saw. The paper trains on 260 million faces of 8 million people and measures VAL at FAR = 1e-3 on a hold-out of its own;
LFW's 1,000 pairs allow accuracy and VAL at 1e-2. So compare the order within a column, never the columns.
"""

import argparse
import io
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facenet_ext import data, evaluate, train

FAR = 1e-2
# What the paper prints: VAL at FAR = 1e-3 in percent.
PAPER = {
    "network": {"nn1": 87.9, "nn2": 89.4, "nn3": 88.3, "nn4": 82.0, "nns1": 82.4, "nns2": 51.9},  # Table 3
    "jpeg": {10: 67.3, 20: 81.4, 30: 83.9, 50: 85.5, 70: 86.1, 90: 86.5},  # Table 4, left
    "pixels": {1600: 37.8, 6400: 79.5, 14400: 84.5, 25600: 85.7, 65536: 86.4},  # Table 4, right
    "dim": {64: 86.8, 128: 87.9, 256: 87.7, 512: 85.6},  # Table 5
    "data": {0.01: 76.3, 0.1: 85.1, 0.2: 85.1, 1.0: 86.2},  # Table 6: 2.6, 26, 52 and 260 million images
}
TITLES = {"network": "Table 3: network", "jpeg": "Table 4: JPEG quality", "pixels": "Table 4: image size in pixels",
          "dim": "Table 5: length of the embedding", "data": "Table 6: share of the training people",
          "margin": "margin", "mining": "mining"}
VARIANTS = {  # value -> options that differ from the base run; None: the base run itself
    "network": {**{name: ["--network", name] for name in PAPER["network"]}, "nn4_small2": ["--network", "nn4_small2"],
                "base": None},
    "dim": {64: ["--dim", "64"], 128: None, 256: ["--dim", "256"], 512: ["--dim", "512"]},
    "data": {0.01: [], 0.1: [], 0.2: [], 1.0: None},
    "margin": {0.05: ["--margin", "0.05"], 0.1: ["--margin", "0.1"], 0.2: None, 0.5: ["--margin", "0.5"]},
    "mining": {"farthest fallback": None, "skip fallback": ["--fallback", "skip"], "offline": ["--offline", "50"]},
}


class Degraded(data.Images):
    """Images that went through ``spoil`` (PIL image to PIL image) at their own resolution before being resized."""

    def __init__(self, images, spoil, side):
        super().__init__(images.paths, images.labels, images.names, images.size, images.crop)
        self.spoil, self.side = spoil, side

    def get(self, index):
        if index not in self._cache:
            image = Image.fromarray(data.read_image(self.paths[index], (self.side, self.side), self.crop))
            self._cache[index] = np.asarray(self.spoil(image).resize(self.size[::-1], Image.Resampling.LANCZOS))
        return self._cache[index]


def jpeg(quality):
    def spoil(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")
    return spoil


def shrink(pixels):
    side = round(pixels ** 0.5)
    return lambda image: image.resize((side, side), Image.Resampling.LANCZOS)


def prepare(options, extra):
    """A run for this variant: the base's options, overridden by ``extra``."""
    lfw = Path(options.lfw)
    base = ["--data", str(lfw / "images"), "--people", str(lfw / "peopleDevTrain.txt"), "--pairs",
            str(lfw / "pairsDevTest.txt"), "--crop", "0.7", "--seed", str(options.seed), "--device", options.device,
            "--out", str(options.out / "run"), "--verify-every", "1000000000", *options.base.split()]
    return train.complete(train.parse([*base, *extra]))


def train_one(options, minutes, extra, share=1.0):
    """Train for ``minutes``; returns the run, which holds the model, the images and the pairs."""
    prepared = prepare(options, extra)
    prepared.minutes = minutes
    load = train.load_data
    if share < 1:
        def part(o):
            images, indices, pairs = load(o)
            people = np.unique(images.labels[indices])
            kept = np.random.default_rng(options.seed).permutation(people)[:max(2, round(share * len(people)))]
            return images, indices[np.isin(images.labels[indices], kept)], pairs
        train.load_data = part
    try:
        run = train.Run(prepared)
    finally:
        train.load_data = load
    run.state["before"] = 0.0  # nobody asks what an untrained network can do in each of twenty runs
    run.check = lambda name: None
    run.train()
    return run


def measure(run, images=None):
    d2 = evaluate.distances(run.model, images or run.images, run.pairs, run.device)
    found, _ = evaluate.verify(d2, run.pairs, FAR)
    return {"accuracy": found.accuracy, "accuracy_se": found.accuracy_se, "val": found.val, "val_se": found.val_se,
            "auc": found.auc, "steps": run.state["step"]}


def show(name, rows, out):
    """One table and one plot: ours beside the paper's."""
    print(f"\n{TITLES[name]}\n{'':>20} {'accuracy %':>18} {f'VAL at {FAR:g} %':>18} {'steps':>7} {'paper %':>9}")
    for value, row in rows.items():
        paper = PAPER.get(name, {}).get(value)
        print(f"{value!s:>20} {100 * row['accuracy']:11.2f} ± {100 * row['accuracy_se']:4.2f} "
              f"{100 * row['val']:11.2f} ± {100 * row['val_se']:4.2f} {row['steps']:7d} {paper or '-':>9}", flush=True)
    from matplotlib.figure import Figure

    figure = Figure((6, 3.6), layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    for key, label in (("accuracy", "accuracy, LFW View 1"), ("val", f"VAL at FAR {FAR:g}, LFW View 1")):
        values, errors = ([100 * row[k] for row in rows.values()] for k in (key, key + "_se"))
        axis.errorbar(places, values, errors, marker="o", capsize=3, label=label)
    if name in PAPER:
        axis.plot(places, [PAPER[name].get(value, np.nan) for value in rows], "k--s",
                  label="paper: VAL at FAR 0.001, other data")
    axis.set_xticks(places, map(str, rows))
    axis.set(title=TITLES[name], ylabel="%")
    axis.legend(fontsize=7)
    with data.atomic(out / f"{name}.png") as file:
        figure.savefig(file, format="png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lfw", required=True, metavar="FOLDER")
    parser.add_argument("--budget", type=float, default=40, help="minutes of training, all runs together (40)")
    parser.add_argument("--only", nargs="+", choices=sorted(TITLES), default=list(TITLES))
    parser.add_argument("--base", default="", help="further options of facenet-ext train for every run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in TITLES if name in options.only]
    runs = 1 + sum(extra is not None for name in wanted for extra in VARIANTS.get(name, {}).values())
    minutes = options.budget / runs
    print(f"{runs} runs of {minutes:.2f} minutes each on {options.device}")
    base = train_one(options, minutes, [])
    measured, results = measure(base), {}
    for name in wanted:
        rows = {}
        if name in ("jpeg", "pixels"):
            for value in PAPER[name]:
                spoil = jpeg(value) if name == "jpeg" else shrink(value)
                rows[value] = measure(base, Degraded(base.images, spoil, 160))
        for value, extra in VARIANTS.get(name, {}).items():
            rows[value] = measured if extra is None else \
                measure(train_one(options, minutes, extra, value if name == "data" else 1.0))
        show(name, rows, options.out)
        results[name] = {str(value): {**row, "paper": PAPER.get(name, {}).get(value)} for value, row in rows.items()}
        settings = {k: v for k, v in base.stored.items() if k not in ("data", "people", "pairs", "out")}
        with data.atomic(options.out / "experiments.json") as file:
            file.write(json.dumps({
                "date": time.strftime("%Y-%m-%d"), "minutes_per_run": minutes, "far": FAR, "torch": torch.__version__,
                "machine": torch.cuda.get_device_name() if options.device.startswith("cuda") else
                f"{platform.machine()}, {torch.get_num_threads()} threads",
                "protocol": "trained on LFW peopleDevTrain.txt alone, verified on pairsDevTest.txt",
                "base": settings, "results": results}, indent=1, default=str).encode())


if __name__ == "__main__":
    main()
