// The part of the CPU backend that no instruction set matters to: dispatch, label classes, the sort of large threshold lists.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "layout.h"

namespace facenet_ext::cpu {
namespace {

bool runnable(const Kernels& k) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&k == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (&k == &kernels_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

const Kernels* const kCompiled[] = {
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_portable};

// The path is chosen once a process. nullptr: FACENET_EXT_ISA names none of those that run here.
const Kernels* choose() {
  const char* forced = std::getenv("FACENET_EXT_ISA");
  for (const Kernels* k : kCompiled)
    if (runnable(*k) && (!forced || !*forced || std::strcmp(forced, k->name) == 0)) return k;
  return nullptr;
}

const Kernels* chosen() {
  static const Kernels* const kernels = choose();
  return kernels;
}

template <class T>
void sort_thresholds_impl(T* t, uint32_t* rank, int64_t n) {
  // Sorts (value, place) pairs in place through their places, then applies the permutation along its cycles.
  for (int64_t i = 0; i < n; ++i) rank[i] = static_cast<uint32_t>(i);
  std::sort(rank, rank + n, [t](uint32_t a, uint32_t b) { return t[a] < t[b] || (t[a] == t[b] && a < b); });
  constexpr uint32_t kDone = 0x80000000u;
  for (int64_t start = 0; start < n; ++start) {
    if (rank[start] & kDone) continue;
    const T first = t[start];
    int64_t at = start;
    for (;;) {
      const uint32_t from = rank[at];
      rank[at] |= kDone;
      if (from == start) break;
      t[at] = t[from];
      at = from;
    }
    t[at] = first;
  }
  for (int64_t i = 0; i < n; ++i) rank[i] &= ~kDone;
}

}  // namespace

void sort_thresholds(float* t, uint32_t* rank, int64_t n) { sort_thresholds_impl(t, rank, n); }
void sort_thresholds(double* t, uint32_t* rank, int64_t n) { sort_thresholds_impl(t, rank, n); }

// Counting sort by class; classes are numbered by first appearance (a hash table finds them), those with two or more
// candidates first. O(A + C). Anchors come in the same order of classes; anchors that can have no pair come last.
Classes sort_labels(const TripletArgs& args, int32_t* table, int64_t hash_size, int32_t* scratch_index, int32_t* order,
                    int32_t* position, int32_t* class_of, int32_t* class_begin, int32_t* arow, int32_t* aclass,
                    int32_t* aself, int32_t* row_of, int32_t* class_row) {
  const int64_t A = args.num_anchors, C = args.num_candidates, offset = args.anchor_offset;
  const int64_t* labels = args.candidate_labels;
  const uint64_t wrap = static_cast<uint64_t>(hash_size - 1);
  std::fill(table, table + hash_size, -1);
  // table: index of a class's first candidate. position[i]: class by first appearance. order: that class's size, for now.
  const auto find = [&](int64_t label) {  // labels are often small multiples of something: mixed
    uint64_t at = mix(static_cast<uint64_t>(label)) & wrap;
    while (table[at] >= 0 && labels[table[at]] != label) at = (at + 1) & wrap;
    return at;
  };
  int32_t count = 0;
  for (int64_t i = 0; i < C; ++i) {
    const uint64_t at = find(labels[i]);
    if (table[at] < 0) {
      table[at] = static_cast<int32_t>(i);
      position[i] = count;
      order[count++] = 0;
    } else {
      position[i] = position[table[at]];
    }
    ++order[position[i]];
  }
  // scratch_index: class by first appearance -> final class number.
  int32_t next = 0;
  for (int32_t c = 0; c < count; ++c)
    if (order[c] > 1) scratch_index[c] = next++;
  const int32_t crowded = next;
  for (int32_t c = 0; c < count; ++c)
    if (order[c] == 1) scratch_index[c] = next++;
  for (int32_t c = 0; c < count; ++c) class_begin[scratch_index[c] + 1] = order[c];
  class_begin[0] = 0;
  for (int32_t c = 0; c < count; ++c) class_begin[c + 1] += class_begin[c];

  // Anchors' classes before position[] is overwritten; class_row counts them. An absent label is class -1.
  std::fill(class_row, class_row + count + 1, 0);
  int64_t absent = 0;
  for (int64_t a = 0; a < A; ++a) {
    int32_t c;
    if (offset >= 0) {
      c = scratch_index[position[offset + a]];
    } else {
      const int32_t at = table[find(args.anchor_labels[a])];
      c = at < 0 ? -1 : scratch_index[position[at]];
    }
    aself[a] = c;  // by anchor index, for now
    if (c < 0) ++absent;
    else ++class_row[c + 1];
  }
  for (int32_t c = 0; c < count; ++c) class_row[c + 1] += class_row[c];

  // Candidates to their places: order[] and class_of[] through a moving begin per class (kept in table, free by now).
  for (int64_t i = 0; i < C; ++i) position[i] = scratch_index[position[i]];
  for (int32_t c = 0; c < count; ++c) table[c] = class_begin[c];
  for (int64_t i = 0; i < C; ++i) {
    const int32_t c = position[i], at = table[c]++;
    order[at] = static_cast<int32_t>(i);
    class_of[at] = c;
    position[i] = at;
  }
  for (int32_t c = 0; c < count; ++c) table[c] = class_row[c];
  std::fill(row_of, row_of + C, -1);
  int64_t last = A - absent;
  for (int64_t a = 0; a < A; ++a) scratch_index[a] = aself[a];
  for (int64_t a = 0; a < A; ++a) {
    const int32_t c = scratch_index[a];
    const int64_t row = c < 0 ? last++ : table[c]++;
    arow[row] = static_cast<int32_t>(a);
    aclass[row] = c;
    aself[row] = offset >= 0 ? position[offset + a] : -1;
    if (offset >= 0) row_of[aself[row]] = static_cast<int32_t>(row);
  }

  Classes result{count, 0};
  if (count > 1) result.live = offset >= 0 ? class_row[crowded] : class_row[count];
  return result;
}

Screening screening_switch() {
  const char* const set = std::getenv("FACENET_EXT_SCREENING");
  if (!set || !*set) return Screening::when_worth;
  if (std::strcmp(set, "off") == 0) return Screening::never;
  return std::strcmp(set, "always") == 0 ? Screening::always : Screening::misspelt;
}

const char* isa() { return chosen() ? chosen()->name : ""; }

const char* const* isas() {
  static const char* names[4] = {};
  static std::atomic<bool> filled{false};
  if (!filled.load(std::memory_order_acquire)) {
    int n = 0;
    for (const Kernels* k : kCompiled)
      if (runnable(*k)) names[n++] = k->name;
    filled.store(true, std::memory_order_release);
  }
  return names;
}

int64_t triplet_workspace_bytes(const TripletArgs& args) {
  return args.dtype == DType::float64 ? divide<double>(args, nullptr).total : divide<float>(args, nullptr).total;
}

Status launch_triplet(const TripletArgs& args) {
  const Kernels* kernels = chosen();
  if (!kernels)
    return {Code::invalid, "FACENET_EXT_ISA",
            "names no instruction set that is compiled in and runs on this machine; "
            "build_info()['cpu_isa'] lists those that do"};
  if (screening_switch() == Screening::misspelt)
    return {Code::invalid, "FACENET_EXT_SCREENING",
            "is neither off nor always; unset, or empty, it leaves the choice to each call"};
  if (args.num_candidates >= (int64_t{1} << 31) || args.num_anchors >= (int64_t{1} << 31))
    return {Code::invalid, "triplet", "more than 2^31 - 1 anchors or candidates"};
  if (args.anchor_offset >= 0 && args.anchor_offset + args.num_anchors > args.num_candidates)
    return {Code::invalid, "triplet", "anchors are no rows of the candidates"};
  if (args.constants < 0 || args.constants > args.num_candidates || (counts_all(args) && args.constants > 0))
    return {Code::invalid, "triplet", "constants are some of the candidates, and none under a rule of every negative"};
  if (args.workspace_bytes < triplet_workspace_bytes(args)) return {Code::invalid, "triplet", "the workspace is too small"};
  return args.dtype == DType::float64 ? kernels->run_double(args) : kernels->run_float(args);
}

}  // namespace facenet_ext::cpu
