"""Faces on disk to batches: an image folder, the identity sampler, the embedded digits, the LFW lists.

    NAME/file.jpg --scan--> paths, labels --Images--> uint8 [B, H, W, 3] --augment--> float [B, 3, H, W]
                                 |
                          IdentitySampler: batch(step) -> indices, a pure function of (seed, step)

Nothing here keeps state between steps: a run resumed at step t draws what the uninterrupted run draws at step t.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

SMALLEST = 8  # pixels: below that (a tracking pixel, a 1 x 1 placeholder) there is no face to learn from
CACHE_BYTES = 8 << 30


class DataError(ValueError):
    """The data cannot serve: the message says what was found and what is needed."""


@contextmanager
def atomic(path):
    """A binary file to write that appears under its name whole or not at all, whenever the process dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_image(path, size: tuple[int, int], crop: float = 1.0) -> np.ndarray:
    """uint8 [height, width, 3]: the central ``crop`` share of an image file, upright, resized to ``size``.

    EXIF rotation is applied, transparency laid over white, 16-bit grey scaled to 8 bits, CMYK and palettes converted.
    DataError: anything else (no regular file, empty, not an image, truncated, smaller than 8 pixels); gives the reason.
    """
    if not os.path.isfile(path):  # a pipe or a device named .jpg would block forever
        raise DataError("not a regular file")
    if not os.path.getsize(path):
        raise DataError("empty file")
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":  # decodes a 12-megapixel photo at 1/8 size, eight times faster
                image.draft(None, (int(2 * max(size) / crop),) * 2)
            image = ImageOps.exif_transpose(image)
            if min(image.size) < SMALLEST:
                raise DataError(f"only {image.width} x {image.height} pixels, at least {SMALLEST} needed")
            image = _to_rgb(image)
            image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS, bleed=(1 - crop) / 2)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, bomb errors
        raise DataError(f"{type(error).__name__}: {error}".replace(repr(str(path)), "the file")) from error
    return np.asarray(image)


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip everything above 255 to white
        grey = np.asarray(image).astype(np.float32)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError("32-bit pixels of unknown range")
        return Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("floating-point pixels of unknown range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def scan(root) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths, labels [N] int64 and names of root/NAME/file, sorted by name, then file.

    Hidden files are ignored. Folders are not descended into, and a folder seen before (a link to itself, to a parent,
    to another person) is named and skipped: a loop ends, and nobody gets two names.
    DataError: no such folder, no person in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a folder of NAME/image files")
    seen = {parent.resolve() for parent in (root, *root.resolve().parents)}
    paths, labels, names = [], [], []

    def skip(entry, reason):
        warnings.warn(f"{entry}: skipped ({reason})", stacklevel=3)

    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not os.path.isdir(folder):
            continue
        if (real := folder.resolve()) in seen:
            skip(folder, "a link to a folder that counts already")
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            skip(folder, error.strerror)
            continue
        for entry in entries:
            if os.path.isdir(entry):
                skip(entry, "a folder inside a person's folder")
            elif not entry.name.startswith("."):
                paths.append(str(entry))
                labels.append(len(names))
        if labels and labels[-1] == len(names):
            names.append(folder.name)
    if not paths:
        raise DataError(f"{root}: no images; expected a folder of NAME/image files")
    return paths, np.array(labels, np.int64), names


class Images:
    """Labelled images, each decoded once and kept as uint8 at the working size, so that reading never starves a step.

    paths, labels [N], names: as from ``scan``. size: (height, width). crop: the central share of each image to keep. A
    file that cannot be read is named once, by a warning at first touch, and left out of every batch.
    """

    def __init__(self, paths, labels, names, size, crop=1.0, cache_bytes=CACHE_BYTES):
        self.paths, self.labels, self.names = list(paths), np.asarray(labels, np.int64), list(names)
        self.size, self.crop = tuple(size), crop
        self.bad = {}  # index -> reason
        self._cache = {}
        self._room = cache_bytes // (3 * size[0] * size[1])

    def __len__(self):
        return len(self.paths)

    def get(self, index: int) -> np.ndarray | None:
        if (pixels := self._cache.get(index)) is None and index not in self.bad:
            try:
                pixels = read_image(self.paths[index], self.size, self.crop)
            except DataError as error:
                self.bad[index] = str(error)
                warnings.warn(f"{self.paths[index]}: skipped ({error})", stacklevel=2)
                return None
            if len(self._cache) < self._room:
                self._cache[index] = pixels
        return pixels

    def preload(self, indices, progress=iter) -> np.ndarray:
        """Decode on all cores; the good ones among ``indices``. More than the cache has room for: nothing is read."""
        indices = np.asarray(indices)
        if len(indices) <= self._room:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL while it decodes
                for _ in progress(pool.map(self.get, indices.tolist())):
                    pass
        return indices[[i not in self.bad for i in indices.tolist()]]

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, H, W, 3] and labels [B] of the readable ones among ``indices``."""
        kept = [(pixels, self.labels[i]) for i in map(int, indices) if (pixels := self.get(i)) is not None]
        if not kept:
            raise DataError(f"none of the {len(indices)} images of a batch can be read, for example "
                            f"{self.paths[int(indices[0])]}" if len(indices) else "an empty batch")
        pixels, labels = zip(*kept, strict=True)
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.array(labels))


def digits(size, unseen: tuple[int, ...] = (4, 6, 9)) -> tuple[Images, np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (real scans, 8 x 8 grey), enlarged to ``size``: each digit a person.

    Seven people are few to learn from what tells people apart. Digits turned by quarters are further people, a usual
    trick with characters; 0, 1, 2, 5 and 8 look alike upside down, so they get two turns and not four, and as a 6
    turned is a 9 both are held out. Returns all images, the indices to train on and those of the ``unseen`` digits,
    which stand upright.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    paths, labels, pixels = [], [], []
    for turns in range(4):
        for i, digit in enumerate(data.target):
            if turns and (digit in unseen or turns > 1 and digit in (0, 1, 2, 5, 8)):
                continue
            grey = Image.fromarray((np.rot90(data.images[i], turns) * 255 / 16).round().astype(np.uint8))  # 0 ... 16
            pixels.append(np.asarray(grey.resize(size[::-1], Image.Resampling.BICUBIC).convert("RGB")))
            paths.append(f"digit {digit}, scan {i}, turned {turns * 90} degrees")
            labels.append(digit + 10 * turns)
    images = Images(paths, labels, [f"{n % 10} turned {n // 10 * 90}" for n in range(40)], size)
    images._cache = dict(enumerate(pixels))
    held_out = np.isin(labels, unseen)
    return images, np.flatnonzero(~held_out), np.flatnonzero(held_out)


class IdentitySampler:
    """Batches of P people x K images and S people with a single image, who serve as negatives.

    labels [N]: identity of each image. indices: the images to draw from (default all). Every epoch visits every person
    with two or more images once, in a new order; K images are drawn without repetition, all if there are fewer, and
    then more people fill the batch to about P x K. With rank and world, rank r takes every world-th batch.
    batch(step) depends on (seed, step) alone: any step can be drawn at any time, in any order.
    DataError: nobody has two images, so there is no anchor-positive pair.
    """

    def __init__(self, labels, people=45, images=40, singletons=0, seed=0, indices=None, rank=0, world=1):
        if people < 2 or images < 2:
            raise DataError(f"people, images per person: got {people} x {images}; at least 2 x 2 are needed for a "
                            "triplet")
        labels = np.asarray(labels)
        indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
        groups = np.split(indices[order := np.argsort(labels[indices], kind="stable")],
                          np.flatnonzero(np.diff(labels[indices][order])) + 1) if len(indices) else []
        self.groups = [group for group in groups if len(group) > 1]
        self.single = np.concatenate([group for group in groups if len(group) == 1] or [np.zeros(0, np.int64)])
        if not self.groups or len(self.groups) + min(singletons, len(self.single)) < 2:
            raise DataError(f"nothing to train on: {len(indices)} images of {len(groups)} people, {len(self.groups)} "
                            "with two or more; needed are two of those, or one and singletons beside")
        self.images, self.singletons, self.seed, self.rank, self.world = images, singletons, seed, rank, world
        taken = np.minimum([len(group) for group in self.groups], images)
        self.batches = max(1, int(taken.sum()) // (people * images))  # per epoch
        self.target = people * images
        self._taken = taken

    def __len__(self):
        """Steps per epoch."""
        return max(1, self.batches // self.world)

    def batch(self, step: int) -> np.ndarray:
        """Indices [B] of one batch; equal people stand together."""
        epoch, place = divmod(step * self.world + self.rank, self.batches)
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.groups))
        start = np.cumsum(self._taken[order]) - self._taken[order]
        chosen = order[(start >= place * self.target) & (start < (place + 1) * self.target)]
        draw = np.random.default_rng([self.seed, epoch, 1 + place])
        parts = [draw.choice(self.groups[g], self._taken[g], replace=False) for g in chosen]
        parts.append(draw.choice(self.single, min(self.singletons, len(self.single)), replace=False))
        return np.concatenate(parts)


def augment(pixels, size: tuple[int, int], seed=None, device="cpu", mirror=True) -> torch.Tensor:
    """float [B, 3, H, W], about -1 ... 1, channels last, of uint8 [B, h, w, 3].

    seed None: resized only (evaluation). Otherwise each image is mirrored with probability 1/2 (``mirror``), scaled by
    0.9 to 1.1, turned by up to 8 degrees, shifted by up to 5 %, its brightness and contrast changed by up to 20 %; the
    same seed gives the same images.
    """
    x = pixels.to(device).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
    if seed is None:
        return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)
    n = len(x)
    draw = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, 7)).astype(np.float32)).to(device)
    side = draw[:, 0].sign() if mirror else torch.ones(n, device=device)
    scale, angle = 1 + 0.1 * draw[:, 1], np.deg2rad(8) * draw[:, 2]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos * side, -sin, 0.1 * draw[:, 3], sin * side, cos, 0.1 * draw[:, 4]], 1).view(n, 2, 3)
    x = F.grid_sample(x, F.affine_grid(theta, (n, 3, *size), align_corners=False), padding_mode="border",
                      align_corners=False)
    contrast, brightness = 1 + 0.2 * draw[:, 5], 0.2 * draw[:, 6]
    x = x * contrast.view(n, 1, 1, 1) + brightness.view(n, 1, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


class Pairs(NamedTuple):
    """Verification pairs: image indices a, b [P], same [P] bool, folds [P] (or None where the list has one set)."""

    a: np.ndarray
    b: np.ndarray
    same: np.ndarray
    folds: np.ndarray | None


def draw_pairs(labels, indices, count: int, seed: int = 0) -> Pairs:
    """``count`` random pairs among ``indices``, half of them same, none twice; fewer where there are no more."""
    labels, indices = np.asarray(labels), np.asarray(indices)
    rng = np.random.default_rng([seed, 2])
    groups = [indices[labels[indices] == label] for label in np.unique(labels[indices])]
    several = [group for group in groups if len(group) > 1]
    if not several or len(groups) < 2:
        raise DataError("no pairs to verify with: two people are needed, one of them with two images")
    found = {True: set(), False: set()}
    for _ in range(20 * count):
        same = len(found[True]) <= len(found[False])
        if same:
            pair = rng.choice(several[rng.integers(len(several))], 2, replace=False)
        else:
            pair = [rng.choice(groups[g]) for g in rng.choice(len(groups), 2, replace=False)]
        found[same].add((int(min(pair)), int(max(pair))))
        if len(found[True]) + len(found[False]) == count:
            break
    pairs = rng.permutation(np.array(sorted(found[True] | found[False])))
    return Pairs(*pairs.T, labels[pairs[:, 0]] == labels[pairs[:, 1]], None)


def split_people(labels, indices, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and of held-out people: ``share`` of those with two or more images, at least two of them."""
    labels, indices = np.asarray(labels), np.asarray(indices)
    people, counts = np.unique(labels[indices], return_counts=True)
    several = people[counts > 1]
    if len(several) < 4:
        return indices, indices[:0]
    held = np.random.default_rng([seed, 3]).choice(several, max(2, round(share * len(several))), replace=False)
    out = np.isin(labels[indices], held)
    return indices[~out], indices[out]


