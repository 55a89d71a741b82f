// Phases 6 to 8: the gradient, gathered by each row from those that it is in triplets with. No float is added by an atomic, every
// sum has a fixed order, so the result is the same bit for bit in every run.
//
// With coefficients u(a, p) of pairs and v(a, n) of (anchor, negative) pairs, each row x collects
//
//   as anchor     + u(x, p) (x - p)  over its positives        - v(x, n) (x - n)  over its distinct negatives
//   as positive   + u(a, x) (x - a)  over the anchors of its class
//   as negative   - v(a, x) (x - a)  over the anchors that chose it: its list, ascending by slot, that is by anchor
//
// times 2 (squared) or 1 (euclidean), over the number of counted pairs. Differences, not rowsum * x - S x: near-duplicates keep
// their relative accuracy.
//
//   6 reserve   list_begin: a piece of `list` for every row; which piece depends on the schedule, its content does not
//   7 fill      list[list_begin[n] + list_place] = slot
//   8 gather    a warp per row; bytes from L2: one row per active pair and side
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
    if (c < p.candidates.count) p.list_begin[c] = static_cast<int32_t>(begin) + end - length;
  }
}

template <class Acc>
__device__ void fill_lists(const Problem<Acc>& p, const Pass& pass) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  for (int32_t a = pass.begin + block_index() * kWarps + warp; a < pass.end; a += grid_size() * kWarps) {
    const int32_t count = count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a]);
    const int64_t slot = pass.slot(a);
    for (int32_t r = lane; r < count; r += 32) {
      if (p.coefficient[slot + r] == 0) continue;
      p.list[p.list_begin[p.negative[slot + r]] + p.list_place[slot + r]] = static_cast<int32_t>(slot) + r;
    }
  }
}

constexpr int kGatherEach = 4;                  // elements of a row per lane
constexpr int kGather = 32 * kGatherEach;       // elements per round

// sum[i] += coefficient * (x - other) over `count` partners; get(e, coefficient) returns the index of partner e in `others`.
// Lanes look 32 partners up, then the warp walks through those whose coefficient is not zero.
template <class In, class Acc, class Get>
__device__ __forceinline__ void gather(const Problem<Acc>& p, const Rows<Acc>& others, const Acc (&x)[kGatherEach],
                                       int32_t first_element, int32_t count, Acc (&sum)[kGatherEach], Get get) {
  const int lane = thread_index() % 32;
  for (int32_t base = 0; base < count; base += 32) {
    Acc my_coefficient = 0;
    int32_t my_index = 0;
    if (base + lane < count) my_index = get(base + lane, my_coefficient);
    uint32_t left = __ballot_sync(kWholeWarp, my_coefficient != 0);
    while (left != 0) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const Acc coefficient = __shfl_sync(kWholeWarp, my_coefficient, i);
      const auto other = input_row<In>(p, others, __shfl_sync(kWholeWarp, my_index, i));
#pragma unroll
      for (int j = 0; j < kGatherEach; ++j) {
        const int32_t d = first_element + 32 * j + lane;
        if (d < p.dim) sum[j] = fma(coefficient, x[j] - other[d], sum[j]);
      }
    }
  }
}

