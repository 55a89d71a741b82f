"""Who is measured: one table, CONTENDERS, at the end. A new contender is a function (x, y) -> loss and an entry there.

All compute the package's default loss (closest semi-hard negative, farthest as fallback, squared distance, mean over
all pairs) and are checked against the package's value and gradient on the very batch they are timed on; pytorch-
metric-learning, which cannot express that loss, is checked through the triplets it mines.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from batches import Size
from torch import Tensor
from torch.nn.functional import relu

import facenet_ext
import facenet_ext.reference

MARGIN = 0.2
INFINITY = float("inf")


# --- what the pure-PyTorch ways share --------------------------------------------------------------------------------


def class_layout(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positives of each row in a rectangle: indices [N, Kmax], which count [N, Kmax]; class size of each row [N]."""
    order = torch.argsort(y, stable=True)
    _, segment_of_sorted, counts = torch.unique_consecutive(y[order], return_inverse=True, return_counts=True)
    segment = torch.empty_like(y)
    segment[order] = segment_of_sorted
    begin, count = (counts.cumsum(0) - counts)[segment], counts[segment]
    slot = torch.arange(int(counts.max()), device=y.device)
    positive = order[(begin[:, None] + slot).clamp_(max=len(y) - 1)]
    counted = (slot < count[:, None]) & (positive != torch.arange(len(y), device=y.device)[:, None])
    return positive, counted, count


def squared_distances(x: Tensor, others: Tensor) -> Tensor:
    """[A, C] by the expansion |a|^2 + |c|^2 - 2 a.c: one product of matrices, as fast pure-PyTorch losses do it."""
    norms = x.square().sum(1)[:, None] + others.square().sum(1)
    return torch.addmm(norms, x, others.T, alpha=-2).clamp_(min=0)


def mean_hinge(d_ap: Tensor, d_an: Tensor, counted: Tensor) -> Tensor:
    return (relu(d_ap - d_an + MARGIN) * counted).sum() / counted.sum()


# --- the contenders --------------------------------------------------------------------------------------------------


def sorted_rows(x: Tensor, y: Tensor) -> Tensor:
    """Each row of the N x N distances is sorted once; searchsorted then finds every positive's negative.

    The gradient flows through the inner products of the chosen pairs alone (one gather for positives and negatives),
    which leaves autograd two products of matrices and two passes over N x N: half of what differentiating the
    distances costs.
    """
    gram = x @ x.T
    norms = x.square().sum(1)
    with torch.no_grad():
        d2 = torch.add(norms[:, None], gram, alpha=-2).add_(norms).clamp_(min=0)
        positive, counted, class_size = class_layout(y)
        d_ap = d2.gather(1, positive)
        ascending, index = d2.masked_fill_(y[:, None] == y, INFINITY).sort(1)
        rank = torch.searchsorted(ascending, d_ap, right=True)
        negatives = (len(y) - class_size)[:, None]
        negative = index.gather(1, torch.where(rank < negatives, rank, negatives - 1))  # none farther: the farthest
        chosen = torch.cat((positive, negative), 1)
    d_ap, d_an = (norms[chosen] - 2 * gram.gather(1, chosen)).chunk(2, dim=1)  # without |a|^2, which cancels
    return mean_hinge(d_ap, d_an, counted)


def bucketed_blocks(x: Tensor, y: Tensor, rows: int = 256) -> Tensor:
    """The package's own algorithm in PyTorch: block by block, each row sorts its few positives, not its N negatives.

    A negative falls into the bucket "number of positives that are closer"; the least of each bucket, then of all
    buckets from a positive's own on, is that positive's negative. Value and index travel in one integer, so equal
    distances go to the lowest index. Blocks keep the temporaries in cache and the memory at rows x N.
    """
    n, nothing = len(y), torch.iinfo(torch.int64).max
    with torch.no_grad():
        positive, counted, _ = class_layout(y)
        index = torch.arange(n, device=y.device)
        negatives = []
        for begin in range(0, n, rows):
            block = slice(begin, begin + rows)
            d2 = squared_distances(x[block], x)
            same = y[block, None] == y
            d_ap = d2.gather(1, positive[block])
            thresholds = d_ap.masked_fill(~counted[block], INFINITY).sort(1).values
            bucket = torch.searchsorted(thresholds, d2)
            # bits of floats >= 0 order as the floats do
            key = d2.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(index).masked_fill_(same, nothing)
            least = torch.full((len(d2), thresholds.shape[1] + 1), nothing, device=y.device)
            least.scatter_reduce_(1, bucket, key, "amin")
            least = least.flip(1).cummin(1).values.flip(1)
            found = least.gather(1, torch.searchsorted(thresholds, d_ap, right=True))
            farthest = d2.masked_fill_(same, -1.0).argmax(1, keepdim=True)
            negatives.append(torch.where(found < nothing, found & 0xFFFFFFFF, farthest))
        chosen = torch.cat((positive, torch.cat(negatives)), 1)
    d_ap, d_an = (x[:, None] - torch.nn.functional.embedding(chosen, x)).square().sum(2).chunk(2, dim=1)
    return mean_hinge(d_ap, d_an, counted)


