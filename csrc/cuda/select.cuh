// Phases 2 and 3 of a pass: from operands to the closest negative of every bucket.
//
//   2 thresholds  a block finds the distances of 16 anchors' positives and sorts them  ->  d2_ap, threshold [anchors, stride]
//   3 sweep       all tiles  ->  best: per bucket the least (distance, index)
//
// Bucket r of an anchor takes its negatives with threshold[r] < d <= threshold[r + 1]; those not farther than threshold[0]
// serve no positive. finish.cuh turns minima into suffix minima, which are the semi-hard negatives.
//
// Both kinds of distances come from the same products and the same expression, so equal rows give equal bits in both.
#pragma once

#include "buckets.cuh"

namespace facenet_ext::cuda {

// ---- phase 2 --------------------------------------------------------------------------------------------------------

// By one warp: ascending thresholds, and how many of them are not farther than each positive.
template <class Acc>
__device__ __forceinline__ void sort_thresholds(const Problem<Acc>& p, const Pass& pass, int32_t a, int32_t positives,
                                                const Acc* d2_ap) {
  Acc* threshold = p.threshold + pass.bucket(a);
  const int32_t step = pass.bucket_step();
  for (int32_t r = thread_index() % 32; r < positives; r += 32) {
    if (p.negatives == Negatives::hard) {
      if (r == 0) threshold[0] = -1;
      p.entry[pass.entry(a, r)].row = 1;
      continue;
    }
    const Acc own = d2_ap[r];
    const auto mine = sort_order(own);
    int32_t below = 0, before = 0, equal = 0;
#pragma unroll 8
    for (int32_t j = 0; j < positives; ++j) {  // all lanes read the same address: a broadcast
      const auto other = sort_order(d2_ap[j]);
      below += other < mine ? 1 : 0;
      equal += other == mine ? 1 : 0;
      before += other == mine && j < r ? 1 : 0;
    }
    threshold[(below + before) * step] = own;
    p.entry[pass.entry(a, r)].row = below + equal;
  }
}

// The same for kShortStride positives at most, whose distances stand in shared memory alone, as yet. Returns whether there are
// no equally far ones, nor none at all; then the base (buckets.cuh) has been stored too.
template <class Acc>
__device__ __forceinline__ bool sort_few_thresholds(const Problem<Acc>& p, const Pass& pass, int32_t a, int32_t positives,
                                                    const Acc* d2_ap) {
  constexpr int kOwn = kShortStride / 32;
  const int lane = thread_index() % 32;
  Acc own[kOwn];
  int32_t below[kOwn] = {};
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    own[k] = d2_ap[min(lane + 32 * k, max(positives - 1, 0))];
    if (lane + 32 * k < positives) p.d2_ap[pass.slot(a) + lane + 32 * k] = own[k];
  }
  constexpr int kEach = 16 / sizeof(Acc);  // that one load brings: a broadcast. What follows the last positive is never less.
  using Some = Vector<Acc, kEach>;
#pragma unroll 2
  for (int32_t j = 0; j < (p.negatives == Negatives::hard ? 0 : positives); j += kEach) {
    const Some others = *reinterpret_cast<const Some*>(d2_ap + j);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) count_if_less(below[k], sort_order(others.element[e]), sort_order(own[k]));
    }
  }
  int32_t sum = 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) sum += lane + 32 * k < positives ? below[k] : 0;
  // Not where some are equally far.
  if (p.negatives == Negatives::hard || warp_sum(sum) != positives * (positives - 1) / 2) {
    sort_thresholds(p, pass, a, positives, d2_ap);
    return false;
  }
  const int32_t place = pass.entry(a, lane), bucket = pass.bucket(a), step = pass.bucket_step();
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (lane + 32 * k >= positives) continue;
    p.threshold[bucket + below[k] * step] = own[k];
    p.entry[place + k * pass.entry_step()].row = below[k] + 1;
    if constexpr (sizeof(Acc) == 4) {
      if (pass.in_shared && below[k] == positives - 1) p.base[a] = base_of(p, own[k]);
    }
  }
  return positives > 0;
}

