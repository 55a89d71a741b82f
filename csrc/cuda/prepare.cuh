// Phase 1: rows sorted by (label, index), their classes, and the operands of the products. A warp per row, no barrier
// between:
//
//   label    ->  how many labels are smaller, equal, equal and before  ->  position, mate_begin, mate_end
//   row [D]  ->  largest |x|, norm  ->  operand [pitch], exponent, inverse_norm  ->  norm: its product with itself
//
// Up to kSortChunk rows every block counts how many rows have each label, in a hash table, and a row adds up what is smaller.
// Where there is no table (two sets of rows, doubles, CUDA cores, little shared memory) or no 32 bits tell the labels apart, they
// are compared with each other, N^2 / 32 comparisons by warps; so are chunks of longer inputs, which are merged (sort.cuh) then.
// Reads X once, writes N * pitch bytes.
//
// Each row has a power-of-two scale of its own, so no finite range of inputs is lost in half precision: an element that
// underflows is 2^-28 of its row's largest, far below float32's own error in a product of rows. That holds for bfloat16 too:
// a half has its 8 bits down to 2^-30 of the largest. Distances are computed in units of the largest row's scale (tile.cuh),
// which is exact too.
#pragma once

#include "labels.cuh"

namespace facenet_ext::cuda {

// ---- operands -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int32_t log2_of(double x) { return ilogb(x); }
__device__ __forceinline__ int32_t log2_of(float x) {
  const uint32_t bits = ordered_bits(x);
  return bits >= 1u << 23 ? static_cast<int32_t>(bits >> 23) - 127 : ilogb(x);
}

// The exponent e with row * 2^-e in [2^13, 2^14): 2^14 leaves room in a half for lo * 2^11 and for sums in float32.
template <Math M>
__device__ __forceinline__ int32_t row_exponent(typename MathTraits<M>::Acc largest) {
  if (M == Math::simt64) return 0;
  if (!(largest > 0)) return kNoExponent;
  return log2_of(largest) - 13;
}

// Elements of a row as `operand` holds them.
template <Math M>
struct Operand {
  using Acc = typename MathTraits<M>::Acc;
  using Word = std::conditional_t<M == Math::simt64, double,
                                  std::conditional_t<M == Math::simt32, float,
                                                     std::conditional_t<M == Math::split, uint32_t, uint16_t>>>;
  // 2^-exponent. In two factors, each of them a float; only what rounds to zero in the end is rounded on the way.
  Acc factor[2];

