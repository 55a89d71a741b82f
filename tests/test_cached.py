"""cached_step: the plain step's loss and gradients, by chunks, twice through the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from facenet_ext import SemiHardTripletLoss, cached_step


def network(device, dropout=0.0, dim=6):
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * 36, dim)
    return nn.Sequential(*layers).to(device)


def batch(device, n=22):
    return torch.randn(n, 1, 8, 8, device=device), torch.arange(n, device=device) // 4


def gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("chunk", [1, 5, 11, 21, 22, 100, None])
def test_equals_the_plain_step(device, chunk):
    plain, model, criterion = network(device).double(), network(device).double(), SemiHardTripletLoss(margin=0.5)
    images, labels = batch(device)
    images = images.double()
    want = criterion(plain(images), labels)
    want.backward()
    got = cached_step(model, images, labels, criterion, chunk=chunk)
    torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-11, atol=1e-13)
    cached_step(model, images, labels, criterion, chunk=chunk)  # gradients add up, as those of backward() do
    torch.testing.assert_close(gradients(model), [2 * g for g in gradients(plain)], rtol=1e-11, atol=1e-13)


def test_a_chunk_at_a_time(device):
    """What it is for: no graph of more than one chunk is ever alive. Chunks are equal to one image."""
    seen = []
    model = network(device)
    model.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), output.requires_grad)))
    cached_step(model, *batch(device), SemiHardTripletLoss(), chunk=8)
    assert seen == [(8, False), (7, False), (7, False), (8, True), (7, True), (7, True)]


def test_dropout_repeats(device):
    model, plain, criterion = network(device, 0.4), network(device, 0.4), SemiHardTripletLoss(margin=0.5)
    images, labels = batch(device)
    torch.manual_seed(5)
    want = criterion(torch.cat([plain(part) for part in images.tensor_split(4)]), labels)
    want.backward()
    after = torch.rand(3, device=device)
    torch.manual_seed(5)
    got = cached_step(model, images, labels, criterion, chunk=7)
    torch.testing.assert_close(got, want.detach())
    torch.testing.assert_close(gradients(model), gradients(plain))
    assert torch.equal(torch.rand(3, device=device), after)  # the stream of random numbers goes on where it would


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_scaler(device, dtype):
    plain, model, criterion = network(device), network(device), SemiHardTripletLoss(margin=0.5)
    images, labels = batch(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    with torch.autocast(device.type, dtype, cache_enabled=False):  # with it, chunks would add up in half precision
        want = criterion(torch.cat([plain(part) for part in images.tensor_split(-(-len(images) // 6))]), labels)
    with torch.autocast(device.type, dtype):
        got = cached_step(model, images, labels, criterion, chunk=6, scaler=scaler)
    scaler.scale(want).backward()
    assert torch.equal(got, want.detach())
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-3, atol=1e-3)
    assert all(g.any() for g in gradients(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before)


def test_what_the_criterion_returns_and_learns(device):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0, device=device))

        def forward(self, embeddings, labels):
            loss, stats = SemiHardTripletLoss()(embeddings, labels, return_stats=True)
            return self.weight * loss, stats

    criterion = Weighted()
    loss, stats = cached_step(network(device), *batch(device), criterion, chunk=9)
    assert not loss.requires_grad and int(stats.pairs) == 5 * 12 + 2
    torch.testing.assert_close(criterion.weight.grad, loss / 3)


def test_empty_batch(device):
    model = network(device)
    assert cached_step(model, *batch(device, 0), SemiHardTripletLoss(), chunk=4) == 0
    assert not any(g.any() for g in gradients(model))


@pytest.mark.parametrize("chunk, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_errors(chunk, error):
    with pytest.raises(error, match="chunk is"):
        cached_step(network("cpu"), *batch("cpu"), SemiHardTripletLoss(), chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 9])
def test_images_and_embeddings_of_another_kind_are_named(chunk):
    images, labels = batch("cpu")
    with pytest.raises(TypeError, match="images is a list; accepted: a torch.Tensor"):
        cached_step(network("cpu"), list(images), labels, SemiHardTripletLoss(), chunk=chunk)
    with pytest.raises(ValueError, match=r"images has shape \[\]; accepted: \[N, ...\]"):
        cached_step(network("cpu"), torch.tensor(1.0), labels, SemiHardTripletLoss(), chunk=chunk)
    with pytest.raises(TypeError, match="embeddings is a tuple; accepted: a torch.Tensor"):
        cached_step(lambda x: (x.flatten(1),), images, labels, SemiHardTripletLoss(), chunk=chunk)
