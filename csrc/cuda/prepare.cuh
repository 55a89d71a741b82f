// Phase 1: rows sorted by (label, index), their classes, and the operands of the products. A warp per row, no barrier
// between:
//
//   label    ->  how many labels are smaller, equal, equal and before  ->  position, mate_begin, mate_end
//   row [D]  ->  largest |x|, norm  ->  operand [pitch], exponent, inverse_norm  ->  norm: its product with itself
//
// Up to kSortChunk rows a row counts all labels, as 32-bit keys where they allow it: N^2 / 32 comparisons by warps. Beyond,
// chunks are counted and merged (sort.cuh) first. Reads X once, writes N * pitch bytes.
//
// Each row has a power-of-two scale of its own, so no finite range of inputs is lost in half precision: an element that
// underflows is 2^-28 of its row's largest, far below float32's own error in a product of rows. Distances are computed in
// units of the largest row's scale (tile.cuh), which is exact too.
#pragma once

#include "sort.cuh"

namespace facenet_ext::cuda {

// ---- operands -------------------------------------------------------------------------------------------------------

// The exponent e with row * 2^-e in [2^13, 2^14): 2^14 leaves room in a half for lo * 2^11 and for sums in float32.
template <Math M>
__device__ __forceinline__ int32_t row_exponent(typename MathTraits<M>::Acc largest) {
  if (M == Math::simt64) return 0;
  if (!(largest > 0)) return kNoExponent;
  const int32_t e = ilogb(largest) - 13;
  return M == Math::half && e > 0 ? 0 : e;  // halves may be scaled up without loss, not down
}

// Element d of a row of `operand`.
template <Math M>
__device__ __forceinline__ void store_operand(uint8_t* row, int32_t d, typename MathTraits<M>::Acc x, int32_t exponent) {
  const int32_t e = exponent == kNoExponent ? 0 : exponent;
  if constexpr (M == Math::split) {
    const float scaled = ldexpf(x, -e);
    const uint16_t hi = half_from_float(scaled);
    const uint16_t lo = half_from_float((scaled - float_from_half(hi)) * 2048.f);
    reinterpret_cast<uint32_t*>(row)[d] = hi | uint32_t(lo) << 16;
  } else if constexpr (M == Math::half) {
    reinterpret_cast<uint16_t*>(row)[d] = half_from_float(ldexpf(x, -e));
  } else if constexpr (M == Math::bfloat) {
    reinterpret_cast<uint16_t*>(row)[d] = bfloat_from_float(ldexpf(x, -e));
  } else if constexpr (M == Math::simt32) {
    reinterpret_cast<float*>(row)[d] = ldexpf(x, -e);
  } else {
    reinterpret_cast<double*>(row)[d] = x;
  }
}

// Four (split) or eight (half, bfloat) neighbouring elements of two rows of A and one of B, and their products. Which k a
// lane holds does not matter as long as A and B agree, so a lane takes 16 contiguous bytes of a row: one vector load, no
// shuffling.
//
// split: a register is (hi, lo). hi * hi takes the lower halves of two registers; the cross terms hi * lo + lo * hi pair
// (hi, lo) with (lo, hi) inside one register. Exchanging A and B then only exchanges two neighbours inside one mma's sum,
// which the hardware adds without order: d(a, b) = d(b, a) bit for bit (seen under emulation; on hardware gpu_check.sh
// measures it).
template <Math M>
struct Fragments;

template <>
struct Fragments<Math::split> {
  uint32_t high[4];         // A: hi
  uint32_t cross[2][4];     // A: (hi, lo)
  __device__ __forceinline__ static Fragments of(uint4 row, uint4 row8) {
    return {{__byte_perm(row.x, row.y, 0x5410), __byte_perm(row8.x, row8.y, 0x5410), __byte_perm(row.z, row.w, 0x5410),
             __byte_perm(row8.z, row8.w, 0x5410)},
            {{row.x, row8.x, row.y, row8.y}, {row.z, row8.z, row.w, row8.w}}};
  }
  __device__ __forceinline__ void multiply(uint4 column, float (&hh)[4], float (&hl)[4]) const {
    const uint32_t high_b[2] = {__byte_perm(column.x, column.y, 0x5410), __byte_perm(column.z, column.w, 0x5410)};
    mma_16x8x16_half(hh, high, high_b);
    const uint32_t first[2] = {__byte_perm(column.x, 0, 0x1032), __byte_perm(column.y, 0, 0x1032)};
    mma_16x8x16_half(hl, cross[0], first);
    const uint32_t second[2] = {__byte_perm(column.z, 0, 0x1032), __byte_perm(column.w, 0, 0x1032)};
    mma_16x8x16_half(hl, cross[1], second);
  }
};

template <Math M>
struct Fragments {
  uint32_t a[2][4];
  __device__ __forceinline__ static Fragments of(uint4 row, uint4 row8) {
    return {{{row.x, row8.x, row.y, row8.y}, {row.z, row8.z, row.w, row8.w}}};
  }
  __device__ __forceinline__ void multiply(uint4 column, float (&sum)[4], float (&)[4]) const {
    const uint32_t first[2] = {column.x, column.y}, second[2] = {column.z, column.w};
    if constexpr (M == Math::half) {
      mma_16x8x16_half(sum, a[0], first);
      mma_16x8x16_half(sum, a[1], second);
    } else {
      mma_16x8x16_bfloat(sum, a[0], first);
      mma_16x8x16_bfloat(sum, a[1], second);
    }
  }
};

// A product from its accumulators.
__device__ __forceinline__ float combine(float hh, float hl) { return fmaf(hl, 1.f / 2048, hh); }

// The products of 16 rows with 8 columns, by one warp and straight from global memory: row(i) and column(i) point to
// operands. Calls body(row, column, product) for each, in the lane that has it; between() before the first. By the very operations, in the same order of
// k, that a tile (tile.cuh) spends on an element: rows with equal bits have equal products here and there.
struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};
template <Math M, class Acc, class Row, class Column, class Body, class Between = Nothing>
__device__ __forceinline__ void strip_products(int32_t pitch, Row row, Column column, Body body, Between between = {}) {
  const int lane = thread_index() % 32;
  if constexpr (M == Math::simt32 || M == Math::simt64) {
    const Acc* b = reinterpret_cast<const Acc*>(column(lane % 8));
    const Acc* a[4];
    Acc sum[4] = {};
    for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const Acc*>(row(lane / 8 + 4 * i));
    for (int32_t k = 0; k < pitch / int32_t(sizeof(Acc)); ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fma(a[i][k], b[k], sum[i]);
    }
    between();
#pragma unroll
    for (int i = 0; i < 4; ++i) body(lane / 8 + 4 * i, lane % 8, sum[i]);
  } else {
    const int g = lane / 4, t = lane % 4;
    const uint8_t *a = row(g) + 16 * t, *a8 = row(g + 8) + 16 * t, *b = column(g) + 16 * t;
    const auto load = [](const uint8_t* from) { return *reinterpret_cast<const uint4*>(from); };
    float hh[4] = {}, hl[4] = {};
#pragma unroll 4  // twelve loads in flight
    for (int32_t k = 0; k < pitch; k += kStageBytes) {
      Fragments<M>::of(load(a + k), load(a8 + k)).multiply(load(b + k), hh, hl);
    }
    between();
#pragma unroll
    for (int i = 0; i < 4; ++i) body(g + i / 2 * 8, 2 * t + i % 2, M == Math::split ? combine(hh[i], hl[i]) : hh[i]);
  }
}

