"""``python -m facenet_ext.train``: train an embedding with the semi-hard triplet loss and verify it on unseen people.

    sampler.batch(step) -> images.batch -> augment -> network -> criterion -> backward -> optimizer
                           (read ahead in a thread)

Everything random is drawn from (seed, step), so model, optimizer and step number are the whole state of a run: resumed
after ``kill -9`` it ends with the bits of the uninterrupted run (CPU, same number of threads, ``--steps``).
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from . import SemiHardTripletLoss, data, evaluate, models

PRESETS = {
    # AdaGrad 0.05, lowered at the end (paper section 3).
    "paper": {"optimizer": "adagrad", "lr": 0.05, "weight_decay": 0.0},
    # Adam's per-weight step with decoupled decay, warm-up and a cosine to zero: needs a fraction of the steps of
    # AdaGrad, whose rate only ever falls, and forgives the choice of lr.
    "modern": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05},
}
# What the sizes are where the command line does not say: digits (scans of 8 x 8), a CPU, a GPU (the paper's 45 x 40).
SIZES = {
    "digits": {"network": "mini", "size": 16, "people_per_batch": 7, "images_per_person": 16, "steps": 200},
    "cpu": {"network": "mini", "size": 64, "people_per_batch": 45, "images_per_person": 4, "steps": 3000},
    "cuda": {"network": "nn4", "size": 96, "people_per_batch": 45, "images_per_person": 40, "steps": 20000},
}


def add_arguments(parser):
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="folder of NAME/image files; without it, scikit-learn's digits")
    add("--people", metavar="FILE", help="LFW people list: train on these only (peopleDevTrain.txt)")
    add("--pairs", metavar="FILE", help="LFW pair list to verify on (pairsDevTest.txt); without it, random pairs of "
        "people held out")
    add("--hold-out", type=float, default=0.1, metavar="SHARE", help="people held out where no --pairs are given")
    add("--crop", type=float, default=1.0, metavar="SHARE", help="central share of each image to use")
    add("--network", choices=sorted(models.NETWORKS), help="default: mini on a CPU, nn4 on a GPU")
    add("--size", type=int, help="input pixels, square")
    add("--dim", type=int, default=128, help="length of the embedding")
    add("--no-batch-norm", action="store_true", help="the paper's parameter counts; slower to train")
    add("--people-per-batch", type=int, metavar="P")
    add("--images-per-person", type=int, metavar="K")
    add("--singletons", type=int, default=0, metavar="S", help="people with one image in each batch, as negatives")
    add("--margin", type=float, default=0.2, help="in squared distance, 0 to 4")
    add("--fallback", choices=["farthest", "skip"], default="farthest", help="where no negative is semi-hard")
    add("--preset", choices=sorted(PRESETS), default="modern", help="optimizer settings")
    add("--lr", type=float, help="learning rate; default: the preset's")
    add("--weight-decay", type=float)
    add("--steps", type=int, help="length of the run")
    add("--minutes", type=float, help="length of the run on the clock, instead of --steps")
    add("--verify-every", type=int, metavar="STEPS", help="default: whole epochs, 200 steps or more")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--flip", action="store_true", help="verify on image and mirror image together")
    add("--out", metavar="DIR", help="checkpoints and metrics; default: a new folder under runs/")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its options")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--threads", type=int, help="CPU threads")
    add("--seed", type=int, default=0)


def complete(options):
    """Fill what the command line leaves open; the result is stored in the checkpoint."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SIZES["digits" if options.data is None else options.device.split(":")[0]]
    for key, value in {**sizes, **PRESETS[options.preset]}.items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    if options.data is not None:
        options.data = str(Path(options.data).resolve())
    if options.out is None:
        options.out = f"runs/{Path(options.data or 'digits').name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return options


