"""The miner inside pytorch-metric-learning."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")

from pytorch_metric_learning import losses, reducers

import facenet_ext
from facenet_ext.interop import SemiHardMiner


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 6, generator=generator, dtype=torch.float64), torch.arange(40) % 8


@pytest.mark.parametrize("fallback", ["skip", "farthest"])
def test_their_loss_of_our_triplets_is_our_loss(fallback):
    x, y = batch()
    x.requires_grad_()
    loss = losses.TripletMarginLoss(margin=0.3, reducer=reducers.MeanReducer())
    theirs = loss(x, y, SemiHardMiner(fallback=fallback)(x, y))
    ours = facenet_ext.triplet_loss(x, y, margin=0.3, distance="euclidean", normalize=True, fallback=fallback)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    gradients = [torch.autograd.grad(value, x)[0] for value in (theirs, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_references_take_the_place_of_the_batch():
    x, y = batch(1)
    rows, labels = batch(2)
    a, p, n = SemiHardMiner()(x, y, rows[:30], labels[:30])
    assert len(a) and (y[a] == labels[p]).all() and (y[a] != labels[n]).all() and max(p.max(), n.max()) < 30
    unit = torch.nn.functional.normalize
    d_ap, d_an = (torch.linalg.vector_norm(unit(x)[a] - unit(rows)[i], dim=1) for i in (p, n))
    assert (d_an > d_ap).all()
    losses.TripletMarginLoss()(x, y, (a, p, n), ref_emb=rows[:30], ref_labels=labels[:30])


def test_inside_their_trainer():
    from pytorch_metric_learning import samplers, trainers

    x, y = batch(3)
    network, seen = torch.nn.Linear(6, 4, dtype=torch.float64), []
    trainers.MetricLossOnly(
        models={"trunk": network},
        optimizers={"trunk_optimizer": torch.optim.SGD(network.parameters(), lr=0.1)},
        batch_size=16,
        loss_funcs={"metric_loss": losses.TripletMarginLoss()},
        mining_funcs={"tuple_miner": SemiHardMiner()},
        dataset=torch.utils.data.TensorDataset(x, y),
        sampler=samplers.MPerClassSampler(y, 4, length_before_new_iter=32),
        dataloader_num_workers=0,
        end_of_iteration_hook=lambda trainer: seen.append(trainer.losses["metric_loss"].item()),
    ).train(num_epochs=2)
    assert len(seen) == 4 and all(0 < loss < 1 for loss in seen)


@pytest.mark.parametrize(
    ("rows", "labels", "error", "message"),
    [
        (torch.zeros(4, 6), torch.zeros(4), TypeError, "^ref_labels has dtype torch.float32"),
        (torch.zeros(4, 6), None, TypeError, "^ref_labels is a NoneType"),
        (torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64), ValueError, r"^ref_emb has shape \[4, 5\].* \[M, 6\]"),
        (torch.zeros(4, 6).int(), torch.zeros(4, dtype=torch.int64), TypeError, "^ref_emb has dtype torch.int32"),
    ],
)
def test_bad_references_are_named_as_the_caller_named_them(rows, labels, error, message):
    with pytest.raises(error, match=message):
        SemiHardMiner()(*batch(), rows, labels)


def test_unordered_pairs_with_references_are_named_as_the_caller_named_them():
    with pytest.raises(ValueError, match="^pairs is 'unordered' with ref_emb, .*; accepted: 'ordered'"):
        SemiHardMiner(pairs="unordered")(*batch(), *batch(1))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="negatives is 'all'; accepted: 'semi_hard', 'hard'"):
        SemiHardMiner(negatives="all")