constexpr int32_t kStagedPitch = 512;  // bytes of an operand that a warp keeps beside it, in shared memory

// One warp turns row `index` into the operand at `position`, and takes its norm: the diagonal of its product with itself.
// staged: [kStagedPitch], this warp's.
template <Math M, class In, class Acc>
__device__ void store_row(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index, int32_t position, uint8_t* staged,
                          Facts& facts) {
  const int lane = thread_index() % 32;
  const In* x = static_cast<const In*>(rows.x) + int64_t(index) * rows.stride;
  Acc largest = 0;
  bool finite = true;
  for (int32_t d = lane; d < p.dim; d += 32) {
    const Acc value = fabs(widen(x[d]));
    const bool is_finite = value <= (sizeof(Acc) == 4 ? Acc(3.402823466e38) : Acc(1.7976931348623157e308));
    finite &= is_finite;
    largest = is_finite && value > largest ? value : largest;
  }
  largest = warp_max(largest);
  finite = __ballot_sync(kWholeWarp, !finite) == 0;

  Acc inverse = 1;
  if (p.normalize) {  // squares of elements scaled to at most 1 neither overflow nor vanish
    const int32_t e = largest > 0 ? ilogb(largest) + 1 : 0;
    Acc sum = 0;
    for (int32_t d = lane; d < p.dim; d += 32) {
      const Acc scaled = ldexp(widen(x[d]), -e);
      sum = fma(scaled, scaled, sum);
    }
    const Acc norm = ldexp(sqrt(warp_sum(sum)), e);
    inverse = 1 / (norm > Acc(1e-12) ? norm : Acc(1e-12));
    largest *= inverse;
  }

  const int32_t exponent = row_exponent<M>(largest);
  uint8_t* row = rows.operand + int64_t(position) * p.pitch;
  constexpr int kBytes = MathTraits<M>::kElementBytes;
  const bool is_staged = sizeof(Acc) == 4 && p.pitch <= kStagedPitch;
  __syncwarp();  // the row before has been read
  for (int32_t d = lane; d < p.pitch / kBytes; d += 32) {
    const Acc value = d < p.dim ? widen(x[d]) * inverse : Acc(0);
    store_operand<M>(row, d, value, exponent);
    if (is_staged) store_operand<M>(staged, d, value, exponent);
  }
  __syncwarp();  // the row is there for all lanes
  const auto itself = [&](int) -> const uint8_t* { return is_staged ? staged : row; };
  Acc norm = 0;  // lane 0's
  strip_products<M, Acc>(p.pitch, itself, itself, [&](int i, int j, Acc product) {
    if (i == 0 && j == 0) rows.norm[position] = norm = product;
  });
  if (lane == 0) {
    rows.inverse_norm[index] = inverse;
    rows.exponent[position] = exponent;
    atomicMax(&facts.max_exponent, exponent);
    atomicMax(&facts.max_norm, norm_order(norm, exponent));
    if (!finite) atomicMax(&facts.has_nonfinite, 1);
  }
}

