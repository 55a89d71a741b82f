"""Verification against scikit-learn and against the definitions written out, ties included."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from facenet_ext import data, evaluate, models
from facenet_ext.evaluate import verification


def scores(seed, count=400, levels=25, signal=0.3):
    """Squared distances on a coarse grid, so that most of them are tied, half of the pairs same."""
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.5
    d2 = np.round(np.clip(rng.normal(2 - signal * same, 0.5), 0, 4) * levels) / levels
    return d2, same, rng.integers(0, 5, count)


def plain(d2, same, folds, far_target):
    """The definitions, a loop over every threshold: no sorting, no cumulative sums."""
    accuracies, thresholds, vals, fars = [], [], [], []
    for fold in sorted(set(folds)):
        train, test = folds != fold, folds == fold
        best, at, strict = -1, None, -np.inf
        for t in sorted(set(d2[train])):
            accuracy = np.mean((d2[train] <= t) == same[train])
            if accuracy > best:
                best, at = accuracy, t
            if np.mean(d2[train][~same[train]] <= t) <= far_target:
                strict = t
        accuracies.append(np.mean((d2[test] <= at) == same[test]))
        thresholds.append(at)
        vals.append(np.mean(d2[test][same[test]] <= strict))
        fars.append(np.mean(d2[test][~same[test]] <= strict))
    return accuracies, thresholds, vals, fars


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("far_target", [0.0, 0.05, 0.2])
def test_equals_the_definitions_on_tied_scores(seed, far_target):
    d2, same, folds = scores(seed)
    accuracies, thresholds, vals, fars = plain(d2, same, folds, far_target)
    got = verification(d2, same, folds, far_target)
    assert got.thresholds == thresholds
    np.testing.assert_allclose(
        [got.accuracy, got.accuracy_se, got.val, got.val_se, got.far],
        [np.mean(accuracies), np.std(accuracies, ddof=1) / 5 ** 0.5, np.mean(vals), np.std(vals, ddof=1) / 5 ** 0.5,
         np.mean(fars)], rtol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_auc_and_equal_error_rate(seed):
    d2, same, folds = scores(seed)
    got = verification(d2, same, folds, 0.1)
    assert got.auc == roc_auc_score(same, -d2)
    wins = (d2[same][:, None] < d2[~same]).mean() + 0.5 * (d2[same][:, None] == d2[~same]).mean()
    assert got.auc == pytest.approx(wins, rel=1e-12)
    fine = np.linspace(0, 1, 200_001)  # the ROC as a polygon, looked up finely: where does it meet 1 - FAR?
    false_accept, true_accept, _ = roc_curve(same, -d2)
    gap = np.abs(np.interp(fine, false_accept, true_accept) - (1 - fine))
    assert got.eer == pytest.approx(fine[gap.argmin()], abs=2e-5)


@pytest.mark.filterwarnings("ignore:VAL at FAR")
def test_perfect_and_random_embeddings():
    same = np.arange(6000) % 2 == 0
    got = verification(np.where(same, 0.5, 1.5), same)
    assert (got.accuracy, got.accuracy_se, got.val, got.far, got.auc, got.eer) == (1, 0, 1, 0, 1, 0)
    chance = verification(np.random.default_rng(0).uniform(0, 4, 6000), same)
    assert chance.accuracy == pytest.approx(0.5, abs=0.02) and chance.auc == pytest.approx(0.5, abs=0.02)
    assert chance.eer == pytest.approx(0.5, abs=0.02) and chance.val < 0.01
    collapsed = verification(np.zeros(6000), same)
    assert collapsed.accuracy == 0.5 and collapsed.auc == 0.5 and collapsed.val == 0 and collapsed.eer == 0.5


@pytest.mark.filterwarnings("ignore:VAL at FAR")
def test_a_count_of_folds_on_lists_in_the_order_of_lfw():
    """Ten sets of 30 same, then 30 different pairs: the count gives the sets of the list."""
    rng = np.random.default_rng(1)
    same = np.tile(np.repeat([True, False], 30), 10)
    d2 = rng.normal(1.2 - 0.4 * same, 0.3)
    assert verification(d2, same, 10) == verification(d2, same, np.repeat(np.arange(10), 60))


@pytest.mark.parametrize("seed", range(5))
def test_one_model_per_fold(seed):
    """Fold k of the answer is fold k of what model k alone would get; ROC figures are of each pair's own model."""
    rng = np.random.default_rng(seed)
    d2, same, folds = scores(seed)
    several = np.stack([d2 + rng.choice([0, 0.25, 0.5], len(d2)) for _ in range(5)])
    got = verification(several, same, folds, 0.1)
    alone = [plain(row, same, folds, 0.1) for row in several]
    assert got.accuracy == pytest.approx(np.mean([alone[k][0][k] for k in range(5)]), rel=1e-12)
    assert got.thresholds == [alone[k][1][k] for k in range(5)]
    assert got.val == pytest.approx(np.mean([alone[k][2][k] for k in range(5)]), rel=1e-12)
    assert got.auc == roc_auc_score(same, -several[folds, np.arange(len(same))])
    with pytest.raises(ValueError, match="as many as d2 has rows: 4"):
        verification(several[:4], same, folds)


