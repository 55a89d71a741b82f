// Phase 5: the gradient, gathered by each row from those that it is in triplets with. No float is added by an atomic, every
// sum has a fixed order, so the result is the same bit for bit in every run.
//
// With coefficients u(a, p) of pairs and v(a, n) of (anchor, negative) pairs, each row x collects
//
//   as anchor     + u(x, p) (x - p)  over its positives        - v(x, n) (x - n)  over its distinct negatives
//   as positive   + u(a, x) (x - a)  over the anchors of its class
//   as negative   - v(a, x) (x - a)  over the anchors that chose it: its list, ascending by the anchor's index and pair (with
//                                    several passes by place of the anchor's entry)
//
// times 2 (squared) or 1 (euclidean, cosine; Roots), over the number of counted pairs. Differences, not rowsum * x - S x:
// near-duplicates keep their relative accuracy.
//
//   5 gather    a warp per row that is no constant; bytes from L2: two rows per active pair; class rows mostly from L1
//
// A candidate's list stands in its own places of `list`; only if some list is longer do two more phases, each behind a grid
// barrier, build them anew:
//
//   reserve     list_begin: the end of a piece of `list` for every row; the schedule decides where, not what it will hold
//   fill        list[--list_begin[n]] = the pair's number, for all entries
//
// slices.cuh does most of this for float rows that fit in shared memory, slice by slice.
#pragma once

#include "finish.cuh"

namespace facenet_ext::cuda {

template <class Acc>
__device__ void reserve_lists(const Problem<Acc>& p) {
  const int lane = thread_index() % 32;
  for (int64_t base = int64_t(block_index()) * kThreads + thread_index() - lane; base < p.candidates.count;
       base += int64_t(grid_size()) * kThreads) {
    const int64_t c = base + lane;
    const int32_t length = c < p.candidates.count ? p.times_chosen[c] : 0;
    int32_t end = length;  // inclusive prefix sum over the warp: one atomic for 32 rows
    for (int step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(kWholeWarp, end, step);
      if (lane >= step) end += before;
    }
    uint64_t begin = 0;
    if (lane == 31) begin = atomic_add(&p.counters->list_end, static_cast<uint64_t>(end));
    begin = __shfl_sync(kWholeWarp, begin, 31);
    if (c < p.candidates.count) p.list_begin[c] = static_cast<int32_t>(begin) + end;
  }
}

template <class Acc>
__device__ void fill_lists(const Problem<Acc>& p, const Pass& pass) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  for (int32_t a = pass.begin + block_index() * kWarps + warp; a < pass.end; a += grid_size() * kWarps) {
    const int32_t count = count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a]);
    const int32_t index = sorted_index(p, p.anchors)[a];
    for (int32_t r = lane; r < count; r += 32) {
      const int32_t place = pass.entry(a, r);
      if (p.entry[place].coefficient == 0) continue;
      p.list[atomicAdd(&p.list_begin[p.entry[place].row], -1) - 1] = pass.numbered(index, r, place);
    }
  }
}

// The groups' sums, added in a fixed order. Lane l then has elements first + l * kVector and up.
template <class Acc>
__device__ __forceinline__ void combine_groups(Acc (&sum)[kPiece<Acc>], Acc (&mine)[kVector<Acc>]) {
  const int group = thread_index() % 32 / kGroupLanes;
#pragma unroll
  for (int i = 0; i < kPiece<Acc>; ++i) {
    sum[i] += __shfl_xor_sync(kWholeWarp, sum[i], kGroupLanes);
    if (i / kVector<Acc> == group) mine[i % kVector<Acc>] = sum[i];
  }
}

