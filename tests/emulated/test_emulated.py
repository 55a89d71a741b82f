"""csrc/cuda on the CPU: the whole path behind triplet.h against float64, in three builds, with random schedules."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import work_ahead
from emulated_cases import draw, draw_rule, simple, with_nan
from emulation import SCHEDULES, check, exact, run, with_schedule
from planted_bugs import ONLY_FLOAT32, plant

BATCH = 20


@pytest.mark.parametrize("first", range(0, 160, BATCH))
def test_mixed_cases(programs, tmp_path, first):
    check(programs(), [draw(seed) for seed in range(first, first + BATCH)], tmp_path)


@pytest.mark.parametrize("first", range(1000, 1030, 10))
def test_mixed_cases_with_the_tiles_of_the_real_build(programs, tmp_path, first):
    check(programs("plain", 4, 8192), [draw(seed) for seed in range(first, first + 10)], tmp_path)


@pytest.mark.parametrize("first", range(2000, 2060, 20))
def test_mixed_cases_under_address_and_undefined_behaviour_sanitizers(programs, tmp_path, first):
    check(programs("asan"), [draw(seed) for seed in range(first, first + 20)], tmp_path)


@pytest.mark.parametrize("first", range(3000, 3020, 10))
def test_mixed_cases_under_thread_sanitizer(programs, tmp_path, first):
    check(programs("tsan"), [draw(seed, largest=70) for seed in range(first, first + 10)], tmp_path)


@pytest.mark.parametrize("first", range(4000, 4160, BATCH))
def test_mixed_rules(programs, tmp_path, first):
    check(programs(), [draw_rule(seed) for seed in range(first, first + BATCH)], tmp_path)


def test_mixed_rules_with_the_tiles_of_the_real_build(programs, tmp_path):
    check(programs("plain", 4, 8192), [draw_rule(seed) for seed in range(5000, 5020)], tmp_path)


def test_mixed_rules_under_address_and_undefined_behaviour_sanitizers(programs, tmp_path):
    check(programs("asan"), [draw_rule(seed) for seed in range(6000, 6040)], tmp_path)


def test_mixed_rules_under_thread_sanitizer(programs, tmp_path):
    check(programs("tsan"), [draw_rule(seed, largest=70) for seed in range(7000, 7020)], tmp_path)


def contracted() -> Path:
    return plant(None, ONLY_FLOAT32, "contracted", work_ahead.folder())


@pytest.mark.ahead(work=contracted)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the build names an instruction set")
def test_equal_rows_are_at_distance_zero_however_products_are_contracted(ahead, tmp_path):
    """In x f - y f the compiler may round one product alone. For the distance to the negative it did, so that it was
    farther than an equal positive."""
    rows = np.random.default_rng(5).standard_normal((1, 200))
    base = simple(40, 200, 4)
    cases = [
        replace(base, x=np.tile(exact(rows[:, :dim], "float32"), (40, 1)), normalize=True, **options)
        for dim in (64, 200)  # near pairs are summed directly, and rows that are so long
        for options in ({}, {"distance": "cosine"}, {"distance": "euclidean"}, {"negatives": "hard"})
    ]
    results = run(ahead(), [(case, mining) for case in cases for mining in (True, False)], tmp_path)
    for case, mined, out in zip(cases, results[::2], results[1::2], strict=True):
        assert not mined.d2_ap.any() and not mined.d2_an.any(), case
        assert mined.is_fallback.all() == (case.negatives == "semi_hard")
        assert out.stat_counts[3] == out.stat_counts[0] == len(mined.d2_ap) and not out.stat_d2.any()
        assert out.loss == pytest.approx(case.margin, rel=1e-7) and not out.grad_candidates.any()


def test_rows_whose_length_is_beyond_the_range_are_normalised(programs, tmp_path):
    """Finite, but the root of the sum of their squares is not: within the 17 bits that are left of its inverse."""
    base = simple(24, 6, 5, normalize=True, margin=1.0)
    long = replace(base, x=exact(base.x / np.abs(base.x).max(axis=1, keepdims=True) * 3e38, "float32"))
    unit = replace(base, x=exact(long.x / np.linalg.norm(long.x, axis=1, keepdims=True), "float32"))
    for negatives in ("semi_hard", "all"):
        outs = run(programs(), [(replace(case, negatives=negatives), False) for case in (long, unit)], tmp_path)
        assert outs[0].loss == pytest.approx(outs[1].loss, rel=1e-4) and outs[0].loss > 0.1


@pytest.mark.parametrize("negatives", ["hard", "random_semi_hard", "random_active"])
def test_rules_with_large_classes(programs, tmp_path, negatives):
    """Several passes, thresholds sorted by a block."""
    base = simple(300, 2, 2, negatives=negatives, margin=0.5)
    cases = [replace(base, **o) for o in ({}, {"positives": "hardest"}, {"pairs": "unordered", "dtype": "float64"})]
    check(programs(), cases, tmp_path)


def test_draws_do_not_depend_on_ranks(programs, tmp_path):
    """Anchors split over callers draw what the undivided call draws: the hash takes indices of all rows."""
    whole = simple(90, 24, 20, negatives="random_semi_hard", margin=1.0)
    parts = [replace(whole, offset=offset, count=count) for offset, count in ((0, 40), (40, 50))]
    first, *others = run(programs(), [(case, True) for case in (whole, *parts)], tmp_path)
    np.testing.assert_array_equal(np.concatenate([o.negative for o in others]), first.negative)


def test_large_classes_take_several_passes(programs, tmp_path):
    """Two features leave 25 slots per row, so anchors with 149 positives are worked off in six passes; their thresholds
    and the lists of popular negatives are longer than a warp sorts."""
    cases = [
        simple(300, 2, 2, fallback="farthest", stats=True),
        simple(300, 2, 2, rows="grid", margin=0.25, distance="euclidean"),
        simple(260, 1, 3, rows="grid", margin=0.25, dtype="float64"),
        simple(300, 2, 2, rows="collapsed", fallback="farthest", reduction="sum"),
    ]
    check(programs(), cases, tmp_path)


def test_nan_is_nobodys_negative(programs, tmp_path):
    """While there is another, with buckets in shared memory (few positives) and in global memory."""
    cases = [with_nan(simple(70, 9, k, dtype=dtype)) for k in (3, 20) for dtype in ("float32", "float64", "bfloat16")]
    check(programs(), cases, tmp_path)


def test_near_pairs_are_summed_in_direct_form(programs, tmp_path):
    """Both kinds of pairs in one batch, in rows of one length and of many; the statistics show every distance."""
    cases = [simple(70, d, 9, rows="nearly_collapsed", margin=1e-6) for d in (5, 128, 130)]
    for case in cases[:2]:
        far = np.arange(70) % 2 == 0
        x = case.x * np.where(far, -1.0, 1.0)[:, None]
        cases += [replace(case, x=x), replace(case, x=x * 2.0 ** (np.arange(70) % 40)[:, None])]
    check(programs(), cases, tmp_path)


@pytest.mark.parametrize("exponent", [-140, -120, -100, -70, 60, 100])
def test_euclidean_distances_scale_with_the_rows(programs, tmp_path, exponent):
    """Squares of them vanish or overflow, they do not: far pairs, near ones, rows that are always summed directly,
    equal rows, several passes."""
    bases = [
        simple(70, 10, 14, margin=0.2),
        simple(70, 10, 14, margin=1e-3, rows="nearly_collapsed"),
        simple(40, 130, 9, margin=0.2),
        simple(66, 16, 11, margin=0.25, rows="duplicates", negatives="hard"),
        simple(70, 9, 14, margin=0.2, capability=75),
        simple(60, 12, 10, margin=0.2, dtype="bfloat16"),
        simple(200, 2, 2, margin=0.2, fallback="farthest"),
        replace(simple(70, 10, 14, margin=0.2), offset=5, count=50),
    ]
    for base in bases:
        if base.dtype == "bfloat16" and exponent < -120:
            continue  # below its least number
        grain = 2.0 ** (-6 if base.dtype == "bfloat16" else -8)  # no bit of a scaled row is lost
        x = exact(np.round(base.x / grain) * grain, base.dtype)
        base = replace(base, x=x, distance="euclidean")
        scaled = replace(base, x=exact(x * 2.0**exponent, base.dtype), margin=base.margin * 2.0**exponent)
        want, got = run(programs(), [(base, False), (scaled, False)], tmp_path)
        assert got.loss * 2.0**-exponent == pytest.approx(want.loss, rel=1e-6, abs=2.0 ** (-149 - exponent)), base.name
        np.testing.assert_allclose(got.grad_candidates, want.grad_candidates, rtol=1e-5, atol=1e-7, err_msg=base.name)
        np.testing.assert_array_equal(got.stat_counts, want.stat_counts, base.name)


def test_elements_of_all_sizes_in_one_row(programs, tmp_path):
    """bfloat16 has the range of float32, and is multiplied as halves."""
    rng = np.random.default_rng(9)
    bases = [simple(70, 24, 9, dtype=dtype, rows="mid") for dtype in ("bfloat16", "float16", "float32")]
    spread = {"bfloat16": 60, "float16": 12, "float32": 60}
    sizes = [2.0 ** rng.integers(-spread[base.dtype], spread[base.dtype], base.x.shape) for base in bases]
    cases = [replace(base, x=exact(base.x * size, base.dtype)) for base, size in zip(bases, sizes, strict=True)]
    check(programs(), cases, tmp_path)


def bucket_cases(sizes: tuple[int, ...]) -> list:
    """As many thresholds as searches of each length tell apart, up to those that shared memory does not hold; ties,
    equal rows (thresholds of 0), and distances that a tag does not reach: closer than an eighth of the farthest
    positive, farther than twice that."""
    kinds = ("grid", "duplicates", "norms", "mid")
    cases = [
        simple(max(2 * k, 66), 3 + k % 3, max(66 // k, 2), rows=kinds[i % 4], margin=0.25, shared_kib=227, seed=i)
        for i, k in enumerate(sizes)
    ]
    rng = np.random.default_rng(3)
    for case in cases[:3]:  # one positive of every class is a twin, one is far, negatives lie between
        x = case.x + 1e-3 * rng.standard_normal(case.x.shape) * 10.0 ** rng.integers(0, 4, (len(case.x), 1))
        cases.append(replace(case, x=exact(x, "float32"), fallback="skip"))
    return [with_schedule(case, SCHEDULES[i % 4], i + 1) for i, case in enumerate(cases)]


def test_buckets(programs, tmp_path):
    check(programs(), bucket_cases((2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 40, 64, 65)), tmp_path)


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_buckets_under_sanitizers(programs, tmp_path, sanitizer):
    check(programs(sanitizer), bucket_cases((3, 8, 17, 33)), tmp_path)


def test_labels_fill_the_hash_table(programs, tmp_path):
    """As many labels as slots, and one class; labels that 32-bit differences tell apart, just so and not quite."""
    base = [simple(n, 5, classes) for n, classes in ((64, 64), (64, 63), (63, 40), (64, 1), (50, 7))]
    cases = [with_schedule(case, SCHEDULES[i % 4], i + 1) for i, case in enumerate(base)]
    for step in (2**31 - 2, 2**31 - 1, 2**31, 2**40):
        cases.append(replace(base[4], labels=np.where(base[4].labels % 2 == 0, -5, step - 5) + base[4].labels // 2 % 2))
    extreme = np.array([-(2**63), 2**63 - 1, 0], np.int64)
    cases.append(replace(base[4], labels=extreme[base[4].labels % 3]))
    check(programs(), cases, tmp_path)


def slice_cases() -> list:
    """Slices of 2, 4 and 8 vectors (by D, and by what fits), ragged ones, more of them than blocks; then gradients that
    are gathered from memory after all: a list is too long, several passes."""
    shapes = [(70, 4), (33, 8), (65, 16), (130, 20), (70, 100), (48, 128), (15, 132)]
    cases = [simple(n, d, 9, rows="mid", margin=1.0, multiprocessors=m) for m, (n, d) in enumerate(shapes, 1)]
    shapes = [(70, 3), (33, 13), (66, 18), (48, 33), (70, 130)]  # rows that do not lie on 16 bytes, or do not fill them
    cases += [
        simple(n, d, 9, rows="mid", margin=1.0, padding=m % 3, stats=m % 2 == 0, multiprocessors=m)
        for m, (n, d) in enumerate(shapes, 1)
    ]
    cases += [
        simple(300, 64, 60, margin=1.0, shared_kib=32, distance="euclidean", multiprocessors=3),
        simple(130, 40, 16, rows="duplicates", margin=0.25, negatives="hard", soft_margin=True),
        simple(90, 36, 12, rows="separated", margin=3.0, negatives="random_active", reduction="sum"),
        simple(70, 32, 6, rows="collapsed", fallback="farthest", multiprocessors=1),
        simple(200, 4, 2, rows="mid", margin=1.0),
        simple(190, 64, 47, margin=1.0, multiprocessors=12),  # no block has two tiles
        simple(190, 61, 47, margin=1.0, multiprocessors=12, late_copies=False),
    ]
    return [with_schedule(case, SCHEDULES[i % 4], i + 1) for i, case in enumerate(cases)]


def usual_cases() -> list:
    """The loss without statistics, which has a way of its own through phase 4: pairs that share a negative, that fall
    back, that are near, that are struck."""
    cases = [
        simple(64, 64, 4, margin=1.0),
        simple(64, 64, 40, margin=3.0, multiprocessors=1),
        simple(48, 32, 16, rows="mid", margin=1.0, reduction="sum"),
        simple(60, 16, 5, rows="mid", margin=0.5, fallback="skip"),
        simple(64, 20, 12, rows="separated", margin=3.0),
        simple(70, 64, 14, rows="duplicates", margin=0.25, multiprocessors=1),
        simple(40, 32, 9, rows="nearly_collapsed", margin=2e-8),
        simple(40, 32, 9, rows="collapsed", multiprocessors=3),
        simple(50, 32, 10, rows="norms", margin=0.5),
        simple(40, 8, 8, rows="antipodes", margin=1.0),
        simple(36, 32, 12, rows="some_zero", margin=1.0, negatives_only=7),
        simple(90, 128, 30, margin=1.0, multiprocessors=3),
    ]
    return [with_schedule(replace(case, stats=False), SCHEDULES[i % 4], i + 1) for i, case in enumerate(cases)]


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_usual_loss(programs, tmp_path, sanitizer):
    check(programs(sanitizer), usual_cases(), tmp_path)


def test_usual_loss_with_the_tiles_of_the_real_build(programs, tmp_path):
    """40 to 65 positives: two for each lane, and more."""
    many = ((122, 3), (130, 2), (132, 2))
    cases = [simple(n, 32, k, margin=1.0, stats=False, multiprocessors=m) for m, (n, k) in enumerate(many, 1)]
    cases += [simple(125, 32, 3, rows="mid", margin=1.0, stats=False), simple(84, 64, 2, margin=0.1, stats=False)]
    check(programs("plain", 4, 8192), [replace(case, shared_kib=227) for case in [*usual_cases(), *cases]], tmp_path)


def test_gradient_from_slices(programs, tmp_path):
    larger = [  # a slice that leaves a tile no memory
        simple(520, 24, 130, margin=1.0, shared_kib=32),
        simple(460, 32, 115, margin=1.0, shared_kib=99, multiprocessors=5),
        with_schedule(simple(460, 32, 115, margin=1.0, shared_kib=99, multiprocessors=7), "one_warp_ahead", 2),
        with_schedule(simple(460, 31, 115, margin=1.0, shared_kib=99, multiprocessors=7), "one_warp_ahead", 3),
    ]
    check(programs(), [*slice_cases(), *larger], tmp_path)


def test_gradient_from_slices_with_the_tiles_of_the_real_build(programs, tmp_path):
    check(programs("plain", 4, 8192), [replace(case, shared_kib=99) for case in slice_cases()], tmp_path)


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_gradient_from_slices_under_sanitizers(programs, tmp_path, sanitizer):
    check(programs(sanitizer), [case for case in slice_cases() if len(case.x) < 200], tmp_path)


def test_what_is_read_has_been_written(programs, tmp_path):
    """What initcheck says on a GPU: no kernel reads memory that nobody has written, not even to throw it away."""
    cases = [case for case in slice_cases() if len(case.x) < 200] + usual_cases() + bucket_cases((3, 17, 33))
    cases += [simple(140, 2, 2, fallback="farthest"), simple(150, 1, 3, rows="grid", margin=0.25, dtype="float64")]
    cases += [draw(seed) for seed in range(8000, 8030)] + [draw_rule(seed) for seed in range(9000, 9030)]
    check(programs("init"), cases, tmp_path)


def test_result_does_not_depend_on_schedule_or_grid(programs, tmp_path):
    """Bit for bit: no float is added in an order that threads decide."""
    for base in (
        simple(150, 33, 30, rows="mid", margin=1.0),
        simple(150, 36, 30, rows="mid", margin=1.0),
        simple(120, 3, 2, rows="duplicates", margin=0.25),
        simple(90, 9, 12, negatives="random_semi_hard", margin=1.0, soft_margin=True),
    ):
        runs = [(base, False)]
        runs += [(with_schedule(base, schedule, seed), False) for schedule in SCHEDULES for seed in (2, 3)]
        runs += [(replace(base, multiprocessors=m), False) for m in (1, 3)]
        first, *others = run(programs(), runs, tmp_path)
        for other in others:
            assert other.loss == first.loss
            np.testing.assert_array_equal(other.grad_candidates, first.grad_candidates)


def test_strides_change_no_bit(programs, tmp_path):
    """Rows on 16 bytes and elsewhere are gathered from slices alike."""
    bases = [
        simple(70, d, 14, rows="mid", margin=1.0, distance=distance, multiprocessors=3, stats=distance == "euclidean")
        for d in (4, 8, 16, 20, 36, 132)
        for distance in ("sqeuclidean", "euclidean")
    ]
    cases = [replace(base, padding=padding) for base in bases for padding in (0, 1, 3, 4)]
    results = run(programs(), [(case, False) for case in cases], tmp_path)
    for i, base in enumerate(bases):
        want, *others = results[4 * i : 4 * i + 4]
        for other in others:
            assert other.loss == want.loss, base.name
            np.testing.assert_array_equal(other.grad_candidates, want.grad_candidates, base.name)


def test_order_of_labels_changes_no_bit(programs, tmp_path):
    """Sums go by index where one pass holds all anchors: from slices, from memory, from lists that were too long."""
    bases = [
        simple(70, 32, 14, margin=1.0),
        simple(70, 32, 14, margin=1.0, normalize=True, distance="euclidean"),
        simple(70, 33, 14, margin=1.0, dtype="float64", reduction="sum"),
        simple(60, 24, 12, margin=1.0, dtype="float16"),
        simple(70, 32, 6, rows="collapsed", multiprocessors=1),  # a list that is too long for slices
        simple(90, 20, 18, rows="mid", margin=1.0, negatives="random_active", normalize=True),
        replace(simple(80, 12, 16, rows="mid", margin=1.0), offset=9, count=60),
    ]
    rng = np.random.default_rng(6)
    for base in bases:
        names = rng.permutation(base.labels.max() + 1)
        renamed = replace(base, labels=names[base.labels])
        want, got = run(programs(), [(base, False), (renamed, False)], tmp_path)
        assert got.loss == want.loss, base.name
        np.testing.assert_array_equal(got.grad_candidates, want.grad_candidates, base.name)
        np.testing.assert_array_equal(got.stat_d2, want.stat_d2, base.name)


def test_large_classes_keep_their_last_bits(programs, tmp_path):
    """The positives add up to a total that the negatives then all but take away."""
    x = np.random.default_rng(1).standard_normal((600, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    case = replace(simple(600, 16, 5), x=x, labels=np.arange(600) // 120, stats=False, multiprocessors=20)
    mined, out = run(programs(), [(case, True), (case, False)], tmp_path)
    anchor = np.repeat(np.arange(600), 119)
    to_positive, to_negative = x[anchor] - x[mined.positive], x[anchor] - x[mined.negative]
    active = ((to_positive**2).sum(1) - (to_negative**2).sum(1) + case.margin > 0)[:, None]
    exact = np.zeros_like(x)
    np.add.at(exact, anchor, (to_positive - to_negative) * active)
    np.add.at(exact, mined.positive, -to_positive * active)
    np.add.at(exact, mined.negative, to_negative * active)
    exact *= 2 / len(anchor)
    assert abs(out.grad_candidates - exact).max() <= 1e-6 * abs(exact).max()


def test_distances_are_symmetric_bit_for_bit(programs, tmp_path):
    """Symmetry is what lets one tile serve both sides: the same anchors, not in the plain form, where nothing is
    mirrored, must select the same negatives."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((128, 70)).astype(np.float32).astype(np.float64)
    labels = np.arange(128) // 2
    whole = simple(128, 70, 64)
    whole = replace(whole, x=x, labels=labels)
    rows = replace(whole, offset=0, count=127)  # not the plain form: every tile is computed for its rows alone
    mirrored, direct = run(programs(), [(whole, True), (rows, True)], tmp_path)
    np.testing.assert_array_equal(mirrored.negative[:127], direct.negative)
    np.testing.assert_array_equal(mirrored.is_fallback[:127], direct.is_fallback)


