// Phase 5: from bucket minima to triplets: a warp per anchor.
//
//   best        suffix minimum over the buckets; bucket u - 1 then holds the negative of a positive with u thresholds <= its own
//   direct form sum (a - p)^2 and sum (a - n)^2 of every pair: the loss does not inherit the expansion's cancellation
//   d2_ap       becomes the pair's gradient coefficient (1, or 1 / d for the euclidean distance, or 0: hinge at zero)
//   coefficient per run of buckets with the same negative: the sum over its positives, stored at the run's first bucket
//
// Equal negatives stand in neighbouring buckets, because suffix minima ascend; so a run's first bucket, found by binary search,
// names the (anchor, negative) pair, and no list of distinct negatives is needed. The empty buckets at the end are the run of
// the farthest negative. Reads 2 rows per pair; K log K comparisons per anchor.
#pragma once

#include "select.cuh"

namespace facenet_ext::cuda {

template <class In, class Acc>
struct InputRow {  // a row as the distances see it
  const In* x;
  Acc factor;
  __device__ __forceinline__ Acc operator[](int32_t d) const { return widen(x[d]) * factor; }
};
template <class In, class Acc>
__device__ __forceinline__ InputRow<In, Acc> input_row(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index) {
  return {static_cast<const In*>(rows.x) + int64_t(index) * rows.stride, p.normalize ? rows.inverse_norm[index] : Acc(1)};
}

struct Winner {  // of a bucket: ordered bits of the distance (all ones: none) and the index
  uint64_t bits;
  uint32_t index;
  __device__ __forceinline__ bool none() const { return bits == kEmpty; }
  __device__ __forceinline__ bool operator<(const Winner& other) const {
    return bits < other.bits || (bits == other.bits && index < other.index);
  }
};
__device__ __forceinline__ Winner load_winner(const Problem<float>& p, int64_t slot) {
  const uint64_t key = p.best[slot];
  return {key == kEmpty ? kEmpty : key >> 32, static_cast<uint32_t>(key)};
}
__device__ __forceinline__ Winner load_winner(const Problem<double>& p, int64_t slot) {
  return {p.best[slot], p.best_index[slot]};
}
__device__ __forceinline__ void store_winner(const Problem<float>& p, int64_t slot, Winner w) {
  p.best[slot] = w.none() ? kEmpty : pack(static_cast<uint32_t>(w.bits), w.index);
}
__device__ __forceinline__ void store_winner(const Problem<double>& p, int64_t slot, Winner w) {
  p.best[slot] = w.bits;
  p.best_index[slot] = w.index;
}
__device__ __forceinline__ int32_t farthest_of(const Problem<float>& p, int32_t a) {
  return static_cast<int32_t>(~static_cast<uint32_t>(p.farthest[a]));
}
__device__ __forceinline__ int32_t farthest_of(const Problem<double>& p, int32_t a) {
  return static_cast<int32_t>(p.farthest_index[a]);
}

// best[r] = min of best[r ..]: whole warp; a barrier must follow before other lanes read it.
template <class Acc>
__device__ __forceinline__ void suffix_minimum(const Problem<Acc>& p, int64_t slot, int32_t count) {
  const int lane = thread_index() % 32;
  Winner later{kEmpty, ~0u};
  for (int32_t base = (count - 1) / 32 * 32; base >= 0; base -= 32) {
    Winner mine{kEmpty, ~0u};
    if (base + lane < count) mine = load_winner(p, slot + base + lane);
    for (int step = 1; step < 32; step *= 2) {
      const Winner other{__shfl_down_sync(kWholeWarp, mine.bits, step), __shfl_down_sync(kWholeWarp, mine.index, step)};
      if (lane + step < 32 && other < mine) mine = other;
    }
    if (later < mine) mine = later;
    if (base + lane < count) store_winner(p, slot + base + lane, mine);
    later = Winner{__shfl_sync(kWholeWarp, mine.bits, 0), __shfl_sync(kWholeWarp, mine.index, 0)};
  }
}

// The first bucket of the run that bucket r belongs to.
template <class Acc>
__device__ __forceinline__ int32_t run_begin(const Problem<Acc>& p, int64_t slot, int32_t r) {
  const Winner mine = load_winner(p, slot + r);
  int32_t low = 0, high = r;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const bool below = load_winner(p, slot + middle) < mine;
    low = below ? middle + 1 : low;
    high = below ? high : middle;
  }
  return low;
}

// Sums of squares of a - p and a - n over the whole row, the same bits in every lane.
template <class In, class Acc>
__device__ __forceinline__ void direct_distances(const Problem<Acc>& p, InputRow<In, Acc> a, InputRow<In, Acc> positive,
                                                 InputRow<In, Acc> negative, Acc& d2_ap, Acc& d2_an) {
  Acc ap = 0, an = 0;
#pragma unroll 4
  for (int32_t d = thread_index() % 32; d < p.dim; d += 32) {
    const Acc mine = a[d], to_positive = mine - positive[d], to_negative = mine - negative[d];
    ap = fma(to_positive, to_positive, ap);
    an = fma(to_negative, to_negative, an);
  }
  d2_ap = warp_sum(ap);
  d2_an = warp_sum(an);
}

struct FinishShared {
  uint64_t pairs, active, fallback, max_d2_ap;
};

