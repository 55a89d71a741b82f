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
def naming(path):
    """What fails inside because of the system (a full disk) says of which file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of it
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


@contextmanager
def atomic(path):
    """A binary file to write that appears under its name whole or not at all, whenever the process dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with naming(path), open(part, "wb") as file:
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
        raise DataError(f"{type(error).__name__}: {error}".replace(f" {str(path)!r}", "")) from error
    return np.asarray(image)


def _to_rgb(image):
    if image.mode[0] in "IF":  # 16 bits and more; Pillow's own conversion would clip everything above 255 to white
        grey = np.asarray(image).astype(np.float32)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"32-bit pixels (mode {image.mode}) of unknown range")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def scan(root) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths, labels [N] int64 and names of root/NAME/file, sorted by name, then file.

    Hidden files are ignored. Skipped with a warning are files beside the people's folders, folders inside them, folders
    seen before (a link to itself, to a parent, to another person): a loop ends, and nobody gets two names.
    DataError: no such folder, no person in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a folder of NAME/image files")
    seen = {parent.resolve() for parent in (root, *root.resolve().parents)}
    paths, labels, names = [], [], []

    def skip(entry, reason):
        warnings.warn(f"{entry}: skipped ({reason})", stacklevel=3)

    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    loose = [path for path in visible if not os.path.isdir(path)]
    for folder in filter(os.path.isdir, visible):
        if (real := folder.resolve()) in seen:
            skip(folder, "a link to a folder that counts already")
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            skip(folder, error.strerror)
            continue
        for entry in filter(os.path.isdir, entries):
            skip(entry, "a folder inside a person's folder")
        files = [str(path) for path in entries if not os.path.isdir(path) and not path.name.startswith(".")]
        if files:
            paths += files
            labels += [len(names)] * len(files)
            names.append(folder.name)
    if not paths:
        found = "files, but no people" if loose else "no images"
        raise DataError(f"{root}: {found}; expected a folder of NAME/image files")
    if loose:
        warnings.warn(f"{root}: {len(loose)} files beside the people's folders skipped, for example {loose[0].name}",
                      stacklevel=2)
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
            raise DataError(f"none of the {len(indices)} images of a batch can be read")
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

    scans, parts, labels = load_digits(), [], []
    for turns, digit in np.ndindex(4, 10):
        if not turns or digit not in unseen and (turns == 1 or digit not in (0, 1, 2, 5, 8)):
            parts.append(np.rot90(scans.images[scans.target == digit], turns, (1, 2)))
            labels += [digit + 10 * turns] * len(parts[-1])
    grey = torch.from_numpy(np.concatenate(parts)).unsqueeze(1) * (255 / 16)  # the scans hold 0 ... 16
    pixels = F.interpolate(grey, size, mode="bicubic").clamp(0, 255).round().byte().expand(-1, 3, -1, -1)
    names = [f"{n % 10} turned {n // 10 * 90} degrees" for n in range(40)]
    images = Images([f"digit {names[label]}, scan {i}" for i, label in enumerate(labels)], labels, names, size)
    images._cache = dict(enumerate(pixels.permute(0, 2, 3, 1).contiguous().numpy()))
    held_out = np.isin(labels, unseen)
    return images, np.flatnonzero(~held_out), np.flatnonzero(held_out)


class IdentitySampler:
    """Batches of P people x K images and S people with a single image, who serve as negatives.

    labels [N]: identity of each image. indices: the images to draw from (default all). An epoch visits the people with
    two or more images in a new order, each at most once: those who would not fill a last batch are left out of it,
    others each time (where all of them fill no batch, all are in it). K images are drawn without repetition, all if
    there are fewer, and then more people fill the batch to about P x K. batch(number) depends on (seed, number) alone:
    any one can be drawn at any time, in any order, by any rank. len(): batches of an epoch.
    DataError: nobody has two images, so there is no anchor-positive pair.
    """

    def __init__(self, labels, people=45, images=40, singletons=0, seed=0, indices=None):
        if people < 2 or images < 2:
            raise DataError(f"people, images per person: got {people} x {images}; at least 2 x 2 are needed for a "
                            "triplet")
        labels = np.asarray(labels)
        indices = np.arange(len(labels)) if indices is None else np.asarray(indices, np.int64)
        indices = indices[np.argsort(labels[indices], kind="stable")]
        everybody = np.split(indices, np.flatnonzero(np.diff(labels[indices])) + 1)
        self.groups = [group for group in everybody if len(group) > 1]
        self.single = np.array([group[0] for group in everybody if len(group) == 1], np.int64)
        if not self.groups or len(self.groups) + min(singletons, len(self.single)) < 2:
            raise DataError(f"nothing to train on: {len(indices)} images of {len(self.groups) + len(self.single)} "
                            f"people, {len(self.groups)} with two or more; needed are two of those, or one and "
                            "singletons beside")
        self.seed, self.singletons, self.target = seed, min(singletons, len(self.single)), people * images
        self.taken = np.minimum([len(group) for group in self.groups], images)  # of each of the groups

    def __len__(self):
        return max(1, int(self.taken.sum()) // self.target)

    def batch(self, number: int) -> np.ndarray:
        """Indices [B] of one batch; equal people stand together."""
        epoch, place = divmod(number, len(self))
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.groups))
        batch_of = (np.cumsum(self.taken[order]) - self.taken[order]) // self.target  # the rest of an epoch is not used
        draw = np.random.default_rng([self.seed, epoch, 1 + place])
        parts = [draw.choice(self.groups[g], self.taken[g], replace=False) for g in order[batch_of == place]]
        return np.concatenate([*parts, draw.choice(self.single, self.singletons, replace=False)])


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
    """Verification pairs: image indices a, b [P], same [P] bool, folds [P] of 0 ... sets - 1 (or None where the list
    has one set); a fold whose images are missing has no pairs."""

    a: np.ndarray
    b: np.ndarray
    same: np.ndarray
    folds: np.ndarray | None
    sets: int = 1