def cubic_mask(x: Tensor, y: Tensor) -> Tensor:
    """N x N x N: for every anchor and every positive a row of all distances and a mask of the eligible ones.

    The way of TensorFlow Addons and of sentence-transformers before it sorted rows. Minimum and maximum under a mask
    are taken as there, by shifting and multiplying, so its several cubic arrays are part of the picture.
    """
    d2 = squared_distances(x, x)
    positives = (y[:, None] == y).fill_diagonal_(False)
    other = y[:, None] != y
    farther = other[:, None, :] & (d2[:, None, :] > d2[:, :, None])  # [anchor, positive, negative]
    top = d2.max(1, keepdim=True).values
    bottom = d2.min(1, keepdim=True).values
    closest_farther = ((d2 - top)[:, None, :] * farther).min(2).values + top
    farthest = ((d2 - bottom) * other).max(1, keepdim=True).values + bottom
    d_an = torch.where(farther.any(2), closest_farther, farthest)
    return mean_hinge(d2, d_an, positives)


@functools.cache
def metric_learning():
    """Miner and loss of pytorch-metric-learning with the paper's distance; its import costs seconds, so it waits."""
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    squared = LpDistance(normalize_embeddings=True, p=2, power=2)
    return (
        TripletMarginMiner(margin=MARGIN, type_of_triplets="semihard", distance=squared),
        TripletMarginLoss(margin=MARGIN, distance=squared),
    )


def metric_learning_loss(x: Tensor, y: Tensor) -> Tensor:
    miner, loss = metric_learning()
    return loss(x, y, miner(x, y))


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# --- the checks: (loss and gradient of the timed call, the batch) -> what is wrong, or "" ----------------------------


def same_loss(loss: Tensor, gradient: Tensor, x: Tensor, y: Tensor) -> str:
    """The package's value and gradient, but for near-ties: another order of summation picks another close negative."""
    expected, expected_gradient = value_and_gradient(package_loss, x, y)
    class_sizes = torch.unique(y, return_counts=True)[1]
    pairs = int((class_sizes * (class_sizes - 1)).sum())
    if not abs(loss - expected) <= 1e-4 * abs(expected) + 5 * MARGIN / max(pairs, 1):  # five pairs; catches NaN too
        return f"loss {float(loss):.7g}, the package's is {float(expected):.7g}"
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm().clamp(min=1e-30))
    return "" if error <= 0.15 else f"gradient differs from the package's by {100 * error:.3g} %"


def same_triplets(loss: Tensor, gradient: Tensor, x: Tensor, y: Tensor) -> str:
    """pytorch-metric-learning averages over *every* negative with 0 < d_an - d_ap <= margin.

    Its closest one of each pair gives the same sum of hinges as the package without fallback, since beyond the margin
    the hinge is zero.
    """
    with torch.no_grad():
        anchor, positive, negative = metric_learning()[0](x, y)
        d2 = squared_distances(x, x)
        hinge = d2[anchor, positive] - d2[anchor, negative] + MARGIN
        hardest = x.new_zeros(len(y) ** 2).scatter_reduce_(0, anchor * len(y) + positive, hinge, "amax").double().sum()
        expected = facenet_ext.triplet_loss(x, y, margin=MARGIN, fallback="skip", reduction="sum")
    if abs(hardest - expected) <= 1e-4 * abs(expected) + 5 * MARGIN:
        return ""
    return f"its triplets give a sum of {float(hardest):.7g}, the package's is {float(expected):.7g}"


def package_loss(x: Tensor, y: Tensor) -> Tensor:
    return facenet_ext.triplet_loss(x, y, margin=MARGIN)


def rule(return_stats: bool = False, **options) -> Callable[[Tensor, Tensor], Tensor]:
    loss = functools.partial(facenet_ext.triplet_loss, margin=MARGIN, return_stats=return_stats, **options)
    return (lambda x, y: loss(x, y)[0]) if return_stats else loss


