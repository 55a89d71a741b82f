"""``facenet-ext train``: train an embedding with the semi-hard triplet loss and verify it on people it never saw.

    sampler.batch(step) -> images.batch -> augment -> network -> criterion -> backward -> optimizer
    (read ahead in a thread)

Everything random is drawn from (seed, step), so model, optimizer and step number are the whole state of a run: resumed
after ``kill -9`` it ends with the bits of the uninterrupted run (CPU, same number of threads, length in --steps; not
promised with --bf16; below 16 pixels oneDNN's bfloat16 gradients are not even finite: a 1 x 1 map, stride 2, and it
reads memory that nobody wrote).
Under torchrun every rank draws a batch of its own and mines in it; gradients are averaged. Batches of one epoch are of
different people; where an epoch has fewer than there are ranks, or ends among them, ranks may draw the same people.
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
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("training needs the packages of the extra: pip install '.[train]'") from error

from . import TripletLoss, _options, cached_step, data, evaluate, mine_triplets, models

PRESETS = {
    # AdaGrad 0.05, lowered at the end (paper section 3).
    "paper": {"optimizer": "adagrad", "lr": 0.05, "weight_decay": 0.0},
    # Adam's per-weight step with decoupled decay, warm-up and a cosine to zero: needs a fraction of the steps of
    # AdaGrad, whose rate only ever falls, and forgives the choice of lr.
    "modern": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05},
}
# Where the command line does not say; argparse knows no defaults, so that a resumed run can tell what was given anew.
DEFAULTS = {"hold_out": 0.1, "crop": 1.0, "dim": 128, "margin": 0.2, "negatives": "semi_hard", "positives": "all",
            "fallback": "farthest", "preset": "modern", "save_every": 100, "seed": 0}
# And for the digits (scans of 8 x 8), on a CPU, on a GPU (the paper's batch).
KEYS = ("network", "size", "people_per_batch", "images_per_person", "singletons", "steps")
SIZES = {
    "digits": ("mini", (16, 16), 16, 8, 0, 60),
    "cpu": ("mini", (48, 48), 45, 4, 0, 3000),
    "cuda": ("nn4", (96, 96), 45, 40, 200, 20000),
}
STATE = {"step": 0, "seconds": 0.0, "before": None, "best": -1.0, "mined": None}  # of a run, beside its weights
# A resumed run keeps these: its weights and optimizer fit no others, and it could be verified on people it trained on.
FIXED = ("network", "size", "dim", "no_batch_norm", "preset", "hold_out", "without_set", "seed", "out")
SUBSET = 4096  # images that offline mining looks through
SHOWN = ("loss", "active", "fallback", "d2_ap", "d2_an", "max_d2_ap")  # of each step, in metrics and TensorBoard


def within(kind, low, high=sys.float_info.max):
    """Of argparse: kind(text), where it lies in low ... high."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            wanted = f"in {low:g} ... {high:g}" if high < sys.float_info.max else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own words where the text is no number
    return parse


count, share, positive = within(int, 1), within(float, 0.01, 1), within(float, 0)


