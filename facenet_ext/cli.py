"""``facenet-ext COMMAND``: train, evaluate, embed, compare, cluster, identify, triplets.

Each command is a function below: it reads images, embeds them, and hands the squared distances to scikit-learn, to
``evaluate.verification`` or to ``mine_triplets``.
"""

import argparse
import json
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

try:
    from scipy.spatial.distance import cdist
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("the command line needs the packages of the extra: pip install '.[train]'") from error

from . import data, evaluate, mine_triplets, train

MOST = 100  # rows of a picture
bar = partial(tqdm, desc="embedding", unit="batch", disable=None)


def open_images(path, size, crop):
    """The images of root/NAME/file; of a folder without people, or a single file, with label -1."""
    path = Path(path)
    if not path.exists():
        raise data.DataError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if not p.is_dir() and not p.name.startswith("."))
        try:
            return data.Images(*data.scan(path), size, crop)
        except data.DataError:  # nobody in it
            if not files:
                raise
    return data.Images(map(str, files), np.full(len(files), -1), [], size, crop)


def embed_all(options, *paths):
    """Paths, names ("" where nobody is named), labels and embeddings of the readable images of all ``paths``."""
    model, trained = train.load_model(options.model, options.device)
    crop = trained.crop if options.crop is None else options.crop
    found = []
    for path in paths:
        images = open_images(path, model.input_size, crop)
        vectors = evaluate.embed(model, images, range(len(images)), options.device, flip=options.flip, progress=bar)
        good = np.flatnonzero(np.isfinite(vectors).all(1))
        if not len(good):
            raise data.DataError(f"{path}: none of the {len(images)} files is an image that can be read")
        names = [images.names[label] if label >= 0 else "" for label in images.labels[good]]
        found.append(([images.paths[i] for i in good], names, images.labels[good], vectors[good]))
    return found


def write_json(path, values):
    with data.atomic(path) as file:
        file.write(json.dumps(values, indent=1).encode())


@contextmanager
def figure(path, width, height, rows=1, columns=1):
    """Axes [rows, columns] of a figure in inches; leaving the context writes it as PNG."""
    from matplotlib.figure import Figure

    drawn = Figure((width, height), layout="constrained")
    yield drawn.subplots(rows, columns, squeeze=False)
    with data.atomic(path) as file:
        drawn.savefig(file, format="png", dpi=110)
    print(f"wrote {path}")


def place(axis, path, x, y):
    """An image in the unit cell at x, y of an axis that counts downwards; one axis for all of them is fast."""
    axis.axis("off")
    axis.imshow(data.read_image(path, (160, 160)), extent=(x + 0.02, x + 0.98, y + 0.98, y + 0.02))


def png(name):
    """Of argparse: the name of a picture, which says what is written."""
    if not name.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{name} does not end in .png, which is what is written")
    return name


def do_train(options):
    """Train an embedding with the semi-hard triplet loss, verified on people it never saw."""
    train.start(options)


def do_evaluate(options):
    """Accuracy, VAL at a FAR, AUC and equal error rate on pairs of images: of an LFW list, of the people that the
    training held out, or random ones. With one --model per fold, in the order of the folds, each fold is judged by the
    model that was trained without it."""
    d2 = []
    for path in options.model:
        model, trained = train.load_model(path, options.device)
        trained.crop = trained.crop if options.crop is None else options.crop
        folder = options.data or trained.data
        listed = options.pairs or (None if options.data else trained.pairs)
        if listed and not folder:
            raise data.DataError(f"--pairs: got {listed} without --data, and the run {path} has no folder, either")
        if options.data or listed:
            images = data.Images(*data.scan(folder), model.input_size, trained.crop)
            pairs = data.read_pairs(listed, images.paths)[0] if listed else \
                data.draw_pairs(images.labels, np.arange(len(images)), 6000, options.seed)
        else:
            images, _, pairs = train.load_data(trained)
        if pairs is None:
            raise data.DataError(f"{path}: nobody was held out of the training; --pairs or --data say whom to judge by")
        d2.append(evaluate.distances(model, images, pairs, options.device, options.flip, bar))
    if len(d2) not in (1, pairs.sets):
        raise data.DataError(f"--model: {len(d2)} models for {pairs.sets} folds; accepted are one, or one per fold")
    found, kept = evaluate.verify(d2[0] if len(d2) == 1 else np.stack(d2), pairs, options.far)
    source = listed or f"random pairs of {f'everybody in {folder}' if options.data else 'people held out of training'}"
    print(f"{kept.sum()} pairs, {source}, {len(found.thresholds)} folds\n"
          f"accuracy          {100 * found.accuracy:6.2f} % ± {100 * found.accuracy_se:.2f}\n"
          f"thresholds        {' '.join(f'{t:.3f}' for t in found.thresholds)} (squared distance, by fold)\n"
          f"VAL at FAR {options.far:<7g}{100 * found.val:6.2f} % ± {100 * found.val_se:.2f} "
          f"(FAR on the folds left out: {found.far:.2g})\n"
          f"AUC               {found.auc:.4f}\nequal error rate  {100 * found.eer:6.2f} %")
    if options.json:
        write_json(options.json, {"model": options.model, "pairs": int(kept.sum()), "flip": options.flip,
                                  "far_target": options.far, **found._asdict()})
    if options.plot:
        from sklearn.metrics import roc_curve
        d2, same = np.choose(pairs.folds, d2)[kept] if len(d2) > 1 else d2[0][kept], pairs.same[kept]
        with figure(options.plot, 10, 4.5, 1, 2) as axes:
            roc, histogram = axes[0]
            roc.plot(*roc_curve(same, -d2)[:2])
            roc.set(xlabel="false accept rate", ylabel="validation rate", title=f"AUC {found.auc:.4f}")
            roc.set_xscale("symlog", linthresh=1e-3)
            for truth, label in ((True, "same"), (False, "different")):
                histogram.hist(d2[same == truth], 60, alpha=0.6, label=label)
            histogram.axvline(np.mean(found.thresholds), color="black", linestyle=":")
            histogram.set(xlabel="squared distance", ylabel="pairs")
            histogram.legend()


