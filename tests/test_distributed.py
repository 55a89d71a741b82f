"""1 = 2 = 3 = 4 ranks: loss, statistics, gradients and mining of a divided batch are those of the whole one.

gloo on the CPU, one set of four processes for all cases, failing ranks last. What a rank does: rank_worker.py.
"""

from __future__ import annotations

import pytest
import rank_worker
import torch
from torch import distributed as dist
from torch import multiprocessing

from facenet_ext import SemiHardTripletLoss, mine_triplets, triplet_loss
from facenet_ext.distributed import gather

JOBS = ("random_splits", "data_parallel", "own_loss", "disagreements", "nothing_finite", "rank_fails")


def test_four_ranks(tmp_path):
    """An assertion that fails on any rank ends all of them and comes here with its traceback."""
    arguments = str(tmp_path / "store"), JOBS
    multiprocessing.start_processes(rank_worker.start, arguments, rank_worker.WORLD, start_method="spawn")


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_module_options_and_errors(one_rank):
    x, y = torch.randn(12, 4, requires_grad=True), torch.arange(12) // 3
    criterion = SemiHardTripletLoss(process_group=one_rank)
    loss, stats = criterion(x, y, return_stats=True)
    torch.testing.assert_close(loss, triplet_loss(x, y))
    assert int(stats.pairs) == 24
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)
    with torch.no_grad():
        assert not criterion(x, y).requires_grad
    with pytest.raises(TypeError, match="process_group is a str"):
        triplet_loss(x, y, process_group="world")
    with pytest.raises(TypeError, match="process_group is a int"):
        SemiHardTripletLoss(process_group=2)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_survives_several_backwards(one_rank, reduction):
    x, y = torch.randn(12, 4, requires_grad=True), torch.arange(12) // 3
    (want,) = torch.autograd.grad(triplet_loss(x, y, reduction=reduction), x)
    loss = triplet_loss(x, y, reduction=reduction, process_group=one_rank)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(x.grad, times * want)
    x.grad.zero_()
    loss.backward()
    torch.testing.assert_close(x.grad, want)


def test_no_rows_on_any_rank(one_rank):
    x, y = torch.randn(0, 4, requires_grad=True), torch.arange(0)
    loss, stats = triplet_loss(x, y, process_group=one_rank, return_stats=True)
    loss.backward()
    assert loss == 0 and stats.pairs == 0 and x.grad.shape == (0, 4)
    assert len(mine_triplets(x, y, process_group=one_rank).anchor) == 0
    assert gather(x, y, one_rank).rows.shape == (0, 4)


def test_compiled_it_breaks_the_graph_and_works(one_rank):
    torch.compiler.reset()
    x, y = torch.randn(12, 4, requires_grad=True), torch.arange(12) // 3
    compiled = torch.compile(lambda x, y: triplet_loss(x * 2, y, process_group=one_rank) + 1, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), triplet_loss(x * 2, y) + 1)
    torch.compiler.reset()