def load_data(options):
    """Images, the indices to train on and the pairs to verify on (None where nobody can be held out)."""
    size = (options.size, options.size)
    if options.data is None:
        images, train, unseen = data.digits(size)
        return images, train, data.draw_pairs(images.labels, unseen, 2000, options.seed)
    images = data.Images(*data.scan(options.data), size, options.crop)
    good = images.preload(lambda todo: tqdm(todo, "reading images", len(images), unit="img", disable=None))
    if options.pairs:
        pairs = data.read_pairs(options.pairs, images.paths)
    if options.people:
        wanted = set(sum(data.read_people(options.people), []))
        good = good[[images.names[images.labels[i]] in wanted for i in good]]
    if options.pairs:
        return images, good, pairs
    train, unseen = data.split_people(images.labels, good, options.hold_out, options.seed)
    return images, train, data.draw_pairs(images.labels, unseen, 2000, options.seed) if len(unseen) else None


def make_optimizer(model, options):
    decay = [p for p in model.parameters() if p.ndim > 1]  # biases and batch norm are not decayed
    groups = [{"params": decay, "weight_decay": options.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    kind = {"adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[options.optimizer]
    return kind(groups, lr=options.lr)


def rate(progress: float, preset: str) -> float:
    """Factor on the learning rate at ``progress`` 0 ... 1 of the run."""
    if preset == "paper":
        return 1.0 if progress < 0.8 else 0.1
    return min(1.0, progress / 0.05 + 0.02) * (1 + math.cos(math.pi * progress)) / 2


def save(path, state):
    """Whole or not at all: a kill at any moment leaves the old file or the new one."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class CollapseWatch:
    """All embeddings equal: every distance 0, the loss at the margin, and no gradient that could change it."""

    def __init__(self, margin, patience=20):
        self.margin, self.patience, self.seen = margin, patience, 0

    def __call__(self, step, loss, max_d2_ap):
        collapsed = max_d2_ap < 1e-3 and abs(loss - self.margin) < 0.05 * self.margin
        self.seen = self.seen + 1 if collapsed else 0
        if self.seen == self.patience:
            warnings.warn(f"step {step}: the embedding has collapsed to a point (loss {loss:.4f} stays at the margin, "
                          f"largest anchor-positive distance {max_d2_ap:.1e}); use a lower learning rate, more people "
                          "per batch or batch norm", stacklevel=2)


class Interrupt:
    """The first Ctrl-C or SIGTERM asks the loop to stop after its step; the second one kills."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.old = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number, _):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def train(options):
    """Run the training that ``options`` describe; returns (verification before, after). Files go to ``options.out``."""
    out, device = Path(options.out), torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    images, indices, pairs = load_data(options)
    sampler = data.IdentitySampler(images.labels, options.people_per_batch, options.images_per_person,
                                   options.singletons, options.seed, indices)
    model = models.create(options.network, options.dim, not options.no_batch_norm, options.size)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, options)
    criterion = SemiHardTripletLoss(margin=options.margin, fallback=options.fallback)
    watch = CollapseWatch(options.margin)
    every = options.verify_every or len(sampler) * -(-200 // len(sampler))
    out.mkdir(parents=True, exist_ok=True)
    state = {"step": 0, "seconds": 0.0, "before": None, "best": -1.0}
    if (out / "last.pt").exists() and options.resume:
        saved = torch.load(out / "last.pt", map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = {key: saved[key] for key in state}
        print(f"resumed {out} at step {state['step']}")
    log = Log(out / "metrics.jsonl", state["step"])

    def check(name):
        if pairs is None:
            return None
        found, _ = evaluate.verify(model, images, pairs, device, options.flip)
        log(state["step"], kind="verification", **found._asdict())
        tqdm.write(f"{name}: accuracy on pairs of unseen people {100 * found.accuracy:.2f} % "
                   f"± {100 * found.accuracy_se:.2f}, AUC {found.auc:.4f}")
        return found.accuracy

    def checkpoint(name="last.pt"):
        save(out / name, {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                          "options": vars(options)})

    people = len(sampler.groups)
    print(f"{len(indices)} images to train on: {people} people with two or more, {len(sampler.single)} with one; "
          f"{options.network} at {options.size} x {options.size} on {device}; files in {out}")
    if state["before"] is None:
        state["before"] = check("before")
        checkpoint()
    limit = options.steps if options.minutes is None else sys.maxsize
    began = time.monotonic() - state["seconds"]
    bar = tqdm(total=None if options.minutes else limit, initial=state["step"], unit="step", disable=None)
    with Interrupt() as interrupt, ThreadPoolExecutor(1) as ahead, bar:
        def read(step):
            return images.batch(sampler.batch(step))

        model.train()
        ready = ahead.submit(read, state["step"])
        while state["step"] < limit and not interrupt.asked:
            step, start = state["step"], time.monotonic()
            progress = step / limit if options.minutes is None else (start - began) / (60 * options.minutes)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate(progress, options.preset)
            pixels, labels = ready.result()
            ready = ahead.submit(read, step + 1)
            x = data.augment(pixels, model.input_size, [options.seed, 4, step], device, mirror=options.data is not None)
            optimizer.zero_grad(set_to_none=True)
            loss, stats = criterion(model(x), labels.to(device), return_stats=True)
            loss.backward()
            optimizer.step()
            if not math.isfinite(value := loss.item()):
                raise FloatingPointError(f"step {step}: the loss is {value}; the last good state is {out / 'last.pt'}; "
                                         "lower --lr")
            count = max(1, int(stats.pairs))
            shown = {"loss": value, "active": int(stats.active) / count, "fallback": int(stats.fallback) / count,
                     "images/s": len(labels) / (time.monotonic() - start)}
            watch(step, value, stats.max_d2_ap.item())
            log(step, kind="step", **shown, d2_ap=stats.mean_d2_ap.item(), d2_an=stats.mean_d2_an.item(),
                lr=group["lr"], images=len(labels))
            bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
            bar.update()
            state["step"], state["seconds"] = step + 1, time.monotonic() - began
            if state["step"] % every == 0 and state["step"] < limit:
                accuracy = check(f"step {state['step']}")
                if accuracy is not None and accuracy > state["best"]:
                    state["best"] = accuracy
                    checkpoint("best.pt")
            if state["step"] % options.save_every == 0:
                checkpoint()
        ready.cancel()
    checkpoint()
    if interrupt.asked:
        print(f"stopped after step {state['step']}; go on with --resume {out}")
        raise SystemExit(130)
    return state["before"], check("after")


class Log:
    """metrics.jsonl: one line per record; on resume those after the checkpoint are dropped, they will come again."""

    def __init__(self, path, step):
        kept = []
        if step and path.exists():
            for line in path.read_text().split("\n"):
                try:
                    record = json.loads(line)
                    if record["step"] < step + (record["kind"] == "verification"):  # it names the steps before it
                        kept.append(line + "\n")
                except ValueError:  # the line that a kill cut short
                    continue
        self.file = open(path, "w", buffering=1)
        self.file.writelines(kept)

    def __call__(self, step, **values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")


def run(parser, argv=None):
    options = parser.parse_args(argv)
    if options.resume:
        path = Path(options.resume) / "last.pt"
        if not path.exists():
            parser.error(f"--resume {options.resume}: no last.pt in it, so there is nothing to go on with")
        stored = torch.load(path, map_location="cpu", weights_only=True)["options"]
        parser.set_defaults(**{**stored, "out": options.resume})
        options = parser.parse_args(argv)
    try:
        before, after = train(complete(options))
    except data.DataError as error:
        parser.error(str(error))
    return before, after


def main(argv=None):
    parser = argparse.ArgumentParser("python -m facenet_ext.train", description=__doc__.split("\n")[0])
    add_arguments(parser)
    return run(parser, argv)


if __name__ == "__main__":
    main()
