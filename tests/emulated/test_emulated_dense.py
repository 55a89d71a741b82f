"""The CUDA kernels of the rules that give every negative a term, on the CPU, against all triplets in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import work_ahead
from dense_oracle import check_dense
from emulated_cases import DIMS, LABELS, ROWS, SIZES, make_labels, make_rows, simple
from emulation import (
    DISTANCES,
    DTYPES,
    PAIR_ORDERS,
    POSITIVES,
    REDUCTIONS,
    SCHEDULES,
    Case,
    Finding,
    exact,
    run,
    with_schedule,
)
from planted_bugs import plant


def draw_dense(seed: int, largest: int = 130) -> tuple[Case, bool]:
    """One case, mixed over everything, and whether its distances are exact: small integers, as they are."""
    rng = np.random.default_rng(seed)
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    is_exact = bool(rng.random() < 0.5)
    n, d = pick([s for s in SIZES if s <= largest]), pick(DIMS)
    dtype = pick(DTYPES if seed % 2 else ("float32",))
    labels = make_labels(rng, pick(LABELS), n)
    positives, distance = pick(POSITIVES), pick(DISTANCES)
    normalize = distance == "cosine" or bool(rng.random() < 0.3)
    if is_exact:
        d, normalize = min(d, 33), False
        distance = pick(DISTANCES[:2])
        x = rng.integers(-2, 3, (n, d)).astype(np.float64) + (40 if rng.random() < 0.3 else 0)
        margin, band = float(pick((0, 1, 3, 10))), float(pick((0, 2)))
    else:
        # Where one positive is chosen, rows without twins or near twins: any choice would be right, but not the same.
        rows = (
            pick([r for r in ROWS if r not in ("wide",)])
            if positives == "all"
            else pick(("random", "mid", "separated"))
        )
        x = make_rows(rng, rows, labels, d if positives == "all" else d + 2)
        if rows in ("random", "mid", "separated") and rng.random() < 0.3:
            x = x + 3
        margin, band = pick((0.0, 0.05, 0.2, 1.0)), pick((0.0, 0.1))
    if dtype == "float16":
        x = x.clip(-100, 100)
    x = exact(x, dtype)
    anchors = anchor_labels = count = None
    offset, pairs = 0, pick(PAIR_ORDERS)
    form = rng.random()
    if form < 0.2:
        a = pick([s for s in SIZES if s <= largest])
        chosen = rng.integers(0, n, a)
        anchor_labels = np.where(rng.random(a) < 0.8, labels[chosen], rng.integers(0, 9, a))
        shift = (
            rng.integers(-1, 2, (a, x.shape[1]))
            if is_exact
            else 0.1 * np.abs(x).max() * rng.standard_normal((a, x.shape[1]))
        )
        anchors, pairs = exact(x[chosen] + shift, dtype), "ordered"
    elif form < 0.4 and n > 1:
        offset = int(rng.integers(0, n - 1))
        count = int(rng.integers(1, n - offset + 1))
        count -= offset == 0 and count == n
    case = Case(
        name=f"seed {seed}: {dtype} {n} x {d}",
        x=x, labels=labels, anchors=anchors, anchor_labels=anchor_labels, offset=offset, count=count, dtype=dtype,
        distance=distance, reduction=pick(REDUCTIONS), normalize=normalize, margin=margin, stats=True,
        gradient=bool(rng.random() < 0.9), padding=pick((0, 0, 1, 5)), negatives=pick(("all", "all_semi_hard")),
        positives=positives, pairs=pairs, negatives_only=pick((0, 0, n // 3)), multiprocessors=pick((1, 2, 3, 5)),
        capability=pick((75, 80, 90, 90)), schedule=pick(SCHEDULES), seed=seed, late_copies=bool(rng.random() < 0.5),
        shared_kib=pick((64, 99, 227)),
    )  # fmt: skip
    return replace(case, band=band if case.negatives == "all_semi_hard" else 0.0), is_exact


def check_all(program: Path, cases: list[tuple[Case, bool]], directory: Path) -> None:
    results = run(program, [(case, False) for case, _ in cases], directory)
    for (case, is_exact), out in zip(cases, results, strict=True):
        try:
            check_dense(case, out, is_exact)
        except AssertionError as error:
            options = {k: v for k, v in vars(case).items() if not isinstance(v, np.ndarray)}
            raise AssertionError(f"{options} exact={is_exact}: {error}") from error


def drawn(first: int, count: int, largest: int = 130) -> list[tuple[Case, bool]]:
    return [draw_dense(seed, largest) for seed in range(first, first + count)]


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_mixed_cases_of_every_negative(programs, tmp_path, first):
    check_all(programs(), drawn(first, 50), tmp_path)


@pytest.mark.parametrize(
    "sanitizer, first, count, largest", [("plain", 1000, 30, 130), ("asan", 2000, 40, 130), ("tsan", 3000, 16, 70)]
)
def test_mixed_cases_of_every_negative_in_other_builds(programs, tmp_path, sanitizer, first, count, largest):
    program = programs("plain", 4, 8192) if sanitizer == "plain" else programs(sanitizer)
    check_all(program, drawn(first, count, largest), tmp_path)


def test_what_is_read_has_been_written(programs, tmp_path):
    check_all(programs("init"), drawn(600, 40), tmp_path)
    near = [near_case("float32", form) for form in ("plain", "offset", "foreign", "some")]
    run(programs("init"), [(case, False) for case in near], tmp_path)


def test_large_classes_take_several_passes(programs, tmp_path):
    """Two features leave about 60 slots per row, so anchors with 149 positives are worked off in three passes; a class
    does not fit in shared memory either, and its thresholds are longer than a warp sorts."""
    grid = dict(rows="grid", margin=0.25, negatives="all_semi_hard")
    cases = [
        simple(300, 2, 2, negatives="all"),
        simple(300, 2, 2, distance="euclidean", **grid),
        simple(300, 2, 2, band=0.5, **grid),
        simple(300, 1, 2, positives="hardest", reduction="sum", **grid),
        simple(200, 1, 2, dtype="float64", **grid),
        replace(simple(300, 2, 2, **grid), offset=20, count=200, negatives_only=30),
        simple(300, 2, 1, negatives="all"),
        simple(300, 2, 2, rows="collapsed", negatives="all"),
    ]
    check_all(programs(), [(case, "grid" in case.name) for case in cases], tmp_path)


@pytest.mark.parametrize("distance", DISTANCES[:2])
def test_gradient_has_the_accuracy_of_float32(programs, tmp_path, distance):
    """On the terms that float64 finds active: largest error over largest gradient, also of rows far from the origin."""
    base = simple(130, 100, 13, negatives="all", margin=0.5, distance=distance)
    cases = [base, replace(base, x=exact(base.x + 3, "float32")), replace(base, normalize=True)]
    results = run(programs(), [(case, False) for case in cases], tmp_path)
    for case, out in zip(cases, results, strict=True):
        assert check_dense(case, out) <= 1e-6


# Of a row's gradient, in units of the sum of |weight| of its terms.
NEAR_TOLERANCE = {"float32": 1e-6, "float64": 4e-15, "bfloat16": 1e-6, "float16": 1e-6}


def near_rows(dtype: str, n: int, equal: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows in threes that nearly coincide, and labels: near positives as well as near negatives. `equal`: two of the
    three are the same, bit for bit."""
    rng = np.random.default_rng(5)
    apart = (1e-5 if dtype == "float64" else 1e-3) * rng.standard_normal((n // 3, 3, 20))
    if dtype in ("bfloat16", "float16"):  # one element by an ulp or so: all of them would be far
        apart *= np.arange(20) == 3
    if equal:
        apart[:, 2] = apart[:, 1]
    x = rng.standard_normal((n // 3, 1, 20)) / np.sqrt(20) + apart
    order = rng.permutation(n)
    return x.reshape(n, 20)[order], rng.integers(0, 6, n)


def near_case(dtype: str, form: str) -> Case:
    """Euclidean, every negative, and a margin that makes every term active."""
    x, labels = near_rows(dtype, 144)
    wide = dtype != "float16"
    if form == "offset":
        x[:, :10] += 2
    elif form == "tiny":
        x *= 1e-30 if wide else 1e-2
    elif form == "large":
        x *= 1e17 if wide else 1e3
    elif form == "beside_large":
        x[7] *= 1e3
    x = exact(x, dtype)
    margin = 9 * np.linalg.norm(x, axis=1).max()
    case = Case(name=f"{dtype} {form}", x=x, labels=labels, dtype=dtype, distance="euclidean", negatives="all",
                reduction="sum", margin=margin, shared_kib=227, multiprocessors=3)  # fmt: skip
    if form == "foreign":
        return replace(case, x=x[60:], labels=labels[60:], anchors=x[:60], anchor_labels=labels[:60])
    return replace(case, offset=30, count=90) if form == "some" else case


@pytest.mark.parametrize("form", ["plain", "offset", "tiny", "large", "beside_large", "foreign", "some"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_pairs_keep_the_accuracy_of_their_difference(programs, tmp_path, dtype, form):
    """A row's gradient is a sum of unit vectors. By the expanded square, and by sums less totals, those of near pairs
    would be off in length and in direction by what cancels in them: 1e-4 in float32."""
    case = near_case(dtype, form)
    (out,) = run(programs(), [(case, False)], tmp_path)
    anchors, anchor_labels = case.anchor_rows()
    grad_a, grad_c = np.zeros_like(anchors), np.zeros_like(case.x)
    size_a, size_c, terms = np.zeros(len(anchors)), np.zeros(len(case.x)), 0
    for a in range(len(anchors)):
        positive = case.labels == anchor_labels[a]
        negative = ~positive
        if case.anchors is None:
            positive[case.offset + a] = False
        weight = positive * negative.sum() - 1.0 * negative * positive.sum()
        terms += positive.sum() * negative.sum()
        away = anchors[a] - case.x
        length = np.linalg.norm(away, axis=1)
        away *= np.divide(weight, length, out=np.zeros_like(length), where=length > 0)[:, None]
        grad_a[a], size_a[a] = away.sum(axis=0), np.abs(weight).sum()
        grad_c -= away
        size_c += np.abs(weight)
    assert out.stat_counts[1] == terms
    if case.anchors is None:
        rows = slice(case.offset, case.offset + len(anchors))
        grad_c[rows] += grad_a
        size_c[rows] += size_a
    else:
        error = np.linalg.norm(out.grad_anchors - grad_a, axis=1) / size_a
        assert error.max() <= NEAR_TOLERANCE[dtype], f"{error.max():.1e}"
    error = np.linalg.norm(out.grad_candidates - grad_c, axis=1) / size_c
    assert error.max() <= NEAR_TOLERANCE[dtype], f"{error.max():.1e}"


@pytest.mark.parametrize("exponent", [-140, -120, 60, 100])
def test_euclidean_gradient_does_not_depend_on_the_scale(programs, tmp_path, exponent):
    for negatives in ("all", "all_semi_hard"):
        for rows in ("random", "nearly_collapsed"):
            base = simple(40, 10, 9, rows=rows, distance="euclidean", negatives=negatives)
            base = replace(base, x=np.round(base.x * 256) / 256)  # no bit of a scaled row is lost
            scaled = replace(base, x=base.x * 2.0**exponent, margin=base.margin * 2.0**exponent)
            want, got = run(programs(), [(base, False), (scaled, False)], tmp_path)
            assert got.loss * 2.0**-exponent == pytest.approx(want.loss, rel=1e-6, abs=2.0 ** (-149 - exponent))
            np.testing.assert_allclose(got.grad_candidates, want.grad_candidates, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_a_near_positive_and_its_twin_are_equally_far(programs, tmp_path, sanitizer):
    """A positive's distance is measured anew where its twin's of another label is, and by the same sum: the twin is not
    farther, in whatever units."""
    cases = []
    for dtype in DTYPES if sanitizer == "plain" else ("float32", "float64"):
        x, labels = near_rows(dtype, 66, equal=True)
        for scale in (1, 0.01) if sanitizer == "plain" else (0.01,):
            base = Case(name=f"{dtype} {scale}", x=exact(x * scale, dtype), labels=labels, dtype=dtype, margin=scale)
            cases += [
                replace(base, negatives="all_semi_hard", distance="euclidean"),
                replace(base, negatives="all_semi_hard", band=0.01 * scale),
                replace(base, negatives="all_semi_hard", offset=10, count=40, distance="euclidean"),
            ]
    check_all(programs(sanitizer), [(case, False) for case in cases], tmp_path)


def test_every_negative_does_not_depend_on_schedule_or_grid(programs, tmp_path):
    """Bit for bit: no float is added in an order that threads decide."""
    for base in (
        simple(150, 33, 30, rows="mid", margin=1.0, negatives="all", distance="euclidean"),
        simple(120, 3, 2, rows="duplicates", margin=0.25, negatives="all_semi_hard", band=0.3),
        replace(simple(150, 33, 9, negatives="all"), offset=30, count=100),
        near_case("float32", "plain"),
    ):
        runs = [(base, False)]
        runs += [(with_schedule(base, schedule, seed), False) for seed, schedule in enumerate(SCHEDULES, 2)]
        runs += [(replace(base, multiprocessors=m), False) for m in (1, 3, 7)]
        first, *others = run(programs(), runs, tmp_path)
        for other in others:
            assert other.loss == first.loss
            np.testing.assert_array_equal(other.grad_candidates, first.grad_candidates)
            np.testing.assert_array_equal(other.stat_counts, first.stat_counts)
            np.testing.assert_array_equal(other.stat_d2, first.stat_d2)


@pytest.mark.parametrize("anchors", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_candidate_no_term(programs, tmp_path, anchors, dtype):
    case = simple(5, 8, 2, dtype=dtype, negatives="all")
    empty = replace(
        case, x=case.x[:0], labels=case.labels[:0], anchors=case.x[:anchors], anchor_labels=case.labels[:anchors]
    )
    (out,) = run(programs(), [(empty, False)], tmp_path)
    assert out.loss == 0 and (out.grad_anchors == 0).all() and (out.stat_counts == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_element_that_is_not_finite_reaches_everything(programs, tmp_path, value, normalize):
    cases = []
    for row in (0, 40):  # row 0 is where rows are moved from
        case = simple(70, 17, 9, negatives="all", normalize=normalize, dtype="float16")
        case.x[row, 3] = value
        cases.append(case)
    for out in run(programs(), [(case, False) for case in cases], tmp_path):
        assert np.isnan(out.loss) and np.isnan(out.grad_candidates).all() and np.isnan(out.stat_d2).all()
        assert (out.stat_counts == 0).all()


def test_workspace_is_enough_whatever_the_size(programs, tmp_path):
    cases = [
        simple(n, d, 2, dtype=dtype, negatives="all")
        for n in (1, 2, 3, 17, 40) for d in (1, 5, 64) for dtype in ("float32", "float64")
    ]  # fmt: skip
    check_all(programs(), [(case, False) for case in cases], tmp_path)


# ---- planted bugs ----------------------------------------------------------------------------------------------------

# name: (file, what stands there, what stands there instead, the build that must object)
BUGS = {
    "barrier_before_products": (
        "dense_sweep.cuh", "      __syncthreads();  // the rows are there\n", "", "tsan",
    ),
    "barrier_before_the_sums": (
        "dense_sweep.cuh", "        __syncthreads();  // weights and sums of the part\n", "", "tsan",
    ),
    "grid_barrier_before_counting": (
        "dense_kernel.cuh", "      grid_sync();  // histograms, partial sums\n", "", "tsan",
    ),
    "warp_barrier_before_coefficients": (
        "dense_finish.cuh", "    __syncwarp();  // the weights by rank\n", "", "tsan",
    ),
    "closed_end_of_the_margin": ("dense_sweep.cuh", "rank<true>(t, offset,", "rank<false>(t, offset,", "plain"),
    "equally_far_is_farther": (
        "dense_sweep.cuh", "rank<false>(t, offset, pitch, count, d, r.farther)",
        "rank<true>(t, offset, pitch, count, d, r.farther)", "plain",
    ),
    "open_end_of_the_band": (
        "dense_sweep.cuh", "rank<false>(t, offset, pitch, count, x, r.term)",
        "rank<true>(t, offset, pitch, count, x, r.term)", "plain",
    ),
    "no_weights_of_the_columns": ("dense_sweep.cuh", "weight[j] += own[j] > 0 ?", "weight[j] += own[j] < 0 ?", "plain"),
    "near_weights_in_the_products": (
        "dense_sweep.cuh", "cells[base] = cells[base] < 0 ? Acc(0) : cells[base]", "cells[base] = cells[base]", "plain",
    ),
    "near_weights_in_the_totals": ("dense_sweep.cuh", "total += signbit(d2) ? Acc(0) : v;", "total += v;", "plain"),
    "near_positives_by_the_expansion": (
        "dense.cuh", "is_near(d2, s.row.norm[i], s.column.norm[8 * warp + j]) ? Acc(kNotOffered) : d2", "d2", "plain",
    ),
    "warp_barrier_before_weights_are_struck": (
        "dense_sweep.cuh", "    __syncwarp();  // all lanes have read all cells\n", "", "tsan",
    ),
    "chunks_that_overlap": (
        "dense_sweep.cuh", "* (item.chunk + 1) / chunks) * kSide", "* (item.chunk + 1) / chunks + 1) * kSide", "plain",
    ),
}  # fmt: skip

ONLY_SPLIT = """
#include "dense_kernel.cuh"
namespace facenet_ext::cuda {
Status launch_dense(const TripletArgs& args) { return launch_dense_kernel<Math::split>(args, "dense"); }
int64_t dense_workspace_bytes(const TripletArgs& args) { return dense_bytes(args); }
Status launch_float32(const TripletArgs&) { return {Code::unsupported, "float32", ""}; }
Status launch_half(const TripletArgs&) { return {Code::unsupported, "half", ""}; }
Status launch_float64(const TripletArgs&) { return {Code::unsupported, "float64", ""}; }
Status launch_without_tensor_cores(const TripletArgs&) { return {Code::unsupported, "simt", ""}; }
}
"""


def try_it(name: str | None, sanitizer: str, directory: Path) -> None:
    program = plant(BUGS[name] if name else None, ONLY_SPLIT, sanitizer, directory)
    grid = dict(rows="grid", margin=0.25)
    x, labels = near_rows("float32", 66, equal=True)
    plain = [
        (simple(130, 20, 10, negatives="all", margin=1.0, multiprocessors=3), False),
        (simple(70, 9, 5, negatives="all", **grid), True),
        (simple(70, 9, 5, negatives="all_semi_hard", band=0.25, distance="euclidean", **grid), True),
        (Case("near", exact(x, "float32"), labels, distance="euclidean", negatives="all_semi_hard"), False),
    ]
    cases = [(with_schedule(case, "one_warp_ahead", seed), is_exact) for case, is_exact in plain for seed in (2, 3)]
    check_all(program, cases, directory / "run")


def without_a_bug(sanitizer: str) -> None:
    try_it(None, sanitizer, work_ahead.folder())


def with_bug(name: str) -> None:
    try_it(name, BUGS[name][3], work_ahead.folder())


@pytest.mark.ahead(work=without_a_bug, of=("sanitizer",))
@pytest.mark.parametrize("sanitizer", ["plain", "tsan"])
def test_without_a_bug_in_the_sums_nothing_is_found(ahead, sanitizer):
    ahead()


@pytest.mark.ahead(work=with_bug, of=("name",))
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_in_the_sums_is_caught(ahead, name):
    with pytest.raises((Finding, AssertionError)) as caught:
        ahead()
    assert "no longer contains" not in str(caught.value)
    if BUGS[name][3] == "tsan":
        assert "ThreadSanitizer" in str(caught.value)
