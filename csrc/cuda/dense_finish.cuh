// Phases 6 and 7 of the rules that give every negative a term: from histograms to the loss, and the gradient. A warp has an
// anchor, then a row; every sum has a fixed order.
#pragma once

#include "dense_sweep.cuh"

namespace facenet_ext::cuda {

__device__ __forceinline__ int32_t warp_prefix_sum(int32_t x) {  // inclusive
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(kWholeWarp, x, step);
    if (thread_index() % 32 >= step) x += before;
  }
  return x;
}

// Where x, one of the ascending t[0 .. count), stands first.
template <class Acc>
__device__ __forceinline__ int32_t rank_of(const Acc* t, int32_t count, Acc x) {
  int32_t rank_of_x[1];
  rank<false>(t, {0}, 1, count, {x}, rank_of_x);
  return rank_of_x[0];
}

// Prefix sums of the histograms are the positives' weights. With t relative to the middle threshold, as the negatives'
// distances are,
//   loss = sum of active t  -  sum of weight d  +  margin * active.
template <class Acc>
__device__ void count_terms(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  DenseTotals& totals = *carver.take<DenseTotals>(1);
  const Problem<Acc>& q = p.side[0];
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  if (thread_index() == 0) totals = DenseTotals{};
  __syncthreads();  // zero totals
  const int32_t chunks = min(pass.chunks, (q.candidates.count + kSide - 1) / kSide);

  uint64_t terms = 0, active = 0;  // of this warp, in every lane
  double max_d2_ap = 0;            // of this lane
#pragma unroll 1
  for (int32_t a = pass.begin + block_index() * kWarps + warp; a < pass.end; a += grid_size() * kWarps) {
    const Kept kept = kept_of(p, a);
    const int32_t positives = kept.count(), count = p.count[a];
    const int32_t negatives = q.candidates.count - (q.anchors.mate_end[a] - q.anchors.mate_begin[a]);
    const int64_t slot = pass.slot(a);
    const Acc* t = pass.threshold + slot;
    int32_t* const of_rank = pass.active(slot);
    double loss = 0, sum_ap = 0, many = 0;
    int32_t active_before = 0, terms_before = 0;
#pragma unroll 1
    for (int32_t base = 0; base < count; base += 32) {
      const int32_t r = base + lane;
      const int32_t u = active_before + warp_prefix_sum(r < count ? of_rank[r] : 0);
      int32_t v = p.above ? u : negatives;
      if (p.closed) v = terms_before + warp_prefix_sum(r < count ? pass.terms(slot)[r] : 0);
      active_before = __shfl_sync(kWholeWarp, u, 31);
      terms_before = __shfl_sync(kWholeWarp, v, 31);
      if (r >= count) continue;
      of_rank[r] = u;
      const double d = t[r], d2 = (p.euclidean ? d * d : d) * pass.to_d2;
      loss += u * (d - static_cast<double>(t[count / 2]));
      many += u;
      sum_ap += v * d2;
      if (v > 0 && d2 > max_d2_ap) max_d2_ap = d2;
    }
    loss = warp_sum(loss);
    many = warp_sum(many);  // below 2^53: exact
    sum_ap = warp_sum(sum_ap);
    double sum_an = 0;
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      const double* sums = p.negative_sums + (int64_t(chunk) * q.anchors.count + a) * 2;
      loss -= sums[0];
      sum_an += sums[1];
    }
    loss = loss * pass.to_d * p.unit + p.margin * p.unit * many;
    active += static_cast<uint64_t>(many);
    if (!p.closed) terms += p.above ? static_cast<uint64_t>(many) : uint64_t(count) * uint64_t(negatives);
    if (lane == 0) {
      q.loss_of_anchor[a] = loss <= 0 ? 0 : loss;  // rounding may leave less than nothing; NaN stays
      q.sum_d2_ap[a] = sum_ap;
      q.sum_d2_an[a] = sum_an * pass.to_d2;
    }
    __syncwarp();  // the weights by rank
    for (int32_t k = lane; k < positives; k += 32) {
      const Acc d2 = pass.d2_ap[slot + k], d = p.euclidean ? sqrt(d2) : d2;
      int32_t u = 0;
      if (p.positives == Positives::all) {
        u = of_rank[rank_of(t, count, d)];  // equal thresholds have equal weights
      } else if (k == p.chosen[a]) {
        u = of_rank[0];
      }
      pass.d2_ap[slot + k] = !p.euclidean ? static_cast<Acc>(u) : d > 0 ? static_cast<Acc>(u) * pass.slope / d : Acc(0);
    }
  }
  if (lane == 0) {
    atomic_add(&totals.terms, terms);
    atomic_add(&totals.active, active);
  }
  atomic_max(&totals.max_d2_ap, ordered_bits(max_d2_ap));
  __syncthreads();  // of all warps
  if (thread_index() == 0) {  // integers: their sum does not depend on the order
    atomic_add(&p.totals->terms, totals.terms);
    atomic_add(&p.totals->active, totals.active);
    atomic_max(&p.totals->max_d2_ap, totals.max_d2_ap);
  }
}