// By one warp: which candidates of the class of anchor i (of the strip) make no pair with it. NaN is the farthest or the
// closest where there is nothing else.
template <class Acc>
__device__ void drop_pairs(const Problem<Acc>& p, const Pass& pass, const Edge<Acc>& edge, int i, int32_t a) {
  const Acc* d2_ap = p.d2_ap + pass.slot(a);
  const int32_t begin = edge.mate_begin[i], own = edge.own[i], positives = count_positives(p, begin, edge.mate_end[i]);
  const int32_t from = p.unordered ? p.anchor_offset + edge.index[i] + 1 : 0;
  const auto is_pair = [&](int32_t r) {
    const int32_t index = sorted_index(p, p.candidates)[begin + r + (own >= 0 && begin + r >= own ? 1 : 0)];
    return index >= from && index < p.positives_end;
  };
  const auto score = [&](int32_t r) -> uint64_t {
    const uint64_t bits = ordered_bits(d2_ap[r]);
    return p.positives == Positives::easiest ? ~bits : d2_ap[r] == d2_ap[r] ? bits + 2 : 1;
  };
  uint64_t most = 0;
  int32_t chosen = -1;
  if (p.positives != Positives::all) {
    for (int32_t r = thread_index() % 32; r < positives; r += 32) {
      if (is_pair(r) && score(r) > most) {
        most = score(r);
        chosen = r;
      }
    }
    const uint64_t of_all = warp_max(most);
    chosen = ~warp_max(most == of_all && chosen >= 0 ? ~chosen : INT32_MIN);  // the lowest
  }
  for (int32_t r = thread_index() % 32; r < positives; r += 32) {
    if (p.positives == Positives::all ? !is_pair(r) : r != chosen) p.entry[pass.entry(a, r)].row = 0;
  }
}

// Rows of the first strip of all are on their way before the pass is known, and stand in shared memory when it begins. By one
// warp, as long as it has kStrip lanes.
template <class Acc>
__device__ __forceinline__ EdgeRow<Acc> load_first_row(const Problem<Acc>& p) {
  return {p, p.anchors, block_index() * kStrip + min(thread_index() % 32, kStrip), true};
}
template <class Acc>
__device__ __forceinline__ void store_first_row(const EdgeRow<Acc>& row, int32_t max_exponent, const TileShared<Acc>& tile) {
  if (thread_index() % 32 < kStrip) row.store(max_exponent, tile.strip()->row, thread_index() % 32);
}

// Empties the buckets of all strips that are this block's, where they will be swept in shared memory, which those of doubles are
// not. Thresholds that find_thresholds() knows come behind a barrier of the block.
template <class Acc>
__device__ __forceinline__ void empty_buckets(const Problem<Acc>& p, const Pass& pass) {
  const int32_t step = pass.width, end = pass.begin + step;
#pragma unroll 1
  for (int32_t first = pass.begin + block_index() * kStrip; first < end; first += grid_size() * kStrip) {
    const int32_t a = first + thread_index() % kStrip;
    if (a >= end) continue;
    int32_t bucket = a - pass.begin + thread_index() / kStrip * step;
#pragma unroll 2
    for (int32_t r = thread_index() / kStrip; r < pass.buckets; r += kThreads / kStrip, bucket += kThreads / kStrip * step) {
      p.threshold[bucket] = Acc(INFINITY);
      p.best[bucket] = kEmpty;
    }
  }
}

