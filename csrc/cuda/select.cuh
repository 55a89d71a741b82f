// Phases 2 to 4 of a pass: from operands to the closest negative of every bucket.
//
//   2 positives   tiles along the diagonal    ->  d2_ap     [anchors of the pass, stride]
//   3 thresholds  sorted per anchor           ->  threshold
//   4 sweep       all tiles                   ->  best: per bucket the least (distance, index)
//
// Bucket r of an anchor takes its negatives with threshold[r] < d <= threshold[r + 1]; those not farther than threshold[0] serve
// no positive. finish.cuh turns minima into suffix minima, which are the semi-hard negatives.
//
// Both kinds of distances come from compute_tile(), so equal rows give equal bits in both.
#pragma once

#include "tile.cuh"

namespace facenet_ext::cuda {

constexpr uint64_t kEmpty = ~uint64_t(0);  // a bucket without negative: above every distance, NaN included

// ---- phase 2 --------------------------------------------------------------------------------------------------------

// Moves the cursor to this block's next tile that holds positives of the pass. A class of n rows costs about n^2 products,
// rounded up to tiles. Positions are sorted by label, so the classes of a row of tiles lie in one band of candidates.
template <class Acc>
__device__ void next_positive_tile(const Problem<Acc>& p, const Pass& pass, Cursor& c) {
  for (;;) {
    if (c.row >= 0) {
      c.column += kSide;
    } else {
      c.row = pass.begin / kSide * kSide - kSide;  // the first call
      c.column = c.band_end = 0;
    }
    while (c.column >= c.band_end) {
      c.row += kSide;
      if (c.row >= pass.end) {
        c.row = -1;
        return;
      }
      c.column = p.anchors.mate_begin[max(c.row, pass.begin)] / kSide * kSide;
      c.band_end = p.anchors.mate_end[min(c.row + kSide, pass.end) - 1];
    }
    if (c.unit++ % grid_size() == block_index()) return;
  }
}

template <class Acc>
__device__ __forceinline__ void store_positives(const Problem<Acc>& p, const Pass& pass, const TileShared<Acc>& s,
                                                int part) {
  for (int i = thread_index(); i < kSide * kPart<Acc>; i += kThreads) {
    const int row = i / kPart<Acc>, column = i % kPart<Acc>;  // a warp writes neighbours
    const int32_t a = s.cursor->row + row, c = s.cursor->column + part * kPart<Acc> + column;
    const int32_t begin = s.row->mate_begin[row], end = s.row->mate_end[row], own = s.row->own[row];
    if (!pass.has(a) || c < begin || c >= end || c == own || count_positives(p, begin, end) == 0) continue;
    p.d2_ap[pass.slot(a) + positive_rank(begin, own, c)] = s.part[row * (kPart<Acc> + 1) + column];
  }
}

// ---- phase 3 --------------------------------------------------------------------------------------------------------

template <class Acc>
__device__ __forceinline__ void empty_bucket(const Problem<Acc>& p, int64_t slot) {
  p.best[slot] = kEmpty;
  if (sizeof(Acc) == 8) p.best_index[slot] = ~0u;
}

// Sorts every anchor's distances and empties its buckets: a warp per anchor, a block where there are more than kWarpSort.
template <class Acc>
__device__ void sort_thresholds(const Problem<Acc>& p, const Pass& pass) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const auto positives = [&](int32_t a) { return count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a]); };
  if (pass.stride > kWarpSort) {
    for (int32_t a = pass.begin + block_index(); a < pass.end; a += grid_size()) {
      const int32_t count = positives(a);
      if (count <= kWarpSort) continue;
      const int64_t slot = pass.slot(a);
      // A copy is sorted: d2_ap stays in order of the positive. `best` is free until the buckets are emptied, `coefficient`
      // until finish().
      Acc* keys = reinterpret_cast<Acc*>(p.best + slot);
      for (int32_t i = thread_index(); i < count; i += kThreads) keys[i] = p.d2_ap[slot + i];
      __syncthreads();
      block_sort(keys, p.threshold + slot, p.coefficient + slot, count);
      for (int32_t r = thread_index(); r < count; r += kThreads) empty_bucket(p, slot + r);  // behind block_sort's last barrier
    }
  }
  for (int32_t a = pass.begin + block_index() * kWarps + warp; a < pass.end; a += grid_size() * kWarps) {
    const int32_t count = positives(a);
    const int64_t slot = pass.slot(a);
    if (count <= kWarpSort) {
      warp_sort(p.d2_ap + slot, p.threshold + slot, count);
      for (int32_t r = lane; r < count; r += 32) empty_bucket(p, slot + r);
    }
    if (lane == 0) p.farthest[a] = 0;
    if (lane == 0 && sizeof(Acc) == 8) p.farthest_index[a] = ~0u;
  }
}