// What a sum over the terms is divided by.
template <class Acc>
__device__ __forceinline__ double dense_divisor(const DenseProblem<Acc>& p) {
  const uint64_t count = p.reduction == Reduction::mean          ? p.totals->terms
                         : p.reduction == Reduction::mean_active ? p.totals->active
                                                                 : 1;
  return count > 0 ? static_cast<double>(count) : 1.0;
}

// The scalars, by block 0.
template <class Acc>
__device__ void write_totals(const DenseProblem<Acc>& p, uint8_t* shared_memory) {
  if (block_index() != 0) return;
  const Problem<Acc>& q = p.side[0];
  Carver carver{shared_memory, 0, true};
  double sum[3];
  sum_anchors(q, carver.take<double>(3 * kWarps), sum);
  if (thread_index() != 0) return;
  *static_cast<Acc*>(q.loss) = static_cast<Acc>(sum[0] / dense_divisor(p));
  if (!p.stats) return;
  const DenseTotals& totals = *p.totals;
  q.stat_counts[0] = static_cast<int64_t>(totals.terms);
  q.stat_counts[1] = static_cast<int64_t>(totals.active);
  q.stat_counts[2] = 0;
  q.stat_counts[3] = static_cast<int64_t>(totals.hard);
  q.stat_counts[4] = static_cast<int64_t>(totals.semi_hard);
  const double terms = totals.terms > 0 ? static_cast<double>(totals.terms) : 1.0;
  Acc* stats = static_cast<Acc*>(q.stat_d2);
  stats[0] = static_cast<Acc>(sum[1] / terms);
  stats[1] = static_cast<Acc>(sum[2] / terms);
  stats[2] = static_cast<Acc>(__longlong_as_double(static_cast<long long>(totals.max_d2_ap)));
}

// sum[j] += coefficient * (x[j] - other[j]) over `count` partners among the rows of a set (load_row()); get(e, coefficient)
// returns the index of partner e.
template <bool kOfInput, int kEach, class Acc, class Get>
__device__ __forceinline__ void add_partners(const DenseProblem<Acc>& p, int set, int32_t begin, const Acc (&x)[kEach],
                                             int32_t count, Acc (&sum)[kEach], Get get) {
  const int lane = thread_index() % 32;
#pragma unroll 1
  for (int32_t base = 0; base < count; base += 32) {
    Acc mine = 0;
    int32_t index = 0;
    if (base + lane < count) index = get(base + lane, mine);
    uint32_t left = __ballot_sync(kWholeWarp, mine != 0);
    while (left != 0) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const Acc coefficient = __shfl_sync(kWholeWarp, mine, i);
      const int32_t other = __shfl_sync(kWholeWarp, index, i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int32_t d = begin + 32 * j + lane;
        if (d < p.side[0].dim) sum[j] = fma(coefficient, x[j] - load_row(p, kOfInput, set, other, d), sum[j]);
      }
    }
  }
}