// Positions are sorted by label: the positives of kStrip anchors lie in one band of candidates, kWarps * 8 of which are
// multiplied at a time, 8 by each warp. FLOPs: 2 kStrip D per candidate of the band and product of the format. A block then
// sorts what it has found itself: a warp an anchor, or the block where there are more than kWarpSort.
template <Math M, class Acc>
__device__ void find_thresholds(const Problem<Acc>& p, const Pass& pass, const TileShared<Acc>& tile) {
  StripShared<Acc>& s = *tile.strip();
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const bool is_short = pass.stride <= min(kShortStride, kWarpSort);
  if (block_index() == 0 && thread == 0) p.counters->list_end = p.counters->list_overflows = 0;
  if constexpr (sizeof(Acc) == 4) {
    if (pass.is_first() && pass.in_shared) order_tiles(p);
  }

#pragma unroll 1
  for (int32_t first = pass.begin + block_index() * kStrip; first < pass.end; first += grid_size() * kStrip) {
    const int32_t count = min(kStrip, pass.end - first);
    __syncthreads();  // the strip before has been sorted
    if (!pass.is_first() || first != block_index() * kStrip) {  // else store_first_row() has
      load_edge(p, p.anchors, first, pass.max_exponent, true, thread, s.row);
    }
    if (is_short) {  // sort_few_thresholds() reads on behind the last positive
      const Acc last = from_ordered_bits(~decltype(sort_order(Acc()))(0));
#pragma unroll
      for (int i = thread; i < kStrip * kShortStride; i += kThreads) (&s.d2_ap[0][0])[i] = last;
    }
    __syncthreads();  // the rows' edge
    const int32_t band_end = s.row.mate_end[count - 1];
#pragma unroll 1
    for (int32_t column = s.row.mate_begin[0]; column < band_end; column += 8 * kWarps) {
      __syncthreads();  // the columns before have been read
      // By the last warps: the first ones have products to find, even for a band that is narrow.
      load_edge(p, p.candidates, column, pass.max_exponent, false, thread - (kThreads - kSide), s.column);
      const auto operand = [&](const Rows<Acc>& rows, int32_t position) -> const uint8_t* {
        return rows.operand + int64_t(min(position, rows.count - 1)) * p.pitch;
      };
      const bool has_columns = column + 8 * warp < band_end;
      Acc product[4];
      int anchor[4], its_column[4], found = 0;
      strip_products<M, Acc>(
          has_columns ? p.pitch : 0, [&](int i) { return operand(p.anchors, first + i); },
          [&](int i) { return operand(p.candidates, column + 8 * warp + i); },
          [&](int i, int j, Acc x) {
            anchor[found] = i;
            its_column[found] = 8 * warp + j;
            product[found] = x;
            ++found;
          },
          [] { __syncthreads(); });  // the columns' edge
      if (!has_columns) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = anchor[k];
        const int32_t c = column + its_column[k], begin = s.row.mate_begin[i], own = s.row.own[i];
        const int32_t size = s.row.mate_end[i] - begin;
        const bool is_pair = (static_cast<uint32_t>(c - begin) < static_cast<uint32_t>(size)) & (i < count) & (c != own) &
                             (size != p.candidates.count);
        const Acc d2 = squared_distance(s.row, i, s.column, its_column[k], product[k]);
        if (!is_pair) continue;
        const int32_t rank = positive_rank(begin, own, c);
        if (is_short) s.d2_ap[i][rank] = d2;
        else p.d2_ap[pass.slot(first + i) + rank] = d2;
      }
    }
    __syncthreads();  // d2_ap of the strip
    const auto empty_bucket = [&](int32_t bucket, bool has_threshold) {
      if (!has_threshold) p.threshold[bucket] = Acc(INFINITY);
      p.best[bucket] = kEmpty;
      if (sizeof(Acc) == 8) p.best_index[bucket] = ~0u;
    };
    const auto positives_of = [&](int i) { return count_positives(p, s.row.mate_begin[i], s.row.mate_end[i]); };
    if (p.negatives != Negatives::hard && pass.stride > kWarpSort) {  // lists that a block sorts
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const int32_t positives = positives_of(i), slot = pass.slot(first + i);
        if (positives <= kWarpSort) continue;
        // A copy is sorted: d2_ap stays in order of the positive. `best` is free until the buckets are emptied, `entry`
        // until finish().
        Acc* keys = reinterpret_cast<Acc*>(p.best + slot);
        for (int32_t r = thread; r < positives; r += kThreads) keys[r] = p.d2_ap[slot + r];
        __syncthreads();  // the copy
        block_sort(keys, p.threshold + slot, reinterpret_cast<Acc*>(p.entry + slot), positives);
        // Behind block_sort's last barrier.
        for (int32_t r = thread; r < pass.buckets; r += kThreads) empty_bucket(slot + r, r < positives);
        for (int32_t r = thread; r < positives; r += kThreads) {
          p.entry[slot + r].row = count_below<true>(p.threshold + slot, positives, p.d2_ap[slot + r]);
        }
      }
    }