def do_embed(options):
    """Embeddings, names and paths of a folder as one npz file."""
    (paths, names, _, vectors), = embed_all(options, options.folder)
    with data.atomic(options.out) as file:
        np.savez(file, embeddings=vectors, names=np.array(names), paths=np.array(paths))
    print(f"wrote {len(paths)} embeddings of {vectors.shape[1]} numbers to {options.out}")


def do_compare(options):
    """The matrix of squared distances, and who is the same person at the threshold."""
    found = embed_all(options, *options.images)
    paths, vectors = sum((part[0] for part in found), []), np.concatenate([part[3] for part in found])
    if options.plot and len(paths) > MOST:
        raise data.DataError(f"--plot: {len(paths)} images; a picture has room for {MOST}")
    d2 = cdist(vectors, vectors, "sqeuclidean")
    print("\n".join(f"[{i}] {path}" for i, path in enumerate(paths)))
    print(" " * 6 + "".join(f"{f'[{i}]':>8}" for i in range(len(paths))))
    for i, row in enumerate(d2):
        print(f"{f'[{i}]':<6}" + "".join(f"{value:8.3f}" for value in row))
    for i, j in zip(*np.triu_indices(len(paths), 1), strict=True):
        print(f"[{i}] [{j}] {d2[i, j]:.3f} {'same' if d2[i, j] <= options.threshold else 'different'}")
    if options.plot:
        n = len(paths) + 1
        with figure(options.plot, 1.4 * n, 1.4 * n) as ((axis,),):
            for i, path in enumerate(paths, 1):
                place(axis, path, i, 0)
                place(axis, path, 0, i)
            for i, j in zip(*np.nonzero(~np.eye(n - 1, dtype=bool)), strict=True):
                axis.text(j + 1.5, i + 1.5, f"{d2[i, j]:.2f}", ha="center", va="center", fontsize=14,
                          color="green" if d2[i, j] <= options.threshold else "firebrick")
            axis.set(xlim=(0, n), ylim=(n, 0))