// Adds the warp's sums to elements first .. first + kChunk of a row of `gradient`; is_first: they are all there is yet.
template <class Acc>
__device__ __forceinline__ void add_to_gradient(const Problem<Acc>& p, Acc* gradient, int32_t index, int32_t first,
                                                bool is_first, Acc (&sum)[kPiece<Acc>]) {
  Acc mine[kVector<Acc>];
  combine_groups(sum, mine);
  Acc* out = gradient + int64_t(index) * p.dim;
#pragma unroll
  for (int i = 0; i < kVector<Acc>; ++i) {
    const int32_t d = first + thread_index() % 32 * kVector<Acc> + i;
    if (d < p.dim) out[d] = is_first ? mine[i] : out[d] + mine[i];
  }
}

// A lane's sums of a row. In a large class the positives add up to a total that the negatives then all but take away, so a
// float's total carries what it rounds away, exactly (Knuth's two-sum); 32 partners are added up before it is.
template <class Acc>
struct RowSum {
  Acc total[kPiece<Acc>] = {}, carry[kPiece<Acc>] = {};
  __device__ __forceinline__ void add(const Acc (&sum)[kPiece<Acc>]) {
#pragma unroll
    for (int e = 0; e < kPiece<Acc>; ++e) {
      const Acc before = total[e], after = before + sum[e];
      total[e] = after;
      if constexpr (sizeof(Acc) == 4) {
        const Acc added = after - before;
        carry[e] += (before - (after - added)) + (sum[e] - added);
      }
    }
  }
  __device__ __forceinline__ void finish() {  // beyond the range of floats there is nothing to carry
#pragma unroll
    for (int e = 0; e < kPiece<Acc>; ++e) total[e] += carry[e] - carry[e] == 0 ? carry[e] : Acc(0);
  }
};

// sum += coefficient * (x - other) over `count` partners; get(e, coefficient) returns the index of partner e in `others`.
// Lanes look 32 partners up; then every group of lanes takes every other one of them, the rows of kInFlight on their way.
template <class In, class Acc, class Get>
__device__ __forceinline__ void gather(const Problem<Acc>& p, const Rows<Acc>& others, const Acc (&x)[kPiece<Acc>],
                                       int32_t first, int32_t count, RowSum<Acc>& sums, Get get) {
  constexpr int kInFlight = 4, kEach = kInFlight / kGroups;
  const int lane = thread_index() % 32;
#pragma unroll 1
  for (int32_t base = 0; base < count; base += 32) {
    Acc my_coefficient = 0;
    int32_t my_index = 0;  // any row, where there is no partner
    if (base + lane < count) my_index = get(base + lane, my_coefficient);
    const uint32_t some = __ballot_sync(kWholeWarp, my_coefficient != 0);
    Acc sum[kPiece<Acc>] = {};
#pragma unroll 1
    for (int from = 0; from < 32; from += kInFlight) {
      if ((some >> from & ((1 << kInFlight) - 1)) == 0) continue;
      Acc coefficient[kEach], other[kEach][kPiece<Acc>];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int partner = from + kGroups * i + lane / kGroupLanes;
        coefficient[i] = __shfl_sync(kWholeWarp, my_coefficient, partner);
        load_piece<In>(p, others, __shfl_sync(kWholeWarp, my_index, partner), first, other[i]);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (coefficient[i] == 0) continue;  // not 0 * (x - other), which may be 0 * infinity
#pragma unroll
        for (int e = 0; e < kPiece<Acc>; ++e) sum[e] = fma(coefficient[i], x[e] - other[i][e], sum[e]);
      }
    }
    sums.add(sum);
  }
}