#pragma unroll 1
    for (int i = warp; i < count; i += kWarps) {
      const int32_t positives = positives_of(i), slot = pass.slot(first + i);
      if (p.negatives != Negatives::hard && positives > kWarpSort) continue;
      bool is_done = false;
      if (is_short) is_done = sort_few_thresholds(p, pass, first + i, positives, s.d2_ap[i]);
      else sort_thresholds(p, pass, first + i, positives, p.d2_ap + slot);
      if (pass.in_shared) {
        if constexpr (sizeof(Acc) == 4) {
          if (is_done) continue;
          if (is_short) store_base(p, first + i, s.d2_ap[i], positives);
          else store_base(p, first + i, p.d2_ap + slot, positives);
        }
      } else {
        for (int32_t r = lane; r < pass.buckets; r += 32) empty_bucket(slot + r, r < count_buckets(p, positives));
      }
    }
    if (p.drops_pairs) {
      __syncthreads();  // pairs of all of the class
      for (int i = warp; i < count; i += kWarps) {
        drop_pairs(p, pass, s.row, i, first + i);
      }
    }
    if (thread < count) {
      p.farthest[first + thread] = 0;
      if (sizeof(Acc) == 8) p.farthest_index[first + thread] = ~0u;
    }
  }
}

// ---- phase 3: buckets in global memory, where a class does not fit, and double ------------------------------------------

// An anchor while a thread offers it negatives.
template <class Acc>
struct Searcher {
  int32_t a;  // position
  int32_t count;  // buckets; 0: not in this pass, or no positives
  int32_t bucket;  // the first
  bool want_farthest;  // nothing beyond the last threshold is known yet, so a positive may fall back
  uint64_t farthest = 0;
  uint32_t farthest_index = ~0u;
};

// -1: d serves no positive.
template <class Acc>
__device__ __forceinline__ int32_t bucket_of(const Problem<Acc>& p, const Searcher<Acc>& s, Acc d) {
  if (d != d) return -1;  // NaN is nobody's negative
  return p.negatives == Negatives::hard ? 0 : count_below<false>(p.threshold + s.bucket, s.count, d) - 1;
}

// float: the key orders by distance, then by index; one sweep.
__device__ __forceinline__ void offer(const Problem<float>& p, Searcher<float>& s, float d, uint32_t index, int) {
  const int32_t bucket = bucket_of(p, s, d);
  if (bucket < 0) return;
  const uint64_t key = pack(ordered_bits(d), index);
  uint64_t* best = p.best + s.bucket + bucket;
  if (key < load_relaxed(best)) atomic_min(best, key);
}
__device__ __forceinline__ void offer_farthest(const Problem<float>&, Searcher<float>& s, float d, uint32_t index, int) {
  const uint64_t key = pack(farthest_bits(d), ~index);
  s.farthest = key > s.farthest ? key : s.farthest;
}
__device__ __forceinline__ void store_farthest(const Problem<float>& p, const Searcher<float>& s, int) {
  if (s.farthest > load_relaxed(p.farthest + s.a)) atomic_max(p.farthest + s.a, s.farthest);
}
// double: round 0 finds the least distance of a bucket, round 1 the least index at that distance.
__device__ __forceinline__ void offer(const Problem<double>& p, Searcher<double>& s, double d, uint32_t index, int round) {
  const int32_t bucket = bucket_of(p, s, d);
  if (bucket < 0) return;
  const uint64_t bits = ordered_bits(d);
  uint64_t* best = p.best + s.bucket + bucket;
  if (round == 0 && bits < load_relaxed(best)) atomic_min(best, bits);
  if (round == 1 && bits == *best) atomicMin(p.best_index + s.bucket + bucket, index);
}
__device__ __forceinline__ void offer_farthest(const Problem<double>& p, Searcher<double>& s, double d, uint32_t index,
                                               int round) {
  const uint64_t key = farthest_bits(d);
  if (round == 0) s.farthest = key > s.farthest ? key : s.farthest;
  if (round == 1 && key == p.farthest[s.a] && index < s.farthest_index) s.farthest_index = index;
}
__device__ __forceinline__ void store_farthest(const Problem<double>& p, const Searcher<double>& s, int round) {
  if (round == 0 && s.farthest > load_relaxed(p.farthest + s.a)) atomic_max(p.farthest + s.a, s.farthest);
  if (round == 1 && s.farthest_index != ~0u) atomicMin(p.farthest_index + s.a, s.farthest_index);
}

// ---- phase 3: rules that draw ----------------------------------------------------------------------------------------

// Every (anchor, negative) has one priority: the upper half of a hash. `best` of a threshold, which is one of the anchor's
// positives, keeps the least (priority, index) of the negatives that the positive may take:
//
//   random_semi_hard  d - width < t < d  (closed: d - width <= t)      random_active  d - width < t
//
// in the unit of the rule's distance. Thresholds ascend, so a negative at d has a range of them.
template <class Acc>
struct Draw {
  const Problem<Acc>& p;
  const Acc* threshold;
  uint64_t* best;
  int32_t count;
  Acc width;
  uint64_t key;

