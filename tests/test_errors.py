"""Every precondition has a message that names the argument, what came, and what is accepted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from facenet_ext import SemiHardTripletLoss, TripletLoss, _backend, mine_triplets, reference, triplet_loss

X = torch.randn(6, 4)
Y = torch.tensor([0, 0, 1, 1, 2, 2])

BATCHES = [
    (X.numpy(), Y, TypeError, r"embeddings is a ndarray; accepted: a torch.Tensor \[N, D\]"),
    (X, Y.tolist(), TypeError, r"labels is a list; accepted: a torch.Tensor \[N\] of integers"),
    (X.long(), Y, TypeError, r"embeddings has dtype torch.int64; accepted: torch.float32, torch.float64, torch"),
    (X.to(torch.complex64), Y, TypeError, r"embeddings has dtype torch.complex64"),
    (X.to(torch.float8_e4m3fn), Y, TypeError, r"embeddings has dtype torch.float8_e4m3fn"),
    (X, Y.float(), TypeError, r"labels has dtype torch.float32; accepted: torch.int64"),
    (X, Y > 0, TypeError, r"labels has dtype torch.bool; accepted: torch.int64"),
    (X.to_sparse(), Y, TypeError, r"embeddings has layout torch.sparse_coo; accepted: torch.strided"),
    (X, Y.to_sparse(), TypeError, r"labels has layout torch.sparse_coo; accepted: torch.strided"),
    (X[0], Y, ValueError, r"embeddings has shape \[4\]; accepted: \[N, D\]"),
    (X[None], Y, ValueError, r"embeddings has shape \[1, 6, 4\]; accepted: \[N, D\]"),
    (X[:, :0], Y, ValueError, r"embeddings has shape \[6, 0\]; accepted: \[N, D\] with D >= 1"),
    (X, Y[:, None], ValueError, r"labels has shape \[6, 1\]; accepted: \[N\]"),
    (X, Y[:5], ValueError, r"labels has length 5; accepted: 6, the number of rows of embeddings"),
    (X, Y.to("meta"), ValueError, r"labels is on meta; accepted: cpu, the device of embeddings"),
    (X.to("meta"), Y.to("meta"), ValueError, r"embeddings is on meta; accepted: a tensor on cpu or cuda"),
]


@pytest.mark.parametrize(
    "function", [triplet_loss, mine_triplets, SemiHardTripletLoss()], ids=["loss", "mine", "module"]
)
@pytest.mark.parametrize(("embeddings", "labels", "error", "message"), BATCHES, ids=[b[3][:40] for b in BATCHES])
def test_bad_batch(function, embeddings, labels, error, message):
    with pytest.raises(error, match=message):
        function(embeddings, labels)


def test_too_many_rows():
    many = torch.empty(1, dtype=torch.float16).expand(2**31, 1)
    with pytest.raises(ValueError, match="embeddings has 2147483648 rows; accepted: at most 2147483647"):
        triplet_loss(many, torch.empty(1, dtype=torch.int64).expand(2**31))


OPTIONS = [
    ({"margin": -0.1}, ValueError, "margin is -0.1; accepted: a finite number >= 0, in the unit of distance"),
    ({"margin": float("nan")}, ValueError, "margin is nan"),
    ({"margin": float("inf")}, ValueError, "margin is inf"),
    ({"margin": "0.2"}, TypeError, "margin is a str; accepted: a number >= 0"),
    ({"margin": True}, TypeError, "margin is a bool"),
    ({"margin": 10**400}, ValueError, "margin is 1000"),
    ({"margin": None}, TypeError, "margin is a NoneType"),
    ({"margin": torch.tensor(0.2)}, TypeError, "margin is a Tensor"),
    ({"negatives": np.array(["hard", "all"])}, TypeError, "negatives is a ndarray; accepted: 'semi_hard', 'hard'"),
    ({"negatives": "closest"}, ValueError, "negatives is 'closest'; accepted: 'semi_hard', 'hard', 'random_semi_hard'"),
    ({"positives": "farthest"}, ValueError, "positives is 'farthest'; accepted: 'all', 'hardest', 'easiest'"),
    ({"pairs": "both"}, ValueError, "pairs is 'both'; accepted: 'ordered', 'unordered'"),
    ({"fallback": "nearest"}, ValueError, "fallback is 'nearest'; accepted: 'farthest', 'skip'"),
    ({"fallback": None}, TypeError, "fallback is a NoneType; accepted: 'farthest', 'skip'"),
    ({"distance": "l2"}, ValueError, "distance is 'l2'; accepted: 'sqeuclidean', 'euclidean', 'cosine'"),
    ({"soft_margin": 1}, TypeError, "soft_margin is a int; accepted: True or False"),
    ({"soft_margin": True, "negatives": "all"}, ValueError, "soft_margin is True with negatives='all'; accepted"),
    ({"soft_margin": True, "negatives": "all_semi_hard"}, ValueError, "soft_margin is True with negatives='all_semi"),
    ({"band": 0.1}, ValueError, "band is 0.1 with negatives='semi_hard'; accepted: None, or negatives one of 'rando"),
    ({"band": 0.0, "negatives": "all_semi_hard"}, ValueError, "band is 0.0; accepted: None or a finite number > 0"),
    ({"band": 10**400, "negatives": "all_semi_hard"}, ValueError, "band is 1000"),
    ({"band": "m", "negatives": "all_semi_hard"}, TypeError, "band is a str; accepted: None or a number > 0"),
    ({"generator": 7}, TypeError, "generator is a int; accepted: None or a torch.Generator"),
    ({"reduction": "none"}, ValueError, "reduction is 'none'; accepted: 'mean', 'mean_active', 'sum'"),
    ({"normalize": 1}, TypeError, "normalize is a int; accepted: True or False"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=[str(o[0])[:60] for o in OPTIONS])
def test_bad_option(options, error, message):
    with pytest.raises(error, match=message):
        triplet_loss(X, Y, **options)
    with pytest.raises(error, match=message):  # at construction, not at the first batch
        TripletLoss(**options)
    if not {"soft_margin", "reduction"} & set(options):
        with pytest.raises(error, match=message):
            mine_triplets(X, Y, **options)


def test_semi_hard_module_takes_semi_hard_rules():
    message = "negatives is 'hard'; accepted: 'semi_hard', 'random_semi_hard', 'all_semi_hard'"
    with pytest.raises(ValueError, match=message):
        SemiHardTripletLoss(negatives="hard")


def test_bad_return_stats():
    with pytest.raises(TypeError, match="return_stats is a str; accepted: True or False"):
        triplet_loss(X, Y, return_stats="yes")


def test_options_are_keywords():
    with pytest.raises(TypeError):
        triplet_loss(X, Y, 0.2)
    with pytest.raises(TypeError):
        mine_triplets(X, Y, "semi_hard")


@pytest.mark.parametrize("margin", [0, 1, np.float32(0.2), np.int64(1), 0.0])
def test_numbers_of_any_kind_are_margins(margin):
    assert torch.equal(triplet_loss(X, Y, margin=margin), triplet_loss(X, Y, margin=float(margin)))


@pytest.mark.parametrize("distance", ["sqeuclidean", "euclidean", "cosine"])
def test_a_margin_whose_square_is_no_number(distance):
    for function in (triplet_loss, reference.triplet_loss):
        loss, stats = function(X.double(), Y, margin=1e300, distance=distance, return_stats=True)
        assert loss == 1e300 and stats.active == stats.pairs == 6


def test_cuda_without_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_backend, "_HAS_CUDA", False)
    _backend._cuda_device.cache_clear()
    with pytest.raises(RuntimeError, match="no CUDA backend.*FACENET_EXT_CUDA=ON pip install.*or move embeddings"):
        _backend._cuda_device(0)
    _backend._cuda_device.cache_clear()


def test_forward_mode_says_that_there_is_none():
    """It would be a derivative of 0, silently: jacobian(strategy="forward-mode") asks for it."""
    forward_ad = torch.autograd.forward_ad
    rows = {"reference_embeddings": X + 1, "reference_labels": Y}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        for arguments, options in (
            ((dual, Y), {}),
            ((dual, Y), rows),
            ((dual, Y), {**rows, "references": "only"}),
            ((X, Y), {**rows, "reference_embeddings": dual}),
            ((X.clone().requires_grad_(), Y), {**rows, "reference_embeddings": dual}),
        ):
            with pytest.raises(RuntimeError, match="no forward-mode derivative.*facenet_ext.reference"):
                triplet_loss(*arguments, **options)
        assert mine_triplets(dual, Y).d2_ap.isfinite().all()
        assert triplet_loss(X, Y).isfinite()


def test_a_bool_of_numpy_is_told_from_pythons():
    with pytest.raises(TypeError, match="normalize is a numpy.bool; accepted: True or False"):
        triplet_loss(X, Y, normalize=np.bool_(True))
