"""What one rank of test_distributed.py does: every case on 1, 2, 3 and 4 ranks, held against one process with the whole
batch, which each rank computes for itself."""

from __future__ import annotations

import datetime
import os
import time

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import facenet_ext
from facenet_ext import SemiHardTripletLoss, _options, cached_step, mine_triplets, triplet_loss

WORLD = 4
SPLITS = 4 * 13  # each rule in each dtype
PATIENCE = datetime.timedelta(seconds=4)  # the timeout of the groups in which a rank fails
RULES = (
    dict(),
    dict(reduction="sum"),
    dict(fallback="skip", reduction="mean_active"),
    dict(distance="euclidean", margin=0.7),
    dict(normalize=True),
    dict(negatives="hard", positives="hardest", soft_margin=True),
    dict(negatives="hard", positives="easiest", distance="cosine"),
    dict(negatives="random_semi_hard", margin=2.0),
    dict(negatives="random_active", positives="hardest", distance="euclidean", soft_margin=True),
    dict(negatives="random_semi_hard", band=3.0, pairs="unordered", reduction="mean_active"),
    dict(negatives="all", margin=1.0),
    dict(negatives="all_semi_hard", distance="euclidean", band=1.0, reduction="mean_active"),
    dict(negatives="all", pairs="unordered", positives="easiest", reduction="sum"),
)
REFERENCES = (None, "all", "only", "negatives")


def start(rank: int, store: str, jobs: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    groups = {w: dist.new_group(list(range(w))) for w in range(1, WORLD + 1)}
    for job in jobs:
        globals()[job](rank, groups)
    os._exit(0)  # no farewell to ranks that are gone


def split(rows: int, ranks: int, generator: torch.Generator) -> list[int]:
    """A random division of `rows`; now and then a rank has none."""
    owner = torch.randint(0, ranks, (rows,), generator=generator)
    return torch.bincount(owner, minlength=ranks).tolist()


def close(got: torch.Tensor, want: torch.Tensor, what: object, part: slice = slice(None)) -> None:
    """1e-6 of the largest element, 1e-12 in float64, the last bits in half precision; equal for integers. `part` of
    `want` is compared."""
    dtype, largest = want.dtype, float(want.double().abs().max()) if want.numel() else 0.0
    want = want[part] if want.dim() else want
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0.0)
    if dtype in (torch.float16, torch.bfloat16):
        tolerance = 2 * torch.finfo(dtype).eps
    if want.numel():
        got, want = got.double(), want.double()
        error = float((got - want).abs().max())
        assert error <= tolerance * max(1e-3, largest), (what, error)


def loss_and_gradients(x, y, r, yr, which, options, **more):
    x, r = x.clone().requires_grad_(), r.clone().requires_grad_()
    if which is not None:
        more.update(reference_embeddings=r, reference_labels=yr, references=which)
    loss, stats = triplet_loss(x, y, return_stats=True, **options, **more)
    loss.backward()
    return loss.detach(), stats, x.grad, r.grad