// The part of row `index`'s gradient that this pass brings, added to rows.gradient. anchor_position: of the row among the
// anchors, or -1; position: among the candidates, or -1. `list` is sorted.
template <class In, class Acc>
__device__ __forceinline__ void gather_row(const Problem<Acc>& p, const Pass& pass, const Rows<Acc>& rows, int32_t index,
                                           int32_t anchor_position, int32_t position, const int32_t* list,
                                           int32_t list_count) {
  const bool is_anchor = anchor_position >= 0 && pass.has(anchor_position);
#pragma unroll 1
  for (int32_t first = 0; first < p.dim; first += kChunk<Acc>) {
    Acc x[kPiece<Acc>];
    RowSum<Acc> sum;
    load_piece<In>(p, rows, index, first, x);
    if (is_anchor && !p.plain) {
      const int32_t begin = p.anchors.mate_begin[anchor_position];
      const int32_t count = count_positives(p, begin, p.anchors.mate_end[anchor_position]);
      const int32_t own = own_position(p, anchor_position);
      const int32_t slot = pass.slot(anchor_position);
      gather<In>(p, p.candidates, x, first, count, sum, [&](int32_t e, Acc& coefficient) {
        coefficient = p.d2_ap[slot + e];
        return sorted_index(p, p.candidates)[begin + e + (own >= 0 && begin + e >= own ? 1 : 0)];
      });
    }
    if (is_anchor) {
      const int32_t count = count_positives(p, p.anchors.mate_begin[anchor_position], p.anchors.mate_end[anchor_position]);
      gather<In>(p, p.candidates, x, first, count, sum, [&](int32_t e, Acc& coefficient) {
        const Entry<Acc>& entry = p.entry[pass.entry(anchor_position, e)];
        coefficient = -entry.coefficient;
        return entry.row;
      });
    }
    if (position >= 0) {
      // Anchors of the row's class that this pass holds; where the row is an anchor of it too, they are its positives as
      // well.
      const bool both = p.plain && is_anchor;
      const int32_t class_begin = p.candidates.mate_begin[position], class_end = p.candidates.mate_end[position];
      const int32_t begin = both ? class_begin : max(class_begin, pass.begin);
      const int32_t end = both ? class_end : min(class_end, pass.end);
      const int32_t mates = begin < end ? p.anchors.mate_begin[begin] : 0;  // of all of them
      const bool counts = begin < end && count_positives(p, mates, p.anchors.mate_end[begin]) > 0;
      gather<In>(p, p.anchors, x, first, counts ? end - begin : 0, sum, [&](int32_t e, Acc& coefficient) {
        const int32_t a = begin + e, own = own_position(p, a);
        if (own != position) {
          if (pass.has(a)) coefficient = p.d2_ap[pass.slot(a) + positive_rank(mates, own, position)];
          if (both) coefficient += p.d2_ap[pass.slot(position) + positive_rank(mates, position, a)];
        }
        return sorted_index(p, p.anchors)[a];
      });
      gather<In>(p, p.anchors, x, first, list_count, sum, [&](int32_t e, Acc& coefficient) {
        const int32_t number = list[e];
        const int32_t anchor = number / pass.stride, pair = number - anchor * pass.stride;  // the index, if of the only pass
        const int32_t place = pass.holds_all ? pass.entry(p.anchors.position[anchor], pair) : number;
        coefficient = -p.entry[place].coefficient;
        return pass.holds_all ? anchor : sorted_index(p, p.anchors)[pass.begin + anchor];
      });
    }
    sum.finish();
    add_to_gradient(p, rows.gradient, index, first, pass.is_first(), sum.total);
  }
}

// Scales the finished row and writes it; the gradient of x / max(|x|, 1e-12) if the rows were normalised.
template <class In, class Acc>
__device__ void write_row(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index, Acc scale) {
  const int lane = thread_index() % 32;
  const Acc* gradient = rows.gradient + int64_t(index) * p.dim;
  Acc* out = static_cast<Acc*>(rows.gradient_out) + int64_t(index) * p.dim;
  const auto row = input_row<In>(p, rows, index);
  Acc along = 0;
  if (p.normalize) {
    for (int32_t d = lane; d < p.dim; d += 32) along = fma(gradient[d], row[d], along);
    along = warp_sum(along);
    if (row.factor >= Acc(1e12)) along = 0;  // divided by the constant 1e-12, not by the norm
  }
  for (int32_t d = lane; d < p.dim; d += 32) {
    const Acc value = p.normalize ? (gradient[d] - along * row[d]) * row.factor : gradient[d];
    out[d] = value * scale;
  }
}

