// Phase 1: rows sorted by (label, index), their classes, and the operands of the products.
//
// A block takes kUnit rows at a time:
//
//   labels [count]  ->  less, equal, before [kUnit]  ->  position, mate_begin, mate_end
//   row [D]         ->  largest |x|, norm            ->  operand [pitch], exponent, inverse_norm
//   operands        ->  norm: the diagonal of the 16 x 16 product of the unit with itself
//
// Up to kSortChunk rows a label's place is simply the number of smaller ones: N^2 comparisons by ballots, no barrier, 1 us at
// N = 1800. Beyond, chunks are counted and merged (sort.cuh) first. Reads X once, writes N * pitch bytes.
//
// Each row has a power-of-two scale of its own, so no finite range of inputs is lost in half precision: an element that
// underflows is 2^-28 of its row's largest, far below float32's own error in a product of rows. Distances are computed in units
// of the largest row's scale (tile.cuh), which is exact too.
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

// Four (split) or eight (half, bfloat) neighbouring elements of two rows of A and one of B, and their products. Which k a lane
// holds does not matter as long as A and B agree, so a lane takes 16 contiguous bytes of a row: one vector load, no shuffling.
//
// split: a register is (hi, lo). hi * hi takes the lower halves of two registers; the cross terms hi * lo + lo * hi pair
// (hi, lo) with (lo, hi) inside one register. Exchanging A and B then only exchanges two neighbours inside one mma's sum, which
// the hardware adds without order: d(a, b) = d(b, a) bit for bit (seen under emulation; on hardware gpu_check.sh measures it).
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

