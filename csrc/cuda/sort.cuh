// Sorting by counting and merging, the one way everything here is sorted: labels by the whole grid, thresholds and lists by a
// block. A run's elements find their place in the merged run by binary search in the other run: no data moves between
// threads, every pass is one write and one barrier. Work n (chunk + log n log n); stable, so the result does not depend on
// the schedule.
#pragma once

#include "problem.cuh"

namespace facenet_ext::cuda {

__device__ __forceinline__ int64_t sort_order(int64_t x) { return x; }
__device__ __forceinline__ int32_t sort_order(int32_t x) { return x; }
__device__ __forceinline__ uint32_t sort_order(float x) { return ordered_bits(x); }
__device__ __forceinline__ uint64_t sort_order(double x) { return ordered_bits(x); }

// Of the ascending keys[0 .. count): how many are < x (kOrEqual: <= x).
template <bool kOrEqual, class Key>
__device__ __forceinline__ int32_t count_below(const Key* keys, int32_t count, Key x) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const auto key = sort_order(keys[middle]);
    const bool below = kOrEqual ? key <= sort_order(x) : key < sort_order(x);
    low = below ? middle + 1 : low;
    high = below ? high : middle;
  }
  return low;
}

// Runs of `run` ascending keys each; the place of element i after runs 2j and 2j + 1 are merged. Equal keys: left run first.
template <class Key>
__device__ __forceinline__ int32_t merged_place(const Key* keys, int32_t count, int64_t run, int32_t i) {
  const int64_t pair = i / (2 * run) * (2 * run);
  const int64_t middle = pair + run < count ? pair + run : count;
  const int64_t end = pair + 2 * run < count ? pair + 2 * run : count;
  if (i < middle) return i + count_below<false>(keys + middle, static_cast<int32_t>(end - middle), keys[i]);
  return static_cast<int32_t>(i - middle + pair) + count_below<true>(keys + pair, static_cast<int32_t>(run), keys[i]);
}

// Sorted place of element i of keys[begin .. end) inside it, by counting. Equal keys: lower i first.
template <class Key>
__device__ __forceinline__ int32_t counted_place(const Key* keys, int32_t begin, int32_t end, int32_t i) {
  const auto mine = sort_order(keys[i]);
  int32_t place = begin;
#pragma unroll 8
  for (int32_t j = begin; j < end; ++j) {  // all lanes read the same address: a broadcast
    const auto other = sort_order(keys[j]);
    place += other < mine || (other == mine && j < i) ? 1 : 0;
  }
  return place;
}

// One warp sorts keys[0 .. count) into sorted[0 .. count); a barrier must follow before other lanes read it.
template <class Key>
__device__ __forceinline__ void warp_sort(const Key* keys, Key* sorted, int32_t count) {
  for (int32_t i = thread_index() % 32; i < count; i += 32) sorted[counted_place(keys, 0, count, i)] = keys[i];
}

// One block sorts keys[0 .. count) into sorted[0 .. count); scratch[0 .. count) and the keys themselves are overwritten.
template <class Key>
__device__ void block_sort(Key* keys, Key* sorted, Key* scratch, int32_t count) {
  constexpr int32_t kChunk = kWarpSort;
  int merges = 0;
  while ((int64_t(kChunk) << merges) < count) ++merges;
  Key* from = keys;
  Key* to = merges % 2 == 0 ? sorted : scratch;  // so that the last pass writes `sorted`
  for (int32_t i = thread_index(); i < count; i += kThreads) {
    const int32_t begin = i / kChunk * kChunk;
    to[counted_place(from, begin, begin + kChunk < count ? begin + kChunk : count, i)] = from[i];
  }
  __syncthreads();
  for (int merge = 0; merge < merges; ++merge) {
    from = to;
    to = from == sorted ? scratch : sorted;
    for (int32_t i = thread_index(); i < count; i += kThreads) {
      to[merged_place(from, count, int64_t(kChunk) << merge, i)] = from[i];
    }
    __syncthreads();  // a run is complete before the next pass searches it
  }
}

}  // namespace facenet_ext::cuda
