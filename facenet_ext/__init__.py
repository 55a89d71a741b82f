r"""facenet_ext: the semi-hard triplet loss of FaceNet, fused, in memory that grows with N·D.

The way of the data, for one call of the loss and its backward:

    SemiHardTripletLoss  (loss.py)          options, checked once
            |
            v
    triplet_loss  (functional.py) <------- _checks.py: shapes, dtypes, devices, options; metadata only
            |
            v                  eager                          torch.compile, torch.export
    autograd.py   torch.autograd.Function                     torch.ops.facenet_ext.triplet_loss
            |            \                                       /
            v             v                                     v
    mine_triplets --->  _backend.py   allocates loss, gradient, stats, workspace; current stream or thread count
                             |
                             v        integers only: no tensor crosses this line
                        _C (csrc/bindings.cpp)   fills TripletArgs of csrc/triplet.h, releases the GIL
                          /        \
              csrc/cpu/               csrc/cuda/
              AVX-512, AVX2,          kernels on the
              portable: chosen        current stream
              at run time
                          \        /
                             v
              loss [] , d loss / d embeddings [N, D] , stats          (never an N x N array)
                             |
                             v
              backward: the saved gradient times the upstream scalar, rounded to the input's dtype

    reference.py stands beside all this: the same functions in plain PyTorch, the oracle of the tests.
    models/ holds the paper's networks; they and the loss know nothing of each other. train.py, evaluate.py, data.py and
    cli.py bring them together.
"""

import torch  # noqa: F401  first, so that its libgomp.so.1 is the one that _C finds: one thread pool for both

from . import models, reference
from ._backend import build_info, cpu_isa_active
from .cached import cached_step
from .diagnostics import Explanation, explain
from .functional import Triplets, TripletStats, mine_triplets, triplet_loss
from .loss import BatchAllTripletLoss, BatchHardTripletLoss, SemiHardTripletLoss, TripletLoss
from .memory import CrossBatchMemory
from .peers import like

__version__ = build_info()["version"]

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "CrossBatchMemory",
    "Explanation",
    "SemiHardTripletLoss",
    "TripletLoss",
    "TripletStats",
    "Triplets",
    "__version__",
    "build_info",
    "cached_step",
    "cpu_isa_active",
    "explain",
    "like",
    "mine_triplets",
    "models",
    "reference",
    "triplet_loss",
]
