"""The paper's experiments on LFW alone: the same questions, on data ten thousand times smaller.

    python benchmarks/experiments.py --lfw FOLDER --budget 40

FOLDER holds ``images/NAME/NAME_0001.jpg`` and the published lists. Every network is trained from nothing on the people
of View 1 (peopleDevTrain.txt) for an equal share of the budget and verified on pairsDevTest.txt, whose people it never
saw. What is finished is kept: the same command again, after whatever end, does the rest.
"""

import argparse
import functools
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import environment, headline, replace_file, write_json
from tqdm import tqdm

from facenet_ext import data, evaluate, models, train

DIFFERENCE = """The paper trains on up to 260 million faces of 8 million people for weeks and prints VAL at FAR = 1e-3
on a hold-out of its own; here it is 9,525 faces of 4,038 people for {minutes:.2f} minutes a run (on a CPU: of the time
the run had it), and LFW's 1,000 pairs allow accuracy and VAL at FAR = 1e-2. Compare the order within a column, never
the columns; one run each, ± over the ten folds of the pairs alone, so a point or two is noise. The base run, part of
most tables, trains `{network}`, which sees {size} of the 112 x 112 pixels that the crop leaves: what is finer adds
nothing. In Table 3 the others have inputs of {scale:g} times the published side, and all have the same time, so that
the table is one of speed as much as of what a network can learn."""
TRAINING = 0.7  # share of the budget spent in training steps; reading, mining, verification take the rest
SIDE = 112  # what --crop 0.7 leaves of LFW's 160 x 160
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
    "mining": {"farthest fallback": None, "skip fallback": ["--fallback", "skip"], "offline": ["--offline", "50"],
               "hard negative": ["--negatives", "hard"], "every semi-hard negative": ["--negatives", "all_semi_hard"],
               "batch hard": ["--negatives", "hard", "--positives", "hardest"]},
}


@functools.cache
def original(path, crop):
    return data.read_image(path, (SIDE, SIDE), crop)


class Faces(data.Images):
    """LFW, decoded once for all runs; ``spoil`` (image to image) acts before the resize."""

    spoil = staticmethod(lambda image: image)

    def get(self, index):
        if index not in self._cache:
            image = self.spoil(Image.fromarray(original(self.paths[index], self.crop)))
            self._cache[index] = np.asarray(image.resize(self.size[::-1], Image.Resampling.LANCZOS))
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


class Run(train.Run):
    """Verified once, at the end, by ``measure``; only the base run's network is asked for again."""

    keep = False

    def clock(self):
        """On a CPU the time that the process had it, so that a run on a busy machine makes no fewer steps."""
        return time.monotonic() if self.device.type != "cpu" else time.process_time() / torch.get_num_threads()

    def check(self, name):
        return None

    def save(self, name="last.pt"):
        if self.keep:
            super().save(name)


class Study:
    """The rows measured so far, in experiments.json; asked for one that is missing, it trains or measures it."""

    def __init__(self, options, runs):
        self.options, self.lfw = options, Path(options.lfw)
        self.minutes = TRAINING * options.budget / runs
        self.pairs = self.labels = None
        self.path = options.out / "experiments.json"
        self.settings = {"budget_minutes": options.budget, "minutes_per_run": self.minutes, "base": options.base,
                         "scale": options.scale, "seed": options.seed, "far": FAR}
        self.found = {"benchmark": "experiments", "settings": self.settings, "results": {},
                      "environment": environment(options.device, torch.get_num_threads()),
                      "note": options.note,
                      "protocol": "trained on LFW peopleDevTrain.txt alone, verified on pairsDevTest.txt"}
        if self.path.exists():
            self.found = json.loads(self.path.read_text())
            if self.found["settings"] != self.settings:
                raise SystemExit(f"{self.path} holds a study with other settings, {self.found['settings']}: take "
                                 "those, or another --out")

    def row(self, name, value, work):
        rows = self.found["results"].setdefault(name, {})
        if str(value) not in rows:
            rows[str(value)] = {**work(), "paper": PAPER.get(name, {}).get(value)}
            write_json(self.path, self.found)
        return rows[str(value)]

    def load(self, prepared, share=1.0):
        """What ``train.load_data`` returns, with ``Faces``, of a share of the people."""
        images = Faces(*data.scan(prepared.data), prepared.size, prepared.crop)
        people = np.array(sorted(set(data.read_people(prepared.people)[0])))
        people = np.random.default_rng(self.options.seed).permutation(people)[:max(2, round(share * len(people)))]
        label = {name: number for number, name in enumerate(images.names)}
        indices = np.flatnonzero(np.isin(images.labels, [label[name] for name in people if name in label]))
        return images, indices, data.read_pairs(prepared.pairs, images.paths)[0]

    def train(self, key, extra, share=1.0):
        """Trains for the run's minutes and measures; ``extra``: options that differ from the base's."""
        prepared = train.complete(train.parse([
            "--data", str(self.lfw / "images"), "--people", str(self.lfw / "peopleDevTrain.txt"), "--pairs",
            str(self.lfw / "pairsDevTest.txt"), "--crop", "0.7", "--seed", str(self.options.seed), "--device",
            self.options.device, "--out", str(self.options.out / key), "--minutes", str(self.minutes),
            *self.options.base.split(), *extra]))
        loaded = images, indices, _ = self.load(prepared, share)
        images.preload(indices)  # all of them before the clock starts, or the first run would pay for the others
        run = Run(prepared, loaded=loaded)
        run.keep = key == "base"
        run.train()
        return self.measure(run.model, run.images, run.pairs, steps=run.state["step"], size=list(prepared.size))

    def measure(self, model, images, pairs, **more):
        found, _ = evaluate.verify(evaluate.distances(model, images, pairs, self.options.device), pairs, FAR)
        kept = ("accuracy", "accuracy_se", "val", "val_se", "auc")
        return {**{key: getattr(found, key) for key in kept}, **more}

    def spoiled(self, spoil):
        """The base run's network on images that went through ``spoil``."""
        model, trained = train.load_model(self.options.out / "base", self.options.device)
        images, _, pairs = self.load(trained)
        images.spoil = spoil
        return self.measure(model, images, pairs)

    def experiment(self, name):
        for value in PAPER[name] if name in ("jpeg", "pixels") else VARIANTS[name]:
            if name in ("jpeg", "pixels"):
                spoil = jpeg(value) if name == "jpeg" else shrink(value)
                self.row(name, value, lambda spoil=spoil: self.spoiled(spoil))
            elif (extra := VARIANTS[name][value]) is None:
                self.row(name, value, lambda: {**self.base()})
            else:
                if name == "network" and self.options.scale != 1:
                    sides = [max(16, round(self.options.scale * side)) for side in models.NETWORKS[value].size]
                    extra = [*extra, "--size", "x".join(map(str, sides))]
                share = value if name == "data" else 1.0
                key = f"{name}-{value}".replace(" ", "-")
                self.row(name, value, lambda extra=extra, key=key, share=share: self.train(key, extra, share))
            yield value
        rows = self.found["results"][name]
        plot(name, rows, self.options.out / f"{name}.png")
        tqdm.write("\n" + table(name, rows))

    def base(self):
        return self.row("base", "base", lambda: self.train("base", []))