  // splitmix64's finaliser
  __device__ __forceinline__ static uint64_t mix(uint64_t h) {
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull;
    h = (h ^ h >> 27) * 0x94d049bb133111ebull;
    return h ^ h >> 31;
  }
  __device__ __forceinline__ Acc unit(Acc d2) const { return p.euclidean ? sqrt(d2) : d2; }

  __device__ __forceinline__ Draw(const Problem<Acc>& problem, const Pass& pass, const Searcher<Acc>& anchor, int32_t index)
      : p(problem), threshold(p.threshold + anchor.bucket), best(p.best + anchor.bucket), count(anchor.count) {
    const int32_t exponent = sizeof(Acc) == 8 ? 0 : max(pass.max_exponent, -1024);
    width = ldexp(p.cosine ? 2 * p.width : p.width, (p.euclidean ? -1 : -2) * exponent);
    const int64_t place = p.anchors_are_candidates ? p.anchor_offset : p.candidates.count;
    key = mix(static_cast<uint64_t>(*p.seed) + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(place + index + 1));
  }
  __device__ __forceinline__ void offer(Acc d2, uint32_t index) const {
    if (d2 != d2) return;
    const Acc d = unit(d2), low = d - width;
    int32_t r = 0;  // thresholds before the range
    for (int32_t left = count, half; left > 0; left -= half) {
      half = (left + 1) / 2;
      const Acc t = unit(threshold[r + half - 1]);
      r += (p.closed ? t < low : t <= low) ? half : 0;
    }
    const uint64_t draw = pack(static_cast<uint32_t>(mix(key ^ (index * 0xd1342543de82ef95ull + 1)) >> 32), index);
    for (; r < count; ++r) {
      const Acc t = threshold[r];
      if (t != t || (p.negatives == Negatives::random_semi_hard && !(t < d2))) return;
      if (draw < load_relaxed(best + r)) atomic_min(best + r, draw);
    }
  }
};

// ---- phase 3 --------------------------------------------------------------------------------------------------------

// What a thread has of a part: count distances, kStep apart, of one anchor, at position a, entry i of `edge`, `place` among the
// buckets in shared memory, to candidates with these indices and, from `from` on, ranks in `order`.
template <int kStep_, class Acc>
struct Side {
  static constexpr int kStep = kStep_;
  const Edge<Acc>& edge;
  int i;
  int32_t a;
  int place, count;
  const Acc* distance;
  const int32_t* index;
  const Order& order;
  int from;
};

template <class Acc, class Side>
__device__ __forceinline__ void offer_in_global(const Problem<Acc>& p, const Pass& pass, int round, const Side& side) {
  Searcher<Acc> anchor;
  anchor.a = side.a;
  const int32_t begin = side.edge.mate_begin[side.i], end = side.edge.mate_end[side.i];
  anchor.count = pass.has(side.a) ? count_buckets(p, count_positives(p, begin, end)) : 0;
  if (anchor.count == 0) return;
  anchor.bucket = pass.bucket(side.a);
  if (draws(p)) {
    if (round > 0) return;
    const Draw<Acc> draw(p, pass, anchor, side.edge.index[side.i]);
#pragma unroll 1
    for (int j = 0; j < side.count; ++j) {
      const Acc d = side.distance[j * Side::kStep];
      if (d != kNotOffered) draw.offer(d, static_cast<uint32_t>(side.index[j]));
    }
    return;
  }
  anchor.want_farthest = !p.without_negative && load_relaxed(p.best + anchor.bucket + anchor.count - 1) == kEmpty;
#pragma unroll 1
  for (int j = 0; j < side.count; ++j) {
    const Acc d = side.distance[j * Side::kStep];
    if (d == kNotOffered) continue;
    offer(p, anchor, d, static_cast<uint32_t>(side.index[j]), round);
    if (anchor.want_farthest) offer_farthest(p, anchor, d, static_cast<uint32_t>(side.index[j]), round);
  }
  if (anchor.want_farthest) store_farthest(p, anchor, round);
}

// What offer_in_shared() returns, where the buckets are there.
template <class Acc, class Side>
__device__ __forceinline__ uint32_t offer_side(const Problem<Acc>& p, const Pass& pass, const TileShared<Acc>& s, int round,
                                               const Side& side) {
  if constexpr (sizeof(Acc) == 4) {
    if (pass.in_shared) return offer_in_shared(p, pass, s, side);
  }
  offer_in_global(p, pass, round, side);
  return 0;
}

