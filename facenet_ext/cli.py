"""``facenet-ext COMMAND``: train, evaluate, embed, compare, cluster, identify, triplets.

Each command is a function below: it reads images, embeds them, and hands the squared distances to scikit-learn, to
``evaluate.verification`` or to ``mine_triplets``.
"""

import argparse
import json
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import data, evaluate, mine_triplets, train

THRESHOLD = 1.1  # squared distance; paper, Figure 1


def bar(todo):
    return tqdm(todo, "embedding", unit="batch", disable=None)


def open_images(path, size, crop):
    """The images of root/NAME/file, or of a folder without people or a single file, which have label -1."""
    path = Path(path)
    folders = path.is_dir() and any(p.is_dir() and not p.name.startswith(".") for p in path.iterdir())
    if folders or not path.exists():
        return data.Images(*data.scan(path), size, crop)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if not p.name.startswith("."))
    if not files:
        raise data.DataError(f"{path}: no images in it")
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


def squared_distances(a, b):
    return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T, 0)


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


def do_train(options):
    return train.start(options)


def do_evaluate(options):
    """Accuracy, VAL at a FAR, AUC and equal error rate on pairs: of an LFW list, or random ones. With one --model per
    fold, in the order of the folds, each fold is judged by the model that was trained without it."""
    d2 = []
    for path in options.model:
        model, trained = train.load_model(path, options.device)
        folder, size = options.data or trained.data, model.input_size
        if folder is None:
            images, _, used = data.digits(size)
        else:
            images = data.Images(*data.scan(folder), size, trained.crop if options.crop is None else options.crop)
            used = np.arange(len(images))
        pairs = data.read_pairs(options.pairs, images.paths) if options.pairs else \
            data.draw_pairs(images.labels, used, 6000, options.seed)
        d2.append(evaluate.distances(model, images, pairs, options.device, options.flip, bar))
    folds = 1 if pairs.folds is None else len(np.unique(pairs.folds))
    if len(d2) not in (1, folds):
        raise data.DataError(f"--model: {len(d2)} models for {folds} folds; accepted are one, or one per fold")
    found, kept = evaluate.verify(d2[0] if len(d2) == 1 else np.stack(d2), pairs, options.far)
    print(f"{kept.sum()} pairs, {len(found.thresholds)} folds\n"
          f"accuracy          {100 * found.accuracy:6.2f} % ± {100 * found.accuracy_se:.2f}\n"
          f"thresholds        {min(found.thresholds):.3f} ... {max(found.thresholds):.3f} (squared distance)\n"
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
    d2 = squared_distances(vectors, vectors)
    np.fill_diagonal(d2, 0)
    for i, path in enumerate(paths):
        print(f"[{i}] {path}")
    print("     " + "".join(f"{f'[{i}]':>8}" for i in range(len(paths))))
    for i, row in enumerate(d2):
        print(f"{f'[{i}]':>5}" + "".join(f"{value:8.3f}" for value in row))
    for i, j in zip(*np.triu_indices(len(paths), 1), strict=True):
        print(f"[{i}] [{j}] {d2[i, j]:.3f} {'same' if d2[i, j] <= options.threshold else 'different'}")
    if options.plot:
        n = len(paths) + 1
        with figure(options.plot, 1.4 * n, 1.4 * n, n, n) as axes:
            for i, j in np.ndindex(n, n):
                axes[i, j].axis("off")
                if 0 in (i, j) and i != j:
                    axes[i, j].imshow(data.read_image(paths[max(i, j) - 1], (160, 160)))
                elif i != j:
                    value = d2[i - 1, j - 1]
                    axes[i, j].text(0.5, 0.5, f"{value:.2f}", ha="center", va="center", fontsize=14,
                                    color="green" if value <= options.threshold else "firebrick")


def do_cluster(options):
    """Agglomerative clustering (average linkage) at a threshold; against the folders' names where there are any."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.metrics.cluster import pair_confusion_matrix

    (paths, _, labels, vectors), = embed_all(options, options.folder)
    if len(paths) < 2:
        raise data.DataError(f"{options.folder}: one image; at least two are needed to form groups")
    found = AgglomerativeClustering(None, metric="precomputed", linkage="average", distance_threshold=options.threshold
                                    ).fit_predict(squared_distances(vectors, vectors))
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
    d2 = squared_distances(probes, known)
    for path, row in zip(paths, d2, strict=True):
        best = int(row.argmin())
        print(f"{path}\t{names[best] if row[best] <= options.threshold else 'unknown'}\t{row[best]:.3f}")


def do_triplets(options):
    """A contact sheet of the mined triplets with the farthest positives: the way to find mislabelled images."""
    (paths, names, labels, vectors), = embed_all(options, options.folder)
    found = mine_triplets(torch.from_numpy(vectors), torch.from_numpy(labels))
    once = torch.nonzero(found.anchor < found.positive).squeeze(1)
    worst = once[torch.argsort(found.d2_ap[once], descending=True, stable=True)[:options.count]]
    if not len(worst):
        raise data.DataError(f"{options.folder}: no triplet; two people are needed, one of them with two images")
    with figure(options.out, 4.5, 1.7 * len(worst), len(worst), 3) as axes:
        for row, t in zip(axes, worst.tolist(), strict=True):
            d2_ap, d2_an = found.d2_ap[t].item(), found.d2_an[t].item()
            members = [int(column[t]) for column in (found.anchor, found.positive, found.negative)]
            print(f"{d2_ap:.3f} {d2_an:.3f}\t" + "\t".join(paths[i] for i in members))
            for axis, i, text in zip(row, members, ("anchor", f"positive {d2_ap:.2f}", f"negative {d2_an:.2f}"),
                                     strict=True):
                axis.imshow(data.read_image(paths[i], (160, 160)))
                axis.set_title(f"{names[i][:20]}\n{text}", fontsize=7)
                axis.axis("off")


def distance(text):
    if not 0 <= (value := float(text)) < np.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a squared distance, 0 or more")
    return value


def build_parser():
    parser = argparse.ArgumentParser("facenet-ext", description="FaceNet: train an embedding and use it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, text, threshold=False):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        if function is not do_train:
            sub.add_argument("--model", required=True, metavar="RUN", help="a run's folder or a checkpoint",
                             nargs="+" if function is do_evaluate else None)
            sub.add_argument("--crop", type=float, help="central share of each image; default: as in training")
            sub.add_argument("--flip", action="store_true", help="embed image and mirror image together")
            sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if threshold:
            sub.add_argument("--threshold", type=distance, default=THRESHOLD, help=f"squared distance ({THRESHOLD})")
        return sub

    train.add_arguments(command("train", do_train, "train an embedding"))
    sub = command("evaluate", do_evaluate, do_evaluate.__doc__)
    sub.add_argument("--data", metavar="FOLDER", help="default: the data of the training")
    sub.add_argument("--pairs", metavar="FILE", help="pairs.txt (ten folds) or pairsDevTest.txt; default: random pairs")
    sub.add_argument("--far", type=float, default=1e-3, help="false accept rate for VAL (0.001)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", metavar="FILE")
    sub.add_argument("--plot", metavar="FILE.png", help="ROC and histogram of distances")
    sub = command("embed", do_embed, do_embed.__doc__)
    sub.add_argument("folder")
    sub.add_argument("--out", default="embeddings.npz", metavar="FILE.npz")
    sub = command("compare", do_compare, do_compare.__doc__, threshold=True)
    sub.add_argument("images", nargs="+")
    sub.add_argument("--plot", metavar="FILE.png")
    sub = command("cluster", do_cluster, do_cluster.__doc__, threshold=True)
    sub.add_argument("folder")
    sub.add_argument("--json", metavar="FILE")
    sub = command("identify", do_identify, do_identify.__doc__, threshold=True)
    sub.add_argument("gallery")
    sub.add_argument("probe")
    sub = command("triplets", do_triplets, do_triplets.__doc__)
    sub.add_argument("folder")
    sub.add_argument("--count", type=int, default=20)
    sub.add_argument("--out", default="triplets.png", metavar="FILE.png")
    return parser


def main(argv=None):
    options = build_parser().parse_args(argv)
    with_place, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"{message}\n"
    try:
        return options.function(options)
    except (data.DataError, OSError) as error:  # an OSError names its file
        print(f"facenet-ext: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        warnings.formatwarning = with_place
