// Rules that give every negative a term (csrc/cpu/dense.h says what the sums are): what their kernel gets, and the phases
// before its sweep.
//
//   1 survey       rows -> their norms if they are to be normalised, and how far they are from row 0
//   2 copy         rows, as the distances see them, to a copy in Acc; nearer to row 0 than half its length: less row 0
//   3 prepare      prepare.cuh, of the copy: order, classes, operands
//   4 thresholds   d(a, p) of the anchors' positives, sorted
//   5 sweep        dense_sweep.cuh:  every distance of every anchor
//   6 count        dense_finish.cuh: histograms -> weights of the positives, loss, counts
//   7 gradient     dense_finish.cuh: partial sums and positives -> gradient
//
// Distances are expanded squares whose error grows with the rows' lengths, and few pairs are looked at twice; so phase 2
// moves rows that lie together, away from the origin, to the origin. Rows with equal bits stay equal. Pairs that are near
// even so are few: their distance and their part of the gradient are summed directly.
#pragma once

#include "gradient.cuh"

namespace facenet_ext::cuda {

constexpr int kMaxChunks = 8;  // of the columns of a strip of tiles; each has partial sums of its own

// A pair is near below this share of |a|^2 + |b|^2: of an expanded square so small the rounding shows, more so in what
// divides by it. The CPU draws the same line.
constexpr float kNear = 1.f / 64;

struct DenseTotals {
  uint64_t terms, active, hard, semi_hard;
  uint64_t max_d2_ap;  // ordered bits of a double
  bool moved;  // the copy is not what the input is
};

template <class Acc>
struct Source {  // rows as the caller gave them
  const void* x;
  int64_t stride;
  Acc* inverse_norm;  // [count] what they are multiplied by if they are to be normalised
};

template <class Acc>
struct DenseProblem {
  // side[0]: anchors in rows, candidates in columns; side[1]: exchanged (not if plain). Rows::x is the copy, `stride` = D;
  // the options in them are prepare()'s, those of the rule stand below.
  Problem<Acc> side[2];
  Source<Acc> source[2];    // candidates, anchors
  DType dtype;
  bool multiplies[2];       // the gradient of side's rows is wanted
  bool normalize, euclidean, stats, unordered;
  bool above;               // all_semi_hard: only negatives farther than the positive
  bool closed;              // and those with g <= band
  Positives positives;
  Reduction reduction;
  int32_t eligible;         // candidates of this index and up are nobody's positives
  double margin, band;      // in the unit of d, which for the cosine is d2
  double unit;              // loss / d: 1/2 for the cosine
  int32_t shared_slots;     // thresholds of an anchor that fit in shared memory