def draw_pairs(labels, indices, count: int, seed: int = 0) -> Pairs:
    """``count`` random pairs among ``indices`` of labels [N], half same, none twice; fewer where there are no more."""
    rng = np.random.default_rng([seed, 2])
    groups = [indices[labels[indices] == label] for label in np.unique(labels[indices])]
    several = [group for group in groups if len(group) > 1]
    if not several or len(groups) < 2:
        raise DataError("no pairs to verify with: two people are needed, one of them with two images")
    same, different = set(), set()
    for _ in range(20 * count):  # where there are few pairs, most that are drawn are there already
        if len(same) + len(different) == count:
            break
        if len(same) <= len(different):
            same.add(tuple(sorted(rng.choice(several[rng.integers(len(several))], 2, replace=False).tolist())))
        else:
            two = rng.choice(len(groups), 2, replace=False)
            different.add(tuple(sorted(int(rng.choice(groups[g])) for g in two)))
    pairs = rng.permutation(sorted(same | different))
    return Pairs(*pairs.T, labels[pairs[:, 0]] == labels[pairs[:, 1]], None)


def split_people(labels, indices, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and of held-out people: ``share`` of those with two or more images, at least two of them.

    With share 0, or of fewer than four such people, nobody is held out.
    """
    people, counts = np.unique(labels[indices], return_counts=True)
    several = people[counts > 1]
    held = max(2, round(share * len(several))) if share and len(several) >= 4 else 0
    out = np.isin(labels[indices], np.random.default_rng([seed, 3]).choice(several, held, replace=False))
    return indices[~out], indices[out]


def _read_text(path):
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def is_number(text):
    return text.isdecimal() and len(text) < 19  # int() refuses thousands of digits, and numpy more than 64 bits


def read_people(path) -> list[list[str]]:
    """The names of an LFW people list, one list per set (one in peopleDevTrain.txt, ten in people.txt)."""
    sizes, sets = [], []
    for line in _read_text(path).splitlines():
        match line.split():
            case [size] if is_number(size):
                sizes.append(int(size))
                sets.append([])
            case [name, _] if sets:
                sets[-1].append(name)
            case [_, *_]:
                raise DataError(f"{path}: {line!r} is neither the size of a set nor NAME NUMBER after one")
    if len(sets) > 1 and not sets[0]:  # the first line was the number of sets
        del sizes[0], sets[0]
    if not any(sets) or [*map(len, sets)] != sizes:
        raise DataError(f"{path}: sets of {sizes} people are announced, of {[*map(len, sets)]} are there")
    return sets


def read_pairs(path, paths: list[str]) -> tuple[Pairs, set[str]]:
    """An LFW pair list (View 1 pairsDev*.txt or the ten sets of pairs.txt) as indices into ``paths``; all names in it.

    Pairs whose image is missing are left out, and a warning says how many. DataError: a malformed line, no pair left.
    """
    where = {(Path(p).parent.name, Path(p).stem): i for i, p in enumerate(paths)}
    head, *lines = _read_text(path).strip().split("\n")
    try:
        sets, each = map(int, head.split() if len(head.split()) == 2 else (1, head))
        if not 1 <= min(sets, each) <= max(sets, each) < 1 << 31:
            raise ValueError
    except ValueError:
        raise DataError(f"{path}, first line: {head!r} is neither a number of pairs, 1 or more, nor sets and "
                        "pairs") from None
    if sets > 1 and len(lines) != 2 * sets * each:
        raise DataError(f"{path}, first line: {head!r} announces {2 * sets * each} pairs, {len(lines)} are there")
    rows, missing, names = [], [], set()
    for number, line in enumerate(lines):
        match line.split():
            case [name, i, j] if is_number(i) and is_number(j):
                other = name
            case [name, i, other, j] if is_number(i) and is_number(j):
                pass
            case _:
                raise DataError(f"{path}, line {number + 2}: {line!r} is not a pair (NAME i j or NAME i NAME j)")
        names |= {name, other}
        ends = where.get((name, f"{name}_{int(i):04d}")), where.get((other, f"{other}_{int(j):04d}"))
        if None in ends:
            missing.append(line)
        else:
            rows.append((*ends, name == other, number // (2 * each)))
    if missing:
        warnings.warn(f"{path}: {len(missing)} of {len(lines)} pairs left out, an image is missing; the first: "
                      f"{missing[0]!r}", stacklevel=2)
    if not rows:
        raise DataError(f"{path}: none of the {len(lines)} pairs has both images in the folder")
    a, b, same, folds = (np.array(column) for column in zip(*rows, strict=True))
    return Pairs(a, b, same.astype(bool), folds if sets > 1 else None, sets), names