// norm[position] for the unit's rows, by the very operations that a tile spends on the product of a row with itself, so that
// rows with equal bits are at distance exactly 0.
template <Math M, class Acc>
__device__ void unit_norms(const Rows<Acc>& rows, int32_t pitch, const int32_t* destination, int count) {
  const int lane = thread_index() % 32;
  if constexpr (M == Math::simt32 || M == Math::simt64) {
    if (lane < count) {
      const Acc* row = reinterpret_cast<const Acc*>(rows.operand + int64_t(destination[lane]) * pitch);
      Acc sum = 0;
      for (int32_t k = 0; k < pitch / int32_t(sizeof(Acc)); ++k) sum = fma(row[k], row[k], sum);
      rows.norm[destination[lane]] = sum;
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    const uint8_t* row = rows.operand + int64_t(destination[g < count ? g : 0]) * pitch;
    const uint8_t* row8 = rows.operand + int64_t(destination[g + 8 < count ? g + 8 : 0]) * pitch;
    float hh[2][4] = {}, hl[2][4] = {};
#pragma unroll 1
    for (int32_t k = 16 * t; k < pitch; k += kStageBytes) {
      const uint4 a = *reinterpret_cast<const uint4*>(row + k), a8 = *reinterpret_cast<const uint4*>(row8 + k);
      const auto fragments = Fragments<M>::of(a, a8);
      fragments.multiply(a, hh[0], hl[0]);   // columns 0 .. 7 are rows 0 .. 7
      fragments.multiply(a8, hh[1], hl[1]);  // columns 8 .. 15
    }
    // Lane (g, t) holds (g, 2t) and (g, 2t + 1) of the left half and (g + 8, 8 + 2t), (g + 8, 9 + 2t) of the right one.
    if (t == g / 2) {
      if (g < count) rows.norm[destination[g]] = g % 2 == 0 ? combine(hh[0][0], hl[0][0]) : combine(hh[0][1], hl[0][1]);
      if (g + 8 < count) {
        rows.norm[destination[g + 8]] = g % 2 == 0 ? combine(hh[1][2], hl[1][2]) : combine(hh[1][3], hl[1][3]);
      }
    }
  }
}

// One warp turns row `index` into the operand at `position`.
template <Math M, class In, class Acc>
__device__ void store_row(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index, int32_t position, Facts& facts) {
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
  for (int32_t d = lane; d < p.pitch / kBytes; d += 32) {
    store_operand<M>(row, d, d < p.dim ? widen(x[d]) * inverse : Acc(0), exponent);
  }
  if (lane == 0) {
    rows.inverse_norm[index] = inverse;
    rows.exponent[position] = exponent;
    atomicMax(&facts.max_exponent, exponent);
    if (!finite) atomicMax(&facts.has_nonfinite, 1);
  }
}

// ---- places ---------------------------------------------------------------------------------------------------------

struct UnitCounts {  // of each row of a unit, among some labels: those smaller, equal, and equal with a lower index
  int32_t less[kUnit], equal[kUnit], before[kUnit];
};

// Adds the labels[begin .. end) to the counts, by the whole block; the caller has zeroed them and puts a barrier behind.
__device__ inline void count_labels(const int64_t* labels, int32_t begin, int32_t end, const int64_t* unit_label,
                                    const int32_t* unit_index, UnitCounts& counts) {
  const int lane = thread_index() % 32;
  int32_t less = 0, equal = 0, before = 0;  // lane u counts for row u
  for (int32_t base = begin; base < end; base += kThreads) {
    const int32_t j = base + thread_index();
    const bool valid = j < end;
    const int64_t label = valid ? labels[j] : 0;
#pragma unroll 4
    for (int u = 0; u < kUnit; ++u) {
      const uint32_t smaller = __ballot_sync(kWholeWarp, valid && label < unit_label[u]);
      const uint32_t same = __ballot_sync(kWholeWarp, valid && label == unit_label[u]);
      const uint32_t earlier = same & __ballot_sync(kWholeWarp, j < unit_index[u]);
      if (lane == u) {
        less += __popc(smaller);
        equal += __popc(same);
        before += __popc(earlier);
      }
    }
  }
  if (lane < kUnit) {
    atomicAdd(&counts.less[lane], less);
    atomicAdd(&counts.equal[lane], equal);
    atomicAdd(&counts.before[lane], before);
  }
}

struct PrepareShared {
  int64_t label[kUnit];
  int32_t index[kUnit];
  int32_t destination[kUnit];
  UnitCounts own, other;
  Facts facts;
};

// Calls body(rows, others, are_anchors, unit, first row, rows in the unit) for every unit of this block.
template <class Acc, class Body>
__device__ __forceinline__ void for_each_unit(const Problem<Acc>& p, Body body) {
  const int32_t candidate_units = (p.candidates.count + kUnit - 1) / kUnit;
  const int32_t units = candidate_units + (p.plain ? 0 : (p.anchors.count + kUnit - 1) / kUnit);
  for (int32_t unit = block_index(); unit < units; unit += grid_size()) {
    const bool second = unit >= candidate_units;
    const Rows<Acc>& rows = second ? p.anchors : p.candidates;
    const int32_t first = (second ? unit - candidate_units : unit) * kUnit;
    body(rows, second ? p.candidates : p.anchors, second || p.plain, unit, first, min(kUnit, rows.count - first));
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
      for (int64_t i = int64_t(block_index()) * kThreads + thread_index(); i < rows.count; i += int64_t(grid_size()) * kThreads) {
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
  PrepareShared& s = *carver.take<PrepareShared>(1);
  const bool one_chunk = p.merges == 0;

  if (block_index() == 0 && thread_index() == 0) *p.counters = Counters{};
  for (int64_t c = int64_t(block_index()) * kThreads + thread_index(); c < p.candidates.count; c += int64_t(grid_size()) * kThreads) {
    p.times_chosen[c] = 0;
  }

  // One chunk: a row's place is counted and its operand stored in one go. Several: places inside the chunks first (step 0), then
  // merging, then the operands of rows in their order (step 1).
#pragma unroll 1
  for (int step = one_chunk ? 1 : 0; step < 2; ++step) {
    const bool counts = step == 0 || one_chunk;
    if (!counts) merge_chunks(p);
    for_each_unit(p, [&](const Rows<Acc>& rows, const Rows<Acc>& others, bool are_anchors, int32_t unit, int32_t first, int count) {
      const int thread = thread_index(), row = first + thread;
      __syncthreads();  // the unit before is done with `s`
      if (thread == 0) s.facts = Facts{0, kNoExponent, 0};
      if (counts) {
        if (thread < kUnit) {
          s.label[thread] = thread < count ? rows.labels[row] : 0;
          s.index[thread] = row;
          s.own.less[thread] = s.own.equal[thread] = s.own.before[thread] = 0;
          s.other.less[thread] = s.other.equal[thread] = s.other.before[thread] = 0;
        }
        __syncthreads();  // the unit's labels, zero counts
        const int32_t begin = first / kSortChunk * kSortChunk;
        count_labels(rows.labels, begin, min(begin + kSortChunk, rows.count), s.label, s.index, s.own);
        if (one_chunk && !p.plain) count_labels(others.labels, 0, others.count, s.label, s.index, s.other);
        __syncthreads();  // the counts
        if (thread < count) {
          const int32_t place = begin + s.own.less[thread] + s.own.before[thread];
          rows.sorted_label[0][place] = s.label[thread];
          rows.sorted_index[0][place] = row;
          s.destination[thread] = place;
        }
      } else if (thread < count) {
        s.label[thread] = rows.sorted_label[p.merges & 1][row];
        s.index[thread] = sorted_index(p, rows)[row];
        s.destination[thread] = row;
      }
      if (step == 0) return;
      __syncthreads();  // facts, indices, destinations
      if (thread < count) {
        const UnitCounts& mates = p.plain ? s.own : s.other;
        const int64_t* labels = others.sorted_label[p.merges & 1];
        const int32_t place = s.destination[thread];
        const int32_t begin = counts ? mates.less[thread] : count_below<false>(labels, others.count, s.label[thread]);
        const int32_t end = counts ? begin + mates.equal[thread] : count_below<true>(labels, others.count, s.label[thread]);
        rows.position[s.index[thread]] = place;
        rows.mate_begin[place] = begin;
        rows.mate_end[place] = end;
        if (are_anchors) atomicMax(&s.facts.max_positives, count_positives(p, begin, end));
      }
      for (int u = thread / 32; u < count; u += kWarps) store_row<M, In>(p, rows, s.index[u], s.destination[u], s.facts);
      __syncthreads();  // operands and facts
      if (thread < 32) unit_norms<M>(rows, p.pitch, s.destination, count);
      if (thread == 0) p.facts[unit] = s.facts;
    });
  }
}

// The facts of all rows, in every thread. Behind the grid barrier that ends prepare().
template <class Acc>
__device__ Facts gather_facts(const Problem<Acc>& p, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  Facts& s = *carver.take<Facts>(1);
  if (thread_index() == 0) s = Facts{0, kNoExponent, 0};
  __syncthreads();
  const int32_t units = (p.candidates.count + kUnit - 1) / kUnit + (p.plain ? 0 : (p.anchors.count + kUnit - 1) / kUnit);
  Facts mine{0, kNoExponent, 0};
  for (int32_t unit = thread_index(); unit < units; unit += kThreads) {
    const Facts facts = p.facts[unit];
    mine.max_positives = max(mine.max_positives, facts.max_positives);
    mine.max_exponent = max(mine.max_exponent, facts.max_exponent);
    mine.has_nonfinite |= facts.has_nonfinite;
  }
  mine.max_positives = warp_max(mine.max_positives);
  mine.max_exponent = warp_max(mine.max_exponent);
  mine.has_nonfinite = warp_max(mine.has_nonfinite);
  if (thread_index() % 32 == 0) {
    atomicMax(&s.max_positives, mine.max_positives);
    atomicMax(&s.max_exponent, mine.max_exponent);
    atomicMax(&s.has_nonfinite, mine.has_nonfinite);
  }
  __syncthreads();
  const Facts all = s;
  __syncthreads();  // every thread has read it before the memory is used anew
  return all;
}

}  // namespace facenet_ext::cuda