  int32_t* kept_begin;  // [A] by position: positives are the candidates at positions kept_begin .. kept_end, but itself
  int32_t* kept_end;
  int32_t* count;  // [A] thresholds: as many, or the one that is chosen
  Acc* highest;  // [A] the last of them; infinite: none
  int32_t* chosen;  // [A] hardest, easiest: which of them
  double* negative_sums;  // [kMaxChunks][A][2]: sum of weight * (d - middle threshold), sum of terms * d2 over the negatives
  uint64_t* radius;  // [blocks] ordered bits of the largest squared distance from row 0
  DenseTotals* totals;
  uint8_t* pool;  // slots and partial sums; DensePass lays it out
  int64_t pool_bytes;
};

// The anchors of one pass, and where their slots are. As many anchors as fit beside one partial sum of the gradient; what is
// left goes to further partial sums, which are what blocks work on at a time.
template <class Acc>
struct DensePass : Pass {
  int32_t chunks;
  int32_t thresholds;  // of every anchor: stride, or the one that is chosen
  Acc margin, band;  // in units of the tiles' distances
  Acc reach;  // a negative farther than this beyond a positive makes no active term with it
  double to_d, to_d2;  // true d or d2 / the tiles'
  int32_t slope_exponent;  // euclidean: coefficients are 2^slope_exponent / d, d in the tiles' unit
  Acc slope;  // 2^slope_exponent
  bool reads_input;  // differences of rows are the input's: moving rows away rounded theirs
  Acc from_input[2];  // to the tiles' unit by both; one factor alone may be more than Acc holds
  Acc* d2_ap;  // [slots] in order of the positive; after count_terms() the pair's gradient coefficient
  Acc* threshold;  // [slots] the tiles' d, ascending
  Acc* scratch[2];  // [slots] for sorting, then the histograms:
  Acc* partial[2];  // [chunks][C][D] by index, [chunks][A][D]
  // By rank: ranges of negatives that begin there less those that end; after count_terms() those that cover it.
  __device__ __forceinline__ int32_t* active(int64_t slot) const { return reinterpret_cast<int32_t*>(scratch[0] + slot); }
  // The same of terms, where not each of them is active: closed bands only.
  __device__ __forceinline__ int32_t* terms(int64_t slot) const { return reinterpret_cast<int32_t*>(scratch[1] + slot); }
};

template <class Acc>
__device__ __forceinline__ DensePass<Acc> first_dense_pass(const DenseProblem<Acc>& p, const Facts& facts) {
  const Problem<Acc>& q = p.side[0];
  const int64_t rows = int64_t(q.candidates.count) + (q.plain ? 0 : q.anchors.count),
                sums = rows * q.dim * int64_t(sizeof(Acc));
  const int64_t slot_bytes = 4 * int64_t(sizeof(Acc));
  const int32_t stride = max(facts.max_positives, 1);
  const int64_t fit = min((p.pool_bytes - sums) / slot_bytes - 3, int64_t(INT32_MAX)) / stride;  // 3: rounded up below
  DensePass<Acc> pass;
  pass.width = static_cast<int32_t>(min(fit, int64_t(q.anchors.count)));
  pass.stride = stride;
  pass.max_exponent = facts.max_exponent == kNoExponent ? 0 : facts.max_exponent;
  pass.begin = pass.end = 0;
  pass.advance(q.anchors.count);
  const int64_t slots = (int64_t(pass.width) * stride + 3) / 4 * 4;
  pass.chunks = static_cast<int32_t>(min((p.pool_bytes - slots * slot_bytes) / max(sums, int64_t(1)), int64_t(kMaxChunks)));
  pass.to_d2 = ldexp(1.0, 2 * pass.max_exponent);
  pass.to_d = p.euclidean ? ldexp(1.0, pass.max_exponent) : pass.to_d2;
  // So that neither sums of coefficient * x nor what they are scaled by in the end leave the range where the rows are at its
  // ends. (Nor coefficients: two rows of tiny ones are 2^-149 apart or more.)
  pass.slope_exponent = pass.max_exponent < -93 ? 60 : pass.max_exponent > 60 ? -40 : 0;
  pass.slope = ldexp(Acc(1), pass.slope_exponent);
  pass.from_input[0] = ldexp(Acc(1), -pass.max_exponent / 2);
  pass.from_input[1] = ldexp(Acc(1), -pass.max_exponent - -pass.max_exponent / 2);
  pass.margin = static_cast<Acc>(p.margin / pass.to_d);
  pass.band = static_cast<Acc>(p.band / pass.to_d);
  pass.reach = p.closed ? max(pass.margin, pass.band) : pass.margin;
  pass.reads_input = p.totals->moved && !p.normalize;  // normalising rounded them before
  pass.thresholds = p.positives == Positives::all ? stride : 1;
  pass.d2_ap = reinterpret_cast<Acc*>(p.pool);
  pass.threshold = pass.d2_ap + slots;
  for (int i = 0; i < 2; ++i) pass.scratch[i] = pass.threshold + (i + 1) * slots;
  pass.partial[0] = pass.scratch[1] + slots;
  pass.partial[1] = pass.partial[0] + pass.chunks * int64_t(q.candidates.count) * q.dim;
  return pass;
}

// ---- phases 1 and 2 -------------------------------------------------------------------------------------------------

template <class Acc>
__device__ __forceinline__ Acc load_input(const DenseProblem<Acc>& p, const void* x, int64_t i) {
  if constexpr (sizeof(Acc) == 8) {
    return static_cast<const double*>(x)[i];
  } else {
    if (p.dtype == DType::float32) return static_cast<const float*>(x)[i];
    return widen(static_cast<const Half*>(x)[i], p.dtype == DType::bfloat16);
  }
}

// 1 / max(norm, 1e-12) of a row, 1 if rows are not normalised; a warp. Squares of elements scaled to at most 1 neither
// overflow nor vanish.
template <class Acc>
__device__ Acc inverse_norm(const DenseProblem<Acc>& p, const void* x, int64_t begin) {
  if (!p.normalize) return 1;
  const int lane = thread_index() % 32;
  const int32_t dim = p.side[0].dim;
  Acc largest = 0;
  for (int32_t d = lane; d < dim; d += 32) {
    const Acc value = fabs(load_input(p, x, begin + d));
    largest = value > largest ? value : largest;
  }
  largest = warp_max(largest);
  const int32_t e = largest > 0 && largest - largest == 0 ? ilogb(largest) + 1 : 0;
  Acc sum = 0;
  for (int32_t d = lane; d < dim; d += 32) {
    const Acc scaled = ldexp(load_input(p, x, begin + d), -e);
    sum = fma(scaled, scaled, sum);
  }
  return inverse_of_norm(sqrt(warp_sum(sum)), e);
}

// Calls body(set, index) for the rows of candidates (set 0) and, where they are others, anchors (set 1): a warp each.
template <class Acc, class Body>
__device__ __forceinline__ void for_each_source(const DenseProblem<Acc>& p, Body body) {
  const Problem<Acc>& q = p.side[0];
  const int64_t rows = int64_t(q.candidates.count) + (q.plain ? 0 : q.anchors.count);
  for (int64_t i = int64_t(block_index()) * kWarps + thread_index() / 32; i < rows; i += int64_t(grid_size()) * kWarps) {
    const int set = i < q.candidates.count ? 0 : 1;
    body(set, static_cast<int32_t>(set == 0 ? i : i - q.candidates.count));
  }
}

template <class Acc>
__device__ void survey_rows(const DenseProblem<Acc>& p, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  uint64_t& radius = *carver.take<uint64_t>(1);
  const int lane = thread_index() % 32;
  if (thread_index() == 0) radius = 0;
  if (block_index() == 0 && thread_index() == 0) *p.totals = DenseTotals{};
  __syncthreads();  // radius is 0
  const Source<Acc>& first = p.source[0];
  const Acc first_inverse = inverse_norm(p, first.x, 0);
  for_each_source(p, [&](int set, int32_t index) {
    const Source<Acc>& source = set == 0 ? p.source[0] : p.source[1];
    const Acc inverse = inverse_norm(p, source.x, index * source.stride);
    Acc sum = 0;
    for (int32_t d = lane; d < p.side[0].dim; d += 32) {
      const Acc apart =
          load_input(p, source.x, index * source.stride + d) * inverse - load_input(p, first.x, d) * first_inverse;
      sum = fma(apart, apart, sum);
    }
    sum = warp_sum(sum);
    if (lane != 0) return;
    source.inverse_norm[index] = inverse;
    atomic_max(&radius, ordered_bits(static_cast<double>(fabs(sum))));  // |NaN| comes last
  });
  __syncthreads();  // all rows of the block
  if (thread_index() == 0) p.radius[block_index()] = radius;
}

template <class Acc>
__device__ void copy_rows(const DenseProblem<Acc>& p, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  uint64_t& radius = *carver.take<uint64_t>(1);
  const int lane = thread_index() % 32;
  const int32_t dim = p.side[0].dim;
  if (thread_index() == 0) radius = 0;
  __syncthreads();  // radius is 0
  for (int32_t block = thread_index(); block < grid_size(); block += kThreads) atomic_max(&radius, p.radius[block]);
  __syncthreads();  // of all blocks
  const Source<Acc>& first = p.source[0];
  const Acc first_inverse = first.inverse_norm[0];
  Acc sum = 0;
  for (int32_t d = lane; d < dim; d += 32) {
    const Acc x = load_input(p, first.x, d) * first_inverse;
    sum = fma(x, x, sum);
  }
  const bool moves = 4 * __longlong_as_double(static_cast<long long>(radius)) < static_cast<double>(warp_sum(sum));
  if (block_index() == 0 && thread_index() == 0) p.totals->moved = moves;
  for_each_source(p, [&](int set, int32_t index) {
    const Source<Acc>& source = set == 0 ? p.source[0] : p.source[1];
    const Rows<Acc>& rows = set == 0 ? p.side[0].candidates : p.side[0].anchors;
    Acc* copy = static_cast<Acc*>(const_cast<void*>(rows.x)) + int64_t(index) * dim;
    const Acc inverse = source.inverse_norm[index];
    for (int32_t d = lane; d < dim; d += 32) {
      const Acc x = load_input(p, source.x, index * source.stride + d) * inverse;
      copy[d] = moves ? x - load_input(p, first.x, d) * first_inverse : x;
    }
  });
}

// ---- near pairs -----------------------------------------------------------------------------------------------------

// The distance of a near pair is summed anew, as sum (a - b)^2. Whether a pair is near, and how far apart it then is, must be
// the same for (a, b) as for (b, a), and for a positive as for a negative with equal bits: norms and expanded square are the
// tiles', whose arithmetic the thresholds share, and both sums below exchange a and b without a trace.
template <class Acc>
__device__ __forceinline__ bool is_near(Acc d2, Acc norm_a, Acc norm_b) {  // not NaN, not kNotOffered
  return d2 >= 0 && d2 < (norm_a + norm_b) * Acc(kNear);
}
// An element of candidate (set 0) or anchor (1, where they are others) `index`, as the copy or the input has it.
template <class Acc>
__device__ __forceinline__ Acc load_row(const DenseProblem<Acc>& p, bool of_input, int set, int32_t index, int32_t d) {
  if (of_input) {
    const Source<Acc>& source = set == 0 ? p.source[0] : p.source[1];
    return load_input(p, source.x, index * source.stride + d);
  }
  const Rows<Acc>& rows = set == 0 ? p.side[0].candidates : p.side[0].anchors;
  return static_cast<const Acc*>(rows.x)[int64_t(index) * p.side[0].dim + d];
}
// In the tiles' unit, of row and column of `side`; a warp, the same in every lane. Bytes: 2 D Acc of L2.
template <class Acc>
__device__ __forceinline__ Acc direct_distance(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, int side, int32_t row,
                                               int32_t column) {
  Acc sum = 0;
#pragma unroll 1
  for (int32_t d = thread_index() % 32; d < p.side[0].dim; d += 32) {
    Acc apart = load_row(p, pass.reads_input, 1 - side, row, d) - load_row(p, pass.reads_input, side, column, d);
    if (sizeof(Acc) == 4) apart = apart * pass.from_input[0] * pass.from_input[1];  // doubles are not scaled
    sum = fma(apart, apart, sum);
  }
  return warp_sum(sum);
}

// ---- phase 4 --------------------------------------------------------------------------------------------------------

// Positives at positions begin .. end, less the anchor's own position.
struct Kept {
  int32_t begin, end, own;
  __device__ __forceinline__ bool has_own() const { return own >= begin && own < end; }
  __device__ __forceinline__ int32_t count() const { return end - begin - (has_own() ? 1 : 0); }
  __device__ __forceinline__ bool has(int32_t c) const { return c >= begin && c < end && c != own; }
  __device__ __forceinline__ int32_t place(int32_t c) const { return c - begin - (has_own() && c > own ? 1 : 0); }
  __device__ __forceinline__ int32_t position(int32_t place) const {
    return begin + place + (has_own() && begin + place >= own ? 1 : 0);
  }
};
template <class Acc>
__device__ __forceinline__ Kept kept_of(const DenseProblem<Acc>& p, int32_t a) {
  return {p.kept_begin[a], p.kept_end[a], own_position(p.side[0], a)};
}
// Rows of a class are sorted by index: the positives that the options leave are neighbours.
template <class Acc>
__device__ __forceinline__ Kept keep(const DenseProblem<Acc>& p, int32_t begin, int32_t end, int32_t own) {
  const Problem<Acc>& q = p.side[0];
  Kept kept{begin, end, own};
  if (end - begin == q.candidates.count) kept.end = begin;  // no negative, no term
  if (p.eligible < q.candidates.count) {
    kept.end = begin + count_below<false>(sorted_index(q, q.candidates) + begin, kept.end - begin, p.eligible);
  }
  if (p.unordered) kept.begin = min(max(begin, own + 1), kept.end);
  return kept;
}

template <class Acc>
struct DenseStrip {
  Edge<Acc> row, column;
  Kept kept[kStrip];
};

// Positions are sorted by label: the positives of kStrip anchors lie in one band of candidates, kWarps * 8 of which are
// multiplied at a time, 8 by each warp. FLOPs: 2 kStrip D per candidate of the band and product of the format. A block then
// sorts what it has found itself: a warp an anchor, or the block where there are more than kWarpSort.
template <Math M, class Acc>
__device__ void place_thresholds(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  DenseStrip<Acc>& s = *carver.take<DenseStrip<Acc>>(1);
  const Problem<Acc>& q = p.side[0];
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  if (pass.is_first()) {  // every sum starts at 0
    for (int set = 0; set < (q.plain ? 1 : 2); ++set) {
      const int64_t count = int64_t(pass.chunks) * (set == 0 ? q.candidates.count : q.anchors.count) * q.dim;
      for (int64_t i = int64_t(block_index()) * kThreads + thread; i < count; i += int64_t(grid_size()) * kThreads) {
        pass.partial[set][i] = 0;
      }
    }
  }
#pragma unroll 1
  for (int32_t first = pass.begin + block_index() * kStrip; first < pass.end; first += grid_size() * kStrip) {
    const int32_t count = min(kStrip, pass.end - first);
    __syncthreads();  // the strip before has been sorted
    load_edge(q, q.anchors, first, pass.max_exponent, true, thread, s.row);
    __syncthreads();  // the rows' edge
    if (thread < count) {
      const Kept kept = keep(p, s.row.mate_begin[thread], s.row.mate_end[thread], s.row.own[thread]);
      s.kept[thread] = kept;
      p.kept_begin[first + thread] = kept.begin;
      p.kept_end[first + thread] = kept.end;
    }
    const int32_t band_end = s.row.mate_end[count - 1];
#pragma unroll 1
    for (int32_t column = s.row.mate_begin[0]; column < band_end; column += 8 * kWarps) {
      __syncthreads();  // the columns before have been read
      load_edge(q, q.candidates, column, pass.max_exponent, false, thread, s.column);
      __syncthreads();  // the columns' edge; who is kept
      const auto operand = [&](const Rows<Acc>& rows, int32_t position) -> const uint8_t* {
        return rows.operand + int64_t(min(position, rows.count - 1)) * q.pitch;
      };
      strip_products<M, Acc>(
          q.pitch, [&](int i) { return operand(q.anchors, first + i); },
          [&](int i) { return operand(q.candidates, column + 8 * warp + i); },
          [&](int i, int j, Acc product) {
            const int32_t c = column + 8 * warp + j;
            if (i >= count || !s.kept[i].has(c)) return;
            const Acc d2 = squared_distance(s.row, i, s.column, 8 * warp + j, product);
            pass.d2_ap[pass.slot(first + i) + s.kept[i].place(c)] =
                is_near(d2, s.row.norm[i], s.column.norm[8 * warp + j]) ? Acc(kNotOffered) : d2;
          });
    }
    __syncthreads();  // d2_ap of the strip
#pragma unroll 1
    for (int i = warp; i < count; i += kWarps) {
      Acc* const d2_ap = pass.d2_ap + pass.slot(first + i);
#pragma unroll 1
      for (int32_t base = 0; base < s.kept[i].count(); base += 32) {
        const bool near = base + lane < s.kept[i].count() && d2_ap[base + lane] == Acc(kNotOffered);
#pragma unroll 1
        for (uint32_t left = __ballot_sync(kWholeWarp, near); left != 0; left &= left - 1) {
          const int from = __ffs(static_cast<int>(left)) - 1;
          const Acc d2 =
              direct_distance(p, pass, 0, s.row.index[i], sorted_index(q, q.candidates)[s.kept[i].position(base + from)]);
          if (lane == from) d2_ap[base + lane] = d2;
        }
      }
    }
    __syncthreads();  // of near pairs too
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int32_t positives = s.kept[i].count();
      const int64_t slot = pass.slot(first + i);
      if (positives > kWarpSort) {  // a copy is sorted: d2_ap stays in order of the positive
        for (int32_t r = thread; r < positives; r += kThreads) pass.scratch[0][slot + r] = pass.d2_ap[slot + r];
        __syncthreads();  // the copy
        block_sort(pass.scratch[0] + slot, pass.threshold + slot, pass.scratch[1] + slot, positives);
      } else if (i % kWarps == warp) {
        warp_sort(pass.d2_ap + slot, pass.threshold + slot, positives);
      }
    }
    __syncthreads();  // the thresholds of the strip
#pragma unroll 1
    for (int i = warp; i < count; i += kWarps) {
      const int32_t positives = s.kept[i].count();
      const int64_t slot = pass.slot(first + i);
      Acc* const threshold = pass.threshold + slot;
      if (lane == 0) p.count[first + i] = min(positives, pass.thresholds);
      if (p.positives != Positives::all && positives > 0) {  // one stays: at first place, the first of equals
        const Acc value = threshold[p.positives == Positives::hardest ? positives - 1 : 0];
        int32_t minus = -positives;  // the place, so that the largest is the first
        for (int32_t k = lane; k < positives; k += 32) minus = pass.d2_ap[slot + k] == value ? max(minus, -k) : minus;
        minus = warp_max(minus);
        __syncwarp();  // every lane has read the value
        if (lane == 0) {
          threshold[0] = value;
          p.chosen[first + i] = -minus;
        }
      }
      const int32_t thresholds = min(positives, pass.thresholds);
      for (int32_t r = lane; r < pass.thresholds; r += 32) {
        const Acc t = r >= thresholds ? Acc(INFINITY) : p.euclidean ? sqrt(threshold[r]) : threshold[r];
        threshold[r] = t;
        pass.active(slot)[r] = pass.terms(slot)[r] = 0;
        if (r == max(thresholds - 1, 0)) p.highest[first + i] = t;
      }
    }
  }
}

}  // namespace facenet_ext::cuda