// What a sum over the counted pairs is divided by.
template <class Acc>
__device__ __forceinline__ uint64_t divisor_count(const Problem<Acc>& p) {
  return p.reduction == Reduction::mean          ? p.counters->counts[0]
         : p.reduction == Reduction::mean_active ? p.counters->counts[1]
                                                 : 1;
}
__device__ __forceinline__ double divisor_of(uint64_t count) { return count > 0 ? static_cast<double>(count) : 1.0; }
template <class Acc>
__device__ __forceinline__ double divisor(const Problem<Acc>& p) {
  return divisor_of(divisor_count(p));
}

struct GatherShared {
  int32_t length[kWarps], begin[kWarps];  // of the warps' lists
  int32_t list[kWarps][kWarpSort], sorted[kWarps][kWarpSort];
};

// Phase 5. Behind it, times_chosen is zero again for the next pass. overflow: lists stand at list_begin.
template <class In, class Acc>
__device__ void gather_gradients(const Problem<Acc>& p, const Pass& pass, bool overflow, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  GatherShared& s = *carver.take<GatherShared>(1);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  Acc scale = static_cast<Acc>(p.slope / divisor(p));
  if (p.euclidean) scale *= two_to<Acc>(-root_exponent<Acc>(pass));
  const int64_t rows_per_turn = int64_t(grid_size()) * kWarps;

#pragma unroll 1
  for (int64_t turn = int64_t(block_index()) * kWarps; turn < p.candidates.count; turn += rows_per_turn) {
    const int64_t position = turn + warp;
    const bool has_row = position < p.candidates.count;
    const int32_t index = has_row ? sorted_index(p, p.candidates)[position] : 0;
    const bool has_gradient = has_row && index < p.gradient_rows;
    const int32_t length = has_gradient ? p.times_chosen[index] : 0;
    const int32_t begin = overflow ? p.list_begin[index] : index * p.list_places;
    __syncthreads();  // the turn before is done with `s`
    if (lane == 0) {
      s.length[warp] = length;
      s.begin[warp] = begin;
      if (has_row) p.times_chosen[index] = 0;
    }
    __syncthreads();  // all lengths
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) {  // long lists are sorted by the block, in memory
      if (s.length[i] <= kWarpSort) continue;
      const int32_t from = s.begin[i];
      block_sort(p.list + from, p.sorted_list + from, p.list_scratch + from, s.length[i]);
    }
    if (!has_gradient) continue;
    const bool is_short = length <= kWarpSort;
    if (is_short) {
      for (int32_t e = lane; e < length; e += 32) s.list[warp][e] = p.list[begin + e];
      __syncwarp();  // the list
      warp_sort(s.list[warp], s.sorted[warp], length);
      __syncwarp();  // the list is sorted
    }
    int32_t anchor_position = -1;
    if (p.plain) {
      anchor_position = static_cast<int32_t>(position);
    } else if (p.anchors_are_candidates && index >= p.anchor_offset && index - p.anchor_offset < p.anchors.count) {
      anchor_position = p.anchors.position[index - p.anchor_offset];
    }
    gather_row<In>(p, pass, p.candidates, index, anchor_position, static_cast<int32_t>(position),
                   is_short ? s.sorted[warp] : p.sorted_list + begin, length);
    __syncwarp();  // the row's gradient, which other lanes have written
    if (pass.is_last(p.anchors.count) && p.candidates.gradient_out != nullptr) write_row<In>(p, p.candidates, index, scale);
  }
  if (p.anchors_are_candidates || p.anchors.gradient_out == nullptr) return;
