// Where a label stands among others: how many of them are smaller, equal, equal and before. By comparisons, a warp for a label;
// or from a hash table in which a block counts all labels.
#pragma once

#include "sort.cuh"

namespace facenet_ext::cuda {

struct Among {  // of a label, among others: how many are smaller, equal, equal with a lower index
  int32_t less, equal, before;
};

// By one warp, among labels[begin .. end): the same in every lane.
__device__ __forceinline__ Among count_labels(const int64_t* labels, int32_t begin, int32_t end, int64_t label,
                                              int32_t index) {
  int32_t less = 0;
  const auto count_equal = [&](int32_t from, int32_t to) {
    int32_t equal = 0;
#pragma unroll 8  // loads in flight
    for (int32_t j = from + thread_index() % 32; j < to; j += 32) {
      const int64_t other = labels[j];
      count_if_less(less, other, label);
      count_if_equal(equal, other, label);
    }
    return warp_sum(equal);
  };
  const int32_t middle = max(index, begin), before = count_equal(begin, middle), behind = count_equal(middle, end);
  return {warp_sum(less), before + behind, before};
}

constexpr int32_t kNoKey = INT32_MIN;

// How many rows of one chunk have each label, where all labels differ from the first one by less than 2^31. (Differences may
// wrap: labels then have another order, in all blocks the same.)
struct LabelTable {
  int32_t* key;     // [rows] by index: the label, less the first one
  int32_t* slot;    // [slots] a key, found by hashing it and then going on, or kNoKey
  uint32_t* count;  // [slots] rows with its key; in the upper half those before the block's first row
  int32_t* full;    // [rows] slots that have a key, in no order
  int32_t* fulls;   // [1] of them
  uint32_t* are_wide;  // [1] labels differ by more
};
// Labels of a thread, in flight together; the first of them before anything else that a block does.
struct SomeLabels {
  static constexpr int kInFlight = 4;
  int64_t label[kInFlight];
  __device__ __forceinline__ void load(const int64_t* labels, int32_t count, int32_t from) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) label[k] = labels[min(from + k * kThreads, count - 1)];
  }
};
// By a block, between barriers; are_wide and fulls are 0. some: those from thread_index() on; zero: label 0.
__device__ __forceinline__ void load_keys(const int64_t* labels, int32_t count, SomeLabels some, int64_t zero,
                                          const LabelTable& table) {
  static_assert(kSortChunk < 1 << 16, "counts are halves of a word");
  constexpr int kInFlight = SomeLabels::kInFlight;
#pragma unroll 1
  for (int32_t from = thread_index(); from < count; from += kInFlight * kThreads) {
    if (from >= kThreads) some.load(labels, count, from);
    bool are_wide = false;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int32_t i = from + k * kThreads;
      const int64_t difference = static_cast<int64_t>(static_cast<uint64_t>(some.label[k]) - static_cast<uint64_t>(zero));
      are_wide |= difference != static_cast<int32_t>(difference) || static_cast<int32_t>(difference) == kNoKey;
      if (i < count) table.key[i] = static_cast<int32_t>(difference);
    }
    if (are_wide) store_relaxed(table.are_wide, 1u);
  }
}
// Bits of a slot's number. Slots are a power of two: two for each row or more, down to one where there are many.
inline int32_t slot_bits(int64_t count) {
  static_assert((kSortChunk & (kSortChunk - 1)) == 0 && kSortChunk >= 64, "slots are a power of two");
  int32_t bits = 6;
  while (bits < 12 && (2 << bits) < 4 * count && (2 << bits) <= kSortChunk) ++bits;
  while ((1 << bits) < count) ++bits;
  return bits;
}
__device__ __forceinline__ void empty_slots(int bits, const LabelTable& table) {
  using Slots = Vector<int32_t, 4>;
#pragma unroll 1
  for (int32_t i = thread_index(); i < (1 << bits) / 4; i += kThreads) {
    reinterpret_cast<Slots*>(table.slot)[i] = {kNoKey, kNoKey, kNoKey, kNoKey};
    reinterpret_cast<Slots*>(table.count)[i] = {};
  }
}
// By a block, between barriers. Lanes take rows that are far apart: neighbours often have one label, and would wait for each
// other. first: the block's first row.
__device__ __forceinline__ void count_keys(int bits, int32_t count, int32_t first, const LabelTable& table) {
  const int32_t apart = (count + 31) / 32 | 1;  // odd: no bank conflict
  constexpr int kInFlight = 4;
#pragma unroll 1
  for (int32_t q = thread_index() / 32; q < apart; q += kInFlight * kWarps) {
    int32_t key[kInFlight], there[kInFlight];
    uint32_t at[kInFlight], rows[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int32_t from = q + k * kWarps, i = thread_index() % 32 * apart + from;
      const bool has = from < apart && i < count;
      key[k] = has ? table.key[i] : kNoKey;
      rows[k] = !has ? 0 : i < first ? 0x10001 : 1;
      at[k] = static_cast<uint32_t>(key[k]) * 0x9e3779b1u >> (32 - bits);
    }
    const auto take_slot = [&](int k) {
      there[k] = atomicCAS(&table.slot[at[k]], kNoKey, key[k]);
      if (there[k] == kNoKey && rows[k] != 0) table.full[atomicAdd(table.fulls, 1)] = static_cast<int32_t>(at[k]);
    };
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) take_slot(k);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      while (rows[k] != 0 && there[k] != kNoKey && there[k] != key[k]) {
        at[k] = (at[k] + 1) % (1u << bits);
        take_slot(k);
      }
      atomicAdd(&table.count[at[k]], rows[k]);
    }
  }
}
// By one warp: the same in every lane. `index` is one of the block's rows.
__device__ __forceinline__ Among find_among(const LabelTable& table, int32_t first, int32_t index) {
  const int lane = thread_index() % 32;
  const int32_t mine = table.key[index];
  const int32_t fulls = *table.fulls;
  int32_t less = 0, equal = 0, before = 0;
#pragma unroll 1
  for (int32_t i = lane; i < fulls; i += 32) {
    const int32_t at = table.full[i], key = table.slot[at];
    const int32_t count = static_cast<int32_t>(table.count[at]);
    less += key < mine ? count & 0xffff : 0;
    equal = key == mine ? count : equal;
  }
#pragma unroll 1
  for (int32_t i = first + lane; i < index; i += 32) count_if_equal(before, table.key[i], mine);
  equal = warp_sum(equal);  // one lane has it
  return {warp_sum(less), equal & 0xffff, warp_sum(before) + (equal >> 16)};
}

// By one warp: rows of the largest class, the same in every lane.
__device__ __forceinline__ int32_t largest_class(const LabelTable& table) {
  int32_t most = 0;
#pragma unroll 1
  for (int32_t i = thread_index() % 32; i < *table.fulls; i += 32) {
    most = max(most, static_cast<int32_t>(table.count[table.full[i]] & 0xffff));
  }
  return warp_max(most);
}

}  // namespace facenet_ext::cuda
