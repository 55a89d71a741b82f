"""Other libraries' values: plain float64 loops of what each computes; pytorch-metric-learning and sentence-transformers
themselves, where they are installed (the first is in the test extra; the second is heavy: pip install it beside)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import facenet_ext


def batch(seed: int = 0, classes: int = 6, images: int = 5, dim: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(images)[torch.randperm(classes * images, generator=generator)]
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return centres[y] + torch.randn(len(y), dim, generator=generator, dtype=torch.float64), y


def distances(x: torch.Tensor, unit: str) -> list[list[torch.Tensor]]:
    if unit == "cosine":
        return (1 - normalize(x) @ normalize(x).T).tolist()
    d2 = (x[:, None] - x).square().sum(2)
    return (d2 if unit == "squared" else d2.sqrt()).tolist()


def loop(x, y, unit, choose, term, reduce) -> float:
    """choose(d of a, positives, negatives) yields (positive, negative) of every term."""
    d, y = distances(x, unit), y.tolist()
    terms = []
    for a, row in enumerate(d):
        positives = [p for p in range(len(y)) if y[p] == y[a] and p != a]
        negatives = [n for n in range(len(y)) if y[n] != y[a]]
        terms += [term(row[p] - row[n]) for p, n in choose(row, positives, negatives)]
    return reduce(terms)


def semi_hard(d, positives, negatives, fallback=True):
    for p in positives:
        farther = [n for n in negatives if d[n] > d[p]]
        if farther or fallback:
            yield p, min(farther, key=d.__getitem__) if farther else max(negatives, key=d.__getitem__)


def hard(d, positives, negatives):
    yield max(positives, key=d.__getitem__), min(negatives, key=d.__getitem__)


def hinge(margin):
    return lambda g: max(0.0, g + margin)


def mean(terms):
    return math.fsum(terms) / len(terms)


def mean_active(terms):
    return math.fsum(terms) / max(1, sum(t > 1e-16 for t in terms))


def soft(g):
    return max(g, 0) + math.log1p(math.exp(-abs(g)))


def of_hardest(d, positives, negatives):
    return semi_hard(d, [max(positives, key=d.__getitem__)], negatives)


def of_easiest(d, positives, negatives):
    return semi_hard(d, [min(positives, key=d.__getitem__)], negatives, fallback=False)


def in_band(d, positives, negatives):
    return [(p, n) for p in positives for n in negatives if 0 < d[n] - d[p] <= 0.2]


def every(d, positives, negatives):
    return [(p, n) for p in positives for n in negatives]


ROWS = {
    "paper": ("squared", lambda *of: semi_hard(*of, fallback=False), hinge(0.2), math.fsum),
    "tensorflow-addons": ("root", semi_hard, hinge(1.0), mean),
    "sentence-transformers": ("root", semi_hard, hinge(5.0), mean),
    "tensorflow-addons-hard": ("root", hard, hinge(1.0), mean),
    "sentence-transformers-batch-hard": ("root", hard, hinge(5.0), mean),
    "pytorch-metric-learning": ("root", in_band, hinge(0.05), mean_active),
    "pytorch-metric-learning-easy-hard": ("root", of_easiest, hinge(0.05), mean_active),
    "pytorch-metric-learning-batch-hard": ("root", hard, hinge(0.05), mean_active),
    "sentence-transformers-batch-all": ("root", every, hinge(5.0), mean_active),
    "tensorflow-similarity": ("cosine", of_hardest, hinge(1.0), mean),
    "triplet-reid": ("root", hard, soft, mean),
}
UNIT_ROWS = ("paper", "pytorch-metric-learning", "davidsandberg", "openface")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ROWS)
def test_value_is_the_peers(name, seed):
    x, y = batch(seed)
    shown = normalize(x) if name.startswith(UNIT_ROWS) else x
    unit, *rest = ROWS[name]
    assert float(facenet_ext.like(name)(x, y)) == pytest.approx(loop(shown, y, unit, *rest), rel=1e-9)


@pytest.mark.parametrize("name", ["davidsandberg", "openface", "adambielski"])
def test_drawn_triplets_are_eligible(name):
    """A peer's random numbers are its own: what can be compared is which triplets may be drawn, and how many are."""
    x, y = batch(3)
    module = facenet_ext.like(name)
    options = dict(margin=module.margin, negatives=module.negatives, pairs=module.pairs, normalize=module.normalize)
    mined = facenet_ext.mine_triplets(x, y, **options, generator=torch.Generator().manual_seed(0))
    d = torch.tensor(distances(normalize(x) if module.normalize else x, "squared"), dtype=torch.float64)
    least = 0.0 if module.negatives == "random_semi_hard" else -math.inf
    gap = d[mined.anchor, mined.negative] - d[mined.anchor, mined.positive]
    assert ((gap > least) & (gap < module.margin)).all() and (mined.anchor < mined.positive).all()
    pairs = [(a, p) for a in range(len(y)) for p in range(a + 1, len(y)) if y[a] == y[p]]
    with_one = [
        (a, p) for a, p in pairs if any(least < g < module.margin for g in (d[a] - d[a, p])[y != y[a]].tolist())
    ]
    assert list(zip(mined.anchor.tolist(), mined.positive.tolist(), strict=True)) == with_one
    module.generator = torch.Generator().manual_seed(0)
    assert float(module(x, y)) == pytest.approx(float((module.margin - gap).mean()), rel=1e-9)  # all of them active


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["", "-easy-hard", "-batch-hard"])
def test_pytorch_metric_learning_itself(kind, seed):
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning import losses, miners

    make = {
        "": lambda: miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard"),
        "-easy-hard": miners.BatchEasyHardMiner,
        "-batch-hard": miners.BatchHardMiner,
    }
    x, y = batch(seed)
    x.requires_grad_()
    theirs = losses.TripletMarginLoss()(x, y, make[kind]()(x, y))
    ours = facenet_ext.like("pytorch-metric-learning" + kind)(x, y)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