// Moves the cursor to this block's next tile of a sweep.
//
//   plain: i <= j, each tile serving its rows and its columns,     not plain: all tiles of the pass's rows
//   where i or j holds an anchor of the pass
//
//        j  .  P  P  .  .          P: tiles that hold anchors of the pass
//     i  +----------------
//     .  |  .  x  x  .  .          x: computed. Anchors of rows i in P meet columns >= i here and the rest as
//     P  |     x  x  x  x          columns of the tiles above.
//     P  |        x  x  x
//     .  |           .  .
//
// kTileGroup rows of tiles walk along the columns together, so that L2 serves their columns and HBM only every eighth of
// them. With few tiles one row at a time: then no block's turn falls on the skipped part of a group.
template <class Acc>
__device__ void next_tile(const Problem<Acc>& p, const Pass& pass, Cursor& c) {
  const auto tiles_of = [](int32_t rows) { return (rows + kSide - 1) / kSide; };
  const int32_t pass_begin = pass.begin / kSide, pass_end = tiles_of(pass.end);
  const int32_t group = tiles_of(p.anchors.count) <= 4 * kTileGroup ? 1 : kTileGroup;
  c.is_first = c.row < 0;
  int32_t top = c.is_first ? (p.plain ? 0 : pass_begin) : c.top, next = c.is_first ? block_index() : c.next;
  c.row = -1;
  const auto take = [&](int32_t i, int32_t j) {
    c.row = i * kSide;
    c.column = j * kSide;
    c.top = top;
    c.next = next + grid_size();
  };
  if (p.plain && group == 1 && pass.is_first() && pass.is_last(p.anchors.count)) {
    // All tiles from the diagonal on, a row after the other: everybody waits for this, so it takes no more steps than it must.
    int32_t width = pass_end - top;
    if (next >= width * (width + 1) / 2) return;
    for (; next >= width; ++top, --width) next -= width;
    take(top, top + next);
    return;
  }
  for (; top < pass_end; top += group) {
    const int32_t height = min(group, pass_end - top);
    // Columns that any row of the group needs. A row above the pass needs those of the pass alone.
    const bool above = p.plain && top + height <= pass_begin;
    const int32_t left = above ? pass_begin : p.plain ? top : 0;
    const int32_t tiles = height * ((above ? pass_end : tiles_of(p.candidates.count)) - left);
    for (; next < tiles; next += grid_size()) {
      const int32_t i = top + next % height, j = left + next / height;
      const bool i_in = i >= pass_begin, j_in = j >= pass_begin && j < pass_end;
      if (p.plain && (i > j || !(i_in || j_in))) continue;
      take(i, j);
      return;
    }
    next -= tiles;
  }
}

// Calls body(side) with what this thread has of a part: of its rows and, where the tile serves both sides, of its columns.
template <class Acc, class Body>
__device__ __forceinline__ auto with_side(const Problem<Acc>& p, const TileShared<Acc>& s, int part, Body body) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  // Where both sides are served, half of the warps serve the rows: fewer anchors for each warp, more distances for each of
  // them. So many warps share 32 rows or columns:
  const bool both = serves_columns(p, *s.cursor);
  const int row_warps = both ? kWarps / 2 : kWarps, first = part * kPart<Acc>;
  if (warp < row_warps) {  // rows as anchors, lane = row
    const int each = kPart<Acc> * kWarpsPerSide / row_warps;
    const int row = warp % kWarpsPerSide * 32 + lane, from = warp / kWarpsPerSide * each;
    return body(Side<1, Acc>{*s.row, row, s.cursor->row + row, row, each, s.part() + row * kPartPitch<Acc> + from,
                             s.column->index + first + from, s.order[1], first + from});
  }
  // columns as anchors, lane = column
  constexpr int kEach = kSide * kPartWarps<Acc> / (kWarps / 2);
  const int column = warp % kPartWarps<Acc> * 32 + lane, from = (warp - row_warps) / kPartWarps<Acc> * kEach;
  return body(Side<kPartPitch<Acc>, Acc>{*s.column, first + column, s.cursor->column + first + column, kSide + column, kEach,
                                         s.part() + from * kPartPitch<Acc> + column, s.row->index + from, s.order[0], from});
}