def same_rule(return_stats: bool = False, **options) -> Callable:
    """The reference's value, on batches whose triplets it can list."""

    def check(loss: Tensor, gradient: Tensor, x: Tensor, y: Tensor) -> str:
        if len(y) > 512:
            return "" if bool(gradient.isfinite().all()) else "a gradient that is not finite"
        expected = facenet_ext.reference.triplet_loss(x.double(), y, margin=MARGIN, **options)
        wrong = not abs(loss - expected) <= 1e-4 * abs(expected)
        return f"loss {float(loss):.7g}, the reference's is {float(expected):.7g}" if wrong else ""

    return check


def reference_loss(x: Tensor, y: Tensor) -> Tensor:
    return facenet_ext.reference.triplet_loss(x, y, margin=MARGIN)


def value_and_gradient(loss: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf, y)
    value.backward()
    return value.detach(), leaf.grad


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    name: str  # for --only, the JSON and the plot
    loss: Callable[[Tensor, Tensor], Tensor] | None  # (x, y) -> loss; None: the yardstick
    memory: Callable[[Size], float]  # bytes at the peak, a coarse estimate: what cannot fit is not started
    work: Callable[[Size], float] = lambda s: (
        s.n**2 * s.d
    )  # how the time grows: what would take too long is not started
    check: Callable[[Tensor, Tensor, Tensor, Tensor], str] | None = same_loss
    needs: str = ""  # a module that may not be installed
    compile: bool = False  # run through torch.compile, and only with --compile
    always: bool = False  # measured whatever --only says, in every round: the package and its yardstick
    note: str = ""

    def function(self) -> Callable[[Tensor, Tensor], Tensor]:
        return compiled(self.loss) if self.compile else self.loss

    def bind(self, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        """The call that is timed: forward and backward from a leaf without gradient; for the yardstick the product."""
        if self.loss is None:
            return lambda: x @ x.T
        leaf, loss = x.detach().clone().requires_grad_(), self.function()

        def call() -> Tensor:
            leaf.grad = None
            value = loss(leaf, y)
            value.backward()
            return value

        call.leaf = leaf
        return call

    def missing(self) -> str:
        package = self.needs.partition(".")[0]
        return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else ""


YARDSTICK = Contender("X @ X.T", None, lambda s: 4 * s.n**2, check=None, always=True, note="the product alone, no loss")
PACKAGE = Contender("facenet_ext", package_loss, lambda s: 16 * s.n * (s.d + s.k), check=None, always=True)

CONTENDERS = (
    YARDSTICK,
    PACKAGE,
    Contender(
        "sorted",
        sorted_rows,
        lambda s: 30 * s.n**2,
        lambda s: s.n**2,
        note="pure PyTorch, one sort a row and searchsorted",
    ),
    Contender("sorted-compiled", sorted_rows, lambda s: 30 * s.n**2, compile=True, note="the same under torch.compile"),
    Contender(
        "bucketed",
        bucketed_blocks,
        lambda s: 256 * 30 * s.n + 36 * s.n * s.k * s.d,
        lambda s: s.n**2,
        note="pure PyTorch, this package's algorithm in blocks of rows",
    ),
    Contender(
        "reference",
        reference_loss,
        lambda s: 48 * s.n * s.k * s.d,
        lambda s: (
            s.n * (s.n * (s.d + 4 * s.k) + 1e5)
        ),  # a step of Python per anchor outweighs a small batch's arithmetic
        note="facenet_ext.reference, one anchor at a time",
    ),
    Contender(
        "metric-learning",
        metric_learning_loss,
        lambda s: 100 * s.n * s.k * s.n,
        lambda s: s.n * s.k * s.n,
        check=same_triplets,
        needs="pytorch_metric_learning.losses",
        note="pytorch-metric-learning: averages over every semi-hard negative, not the closest",
    ),
    Contender(
        "cubic", cubic_mask, lambda s: 16 * s.n**3, lambda s: s.n**3, note="masks of N x N x N, as TensorFlow Addons"
    ),
)

# The family of rules, for --rules: the memory of each grows like the package's.
RULES = tuple(
    Contender(name, rule(**options), PACKAGE.memory, check=same_rule(**options), always=True)
    for name, options in {
        "semi_hard": {},
        "semi_hard, statistics": {"return_stats": True},
        "hard": {"negatives": "hard"},
        "hard, hardest positive": {"negatives": "hard", "positives": "hardest"},
        "all": {"negatives": "all"},
        "all_semi_hard": {"negatives": "all_semi_hard"},
    }.items()
)
DRAWN = Contender("random_semi_hard", rule(negatives="random_semi_hard"), PACKAGE.memory, check=None, always=True)