// ---- phase 4 --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t pack(uint32_t high, uint32_t low) { return uint64_t(high) << 32 | low; }

// An anchor while a thread offers it negatives.
template <class Acc>
struct Searcher {
  bool live = false;      // in this pass, with positives
  bool want_farthest;     // nothing beyond the last threshold is known yet, so a positive may fall back
  int32_t count;          // positives
  int32_t mate_begin, mate_end;
  int32_t a;              // position
  int64_t slot;
  const Acc* threshold;   // [count], threshold_pitch apart
  uint64_t* best;         // [count], best_pitch apart
  int32_t threshold_pitch, best_pitch;
  Acc lowest;             // threshold[0]
  uint64_t farthest = 0;
  uint32_t farthest_index = ~0u;
};

// float: the key orders by distance, then by index; one sweep. "Farthest" keys are shifted by one so that NaN is the nearest.
__device__ __forceinline__ void offer(const Problem<float>&, Searcher<float>& s, float d, uint32_t index, int) {
  const uint32_t bits = ordered_bits(d);
  if (s.want_farthest) {
    const uint64_t key = pack(d == d ? bits + 1 : 0, ~index);
    s.farthest = key > s.farthest ? key : s.farthest;
  }
  if (!(d > s.lowest)) return;  // NaN leaves here
  const uint64_t key = pack(bits, index);
  if (key >= load_relaxed(s.best + int64_t(s.count - 1) * s.best_pitch)) return;  // beyond the closest one of the last bucket
  uint64_t* best = s.best + int64_t(count_below<false>(s.threshold, s.count, d, s.threshold_pitch) - 1) * s.best_pitch;
  if (key < load_relaxed(best)) atomic_min(best, key);
}
// double: round 0 finds the least distance of a bucket, round 1 the least index at that distance.
__device__ __forceinline__ void offer(const Problem<double>& p, Searcher<double>& s, double d, uint32_t index, int round) {
  const uint64_t bits = ordered_bits(d);
  if (s.want_farthest) {
    const uint64_t key = d == d ? bits + 1 : 0;
    if (round == 0) s.farthest = key > s.farthest ? key : s.farthest;
    if (round == 1 && key == p.farthest[s.a] && index < s.farthest_index) s.farthest_index = index;
  }
  if (!(d > s.lowest)) return;
  const int64_t bucket = count_below<false>(s.threshold, s.count, d) - 1;
  if (round == 0 && bits < load_relaxed(s.best + bucket)) atomic_min(s.best + bucket, bits);
  if (round == 1 && bits == s.best[bucket]) atomicMin(p.best_index + s.slot + bucket, index);
}
__device__ __forceinline__ void offer_farthest(const Problem<float>& p, const Searcher<float>& s, int) {
  if (s.live && s.farthest > load_relaxed(p.farthest + s.a)) atomic_max(p.farthest + s.a, s.farthest);
}
__device__ __forceinline__ void offer_farthest(const Problem<double>& p, const Searcher<double>& s, int round) {
  if (!s.live) return;
  if (round == 0 && s.farthest > load_relaxed(p.farthest + s.a)) atomic_max(p.farthest + s.a, s.farthest);
  if (round == 1 && s.farthest_index != ~0u) atomicMin(p.farthest_index + s.a, s.farthest_index);
}

// Sets up the anchor at position a, whose entry in the edge is i. thresholds, bests: its bucket 0 in shared memory, or null.
template <class Acc>
__device__ __forceinline__ Searcher<Acc> make_searcher(const Problem<Acc>& p, const Pass& pass, const Edge<Acc>& edge, int i,
                                                       int32_t a, const Acc* thresholds, uint64_t* bests) {
  Searcher<Acc> s;
  s.mate_begin = edge.mate_begin[i];
  s.mate_end = edge.mate_end[i];
  s.count = edge.index[i] >= 0 && pass.has(a) ? count_positives(p, s.mate_begin, s.mate_end) : 0;
  s.live = s.count > 0;
  s.a = a;
  s.slot = s.live ? pass.slot(a) : 0;
  const bool in_shared = bests != nullptr;
  s.threshold = in_shared ? thresholds : p.threshold + s.slot;
  s.best = in_shared ? bests : p.best + s.slot;
  s.threshold_pitch = in_shared ? int32_t(sizeof(Buckets<Acc>) / sizeof(Acc)) : 1;
  s.best_pitch = in_shared ? int32_t(sizeof(Buckets<Acc>) / sizeof(uint64_t)) : 1;
  s.want_farthest = false;
  if (s.live) {
    s.lowest = s.threshold[0];
    s.want_farthest = !p.skip_fallback && load_relaxed(s.best + int64_t(s.count - 1) * s.best_pitch) == kEmpty;
  }
  return s;
}

