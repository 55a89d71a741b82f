"""Bugs for test_planted_bugs.py, and the way one is planted: in a copy of the kernels."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from building import CSRC, build
from emulated_cases import simple, with_nan
from emulation import check, with_schedule

# name: (file, what stands there, what stands there instead, the build that must object, the case that shows it)
BUGS = {
    "block_barrier_before_products": (
        "tile.cuh", "    __syncthreads();  // everybody's have", "    // everybody's have", "tsan", "duplicates",
    ),
    "block_barrier_before_part": (
        "tile.cuh", "    __syncthreads();  // the part is complete\n", "", "tsan", "classes_of_one",
    ),
    "block_barrier_before_counts_are_read": (
        "prepare.cuh", "    __syncthreads();  // all counts\n", "", "tsan", "classes_of_one",
    ),
    "block_barrier_before_the_pass": (
        "triplet_kernel.cuh", "  __syncthreads();  // the pass stands\n", "", "tsan", "classes_of_one",
    ),
    "block_barrier_after_the_strip": (
        "select.cuh", "    __syncthreads();  // d2_ap of the strip\n", "", "tsan", "classes_of_one",
    ),
    "block_barrier_before_the_first_offers": (
        "select.cuh", "            __syncthreads();  // the buckets\n", "", "tsan", "classes_of_one",
    ),
    "block_barrier_in_sum": (
        "gradient.cuh", "  __syncthreads();  // the sums of all warps\n", "", "tsan", "classes_of_one",
    ),
    "warp_barrier_after_list_sort": (
        "gradient.cuh", "    __syncwarp();  // the list is sorted", "    // the list", "tsan", "drawn",
    ),
    "warp_barrier_after_suffix_minimum": (
        "finish.cuh", "    __syncwarp();  // minima", "    // minima", "tsan", "large_classes",
    ),
    "grid_barrier_before_fill": (
        "triplet_kernel.cuh", "        grid_sync();  // list_begin", "        // list_begin", "tsan", "list_too_long",
    ),
    "grid_barrier_before_gather": ("triplet_kernel.cuh", "        grid_sync();  // list\n", "", "tsan", "collapsed"),
    "thresholds_not_waited_for": (
        "select.cuh",
        "            grid_wait(ticket);  // thresholds, empty buckets, the order of the tiles' rows\n"
        "            load_all();\n",
        "            load_all();\n            grid_wait(ticket);\n",
        "tsan", "classes_of_one",
    ),
    "barrier_left_open": (
        "select.cuh", "  if (is_waiting()) grid_wait(ticket);  // no tile at all\n", "", "plain", "classes_of_one",
    ),
    "grid_barrier_after_finish": (
        "triplet_kernel.cuh",
        "    grid_wait(&block.ticket);\n    if (is_last",
        "    if (is_last) write_loss(p, slice.sums);\n    grid_wait(&block.ticket);\n    if (is_last",
        "tsan", "classes_of_one",
    ),
    "grid_barrier_before_lists_are_read": (
        "slices.cuh",
        "        grid_wait(ticket);  // 5a of all blocks\n",
        "",
        "tsan", "classes_of_one",
    ),
    "counts_stored_behind_the_last_barrier": (
        "triplet_kernel.cuh",
        "    if (!pass.sliced) counted.store(p, *slice.totals);\n",
        "",
        "plain", "drawn",
    ),
    "first_tile_sent_before_all_rows_are_there": (
        "triplet_kernel.cuh",
        "  grid_wait(&block.ticket);\n  bool is_sent = is_counted && tile.cursor->row >= 0;\n",
        "  bool is_sent = is_counted && tile.cursor->row >= 0;\n  if (is_sent) address_tile(p, tile, *tile.cursor);\n"
        "  if (is_sent) send_tile(p, p.layouts[pass.layout], tile);\n"
        "  grid_wait(&block.ticket);\n",
        "tsan", "classes_of_one",
    ),
    "thresholds_not_landed": (
        "select.cuh", "            cp_async_wait<0>();\n            __syncthreads();  // the buckets\n",
        "            __syncthreads();  // the buckets\n", "plain", "classes_of_one",
    ),
    "columns_not_stored_before_the_next": (
        "select.cuh", "              __syncthreads();  // the columns' buckets have been looked at and stored\n", "",
        "tsan", "duplicates",
    ),
    "labels_forgotten_while_they_are_read": (
        "triplet_kernel.cuh", "    __syncthreads();  // the pass stands, the labels have been read\n", "",
        "tsan", "classes_of_one",
    ),
    "block_barrier_before_the_slice": (
        "slices.cuh", "    __syncthreads();  // everybody's part of the slice has landed\n", "",
        "tsan", "every_warp_has_rows",
    ),
    "block_barrier_before_the_next_slice": (
        "slices.cuh", "      __syncthreads();  // the slice before has been read\n", "", "tsan", "every_warp_has_rows",
    ),
    "slice_not_waited_for": (
        "slices.cuh",
        "    cp_async_wait<0>();\n    __syncthreads();  // everybody's",
        "    __syncthreads();  // everybody's",
        "plain", "classes_of_one",
    ),
    "slice_arrives_in_the_next_phase": (
        "triplet_kernel.cuh", "        cp_async_wait<0>();\n        __syncthreads();  // nothing", "        // nothing",
        "plain", "list_too_long",
    ),
    "block_barrier_before_helpers_sums_are_read": (
        "slices.cuh", "        __syncthreads();  // the helpers' sums\n", "", "tsan", "classes_of_one",
    ),
    "block_barrier_before_totals": (
        "finish.cuh", "    __syncthreads();  // zero totals\n", "", "tsan", "classes_of_one",
    ),
    "buckets_not_emptied": (
        "triplet_kernel.cuh", "if (pass.in_shared && !has_buckets) empty", "if (!pass.in_shared && !has_buckets) empty",
        "plain", "duplicates",
    ),
    "places_of_a_list_behind_its_end": (
        "slices.cuh", "i < min(length, p.list_places)", "i < p.list_places", "init", "classes_of_one",
    ),
    "base_of_no_positive": ("select.cuh", "  return positives > 0;\n", "  return true;\n", "init", "classes_of_one"),
    "nothing_behind_the_last_positive": (
        "select.cuh", "(&s.d2_ap[0][0])[i] = last;", "(void)last;", "plain", "duplicates",
    ),
    "pairs_with_one_negative": (
        "finish.cuh", "static_cast<float>(__popc(same[i]))", "1.f", "plain", "shared_negatives",
    ),
    "usual_loss_of_a_near_pair": (
        "finish.cuh", "    if (__ballot_sync(kWholeWarp, is_near) != 0) return false;\n", "",
        "plain", "no_distance_to_speak_of",
    ),
    "facts_of_the_first_block": ("prepare.cuh", "p.facts[min(first", "p.facts[0 * min(first", "plain", "drawn"),
    "place_in_an_ordered_list": (
        "slices.cuh", "__shfl_sync(kWholeWarp, keys[i], j), both);", "__shfl_sync(kWholeWarp, keys[i], j), both - 1);",
        "plain", "classes_of_one",
    ),
    "entry_that_completes_no_pair": (
        "slices.cuh", "    if (length % 2 == 1 && lane == 0)", "    if (false)", "plain", "classes_of_one",
    ),
    "weight_of_the_last_mate": (
        "slices.cuh", "e < mates.size && other >= begin", "e < mates.size - 1 && other >= begin",
        "plain", "classes_of_one",
    ),
    "plain_read_of_a_moving_minimum": (
        "select.cuh", "if (key < load_relaxed(best)) atomic_min(best, key);\n}", "if (key < *best) *best = key;\n}",
        "tsan", "not_finite",
    ),
    "next_tile_sent_while_the_ring_is_read": (
        "tile.cuh", "  cp_async_wait<0>();\n\n  const int after",
        "  is_free();\n  cp_async_wait<0>();\n\n  const int after", "tsan", "duplicates",
    ),
    "next_tile_forgotten": (
        "select.cuh", "          send_tile(p, layout_of(p, pass), s);\n", "", "plain", "several_slices",
    ),
    "strip_in_a_group_that_is_sent": (
        "tile.cuh", "s.strip_at = (layout.stages - 1) * kStageStep;", "s.strip_at = 0;", "tsan", "longer_than_the_ring",
    ),
    "copies_not_waited_for": ("tile.cuh", "cp_async_wait<1>()", "cp_async_wait<2>()", "plain", "classes_of_one"),
    "wrong_shuffle_mask": (
        "device.cuh", "x += __shfl_xor_sync(kWholeWarp,", "x += __shfl_xor_sync(0x0000ffffu,",
        "plain", "classes_of_one",
    ),
    "shuffle_in_half_a_warp": (
        "device.cuh", "for (int step = 16; step > 0; step /= 2) x +=",
        "for (int step = 16; step > 0 && threadIdx.x % 32 < 16; step /= 2) x +=", "plain", "classes_of_one",
    ),
    "shared_index_too_large": (
        "gradient.cuh", "sum[i] += of_warp[3 * warp + i];", "sum[i] += of_warp[3 * warp + i + 1];",
        "asan", "classes_of_one",
    ),
    "shared_index_beyond_a_member": (
        "tile.cuh", "    edge.norm[at] = ", "    edge.norm[at + 1] = ", "asan", "classes_of_one",
    ),
    "global_index_too_large": (
        "gradient.cuh", "for (int32_t d = lane; d < p.dim; d += 32) {\n    const Acc value",
        "for (int32_t d = lane; d <= p.dim; d += 32) {\n    const Acc value", "asan", "drawn",
    ),
    "swapped_fragment_register": (
        "prepare.cuh", "exchanged(row8.x), exchanged(row.y),", "exchanged(row.y), exchanged(row8.x),",
        "plain", "classes_of_one",
    ),
    "swapped_accumulator_rows": (
        "tile.cuh", "lane / 4 + i / 2 * 8,", "lane / 4 + i % 2 * 8,", "plain", "classes_of_one",
    ),
    "ties_to_the_highest_index": (
        "buckets.cuh", "first + i <= last ? other : INT32_MAX, mine)", "first + i <= last ? -other : INT32_MAX, -mine)",
        "plain", "duplicates",
    ),
    "negative_not_farther_than_the_positive": (
        "select.cuh", ".row = below[k] + 1;", ".row = max(below[k], 1);", "plain", "duplicates",
    ),
    "unnoticed_overflow_of_a_list": (
        "problem.cuh", "&counters->list_overflows, 1", "&counters->list_overflows, 0", "plain", "list_too_long",
    ),
    "near_pair_left_as_it_is": (
        "finish.cuh", "return !(d2 >= near);", "return !(d2 >= 0);", "plain", "no_distance_to_speak_of",
    ),
    "step_of_a_search": (
        "buckets.cuh", "    if constexpr (kRange > 1) search_rows<1>(d, at);\n", "", "plain", "duplicates",
    ),
    "negative_beyond_all_tags": (
        "buckets.cuh", "    if (beyond == 0) continue;\n", "    continue;\n", "plain", "duplicates",
    ),
    "farthest_of_the_highest_rank": (
        "buckets.cuh", "most = max(most, tag[j] ^ (kRanks - 1));", "most = max(most, tag[j]);",
        "plain", "no_distance_to_speak_of",
    ),
    "member_of_a_class_as_a_negative": (
        "tile.cuh", "static_cast<uint32_t>(size);", "static_cast<uint32_t>(size - 1);", "plain", "nearly_collapsed",
    ),
    "empty_buckets_behind_32": (
        "winners.cuh", "  later = __shfl_sync(kWholeWarp, found, 0);\n", "", "plain", "large_classes",
    ),
    "rows_of_a_label_before_the_block": (
        "labels.cuh", "i < first ? 0x10001 : 1;", "i <= first ? 0x10001 : 1;", "plain", "classes_of_one",
    ),
    "nan_as_a_negative": (
        "select.cuh", "  if (d != d) return -1;  // NaN", "  // NaN", "plain", "not_finite",
    ),
    "hash_of_the_anchor_among_its_own": (
        "select.cuh", "_t>(place + index + 1)", "_t>(0 * place + index + 1)", "plain", "drawn",
    ),
    "pair_that_was_struck": ("select.cuh", ": r != chosen) p.entry", ": false) p.entry", "plain", "hardest"),
    "forgotten_mirror_image": (
        "tile.cuh", "p.plain && cursor.row != cursor.column;", "p.plain && cursor.row + kSide < cursor.column;",
        "plain", "duplicates",
    ),
    "gradient_of_the_positive": ("gradient.cuh", "if (own != position) {", "if (own < position) {", "plain", "drawn"),
}  # fmt: skip

ONLY_FLOAT32 = """
#include "triplet_kernel.cuh"
namespace facenet_ext::cuda {
Status launch_float32(const TripletArgs& args) { return launch_kernel<Math::split, float>(args, "float32"); }
Status launch_half(const TripletArgs&) { return {Code::unsupported, "half", ""}; }
Status launch_float64(const TripletArgs&) { return {Code::unsupported, "float64", ""}; }
Status launch_without_tensor_cores(const TripletArgs&) { return {Code::unsupported, "simt", ""}; }
Status launch_dense(const TripletArgs&) { return {Code::unsupported, "dense", ""}; }
int64_t dense_workspace_bytes(const TripletArgs&) { return -1; }
}
"""


CASES = {
    "usual": simple(70, 80, 12, margin=1.0, stats=True),
    "mid": simple(130, 17, 30, rows="mid", margin=0.5, multiprocessors=3),
    "duplicates": simple(66, 5, 9, rows="duplicates", margin=0.25),
    "collapsed": simple(70, 33, 3, rows="collapsed", fallback="farthest"),
    "nearly_collapsed": simple(40, 33, 9, rows="nearly_collapsed", stats=True),
    "no_distance_to_speak_of": simple(40, 32, 9, rows="nearly_collapsed", margin=2e-8, stats=False),
    "shared_negatives": simple(40, 64, 4, margin=1.0, stats=False),
    # slices first, then a list that is too long for them
    "list_too_long": simple(70, 32, 6, rows="collapsed", multiprocessors=1),
    # one after the other
    "several_slices": simple(66, 68, 16, rows="mid", margin=1.0, multiprocessors=1),
    "every_warp_has_rows": simple(64, 68, 16, rows="mid", margin=1.0, multiprocessors=1),
    "drawn": replace(simple(70, 9, 9, negatives="random_active"), offset=5, count=40),
    "hardest": simple(70, 9, 9, positives="hardest", negatives="hard"),
    "classes_of_one": simple(20, 8, 15, margin=1.0),
    # classes larger than what is kept in shared memory
    "not_finite": with_nan(simple(70, 9, 3)),
    # and than what the lanes of a warp keep
    "large_classes": simple(140, 4, 2, margin=1.0),
    # few enough rows to be sent for before phase 2
    "longer_than_the_ring": simple(60, 140, 12, margin=1.0),
}


def plant(bug: tuple[str, ...] | None, launchers: str, sanitizer: str, directory: Path) -> Path:
    """The runner of kernels with a bug, or without; `launchers`: the source that says which kernels there are."""
    copy = directory / "cuda"
    shutil.copytree(CSRC / "cuda", copy, ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    if bug is not None:
        file, there, instead, *_ = bug
        text = (copy / file).read_text()
        assert there in text, f"{file} no longer contains {there!r}: adapt this test"
        (copy / file).write_text(text.replace(there, instead))
    only = directory / "launchers.cu"
    only.write_text(launchers)
    sources = [copy / "triplet.cu", only]
    return build(directory / "build", sanitizer, sources=sources, cuda_directory=copy, optimize="-O0")


def try_it(name: str | None, sanitizer: str, directory: Path) -> None:
    """Raises what the emulation, a sanitizer or the oracle says of the bug in its case; None: no bug, all cases."""
    program = plant(BUGS[name] if name else None, ONLY_FLOAT32, sanitizer, directory)
    plain = [CASES[BUGS[name][4]]] if name else CASES.values()
    cases = [with_schedule(case, "one_warp_ahead", seed) for case in plain for seed in (2, 3)]
    check(program, cases, directory / "run")
