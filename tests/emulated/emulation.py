"""Runs csrc/cuda on the CPU (building.py makes the program) and says what is right: cases, the float64 oracle.

A case goes through the launchers twice: mining, which shows the kernels' own selection, and the loss. Selection is
discontinuous, so it is checked by itself (every negative legal, none that is legal closer beyond rounding); loss,
gradient and statistics are then compared with float64 on that very selection.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

DTYPES = ("float32", "float64", "bfloat16", "float16")  # in the order of facenet_ext::DType
DISTANCES = ("sqeuclidean", "euclidean", "cosine")
NEGATIVES = ("semi_hard", "hard", "random_semi_hard", "random_active", "all", "all_semi_hard")
POSITIVES = ("all", "hardest", "easiest")
PAIR_ORDERS = ("ordered", "unordered")
FALLBACKS = ("farthest", "skip")
REDUCTIONS = ("mean", "mean_active", "sum")
SCHEDULES = ("ascending", "descending", "random", "one_warp_ahead")


class Finding(Exception):
    """The emulation or a sanitizer stopped the program."""


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    x: np.ndarray  # [C, D] float64, exact in the dtype: the candidates
    labels: np.ndarray  # [C] int64
    anchors: np.ndarray | None = None  # [A, D]; None: the candidates, or rows offset .. offset + count of them
    anchor_labels: np.ndarray | None = None
    offset: int = 0
    count: int | None = None  # anchors, where they are rows of the candidates
    dtype: str = "float32"
    distance: str = "sqeuclidean"
    negatives: str = "semi_hard"
    positives: str = "all"
    pairs: str = "ordered"
    soft_margin: bool = False
    band: float = 0  # 0: the margin
    negatives_only: int = 0
    constants: int = 0
    draw_seed: int = 7
    fallback: str = "farthest"
    reduction: str = "mean"
    normalize: bool = False
    margin: float = 0.2
    stats: bool = True
    gradient: bool = True
    padding: int = 0  # elements between rows
    multiprocessors: int = 2
    capability: int = 90
    schedule: str = "ascending"
    seed: int = 1
    late_copies: bool = True
    shared_kib: int = 99

    @property
    def plain(self) -> bool:
        return self.anchors is None and self.count is None

    @property
    def draws(self) -> bool:
        return self.negatives.startswith("random")

    @property
    def drops_fallbacks(self) -> bool:
        """A pair that found no negative by its rule does not count."""
        return self.draws or (self.negatives == "semi_hard" and self.fallback == "skip")

    def anchor_rows(self) -> tuple[np.ndarray, np.ndarray]:
        if self.anchors is not None:
            return self.anchors, self.anchor_labels
        rows = slice(self.offset, None if self.count is None else self.offset + self.count)
        return self.x[rows], self.labels[rows]


@dataclass
class Outputs:
    workspace_bytes: int
    loss: float | None = None
    grad_candidates: np.ndarray | None = None
    grad_anchors: np.ndarray | None = None
    stat_counts: np.ndarray | None = None
    stat_d2: np.ndarray | None = None
    positive: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    negative: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    d2_ap: np.ndarray = field(default_factory=lambda: np.empty(0))
    d2_an: np.ndarray = field(default_factory=lambda: np.empty(0))
    is_fallback: np.ndarray = field(default_factory=lambda: np.empty(0, bool))


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 -> the memory of a tensor of `dtype`."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)
    return x.astype(dtype)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def exact(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return from_bits(to_bits(x, dtype), dtype)


def possible_positives(case: Case, a: int) -> np.ndarray:
    """Of anchor a, before `positives` picks one; none where every candidate has its label."""
    _, anchor_labels = case.anchor_rows()
    index = np.arange(len(case.labels))
    is_positive = (case.labels == anchor_labels[a]) & (index < len(index) - case.negatives_only)
    if (case.labels == anchor_labels[a]).all():
        return index[:0]
    if case.anchors is None:
        is_positive &= index > case.offset + a if case.pairs == "unordered" else index != case.offset + a
    return np.flatnonzero(is_positive)


def pair_begin(case: Case) -> np.ndarray:
    """[A + 1]: where each anchor's pairs begin."""
    pairs = [len(possible_positives(case, a)) for a in range(len(case.anchor_rows()[0]))]
    pairs = [min(n, 1) for n in pairs] if case.positives != "all" else pairs
    return np.concatenate([[0], np.cumsum(pairs)]).astype(np.int64)