// The part of row `index`'s gradient that this pass brings, added to rows.gradient. anchor_position: of the row among the
// anchors, or -1; position: among the candidates, or -1. `list` is sorted.
template <class In, class Acc>
__device__ void gather_row(const Problem<Acc>& p, const Pass& pass, const Rows<Acc>& rows, int32_t index,
                           int32_t anchor_position, int32_t position, const int32_t* list, int32_t list_count) {
  const int lane = thread_index() % 32;
  const auto row = input_row<In>(p, rows, index);
  Acc* out = rows.gradient + int64_t(index) * p.dim;
  for (int32_t first = 0; first < p.dim; first += kGather) {
    Acc x[kGatherEach], sum[kGatherEach];
#pragma unroll
    for (int j = 0; j < kGatherEach; ++j) {
      const int32_t d = first + 32 * j + lane;
      x[j] = d < p.dim ? row[d] : Acc(0);
      sum[j] = d < p.dim && !pass.is_first() ? out[d] : Acc(0);
    }
    if (anchor_position >= 0 && pass.has(anchor_position)) {
      const int32_t begin = p.anchors.mate_begin[anchor_position];
      const int32_t count = count_positives(p, begin, p.anchors.mate_end[anchor_position]);
      const int32_t own = own_position(p, anchor_position);
      const int64_t slot = pass.slot(anchor_position);
      gather<In>(p, p.candidates, x, first, count, sum, [&](int32_t e, Acc& coefficient) {
        coefficient = p.d2_ap[slot + e];
        return sorted_index(p, p.candidates)[begin + e + (own >= 0 && begin + e >= own ? 1 : 0)];
      });
      gather<In>(p, p.candidates, x, first, count, sum, [&](int32_t e, Acc& coefficient) {
        coefficient = -p.coefficient[slot + e];
        return coefficient != 0 ? p.negative[slot + e] : 0;
      });
    }
    if (position >= 0) {
      // Anchors of the row's class that this pass holds.
      const int32_t begin = max(p.candidates.mate_begin[position], pass.begin);
      const int32_t end = min(p.candidates.mate_end[position], pass.end);
      gather<In>(p, p.anchors, x, first, end - begin, sum, [&](int32_t e, Acc& coefficient) {
        const int32_t a = begin + e, own = own_position(p, a);
        const bool counts = own != position && count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a]) > 0;
        coefficient = counts ? p.d2_ap[pass.slot(a) + positive_rank(p.anchors.mate_begin[a], own, position)] : Acc(0);
        return sorted_index(p, p.anchors)[a];
      });
      gather<In>(p, p.anchors, x, first, list_count, sum, [&](int32_t e, Acc& coefficient) {
        coefficient = -p.coefficient[list[e]];
        return sorted_index(p, p.anchors)[pass.begin + list[e] / pass.stride];
      });
    }
#pragma unroll
    for (int j = 0; j < kGatherEach; ++j) {
      const int32_t d = first + 32 * j + lane;
      if (d < p.dim) out[d] = sum[j];
    }
  }
}

// Scales the finished row and writes it as the input's type; the gradient of x / max(|x|, 1e-12) if the rows were normalised.
template <class In, class Acc>
__device__ void write_row(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index, Acc scale) {
  const int lane = thread_index() % 32;
  const Acc* gradient = rows.gradient + int64_t(index) * p.dim;  // each lane reads what it wrote itself
  In* out = static_cast<In*>(rows.gradient_out) + int64_t(index) * p.dim;
  const auto row = input_row<In>(p, rows, index);
  Acc along = 0;
  if (p.normalize) {
    for (int32_t d = lane; d < p.dim; d += 32) along = fma(gradient[d], row[d], along);
    along = warp_sum(along);
    if (row.factor >= Acc(1e12)) along = 0;  // divided by the constant 1e-12, not by the norm
  }
  for (int32_t d = lane; d < p.dim; d += 32) {
    const Acc value = p.normalize ? (gradient[d] - along * row[d]) * row.factor : gradient[d];
    narrow(value * scale, out[d]);
  }
}

// What a sum over the counted pairs is divided by.
template <class Acc>
__device__ __forceinline__ double divisor(const Problem<Acc>& p) {
  const uint64_t count = p.reduction == Reduction::mean          ? p.counters->pairs
                         : p.reduction == Reduction::mean_active ? p.counters->active
                                                                 : 1;
  return count > 0 ? static_cast<double>(count) : 1.0;
}

// Phase 8. Behind it, times_chosen is zero again for the next pass.
template <class In, class Acc>
__device__ void gather_gradients(const Problem<Acc>& p, const Pass& pass) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const Acc scale = static_cast<Acc>((p.euclidean ? 1 : 2) / divisor(p));
  if (block_index() == 0 && thread_index() == 0) p.counters->list_end = 0;

  // Long lists first, each sorted by the block that gathers it. A list holds an anchor at most twice (as semi-hard negative and
  // as farthest), so `list_place` has room for it as scratch.
  const int32_t rows_per_turn = grid_size() * kWarps;
  for (int64_t turn = int64_t(block_index()) * kWarps; turn < p.candidates.count; turn += rows_per_turn) {
    for (int i = 0; i < kWarps && turn + i < p.candidates.count; ++i) {
      const int32_t index = sorted_index(p, p.candidates)[turn + i];
      const int32_t length = p.times_chosen[index];
      if (length <= kWarpSort) continue;
      const int32_t begin = p.list_begin[index];
      block_sort(p.list + begin, p.sorted_list + begin, p.list_place + begin, length);
    }
  }
  __syncthreads();  // all have read times_chosen, which is cleared below
  for (int64_t position = int64_t(block_index()) * kWarps + warp; position < p.candidates.count; position += rows_per_turn) {
    const int32_t index = sorted_index(p, p.candidates)[position];
    const int32_t length = p.times_chosen[index], begin = p.list_begin[index];
    if (length <= kWarpSort) warp_sort(p.list + begin, p.sorted_list + begin, length);
    __syncwarp();  // the list is sorted, and every lane has read its length
    if (lane == 0) p.times_chosen[index] = 0;
    int32_t anchor_position = -1;
    if (p.plain) {
      anchor_position = static_cast<int32_t>(position);
    } else if (p.anchors_are_candidates && index >= p.anchor_offset && index - p.anchor_offset < p.anchors.count) {
      anchor_position = p.anchors.position[index - p.anchor_offset];
    }
    gather_row<In>(p, pass, p.candidates, index, anchor_position, static_cast<int32_t>(position),
                   p.sorted_list + begin, length);
    if (pass.is_last(p.anchors.count) && p.candidates.gradient_out != nullptr) write_row<In>(p, p.candidates, index, scale);
  }
  if (p.anchors_are_candidates || p.anchors.gradient_out == nullptr) return;
  for (int64_t a = int64_t(block_index()) * kWarps + warp; a < p.anchors.count; a += rows_per_turn) {
    const int32_t index = sorted_index(p, p.anchors)[a];
    gather_row<In>(p, pass, p.anchors, index, static_cast<int32_t>(a), -1, nullptr, 0);
    if (pass.is_last(p.anchors.count)) write_row<In>(p, p.anchors, index, scale);
  }
}