template <class Acc>
__device__ __forceinline__ TileShared<Acc> lay_out_tile(const Problem<Acc>& p, const Pass& pass, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  return carve_tile<Acc, sizeof(Acc) == 4>(carver, layout_of(p, pass));
}

// The first tile of a sweep, so far as it does not depend on what other blocks prepare. Behind a barrier.
template <class Acc>
__device__ __forceinline__ void begin_sweep(const Problem<Acc>& p, const Pass& pass, const TileShared<Acc>& s) {
  if (thread_index() == 0) {
    s.cursor->row = -1;
    s.cursor->part_at = s.part_at;
    next_tile(p, pass, *s.cursor);
  }
  if constexpr (sizeof(Acc) == 4) {
    if (pass.in_shared) clear_beyond(pass, s.buckets());
  }
  __syncthreads();  // the cursor stands
}

// All tiles of the pass that are this block's, from the cursor's on, which is open. grid_arrive() stands behind phase 2: its
// results are waited for when the first tile's products are there.
template <Math M, class Acc>
__device__ __forceinline__ void sweep(const Problem<Acc>& p, const Pass& pass, int round, const uint32_t* ticket,
                                      const TileShared<Acc>& s) {
  const auto load_columns = [&](int part) {
    if constexpr (sizeof(Acc) == 4) {
      if (!serves_columns(p, *s.cursor)) return;
      const int from = part * kPart<Acc>;
      load_buckets<kPart<Acc>>(p, pass, s, *s.column, from, s.cursor->column + from, kSide, kSide + from);
    }
  };
  const auto load_all = [&] {
    if constexpr (sizeof(Acc) == 4) {
      if (!pass.in_shared) return;
      const OrderOfTile order(p, s);
      load_buckets<kSide>(p, pass, s, *s.row, 0, s.cursor->row, 0, 0);
      load_columns(0);
      order.store(s);
    }
  };
  if (sizeof(Acc) == 8 && round == 0) grid_wait(ticket);  // products of doubles leave no register to wait behind them
  const auto is_waiting = [&] { return sizeof(Acc) == 4 && round == 0 && s.cursor->is_first; };
#pragma unroll 1
  while (s.cursor->row >= 0) {
    if (!is_waiting()) load_all();
    if (thread_index() == 0) {
      s.cursor[1] = *s.cursor;
      next_tile(p, pass, s.cursor[1]);  // read behind the products' barriers
    }
    compute_tile<M, kPartPitch<Acc>>(
        p, layout_of(p, pass), s,
        [&](int part) {
          if (part == 0 && is_waiting()) {
            grid_wait(ticket);  // thresholds, empty buckets, the order of the tiles' rows
            load_all();
            cp_async_wait<0>();
            __syncthreads();  // the buckets
          }
          [[maybe_unused]] const uint32_t farthest =
              with_side(p, s, part, [&](const auto& side) { return offer_side(p, pass, s, round, side); });
          if constexpr (sizeof(Acc) == 4) {
            if (!pass.in_shared) return;
            __syncthreads();  // all offers are made
            if (!p.without_negative) {
              with_side(p, s, part, [&](const auto& side) { offer_farthest_in_shared(p, s, side, farthest); });
            }
            if (serves_columns(p, *s.cursor)) {
              store_buckets<kPart<Acc>>(p, pass, s, s.order[0].index, s.cursor->column + part * kPart<Acc>, kSide);
            }
            if (part + 1 < kParts<Acc>) {
              __syncthreads();  // the columns' buckets have been looked at and stored
              load_columns(part + 1);
            } else {
              store_buckets<kSide>(p, pass, s, s.order[1].index, s.cursor->row, 0);
            }
          }
        },
        [&] {
          if (!layout_of(p, pass).apart || s.cursor[1].row < 0) return;
          address_tile(p, s, s.cursor[1]);
          send_tile(p, layout_of(p, pass), s);
        });
    __syncthreads();  // the tile is done with the ring, the edges, the buckets and the cursor
    if (thread_index() == 0) *s.cursor = s.cursor[1];
    __syncthreads();  // the cursor stands
    if (s.cursor->row < 0) break;
    if (layout_of(p, pass).apart) load_edges(p, pass.max_exponent, s);
    else open_tile(p, layout_of(p, pass), pass.max_exponent, s);
  }
  if (is_waiting()) grid_wait(ticket);  // no tile at all
}

}  // namespace facenet_ext::cuda