// ---- places ---------------------------------------------------------------------------------------------------------

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

// The labels of one chunk as 32-bit differences from the first one, where all differ by less than 2^31: half the comparisons,
// a load for four of them.
struct LabelKeys {
  int32_t key[kSortChunk];
  uint32_t are_wide;  // they do not
};
// By a block, between barriers; are_wide is 0.
__device__ __forceinline__ void load_keys(const int64_t* labels, int32_t count, LabelKeys& keys) {
  static_assert(kSortChunk % 64 == 0 && kSortChunk <= 1 << 15, "keys are read by fours, counts are added by pairs");
  const int64_t first = labels[0];
  const int32_t end = (count + 3) / 4 * 4;
  constexpr int kInFlight = 4;
#pragma unroll 1
  for (int32_t from = thread_index(); from < end; from += kInFlight * kThreads) {
    int64_t label[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) label[k] = labels[min(from + k * kThreads, count - 1)];
    bool are_wide = false;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int32_t i = from + k * kThreads;
      constexpr uint64_t kQuarter = uint64_t(1) << 62;  // differences of labels within it do not overflow
      const uint64_t difference = static_cast<uint64_t>(label[k]) - static_cast<uint64_t>(first);
      are_wide |= static_cast<uint64_t>(label[k]) + kQuarter >= 2 * kQuarter || difference + INT32_MAX >= 2u * INT32_MAX;
      if (i < end) keys.key[i] = i < count ? static_cast<int32_t>(difference) : INT32_MAX;
    }
    if (are_wide) store_relaxed(&keys.are_wide, 1u);
  }
}
// By one warp: the same in every lane.
__device__ __forceinline__ Among count_keys(const LabelKeys& keys, int32_t count, int32_t index) {
  const int32_t mine = keys.key[index];
  int32_t less = 0, equal = 0, before = 0;
#pragma unroll 4
  for (int32_t j = thread_index() % 32 * 4; j < count; j += 128) {
    const auto four = *reinterpret_cast<const Vector<int32_t, 4>*>(keys.key + j);
    if (j / 128 == index / 128) {  // few iterations ask where the row itself stands
      before = equal;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i < index) count_if_equal(before, four.element[i], mine);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      count_if_less(less, four.element[i], mine);
      count_if_equal(equal, four.element[i], mine);
    }
  }
  if (thread_index() % 32 * 4 + index / 128 * 128 >= count) before = equal;  // the lane has nothing behind
  const int32_t both = warp_sum(less | equal << 16);
  return {both & 0xffff, both >> 16, warp_sum(before)};
}