  __device__ __forceinline__ explicit Operand(int32_t exponent) : factor{1, 1} {
    if (M == Math::simt64 || exponent == kNoExponent) return;
    factor[0] = __uint_as_float(static_cast<uint32_t>(127 - exponent / 2) << 23);
    factor[1] = __uint_as_float(static_cast<uint32_t>(127 - (exponent - exponent / 2)) << 23);
  }
  __device__ __forceinline__ Word of(Acc x) const {
    if constexpr (M == Math::simt64) {
      return x;
    } else {
      const float scaled = x * factor[0] * factor[1];
      if constexpr (M == Math::split) {
        const uint16_t hi = half_from_float(scaled);
        const uint16_t lo = half_from_float((scaled - float_from_half(hi)) * 2048.f);
        return hi | uint32_t(lo) << 16;
      } else if constexpr (M == Math::half) {
        return half_from_float(scaled);
      } else {
        return scaled;
      }
    }
  }
};

// Four (split) or eight (half) neighbouring elements of two rows of A and one of B, and their products. Which k a
// lane holds does not matter as long as A and B agree, so a lane takes 16 contiguous bytes of a row: one vector load, no
// shuffling.
//
// split: a register is (hi, lo). hi * hi takes the lower halves of two registers; the cross terms lo * hi + hi * lo pair
// (lo, hi) with (hi, lo) inside one register: B as it is loaded, in neighbouring registers, and A exchanged, which puts its
// four where the mma wants them. Exchanging A and B then only exchanges two neighbours inside one mma's sum,
// which the hardware adds without order: d(a, b) = d(b, a) bit for bit (seen under emulation; on an H200, no selection of
// gpu_check.sh depends on the side).
template <Math M>
struct Fragments;

template <>
struct Fragments<Math::split> {
  uint32_t high[4];         // A: hi
  uint32_t cross[2][4];     // A: (lo, hi)
  __device__ __forceinline__ static Fragments of(uint4 row, uint4 row8) {
    const auto exchanged = [](uint32_t x) { return __byte_perm(x, 0, 0x1032); };
    return {{__byte_perm(row.x, row.y, 0x5410), __byte_perm(row8.x, row8.y, 0x5410), __byte_perm(row.z, row.w, 0x5410),
             __byte_perm(row8.z, row8.w, 0x5410)},
            {{exchanged(row.x), exchanged(row8.x), exchanged(row.y), exchanged(row8.y)},
             {exchanged(row.z), exchanged(row8.z), exchanged(row.w), exchanged(row8.w)}}};
  }
  __device__ __forceinline__ void multiply(uint4 column, float (&hh)[4], float (&hl)[4]) const {
    const uint32_t high_b[2] = {__byte_perm(column.x, column.y, 0x5410), __byte_perm(column.z, column.w, 0x5410)};
    mma_16x8x16_half(hh, high, high_b);
    const uint32_t first[2] = {column.x, column.y};
    mma_16x8x16_half(hl, cross[0], first);
    const uint32_t second[2] = {column.z, column.w};
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
    mma_16x8x16_half(sum, a[0], first);
    mma_16x8x16_half(sum, a[1], second);
  }
};

// A product from its accumulators.
__device__ __forceinline__ float combine(float hh, float hl) { return fmaf(hl, 1.f / 2048, hh); }

// The products of 16 rows with 8 columns, by one warp and straight from global memory: row(i) and column(i) point to
// operands. Calls body(row, column, product) for each, in the lane that has it; between() before the first. By the very
// operations, in the same order of k, that a tile (tile.cuh) spends on an element: rows with equal bits have equal products here and there.
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

// The product of a row with itself, by one warp. operand: not in the memory that other lanes are writing.
template <Math M, class Acc>
__device__ __forceinline__ Acc product_with_itself(int32_t pitch, const uint8_t* operand) {
  Acc product = 0;  // lane 0's
  if constexpr (M == Math::simt32 || M == Math::simt64) {
    const auto itself = [&](int) { return operand; };
    strip_products<M, Acc>(pitch, itself, itself, [&](int i, int j, Acc x) { product = i == 0 && j == 0 ? x : product; });
  } else {  // as strip_products() does, where eight of the 16 rows are zero
    const uint8_t* row = operand + 16 * (thread_index() % 4);
    float hh[4] = {}, hl[4] = {};
#pragma unroll 4
    for (int32_t k = 0; k < pitch; k += kStageBytes) {
      const uint4 x = *reinterpret_cast<const uint4*>(row + k);
      Fragments<M>::of(x, uint4{0, 0, 0, 0}).multiply(x, hh, hl);
    }
    product = M == Math::split ? combine(hh[0], hl[0]) : hh[0];
  }
  return product;
}

// Neighbouring elements of a row that a lane has: 16 bytes of Acc.
template <class Acc>
constexpr int kLaneElements = 16 / int(sizeof(Acc));
template <class In, class Acc>
__device__ __forceinline__ Vector<Acc, kLaneElements<Acc>> load_elements(const Problem<Acc>& p, const Rows<Acc>& rows,
                                                                         int32_t index, int32_t d) {
  constexpr int kEach = kLaneElements<Acc>;
  const In* x = static_cast<const In*>(rows.x) + int64_t(index) * rows.stride + d;
  Vector<In, kEach> in{};
  if (rows.aligned) {
    if (d < p.dim) in = *reinterpret_cast<const Vector<In, kEach>*>(x);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (d + i < p.dim) in.element[i] = x[i];
    }
  }
  Vector<Acc, kEach> out;
#pragma unroll
  for (int i = 0; i < kEach; ++i) out.element[i] = widen(in.element[i], p.is_bfloat);
  return out;
}