def find_device(name):
    """torch.device of a name; DataError where this machine has none such."""
    there = ["cpu", *["cuda"][:torch.cuda.device_count()], *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in there:
        raise data.DataError(f"device: {name!r} is not among those of this machine, {', '.join(there)}")
    return torch.device(name)


def flag(key):
    return "--" + key.replace("_", "-")


def add_arguments(parser):
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="FOLDER", help="folder of NAME/image files; without it, scikit-learn's digits")
    add("--people", metavar="FILE", help="LFW people list: train on these only (peopleDevTrain.txt, people.txt)")
    add("--without-set", type=count, metavar="K", help="leave out set K (1 to 10) of --people, the fold to test")
    add("--pairs", metavar="FILE", help="LFW pair list to verify on, whose people are left out of training; "
        "default: random pairs of people held out")
    add("--hold-out", type=within(float, 0, 1), metavar="SHARE", help="of people, without --pairs; 0: nobody (0.1)")
    add("--crop", type=share, metavar="SHARE", help="central share of each image to use (1.0)")
    add = parser.add_argument_group(
        "network and batch", "On a CPU mini at 48 pixels and batches of 45 people x 4 images; on a GPU nn4 at 96 and "
        "the paper's 45 x 40, and 200 singletons.").add_argument
    add("--network", choices=sorted(models.NETWORKS), help="the paper's, OpenFace's nn4_small2, or mini for CPUs")
    add("--size", type=pixels, metavar="H[xW]", help="input pixels; default: the table's where --network is given")
    add("--dim", type=count, metavar="D", help="length of the embedding (128)")
    add("--no-batch-norm", action="store_true", help="the paper's parameter counts; slower to train")
    add("--people-per-batch", type=count, metavar="P", help="more where there are fewer images than K of each")
    add("--images-per-person", type=count, metavar="K", help="at most, of each")
    add("--singletons", type=within(int, 0), metavar="S", help="people with one image in each batch: negatives")
    add("--chunk", type=count, metavar="N", help="embed N images at a time and run each chunk again for its gradient:"
        " the whole batch's loss in the memory of a chunk (with batch norm, statistics are the chunk's)")
    add = parser.add_argument_group("loss and optimizer").add_argument
    add("--margin", type=positive, help="in squared distance, which is 0 to 4 here (0.2)")
    add("--negatives", choices=_options.NEGATIVES,
        help="of each pair: the paper's, the closest of all, a random one, or every one (semi_hard)")
    add("--positives", choices=_options.POSITIVES, help="of each anchor (all)")
    add("--fallback", choices=_options.FALLBACKS, help="without a semi-hard negative (farthest)")
    add("--offline", type=count, metavar="STEPS", help="the paper's offline way: every STEPS, mine each anchor's "
        f"hardest positive and its negative over {SUBSET} images, and train on those (default: online, in each batch)")
    add("--preset", choices=sorted(PRESETS), help="modern: AdamW 0.001, warm-up, cosine, which needs "
        "fewer steps; paper: AdaGrad 0.05, lowered at the end (modern)")
    add("--lr", type=positive, help="learning rate; default: the preset's")
    add("--weight-decay", type=positive, metavar="DECAY", help="not of biases and batch norm; default: preset's")
    group = parser.add_argument_group("run")
    add = group.add_mutually_exclusive_group().add_argument
    add("--steps", type=count, help="length of the run (digits 60, on a CPU 3000, on a GPU 20000)")
    add("--minutes", type=within(float, 0.001), help="length on the clock, not in --steps; does not repeat to the bit")
    add = group.add_argument
    add("--verify-every", type=count, metavar="STEPS", help="default: as many epochs as make 200 steps, at least one")
    add("--save-every", type=count, metavar="STEPS", help="checkpoint for --resume (100)")
    add("--flip", action="store_true", help="verify on image and mirror image together")
    add("--out", metavar="DIR", help="checkpoints, metrics.jsonl, TensorBoard, of no run before; default: a new "
        "folder under runs/")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its options but for those given anew; "
        f"{', '.join(map(flag, FIXED))} stay")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--bf16", action="store_true", help="bfloat16 autocast; on a CPU for 16 pixels and more")
    add("--threads", type=count, help="CPU threads; default: all cores")
    add("--seed", type=within(int, 0), help="of weights, batches, augmentation and the people held out (0)")


def pixels(text):
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side nor HEIGHTxWIDTH in pixels")
    return (sides[0], sides[-1])


def complete(options):
    """Fill what the command line leaves open; the result is stored in the checkpoint."""
    def fill(defaults):
        for key, value in defaults.items():
            if getattr(options, key, None) is None:
                setattr(options, key, value)

    fill({**DEFAULTS, "device": "cuda" if torch.cuda.is_available() else "cpu"})
    where = "digits" if options.data is None else "cuda" if options.device.startswith("cuda") else "cpu"
    sizes = dict(zip(KEYS, SIZES[where], strict=True))
    if options.network and options.data is not None:
        sizes["size"] = models.NETWORKS[options.network].size
    fill({**sizes, **PRESETS[options.preset]})
    for key in ("data", "people", "pairs"):  # a run may be resumed from another folder
        if getattr(options, key) is not None:
            setattr(options, key, os.path.abspath(getattr(options, key)))
    if options.out is None:
        options.out = f"runs/{Path(options.data or 'digits').name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return options


