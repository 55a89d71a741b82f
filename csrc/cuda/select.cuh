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

// Writes the distances of all positives of the pass. Every tile that holds one is computed; a class of n rows costs about n^2
// products, rounded up to tiles.
template <Math M, class Acc>
__device__ void find_positives(const Problem<Acc>& p, const Pass& pass, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  const TileShared<Acc> s = carve_tile<Acc>(carver, p.shared_slots);
  int64_t unit = 0;  // counts tiles over all rows of tiles: the same in every block
  for (int32_t tile = pass.begin / kSide; tile * kSide < pass.end; ++tile) {
    const int32_t first_row = tile * kSide;
    // Positions are sorted by label, so the rows' classes lie in one band of candidates.
    const int32_t band_begin = p.anchors.mate_begin[max(first_row, pass.begin)];
    const int32_t band_end = p.anchors.mate_end[min(first_row + kSide, pass.end) - 1];
    for (int32_t first_column = band_begin / kSide * kSide; first_column < band_end; first_column += kSide) {
      if (unit++ % gridDim.x != blockIdx.x) continue;
      compute_tile<M>(p, p.anchors, first_row, p.candidates, first_column, pass.max_exponent, false, s, [&](int part) {
        for (int i = threadIdx.x; i < kSide * kPart<Acc>; i += kThreads) {
          const int row = i / kPart<Acc>, column = i % kPart<Acc>;  // a warp writes neighbours
          const int32_t a = first_row + row, c = first_column + part * kPart<Acc> + column;
          const int32_t begin = s.row->mate_begin[row], end = s.row->mate_end[row], own = s.row->own[row];
          if (!pass.has(a) || c < begin || c >= end || c == own || count_positives(p, begin, end) == 0) continue;
          p.d2_ap[pass.slot(a) + positive_rank(begin, own, c)] = s.part[row * (kPart<Acc> + 1) + column];
        }
      });
    }
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto positives = [&](int32_t a) { return count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a]); };
  if (pass.stride > kWarpSort) {
    for (int32_t a = pass.begin + blockIdx.x; a < pass.end; a += gridDim.x) {
      const int32_t count = positives(a);
      if (count <= kWarpSort) continue;
      const int64_t slot = pass.slot(a);
      // A copy is sorted: d2_ap stays in order of the positive. `best` is free until the buckets are emptied, `coefficient`
      // until finish().
      Acc* keys = reinterpret_cast<Acc*>(p.best + slot);
      for (int32_t i = threadIdx.x; i < count; i += kThreads) keys[i] = p.d2_ap[slot + i];
      __syncthreads();
      block_sort(keys, p.threshold + slot, p.coefficient + slot, count);
      for (int32_t r = threadIdx.x; r < count; r += kThreads) empty_bucket(p, slot + r);  // behind block_sort's last barrier
    }
  }
  for (int32_t a = pass.begin + blockIdx.x * kWarps + warp; a < pass.end; a += gridDim.x * kWarps) {
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
  const Acc* threshold;   // [count], `pitch` apart
  uint64_t* best;         // [count], `pitch` apart
  int32_t pitch;
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
  if (key >= load_relaxed(s.best + int64_t(s.count - 1) * s.pitch)) return;  // beyond the closest one of the last bucket
  uint64_t* best = s.best + int64_t(count_below<false>(s.threshold, s.count, d, s.pitch) - 1) * s.pitch;
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
  const int64_t bucket = count_below<false>(s.threshold, s.count, d, s.pitch) - 1;
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

// Sets up the anchor at position a, whose entry in the edge is i. In shared memory its buckets stand at [slot][i].
template <class Acc>
__device__ __forceinline__ Searcher<Acc> make_searcher(const Problem<Acc>& p, const Pass& pass, const Edge<Acc>& edge, int i,
                                                       int32_t a, bool in_shared, const Acc* thresholds, uint64_t* bests,
                                                       int place, int pitch) {
  Searcher<Acc> s;
  s.mate_begin = edge.mate_begin[i];
  s.mate_end = edge.mate_end[i];
  s.count = edge.index[i] >= 0 && pass.has(a) ? count_positives(p, s.mate_begin, s.mate_end) : 0;
  s.live = s.count > 0;
  s.a = a;
  s.slot = s.live ? pass.slot(a) : 0;
  s.threshold = in_shared ? thresholds + place : p.threshold + s.slot;
  s.best = in_shared ? bests + place : p.best + s.slot;
  s.pitch = in_shared ? pitch : 1;
  if (s.live) {
    s.lowest = s.threshold[0];
    s.want_farthest = !p.skip_fallback && load_relaxed(s.best + int64_t(s.count - 1) * s.pitch) == kEmpty;
  }
  return s;
}

// Copies the buckets of `width` anchors from position `first` on to shared memory, or back what has become better.
template <class Acc>
__device__ void load_buckets(const Problem<Acc>& p, const Pass& pass, const Edge<Acc>& edge, int from, int32_t first, int width,
                             Acc* thresholds, uint64_t* bests) {
  for (int i = threadIdx.x; i < width * pass.stride; i += kThreads) {
    const int place = i % width, r = i / width;  // lane = anchor: no bank conflict here, 8 thresholds per sector there
    const int32_t a = first + place;
    if (edge.index[from + place] < 0 || !pass.has(a)) continue;
    if (r >= count_positives(p, edge.mate_begin[from + place], edge.mate_end[from + place])) continue;
    thresholds[r * width + place] = p.threshold[pass.slot(a) + r];
    bests[r * width + place] = load_relaxed(p.best + pass.slot(a) + r);
  }
}
template <class Acc>
__device__ void store_buckets(const Problem<Acc>& p, const Pass& pass, const Edge<Acc>& edge, int from, int32_t first, int width,
                              const uint64_t* bests) {
  for (int i = threadIdx.x; i < width * pass.stride; i += kThreads) {
    const int place = i / pass.stride, r = i % pass.stride;  // lane = bucket: one atomic per sector of four
    const int32_t a = first + place;
    if (edge.index[from + place] < 0 || !pass.has(a)) continue;
    if (r >= count_positives(p, edge.mate_begin[from + place], edge.mate_end[from + place])) continue;
    const uint64_t key = bests[r * width + place];
    uint64_t* best = p.best + pass.slot(a) + r;
    if (key < load_relaxed(best)) atomic_min(best, key);
  }
}

// The tiles of a sweep, in an order that keeps kTileGroup rows of tiles and the columns they meet in L2.
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
struct TileWalk {
  int32_t row_tiles, column_tiles;  // of the whole problem
  int32_t pass_begin, pass_end;     // tiles that hold anchors of the pass
  bool plain;
  int32_t group;                    // rows of tiles in a group

  // Calls body(i, j) for this block's tiles.
  template <class Body>
  __device__ __forceinline__ void walk(Body body) const {
    int64_t next = blockIdx.x, counted = 0;  // tiles of the groups before this one
    for (int32_t top = plain ? 0 : pass_begin; top < pass_end; top += group) {
      const int32_t height = min(group, pass_end - top);
      // Columns that any row of the group needs. A row above the pass needs those of the pass alone.
      const int32_t left = plain ? (top + height <= pass_begin ? pass_begin : top) : 0;
      const int32_t right = plain && top + height <= pass_begin ? pass_end : column_tiles;
      const int64_t tiles = int64_t(height) * (right - left);
      for (; next < counted + tiles; next += gridDim.x) {
        const int32_t i = top + static_cast<int32_t>((next - counted) % height);
        const int32_t j = left + static_cast<int32_t>((next - counted) / height);
        const bool i_in = i >= pass_begin, j_in = j >= pass_begin && j < pass_end;
        if (!plain || (i <= j && (i_in || j_in))) body(i, j);
      }
      counted += tiles;
    }
  }
};

template <Math M, class Acc>
__device__ void sweep(const Problem<Acc>& p, const Pass& pass, int round, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  const TileShared<Acc> s = carve_tile<Acc>(carver, p.shared_slots);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool in_shared = sizeof(Acc) == 4 && pass.stride <= p.shared_slots;
  constexpr int kColumnsEach = kPart<Acc> / kWarpsPerSide;           // rows' side: kWarpsPerSide warps share 32 rows
  constexpr int kRowWarps = kWarps / kPartWarps<Acc>;                // columns' side: so many warps share 32 columns
  constexpr int kRowsEach = kSide / kRowWarps;
  const auto tiles = [](int32_t count) { return (count + kSide - 1) / kSide; };
  const TileWalk walk{tiles(p.anchors.count), tiles(p.candidates.count), pass.begin / kSide, tiles(pass.end), p.plain,
                      // Few tiles: one row at a time wastes none of the skipped triangle on a block.
                      tiles(p.anchors.count) <= 4 * kTileGroup ? 1 : kTileGroup};
  walk.walk([&](int32_t i, int32_t j) {
    const int32_t first_row = i * kSide, first_column = j * kSide;
    const bool both = p.plain && i != j;
    const int my_row = warp % kWarpsPerSide * 32 + lane, my_column = warp % kPartWarps<Acc> * 32 + lane;
    compute_tile<M>(p, p.anchors, first_row, p.candidates, first_column, pass.max_exponent, both, s, [&](int part) {
      const int32_t part_column = first_column + part * kPart<Acc>;
      if (in_shared) {
        if (part == 0) load_buckets(p, pass, *s.row, 0, first_row, kSide, s.row_threshold, s.row_best);
        if (both) {
          load_buckets(p, pass, *s.column, part * kPart<Acc>, part_column, kPart<Acc>, s.column_threshold, s.column_best);
        }
        __syncthreads();  // the buckets are there
      }
      // Rows as anchors, lane = row; the warps of a row's group divide the part's columns.
      Searcher<Acc> row = make_searcher(p, pass, *s.row, my_row, first_row + my_row, in_shared, s.row_threshold, s.row_best,
                                        my_row, kSide);
      if (row.live) {
        for (int n = 0; n < kColumnsEach; ++n) {
          const int column = warp / kWarpsPerSide * kColumnsEach + n;
          const int32_t c = part_column + column;
          if (c >= p.candidates.count || (c >= row.mate_begin && c < row.mate_end)) continue;
          offer(p, row, s.part[my_row * (kPart<Acc> + 1) + column],
                static_cast<uint32_t>(s.column->index[part * kPart<Acc> + column]), round);
        }
      }
      offer_farthest(p, row, round);
      if (both) {  // columns as anchors, lane = column
        const int place = part * kPart<Acc> + my_column;
        Searcher<Acc> column = make_searcher(p, pass, *s.column, place, first_column + place, in_shared, s.column_threshold,
                                             s.column_best, my_column, kPart<Acc>);
        if (column.live) {
          for (int n = 0; n < kRowsEach; ++n) {
            const int other = warp / kPartWarps<Acc> * kRowsEach + n;
            const int32_t r = first_row + other;
            if (r >= p.anchors.count || (r >= column.mate_begin && r < column.mate_end)) continue;
            offer(p, column, s.part[other * (kPart<Acc> + 1) + my_column], static_cast<uint32_t>(s.row->index[other]), round);
          }
        }
        offer_farthest(p, column, round);
      }
      if (in_shared) {
        __syncthreads();  // all offers are made
        if (part == kParts<Acc> - 1) store_buckets(p, pass, *s.row, 0, first_row, kSide, s.row_best);
        if (both) store_buckets(p, pass, *s.column, part * kPart<Acc>, part_column, kPart<Acc>, s.column_best);
        // compute_tile()'s barriers stand between this and the next load
      }
    });
  });
}

}  // namespace facenet_ext::cuda