def read_people(path) -> list[list[str]]:
    """The names of an LFW people list, one list per set (one in peopleDevTrain.txt, ten in people.txt)."""
    lines = [line.split() for line in Path(path).read_text().splitlines() if line.strip()]
    if len(lines) > 1 and len(lines[0]) == len(lines[1]) == 1:  # the number of sets, before the first set's count
        del lines[0]
    sets = []
    while lines:
        (head, *more), lines = lines[0], lines[1:]
        if more or not head.isdigit():
            raise DataError(f"{path}: {' '.join([head, *more])!r} stands where the number of people of a set is due")
        if len(lines) < int(head) or any(len(line) != 2 for line in lines[:int(head)]):
            raise DataError(f"{path}: {head} people are announced, but lines of name and number are fewer")
        sets.append([name for name, _ in lines[:int(head)]])
        del lines[:int(head)]
    if not sets:
        raise DataError(f"{path}: no people in it")
    return sets


def read_pairs(path, paths: list[str]) -> Pairs:
    """An LFW pair list (View 1 pairsDev*.txt or the ten sets of pairs.txt) as indices into ``paths``.

    Pairs whose image is missing are left out, and a warning says how many. DataError: a malformed line, no pair left.
    """
    where = {(Path(p).parent.name, Path(p).stem): i for i, p in enumerate(paths)}
    head, *lines = Path(path).read_text().strip().split("\n")
    try:
        sets, each = map(int, head.split() if len(head.split()) == 2 else (1, head))
    except ValueError:
        raise DataError(f"{path}, first line: {head!r} is neither a number of pairs nor sets and pairs") from None
    rows, missing = [], []
    for number, line in enumerate(lines):
        fields = line.split()
        if len(fields) not in (3, 4):
            raise DataError(f"{path}, line {number + 2}: {line!r} is not a pair (NAME i j or NAME i NAME j)")
        name_a, i, name_b, j = fields if len(fields) == 4 else (fields[0], fields[1], fields[0], fields[2])
        a, b = (where.get((name, f"{name}_{int(k):04d}")) for name, k in ((name_a, i), (name_b, j)))
        if a is None or b is None:
            missing.append(line)
        else:
            rows.append((a, b, len(fields) == 3, number // (2 * each)))
    if missing:
        warnings.warn(f"{path}: {len(missing)} of {len(lines)} pairs left out, an image is missing; the first: "
                      f"{missing[0]!r}", stacklevel=2)
    if not rows:
        raise DataError(f"{path}: none of the {len(lines)} pairs has both images in the folder")
    a, b, same, folds = (np.array(column) for column in zip(*rows, strict=True))
    return Pairs(a, b, same.astype(bool), folds if sets > 1 else None)