def _padded(x: np.ndarray, case: Case) -> bytes:
    bits = to_bits(x, case.dtype)
    wide = np.full((len(x), x.shape[1] + case.padding), to_bits(np.array([np.nan]), case.dtype)[0], bits.dtype)
    wide[:, : x.shape[1]] = bits
    flat = wide.reshape(-1)
    return (flat[: len(flat) - case.padding] if len(x) else flat).tobytes()


def _encode(case: Case, mining: bool) -> bytes:
    anchors, anchor_labels = case.anchor_rows()
    (c, d), a = case.x.shape, len(anchors)
    separate = case.anchors is not None
    begin = pair_begin(case)
    loss = not mining
    numbers = [a, c, d, d + case.padding, d + case.padding, -1 if separate else case.offset]
    numbers += [DTYPES.index(case.dtype), DISTANCES.index(case.distance), FALLBACKS.index(case.fallback)]
    numbers += [
        REDUCTIONS.index(case.reduction),
        case.normalize,
        loss and case.gradient,
        loss and case.gradient and separate,
    ]
    numbers += [loss and case.stats, mining, begin[-1] if mining else 0, case.multiprocessors, case.capability]
    numbers += [SCHEDULES.index(case.schedule), case.seed, case.late_copies, case.shared_kib]
    numbers += [NEGATIVES.index(case.negatives), POSITIVES.index(case.positives), PAIR_ORDERS.index(case.pairs)]
    numbers += [case.negatives_only, case.soft_margin, case.draw_seed, case.constants]
    parts = [
        struct.pack("<29q2d", *map(int, numbers), case.margin, case.band),
        _padded(case.x, case),
        case.labels.astype("<i8").tobytes(),
    ]
    if not (a == c and numbers[5] == 0):
        parts += [_padded(anchors, case), anchor_labels.astype("<i8").tobytes()]
    if mining:
        parts.append(begin.tobytes())
    return b"".join(parts)


def command(program: Path) -> list[str]:
    # ThreadSanitizer of GCC 12 cannot live with addresses randomised as far as newer kernels do.
    return ["setarch", "-R", str(program)] if (Path("/usr/bin/setarch").exists()) else [str(program)]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0",
        "ASAN_OPTIONS": "exitcode=66 detect_leaks=0 detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run(program: Path, cases: list[tuple[Case, bool]], directory: Path, timeout: float = 600) -> list[Outputs]:
    """Runs (case, mining) pairs, a share in each of as many processes as there are cores. Raises Finding when the
    emulation or a sanitizer objects."""
    shares = min(os.cpu_count() or 1, len(cases))
    results: list = [None] * len(cases)
    with ThreadPoolExecutor(max(shares, 1)) as pool:
        begun = [pool.submit(run_share, program, cases[k::shares], directory / str(k), timeout) for k in range(shares)]
        for k, share in enumerate(begun):
            results[k::shares] = share.result()
    return results


