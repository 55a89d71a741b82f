"""The rules that take one negative a pair, by the order of distances or drawn, and who is an anchor and who a
candidate, against the reference: on small integers, whose float64 distances are exact, so that the selection must agree
index by index."""

from __future__ import annotations

import random

import pytest
import torch

from facenet_ext import _options, autograd, functional, reference
from facenet_ext._options import Options


def integers(seed: int, rules: tuple[str, ...], rows: int):
    """A random problem as the reference's arguments, a function that builds the op's Problem, and options."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    n, dim, m = rng.randrange(rows), rng.randrange(1, 9), rng.choice((0, 0, 1, 5, rows // 2))
    x = torch.randint(-3, 4, (n, dim), generator=generator).double()
    y = torch.randint(0, 1 + n // rng.choice((2, 4, 10, 30)), (n,), generator=generator)
    r = torch.randint(-3, 4, (m, dim), generator=generator).double()
    z = torch.randint(0, 1 + n // 4, (m,), generator=generator)
    references = rng.choice(("negatives", "all", "only")) if m else "none"
    rule = rng.choice(rules)
    options = Options(
        margin=float(rng.choice((0, 1, 3, 10))),
        negatives=rule,
        positives=rng.choice(("all", "hardest", "easiest")),
        pairs="ordered" if references == "only" else rng.choice(("ordered", "unordered")),
        fallback=rng.choice(("farthest", "skip")),
        distance=rng.choice(("sqeuclidean", "euclidean")),
        soft_margin=rule not in _options.EVERY and rng.random() < 0.5,
        band=rng.choice((None, 2.0)) if rule in _options.BANDED else None,
        reduction=rng.choice(("mean", "mean_active", "sum")),
    )

    def problem(x, r):
        draw = functional.draw_seed(options, torch.Generator().manual_seed(seed), x.device)
        return functional.problem_of(x, y, (r, z) if m else None, references, draw)

    def plain(function, x, r, **more):
        more |= dict(reference_embeddings=r, reference_labels=z, references=references) if m else {}
        return function(x, y, generator=torch.Generator().manual_seed(seed), **more)

    return x, r, problem, plain, options


def for_mining(options: Options) -> dict:
    return {k: v for k, v in options._asdict().items() if k not in ("soft_margin", "reduction")}


@pytest.mark.parametrize("rules", [("semi_hard", "hard"), _options.RANDOM], ids=["placed", "drawn"])
@pytest.mark.parametrize("part", range(4))
def test_one_negative_a_pair_equals_the_reference(rules, part):
    terms = 0
    for seed in range(100 * part, 100 * part + 100):
        x, r, problem, plain, options = integers(seed, rules, 60)
        mined = functional.mine(problem(x, r), options)
        want = plain(reference.mine_triplets, x, r, **for_mining(options))
        assert all(torch.equal(a, b) for a, b in zip(mined, want, strict=True)), (seed, options)

        x.requires_grad_(), r.requires_grad_()
        loss, stats = plain(reference.triplet_loss, x, r, **options._asdict(), return_stats=True)
        grads = torch.autograd.grad(loss, (x, r), allow_unused=True, materialize_grads=True)
        got, counts, d2 = autograd.triplet_loss(problem(x, r), options, True)
        alone, _, _ = autograd.triplet_loss(problem(x, r), options, False)
        got_grads = torch.autograd.grad(got, (x, r), allow_unused=True, materialize_grads=True)
        alone_grads = torch.autograd.grad(alone, (x, r), allow_unused=True, materialize_grads=True)
        assert torch.equal(got, alone) and all(map(torch.equal, got_grads, alone_grads)), (seed, options)
        torch.testing.assert_close(got, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_grads, grads, rtol=1e-10, atol=1e-11)
        constants, _, _ = autograd.triplet_loss(problem(x, r.detach()), options, False)
        assert torch.equal(constants, got)
        assert torch.equal(torch.autograd.grad(constants, x)[0], got_grads[0]), (seed, options)
        got_stats = functional.stats_of(counts, d2, options)
        for name, value in stats.items():
            torch.testing.assert_close(got_stats[name], value, rtol=1e-12, atol=1e-12)
        terms += int(stats.pairs)
    assert terms > 1000  # the cases are not empty ones


def test_lists_of_every_negative_equal_the_reference(monkeypatch):
    monkeypatch.setattr(functional, "_SLICE", 50)  # several slices even of small batches
    terms = 0
    for seed in range(150):
        x, r, problem, plain, options = integers(seed, ("all", "all_semi_hard"), 14)
        mined = functional.mine(problem(x, r), options)
        want = plain(reference.mine_triplets, x, r, **for_mining(options))
        assert all(torch.equal(a, b) for a, b in zip(mined, want, strict=True)), (seed, options)
        terms += len(mined.anchor)
    assert terms > 1000


@pytest.mark.parametrize("rule", _options.NEGATIVES)
@pytest.mark.parametrize("positives", _options.POSITIVES)
@pytest.mark.parametrize("references", _options.REFERENCES)
def test_no_references(rule, positives, references):
    """An empty memory: nothing but the batch, or nothing at all."""
    x, y = torch.rand(6, 2), torch.arange(6) // 2
    more = dict(reference_embeddings=x[:0], reference_labels=y[:0], references=references)
    mined = functional.mine_triplets(x, y, negatives=rule, positives=positives, **more)
    loss = functional.triplet_loss(x, y, negatives=rule, positives=positives, **more)
    assert references != "only" or (len(mined.anchor) == 0 and float(loss) == 0)