template <class In, class Acc>
__device__ void finish(const Problem<Acc>& p, const Pass& pass, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  FinishShared& totals = *carver.take<FinishShared>(1);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  if (thread_index() == 0) totals = FinishShared{};
  __syncthreads();

  uint64_t pairs = 0, active = 0, fallback = 0;  // of this warp, in every lane
  double max_d2_ap = 0;
  for (int32_t a = pass.begin + block_index() * kWarps + warp; a < pass.end; a += grid_size() * kWarps) {
    const int32_t begin = p.anchors.mate_begin[a], end = p.anchors.mate_end[a], own = own_position(p, a);
    const int32_t count = count_positives(p, begin, end);
    double loss = 0, sum_ap = 0, sum_an = 0;
    const int64_t slot = pass.slot(a);
    const int32_t anchor_index = sorted_index(p, p.anchors)[a];
    const auto anchor = input_row<In>(p, p.anchors, anchor_index);
    if (count > 0) {
      suffix_minimum(p, slot, count);
      for (int32_t r = lane; r < count; r += 32) p.coefficient[slot + r] = 0;
      __syncwarp();  // minima, which all lanes search, and zeros, which lane 0 adds to
    }
    for (int32_t base = 0; base < count; base += 32) {
      // Each lane looks up one positive's negative; then the whole warp computes one pair at a time.
      const int32_t mine = base + lane;
      int32_t my_positive = 0, my_negative = 0, my_run = 0;
      bool my_fallback = false;
      if (mine < count) {
        my_positive = sorted_index(p, p.candidates)[begin + mine + (own >= 0 && begin + mine >= own ? 1 : 0)];
        const int32_t bucket = count_below<true>(p.threshold + slot, count, p.d2_ap[slot + mine]) - 1;
        const Winner winner = load_winner(p, slot + bucket);
        my_fallback = winner.none();
        my_negative = my_fallback ? (p.skip_fallback ? my_positive : farthest_of(p, a)) : static_cast<int32_t>(winner.index);
        my_run = run_begin(p, slot, bucket);
      }
      Acc my_coefficient = 0, my_d2_ap = 0, my_d2_an = 0;
      const int32_t here = min(32, count - base);
      for (int i = 0; i < here; ++i) {
        const int32_t positive = __shfl_sync(kWholeWarp, my_positive, i), negative = __shfl_sync(kWholeWarp, my_negative, i);
        const int32_t run = __shfl_sync(kWholeWarp, my_run, i);
        const bool is_fallback = __shfl_sync(kWholeWarp, static_cast<int>(my_fallback), i) != 0;
        fallback += is_fallback ? 1 : 0;
        if (is_fallback && p.skip_fallback) continue;
        Acc d2_ap, d2_an;
        direct_distances<In>(p, anchor, input_row<In>(p, p.candidates, positive), input_row<In>(p, p.candidates, negative),
                             d2_ap, d2_an);
        const Acc d_ap = p.euclidean ? sqrt(d2_ap) : d2_ap, d_an = p.euclidean ? sqrt(d2_an) : d2_an;
        const Acc hinge = d_ap - d_an + p.margin;
        const bool is_active = !(hinge <= 0);  // NaN is
        ++pairs;
        if (is_active) {
          ++active;
          loss += hinge;
        }
        sum_ap += d2_ap;
        sum_an += d2_an;
        max_d2_ap = d2_ap > max_d2_ap ? d2_ap : max_d2_ap;
        if (lane == i) {
          my_d2_ap = d2_ap;
          my_d2_an = d2_an;
          if (is_active) my_coefficient = !p.euclidean ? Acc(1) : d2_ap > 0 ? 1 / d_ap : Acc(0);
        }
        if (lane == 0 && is_active) {  // one thread, in order of the positives: reproducible
          p.coefficient[slot + run] += !p.euclidean ? Acc(1) : d2_an > 0 ? 1 / d_an : Acc(0);
        }
      }
      if (mine < count) p.d2_ap[slot + mine] = my_coefficient;
      if (p.mining && mine < count) {
        const int64_t pair = p.pair_begin[anchor_index] + mine;
        p.out_positive[pair] = my_positive;
        p.out_negative[pair] = my_negative;
        static_cast<Acc*>(p.out_d2_ap)[pair] = my_d2_ap;
        static_cast<Acc*>(p.out_d2_an)[pair] = my_d2_an;
        p.out_is_fallback[pair] = my_fallback ? 1 : 0;
      }
    }
    if (lane == 0) {
      p.loss_of_anchor[a] = loss;
      p.sum_d2_ap[a] = sum_ap;
      p.sum_d2_an[a] = sum_an;
    }
    if (p.wants_gradient && count > 0) {  // register the distinct negatives with the rows that must hear of them
      __syncwarp();                       // lane 0 has written the coefficients
      for (int32_t r = lane; r < count; r += 32) {
        if (p.coefficient[slot + r] == 0) continue;
        const Winner winner = load_winner(p, slot + r);
        const int32_t negative = winner.none() ? farthest_of(p, a) : static_cast<int32_t>(winner.index);
        p.negative[slot + r] = negative;
        p.list_place[slot + r] = atomicAdd(&p.times_chosen[negative], 1);
      }
    }
  }
  if (lane == 0) {
    atomic_add(&totals.pairs, pairs);
    atomic_add(&totals.active, active);
    atomic_add(&totals.fallback, fallback);
    atomic_max(&totals.max_d2_ap, ordered_bits(max_d2_ap));
  }
  __syncthreads();
  if (thread_index() == 0) {  // integers: their sum does not depend on the order
    atomic_add(&p.counters->pairs, totals.pairs);
    atomic_add(&p.counters->active, totals.active);
    atomic_add(&p.counters->fallback, totals.fallback);
    atomic_max(&p.counters->max_d2_ap, totals.max_d2_ap);
  }
}

}  // namespace facenet_ext::cuda