def random_splits(rank, groups):
    for case in range(SPLITS):
        generator = torch.Generator().manual_seed(case)
        rows, dim = int(torch.randint(0 if case % 10 == 9 else 8, 40, (1,), generator=generator)), 1 + case % 7
        dtype = (torch.float64, torch.float64, torch.float32, torch.bfloat16)[case % 4]
        # Small integers: many ties and duplicates, and distances that every order of summation finds equal.
        x = torch.randint(-2, 3, (rows, dim), generator=generator).to(dtype)
        if case % 3 == 0 and dtype == torch.float64:
            x = torch.randn(rows, dim, generator=generator, dtype=dtype)
        y = torch.randint(0, 6, (rows,), generator=generator)
        options, which = dict(RULES[case % len(RULES)]), REFERENCES[case // 2 % len(REFERENCES)]
        draws = options.get("negatives") in _options.RANDOM
        if which == "only" and (draws or "pairs" in options):  # excluded, by name: test_errors.py
            which = "all"
        r, yr = x.flip(0)[:5] + 1, y[:5]
        for ranks, group in groups.items():
            counts = split(rows, ranks, generator)
            if case == 0 and ranks > 1:
                counts = [counts[0] + counts[1], 0, *counts[2:]]
            if rank >= ranks:
                continue
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            what = case, ranks, counts, options, which, dtype

            def generator_of(rank, case=case):  # rank 0's seed is everybody's
                return dict(generator=torch.Generator().manual_seed(case + 100 * rank))

            want, want_stats, want_x, want_r = loss_and_gradients(x, y, r, yr, which, options, **generator_of(0))
            loss, stats, grad, grad_r = loss_and_gradients(
                x[own], y[own], r, yr, which, options, process_group=group, **generator_of(rank)
            )
            close(loss, want, what)
            close(grad / ranks, want_x, what, own)
            for name in want_stats:
                close(stats[name], want_stats[name], (name, what))
            everywhere = [torch.empty_like(loss) for _ in range(ranks)]
            dist.all_gather(everywhere, loss, group=group)
            assert all(torch.equal(other, loss) for other in everywhere), what
            if which is not None:  # a rank has the part of its own anchors; averaged, they are the whole
                dist.all_reduce(grad_r, group=group)
                close(grad_r / ranks, want_r, what)

            if which is None or draws:
                options_of_mining = {k: v for k, v in options.items() if k not in ("reduction", "soft_margin")}
                if which is not None:
                    options_of_mining |= dict(reference_embeddings=r, reference_labels=yr, references=which)
                whole = mine_triplets(x, y, **options_of_mining, **generator_of(0))
                mined = mine_triplets(x[own], y[own], process_group=group, **options_of_mining, **generator_of(rank))
                mine = (whole.anchor >= own.start) & (whole.anchor < own.stop)
                assert all(torch.equal(a, b[mine]) for a, b in zip(mined, whole, strict=True)), what


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data_parallel(rank, groups):
    """Parameter gradients under DistributedDataParallel, plain and by chunks, one rank empty."""
    generator = torch.Generator().manual_seed(11)
    images, labels = torch.randn(23, 6, generator=generator, dtype=torch.float64), torch.arange(23) // 4
    alone = network()
    want = SemiHardTripletLoss(margin=0.5)(alone(images), labels)
    want.backward()
    for ranks, group in groups.items():
        counts = {1: [23], 2: [20, 3], 3: [7, 0, 16], 4: [1, 9, 0, 13]}[ranks]
        if rank >= ranks:
            continue
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        criterion = SemiHardTripletLoss(margin=0.5, process_group=group)
        for chunk in (None, 5):  # by chunks the ranks run the network different numbers of times
            model = DistributedDataParallel(network(), process_group=group)
            exchanges = []
            model.register_comm_hook(exchanges, counted_all_reduce(group))
            loss = cached_step(model, images[own], labels[own], criterion, chunk=chunk)
            close(loss, want.detach(), (ranks, chunk))
            for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
                close(got.grad, expected.grad, (ranks, chunk))
            assert len(exchanges) == 1, (ranks, chunk, exchanges)


def counted_all_reduce(group):
    def hook(exchanges, bucket):
        exchanges.append(bucket.index())
        tensor = bucket.buffer().div_(dist.get_world_size(group))
        return dist.all_reduce(tensor, group=group, async_op=True).get_future().then(lambda f: f.value()[0])

    return hook


def own_loss(rank, groups):
    """facenet_ext.distributed.gather: rows and labels in order of rank, gradient summed over the ranks."""
    group, counts = groups[4], [3, 0, 5, 1]
    whole = torch.arange(9 * 3, dtype=torch.float16).view(9, 3)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x = whole[own].clone().requires_grad_()
    gathered = facenet_ext.distributed.gather(x, torch.arange(9, dtype=torch.int32)[own], group)
    assert torch.equal(gathered.rows, whole) and torch.equal(gathered.labels, torch.arange(9))
    assert gathered.counts == counts and gathered.offset == own.start
    (gathered.rows * (rank + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 10))  # 1 + 2 + 3 + 4


def disagreements(rank, groups):
    """Said by name on every rank, not met as a hang or as garbage."""
    x, y = torch.randn(4, 3), torch.arange(4) // 2
    same = dict(reference_embeddings=torch.arange(6.0).view(2, 3), reference_labels=torch.arange(2))
    for options, rows in (
        (dict(margin=0.1 + rank), x),
        (dict(), x.double() if rank == 2 else x),
        (dict(), x[:, : 2 + (rank > 0)]),
        (dict(same, reference_embeddings=same["reference_embeddings"] + 1e-6 * (rank == 1)), x),  # a memory of its own
        (dict(same, reference_labels=torch.tensor([0, 1] if rank else [1, 0])), x),
    ):
        try:
            triplet_loss(rows, y, process_group=groups[3], **options) if rank < 3 else None
        except ValueError as error:
            assert "process_group: rank" in str(error)
        else:
            assert rank == 3
    if rank == 3:
        try:
            triplet_loss(x, y, process_group=groups[2])
        except (TypeError, ValueError) as error:
            assert "process_group" in str(error)
        else:
            raise AssertionError("a rank outside the group was let in")


def nothing_finite(rank, groups):
    """One NaN on one rank: loss and every gradient are NaN on all."""
    x, y = torch.randn(4, 3), torch.arange(4) // 2
    x[1, 1] = torch.nan if rank == 2 else 0
    x.requires_grad_()
    loss = triplet_loss(x, y, process_group=groups[4])
    loss.backward()
    assert loss.isnan() and x.grad.isnan().all()


def rank_fails(rank, groups):
    """A rank that sleeps, then one that dies: the others get an error, within the group's timeout."""
    x, y = torch.randn(4, 3), torch.arange(4) // 2
    # made while all are there
    failing = {failure: dist.new_group(list(range(WORLD)), timeout=PATIENCE) for failure in ("sleeps", "dies")}
    for failure, group in failing.items():
        triplet_loss(x, y, process_group=group)
        if rank == 1:
            if failure == "dies":
                os._exit(0)
            time.sleep(2 * PATIENCE.total_seconds())
            continue
        began = time.monotonic()
        try:
            triplet_loss(x, y, process_group=group)
        except RuntimeError:
            assert time.monotonic() - began < 2 * PATIENCE.total_seconds()
        else:
            raise AssertionError(f"no error where a rank {failure}")
