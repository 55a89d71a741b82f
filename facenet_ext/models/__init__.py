"""FaceNet's networks by name.

    images [N, 3, H, W] --blocks--> [N, C, h, w] --average--> [N, C] --head--> [N, dim] --L2--> embeddings, norm 1
                        (nn1, nns1, nns2: fully connected maxout layers instead of the average)

``tables.py`` holds one table per network, ``layers.py`` what the rows are made of. Nothing here knows the loss.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from . import tables
from .layers import Inception, Maxout, conv, widen

NETWORKS = {
    "nn1": tables.NN1, "nn2": tables.NN2, "nn3": tables.NN3, "nn4": tables.NN4, "nns1": tables.NNS1,
    "nns2": tables.NNS2, "nn4_small2": tables.NN4_SMALL2, "mini": tables.MINI,
}


class FaceNet(nn.Module):
    """f(x) = g(x) / ||g(x)||_2 with the network g of a table. Blocks carry the names of the paper's rows."""

    def __init__(self, name: str, table: tables.Table, embedding_dim: int, batch_norm: bool, size: tuple[int, int]):
        super().__init__()
        self.name, self.input_size, self.embedding_dim, self.batch_norm = name, size, embedding_dim, batch_norm
        self.blocks = nn.Sequential(OrderedDict())
        channels, (height, width), flat = 3, size, False
        for row in table.rows:
            match row:
                case tables.Conv():
                    block, channels = conv(channels, row.out, row.kernel, row.stride, batch_norm), row.out
                case tables.Mix():
                    block = Inception(channels, row, batch_norm)
                    channels = block.outputs
                case tables.Pool():
                    block = nn.MaxPool2d(3, row.stride, padding=1)
                case tables.Norm():
                    block = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
                case tables.Max():
                    block, channels = Maxout(channels if flat else channels * height * width, row.out), row.out
                    flat = True
            self.blocks.add_module(row.name, block)
            height, width = (-(-side // getattr(row, "stride", 1)) for side in (height, width))
        self.head = nn.Linear(channels, embedding_dim)
        self.apply(_initialise)

    def forward(self, x):
        x = self.blocks(x)
        if x.ndim == 4:
            x = x.mean((2, 3))  # the paper's average pool, whatever the size of the last map
        return F.normalize(widen(self.head(x)), dim=1)  # unit length needs more than the 8 bits of bfloat16


def _initialise(module):
    """He et al. 2015: keeps the variance through ReLUs, so that the deep tables train without batch norm too."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
        nn.init.zeros_(module.bias)


def create(name: str, embedding_dim: int = 128, batch_norm: bool = True,
           input_size: int | tuple[int, int] | None = None) -> FaceNet:
    """f(x) in R^embedding_dim, ||f(x)||_2 = 1: a network by name, randomly initialised.

    name: one of ``NETWORKS`` ("nn1", "nn2", "nn3", "nn4", "nns1", "nns2", "nn4_small2", "mini").
    embedding_dim: length of the embedding; the paper's is 128.
    batch_norm: batch normalisation after every convolution. False gives the paper's parameter counts, which hold
        weights and biases alone (nn4 6,607,888); True adds the affine pair and keeps the bias, as OpenFace counts
        (nn4 6,622,640; nn4_small2 3,733,968).
    input_size: pixels, one number for a square or (height, width); None is the table's. Only the networks with fully
        connected layers (nn1, nns1, nns2) are bound to it, the others take any size.
    Returns a module that maps [N, 3, H, W] to [N, embedding_dim], float32 or wider.
    ValueError: an unknown name, a size or dimension that is no integer of at least 1, a batch_norm that is no bool.
    Source: paper section 3.3, Tables 1 and 2; the docstrings of ``tables.py`` say what is ours.
    """
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"name: unknown network {name!r}; known are {', '.join(sorted(NETWORKS))}")
    table = NETWORKS[name]
    size = table.size if input_size is None else input_size
    size = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):  # True is an int to isinstance
        raise ValueError(f"input_size: got {input_size!r}; accepted are one or two positive numbers of pixels")
    if type(embedding_dim) is not int or embedding_dim < 1:
        raise ValueError(f"embedding_dim: got {embedding_dim!r}; accepted is an integer of at least 1")
    if not isinstance(batch_norm, bool):
        raise ValueError(f"batch_norm: got {batch_norm!r}; accepted are True and False")
    return FaceNet(name, table, embedding_dim, batch_norm, size)


def summary(model: FaceNet) -> list[dict]:
    """One dict per block: name, output shape, parameters and multiply-adds of one image (the paper's "FLOPS").

    Only convolutions and linear layers are counted, as the paper does. Runs on the meta device: costs nothing.
    """
    counts = {}

    def count(name):
        def hook(module, _, output):
            per_output = module.weight[0].numel() + 1  # the bias is one more term of the sum
            counts[name] = counts.get(name, 0) + per_output * output[0].numel()
        return hook

    def shape(name):
        def hook(module, _, output):
            rows.append({"name": name, "shape": tuple(output.shape[1:]),
                         "parameters": sum(p.numel() for p in module.parameters()),
                         "multiply_adds": counts.get(name, 0)})
        return hook

    rows = []
    with torch.device("meta"):
        twin = create(model.name, model.embedding_dim, model.batch_norm, model.input_size).eval()
    for name, block in [*twin.blocks.named_children(), ("head", twin.head)]:
        for module in block.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count(name))
        block.register_forward_hook(shape(name))
    twin(torch.empty(1, 3, *model.input_size, device="meta"))
    return rows
