"""``facenet-ext train``: train an embedding with the semi-hard triplet loss and verify it on people it never saw.

    sampler.batch(step) -> images.batch -> augment -> network -> criterion -> backward -> optimizer
    (read ahead in a thread)

Everything random is drawn from (seed, step), so model, optimizer and step number are the whole state of a run: resumed
after ``kill -9`` it ends with the bits of the uninterrupted run (CPU, same number of threads, length in --steps; not
with --bf16, as oneDNN's bfloat16 convolutions do not repeat themselves).
Under torchrun every rank draws people of its own and mines among them; gradients are averaged.
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

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import SemiHardTripletLoss, cached_step, data, evaluate, mine_triplets, models

PRESETS = {
    # AdaGrad 0.05, lowered at the end (paper section 3).
    "paper": {"optimizer": "adagrad", "lr": 0.05, "weight_decay": 0.0},
    # Adam's per-weight step with decoupled decay, warm-up and a cosine to zero: needs a fraction of the steps of
    # AdaGrad, whose rate only ever falls, and forgives the choice of lr.
    "modern": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05},
}
# Where the command line does not say: for the digits (scans of 8 x 8), on a CPU, on a GPU (the paper's batch).
SIZES = {
    "network": {"digits": "mini", "cpu": "mini", "cuda": "nn4"},
    "size": {"digits": (16, 16), "cpu": (48, 48), "cuda": (96, 96)},
    "people_per_batch": {"digits": 16, "cpu": 45, "cuda": 45},
    "images_per_person": {"digits": 8, "cpu": 4, "cuda": 40},
    "singletons": {"digits": 0, "cpu": 0, "cuda": 200},
    "steps": {"digits": 60, "cpu": 3000, "cuda": 20000},
}
SUBSET = 4096  # images that offline mining looks through


def add_arguments(parser):
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="FOLDER", help="folder of NAME/image files; without it, scikit-learn's digits")
    add("--people", metavar="FILE", help="LFW people list: train on these only (peopleDevTrain.txt, people.txt)")
    add("--without-set", type=int, metavar="K", help="leave out set K (1 to 10) of --people, the fold to test on")
    add("--pairs", metavar="FILE", help="LFW pair list to verify on; default: random pairs of people held out")
    add("--hold-out", type=float, default=0.1, metavar="SHARE", help="people held out where no --pairs are given (0.1)")
    add("--crop", type=float, default=1.0, metavar="SHARE", help="central share of each image to use (1.0)")
    group = parser.add_argument_group("network and batch", "On a CPU mini at 48 pixels and batches of 45 people x 4 "
                                      "images; on a GPU nn4 at 96 and the paper's 45 x 40, and 200 singletons.")
    add = group.add_argument
    add("--network", choices=sorted(models.NETWORKS))
    add("--size", type=pixels, metavar="H[xW]", help="input pixels; default: the table's where --network is given")
    add("--dim", type=int, default=128, help="length of the embedding (128)")
    add("--no-batch-norm", action="store_true", help="the paper's parameter counts; slower to train")
    add("--people-per-batch", type=int, metavar="P")
    add("--images-per-person", type=int, metavar="K")
    add("--singletons", type=int, metavar="S", help="further people in each batch with their only image, as negatives")
    add("--chunk", type=int, metavar="N", help="embed N images at a time and run each chunk again for its gradient: "
        "the whole batch's loss in the memory of a chunk (with batch norm, statistics are the chunk's)")
    group = parser.add_argument_group("loss and optimizer")
    add = group.add_argument
    add("--margin", type=float, default=0.2, help="in squared distance, 0 to 4 (0.2)")
    add("--fallback", choices=["farthest", "skip"], default="farthest", help="of a pair without a semi-hard negative")
    add("--offline", type=int, metavar="STEPS", help=f"the paper's offline way: every STEPS, mine triplets with the "
        f"latest weights over {SUBSET} images, and train on those (default: mine online, within each batch)")
    add("--preset", choices=sorted(PRESETS), default="modern", help="modern: AdamW 0.001, warm-up, cosine, which needs "
        "fewer steps; paper: AdaGrad 0.05, lowered at the end (modern)")
    add("--lr", type=float, help="learning rate; default: the preset's")
    add("--weight-decay", type=float)
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--steps", type=int, help="length of the run")
    add("--minutes", type=float, help="length of the run on the clock, instead of --steps; not reproducible to the bit")
    add("--verify-every", type=int, metavar="STEPS", help="default: whole epochs, 200 steps or more")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--flip", action="store_true", help="verify on image and mirror image together")
    add("--out", metavar="DIR", help="checkpoints, metrics.jsonl, TensorBoard; default: a new folder under runs/")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its options")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--bf16", action="store_true", help="bfloat16 autocast; on a CPU no run repeats to the bit")
    add("--threads", type=int, help="CPU threads")
    add("--seed", type=int, default=0)


def pixels(text):
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side nor HEIGHTxWIDTH in pixels")
    return (sides[0], sides[-1])


def complete(options):
    """Fill what the command line leaves open; the result is stored in the checkpoint."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = "digits" if options.data is None else options.device.split(":")[0]
    sizes = {key: values[where] for key, values in SIZES.items()}
    if options.network and options.data is not None:
        sizes["size"] = models.NETWORKS[options.network].size
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
    if options.data is None:
        images, train, unseen = data.digits(options.size)
        return images, train, data.draw_pairs(images.labels, unseen, 2400, options.seed)
    images = data.Images(*data.scan(options.data), options.size, options.crop)
    train, used = np.arange(len(images)), []
    if options.people:
        sets = data.read_people(options.people)
        wanted = {name for k, names in enumerate(sets, 1) if k != options.without_set for name in names}
        if missing := sorted(wanted.difference(images.names)):
            warnings.warn(f"{options.people}: {len(missing)} of {len(wanted)} people have no images in {options.data}, "
                          f"for example {missing[0]}", stacklevel=2)
        train = train[[images.names[label] in wanted for label in images.labels]]
    if options.pairs:
        pairs = data.read_pairs(options.pairs, images.paths)
        used = np.concatenate([pairs.a, pairs.b])
    todo = np.union1d(train, used).astype(int)
    good = images.preload(todo, lambda work: tqdm(work, "reading images", len(todo), unit="img", disable=None))
    train = np.intersect1d(train, good)
    if not options.pairs:
        train, unseen = data.split_people(images.labels, train, options.hold_out, options.seed)
        pairs = data.draw_pairs(images.labels, unseen, 2400, options.seed) if len(unseen) else None
    return images, train, pairs


