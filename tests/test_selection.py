"""The miner: what it lists, what it chooses; and the checker that judges it, which has to find planted mistakes."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, random_case
from oracle import SELECTION_TOLERANCE, check_selection, expected_pairs, rows64

from facenet_ext import Triplets, mine_triplets, reference

LINE = torch.tensor([[0.0], [1.0], [0.5], [2.0], [3.0], [-4.0]])  # distances along a line, easy to see
LINE_LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def test_line_by_hand(device):
    t = mine_triplets(LINE.to(device), LINE_LABELS.to(device))
    rows = list(zip(*(column.tolist() for column in t), strict=True))
    assert rows == [
        # anchor 0 at 0, positive at 1: negatives at .5 (too near), 2, 3, -4
        (0, 1, 3, 1.0, 4.0, False),
        (1, 0, 4, 1.0, 4.0, False),  # anchor 1: 2 is exactly as far as the positive, not farther; 3 is
        (2, 3, 4, 2.25, 6.25, False),  # anchor .5, positive 2: 0, 1 too near; 3
        (3, 2, 0, 2.25, 4.0, False),  # anchor 2: 1, 3 too near; 0
        (4, 5, 0, 49.0, 9.0, True),  # anchor 3, positive 7 away: nothing is farther; the farthest is 0
        (5, 4, 3, 49.0, 36.0, True),  # anchor -4: the farthest negative is 2
    ]


def test_skip_leaves_out_flagged_pairs(device):
    everything = mine_triplets(LINE.to(device), LINE_LABELS.to(device))
    skipped = mine_triplets(LINE.to(device), LINE_LABELS.to(device), fallback="skip")
    assert not skipped.fallback.any() and len(skipped.anchor) == 4
    for column, whole in zip(skipped, everything, strict=True):
        assert torch.equal(column, whole[~everything.fallback])


def test_ties_go_to_the_lowest_index(device):
    x = torch.tensor([[0.0, 0], [1, 0], [0, 2], [2, 0], [0, -2], [-2, 0]], device=device)
    y = torch.tensor([0, 0, 5, 4, 3, 2], device=device)
    assert mine_triplets(x, y).negative[0] == 2
    assert mine_triplets(x * 0, y).negative.tolist() == [2, 2]  # collapsed: farthest of equals, also the lowest index
    assert mine_triplets(x * 0, y).fallback.all()


def test_farthest_below_every_positive(device):
    """All negatives are nearer than the only positive, and come nearest first: each is the farthest so far."""
    y = torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(1, 71)]).to(device)
    for farthest in torch.linspace(3.0, 4.9, 500).tolist():
        x = torch.cat([torch.tensor([0.0, 10.0]), torch.linspace(0.01, farthest, 70)])[:, None].to(device)
        t = mine_triplets(x, y)
        assert t.fallback.all() and t.negative.tolist() == [71, 2], farthest


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_order(device, dtype):
    case = random_case(11, 40, 20, dtype)
    t = mine_triplets(case.embeddings.to(device), case.labels.to(device))
    assert isinstance(t, Triplets)
    assert all(column.device.type == device.type and column.dim() == 1 for column in t)
    assert [column.dtype for column in t[:3]] == [torch.int64] * 3
    assert t.d2_ap.dtype == t.d2_an.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert t.fallback.dtype == torch.bool
    want_anchor, want_positive = expected_pairs(case.labels)
    assert torch.equal(t.anchor.cpu(), want_anchor) and torch.equal(t.positive.cpu(), want_positive)


@pytest.mark.parametrize(
    "labels",
    [[], [3], [0, 1, 2, 3], [7, 7, 7, 7]],
    ids=["empty", "single", "all different", "one class"],
)
def test_nothing_to_list(device, labels):
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    for columns in (mine_triplets(torch.randn(len(labels), 3, device=device), y),):
        assert all(len(column) == 0 for column in columns)
        assert columns.fallback.dtype == torch.bool and columns.negative.dtype == torch.int64


def test_two_thousand_random_selections(device):
    """Many small batches; tests/campaign.py does the same with larger ones."""
    pairs = 0
    for seed in range(2000):
        case = random_case(seed, 48, 70)
        x, y = case.embeddings.to(device), case.labels.to(device)
        normalize = case.options["normalize"]
        t = mine_triplets(x, y, normalize=normalize)
        report = check_selection(rows64(x, normalize), y, t, SELECTION_TOLERANCE[x.dtype])
        assert report.ok, (case.name, report)
        pairs += report.pairs
    assert pairs > 100_000  # the cases are not empty ones


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-5, 1e-6])
def test_farthest_of_near_duplicates(device, spread):
    """A fallback whose farthest negative lies hardly below the positive: classes of two, few directions."""
    fallbacks = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.nn.functional.normalize(torch.randn(12, 3, generator=generator), dim=1)
        noise = spread * torch.randn(38, 3, generator=generator)
        x = directions[torch.randint(0, 12, (38,), generator=generator)] + noise
        x, y = x.to(device), torch.arange(38, device=device) // 2
        t = mine_triplets(x, y, normalize=True)
        report = check_selection(rows64(x, True), y, t, SELECTION_TOLERANCE[x.dtype])
        assert report.ok, (seed, report)
        fallbacks += int(t.fallback.sum())
    assert fallbacks > 50


def test_exact_selection_on_integers(device):
    """Small integers are exact in float32, ties and all: here the selection has to be the reference's, index by
    index."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n, dim = 2 + seed, 1 + seed % 9
        x = torch.randint(-3, 4, (n, dim), generator=generator).float().to(device)
        y = torch.randint(0, 1 + n // 4, (n,), generator=generator).to(device)
        for fallback in ("farthest", "skip"):
            got = mine_triplets(x, y, fallback=fallback)
            want = reference.mine_triplets(x, y, fallback=fallback)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (seed, fallback)


def test_nan_is_never_farther(device):
    x = LINE.clone()
    x[3] = torch.nan
    t = mine_triplets(x.to(device), LINE_LABELS.to(device))
    pairs = zip(t.anchor.tolist(), t.positive.tolist(), strict=True)
    rows = dict(zip(pairs, zip(t.negative.tolist(), t.fallback.tolist(), strict=True), strict=True))
    assert rows[0, 1] == (4, False)  # row 3, the closest farther one before, is NaN now
    assert rows[4, 5] == (0, True)  # and not the farthest either


# ---- the checker itself ----------------------------------------------------------------------------------------------


def planted(**changes) -> Triplets:
    return reference.mine_triplets(LINE, LINE_LABELS)._replace(**changes)


def judge(triplets: Triplets, x: torch.Tensor = LINE):
    return check_selection(rows64(x), LINE_LABELS, triplets, 1e-6)


def test_checker_accepts_the_reference():
    report = judge(planted())
    assert report.ok and report.pairs == 6 and report.worst_excess == 0


@pytest.mark.parametrize(
    ("row", "negative", "verdict"),
    [
        (0, 1, "illegal"),  # its own positive
        (0, 2, "illegal"),  # nearer than the positive
        (0, 4, "suboptimal"),  # farther, but not the closest
        (4, 1, "suboptimal"),  # fallback, but not the farthest
    ],
)
def test_checker_finds_a_wrong_negative(row, negative, verdict):
    wrong = planted().negative.clone()
    wrong[row] = negative
    report = judge(planted(negative=wrong))
    assert getattr(report, verdict) == 1 and not report.ok


def test_checker_finds_wrong_flags():
    flags = planted().fallback
    assert judge(planted(fallback=~flags)).illegal == 6
    one = flags.clone()
    one[0] = True
    assert judge(planted(fallback=one)).illegal == 1
    one = flags.clone()
    one[4] = False  # claims that the farthest one, nearer than the positive, is farther
    assert judge(planted(fallback=one)).illegal == 1


def test_checker_finds_missing_and_swapped_pairs():
    shorter = Triplets(*(column[1:] for column in planted()))
    with pytest.raises(AssertionError, match="pairs that count"):
        judge(shorter)
    with pytest.raises(AssertionError, match="pairs that count"):
        judge(planted(positive=planted().positive.flip(0)))


def test_checker_forgives_only_rounding():
    x = LINE.clone()
    x[3] = 2 - 2e-7  # by a rounding error nearer than 2: anchor 1 may see it on either side
    either = planted().negative.clone()
    either[1] = 3
    assert judge(planted(), x).ok and judge(planted(negative=either), x).ok
    x[3] = 2 - 1e-3
    assert judge(planted(negative=either), x).illegal > 0