// Calls body(rows, others, are_anchors, i) for i in 0 .. rows.count of both sets, a warp each.
template <class Acc, class Body>
__device__ __forceinline__ void for_each_row(const Problem<Acc>& p, Body body) {
  const int64_t rows = int64_t(p.candidates.count) + (p.plain ? 0 : p.anchors.count);
  for (int64_t i = int64_t(block_index()) * kWarps + thread_index() / 32; i < rows; i += int64_t(grid_size()) * kWarps) {
    const bool second = i >= p.candidates.count;
    body(second ? p.anchors : p.candidates, second ? p.candidates : p.anchors, second || p.plain,
         static_cast<int32_t>(second ? i - p.candidates.count : i));
  }
}

// Merges the sorted chunks, one grid barrier per pass: an element finds its place by binary search in the sibling run.
template <class Acc>
__device__ void merge_chunks(const Problem<Acc>& p) {
#pragma unroll 1
  for (int merge = 0; merge < p.merges; ++merge) {
    grid_sync();  // the runs are complete
    for (int set = 0; set < (p.plain ? 1 : 2); ++set) {
      const Rows<Acc>& rows = set == 0 ? p.candidates : p.anchors;
      const int64_t* from = rows.sorted_label[merge & 1];
      for (int64_t i = int64_t(block_index()) * kThreads + thread_index(); i < rows.count;
           i += int64_t(grid_size()) * kThreads) {
        const int32_t place = merged_place(from, rows.count, int64_t(kSortChunk) << merge, static_cast<int32_t>(i));
        rows.sorted_label[(merge + 1) & 1][place] = from[i];
        rows.sorted_index[(merge + 1) & 1][place] = rows.sorted_index[merge & 1][i];
      }
    }
  }
  grid_sync();  // the order is complete
}