// Copies the buckets of `width` anchors from position `first` on, entries `from` and up of the edge, to shared memory.
// thresholds, bests: bucket 0 of the first of them.
template <class Acc>
__device__ void load_buckets(const Problem<Acc>& p, const Pass& pass, const Edge<Acc>& edge, int from, int32_t first, int width,
                             Acc* thresholds, uint64_t* bests) {
  for (int i = thread_index(); i < width * pass.stride; i += kThreads) {
    const int place = i % width, r = i / width;  // lane = anchor: no bank conflict here, 8 thresholds per sector there
    const int32_t a = first + place;
    if (edge.index[from + place] < 0 || !pass.has(a)) continue;
    if (r >= count_positives(p, edge.mate_begin[from + place], edge.mate_end[from + place])) continue;
    thresholds[r * (sizeof(Buckets<Acc>) / sizeof(Acc)) + place] = p.threshold[pass.slot(a) + r];
    bests[r * (sizeof(Buckets<Acc>) / sizeof(uint64_t)) + place] = load_relaxed(p.best + pass.slot(a) + r);
  }
}
// And back what has become better.
template <class Acc>
__device__ void store_buckets(const Problem<Acc>& p, const Pass& pass, const Edge<Acc>& edge, int from, int32_t first, int width,
                              const uint64_t* bests) {
  for (int i = thread_index(); i < width * pass.stride; i += kThreads) {
    const int place = i / pass.stride, r = i % pass.stride;  // lane = bucket: one atomic per sector of four
    const int32_t a = first + place;
    if (edge.index[from + place] < 0 || !pass.has(a)) continue;
    if (r >= count_positives(p, edge.mate_begin[from + place], edge.mate_end[from + place])) continue;
    const uint64_t key = bests[r * (sizeof(Buckets<Acc>) / sizeof(uint64_t)) + place];
    uint64_t* best = p.best + pass.slot(a) + r;
    if (key < load_relaxed(best)) atomic_min(best, key);
  }
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
// kTileGroup rows of tiles walk along the columns together, so that L2 serves their columns and HBM only every eighth of them.
// With few tiles one row at a time: then no block's turn falls on the skipped part of a group.
template <class Acc>
__device__ void next_sweep_tile(const Problem<Acc>& p, const Pass& pass, Cursor& c) {
  const auto tiles_of = [](int32_t rows) { return (rows + kSide - 1) / kSide; };
  const int32_t pass_begin = pass.begin / kSide, pass_end = tiles_of(pass.end);
  const int32_t group = tiles_of(p.anchors.count) <= 4 * kTileGroup ? 1 : kTileGroup;
  if (c.row < 0) {  // the first call
    c.top = p.plain ? 0 : pass_begin;
    c.next = block_index();
  }
  for (; c.top < pass_end; c.top += group) {
    const int32_t height = min(group, pass_end - c.top);
    // Columns that any row of the group needs. A row above the pass needs those of the pass alone.
    const bool above = p.plain && c.top + height <= pass_begin;
    const int32_t left = above ? pass_begin : p.plain ? c.top : 0;
    const int32_t tiles = height * ((above ? pass_end : tiles_of(p.candidates.count)) - left);
    while (c.next < tiles) {
      const int32_t i = c.top + c.next % height, j = left + c.next / height;
      c.next += grid_size();
      const bool i_in = i >= pass_begin, j_in = j >= pass_begin && j < pass_end;
      if (p.plain && (i > j || !(i_in || j_in))) continue;
      c.row = i * kSide;
      c.column = j * kSide;
      return;
    }
    c.next -= tiles;
  }
  c.row = -1;
}

// Offers the negatives of a part to the anchors of its rows and, where the tile serves both sides, of its columns.
template <class Acc>
__device__ __forceinline__ void offer_part(const Problem<Acc>& p, const Pass& pass, const TileShared<Acc>& s, int part,
                                           bool both, int round) {
  constexpr int kColumnsEach = kPart<Acc> / kWarpsPerSide;  // rows' side: kWarpsPerSide warps share 32 rows
  constexpr int kRowWarps = kWarps / kPartWarps<Acc>;       // columns' side: so many warps share 32 columns
  constexpr int kRowsEach = kSide / kRowWarps;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const bool in_shared = sizeof(Acc) == 4 && pass.stride <= p.shared_slots;
  const int32_t first_row = s.cursor->row, first_column = s.cursor->column, part_column = first_column + part * kPart<Acc>;
  if (in_shared) {
    if (part == 0) load_buckets(p, pass, *s.row, 0, first_row, kSide, s.buckets->row_threshold, s.buckets->row_best);
    if (both) {
      load_buckets(p, pass, *s.column, part * kPart<Acc>, part_column, kPart<Acc>, s.buckets->column_threshold,
                   s.buckets->column_best);
    }
    __syncthreads();  // the buckets are there
  }
  {  // rows as anchors, lane = row; the warps of a row's group divide the part's columns
    const int place = warp % kWarpsPerSide * 32 + lane;
    Searcher<Acc> row =
        make_searcher(p, pass, *s.row, place, first_row + place, in_shared ? s.buckets->row_threshold + place : nullptr,
                      in_shared ? s.buckets->row_best + place : nullptr);
    if (row.live) {
#pragma unroll 1
      for (int i = 0; i < kColumnsEach; ++i) {
        const int column = warp / kWarpsPerSide * kColumnsEach + i;
        const int32_t c = part_column + column;
        if (c >= p.candidates.count || (c >= row.mate_begin && c < row.mate_end)) continue;
        offer(p, row, s.part[place * (kPart<Acc> + 1) + column],
              static_cast<uint32_t>(s.column->index[part * kPart<Acc> + column]), round);
      }
    }
    offer_farthest(p, row, round);
  }
  if (both) {  // columns as anchors, lane = column
    const int in_part = warp % kPartWarps<Acc> * 32 + lane, place = part * kPart<Acc> + in_part;
    Searcher<Acc> column = make_searcher(p, pass, *s.column, place, first_column + place,
                                         in_shared ? s.buckets->column_threshold + in_part : nullptr,
                                         in_shared ? s.buckets->column_best + in_part : nullptr);
    if (column.live) {
#pragma unroll 1
      for (int i = 0; i < kRowsEach; ++i) {
        const int other = warp / kPartWarps<Acc> * kRowsEach + i;
        const int32_t r = first_row + other;
        if (r >= p.anchors.count || (r >= column.mate_begin && r < column.mate_end)) continue;
        offer(p, column, s.part[other * (kPart<Acc> + 1) + in_part], static_cast<uint32_t>(s.row->index[other]), round);
      }
    }
    offer_farthest(p, column, round);
  }
  if (in_shared) {
    __syncthreads();  // all offers are made
    if (part == kParts<Acc> - 1) store_buckets(p, pass, *s.row, 0, first_row, kSide, s.buckets->row_best);
    if (both) {
      store_buckets(p, pass, *s.column, part * kPart<Acc>, part_column, kPart<Acc>, s.buckets->column_best);
    }
    // barriers of the next part or tile stand between this and the next load
  }
}

// ---- phases 2 and 4 -------------------------------------------------------------------------------------------------

// All tiles of the pass's task that are this block's. One function, one loop over k, for both tasks: d_ap and d_an come from the same
// instructions.
template <Math M, class Acc>
__device__ __forceinline__ void visit_tiles(const Problem<Acc>& p, const Pass& pass, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  const TileShared<Acc> s = carve_tile<Acc>(carver, p.shared_slots);
  if (thread_index() == 0) {
    s.cursor->row = -1;
    s.cursor->unit = 0;
  }
#pragma unroll 1
  for (;;) {
    __syncthreads();  // the tile before is done with the ring, the edges and the cursor
    if (thread_index() == 0) {
      if (pass.task == kPositives) {
        next_positive_tile(p, pass, *s.cursor);
      } else {
        next_sweep_tile(p, pass, *s.cursor);
      }
    }
    __syncthreads();  // the cursor stands
    if (s.cursor->row < 0) return;
    compute_tile<M>(p, pass, s, [&](int part) {
      if (pass.task == kPositives) {
        store_positives(p, pass, s, part);
      } else {
        offer_part(p, pass, s, part, serves_columns(p, pass, *s.cursor), pass.task);
      }
    });
  }
}

}  // namespace facenet_ext::cuda