// 1 / max(length 2^e, 1e-12), also where that length is beyond the range.
template <class Acc>
__device__ __forceinline__ Acc inverse_of_norm(Acc length, int32_t e) {
  const Acc norm = ldexp(length, e);
  if (!(norm <= Acc(sizeof(Acc) == 8 ? DBL_MAX : double(FLT_MAX)))) return ldexp(1 / length, -e);
  return 1 / (norm > Acc(1e-12) ? norm : Acc(1e-12));
}

constexpr int32_t kStagedPitch = 512;  // bytes of an operand that a warp keeps beside it, in shared memory

// One warp turns row `index` into the operand at `position`, and takes its norm: the diagonal of its product with itself.
// x: the lane's first elements. staged: [kStagedPitch], this warp's.
template <Math M, class In, class Acc>
__device__ void store_row(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index, int32_t position,
                          const Vector<Acc, kLaneElements<Acc>>& x, uint8_t* staged, Facts& facts) {
  constexpr int kEach = kLaneElements<Acc>;
  const int lane = thread_index() % 32;
  // Calls body(d, elements) for all that the lane has. Doubles leave no register where the first ones could wait.
  constexpr int32_t kWaiting = sizeof(Acc) == 4 ? 32 * kEach : 0;
  const auto for_each = [&](int32_t end, auto body) {
    if (kWaiting > 0) body(lane * kEach, x);
#pragma unroll 1
    for (int32_t d = kWaiting + lane * kEach; d < end; d += 32 * kEach) body(d, load_elements<In>(p, rows, index, d));
  };
  auto largest_bits = ordered_bits(Acc(0));
  bool finite = true;
  for_each(p.dim, [&](int32_t, const auto& v) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const auto bits = ordered_bits(Acc(fabs(v.element[i])));
      const bool is_finite = bits < ordered_bits(Acc(INFINITY));
      finite &= is_finite;
      largest_bits = max(largest_bits, is_finite ? bits : decltype(bits)(0));
    }
  });
  largest_bits = warp_max(largest_bits);
  finite = __ballot_sync(kWholeWarp, !finite) == 0;
  Acc largest = from_ordered_bits(largest_bits), inverse = 1;

  if (p.normalize) {  // squares of elements scaled to at most 1 neither overflow nor vanish
    const int32_t e = largest > 0 ? ilogb(largest) + 1 : 0;
    Acc sum = 0;
    for (int32_t d = lane; d < p.dim; d += 32) {
      const Acc scaled = ldexp(widen(static_cast<const In*>(rows.x)[int64_t(index) * rows.stride + d], p.is_bfloat), -e);
      sum = fma(scaled, scaled, sum);
    }
    inverse = inverse_of_norm(sqrt(warp_sum(sum)), e);
    largest *= inverse;
  }

  const int32_t exponent = row_exponent<M>(largest);
  const Operand<M> operand(exponent);
  using Words = Vector<typename Operand<M>::Word, kEach>;
  uint8_t* row = rows.operand + int64_t(position) * p.pitch;
  const bool is_staged = sizeof(Acc) == 4 && p.pitch <= kStagedPitch;
  __syncwarp();  // the row before has been read
  for_each(p.pitch / int32_t(sizeof(typename Operand<M>::Word)), [&](int32_t d, const auto& v) {
    Words words;
#pragma unroll
    for (int i = 0; i < kEach; ++i) words.element[i] = operand.of(v.element[i] * inverse);
    if (d * int32_t(sizeof(typename Operand<M>::Word)) >= p.pitch) return;
    reinterpret_cast<Words*>(row)[d / kEach] = words;
    if (is_staged) reinterpret_cast<Words*>(staged)[d / kEach] = words;
  });
  __syncwarp();  // the row is there for all lanes
  const Acc norm = product_with_itself<M, Acc>(p.pitch, is_staged ? staged : row);
  if (lane == 0) {
    rows.norm[position] = norm;
    if (p.normalize) rows.inverse_norm[index] = inverse;
    rows.exponent[position] = exponent;
    atomicMax(&facts.max_exponent, exponent);
    atomicMax(&facts.max_norm, norm_order(norm, exponent));
    if (!finite) atomicMax(&facts.has_nonfinite, 1);
  }
}

// ---- places ---------------------------------------------------------------------------------------------------------