template <Math M, class In, class Acc>
__device__ void prepare(const Problem<Acc>& p, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  Facts& facts = *carver.take<Facts>(1);
  const int lane = thread_index() % 32;
  LabelKeys& keys = *carver.take<LabelKeys>(1);
  uint8_t* const staged = carver.take<uint8_t>(kWarps * kStagedPitch);
  if (thread_index() == 0) {
    facts = Facts{0, kNoExponent, INT32_MIN, 0};
    keys.are_wide = 0;
  }
  if (block_index() == 0 && thread_index() == 0) *p.counters = Counters{};
  for (int64_t c = int64_t(block_index()) * kThreads + thread_index(); c < p.candidates.count;
       c += int64_t(grid_size()) * kThreads) {
    p.times_chosen[c] = 0;
  }
  __syncthreads();  // zero facts

  const auto store = [&](const Rows<Acc>& rows, bool are_anchors, int32_t index, int32_t place, int32_t begin, int32_t end) {
    if (lane == 0) {
      rows.position[index] = place;
      rows.mate_begin[place] = begin;
      rows.mate_end[place] = end;
      if (are_anchors) atomicMax(&facts.max_positives, count_positives(p, begin, end));
    }
    store_row<M, In>(p, rows, index, place, staged + thread_index() / 32 * kStagedPitch, facts);
  };
  const bool one_chunk = p.merges == 0;
  // Kernels on doubles have no register to spare for either way of counting, nor would it show.
  bool has_keys = sizeof(Acc) == 4 && one_chunk && p.plain;
  if (has_keys) {
    load_keys(p.candidates.labels, p.candidates.count, keys);
    __syncthreads();  // all keys
    has_keys = load_relaxed(&keys.are_wide) == 0;
  }
  for_each_row(p, [&](const Rows<Acc>& rows, const Rows<Acc>& others, bool are_anchors, int32_t row) {
    if (one_chunk && lane * 32 < p.dim * int32_t(sizeof(In))) {  // store_row() will need it
      prefetch(static_cast<const In*>(rows.x) + int64_t(row) * rows.stride + lane * (32 / int32_t(sizeof(In))));
    }
    const int64_t label = rows.labels[row];
    const int32_t first = row / kSortChunk * kSortChunk;
    const Among own = has_keys ? count_keys(keys, rows.count, row)
                               : count_labels(rows.labels, first, min(first + kSortChunk, rows.count), label, row);
    const int32_t place = first + own.less + own.before;
    if (lane == 0) {
      rows.sorted_label[0][place] = label;
      rows.sorted_index[0][place] = row;
    }
    if (!one_chunk) return;
    const Among mates = p.plain ? own : count_labels(others.labels, 0, others.count, label, 0);
    store(rows, are_anchors, row, place, mates.less, mates.less + mates.equal);
  });
  if (!one_chunk) {
    merge_chunks(p);
    for_each_row(p, [&](const Rows<Acc>& rows, const Rows<Acc>& others, bool are_anchors, int32_t place) {
      const int64_t label = rows.sorted_label[p.merges & 1][place];
      const int64_t* labels = others.sorted_label[p.merges & 1];
      store(rows, are_anchors, sorted_index(p, rows)[place], place, count_below<false>(labels, others.count, label),
            count_below<true>(labels, others.count, label));
    });
  }
  __syncthreads();  // the facts of all warps
  if (thread_index() == 0) p.facts[block_index()] = facts;
}

// The facts of all rows, in every thread. Behind the grid barrier that ends prepare().
template <class Acc>
__device__ Facts gather_facts(const Problem<Acc>& p, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  Facts& s = *carver.take<Facts>(1);
  __syncthreads();  // prepare() has read its own facts, which stand in the same place
  if (thread_index() == 0) s = Facts{0, kNoExponent, INT32_MIN, 0};
  __syncthreads();
  for (int32_t block = thread_index(); block < grid_size(); block += kThreads) {
    const Facts facts = p.facts[block];
    atomicMax(&s.max_positives, facts.max_positives);
    atomicMax(&s.max_exponent, facts.max_exponent);
    atomicMax(&s.max_norm, facts.max_norm);
    atomicMax(&s.has_nonfinite, facts.has_nonfinite);
  }
  __syncthreads();
  const Facts all = s;
  __syncthreads();  // every thread has read it before the memory is used anew
  return all;
}

}  // namespace facenet_ext::cuda