#pragma unroll 1
  for (int64_t a = int64_t(block_index()) * kWarps + warp; a < p.anchors.count; a += rows_per_turn) {
    const int32_t index = sorted_index(p, p.anchors)[a];
    gather_row<In>(p, pass, p.anchors, index, static_cast<int32_t>(a), -1, nullptr, 0);
    __syncwarp();  // the row's gradient
    if (pass.is_last(p.anchors.count)) write_row<In>(p, p.anchors, index, scale);
  }
}

// Sums over all anchors of loss, d2_ap and d2_an, by one whole block in a fixed order: thread t adds anchors t, t + kThreads,
// …, then a warp's sums are added by a tree, then the warps' in turn. of_warp: [3 kWarps], shared.
template <class Acc>
__device__ void sum_anchors(const Problem<Acc>& p, double* of_warp, double (&sum)[3]) {
  for (int i = 0; i < 3; ++i) sum[i] = 0;
  for (int32_t a = thread_index(); a < p.anchors.count; a += kThreads) {
    sum[0] += p.loss_of_anchor[a];
    if (p.stat_counts == nullptr) continue;
    sum[1] += p.sum_d2_ap[a];
    sum[2] += p.sum_d2_an[a];
  }
  for (int i = 0; i < 3; ++i) {
    sum[i] = warp_sum(sum[i]);
    if (thread_index() % 32 == 0) of_warp[thread_index() / 32 * 3 + i] = sum[i];
  }
  __syncthreads();  // the sums of all warps
  for (int i = 0; i < 3; ++i) {
    sum[i] = 0;
#pragma unroll 1  // or all of them would wait in registers at a time
    for (int warp = 0; warp < kWarps; ++warp) sum[i] += of_warp[3 * warp + i];
  }
}

// The scalars, by the last block, which has the fewest rows.
template <class Acc>
__device__ void write_loss(const Problem<Acc>& p, double* of_warp) {
  if (block_index() != grid_size() - 1) return;
  double sum[3];
  sum_anchors(p, of_warp, sum);
  if (thread_index() != 0) return;
  *static_cast<Acc*>(p.loss) = static_cast<Acc>(sum[0] / divisor(p));
  if (p.stat_counts == nullptr) return;
  for (int i = 0; i < 5; ++i) p.stat_counts[i] = static_cast<int64_t>(p.counters->counts[i]);
  const double pairs = p.counters->counts[0] > 0 ? static_cast<double>(p.counters->counts[0]) : 1.0;
  Acc* stats = static_cast<Acc*>(p.stat_d2);
  stats[0] = static_cast<Acc>(sum[1] / pairs);
  stats[1] = static_cast<Acc>(sum[2] / pairs);
  stats[2] = static_cast<Acc>(__longlong_as_double(static_cast<long long>(p.counters->max_d2_ap)));
}

// A non-finite element: NaN everywhere, so that nobody trains on.
template <class Acc>
__device__ void write_nan(const Problem<Acc>& p) {
  const Acc nan = static_cast<Acc>(__longlong_as_double(0x7ff8000000000000ll));
  for (int set = 0; set < (p.plain ? 1 : 2); ++set) {
    const Rows<Acc>& rows = set == 0 ? p.candidates : p.anchors;
    if (rows.gradient_out == nullptr) continue;
    const int64_t elements = int64_t(set == 0 ? p.gradient_rows : rows.count) * p.dim;
    for (int64_t i = int64_t(block_index()) * kThreads + thread_index(); i < elements; i += int64_t(grid_size()) * kThreads) {
      static_cast<Acc*>(rows.gradient_out)[i] = nan;
    }
  }
  if (block_index() != 0 || thread_index() != 0) return;
  *static_cast<Acc*>(p.loss) = nan;
  if (p.stat_counts == nullptr) return;
  for (int i = 0; i < 5; ++i) p.stat_counts[i] = 0;
  for (int i = 0; i < 3; ++i) static_cast<Acc*>(p.stat_d2)[i] = nan;
}

}  // namespace facenet_ext::cuda