// The block's rows of both sets, candidates first: neighbours.
struct RowsOfBlock {
  int32_t begin, end;
  template <class Acc>
  __device__ __forceinline__ explicit RowsOfBlock(const Problem<Acc>& p) {
    const int32_t rows = p.candidates.count + (p.plain ? 0 : p.anchors.count);
    begin = min(block_index() * p.rows_per_block, rows);
    end = min(begin + p.rows_per_block, rows);
  }
  // Calls body(rows, others, are_anchors, i) for each of them, a warp each.
  template <class Acc, class Body>
  __device__ __forceinline__ void for_each(const Problem<Acc>& p, Body body) const {
#pragma unroll 1
    for (int32_t i = begin + thread_index() / 32; i < end; i += kWarps) {
      const bool second = i >= p.candidates.count;
      body(second ? p.anchors : p.candidates, second ? p.candidates : p.anchors, second || p.plain,
           second ? i - p.candidates.count : i);
    }
  }
};

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

// Kernels on doubles have no register to spare for a table, nor would it show on CUDA cores.
template <Math M>
constexpr bool kHasTable = M != Math::simt32 && M != Math::simt64;

struct PrepareShared {
  Facts* facts;
  LabelTable table;
  uint8_t* staged;  // [kWarps][kStagedPitch]
};
template <class Acc>
__host__ __device__ PrepareShared carve_prepare(Carver& carver, const Problem<Acc>& p) {
  const int32_t rows = p.has_table ? p.candidates.count : 0, slots = p.has_table ? 1 << p.slot_bits : 0;
  PrepareShared s;
  s.facts = carver.take<Facts>(1);
  s.table.key = carver.take<int32_t>(rows);
  s.table.slot = carver.take<int32_t>(slots);
  s.table.count = carver.take<uint32_t>(slots);
  s.table.full = carver.take<int32_t>(rows);
  s.table.fulls = carver.take<int32_t>(1);
  s.table.are_wide = carver.take<uint32_t>(1);
  s.staged = carver.take<uint8_t>(kWarps * kStagedPitch);
  return s;
}

// Whether there is a table, and the bytes of shared memory behind `before` of them.
template <Math M, class Acc>
int64_t choose_table(Problem<Acc>& p, int64_t before, int64_t limit) {
  const auto bytes = [&](bool has_table) {
    Carver carver{nullptr, before, true};
    p.has_table = has_table;
    carve_prepare(carver, p);
    return carver.used;
  };
  p.slot_bits = slot_bits(p.candidates.count);
  const bool fits = kHasTable<M> && p.plain && p.merges == 0 && p.candidates.count > 0 && bytes(true) <= limit;
  return bytes(fits);
}