SENTENCE_TRANSFORMERS = {
    "sentence-transformers": "BatchSemiHardTripletLoss",
    "sentence-transformers-batch-hard": "BatchHardTripletLoss",
    "sentence-transformers-batch-all": "BatchAllTripletLoss",
    "triplet-reid": "BatchHardSoftMarginTripletLoss",
}


def sentence_transformers_loss(name: str, x: torch.Tensor, y: torch.Tensor, **options) -> torch.Tensor:
    of = "sentence_transformers.sentence_transformer.losses"
    losses = pytest.importorskip(of, reason="sentence-transformers 6 or later is not installed")
    return getattr(losses, SENTENCE_TRANSFORMERS[name])(None, **options).compute_loss_from_embeddings([x], y)


def both_with_gradients(name: str, x: torch.Tensor, y: torch.Tensor, **options):
    """(theirs, its gradient), (ours, its gradient)"""
    x = x.clone().requires_grad_()
    both = sentence_transformers_loss(name, x, y, **options), facenet_ext.like(name, **options)(x, y)
    return [(loss.item(), torch.autograd.grad(loss, x)[0]) for loss in both]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SENTENCE_TRANSFORMERS)
def test_sentence_transformers_itself(name, seed):
    x, y = batch(seed)
    if name in ("sentence-transformers", "sentence-transformers-batch-all"):
        y[:4] = 100 + torch.arange(4)  # the only one of their label: negatives
    (theirs, their_gradient), (ours, our_gradient) = both_with_gradients(name, x, y)
    assert ours == pytest.approx(theirs, rel=1e-12)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", SENTENCE_TRANSFORMERS)
def test_where_sentence_transformers_differs(name):
    """What the docstring of `like` says of the edges."""
    x, _ = batch(1)
    hard = name in ("sentence-transformers-batch-hard", "triplet-reid")
    pairs_and_singles = torch.arange(len(x)).clamp(max=20)  # ten of one label, twenty of their own
    (theirs, _), (ours, _) = both_with_gradients(name, x, pairs_and_singles)
    assert (theirs != pytest.approx(ours, rel=1e-3)) == hard
    (theirs, _), (ours, _) = both_with_gradients(name, x, torch.zeros_like(pairs_and_singles))
    assert ours == 0 and (theirs == 0) == (name == "sentence-transformers-batch-all")
    if name == "triplet-reid":
        return
    # The closest negative of 0 is 2: 1 - 2 + 1 = 0
    x, y = torch.tensor([[0.0], [1.0], [2.0], [50.0]], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    (theirs, their_gradient), (ours, our_gradient) = both_with_gradients(name, x, y, margin=1.0)
    assert ours == pytest.approx(theirs, rel=1e-12) and not torch.allclose(their_gradient, our_gradient)


def test_overrides_and_unknown_names():
    assert facenet_ext.like("pytorch-metric-learning", mine_margin=0.4, margin=0.1).band == 0.4
    assert facenet_ext.like("tensorflow-addons", distance="sqeuclidean").distance == "sqeuclidean"
    for bad, error in (("keras", ValueError), (3, TypeError), (["paper"], TypeError)):
        with pytest.raises(error, match="^name is .*; accepted: 'paper', 'tensorflow-addons'"):
            facenet_ext.like(bad)
    pml = "pytorch-metric-learning"
    for name, more in (("paper", {}), (f"{pml}-batch-hard", {}), (pml, {"band": 0.3})):
        with pytest.raises(ValueError, match="^mine_margin is .*; accepted: with 'pytorch-metric-learning'"):
            facenet_ext.like(name, mine_margin=0.4, **more)
    with pytest.raises(ValueError, match="^mine_margin is 0.4 with negatives='hard'; accepted: None, or negatives one"):
        facenet_ext.like(pml, negatives="hard", mine_margin=0.4)
    with pytest.raises(TypeError, match="negatives is a .*array"):
        facenet_ext.like(pml, negatives=np.array(["hard", "all"]))
    assert facenet_ext.like(pml, negatives="hard").band is None  # the peer's band is that of its own rule
    with pytest.raises(ValueError, match="^mine_margin is -1; accepted: .* > 0"):
        facenet_ext.like(pml, mine_margin=-1)