def test_too_few_pairs_for_the_false_accept_rate_are_said():
    d2, same, folds = scores(0)
    with pytest.warns(UserWarning, match="FAR 0.001 needs 1000 different pairs"):
        verification(d2, same, folds)


def test_fields_by_name():
    got = verification(*scores(0), far_target=0.1)
    assert got["accuracy"] == got.accuracy == got[0]
    assert got._fields == ("accuracy", "accuracy_se", "thresholds", "val", "val_se", "far", "auc", "eer")


@pytest.mark.parametrize("d2, same, folds, named", [
    ([1.0, 2.0], [True], 2, "d2, same.*2.*1"), ([1.0, np.nan], [True, False], 2, "d2: 1"),
    ([1.0, 2.0], [True, True], 2, "same: 2 same and 0 different"), ([1.0, 2.0], [True, False], 2, "folds"),
    ([1.0, 2.0], [True, False], [0, 0], "folds.*1 numbers"),
    ([1.0, 2.0, 3.0], [True, True, False], [0, 0, 1], "folds: without one of the folds"),
])
def test_bad_input_is_named(d2, same, folds, named):
    with pytest.raises(ValueError, match=named):
        verification(np.array(d2), np.array(same), folds)


def test_embed_and_verify_leave_out_what_cannot_be_read():
    images, _, unseen = data.digits((16, 16))
    model = models.create("mini", 8, input_size=16).train()
    vectors = evaluate.embed(model, images, unseen[:40], batch=16)
    assert model.training and vectors.shape == (40, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(evaluate.embed(model, images, unseen[:40], batch=7), vectors, atol=1e-5)
    pairs = data.draw_pairs(images.labels, unseen[::9], 100)
    lost = int(pairs.a[0])
    images.bad[lost] = "for this test"
    del images._cache[lost]
    without = (pairs.a == lost) | (pairs.b == lost)
    d2 = evaluate.distances(model, images, pairs)
    with pytest.warns(UserWarning, match=f"{without.sum()} of 100 pairs left out"):
        found, kept = evaluate.verify(d2, pairs, far_target=0.1)
    assert np.array_equal(np.isnan(d2), without) and np.array_equal(kept, ~without)
    assert found == verification(d2[~without], pairs.same[~without], 10, far_target=0.1)
    with pytest.raises(data.DataError, match="none of the 100 pairs"):
        evaluate.verify(np.full(100, np.nan), pairs)
    with pytest.raises(data.DataError, match="^pairs: same: 0 same and 2 different pairs; both kinds are needed"):
        evaluate.verify(np.ones(2), data.Pairs(*np.array([[0, 1], [2, 3]]), np.zeros(2, bool), None))


def test_each_fold_that_is_there_keeps_its_own_model():
    d2, same, folds = scores(0)
    several = np.stack([d2 + k * (np.arange(len(d2)) % 3) for k in range(5)])
    several[:, folds == 1] = np.nan  # no image of the second fold can be read
    pairs = data.Pairs(*np.zeros((2, len(d2)), int), same, folds, 5)
    with pytest.warns(UserWarning, match="pairs left out"):
        found, kept = evaluate.verify(several, pairs, 0.1)
    assert found == verification(several[[0, 2, 3, 4]][:, kept], same[kept], folds[kept], 0.1)


def test_flip_is_blind_to_mirroring():
    images, _, unseen = data.digits((16, 16))
    model = models.create("mini", 8, input_size=16)
    plain_ = evaluate.embed(model, images, unseen[:4], flip=True)
    for i in unseen[:4]:
        images._cache[i] = np.ascontiguousarray(images._cache[i][:, ::-1])
    np.testing.assert_allclose(evaluate.embed(model, images, unseen[:4], flip=True), plain_, atol=1e-5)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(far_target=-1), "far_target: got -1"),
        (dict(far_target=float("nan")), "far_target: got nan"),
        (dict(far_target=2), "far_target: got 2; accepted are 0 to 1"),
        (dict(folds=2.5), "folds: got 2.5"),
        (dict(folds="a"), "folds: got 'a'"),
        (dict(same=np.array([2, 0, 1, 1])), "same: got"),
        (dict(same=np.array(["yes", "no", "no", "no"])), "same: got"),
    ],
)
def test_arguments_of_other_kinds_are_named(given, named):
    with pytest.raises(ValueError, match=named):
        verification(**{**dict(d2=np.arange(4.0), same=np.array([1, 0, 1, 0]), folds=2), **given})


def test_tensors_are_taken():
    d2, same = torch.arange(8.0).bfloat16().requires_grad_(), torch.tensor([1, 1, 0, 1, 0, 1, 0, 0])
    assert verification(d2, same, 2, 0.5) == verification(np.arange(8.0), same.numpy().astype(bool), 2, 0.5)
