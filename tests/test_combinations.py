"""Every legal combination of options against plain float64 loops (triplet_loop.py), a slice of what tests/campaign.py
--rules does; and every other combination refused by name."""

from __future__ import annotations

import itertools

import pytest
import torch
import triplet_loop

from facenet_ext import TripletLoss, mine_triplets, triplet_loss


@pytest.mark.parametrize("part", range(3))
def test_against_plain_loops(device, part):
    combinations, terms, bounded = triplet_loop.combinations(), 0, 0
    for seed in range(400 * part, 400 * part + 400):
        case = triplet_loop.random_case(seed, combinations[seed % len(combinations)])
        report = triplet_loop.check(case, device)
        assert not triplet_loop.failed(case, report), (case.name, report)
        terms, bounded = terms + report.terms, bounded + report.only_bounds
    assert terms > 5_000 and bounded < 40  # neither empty cases nor such that rounding decides


def test_the_loops_notice_another_rule():
    """Each option changes what comes out, and the checker sees it: judged as what it is not, a result fails."""
    combinations, noticed = triplet_loop.combinations(), {}
    for seed in range(1500):
        case = triplet_loop.random_case(seed, combinations[seed])
        truth, name = dict(case.options), list(case.options)[seed % len(case.options)]
        if name == "fallback" and truth["negatives"] != "semi_hard":
            continue
        other = {
            "margin": 2 * truth["margin"] + 1,
            "band": truth.get("band", 0) / 2,
            "normalize": not truth["normalize"],
        }
        other["soft_margin"] = not truth["soft_margin"]
        choices = [value for value in triplet_loop.CHOICES.get(name, ()) if value != truth[name]]
        swapped = dict(truth, **{name: other.get(name, choices and choices[seed // 7 % len(choices)])})
        judged = dict(swapped, band=bool(swapped.get("band")), references=case.references)
        if triplet_loop.forbidden(judged):
            continue
        judge = triplet_loop.check(case, judged_as=swapped)
        noticed.setdefault(name, []).append(triplet_loop.failed(case, judge))
    assert set(noticed) == {name for name in triplet_loop.CHOICES if name != "references"} | {"margin"}
    assert all(sum(seen) > 0.2 * len(seen) for seen in noticed.values()), {
        k: sum(v) / len(v) for k, v in noticed.items()
    }


def test_others_are_refused_by_name():
    x, y = torch.rand(6, 2), torch.arange(6) // 2
    names = ("negatives", "positives", "pairs", "soft_margin", "band", "references")
    legal = refused = 0
    for values in itertools.product(*(triplet_loop.CHOICES[name] for name in names)):
        option = dict(zip(names, values, strict=True))
        why = triplet_loop.forbidden(option)
        options = dict(option, band=0.3 if option["band"] else None)
        which = options.pop("references")
        more = dict(reference_embeddings=x, reference_labels=y, references=which) if which else {}
        if why is None:
            legal += 1
            assert triplet_loss(x, y, **options, **more).isfinite()
            continue
        refused += 1
        with pytest.raises(ValueError, match=f"^{why} is .*; accepted: "):
            triplet_loss(x, y, **options, **more)
        if why == "pairs":  # not known before the references are
            continue
        with pytest.raises(ValueError, match=f"^{why} is .*; accepted: "):
            TripletLoss(**options)
        if why == "band":
            del options["soft_margin"]
            with pytest.raises(ValueError, match="^band is .*; accepted: "):
                mine_triplets(x, y, **options, **more)
    assert legal == 273 and refused > 200
