"""Capture and replay on a GPU: the README's training step as it stands there, and the loss under every rule."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from devices import why_not_cuda
from test_compile import IDS, RULES

from facenet_ext import SemiHardTripletLoss, triplet_loss

pytestmark = pytest.mark.skipif(why_not_cuda() is not None, reason=f"needs a GPU: {why_not_cuda()}")

README = Path(__file__).resolve().parents[1] / "README.md"


def on_side_stream(call, times=3):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(side)


def readme_example() -> str:
    return re.search(r"### A training step as a CUDA graph.*?```python\n(.*?)```", README.read_text(), re.DOTALL)[1]


def test_the_readmes_step_trains_as_the_plain_one():
    """Captured, its replays go where the same steps go uncaptured; labels change from batch to batch."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
    network.cuda()
    loader = [(torch.randn(60, 3, 4, 4), torch.randint(0, 12, (60,))) for _ in range(4)]
    optimizer = torch.optim.AdamW(network.parameters(), capturable=True)
    plain = copy.deepcopy(network)
    space = dict(torch=torch, network=network, optimizer=optimizer, criterion=SemiHardTripletLoss(), loader=loader)
    exec(readme_example(), space)

    others = torch.optim.AdamW(plain.parameters(), capturable=True)
    for images, labels in [loader[0]] * 3 + loader:  # the warm-up's three, then the replays'
        others.zero_grad(set_to_none=True)
        loss = space["criterion"](plain(images.cuda()), labels.cuda())
        loss.backward()
        others.step()
    torch.testing.assert_close(space["loss"], loss.detach())
    torch.testing.assert_close(list(network.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("options", RULES, ids=IDS)
def test_replays_equal_eager_under_every_rule(options):
    """Loss, gradient and stats, bit for bit, on rows and labels that came after the capture."""
    x, y = torch.randn(90, 20, device="cuda").requires_grad_(), torch.arange(90, device="cuda") // 6

    def call():
        x.grad = None
        loss, stats = triplet_loss(x, y, margin=0.6, **options, return_stats=True)
        loss.backward()
        return loss.detach(), stats

    on_side_stream(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, stats = call()
        replayed = [loss, x.grad, *stats.values()]
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(90, 20))
            y.copy_(torch.randint(0, 15, (90,)))
        torch.manual_seed(seed)  # of the rules that draw
        graph.replay()
        found = [tensor.clone() for tensor in replayed]
        torch.manual_seed(seed)
        loss, stats = call()
        assert all(map(torch.equal, found, [loss, x.grad, *stats.values()]))