def resumed(saved, options):
    """The options of a checkpoint, but for those given anew; DataError: one that is ``FIXED`` differs."""
    had = {**vars(parse([])), **saved["options"], "out": options.resume}
    given = {key: value for key, value in vars(options).items() if value is not None and value is not False}
    if os.path.realpath(options.out or options.resume) == os.path.realpath(options.resume):
        given["out"] = options.resume
    for key in FIXED:
        if key in given and given[key] != had[key]:
            raise data.DataError(f"{flag(key)}: got {given[key]!r}, but the run in {options.resume} has {had[key]!r}, "
                                 "and a resumed run keeps it")
    if "steps" in given:
        had["minutes"] = None  # which would count alone
    if (options.pairs or had["pairs"]) and "trained_on" not in saved["options"]:
        raise data.DataError(f"--pairs: the run in {options.resume} does not say whom it was trained on, as one of "
                             "another version; accepted are runs that do")
    return argparse.Namespace(**{**had, **given})


def shows_any(images, indices, names):
    """Whether each of the images is of one of the people of these names."""
    names = set(names)
    return np.isin(images.labels[indices], [label for label, name in enumerate(images.names) if name in names])


def load_data(options):
    """Images, the indices to train on and the pairs to verify on (None where nobody is held out).

    Notes by name who is left out of training, in ``options.held_out``, and who ever was in it, in
    ``options.trained_on``. A run that goes on keeps to both, whatever has become of its folder.
    """
    for key, needed in (("people", "data"), ("pairs", "data"), ("without_set", "people")):
        if getattr(options, key) is not None and getattr(options, needed) is None:
            raise data.DataError(f"{flag(key)}: got {getattr(options, key)} without {flag(needed)}, which it needs")
    if options.data is None:
        options.trained_on = []  # nobody of a folder that it may go on with
        images, train, unseen = data.digits(options.size)
        return images, train, data.draw_pairs(images.labels, unseen, 2400, options.seed)
    images = data.Images(*data.scan(options.data), options.size, options.crop)
    train, pairs = np.arange(len(images)), None
    if options.people:
        sets = data.read_people(options.people)
        if (options.without_set or 1) > len(sets):  # the fold to test would be trained on
            raise data.DataError(f"--without-set: got {options.without_set}; accepted are 1 to {len(sets)}, the sets "
                                 f"of {options.people}")
        wanted = {name for k, names in enumerate(sets, 1) if k != options.without_set for name in names}
        if missing := sorted(wanted.difference(images.names)):
            warnings.warn(f"{options.people}: {len(missing)} of {len(wanted)} people have no images in {options.data}, "
                          f"for example {missing[0]}", stacklevel=2)
        train = train[[images.names[label] in wanted for label in images.labels]]
    held, trained_on = (getattr(options, key, None) for key in ("held_out", "trained_on"))
    if options.pairs:
        pairs, judged = data.read_pairs(options.pairs, images.paths)
        if known := sorted(judged.intersection(trained_on or ())):
            raise data.DataError(f"--pairs: the run was trained on {len(known)} of the {len(judged)} people of "
                                 f"{options.pairs}, for example {known[0]}; accepted are pairs of others")
        left_out = shows_any(images, train, judged)
        if len(train) and left_out.all():
            raise data.DataError(f"--pairs: everybody to train on is in {options.pairs}, and left out of training; "
                                 "accepted are pairs of some of them, or of other people")
        if left_out.any() and held is None:
            people = len(np.unique(images.labels[train[left_out]]))
            warnings.warn(f"{people} people of --pairs are left out of training", stacklevel=2)
        held = options.held_out = sorted(judged.union(held or ()))
        train = train[~shows_any(images, train, held)]
    todo = train if pairs is None else np.unique(np.concatenate([train, pairs.a, pairs.b]))
    good = images.preload(todo, lambda work: tqdm(work, "reading images", len(todo), unit="img", disable=None))
    train = np.intersect1d(train, good)
    if options.pairs:  # here, before the run has a folder: can they be verified on at all?
        read = [not {a, b} & images.bad.keys() for a, b in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                evaluate.verify(np.where(read, 0.0, np.nan), pairs)
            except data.DataError as error:
                raise data.DataError(f"--pairs {options.pairs}: {error}") from None
    if pairs is None:
        if held is None:
            _, unseen = data.split_people(images.labels, train, options.hold_out, options.seed)
            options.held_out = held = [images.names[label] for label in np.unique(images.labels[unseen])]
        out = shows_any(images, train, held)
        train, unseen = train[~out], train[out]
        if held and not len(unseen):
            raise data.DataError(f"--data: {options.data} has no images of the {len(held)} people whom the run holds "
                                 f"out, for example {held[0]}; accepted are a folder that has, or --pairs")
        if held:
            pairs = data.draw_pairs(images.labels, unseen, 2400, options.seed)
    trained_on = {images.names[label] for label in np.unique(images.labels[train])}.union(trained_on or ())
    options.trained_on = sorted(trained_on)
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
    saved, device = read_checkpoint(path), find_device(device)
    options = argparse.Namespace(**saved["options"])
    model = models.create(options.network, options.dim, not options.no_batch_norm, options.size)
    model.load_state_dict(saved["model"])
    return model.to(device, memory_format=torch.channels_last).eval(), options


def read_checkpoint(path):
    """What ``Run.save`` wrote, of a file or as the last one of a run's folder, on the CPU."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in (*STATE, "model", "optimizer", "options")}
    except Exception as error:  # of a file that is something else: whatever the unpickler runs into
        raise data.DataError(f"{path}: no checkpoint of facenet-ext train ({type(error).__name__})") from error


@contextmanager
def interrupts():
    """A list of the signals so far: the first Ctrl-C or SIGTERM asks the loop to stop after its step, another kills."""
    asked = []

    def ask(number, _):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Log:
    """metrics.jsonl and TensorBoard; on resume the records after the checkpoint are dropped, they will come again.

    verified: the verification after ``step`` steps is behind the checkpoint, and will not come again.
    """

    def __init__(self, out, step, verified):
        path = out / "metrics.jsonl"
        text, kept = path.read_text("utf-8", "replace") if (step or verified) and path.exists() else "", []
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            try:
                record = json.loads(line)
                behind = record["step"] < step + (verified and record["kind"] == "verification")
            except (ValueError, KeyError, TypeError):
                if line.endswith("\n"):  # else a kill cut it short
                    warnings.warn(f"{path}, line {number}: dropped, it is no record of a run", stacklevel=2)
                continue
            if behind and line.endswith("\n"):
                kept.append((line, record))
        with data.atomic(path) as file:
            file.writelines(line.encode() for line, _ in kept)
        self.file = open(path, "a", buffering=1)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and no other command needs it
        while any(out.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)  # TensorBoard reads files by the second they were made in, then by process id
        self.board = SummaryWriter(str(out), purge_step=step)
        for _, record in kept:
            if record["step"] == step:  # purged with what comes again
                self.plot(**record)

    def __call__(self, step, kind, **values):
        with data.naming(self.file.name):
            self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self.plot(step, kind, **values)

    def plot(self, step, kind, **values):
        for key, value in values.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{kind}/{key}", value, step)


class Run:
    """A training run: what it needs, in the order in which it needs it.

    saved: the checkpoint to go on from. loaded: instead of what ``load_data`` gives.
    """

    clock = staticmethod(time.monotonic)  # seconds, for --minutes

    def __init__(self, options, saved=None, loaded=None):
        self.options, self.out = options, Path(options.out)
        self.rank, self.world = (int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.images, indices, self.pairs = loaded or load_data(options)
        self.sampler = data.IdentitySampler(self.images.labels, options.people_per_batch, options.images_per_person,
                                            options.singletons, options.seed, indices)
        self.model = models.create(options.network, options.dim, not options.no_batch_norm, options.size)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, options)
        self.criterion = TripletLoss(options.margin, negatives=options.negatives, positives=options.positives,
                                     fallback=options.fallback)
        self.state = dict(STATE)
        if saved:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved["optimizer"]["state"]})
            self.state = {key: saved[key] for key in self.state}
            if any(saved["options"].get(key) != getattr(options, key) for key in ("pairs", "flip")):
                self.state["best"] = STATE["best"]  # accuracies of another kind
            self.say(f"resumed {self.out} at step {self.state['step']}")
        self.wrapped = DistributedDataParallel(self.model) if self.world > 1 else self.model
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            over = self.state["seconds"] >= 60 * options.minutes if options.minutes else \
                self.state["step"] >= options.steps  # a finished run is verified again
            self.log = Log(self.out, self.state["step"], saved is not None and not over)
        self.say(f"{len(indices)} images to train on: {len(self.sampler.groups)} people with two or more, "
                 f"{len(self.sampler.single)} with one; {options.network} at {options.size[0]} x {options.size[1]} on "
                 f"{self.device}" + f", {self.world} ranks" * (self.world > 1)
                 + "; nobody is held out, so nothing is verified" * (self.pairs is None) + f"; files in {self.out}")

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
                torch.save({**self.state, "model": self.model.state_dict(),
                            "optimizer": self.optimizer.state_dict(), "options": vars(self.options)}, file)
            self.log.board.flush()

    def read(self, step):
        """uint8 images and labels of a step; for offline mining anchors, positives and negatives one after another."""
        if not self.options.offline:
            return self.images.batch(self.sampler.batch(step * self.world + self.rank))
        mined = self.state["mined"]
        count = min(len(mined), self.options.people_per_batch * self.options.images_per_person // 3)
        draw = np.random.default_rng([self.options.seed, 5, step, self.rank])
        return self.images.batch(mined.numpy()[draw.choice(len(mined), count, replace=False)].T.reshape(-1))

    def mine(self, step):
        """Each anchor's hardest positive and the negative for it, over some people, with the weights as they are."""
        some = np.random.default_rng([self.options.seed, 6, step]).permutation(len(self.sampler.groups))
        pool = np.concatenate([self.sampler.groups[g] for g in some[:SUBSET]])[:SUBSET]
        pool = pool[[self.images.get(int(i)) is not None for i in pool]]
        vectors = torch.from_numpy(evaluate.embed(self.model, self.images, pool, self.device))
        found = mine_triplets(vectors, torch.from_numpy(self.images.labels[pool]), margin=self.options.margin,
                              negatives=self.options.negatives, positives="hardest", fallback=self.options.fallback)
        taken = found.d2_ap - found.d2_an + self.options.margin > 0
        if not taken.any():
            raise data.DataError(f"--offline: at step {step} no triplet of {len(pool)} images violates the margin")
        triplets = torch.stack([found.anchor, found.positive, found.negative], 1)[taken]
        self.state["mined"] = torch.from_numpy(pool)[triplets]

    def loss(self, vectors, labels):
        """The loss, the criterion's or that of the triplets mined offline, and the rest of ``SHOWN``."""
        if not self.options.offline:
            loss, stats = self.criterion(vectors, labels, return_stats=True)
            count = stats.pairs.clamp(min=1)
            return (loss, stats.active / count, stats.fallback / count, stats.mean_d2_ap, stats.mean_d2_an,
                    stats.max_d2_ap)
        anchor, positive, negative = vectors.view(3, -1, vectors.shape[1])
        d2_ap, d2_an = ((anchor - other).square().sum(1) for other in (positive, negative))
        hinge = (d2_ap - d2_an + self.options.margin).relu()
        return (hinge.mean(), (hinge > 0).float().mean(), (d2_an <= d2_ap).float().mean(), d2_ap.mean(), d2_an.mean(),
                d2_ap.max())

    def step(self, step, pixels, labels):
        """From uint8 images and their labels to new weights; returns what to show, by name."""
        start = time.monotonic()
        x = data.augment(pixels, self.model.input_size, [self.options.seed, 4, step, self.rank], self.device,
                         mirror=self.options.data is not None)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            values = cached_step(self.wrapped, x, labels.to(self.device), self.loss, chunk=self.options.chunk or None)
        self.optimizer.step()
        values = torch.stack([value.detach().float() for value in values]).tolist()  # waits for the device, once
        shown = dict(zip(SHOWN, values, strict=True))
        if not math.isfinite(shown["loss"]):
            raise data.DataError(f"step {step}: the loss is {shown['loss']}; the last checkpoint is "
                                 f"{self.out / 'last.pt'}: --resume {self.out} with a lower --lr, or start anew")
        shown["images/s"] = self.world * len(labels) / (time.monotonic() - start)
        if step >= 20 and shown["max_d2_ap"] < 1e-3 and shown["loss"] > 0.95 * self.options.margin:
            warnings.warn("the embedding has collapsed to a point: all distances are 0, the loss is the margin and "
                          "has no gradient; use a lower --lr, more --people-per-batch or batch norm", stacklevel=2)
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
        epoch = max(1, len(self.sampler) // self.world)
        every = options.verify_every or epoch * -(-200 // epoch)
        limit = sys.maxsize if options.minutes else options.steps
        if state["before"] is None:
            state["before"] = self.check("before")
            self.save()
        began = self.clock() - state["seconds"]
        bar = tqdm(total=None if options.minutes else limit, initial=state["step"], unit="step",
                   disable=True if self.rank else None)
        ready, asked = None, False
        with interrupts() as signals, ThreadPoolExecutor(1) as ahead, bar:
            self.wrapped.train()
            while state["step"] < limit:
                step = state["step"]
                progress = (self.clock() - began) / (60 * options.minutes) if options.minutes else step / limit
                progress, asked = self.agree(progress, bool(signals))
                if progress >= 1 or asked:
                    break
                torch.manual_seed(int(np.random.SeedSequence([options.seed, 7, step, self.rank]).generate_state(1)[0]))
                for group in self.optimizer.param_groups:
                    group["lr"] = options.lr * rate(progress, options.preset)
                if options.offline and (step % options.offline == 0 or state["mined"] is None):
                    self.mine(step)
                batch = ready.result() if ready else self.read(step)
                ready = None if options.offline else ahead.submit(self.read, step + 1)
                shown = self.step(step, *batch)
                state["step"], state["seconds"] = step + 1, self.clock() - began
                if self.rank == 0:
                    self.log(step, "step", **shown, lr=group["lr"], images=len(batch[1]))
                    bar.set_postfix({k: f"{shown[k]:.3g}" for k in ("loss", "active", "fallback", "images/s")},
                                    refresh=False)
                    bar.update()
                verify = state["step"] % every == 0 and state["step"] < limit
                if verify:
                    self.check(f"step {state['step']}")
                if verify or state["step"] % options.save_every == 0:  # last.pt knows the best that best.pt has to beat
                    self.save()
        self.save()
        if asked:
            self.say(f"stopped after step {state['step']}; go on with --resume {self.out}")
            raise SystemExit(130)
        after = self.check("after")
        self.save()
        return state["before"], after


def start(options):
    """Fill in the options, those of a run resumed first, and train; under torchrun as one of several ranks."""
    saved, given = None, options
    if options.resume:
        saved = read_checkpoint(Path(options.resume) / "last.pt")
        options = resumed(saved, options)
    for key in ("hold_out", "crop"):
        value = getattr(given, key)
        if options.data is None and value is not None and not (saved and value == saved["options"].get(key)):
            raise data.DataError(f"{flag(key)}: got {value} without --data, which it needs")
    if given.hold_out is not None and options.pairs:
        raise data.DataError(f"--hold-out: got {given.hold_out} beside --pairs, whose people are held out")
    options = complete(options)
    if not saved and (Path(options.out) / "last.pt").exists():  # on every rank: none can write before all are here
        raise data.DataError(f"--out: {options.out} holds a run; --resume {options.out} goes on with it")
    find_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = options.device.startswith("cuda")
        if cuda:
            options.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(options.device)
        distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        return Run(options, saved).train()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def parse(argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    from .cli import main

    main(["train", *sys.argv[1:]])
