"""Tiles that are looked at in whole numbers first (csrc/cpu/screen.h): not one bit of any result depends on it.

By itself a call does so where classes have come apart and rows are many enough; FACENET_EXT_SCREENING=always asks for
it wherever it is possible, =off forbids it. AVX-512 with VNNI and AVX2 screen, the portable path and AVX-512 without
VNNI do not.
"""

import pytest
import torch

from facenet_ext import mine_triplets, triplet_loss

# N, K, D: beyond one tile of 192 rows; a D beyond one partial sum (256), one that fills no vector, one class size of 2.
SHAPES = [(500, 2, 300), (700, 7, 33), (1000, 40, 128), (600, 5, 16), (431, 20, 513), (800, 9, 131)]


def apart(n: int, k: int, d: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) // k
    centres = torch.nn.functional.normalize(torch.randn(n // k + 1, d, generator=generator))
    x = centres[labels] + noise * torch.randn(n, d, generator=generator) / d**0.5
    order = torch.randperm(n, generator=generator)
    return torch.nn.functional.normalize(x)[order], labels[order]


def loss_and_gradient(x, labels, **options):
    x = x.clone().requires_grad_()
    loss, *stats = result if isinstance(result := triplet_loss(x, labels, **options), tuple) else (result,)
    loss.backward()
    return loss.detach(), x.grad, stats


@pytest.fixture
def screening(monkeypatch):
    return lambda value: monkeypatch.setenv("FACENET_EXT_SCREENING", value)


@pytest.fixture
def check(screening):
    """The same loss, gradient and statistics with screening and without it, asked for or not."""

    def check(x, labels, **options):
        screening("off")
        loss, gradient, stats = loss_and_gradient(x, labels, return_stats=True, **options)
        for value in "", "always":
            screening(value)
            for asked in False, True:
                got = loss_and_gradient(x, labels, return_stats=asked, **options)
                assert torch.equal(got[0], loss) and torch.equal(got[1], gradient), (value, asked)
                assert not asked or got[2] == stats, (value, got[2], stats)

    return check


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distance": "euclidean"},
        {"normalize": True},
        {"margin": 0.0},
        {"pairs": "unordered"},
        {"positives": "hardest"},
        {"fallback": "skip", "reduction": "sum"},
        {"soft_margin": True},
        {"negatives": "hard"},
        {"negatives": "hard", "soft_margin": True, "positives": "hardest"},
        {"negatives": "all"},
        {"negatives": "all_semi_hard", "distance": "euclidean"},
        {"negatives": "all_semi_hard", "positives": "easiest", "margin": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("noise", [0.3, 0.8, 1.1, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits(check, shape, noise, options):
    check(*apart(*shape, noise, seed=3), **options)


@pytest.mark.parametrize("noise", [0.3, 1.1])
@pytest.mark.parametrize(
    "options", [{}, {"distance": "cosine"}, {"negatives": "hard"}, {"negatives": "all_semi_hard"}], ids=str
)
@pytest.mark.parametrize("references", ["negatives", "all", "only"])
@pytest.mark.parametrize(
    ("batch", "shape"), [(100, (900, 7, 33)), (431, (1000, 40, 128)), (600, (650, 5, 260))], ids=str
)
def test_same_bits_with_references(check, batch, shape, references, options, noise):
    x, labels = apart(*shape, noise, seed=5)
    rows = {"reference_embeddings": x[batch:], "reference_labels": labels[batch:]}
    check(x[:batch], labels[:batch], references=references, **rows, **options)


def test_by_itself_with_references(check):
    x, labels = apart(2000, 8, 48, 0.8, seed=10)
    rows = {"reference_embeddings": x[400:], "reference_labels": labels[400:]}
    for options in {}, {"references": "only", "negatives": "hard"}, {"references": "all", "soft_margin": True}:
        check(x[:400], labels[:400], **rows, **options)


@pytest.mark.parametrize("noise", [0.3, 1.1, 3.0])
@pytest.mark.parametrize("options", [{}, {"fallback": "skip"}, {"negatives": "hard", "normalize": True}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_pairs(screening, shape, noise, options):
    x, labels = apart(*shape, noise, seed=8)
    screening("off")
    expected = mine_triplets(x, labels, **options)
    screening("always")
    for got, want in zip(mine_triplets(x, labels, **options), expected, strict=True):
        assert torch.equal(got, want)


def test_by_itself_where_every_negative_is_asked_for(check):
    """From 8 tiles on a call with statistics is screened without being told to."""
    check(*apart(1600, 8, 48, 0.8, seed=9))
    check(*apart(1600, 8, 48, 0.8, seed=9), soft_margin=True)


def test_a_misspelt_switch_is_an_error(screening):
    screening("of")
    with pytest.raises(ValueError, match="FACENET_EXT_SCREENING: is neither off nor always"):
        triplet_loss(*apart(20, 2, 4, 1.0, seed=11))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_uneven_lengths_and_misplaced_rows(check, threads):
    """Rows of very different lengths (the bound is in units of the longest), some equal, some 0 or hardly more."""
    x, labels = apart(900, 6, 130, 0.5, seed=4)
    x = x * torch.logspace(-2, 0.5, len(x))[torch.randperm(len(x), generator=torch.Generator().manual_seed(5))][:, None]
    x[::50] = x[7]
    x[3::97] = 0
    x[5::89] = 1e-41  # the inverse of their step is no number
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, margin in ((x, 0.2), (torch.nn.functional.normalize(x), 0.2), (x * 1e-4, 2e-9), (x + 0.5, 0.01)):
            check(rows, labels, margin=margin)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [128, 1024])
def test_sums_at_the_edge(check, dim):
    """Rows whose whole numbers are as large as they get, one beside zeros or all of them; those of two classes lie
    along one line, so that the sums of their products come near what 16 bits hold, and others along its opposite."""
    n = 400
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) // 4
    signs = torch.randint(0, 2, (n // 4, dim), generator=generator) * 2.0 - 1
    signs[[0, 60, 80]] = torch.tensor([1.0, 1.0, -1.0])[:, None]  # in tiles of their own
    peaks = torch.eye(dim)[torch.arange(n // 4) % (n // 4 - 2)] * dim**0.5
    for centres in (signs, peaks, torch.where(torch.arange(n // 4)[:, None] % 2 == 0, signs, peaks)):
        x = centres[labels] + 0.01 * torch.randn(n, dim, generator=generator)
        for rows in (torch.nn.functional.normalize(x), x):
            check(rows, labels, margin=0.05)


@pytest.mark.parametrize("fallback", ["farthest", "skip"])
def test_positives_beyond_every_negative(check, fallback):
    """What an anchor knows of far negatives before the first tile: enough for most, nothing where there are none."""
    x, labels = apart(700, 7, 133, 0.4, seed=6)
    for label in range(0, 100, 9):
        x[(labels == label).nonzero()[0]] *= -1  # the antipode of its class: its mates have no farther negative
    options = {"fallback": fallback, "margin": 0.3}
    _, stats = triplet_loss(x, labels, return_stats=True, **options)
    assert stats.fallback > 0 if fallback == "farthest" else stats.pairs < 700 * 6
    check(x, labels, **options)