// The scalars, by block 0, in a fixed order: thread t adds anchors t, t + kThreads, …, then the threads' sums are added by a tree.
template <class Acc>
__device__ void write_loss(const Problem<Acc>& p, uint8_t* shared_memory) {
  if (block_index() != 0) return;
  Carver carver{shared_memory, 0, true};
  double* partial = carver.take<double>(3 * kThreads);
  double sum[3] = {0, 0, 0};
  for (int32_t a = thread_index(); a < p.anchors.count; a += kThreads) {
    sum[0] += p.loss_of_anchor[a];
    sum[1] += p.sum_d2_ap[a];
    sum[2] += p.sum_d2_an[a];
  }
  for (int i = 0; i < 3; ++i) partial[i * kThreads + thread_index()] = sum[i];
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();  // the sums of the step before are written
    if (thread_index() < step) {
      for (int i = 0; i < 3; ++i) partial[i * kThreads + thread_index()] += partial[i * kThreads + thread_index() + step];
    }
  }
  if (thread_index() != 0) return;
  *static_cast<Acc*>(p.loss) = static_cast<Acc>(partial[0] / divisor(p));
  if (p.stat_counts == nullptr) return;
  p.stat_counts[0] = static_cast<int64_t>(p.counters->pairs);
  p.stat_counts[1] = static_cast<int64_t>(p.counters->active);
  p.stat_counts[2] = static_cast<int64_t>(p.counters->fallback);
  p.stat_counts[3] = p.stat_counts[4] = 0;
  const double pairs = p.counters->pairs > 0 ? static_cast<double>(p.counters->pairs) : 1.0;
  Acc* stats = static_cast<Acc*>(p.stat_d2);
  stats[0] = static_cast<Acc>(partial[kThreads] / pairs);
  stats[1] = static_cast<Acc>(partial[2 * kThreads] / pairs);
  stats[2] = static_cast<Acc>(__longlong_as_double(static_cast<long long>(p.counters->max_d2_ap)));
}

// A non-finite element: NaN everywhere, so that nobody trains on.
template <class In, class Acc>
__device__ void write_nan(const Problem<Acc>& p) {
  const Acc nan = static_cast<Acc>(__longlong_as_double(0x7ff8000000000000ll));
  for (int set = 0; set < (p.plain ? 1 : 2); ++set) {
    const Rows<Acc>& rows = set == 0 ? p.candidates : p.anchors;
    if (rows.gradient_out == nullptr) continue;
    const int64_t elements = int64_t(rows.count) * p.dim;
    for (int64_t i = int64_t(block_index()) * kThreads + thread_index(); i < elements; i += int64_t(grid_size()) * kThreads) {
      narrow(nan, static_cast<In*>(rows.gradient_out)[i]);
    }
  }
  if (block_index() != 0 || thread_index() != 0) return;
  *static_cast<Acc*>(p.loss) = nan;
  if (p.stat_counts == nullptr) return;
  for (int i = 0; i < 5; ++i) p.stat_counts[i] = 0;
  for (int i = 0; i < 3; ++i) static_cast<Acc*>(p.stat_d2)[i] = nan;
}

}  // namespace facenet_ext::cuda