def run_share(program: Path, cases: list[tuple[Case, bool]], directory: Path, timeout: float) -> list[Outputs]:
    """In one process."""
    directory.mkdir(parents=True, exist_ok=True)
    source, target = directory / "cases.bin", directory / "results.bin"
    source.write_bytes(b"".join(_encode(case, mining) for case, mining in cases))
    done = subprocess.run(
        [*command(program), str(source), str(target)],
        capture_output=True, text=True, errors="replace", timeout=timeout, env=environment(),
    )  # fmt: skip
    if done.returncode != 0:
        code = re.search(r"initcheck: .* code (0x[0-9a-f]+)", done.stderr)
        where = ["addr2line", "-pifsCe", str(program), code[1]] if code else ["true"]
        lines = subprocess.run(where, capture_output=True, text=True).stdout
        raise Finding(f"exit status {done.returncode}\n{done.stderr[-6000:]}{lines}")
    data, at, results = target.read_bytes(), 0, []

    def take(dtype: str, *shape: int) -> np.ndarray:
        nonlocal at
        stored = np.dtype("<u2" if dtype == "bfloat16" else dtype)
        count = int(np.prod(shape))
        array = np.frombuffer(data, stored, count, at).reshape(shape)
        at += count * stored.itemsize
        return from_bits(array, dtype) if dtype in DTYPES else array

    for case, mining in cases:
        anchors, _ = case.anchor_rows()
        scalar = "float64" if case.dtype == "float64" else "float32"
        out = Outputs(int(take("<i8", 1)[0]))
        if mining:
            pairs = int(pair_begin(case)[-1])
            out.positive, out.negative = take("<i8", pairs), take("<i8", pairs)
            out.d2_ap, out.d2_an = take(scalar, pairs), take(scalar, pairs)
            out.is_fallback = take("u1", pairs).astype(bool)
        else:
            out.loss = float(take(scalar, 1)[0])
            if case.gradient:
                out.grad_candidates = take(scalar, len(case.x) - case.constants, case.x.shape[1])
                if case.anchors is not None:
                    out.grad_anchors = take(scalar, *anchors.shape)
            if case.stats:
                out.stat_counts, out.stat_d2 = take("<i8", 5), take(scalar, 3)
        results.append(out)
    if at != len(data):
        raise Finding(f"{len(data) - at} bytes of results are left over")
    return results


# ---- the oracle ------------------------------------------------------------------------------------------------------


def rounding(case: Case) -> float:
    """Of a squared distance by the expansion, relative to |a|^2 + |n|^2."""
    return 1e-13 if case.dtype == "float64" else 2e-6


def _prepared(x: np.ndarray, case: Case) -> np.ndarray:
    if not case.normalize:
        return x
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _unit(d2: np.ndarray, case: Case) -> np.ndarray:
    return np.sqrt(d2) if case.distance == "euclidean" else d2 / 2 if case.distance == "cosine" else d2


