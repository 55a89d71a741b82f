"""The layers FaceNet needs and PyTorch lacks, and the inception block. Shapes are N x C x H x W."""

import torch
import torch.nn.functional as F
from torch import nn


def widen(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class L2Pool(nn.Module):
    """y = sqrt(sum over the 3 x 3 window of x^2), zero padded; the gradient of an all-zero window is 0.

    After a ReLU such windows are common, and there the plain square root has an infinite slope: 0 * inf = NaN. They
    are therefore replaced *before* the root. Half precision is summed in float32: bfloat16 keeps 8 bits and float16
    squares overflow above 256.
    """

    def __init__(self, stride: int = 1):
        super().__init__()
        self.kernel_size, self.stride, self.padding = 3, stride, 1

    def forward(self, x):
        wide = widen(x)
        total = 9 * F.avg_pool2d(wide * wide, self.kernel_size, self.stride, self.padding)  # the mean counts padding
        seen = total > 0
        return torch.where(seen, torch.where(seen, total, 1).sqrt(), 0).to(x.dtype)

    def extra_repr(self):
        return f"kernel_size=3, stride={self.stride}, padding=1"


class Maxout(nn.Module):
    """y_j = max over the p pieces of (W x + b); stands in the place of a ReLU (the paper's fc1 and fc2, p = 2)."""

    def __init__(self, inputs: int, outputs: int, pieces: int = 2):
        super().__init__()
        self.pieces = pieces
        self.linear = nn.Linear(inputs, outputs * pieces)

    def forward(self, x):
        return self.linear(x.flatten(1)).unflatten(1, (-1, self.pieces)).amax(2)


def conv(inputs: int, outputs: int, kernel: int, stride: int, batch_norm: bool) -> nn.Sequential:
    """Convolution, batch norm if asked for, ReLU. The bias stays beside batch norm: so do the published counts."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Parallel branches, concatenated: 1 x 1 | 1 x 1 -> 3 x 3 | 1 x 1 -> 5 x 5 | pool -> 1 x 1 (or passed through)."""

    def __init__(self, inputs: int, row, batch_norm: bool):
        super().__init__()
        self.branches = nn.ModuleDict()
        self.outputs = 0
        if row.one:
            self._add("1x1", row.one, conv(inputs, row.one, 1, row.stride, batch_norm))
        for kernel, widths in ((3, row.three), (5, row.five)):
            if widths:
                reduce, out = widths
                self._add(f"{kernel}x{kernel}", out, nn.Sequential(
                    conv(inputs, reduce, 1, 1, batch_norm), conv(reduce, out, kernel, row.stride, batch_norm)))
        if row.pool:
            kind, out = row.pool
            pool = L2Pool(row.stride) if kind == "l2" else nn.MaxPool2d(3, row.stride, padding=1)
            self._add("pool", out or inputs, nn.Sequential(pool, conv(inputs, out, 1, 1, batch_norm)) if out else pool)

    def _add(self, name, outputs, branch):
        self.branches[name] = branch
        self.outputs += outputs

    def forward(self, x):
        parts = [branch(x) for branch in self.branches.values()]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