def table(name, rows):
    """Markdown: ours beside the paper's."""
    head = f"| | accuracy | VAL at FAR {FAR:g} | AUC | paper: VAL at FAR 0.001 | steps | input |"
    lines = [f"### {TITLES[name]}", "", head, "|---|---:|---:|---:|---:|---:|---:|"]
    for value, row in rows.items():
        percent = [f"{100 * row[key]:.1f} ± {100 * row[key + '_se']:.1f}" for key in ("accuracy", "val")]
        cells = [value, *percent, f"{row['auc']:.3f}", row["paper"] or "–", row.get("steps", "as base"),
                 " x ".join(map(str, row["size"])) if "size" in row else "as base"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(name, rows, path):
    from matplotlib.figure import Figure

    figure = Figure((6, 3.6), layout="constrained")
    axis = figure.subplots()
    places, line = range(len(rows)), "" if name in ("network", "mining") else "-"  # no line between mere names
    for key, label in (("accuracy", "accuracy, LFW View 1"), ("val", f"VAL at FAR {FAR:g}, LFW View 1")):
        values, errors = ([100 * row[k] for row in rows.values()] for k in (key, key + "_se"))
        axis.errorbar(places, values, errors, marker="o", linestyle=line, capsize=3, label=label)
    if name in PAPER:
        axis.plot(places, [row["paper"] or np.nan for row in rows.values()], "ks", linestyle=line and "--",
                  label="paper: VAL at FAR 0.001, other data")
    axis.set_xticks(places, [label.replace(" ", "\n") for label in rows], fontsize=7)
    axis.set(title=TITLES[name], ylabel="%")
    axis.legend(fontsize=7)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--lfw", required=True, metavar="FOLDER")
    parser.add_argument("--budget", type=float, default=40, help="minutes for all of it; a real run on a GPU: 230 (40)")
    parser.add_argument("--scale", type=float, default=1.0 if cuda else 0.3, help="side of the input in the comparison "
                        "of networks, as a share of the published one (1 on a GPU, else 0.3)")
    parser.add_argument("--only", nargs="+", choices=sorted(TITLES), default=list(TITLES))
    parser.add_argument("--base", default="", help="further options of facenet-ext train for every run")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what a reader of the results should know of the machine that day")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in TITLES if name in options.only]
    runs = 1 + sum(extra is not None for name in wanted for extra in VARIANTS.get(name, {}).values())
    study, began = Study(options, runs), time.monotonic()
    with tqdm(total=sum(len(VARIANTS.get(name, PAPER.get(name))) for name in wanted), unit="row") as bar:
        bar.set_postfix_str(f"{runs} runs of {study.minutes:.2f} minutes")
        study.base()
        for name in wanted:
            for value in study.experiment(name):
                bar.set_description(f"{name} {value}")
                bar.update()
    size = " x ".join(map(str, study.base()["size"]))
    network = train.complete(train.parse(["--data", ".", "--device", options.device, *options.base.split()])).network
    more = {"network": network, "size": size, "scale": options.scale}
    text = [DIFFERENCE.format(minutes=study.minutes, **more),
            *(table(name, study.found["results"][name]) for name in wanted),
            f"Measured on {headline(study.found['environment'])}. {study.found['note']}".strip()]
    replace_file(options.out / "experiments.md", lambda temporary: temporary.write_text("\n\n".join(text) + "\n"))
    study.found["wall_minutes"] = study.found.get("wall_minutes", 0) + (time.monotonic() - began) / 60
    write_json(study.path, study.found)


if __name__ == "__main__":
    main()
