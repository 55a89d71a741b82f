"""The batches that the benchmark times: how far training has come decides how much work mining is.

    init        x = normalize(noise)                             no structure yet
    mid         x = normalize(centre[y] + 1.9 noise / sqrt(D))   classes overlap
    separated   x = normalize(centre[y] + 1.0 noise / sqrt(D))   classes stand apart

Centres are random unit vectors and noise is standard normal, so a noise row over sqrt(D) has length 1 whatever D is.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import normalize

NOISE = {"init": None, "mid": 1.9, "separated": 1.0}  # None: no centre at all
REGIMES = tuple(NOISE)


class Size(NamedTuple):
    """A batch of n embeddings of dimension d, k of each class (the last class has the rest)."""

    n: int
    k: int
    d: int

    def __str__(self) -> str:
        return f"({self.n},{self.k},{self.d})"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """`"1800,40,128"` -> Size(1800, 40, 128)."""
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"size: got {text!r}; expected N,K,D as three whole numbers, such as 1800,40,128")
        size = cls(*(int(part) for part in parts))
        if size.d < 1 or size.k < 2 or size.n < 2 * size.k:
            raise ValueError(
                f"size: got {text!r}; expected D >= 1, K >= 2 images of a class and N >= 2 K for two classes"
            )
        return size


def make_batch(size: Size, regime: str, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [N, D] float32 of unit length and labels [N] int64, the same for the same seed on every device.

    Rows of a class lie scattered over the batch: a sampler that shuffles gives that, and a method that needs the
    classes side by side has to pay for its sorting.
    """
    if regime not in NOISE:
        raise ValueError(f"regime: got {regime!r}; expected one of {', '.join(REGIMES)}")
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(size.n) // size.k)[torch.randperm(size.n, generator=generator)]
    rows = torch.randn(size.n, size.d, generator=generator)
    if NOISE[regime] is not None:
        centres = normalize(torch.randn(-(-size.n // size.k), size.d, generator=generator), dim=1)
        rows = centres[labels] + NOISE[regime] * rows / size.d**0.5
    return normalize(rows, dim=1).to(device), labels.to(device)