// What a row's positives and the anchors it is a positive of bring in this pass joins its partial sums; in the last pass all
// are added. anchor: its position among the anchors, or -1; position: among the candidates, or -1. kEach: dimensions of a
// lane at a time; fewer where elements are looked up in the input, by its type.
template <bool kOfInput, int kEach, class Acc>
__device__ __forceinline__ void sum_row(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, int set, int32_t index,
                                        int32_t anchor, int32_t position) {
  const Problem<Acc>& q = p.side[0];
  const Rows<Acc>& rows = set == 0 ? q.candidates : q.anchors;
  const int lane = thread_index() % 32;
  const bool is_last = pass.is_last(q.anchors.count);
  Acc* const partial = pass.partial[set] + int64_t(index) * q.dim;
  const int64_t step = int64_t(rows.count) * q.dim;
  const bool joins = set == 0 && !q.plain && anchor >= 0;  // the row as an anchor has partial sums of its own
#pragma unroll 1
  for (int32_t begin = 0; begin < q.dim; begin += 32 * kEach) {
    Acc x[kEach], sum[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int32_t d = begin + 32 * j + lane;
      x[j] = d < q.dim ? load_row(p, kOfInput, set, index, d) : Acc(0);
      sum[j] = d < q.dim ? partial[d] : Acc(0);
    }
    if (anchor >= 0 && pass.has(anchor)) {
      const Kept kept = kept_of(p, anchor);
      const Acc* coefficients = pass.d2_ap + pass.slot(anchor);
      add_partners<kOfInput>(p, 0, begin, x, kept.count(), sum, [&](int32_t k, Acc& coefficient) {
        coefficient = coefficients[k];
        return sorted_index(q, q.candidates)[kept.position(k)];
      });
    }
    if (position >= 0) {
      const int32_t first = max(q.candidates.mate_begin[position], pass.begin),
                    end = min(q.candidates.mate_end[position], pass.end);
      add_partners<kOfInput>(p, q.plain ? 0 : 1, begin, x, end - first, sum, [&](int32_t e, Acc& coefficient) {
        const Kept kept = kept_of(p, first + e);
        coefficient = kept.has(position) ? pass.d2_ap[pass.slot(first + e) + kept.place(position)] : Acc(0);
        return sorted_index(q, q.anchors)[first + e];
      });
    }
    const auto add_chunk = [&](const Acc* row) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int32_t d = begin + 32 * j + lane;
        if (d < q.dim) sum[j] += row[d];
      }
    };
    if (is_last) {
#pragma unroll 1
      for (int32_t chunk = 1; chunk < pass.chunks; ++chunk) add_chunk(partial + chunk * step);
#pragma unroll 1
      for (int32_t chunk = 0; joins && chunk < pass.chunks; ++chunk) {
        add_chunk(pass.partial[1] + (int64_t(chunk) * q.anchors.count + index - q.anchor_offset) * q.dim);
      }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int32_t d = begin + 32 * j + lane;
      if (d < q.dim) partial[d] = sum[j];
    }
  }
}

// One row's gradient, written in the last pass.
template <class Acc>
__device__ void collect_row(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, int set, int32_t index, int32_t anchor,
                            int32_t position, Acc scale) {
  if (pass.reads_input) {
    sum_row<true, 1>(p, pass, set, index, anchor, position);
  } else {
    sum_row<false, kSliceEach<Acc>>(p, pass, set, index, anchor, position);
  }
  if (!pass.is_last(p.side[0].anchors.count)) return;
  const Problem<Acc>& q = p.side[0];
  const Rows<Acc>& rows = set == 0 ? q.candidates : q.anchors;
  const int lane = thread_index() % 32;
  const Acc* const partial = pass.partial[set] + int64_t(index) * q.dim;
  const Source<Acc>& source = set == 0 ? p.source[0] : p.source[1];
  const Acc inverse = source.inverse_norm[index];
  const int64_t input = index * source.stride;
  Acc along = 0;
  if (p.normalize) {
    for (int32_t d = lane; d < q.dim; d += 32) along = fma(partial[d], load_input(p, source.x, input + d) * inverse, along);
    along = warp_sum(along);
    if (inverse >= Acc(1e12)) along = 0;  // divided by the constant 1e-12, not by the norm
  }
  Acc* out = static_cast<Acc*>(rows.gradient_out) + int64_t(index) * q.dim;
  for (int32_t d = lane; d < q.dim; d += 32) {  // each lane reads what it wrote itself
    Acc value = partial[d];
    if (p.normalize) value = (value - along * (load_input(p, source.x, input + d) * inverse)) * inverse;
    out[d] = value * scale;
  }
}

template <class Acc>
__device__ void collect_gradient(const DenseProblem<Acc>& p, const DensePass<Acc>& pass) {
  const Problem<Acc>& q = p.side[0];
  const double factor = p.euclidean ? ldexp(1.0, -pass.max_exponent - pass.slope_exponent) : 2 * p.unit;
  const Acc scale = static_cast<Acc>(factor / dense_divisor(p));
  if (q.candidates.gradient_out != nullptr) {
    for (int64_t i = int64_t(block_index()) * kWarps + thread_index() / 32; i < q.candidates.count;
         i += int64_t(grid_size()) * kWarps) {
      const int32_t position = static_cast<int32_t>(i), index = sorted_index(q, q.candidates)[position];
      int32_t anchor = q.plain ? position : -1;
      if (!q.plain && q.anchors_are_candidates && index >= q.anchor_offset && index - q.anchor_offset < q.anchors.count) {
        anchor = q.anchors.position[index - q.anchor_offset];
      }
      collect_row(p, pass, 0, index, anchor, position, scale);
    }
  }
  if (q.plain || q.anchors.gradient_out == nullptr) return;
  for (int64_t a = int64_t(block_index()) * kWarps + thread_index() / 32; a < q.anchors.count;
       a += int64_t(grid_size()) * kWarps) {
    collect_row(p, pass, 1, sorted_index(q, q.anchors)[a], static_cast<int32_t>(a), -1, scale);
  }
}

}  // namespace facenet_ext::cuda