def do_cluster(options):
    """Agglomerative clustering (average linkage) at a threshold; against the folders' names where there are any:
    normalized mutual information, precision and recall of pairs of images."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.metrics.cluster import pair_confusion_matrix

    (paths, _, labels, vectors), = embed_all(options, options.folder)
    if len(paths) < 2:
        raise data.DataError(f"{options.folder}: one image; at least two are needed to form groups")
    found = AgglomerativeClustering(None, metric="precomputed", linkage="average", distance_threshold=options.threshold
                                    ).fit_predict(cdist(vectors, vectors, "sqeuclidean"))
    result = {"images": len(paths), "clusters": int(found.max()) + 1, "threshold": options.threshold}
    if (labels >= 0).all():
        (_, wrong), (missed, right) = pair_confusion_matrix(labels, found)
        result.update(people=len(np.unique(labels)), nmi=float(normalized_mutual_info_score(labels, found)),
                      precision=float(right / (right + wrong)) if right + wrong else 1.0,
                      recall=float(right / (right + missed)) if right + missed else 1.0)
    else:
        for group in range(result["clusters"]):
            print(f"group {group}: " + " ".join(paths[i] for i in np.flatnonzero(found == group)))
    print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in result.items()))
    if options.json:
        write_json(options.json, {**result, "groups": {path: int(g) for path, g in zip(paths, found, strict=True)}})


def do_identify(options):
    """The nearest person of the gallery for each image of the probe, or "unknown" beyond the threshold."""
    (_, names, labels, known), (paths, _, _, probes) = embed_all(options, options.gallery, options.probe)
    if (labels < 0).any():
        raise data.DataError(f"{options.gallery}: the gallery needs people, as folders NAME/image files")
    for path, row in zip(paths, cdist(probes, known, "sqeuclidean"), strict=True):
        best = int(row.argmin())
        print(f"{path}\t{names[best] if row[best] <= options.threshold else 'unknown'}\t{row[best]:.3f}")


def do_triplets(options):
    """A contact sheet of the mined triplets with the farthest positives: the way to find mislabelled images."""
    (paths, names, labels, vectors), = embed_all(options, options.folder)
    found = mine_triplets(torch.from_numpy(vectors), torch.from_numpy(labels), pairs="unordered")
    worst = torch.argsort(found.d2_ap, descending=True, stable=True)[:options.count]
    if not len(worst):
        raise data.DataError(f"{options.folder}: no triplet; two people are needed, one of them with two images")
    with figure(options.out, 4.5, 1.9 * len(worst)) as ((axis,),):
        for y, t in enumerate(worst.tolist()):
            d2_ap, d2_an = found.d2_ap[t].item(), found.d2_an[t].item()
            members = [int(column[t]) for column in (found.anchor, found.positive, found.negative)]
            print(f"{d2_ap:.3f} {d2_an:.3f}\t" + "\t".join(paths[i] for i in members))
            texts = "anchor", f"positive {d2_ap:.2f}", f"negative {d2_an:.2f}"
            for x, (i, text) in enumerate(zip(members, texts, strict=True)):
                place(axis, paths[i], x, 1.25 * y + 0.25)
                axis.text(x + 0.5, 1.25 * y + 0.23, f"{names[i][:20]}\n{text}", fontsize=7, ha="center", va="bottom")
        axis.set(xlim=(0, 3), ylim=(1.25 * len(worst), 0))


def build_parser():
    using, model, threshold = (argparse.ArgumentParser(add_help=False) for _ in range(3))  # what commands share
    using.add_argument("--crop", type=train.share, metavar="SHARE", help="central share; default: the training's")
    using.add_argument("--flip", action="store_true", help="embed image and mirror image together")
    using.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    model.add_argument("--model", required=True, metavar="RUN", help="a run's folder or a checkpoint in it")
    threshold.add_argument("--threshold", type=train.positive, default=1.1, metavar="D2",
                           help="squared distance up to which two images are of one person (1.1, the paper's Figure 1)")
    parser = argparse.ArgumentParser("facenet-ext", description="FaceNet: train an embedding and use it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, *parents):
        name, text = function.__name__.removeprefix("do_"), function.__doc__
        sub = commands.add_parser(name, help=text.split(":")[0], description=text, parents=parents)
        sub.set_defaults(function=function)
        return sub

    people = "folder of NAME/image files"
    train.add_arguments(command(do_train))
    add = command(do_evaluate, using).add_argument
    add("--model", required=True, nargs="+", metavar="RUN", help="a run's folder or a checkpoint; or one per fold")
    add("--data", metavar="FOLDER", help=f"{people}; default: the data of the training")
    add("--pairs", metavar="FILE", help="LFW's pairs.txt (ten folds) or pairsDevTest.txt; default: those that the "
        "training was verified on; with --data random pairs of everybody")
    add("--far", type=train.within(float, 0, 1), default=1e-3, help="false accept rate for VAL (0.001)")
    add("--seed", type=train.within(int, 0), default=0, help="of the random pairs (0)")
    add("--json", metavar="FILE", help="the figures, with the threshold of every fold")
    add("--plot", type=png, metavar="FILE.png", help="ROC and histogram of distances")
    add = command(do_embed, model, using).add_argument
    add("folder", help=f"{people}, or of image files")
    add("--out", default="embeddings.npz", metavar="FILE.npz", help="file to write (embeddings.npz)")
    add = command(do_compare, model, using, threshold).add_argument
    add("images", nargs="+", help="image files, or folders of them")
    add("--plot", type=png, metavar="FILE.png", help="the images and their distances as a table")
    add = command(do_cluster, model, using, threshold).add_argument
    add("folder", help=f"{people}, or of image files")
    add("--json", metavar="FILE", help="the figures, and the group of every image")
    add = command(do_identify, model, using, threshold).add_argument
    add("gallery", help=f"people who are known: {people}")
    add("probe", help="who is it? An image file or a folder of them")
    add = command(do_triplets, model, using).add_argument
    add("folder", help=people)
    add("--count", type=train.within(int, 1, MOST), default=20, help="triplets on the sheet (20)")
    add("--out", type=png, default="triplets.png", metavar="FILE.png", help="file to write (triplets.png)")
    return parser


def main(argv=None):
    options = build_parser().parse_args(argv)
    function = vars(options).pop("function")
    with_place, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"{message}\n"
    try:
        function(options)
    except (data.DataError, OSError) as error:  # an OSError names its file
        print(f"facenet-ext: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        warnings.formatwarning = with_place


if __name__ == "__main__":
    main()