def _priority(case: Case, a: int, negatives: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of the seed and both indices; the upper half, then the index."""

    def mix(h: np.ndarray) -> np.ndarray:
        h = (h ^ h >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ h >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return h ^ h >> np.uint64(31)

    place = len(case.x) if case.anchors is not None else case.offset
    key = (case.draw_seed + 0x9E3779B97F4A7C15 * (place + a + 1)) % 2**64
    n = negatives.astype(np.uint64)
    h = mix(mix(np.array([key], np.uint64)) ^ (n * np.uint64(0xD1342543DE82EF95) + np.uint64(1)))
    return h >> np.uint64(32) << np.uint64(32) | n


def check_selection(case: Case, mined: Outputs) -> None:
    """Every chosen negative is legal, and none that is legal is better, beyond rounding."""
    anchors, anchor_labels = case.anchor_rows()
    begin = pair_begin(case)
    xa, xc = _prepared(anchors, case), _prepared(case.x, case)
    assert np.isin(mined.is_fallback, (0, 1)).all()
    for a in range(len(anchors)):
        if begin[a] == begin[a + 1]:
            continue
        pairs = slice(begin[a], begin[a + 1])
        same = case.labels == anchor_labels[a]
        d2 = ((xc - xa[a]) ** 2).sum(axis=1)
        slack = rounding(case) * ((xa[a] ** 2).sum() + (xc**2).sum(axis=1))  # per candidate
        expected = possible_positives(case, a)
        if case.positives != "all":
            one = mined.positive[begin[a]]
            assert one in expected, f"positive of anchor {a}"
            sign = 1 if case.positives == "hardest" else -1
            assert (sign * (d2[expected] - d2[one]) <= slack[expected] + slack[one]).all(), f"positive of anchor {a}"
            assert one == expected[(case.x[expected] == case.x[one]).all(axis=1)].min(), f"positive of anchor {a}"
            expected = np.array([one])
        assert np.array_equal(mined.positive[pairs], expected), f"positives of anchor {a}"
        negatives = np.flatnonzero(~same)
        unit_low, unit_high = _unit(np.maximum(d2 - slack, 0), case), _unit(d2 + slack, case)
        priority = _priority(case, a, negatives) if case.draws else None
        for positive, negative, falls_back, d2_ap, d2_an in zip(
            expected,
            mined.negative[pairs],
            mined.is_fallback[pairs],
            mined.d2_ap[pairs],
            mined.d2_an[pairs],
            strict=True,
        ):
            where = f"anchor {a}, positive {positive}, negative {negative}"
            if case.draws:
                # g = d_an - d_ap, from below and from above
                low, high = unit_low[negatives] - unit_high[positive], unit_high[negatives] - unit_low[positive]
                width = case.band if case.band > 0 and case.negatives == "random_semi_hard" else case.margin
                blur = 1e-15 if case.dtype == "float64" else 4e-7
                blur = blur * (unit_high[negatives] + unit_high[positive] + width)
                surely, maybe = high < width - blur, low <= width + blur
                if case.negatives == "random_semi_hard":
                    surely, maybe = surely & (low > 0), maybe & (high > 0)
                if negative == -1:
                    assert falls_back and np.isnan(d2_ap) and np.isnan(d2_an), where
                    assert not surely.any(), f"{where}: {negatives[surely]} are eligible"
                    continue
                assert not falls_back and negative in negatives[maybe], f"{where}: not eligible"
                assert (priority[negatives == negative] <= priority[surely]).all(), f"{where}: another comes first"
            assert 0 <= negative < len(xc) and not same[negative], where
            tiny = 1e-300 if case.dtype == "float64" else 1e-37
            relative = 1e-11 if case.dtype == "float64" else 4e-6
            # Rows normalised in the working precision are off by an ulp or two, which near-duplicates notice.
            off = 0 if not case.normalize else 1e-15 if case.dtype == "float64" else 5e-7
            for value, exactly in ((d2_ap, d2[positive]), (d2_an, d2[negative])):
                assert abs(value - exactly) <= relative * exactly + 2 * off * exactly**0.5 + off**2 + tiny, where
            if case.draws:
                continue
            tolerance = slack[positive] + slack[negatives]
            if case.negatives == "hard":
                assert not falls_back, where
                tolerance = np.inf
            surely_farther = d2[negatives] > d2[positive] + tolerance
            if case.negatives == "hard":
                better = negatives[d2[negatives] < d2[negative] - slack[negative] - slack[negatives]]
                assert len(better) == 0, f"{where}: {better} are closer"
            elif falls_back:
                assert not surely_farther.any(), f"{where}: there is a farther negative"
                better = negatives[d2[negatives] > d2[negative] + slack[negative] + slack[negatives]]
                assert len(better) == 0, f"{where}: {better} are farther"
            else:
                assert d2[negative] > d2[positive] - slack[positive] - slack[negative], f"{where}: not farther"
                better = d2[negatives] < d2[negative] - slack[negative] - slack[negatives]
                better = negatives[surely_farther & better]
                assert len(better) == 0, f"{where}: {better} are closer"
            twins = negatives[(case.x[negatives] == case.x[negative]).all(axis=1)]
            assert negative == twins.min(), f"{where}: equally far as {twins.min()}"


def check_loss(case: Case, mined: Outputs, out: Outputs) -> None:
    """Loss, gradient and statistics in float64 on the kernels' own selection."""
    anchors, _ = case.anchor_rows()
    n = len(case.x) + (0 if case.plain else len(anchors))
    assert out.workspace_bytes <= 24 * n * case.x.shape[1] + 1024 * n
    begin = pair_begin(case)
    anchor = np.repeat(np.arange(len(anchors)), np.diff(begin))
    counted = ~mined.is_fallback if case.drops_fallbacks else np.ones(len(anchor), bool)
    anchor, positive, negative = anchor[counted], mined.positive[counted], mined.negative[counted]
    xa, xc = _prepared(anchors, case), _prepared(case.x, case)
    ap, an = xa[anchor] - xc[positive], xa[anchor] - xc[negative]
    d2_ap, d2_an = (ap**2).sum(axis=1), (an**2).sum(axis=1)
    euclidean = case.distance == "euclidean"
    d_ap, d_an = _unit(d2_ap, case), _unit(d2_an, case)
    hinge = d_ap - d_an + case.margin
    gap = d_ap - d_an
    soft = np.logaddexp(0, gap)
    small = np.exp(-np.abs(gap))
    slope = np.where(gap > 0, 1, small) / (1 + small) if case.soft_margin else np.ones(len(hinge))
    unit = 1e-12 if case.dtype == "float64" else 1e-5 if case.normalize else 2e-6
    assert case.stats or case.reduction != "mean_active", "the check needs to know how many pairs were active"
    # rounding decides whether the pair is active
    blur = unit * (d_ap + d_an + case.margin) + (0 if not case.normalize else 1e-6)
    at_margin = np.abs(hinge) <= blur
    is_hard, at_zero = d2_an <= d2_ap, np.abs(d_ap - d_an) <= blur
    semi_hard = ~is_hard & (hinge > 0)
    term = soft if case.soft_margin else np.maximum(hinge, 0)
    active = (term > 0) | case.soft_margin
    doubt = np.zeros(len(hinge), bool) if case.soft_margin else at_margin
    count = {"mean": len(hinge), "mean_active": int(active.sum()), "sum": 1}[case.reduction]
    loss = term.sum() / max(count, 1)
    if case.reduction == "mean_active" and doubt.any():  # the kernel's own count, which is checked below
        count = int(out.stat_counts[1])
        loss = term.sum() / max(count, 1)
    off = 0 if not case.normalize else 2e-6 if case.dtype != "float64" else 1e-14  # see check_selection
    worst = (unit * (d_ap + d_an + case.margin + soft * case.soft_margin) + off).sum() / max(count, 1)
    assert abs(out.loss - loss) <= worst + 1e-300, f"loss {out.loss}, expected {loss} within {worst}"

    if case.stats:
        assert out.stat_counts[0] == len(hinge)
        assert abs(out.stat_counts[1] - active.sum()) <= doubt.sum()
        assert out.stat_counts[2] == mined.is_fallback.sum()
        assert abs(out.stat_counts[3] - is_hard.sum()) <= at_zero.sum()
        assert abs(out.stat_counts[4] - semi_hard.sum()) <= (at_zero | at_margin).sum()
        expected = [d2_ap.mean(), d2_an.mean(), d2_ap.max()] if len(hinge) else [0, 0, 0]
        np.testing.assert_allclose(out.stat_d2, expected, rtol=2 * unit, atol=1e-37 + off * max(expected) ** 0.5)
    if not case.gradient:
        return

    with np.errstate(divide="ignore", invalid="ignore"):
        factor = 1.0 if case.distance == "cosine" else 2.0
        to_ap = slope * (np.where(d2_ap > 0, 1 / d_ap, 0) if euclidean else np.full(len(hinge), factor))
        to_an = slope * (np.where(d2_an > 0, 1 / d_an, 0) if euclidean else np.full(len(hinge), factor))
    # A rounded gap moves the logistic function, relative to itself, by no more than that.
    wobble = (np.minimum(blur, 1) * case.soft_margin)[:, None]
    near = 1e-11 if case.dtype == "float64" else 3e-6
    off = 0 if not case.normalize else 1e-15 if case.dtype == "float64" else 5e-7
    grad_a, grad_c = np.zeros_like(xa), np.zeros_like(xc)
    size_a, size_c = np.zeros_like(xa), np.zeros_like(xc)  # rounding of each pair's difference
    maybe_a, maybe_c = np.zeros_like(xa), np.zeros_like(xc)  # what pairs in doubt bring
    for value, to_a, to_c in (
        (lambda v, w: v * w * active[:, None], grad_a, grad_c),
        (lambda v, w: np.abs(v * w) * (near + wobble) + off * np.abs(w) + 1e-37 * np.abs(v), size_a, size_c),
        (lambda v, w: 1.001 * np.abs(v * w) * doubt[:, None], maybe_a, maybe_c),
    ):
        term_ap, term_an = value(ap, to_ap[:, None]), value(an, to_an[:, None])
        sign = 1 if to_a is not grad_a else -1
        np.add.at(to_a, anchor, term_ap + sign * term_an)
        np.add.at(to_c, positive, sign * term_ap)
        np.add.at(to_c, negative, term_an)
    if case.anchors is None:
        rows = slice(case.offset, case.offset + len(anchors))
        grad_c[rows] += grad_a
        size_c[rows] += size_a
        maybe_c[rows] += maybe_a
    for result, x, prepared, gradient, size, maybe in (
        (out.grad_candidates, case.x, xc, grad_c, size_c, maybe_c),
        (out.grad_anchors, anchors, xa, grad_a, size_a, maybe_a),
    ):
        if result is None:
            continue
        kept = slice(len(result))  # all but the constants
        x, prepared, gradient, size, maybe = x[kept], prepared[kept], gradient[kept], size[kept], maybe[kept]
        if case.normalize:
            norm = np.linalg.norm(x, axis=1, keepdims=True)
            along = (gradient * prepared).sum(axis=1, keepdims=True)
            gradient = np.where(norm > 1e-12, (gradient - along * prepared) / np.maximum(norm, 1e-12), gradient / 1e-12)
            through = 1 / np.maximum(norm, 1e-12)
            size = (size + np.linalg.norm(size, axis=1, keepdims=True)) * through
            maybe = (maybe + np.linalg.norm(maybe, axis=1, keepdims=True)) * through
        expected = gradient / max(count, 1)
        tolerance = (size + maybe) / max(count, 1) + 1e-300
        if case.dtype != "float64":
            tolerance = tolerance + 1e-30
        with np.errstate(over="ignore"):
            too_large = np.abs(expected) > 1e38
        wrong = ~(np.abs(result - expected) <= tolerance) & ~too_large
        assert not wrong.any(), (
            f"{wrong.sum()} gradient elements differ, first {np.argwhere(wrong)[0]}: {result[wrong][0]}, "
            f"expected {expected[wrong][0]} within {np.broadcast_to(tolerance, wrong.shape)[wrong][0]}"
        )


def check_nonfinite(case: Case, out: Outputs) -> None:
    assert np.isnan(out.loss)
    for gradient in (out.grad_candidates, out.grad_anchors):
        assert gradient is None or np.isnan(gradient).all()
    if case.stats:
        assert (out.stat_counts == 0).all() and np.isnan(out.stat_d2).all()


def check_mined_nonfinite(case: Case, mined: Outputs) -> None:
    """With NaN among the rows: legal negatives, and a finite one wherever there is a finite one to be had."""
    anchors, anchor_labels = case.anchor_rows()
    begin = pair_begin(case)
    finite = np.isfinite(case.x).all(axis=1)
    for a in range(len(anchors)):
        negatives = case.labels != anchor_labels[a]
        for pair in range(begin[a], begin[a + 1]):
            if case.draws and mined.negative[pair] == -1:
                assert mined.is_fallback[pair]
                continue
            assert negatives[mined.negative[pair]]
            if np.isfinite(anchors[a]).all() and (negatives & finite).any():
                assert finite[mined.negative[pair]]
            nothing_farther = not np.isfinite(anchors[a]).all() or not finite[mined.positive[pair]]
            if nothing_farther and case.negatives != "hard":
                assert mined.is_fallback[pair]


def check(program: Path, cases: list[Case], directory: Path, timeout: float = 600) -> None:
    """Runs all cases and compares them with the oracle; the message names the case."""
    finite = [bool(np.isfinite(c.x).all() and (c.anchors is None or np.isfinite(c.anchors).all())) for c in cases]
    jobs = [(case, mining) for case in cases for mining in (True, False)]
    results = run(program, jobs, directory, timeout)
    for case, is_finite, mined, out in zip(cases, finite, results[::2], results[1::2], strict=True):
        try:
            if is_finite:
                check_selection(case, mined)
                check_loss(case, mined, out)
            else:
                check_mined_nonfinite(case, mined)
                check_nonfinite(case, out)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error


def with_schedule(case: Case, schedule: str, seed: int) -> Case:
    return replace(case, schedule=schedule, seed=seed, late_copies=seed % 2 == 0)