def make_optimizer(model, options):
    parameters = [*model.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]  # biases and batch norm
    return {"adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[options.optimizer](groups, lr=options.lr)


def rate(progress: float, preset: str) -> float:
    """Factor on the learning rate at ``progress`` 0 ... 1 of the run."""
    if preset == "paper":
        return 1.0 if progress < 0.8 else 0.1
    return min(1.0, progress / 0.05 + 0.02) * (1 + math.cos(math.pi * progress)) / 2


def load_model(path, device="cpu"):
    """The network of a checkpoint, or of the last one in a run's folder, in evaluation mode; and the run's options."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise data.DataError(f"{path}: no checkpoint; expected a file or folder that facenet-ext train wrote")
    saved = torch.load(path, map_location=device, weights_only=True)
    options = argparse.Namespace(**saved["options"])
    model = models.create(options.network, options.dim, not options.no_batch_norm, options.size)
    model.load_state_dict(saved["model"])
    return model.to(device, memory_format=torch.channels_last).eval(), options


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


class Log:
    """metrics.jsonl and TensorBoard; on resume the records after the checkpoint are dropped, they will come again."""

    def __init__(self, out, step):
        path, kept = out / "metrics.jsonl", []
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
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and no other command needs it
        self.board = SummaryWriter(str(out), purge_step=step or None)

    def __call__(self, step, kind, **values):
        self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for key, value in values.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{kind}/{key}", value, step)

    def close(self):
        self.file.close()
        self.board.close()


class Run:
    """A training run: what it needs, in the order in which it needs it. ``loaded``: instead of ``load_data``'s."""

    def __init__(self, options, loaded=None):
        self.options, self.out = options, Path(options.out)
        self.stored = {key: value for key, value in vars(options).items() if key != "function"}  # cli's, no option
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() \
            else (0, 1)
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.images, indices, self.pairs = loaded or load_data(options)
        self.sampler = data.IdentitySampler(self.images.labels, options.people_per_batch, options.images_per_person,
                                            options.singletons, options.seed, indices, self.rank, self.world)
        self.model = models.create(options.network, options.dim, not options.no_batch_norm, options.size)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, options)
        self.criterion = SemiHardTripletLoss(margin=options.margin, fallback=options.fallback)
        self.watch = CollapseWatch(options.margin)
        self.state = {"step": 0, "seconds": 0.0, "before": None, "best": -1.0, "mined": None}
        if options.resume:
            saved = torch.load(self.out / "last.pt", map_location=self.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = {key: saved[key] for key in self.state}
            self.say(f"resumed {self.out} at step {self.state['step']}")
        self.wrapped = DistributedDataParallel(self.model) if self.world > 1 else self.model
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.out, self.state["step"])
        self.say(f"{len(indices)} images to train on: {len(self.sampler.groups)} people with two or more, "
                 f"{len(self.sampler.single)} with one; {options.network} at {options.size[0]} x {options.size[1]} on "
                 f"{self.device}" + f", {self.world} ranks" * (self.world > 1) + f"; files in {self.out}")

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def check(self, name):
        """Verify on people never seen; keeps the best checkpoint."""
        accuracy = None
        if self.rank == 0 and self.pairs is not None:
            d2 = evaluate.distances(self.model, self.images, self.pairs, self.device, self.options.flip)
            with warnings.catch_warnings():  # VAL goes to the log alone; View 1 has too few pairs for FAR = 1e-3
                warnings.filterwarnings("ignore", "VAL at FAR")
                found, _ = evaluate.verify(d2, self.pairs)
            accuracy = found.accuracy
            self.log(self.state["step"], "verification", **found._asdict())
            self.say(f"{name}: accuracy on pairs of unseen people {100 * accuracy:.2f} % "
                     f"± {100 * found.accuracy_se:.2f}, AUC {found.auc:.4f}")
            if accuracy > self.state["best"]:
                self.state["best"] = accuracy
                self.save("best.pt")
        if self.world > 1:
            distributed.barrier()
        return accuracy

    def save(self, name="last.pt"):
        if self.rank == 0:
            with data.atomic(self.out / name) as file:
                torch.save({**self.state, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                            "options": self.stored}, file)

    def read(self, step):
        """uint8 images and labels of a step; for offline mining anchors, positives and negatives one after another."""
        if not self.options.offline:
            return self.images.batch(self.sampler.batch(step))
        mined = self.state["mined"]
        count = min(len(mined), self.options.people_per_batch * self.options.images_per_person // 3)
        draw = np.random.default_rng([self.options.seed, 5, step, self.rank])
        return self.images.batch(mined.numpy()[draw.choice(len(mined), count, replace=False)].T.reshape(-1))

    def mine(self, step):
        """Each anchor's hardest positive with its semi-hard negative, over a subset, with the weights as they are."""
        draw = np.random.default_rng([self.options.seed, 6, step])
        batches = -(-SUBSET // max(1, len(self.sampler.batch(0))))
        pool = np.unique(np.concatenate([self.sampler.batch(int(s)) for s in draw.integers(0, 1 << 20, batches)]))
        pool = pool[[self.images.get(int(i)) is not None for i in pool]]
        vectors = torch.from_numpy(evaluate.embed(self.model, self.images, pool, self.device))
        found = mine_triplets(vectors, torch.from_numpy(self.images.labels[pool]))
        order = np.lexsort((-found.d2_ap, found.anchor))  # by anchor, its farthest positive first
        first = order[np.unique(found.anchor[order], return_index=True)[1]]
        taken = first[(found.d2_ap - found.d2_an + self.options.margin > 0).numpy()[first]]
        if not len(taken):
            raise data.DataError(f"--offline: at step {step} no triplet of {len(pool)} images violates the margin")
        triplets = torch.stack([found.anchor, found.positive, found.negative], 1)[taken]
        self.state["mined"] = torch.from_numpy(pool)[triplets]

    def loss(self, vectors, labels):
        """Loss and what to show of it: the criterion's, or that of the triplets mined offline."""
        if not self.options.offline:
            loss, stats = self.criterion(vectors, labels, return_stats=True)
            count = stats.pairs.clamp(min=1)
            return loss, {"loss": loss, "active": stats.active / count, "fallback": stats.fallback / count,
                          "d2_ap": stats.mean_d2_ap, "d2_an": stats.mean_d2_an, "max_d2_ap": stats.max_d2_ap}
        anchor, positive, negative = vectors.view(3, -1, vectors.shape[1])
        d2_ap, d2_an = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
        hinge = (d2_ap - d2_an + self.options.margin).clamp(min=0)
        return hinge.mean(), {"loss": hinge.mean(), "active": (hinge > 0).float().mean(),
                              "fallback": (d2_an <= d2_ap).float().mean(), "d2_ap": d2_ap.mean(),
                              "d2_an": d2_an.mean(), "max_d2_ap": d2_ap.max()}

    def forward_backward(self, x, labels):
        """Gradients of the batch's loss, and what to show of it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            return cached_step(self.wrapped, x, labels, self.loss, chunk=self.options.chunk or None)[1]

    def step(self, step, pixels, labels):
        start = time.monotonic()
        x = data.augment(pixels, self.model.input_size, [self.options.seed, 4, step, self.rank], self.device,
                         mirror=self.options.data is not None)
        self.optimizer.zero_grad(set_to_none=True)
        shown = self.forward_backward(x, labels.to(self.device))
        self.optimizer.step()
        names, values = zip(*shown.items(), strict=True)
        shown = dict(zip(names, torch.stack([v.detach().float() for v in values]).tolist(), strict=True))  # waits once
        if not math.isfinite(shown["loss"]):
            raise FloatingPointError(f"step {step}: the loss is {shown['loss']}; the last good state is "
                                     f"{self.out / 'last.pt'}; lower --lr")
        shown["images/s"] = self.world * len(labels) / (time.monotonic() - start)
        self.watch(step, shown["loss"], shown["max_d2_ap"])
        return shown

    def agree(self, progress, asked):
        """The same clock and the same interrupt on every rank, or some would wait for gradients that never come."""
        if self.world == 1:
            return progress, asked
        both = torch.tensor([progress, float(asked)], dtype=torch.float64, device=self.device)
        distributed.all_reduce(both, distributed.ReduceOp.MAX)
        return both[0].item(), bool(both[1])

    def train(self):
        """Verification accuracy before and after (None where nobody was held out)."""
        options, state = self.options, self.state
        every = options.verify_every or len(self.sampler) * -(-200 // len(self.sampler))
        limit = sys.maxsize if options.minutes else options.steps
        if state["before"] is None:
            state["before"] = self.check("before")
            self.save()
        began = time.monotonic() - state["seconds"]
        bar = tqdm(total=None if options.minutes else limit, initial=state["step"], unit="step",
                   disable=True if self.rank else None)
        with Interrupt() as interrupt, ThreadPoolExecutor(1) as ahead, bar:
            self.wrapped.train()
            ready = None
            while state["step"] < limit:
                step = state["step"]
                progress = (time.monotonic() - began) / (60 * options.minutes) if options.minutes else step / limit
                progress, asked = self.agree(progress, interrupt.asked)
                if progress >= 1 or asked:
                    break
                for group in self.optimizer.param_groups:
                    group["lr"] = options.lr * rate(progress, options.preset)
                if options.offline and (step % options.offline == 0 or state["mined"] is None):
                    self.mine(step)
                batch = ready.result() if ready else self.read(step)
                ready = None if options.offline else ahead.submit(self.read, step + 1)
                shown = self.step(step, *batch)
                state["step"], state["seconds"] = step + 1, time.monotonic() - began
                if self.rank == 0:
                    self.log(step, "step", **shown, lr=group["lr"], images=len(batch[1]))
                    bar.set_postfix({k: f"{shown[k]:.3g}" for k in ("loss", "active", "fallback", "images/s")},
                                    refresh=False)
                    bar.update()
                if state["step"] % every == 0 and state["step"] < limit:
                    self.check(f"step {state['step']}")
                if state["step"] % options.save_every == 0:
                    self.save()
        self.save()
        if interrupt.asked:
            self.say(f"stopped after step {state['step']}; go on with --resume {self.out}")
            raise SystemExit(130)
        after = self.check("after")
        if self.rank == 0:
            self.log.close()
        return state["before"], after


def start(options):
    """Fill in the options, those of a run resumed first, and train; under torchrun as one of several ranks."""
    if options.resume:
        path = Path(options.resume) / "last.pt"
        if not path.exists():
            raise data.DataError(f"--resume {options.resume}: no last.pt in it, so there is nothing to go on with")
        stored = torch.load(path, map_location="cpu", weights_only=True)["options"]
        given = {key: value for key, value in vars(options).items() if value != vars(parse([])).get(key)}
        options = argparse.Namespace(**{**stored, **given, "out": options.resume})
    options = complete(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Run(options).train()
    cuda = options.device.startswith("cuda")
    if cuda:
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(options.device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        return Run(options).train()
    finally:
        distributed.destroy_process_group()


def parse(argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    from .cli import main

    main(["train", *sys.argv[1:]])
