"""Files of every kind, the sampler's promises, the LFW lists."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facenet_ext import data

SIZE = (12, 12)


def picture(path, mode="RGB", colour=(200, 40, 90), size=(24, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def folder(root, people):
    """People with the given numbers of images, each person in a colour of their own."""
    for number, (name, count) in enumerate(people.items()):
        for i in range(count):
            picture(root / name / f"{name}_{i + 1:04d}.png", colour=(40 * number, 5 * i, 99))
    return root


# --- one image

@pytest.mark.parametrize("mode, suffix, expected", [
    ("RGB", "png", (200, 40, 90)), ("L", "png", 94), ("1", "png", None), ("P", "png", (200, 40, 90)),
    ("CMYK", "tif", (200, 40, 90)), ("CMYK", "jpg", (200, 40, 90)), ("LA", "png", 94),
    ("RGBA", "png", (200, 40, 90)),
])
def test_colour_modes_become_rgb(tmp_path, mode, suffix, expected):
    pixels = data.read_image(picture(tmp_path / f"a.{suffix}", mode), SIZE)
    assert pixels.shape == (12, 12, 3) and pixels.dtype == np.uint8
    if expected is not None:
        assert np.abs(pixels.mean((0, 1)) - expected).max() <= 4  # JPEG rounds, palettes dither


def test_transparent_pixels_show_white_and_not_what_lies_hidden(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (data.read_image(tmp_path / "a.png", SIZE) == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((20, 20), 32768, np.uint16)).save(tmp_path / "a.png")
    assert (data.read_image(tmp_path / "a.png", SIZE) == 128).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 20))  # the upper half, which orientation 6 turns to the right
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    pixels = data.read_image(tmp_path / "a.png", SIZE)
    assert pixels[:, 8:].min() > 250 and pixels[:, :4].max() < 5


def test_crop_keeps_the_centre_and_the_aspect(tmp_path):
    image = Image.new("RGB", (100, 60), "black")
    image.paste("white", (35, 15, 65, 45))  # the central half of the height
    image.save(tmp_path / "a.png")
    assert data.read_image(tmp_path / "a.png", SIZE, crop=0.5).min() > 200
    assert data.read_image(tmp_path / "a.png", SIZE).mean() == pytest.approx(255 * 0.25, rel=0.1)


def test_draft_decoding_of_large_jpegs_gives_the_same_picture(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize((1200, 1200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    jpeg, png = (data.read_image(tmp_path / f"a.{s}", (48, 48)).astype(int) for s in ("jpg", "png"))
    assert np.abs(jpeg - png).mean() < 2


def spoil(path):
    picture(path, size=(64, 64), quality=95)
    path.write_bytes(path.read_bytes()[:400])


# Files that are no image to train on; test_train.py trains in a folder of all of them.
BAD = {
    "truncated": spoil,
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("not a picture"),
    "one_pixel": lambda path: picture(path, size=(1, 1)),
    "dangling": lambda path: path.symlink_to(path.parent / "nowhere"),
    "pipe": lambda path: os.mkfifo(path),
}
REASONS = {"truncated": "truncated|OSError|broken", "empty": "empty file", "text": "cannot identify",
           "one_pixel": "1 x 1 pixels", "dangling": "not a regular file", "pipe": "not a regular file"}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_gives_its_reason(tmp_path, kind):
    BAD[kind](tmp_path / "a.jpg")
    with pytest.raises(data.DataError, match=REASONS[kind]):
        data.read_image(tmp_path / "a.jpg", SIZE)


def test_unreadable_file(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Image, "open", refuse)  # root may read anything, so permissions alone would not show it
    with pytest.raises(data.DataError, match="PermissionError"):
        data.read_image(path, SIZE)


def test_files_appear_whole_or_not_at_all(tmp_path):
    with data.atomic(tmp_path / "new" / "a") as file:
        file.write(b"first")
    with pytest.raises(KeyboardInterrupt), data.atomic(tmp_path / "new" / "a") as file:
        file.write(b"half of the sec")
        raise KeyboardInterrupt
    assert (tmp_path / "new" / "a").read_bytes() == b"first" and len(list((tmp_path / "new").iterdir())) == 1


# --- a folder

def test_bad_files_are_named_once_and_left_out(tmp_path):
    folder(tmp_path, {"anna": 2, "ben": 2})
    for kind, make in BAD.items():
        make(tmp_path / "anna" / f"{kind}.jpg")
    images = data.Images(*data.scan(tmp_path), SIZE)
    with pytest.warns(UserWarning) as warned:
        good = images.preload(range(len(images)))
    messages = [str(w.message) for w in warned]
    assert len(messages) == len(BAD)
    for kind in BAD:
        assert sum(f"{kind}.jpg: skipped" in message for message in messages) == 1
    assert [images.labels[i] for i in good] == [0, 0, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second touch is silent
        pixels, labels = images.batch(range(len(images)))
    assert pixels.shape == (4, 12, 12, 3) and labels.tolist() == [0, 0, 1, 1]


def test_lazily_met_bad_files_leave_the_batch_too(tmp_path):
    folder(tmp_path, {"anna": 2, "ben": 2})
    BAD["text"](tmp_path / "anna" / "x.jpg")
    images = data.Images(*data.scan(tmp_path), SIZE, cache_bytes=0)
    assert len(images.preload(range(5))) == 5  # no room: nothing is read ahead
    with pytest.warns(UserWarning, match="x.jpg: skipped"):
        assert images.batch(range(5))[1].tolist() == [0, 0, 1, 1]
    assert not images._cache


def test_scan_is_sorted_and_ends_on_loops(tmp_path):
    root = folder(tmp_path / "faces", {"ben": 1, "anna": 2})
    (root / "carl").symlink_to(root / "anna")
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "anna" / "again").symlink_to(root)
    (root / ".hidden").mkdir()
    (root / "anna" / ".DS_Store").touch()
    (root / "readme.txt").touch()
    (root / "nobody").mkdir()
    with pytest.warns(UserWarning) as warned:
        paths, labels, names = data.scan(root)
    assert names == ["anna", "ben"] and labels.tolist() == [0, 0, 1]
    assert [os.path.basename(p) for p in paths] == ["anna_0001.png", "anna_0002.png", "ben_0001.png"]
    said = " ".join(str(w.message) for w in warned)
    assert all(f"{name}: skipped" in said for name in ("carl", "loop", "up", "anna/again"))
    assert "1 files beside the people's folders skipped, for example readme.txt" in said


def test_nothing_to_train_on_is_said(tmp_path):
    with pytest.raises(data.DataError, match="no such folder"):
        data.scan(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="no images; expected a folder of NAME/image files"):
        data.scan(tmp_path)
    picture(tmp_path / "loose" / "a.png")
    with pytest.raises(data.DataError, match="loose: files, but no people; expected a folder of NAME/image files"):
        data.scan(tmp_path / "loose")
    _, labels, _ = data.scan(folder(tmp_path / "faces", {"anna": 1, "ben": 1}))
    with pytest.raises(data.DataError, match="2 images of 2 people, 0 with two or more"):
        data.IdentitySampler(labels, 2, 2)
    with pytest.raises(data.DataError, match="0 images of 0 people"):
        data.IdentitySampler(labels, 2, 2, indices=[])
    with pytest.raises(data.DataError, match="1 x 2"):
        data.IdentitySampler(labels, 1, 2)
    images = data.Images(["no.jpg"], [0], ["a"], SIZE)
    with pytest.warns(UserWarning, match="no.jpg"), pytest.raises(data.DataError, match="none of the 1"):
        images.batch([0])


def test_the_loader_benchmark_says_it_in_a_line():
    script = Path(__file__).parents[1] / "benchmarks" / "loader_bench.py"
    done = subprocess.run([sys.executable, script, "--data", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("loader_bench.py: nowhere: no such folder"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    folder(tmp_path, {"anna": 2, "ben": 1})
    listed = type(tmp_path).iterdir

    def refuse(self):  # root may list anything, so permissions alone would not show it
        if self.name == "anna":
            raise PermissionError(13, "Permission denied")
        return listed(self)
    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.warns(UserWarning, match="anna: skipped .Permission denied"):
        paths, labels, names = data.scan(tmp_path)
    assert names == ["ben"] and labels.tolist() == [0] and paths[0].endswith("ben_0001.png")


# --- the sampler

def test_batches_hold_p_people_with_k_images():
    labels = np.repeat(np.arange(10), 6)
    sampler = data.IdentitySampler(labels, people=5, images=4)
    assert len(sampler) == 2
    for step in range(8):
        batch = sampler.batch(step)
        assert len(set(batch)) == 20
        assert (np.unique(labels[batch], return_counts=True)[1] == 4).all()
    epoch = np.concatenate([sampler.batch(0), sampler.batch(1)])
    assert set(labels[epoch]) == set(range(10))  # everybody once per epoch
    labels = np.repeat(np.arange(13), 6)  # three more do not fill a batch
    sampler = data.IdentitySampler(labels, people=5, images=4)
    epochs = [sorted({*labels[np.concatenate([sampler.batch(2 * k), sampler.batch(2 * k + 1)])]}) for k in range(9)]
    assert len(sampler) == 2 and {*map(len, epochs)} == {10} and {*sum(epochs, [])} == {*range(13)}  # others each time


def test_small_classes_are_filled_up_with_more_people_and_singletons_serve_as_negatives():
    labels = np.repeat(np.arange(60), [2] * 30 + [9] * 10 + [1] * 20)
    sampler = data.IdentitySampler(labels, people=5, images=4, singletons=7)
    for step in range(10):
        people, counts = np.unique(labels[sampler.batch(step)], return_counts=True)
        assert (counts[people < 30] == 2).all() and (counts[(people >= 30) & (people < 40)] == 4).all()
        assert (people >= 40).sum() == 7
        assert 17 <= counts.sum() - 7 <= 23


def test_one_person_and_singletons_are_enough():
    assert len(data.IdentitySampler([0, 0, 0, 1, 2], 2, 2, singletons=5).batch(0)) == 4


def test_the_sampler_resumes_at_any_step_and_depends_on_the_seed():
    labels = np.repeat(np.arange(40), 5)
    run = [data.IdentitySampler(labels, 4, 3, seed=1).batch(step) for step in range(30)]
    assert np.array_equal(data.IdentitySampler(labels, 4, 3, seed=1).batch(17), run[17])
    assert not np.array_equal(data.IdentitySampler(labels, 4, 3, seed=2).batch(17), run[17])
    assert not np.array_equal(run[0], run[10])  # another epoch, another order


def test_ranks_draw_different_people_within_an_epoch():
    labels = np.repeat(np.arange(40), 5)
    drawn = [data.IdentitySampler(labels, 4, 3).batch(3 * 2 + rank) for rank in range(2)]  # as train.Run.read
    assert not set(labels[drawn[0]]) & set(labels[drawn[1]])
    drawn = [data.IdentitySampler(labels, 40, 3).batch(3 * 2 + rank) for rank in range(2)]  # an epoch of one batch
    assert set(labels[drawn[0]]) == set(labels[drawn[1]]) and set(drawn[0]) != set(drawn[1])


# --- augmentation, digits, pairs, lists

def test_augment_is_a_function_of_the_seed_and_keeps_the_picture():
    images, train, unseen = data.digits((16, 16))
    pixels, labels = images.batch(train[:32])
    assert set(images.labels[unseen]) == {4, 6, 9} and not set(images.labels[train] % 10) & {4, 6, 9}
    assert len(set(images.labels[train])) == 7 + 7 + 2 + 2 and len(unseen) == 542
    plain = data.augment(pixels, (16, 16))
    assert plain.shape == (32, 3, 16, 16) and plain.min() == -1 and plain.max() == 1
    one, two, three = (data.augment(pixels, (16, 16), seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    unmirrored = data.augment(pixels, (16, 16), 1, mirror=False)
    correlation = torch.corrcoef(torch.stack([unmirrored.flatten(), plain.flatten()]))[0, 1]
    assert 0.6 < correlation < 0.999
    assert data.augment(pixels, (8, 8)).shape == (32, 3, 8, 8)


def test_mirroring_comes_up_half_of_the_time():
    pixels = torch.zeros(400, 16, 16, 3, dtype=torch.uint8)
    pixels[:, :, 8:] = 255
    x = data.augment(pixels, (16, 16), 3)
    mirrored = x[..., 2].mean((1, 2)) > x[..., 13].mean((1, 2))
    assert 150 < mirrored.sum() < 250


def test_drawn_pairs_are_balanced_true_and_without_repetition():
    labels = np.repeat(np.arange(20), 4)
    pairs = data.draw_pairs(labels, np.arange(40, 80), 60)
    assert np.array_equal(labels[pairs.a] == labels[pairs.b], pairs.same) and pairs.same.sum() == 30
    assert len(set(zip(pairs.a, pairs.b, strict=True))) == 60 and (pairs.a != pairs.b).all() and pairs.a.min() >= 40
    few = data.draw_pairs(np.array([0, 0, 1]), np.arange(3), 100)
    assert few.same.sum() == 1 and (~few.same).sum() == 1
    with pytest.raises(data.DataError, match="two people are needed"):
        data.draw_pairs(np.zeros(2, int), np.arange(2), 10)


def test_people_held_out_are_whole_people():
    labels = np.repeat(np.arange(30), [3] * 20 + [1] * 10)
    train, unseen = data.split_people(labels, np.arange(len(labels)), 0.2)
    assert len(set(labels[unseen])) == 4 and not set(labels[train]) & set(labels[unseen])
    assert len(train) + len(unseen) == len(labels)
    for few, share in ((labels[:12], 0.0), (np.array([0, 0, 1, 1]), 0.5)):
        train, unseen = data.split_people(few, np.arange(len(few)), share)
        assert len(train) == len(few) and not len(unseen)


def test_lfw_lists(tmp_path):
    root = folder(tmp_path / "faces", {"anna": 3, "ben": 2, "carl": 1})
    paths, labels, _ = data.scan(root)
    (tmp_path / "dev.txt").write_text("2\nanna\t1\t3\nben\t1\t2\nanna\t2\tcarl\t1\nben\t2\tzoe\t1\n")
    with pytest.warns(UserWarning, match="1 of 4 pairs left out.*zoe"):
        pairs, names = data.read_pairs(tmp_path / "dev.txt", paths)
    assert names == {"anna", "ben", "carl", "zoe"}
    assert [*zip(pairs.a, pairs.b, pairs.same, strict=True)] == [(0, 2, True), (3, 4, True), (1, 5, False)]
    assert pairs.folds is None and pairs.sets == 1
    (tmp_path / "view2.txt").write_text("2\t1\nanna\t1\t3\nanna\t2\tcarl\t1\nben\t1\t2\nben\t2\tcarl\t1\n")
    pairs, _ = data.read_pairs(tmp_path / "view2.txt", paths)
    assert pairs.folds.tolist() == [0, 0, 1, 1] and pairs.sets == 2
    (tmp_path / "people.txt").write_text("2\n2\nanna\t3\nben\t2\n1\ncarl\t1\n")
    assert data.read_people(tmp_path / "people.txt") == [["anna", "ben"], ["carl"]]
    (tmp_path / "train.txt").write_text("\ufeff1\ncarl\t1\n", "utf-8")  # as some editors write it
    assert data.read_people(tmp_path / "train.txt") == [["carl"]]


@pytest.mark.parametrize("text, named", [("2\nanna\t1\n", r"of \[2\] people are announced, of \[1\]"),
                                         ("", r"of \[\] people"), ("10\n", r"of \[10\]"),
                                         ("anna\t1\n", "is neither the size"), ("1\nanna\t1\tx\n", "is neither"),
                                         ("\u00b2\nanna\t1\n", "is neither the size"),
                                         (5000 * "1" + "\nanna\t1\n", "is neither the size"),
                                         ("1\nren\udce9\t1\n", "people.txt: not UTF-8")])
def test_malformed_people_lists(tmp_path, text, named):
    (tmp_path / "people.txt").write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(data.DataError, match=named):
        data.read_people(tmp_path / "people.txt")


def test_malformed_pair_lists(tmp_path):
    paths = data.scan(folder(tmp_path / "faces", {"anna": 2}))[0]
    for text, named in (("1\nanna\t1\n", "line 2.*not a pair"),
                        ("1\nzoe\t1\t2\nzoe\t1\tben\t1\n", "none of the 2 pairs"),
                        ("1\nanna\tx\t2\n", "line 2.*not a pair"), ("anna\t1\t2\n", "first line"),
                        ("0\nanna\t1\t2\n", "first line: '0'"),
                        ("2\t1" + 5 * "\nanna\t1\t2", "first line: '2.t1' announces 4 pairs, 5 are there"),
                        ("2\t-1\nanna\t1\t2\n", "first line"),
                        ("2\t1" + 3 * "\nanna\t1\t2", "first line: '2.t1' announces 4 pairs, 3 are there"),
                        ("1\nanna\t1\t\u00b2\n", "line 2.*not a pair"),
                        (f"1\nanna\t1\t{5000 * '1'}\n", "line 2.*not a pair"),
                        (5000 * "1" + "\nanna\t1\t2\n", "first line"), (30 * "1" + "\nanna\t1\t2\n", "first line"),
                        ("1\nren\udce9\t1\t2\n", "pairs.txt: not UTF-8")):
        (tmp_path / "pairs.txt").write_text(text, "utf-8", "surrogateescape")
        with pytest.raises(data.DataError, match=named), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.read_pairs(tmp_path / "pairs.txt", paths)