def test_ranks_add_up_to_the_whole(programs, tmp_path):
    """Anchors split over three callers, each with its offset, give the sums of the undivided call."""
    whole = simple(100, 24, 20, rows="mid", margin=1.0, reduction="sum")
    parts = [replace(whole, offset=offset, count=count) for offset, count in ((0, 40), (40, 35), (75, 25))]
    first, *others = run(programs(), [(case, False) for case in (whole, *parts)], tmp_path)
    assert sum(o.loss for o in others) == pytest.approx(first.loss, rel=1e-6)
    np.testing.assert_allclose(sum(o.grad_candidates for o in others), first.grad_candidates, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anchors", [0, 5])
def test_nothing_to_compare_with_is_zero(programs, tmp_path, anchors):
    case = simple(4, 8, 2)
    empty = replace(
        case, x=case.x[:0], labels=case.labels[:0], anchors=case.x[:anchors], anchor_labels=case.labels[:anchors]
    )
    (out,) = run(programs(), [(empty, False)], tmp_path)
    assert out.loss == 0 and (out.grad_anchors == 0).all() and (out.stat_counts == 0).all()


def test_workspace_keeps_its_promise(programs, tmp_path):
    """24 N D + 1,024 N bytes: the runner fails if triplet_workspace_bytes asks for more, whatever the labels."""
    cases = [
        simple(n, d, 2, dtype=dtype) for n in (1, 2, 3, 17, 40) for d in (1, 5, 64) for dtype in ("float32", "float64")
    ]
    for case, out in zip(cases, run(programs(), [(case, False) for case in cases], tmp_path), strict=True):
        assert 0 < out.workspace_bytes <= 24 * case.x.size + 1024 * len(case.x)
