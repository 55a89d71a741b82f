"""The emulation proves itself: each planted bug, in a copy of the kernels, must be caught."""

from __future__ import annotations

import shutil

import pytest
from emulated_cases import simple
from emulation import CSRC, Finding, build, check, with_schedule

# name: (file, what stands there, what stands there instead, the build that must object)
BUGS = {
    "block_barrier_before_products": (
        "tile.cuh", "    __syncthreads();               // everybody's have", "    // everybody's have", "tsan",
    ),
    "block_barrier_before_part": ("tile.cuh", "    __syncthreads();  // the part is complete\n", "", "tsan"),
    "block_barrier_before_buckets": ("select.cuh", "    __syncthreads();  // the buckets are there\n", "", "tsan"),
    "block_barrier_in_sum": (
        "gradient.cuh", "    __syncthreads();  // the sums of the step before are written\n", "", "tsan",
    ),
    "warp_barrier_after_list_sort": (
        "gradient.cuh", "    __syncwarp();  // the list is sorted", "    // the list", "tsan",
    ),
    "warp_barrier_after_suffix_minimum": ("finish.cuh", "      __syncwarp();  // minima", "      // minima", "tsan"),
    "grid_barrier_before_fill": ("triplet_kernel.cuh", "      grid_sync();  // list_begin\n", "", "tsan"),
    "grid_barrier_before_gather": ("triplet_kernel.cuh", "      grid_sync();  // list\n", "", "tsan"),
    "plain_read_of_a_moving_minimum": (
        "select.cuh", "if (key < load_relaxed(best)) atomic_min(best, key);\n}", "if (key < *best) *best = key;\n}",
        "tsan",
    ),
    "copies_not_waited_for": ("tile.cuh", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()", "plain"),
    "wrong_shuffle_mask": (
        "device.cuh", "x += __shfl_xor_sync(kWholeWarp,", "x += __shfl_xor_sync(0x0000ffffu,", "plain",
    ),
    "shuffle_in_half_a_warp": (
        "device.cuh", "for (int step = 16; step > 0; step /= 2) x +=",
        "for (int step = 16; step > 0 && threadIdx.x % 32 < 16; step /= 2) x +=", "plain",
    ),
    "shared_index_too_large": (
        "gradient.cuh", "+= partial[i * kThreads + thread_index() + step];",
        "+= partial[i * kThreads + thread_index() + step + 1];", "asan",
    ),
    "shared_index_beyond_a_member": ("tile.cuh", "  edge.norm[thread] = ", "  edge.norm[thread + 1] = ", "asan"),
    "global_index_too_large": (
        "gradient.cuh", "for (int32_t d = lane; d < p.dim; d += 32) {\n    const Acc value",
        "for (int32_t d = lane; d <= p.dim; d += 32) {\n    const Acc value", "asan",
    ),
    "swapped_fragment_register": (
        "prepare.cuh", "            {{row.x, row8.x, row.y, row8.y},", "            {{row.x, row.y, row8.x, row8.y},",
        "plain",
    ),
    "swapped_accumulator_rows": ("tile.cuh", "lane / 4 + i / 2 * 8,", "lane / 4 + i % 2 * 8,", "plain"),
    "ties_to_the_highest_index": (
        "select.cuh", "  const uint64_t key = pack(bits, index);", "  const uint64_t key = pack(bits, ~index);",
        "plain",
    ),
    "farther_or_equal": (
        "finish.cuh", "count_below<true>(p.threshold + slot, count", "count_below<false>(p.threshold + slot, count",
        "plain",
    ),
    "forgotten_mirror_image": (
        "tile.cuh", "p.plain && cursor.row != cursor.column;", "p.plain && cursor.row + kSide < cursor.column;",
        "plain",
    ),
    "gradient_of_the_positive": ("gradient.cuh", "counts = own != position &&", "counts = own < position &&", "plain"),
}  # fmt: skip

ONLY_FLOAT32 = """
#include "triplet_kernel.cuh"
namespace facenet_ext::cuda {
Status launch_float32(const TripletArgs& args) { return launch_kernel<Math::split, float>(args, "float32"); }
Status launch_half(const TripletArgs&) { return {Code::unsupported, "half", ""}; }
Status launch_float64(const TripletArgs&) { return {Code::unsupported, "float64", ""}; }
Status launch_without_tensor_cores(const TripletArgs&) { return {Code::unsupported, "simt", ""}; }
}
"""


def cases():
    plain = [
        simple(70, 80, 12, margin=1.0, stats=True),
        simple(130, 17, 30, rows="mid", margin=0.5, multiprocessors=3),
        simple(66, 5, 9, rows="duplicates", margin=0.25),
        simple(70, 33, 3, rows="collapsed", fallback="farthest"),
    ]
    return [with_schedule(case, "one_warp_ahead", seed) for case in plain for seed in (2, 3)]


def try_it(name, sanitizer, directory):
    copy = directory / "cuda"
    shutil.copytree(CSRC / "cuda", copy, ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    if name is not None:
        file, there, instead, _ = BUGS[name]
        text = (copy / file).read_text()
        assert there in text, f"{file} no longer contains {there!r}: adapt this test"
        (copy / file).write_text(text.replace(there, instead))
    only = directory / "only_float32.cu"
    only.write_text(ONLY_FLOAT32)
    sources = [copy / "triplet.cu", only]
    program = build(directory / "build", sanitizer, sources=sources, cuda_directory=copy, optimize="-O0")
    check(program, cases(), directory / "run")


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_without_a_bug_nothing_is_found(tmp_path, sanitizer):
    try_it(None, sanitizer, tmp_path)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(tmp_path, name):
    with pytest.raises((Finding, AssertionError)) as caught:
        try_it(name, BUGS[name][3], tmp_path)
    assert "no longer contains" not in str(caught.value)
    if BUGS[name][3] == "tsan":
        assert "ThreadSanitizer" in str(caught.value)
