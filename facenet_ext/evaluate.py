"""Embeddings to figures: embed images, measure pairs, verify as the paper and LFW define it."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold

from .data import DataError, augment


class Verification(NamedTuple):
    """What ``verification`` returns; fields also by name, ``result["accuracy"]``."""

    accuracy: float  # mean over the folds
    accuracy_se: float  # its standard error; nan with one fold
    thresholds: list[float]  # per fold, squared distance: chosen on the other folds for the best accuracy
    val: float  # share of the same pairs accepted at the target false accept rate, mean over the folds
    val_se: float
    far: float  # the false accept rate that those thresholds had on the folds they were not chosen on
    auc: float  # area under the ROC of all pairs
    eer: float  # equal error rate of all pairs

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


def verification(d2, same, folds=10, far_target: float = 1e-3) -> Verification:
    """accuracy = mean over folds of |TA(t) + different pairs not in FA(t)| / P, t chosen on the other folds.

    TA(t) = {same pairs with d2 <= t}, FA(t) = {different pairs with d2 <= t}, VAL = |TA| / |same| and
    FAR = |FA| / |different|.

    d2: squared distances [P], float, finite; or [folds, P], row k from a model that was trained without fold k.
    same: truth [P], bool. folds: fold numbers [P], or a count (each fold then gets its share of same and of different
    pairs in the order they come, which for LFW's ``pairs.txt`` are its ten sets; fewer folds where a kind has fewer
    pairs). far_target: the false accept rate for VAL.
    A threshold is one of the observed distances: the lowest of those with the best accuracy, and for VAL the largest
    with FAR <= far_target (none: nothing is accepted). Ties need no care: equal distances are accepted together.
    ValueError: lengths that differ, a distance that is not finite, a truth that is neither 0 nor 1, folds that are no
    whole numbers or fewer than two, a far_target that is not in 0 ... 1, pairs of one kind only, in all or without one
    of the folds.
    Warns where the different pairs are too few for far_target. Source: paper section 4; Huang et al. 2007 (LFW).
    """
    d2, same, folds = (x.detach().cpu() if torch.is_tensor(x) else x for x in (d2, same, folds))
    d2 = d2.double() if torch.is_tensor(d2) else d2  # numpy has no bfloat16
    d2, same = np.atleast_2d(np.asarray(d2, np.float64)), np.asarray(same)
    if d2.ndim != 2 or d2.shape[1:] != same.shape:
        raise ValueError(f"d2, same: shapes {d2.squeeze().shape} and {same.shape}; accepted are two of the same length "
                         "[P], or [folds, P] and [P]")
    if not np.isin(same, (0, 1)).all():
        raise ValueError(f"same: got {np.unique(same)[:3]}; accepted are True and False")
    if not 0 <= far_target <= 1:
        raise ValueError(f"far_target: got {far_target}; accepted are 0 to 1")
    if not np.issubdtype(np.asarray(folds).dtype, np.integer):
        raise ValueError(f"folds: got {folds!r}; accepted are a count or whole numbers [{len(same)}]")
    same = same.astype(bool)
    if not np.isfinite(d2).all():
        raise ValueError(f"d2: {np.count_nonzero(~np.isfinite(d2))} distances are not finite")
    if same.all() or not same.any():
        raise ValueError(f"same: {same.sum()} same and {(~same).sum()} different pairs; both kinds are needed")
    if np.ndim(folds) == 0:
        count = min(int(folds), int(same.sum()), int((~same).sum()))
        if count < 2:
            raise ValueError(f"folds: got {folds} for {same.sum()} same and {(~same).sum()} different pairs; at least "
                             "2 folds with one of each are needed")
        folds = np.empty(len(same), int)
        for number, (_, test) in enumerate(StratifiedKFold(count).split(same, same)):
            folds[test] = number
    folds = np.asarray(folds)
    numbers, place = np.unique(folds, return_inverse=True)
    if folds.shape != same.shape or len(numbers) < 2 or len(d2) not in (1, len(numbers)):
        raise ValueError(f"folds: got shape {folds.shape} with {len(numbers)} numbers; accepted are a count or fold "
                         f"numbers [{len(same)}], two different ones at least, and as many as d2 has rows: {len(d2)}")
    rows = [_one_fold(d2[k % len(d2)], same, place == k, far_target) for k in range(len(numbers))]
    d2 = d2[place % len(d2), np.arange(len(same))]  # each pair as the model saw it that did not train on it
    accuracies, thresholds, vals, fars = map(list, zip(*rows, strict=True))
    different = (~same).sum() * (len(numbers) - 1) / len(numbers)
    if 0 < different * far_target < 1:  # at 0 accepting none of them is what is asked for
        warnings.warn(f"VAL at FAR {far_target:g} needs {1 / far_target:.0f} different pairs to choose a threshold on; "
                      f"about {different:.0f} are given, so it accepts none of them", stacklevel=2)
    wrong, right, _ = roc_curve(same, -d2, drop_intermediate=False)  # wrong = 1 - right: the equal error rate
    return Verification(float(np.mean(accuracies)), _standard_error(accuracies), thresholds, float(np.nanmean(vals)),
                        _standard_error(vals), float(np.nanmean(fars)), float(roc_auc_score(same, -d2)),
                        float(np.interp(0, wrong + right - 1, wrong)))


def _one_fold(d2, same, test, far_target):
    """Accuracy, threshold, VAL and FAR on the pairs ``test``, both thresholds chosen on the others."""
    train = same[~test]
    if train.all() or not train.any():
        raise ValueError("folds: without one of the folds the pairs are of one kind only, which gives no threshold")
    wrong, right, score = roc_curve(train, -d2[~test], drop_intermediate=False)  # its first point accepts nothing
    gain = np.rint(right * train.sum() - wrong * (~train).sum())[1:]  # accuracy, less what all thresholds share
    threshold, strict = -score[1:][np.argmax(gain)], -score[wrong <= far_target][-1]
    accept = d2[test] <= strict
    return (float(np.mean((d2[test] <= threshold) == same[test])), float(threshold),
            accept[same[test]].mean() if same[test].any() else np.nan,
            accept[~same[test]].mean() if (~same[test]).any() else np.nan)


def _standard_error(values):
    values = np.asarray(values)[~np.isnan(values)]
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


@torch.inference_mode()
def embed(model, images, indices, device="cpu", batch: int = 256, flip: bool = False, progress=iter) -> np.ndarray:
    """float32 [N, dim] embeddings of ``images[indices]``; NaN where a file cannot be read.

    flip: the direction of f(x) + f(mirrored x) instead of f(x), a little more accurate at twice the cost.
    """
    training = model.training
    model.eval()
    indices = np.asarray(indices)
    out = np.full((len(indices), model.embedding_dim), np.nan, np.float32)
    for start in progress(range(0, len(indices), batch)):
        place = [k for k in range(start, min(start + batch, len(indices))) if images.get(int(indices[k])) is not None]
        if place:
            x = augment(images.batch(indices[place])[0], model.input_size, device=device)
            y = model(x)
            if flip:
                y = torch.nn.functional.normalize(y + model(x.flip(3)), dim=1)
            out[place] = y.float().cpu().numpy()
    model.train(training)
    return out


def distances(model, images, pairs, device="cpu", flip: bool = False, progress=iter) -> np.ndarray:
    """Squared distances [P] of pairs of images; NaN where an image cannot be read or its embedding is not finite."""
    used, place = np.unique(np.concatenate([pairs.a, pairs.b]), return_inverse=True)
    vectors = embed(model, images, used, device, flip=flip, progress=progress)
    return np.square(vectors[place[:len(pairs.a)]] - vectors[place[len(pairs.a):]]).sum(1)


def verify(d2, pairs, far_target: float = 1e-3) -> tuple[Verification, np.ndarray]:
    """``verification`` of the pairs whose distances [P] (or [pairs.sets, P]) are finite, and which those are [P].

    The folds are those of the pair list, else ten; one without such pairs has no say, and its row of d2 no use.
    """
    d2 = np.atleast_2d(d2)
    kept = np.isfinite(d2).all(0)
    if not kept.any():
        raise DataError(f"none of the {len(kept)} pairs has two readable images with finite embeddings")
    if not kept.all():
        warnings.warn(f"{np.count_nonzero(~kept)} of {len(kept)} pairs left out: an image cannot be read, or its "
                      "embedding is not finite", stacklevel=2)
    folds = 10 if pairs.folds is None else pairs.folds[kept]
    if 1 < len(d2) == pairs.sets:
        d2 = d2[np.unique(folds)]
    try:
        return verification(d2[:, kept], pairs.same[kept], folds, far_target), kept
    except ValueError as error:  # of a list with pairs of one kind, or too few
        raise DataError(f"pairs: {error}") from error