// Returns whether all labels have been counted; then they are in `table`.
template <Math M, class In, class Acc>
__device__ bool prepare(const Problem<Acc>& p, uint8_t* shared_memory, LabelTable& table) {
  Carver carver{shared_memory, 0, true};
  const PrepareShared s = carve_prepare(carver, p);
  table = s.table;
  Facts& facts = *s.facts;
  const int lane = thread_index() % 32;
  const bool one_chunk = p.merges == 0;
  bool has_table = kHasTable<M> && p.has_table;
  SomeLabels some;  // their way takes longest
  int64_t zero = 0;
  if (p.candidates.count > 0) {
    some.load(p.candidates.labels, p.candidates.count, thread_index());
    zero = p.candidates.labels[0];
  }
  if (thread_index() == 0) {
    facts = Facts{0, kNoExponent, INT32_MIN, 0};
    if (has_table) *table.fulls = *table.are_wide = 0;
  }
  const RowsOfBlock mine(p);
  // Rows of the first turn, which are on their way while labels are counted.
  const int32_t ahead = mine.begin + thread_index() / 32;
  if (has_table && ahead < mine.end && lane * 32 < p.dim * int32_t(sizeof(In))) {
    prefetch(static_cast<const In*>(p.candidates.x) + int64_t(ahead) * p.candidates.stride + lane * (32 / int32_t(sizeof(In))));
  }
  if (has_table) empty_slots(p.slot_bits, table);
  __syncthreads();  // zero facts, empty slots

  if (has_table) {
    load_keys(p.candidates.labels, p.candidates.count, some, zero, table);
    __syncthreads();  // all keys
    has_table = load_relaxed(table.are_wide) == 0;
    if (has_table) count_keys(p.slot_bits, p.candidates.count, mine.begin, table);
    __syncthreads();  // all counts
  }
  const auto store = [&](const Rows<Acc>& rows, bool are_anchors, int32_t index, int32_t place, int32_t begin, int32_t end,
                         const Vector<Acc, kLaneElements<Acc>>& x) {
    if (lane == 0) {
      rows.position[index] = place;
      rows.mate_begin[place] = begin;
      rows.mate_end[place] = end;
      if (are_anchors) atomicMax(&facts.max_positives, count_positives(p, begin, end));
    }
    store_row<M, In>(p, rows, index, place, x, s.staged + thread_index() / 32 * kStagedPitch, facts);
  };
  mine.for_each(p, [&](const Rows<Acc>& rows, const Rows<Acc>& others, bool are_anchors, int32_t row) {
    Vector<Acc, kLaneElements<Acc>> x{};
    if (one_chunk) x = load_elements<In>(p, rows, row, lane * kLaneElements<Acc>);
    const int64_t label = has_table ? 0 : rows.labels[row];
    const int32_t first = row / kSortChunk * kSortChunk;
    const Among own = has_table ? find_among(table, mine.begin, row)
                                : count_labels(rows.labels, first, min(first + kSortChunk, rows.count), label, row);
    const int32_t place = first + own.less + own.before;
    if (lane == 0) {
      if (!one_chunk) rows.sorted_label[0][place] = label;
      rows.sorted_index[0][place] = row;
    }
    if (!one_chunk) return;
    const Among mates = p.plain ? own : count_labels(others.labels, 0, others.count, label, 0);
    store(rows, are_anchors, row, place, mates.less, mates.less + mates.equal, x);
  });
  if (!one_chunk) {
    merge_chunks(p);
    mine.for_each(p, [&](const Rows<Acc>& rows, const Rows<Acc>& others, bool are_anchors, int32_t place) {
      const int64_t label = rows.sorted_label[p.merges & 1][place];
      const int64_t* labels = others.sorted_label[p.merges & 1];
      const int32_t index = sorted_index(p, rows)[place];
      store(rows, are_anchors, index, place, count_below<false>(labels, others.count, label),
            count_below<true>(labels, others.count, label),
            load_elements<In>(p, rows, index, lane * kLaneElements<Acc>));
    });
  }
  __syncthreads();  // the facts of all warps
  if (thread_index() == 0) p.facts[block_index()] = facts;
  return has_table;
}

// What finish() counts in. Behind prepare(), where nobody waits for it.
template <class Acc>
__device__ void clear_counters(const Problem<Acc>& p) {
  if (block_index() == 0 && thread_index() == 0) *p.counters = Counters{};
#pragma unroll 1
  for (int64_t c = int64_t(block_index()) * kThreads + thread_index(); c < p.candidates.count;
       c += int64_t(grid_size()) * kThreads) {
    p.times_chosen[c] = 0;
  }
}

// The facts of all rows, by one warp or more. Behind the grid barrier that ends prepare().
template <class Acc>
__device__ Facts gather_facts(const Problem<Acc>& p) {
  Facts all{0, kNoExponent, INT32_MIN, 0};
  constexpr int kInFlight = 5;  // 160 blocks
#pragma unroll 1
  for (int32_t first = thread_index() % 32; first < grid_size(); first += 32 * kInFlight) {
    Facts facts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) facts[i] = p.facts[min(first + 32 * i, grid_size() - 1)];  // no branch between loads
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      all.max_positives = max(all.max_positives, facts[i].max_positives);
      all.max_exponent = max(all.max_exponent, facts[i].max_exponent);
      all.max_norm = max(all.max_norm, facts[i].max_norm);
      all.has_nonfinite = max(all.has_nonfinite, facts[i].has_nonfinite);
    }
  }
  return {warp_max(all.max_positives), warp_max(all.max_exponent), warp_max(all.max_norm), warp_max(all.has_nonfinite)};
}

}  // namespace facenet_ext::cuda
