// Phase 5 of the rules that give every negative a term: all distances, once as the row's and once as the column's.
//
// A block owns a strip of kSide rows and a chunk of the columns. It goes through the tiles of that chunk, part by part, and
// each part of distances becomes in place the part of weights V, which a second product uses up:
//
//        columns j of the chunk                    V[i][j] = w(anchor i, negative j) + w(anchor j, negative i)
//      +-------+-------+-------+
//    i | V, d2 |  ->   |       |  strip            partial[chunk][i] += sum_j V[i][j] x_j  -  (sum_j V[i][j]) x_i
//      +-------+-------+-------+
//        x_j in slices of kSlice dimensions        w = number of active thresholds of the anchor (over d if euclidean)
//
// Near pairs (dense.cuh) are measured before they are weighed, and V is below 0 where they are until their differences
// x_j - x_i have been added one by one.
//
// Nobody else adds to these sums, in whatever order blocks run: no atomics, the same bits always. Both sides' weights come
// from the thread that has the distance: its row's thresholds lie in shared memory, lane = row, free of bank conflicts; the
// column's are the same for the whole warp and come from L1. Only the row's side counts: histograms of ranks, integers.
//
// Anchors and candidates that are not the same rows are swept twice, each set as rows once (DenseProblem::side): the first
// time counts and adds to the anchors' sums, the second adds to the candidates'.
//
// Per kSide x kSide tile: FLOPs 3 x 2 kSide^2 D on tensor cores (split), 2 kSide^2 D on CUDA cores; bytes of L2 (2 kSide
// pitch) + (kSide + 4 kSide kSide / kPart) D Acc: operands, x_j, sums read and written per part.
#pragma once

#include "dense.cuh"

namespace facenet_ext::cuda {

constexpr int kRowsEach = kSide / kWarps;  // rows of a warp
template <class Acc>
constexpr int kSliceEach = sizeof(Acc) == 4 ? 4 : 1;  // dimensions of a lane
template <class Acc>
constexpr int kSlice = 32 * kSliceEach<Acc>;  // dimensions that are summed together
template <class Acc>
constexpr int kDepth = 16 * kWarpsPerSide / int(sizeof(Acc));  // rows x_j in shared memory at a time
template <class Acc>
constexpr int kColumnsEach = kPart<Acc> / kWarpsPerSide;  // weights of a thread
template <class Acc>
constexpr int kTogether = sizeof(Acc) == 4 ? 4 : 1;  // of them

struct DenseItem {  // what a block works on
  int32_t unit, side, chunk;
  int32_t row;                 // first position of the strip; < 0: nothing is left
  int32_t column, column_end;  // next tile of the chunk
  int32_t* histogram;          // SweepShared::active, here so that no register holds where it begins
};

template <class Acc>
struct SweepShared {
  TileShared<Acc> tile;
  DenseItem* item;
  Acc* total;      // in the ring's memory behind the part: [kWarpsPerSide][kSide] sums of a part over its columns: of V,
  Acc* loss;       //   of active (d - middle threshold),
  Acc* d2_an;      //   of terms d2;
  Acc* x;          //   [kDepth][kSlice] rows x_j
  double* sums;    // [2][kSide] of the chunk: loss, d2_an
  uint32_t* any;   // [kWarps] which of a warp's rows have a weight
  uint32_t* near;  // [kWarps] which of them have a near pair: its weight, if it has one, is below 0
  uint64_t* counts;  // [3] hard, semi-hard, terms
  Acc* threshold;  // [shared_slots][kSide]
  int32_t* active;  // [shared_slots][kSide] the histogram; read from `item`
};

// A tile's distances, later weights: in the ring's memory.
template <class Acc>
__device__ __forceinline__ Acc* part_of(const SweepShared<Acc>& s) {
  return reinterpret_cast<Acc*>(s.tile.ring);
}

template <class Acc>
__host__ __device__ SweepShared<Acc> carve_sweep(Carver& carver, int32_t slots) {
  constexpr int64_t kPartElements = int64_t(kSide) * (kPart<Acc> + 1), kSums = kWarpsPerSide * kSide;
  static_assert((kPartElements + 3 * kSums + kDepth<Acc> * kSlice<Acc>)*sizeof(Acc) <=
                int64_t(kStages) * 2 * kSide * kStageBytes);
  SweepShared<Acc> s;
  s.tile = carve_tile<Acc, false>(carver, narrow_ring());
  s.total = reinterpret_cast<Acc*>(s.tile.ring) + kPartElements;
  s.loss = s.total + kSums;
  s.d2_an = s.loss + kSums;
  s.x = s.d2_an + kSums;
  s.item = carver.take<DenseItem>(1);
  s.sums = carver.take<double>(2 * kSide);
  s.any = carver.take<uint32_t>(kWarps);
  s.near = carver.take<uint32_t>(kWarps);
  s.counts = carver.take<uint64_t>(3);
  s.threshold = carver.take<Acc>(int64_t(slots) * kSide);
  s.active = carver.take<int32_t>(int64_t(slots) * kSide);
  return s;
}

// Of the ascending t[0 .. count), `pitch` apart: how many are < x[j] (kOrEqual: <= x[j]). N searches go hand in hand, so that
// their loads overlap; entry j has its thresholds `offset[j]` behind t.
template <bool kOrEqual, int N, class Acc>
__device__ __forceinline__ void rank(const Acc* t, const int32_t (&offset)[N], int32_t pitch, int32_t count,
                                     const Acc (&x)[N], int32_t (&below)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) below[j] = 0;
#pragma unroll 1
  for (int32_t left = count, half; left > 0; left -= half) {
    half = (left + 1) / 2;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Acc middle = t[offset[j] + (below[j] + half - 1) * pitch];
      below[j] += (kOrEqual ? middle <= x[j] : middle < x[j]) ? half : 0;
    }
  }
}

// The ranks of N anchors' thresholds that a negative at distance d makes terms with. Behind an anchor's own thresholds stand
// infinite ones, `count` of all.
template <int N>
struct Ranks {
  int32_t from[N], to[N];  // active ones
  int32_t term[N];         // terms are term .. to
  int32_t farther[N];      // thresholds < d; only if asked for
};
template <int N, class Acc>
__device__ __forceinline__ void find_ranks(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, const Acc* t,
                                           const int32_t (&offset)[N], int32_t pitch, int32_t count, const int32_t (&own)[N],
                                           const Acc (&d)[N], bool asked, Ranks<N>& r) {
  Acc x[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    x[j] = d[j] - pass.margin;
    r.to[j] = own[j];
    r.term[j] = r.farther[j] = 0;
  }
  rank<true>(t, offset, pitch, count, x, r.from);
  if (p.above || asked) rank<false>(t, offset, pitch, count, d, r.farther);
  if (!p.above) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    r.to[j] = r.farther[j];
    r.term[j] = r.from[j] = min(r.from[j], r.to[j]);
    x[j] = d[j] - pass.band;
  }
  if (!p.closed) return;
  rank<false>(t, offset, pitch, count, x, r.term);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    r.term[j] = min(r.term[j], r.to[j]);
    r.from[j] = max(r.from[j], r.term[j]);
  }
}

template <class Acc>
__device__ __forceinline__ bool in_shared(const DenseProblem<Acc>& p, const DensePass<Acc>& pass) {
  return pass.thresholds <= p.shared_slots;
}

template <class Acc>
__device__ __forceinline__ bool multiplies(const DenseProblem<Acc>& p, const DenseItem& item) {
  return item.side == 0 ? p.multiplies[0] : p.multiplies[1];
}

// Whether a tile's side that begins at `first` holds anchors of the pass.
template <class Acc>
__device__ __forceinline__ bool meets(const DensePass<Acc>& pass, int32_t first) {
  return first < pass.end && first + kSide > pass.begin;
}

// Moves on to the next strip and chunk of this block, or to the next tile of the chunk that anything is to be done with.
template <class Acc>
__device__ void next_item(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, DenseItem& item) {
  for (;;) {
    int32_t unit = item.unit = item.unit < 0 ? block_index() : item.unit + grid_size();
    item.row = -1;
    for (int side = 0; side < (p.side[0].plain || !p.multiplies[1] ? 1 : 2); ++side) {
      const Problem<Acc>& q = p.side[side];
      const int32_t rows = (q.anchors.count + kSide - 1) / kSide, columns = (q.candidates.count + kSide - 1) / kSide;
      const int32_t chunks = min(pass.chunks, columns);
      if (unit < rows * chunks) {
        item.side = side;
        item.chunk = unit % chunks;
        item.row = unit / chunks * kSide;
        item.column = static_cast<int32_t>(int64_t(columns) * item.chunk / chunks) * kSide;
        item.column_end = static_cast<int32_t>(int64_t(columns) * (item.chunk + 1) / chunks) * kSide;
        break;
      }
      unit -= rows * chunks;
    }
    if (item.row < 0) return;
    if (item.side == 1 || meets(pass, item.row) || (p.side[0].plain && p.multiplies[0])) return;
  }
}
template <class Acc>
__device__ void next_tile_of(const DensePass<Acc>& pass, DenseItem& item, Cursor& cursor) {
  cursor.row = -1;
  cursor.part_at = 0;
  for (; item.column < item.column_end && cursor.row < 0; item.column += kSide) {
    if (!(item.side == 0 && meets(pass, item.row)) && !meets(pass, item.column)) continue;
    cursor.row = item.row;
    cursor.column = item.column;
  }
}

// Measures the near pairs of a part anew, and marks them: their distances get a minus, which their weights keep. A lane has a
// row, a warp some of the columns, as in weigh_part().
template <class Acc>
__device__ __forceinline__ void find_near(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, const SweepShared<Acc>& s,
                                          int part) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int group = warp / kWarpsPerSide, first_row = warp % kWarpsPerSide * 32;
  const int first_column = part * kPart<Acc> + group * kColumnsEach<Acc>;
  Acc* const cells = part_of(s) + (first_row + lane) * (kPart<Acc> + 1) + group * kColumnsEach<Acc>;
  uint32_t near = 0;  // of this lane's cells
#pragma unroll 4
  for (int j = 0; j < kColumnsEach<Acc>; ++j) {
    near |= is_near(cells[j], s.tile.row->norm[first_row + lane], s.tile.column->norm[first_column + j]) ? 1u << j : 0u;
  }
  const uint32_t lanes = __ballot_sync(kWholeWarp, near != 0);
  if (lane == 0) s.near[warp] = lanes;
  if (lanes == 0) return;
#pragma unroll 1
  for (int j = 0; j < kColumnsEach<Acc>; ++j) {
#pragma unroll 1
    for (uint32_t left = __ballot_sync(kWholeWarp, (near >> j & 1) != 0); left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      const Acc d2 =
          direct_distance(p, pass, s.item->side, s.tile.row->index[first_row + from], s.tile.column->index[first_column + j]);
      if (lane == from) cells[j] = -d2;
    }
  }
}

// Turns the distances of a part into weights, and counts what the rows' anchors have of them. A lane has a row, a warp some
// of the columns, kTogether at a time. Weights of near pairs are below 0 and not in the row's total: add_near() adds them.
template <class Acc>
__device__ __forceinline__ void weigh_part(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, const SweepShared<Acc>& s,
                                           int part) {
  constexpr int N = kTogether<Acc>;
  const Problem<Acc>& q = p.side[s.item->side];
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int group = warp / kWarpsPerSide, place = warp % kWarpsPerSide * 32 + lane, at = group * kSide + place;
  const int32_t row = s.tile.cursor->row + place,
                first = s.tile.cursor->column + part * kPart<Acc> + group * kColumnsEach<Acc>;
  Acc* const cells = part_of(s) + place * (kPart<Acc> + 1) + group * kColumnsEach<Acc>;
  const bool rows_are_anchors = s.item->side == 0, counted = p.stats || p.closed;
  const bool columns_are_anchors = multiplies(p, *s.item) && (!rows_are_anchors || q.plain);
  const int32_t mate_begin = s.tile.row->mate_begin[place], mate_end = s.tile.row->mate_end[place];
  const int32_t columns_end = row < q.anchors.count ? q.candidates.count : 0;  // nothing for a row beyond the end

  // The row as an anchor. One that is none, or not of this pass, searches some other's thresholds in vain: count is 0.
  const int32_t anchor = max(pass.begin, min(row, pass.end - 1));
  const bool shared = in_shared(p, pass);
  const int32_t count = rows_are_anchors && anchor == row ? p.count[row] : 0, pitch = shared ? kSide : 1;
  const Acc* const t = shared ? s.threshold + place : pass.threshold + pass.slot(anchor);
  int32_t* const active = shared ? s.item->histogram + place : pass.active(pass.slot(anchor));
  const Acc middle = count > 0 ? t[count / 2 * pitch] : Acc(0), highest = count > 0 ? t[(count - 1) * pitch] : Acc(0);

  int32_t whole = 0;                               // negatives that are active with all thresholds
  int32_t hard = 0, semi_hard = 0, all_terms = 0;  // at most kColumnsEach positives' worth: a class below 2^27 rows
  s.total[at] = s.loss[at] = s.d2_an[at] = 0;  // here, not in registers, which the tile's other part still fills
#pragma unroll 1
  for (int begin = 0; begin < kColumnsEach<Acc>; begin += N) {
    Acc d[N];
    int32_t weight[N];
    bool valid[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int32_t c = first + begin + j;
      const Acc d2 = fabs(cells[begin + j]);
      d[j] = p.euclidean ? sqrt(d2) : d2;
      valid[j] = c < columns_end && (c < mate_begin || c >= mate_end);
      weight[j] = 0;
    }
#pragma unroll 1  // the searches' code once for both sides
    for (int side = rows_are_anchors ? 0 : 1; side < (columns_are_anchors ? 2 : 1); ++side) {
      const bool of_row = side == 0;
      int32_t own[N], offset[N];
      bool needed = false;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int32_t c = first + begin + j, other = max(pass.begin, min(c, pass.end - 1));
        own[j] = !valid[j] ? 0 : of_row ? count : other == c ? p.count[c] : 0;
        offset[j] = of_row ? 0 : (other - pass.begin) * pass.stride;
        // Beyond every threshold's reach all ranks are `own`, and nothing is active.
        const bool within = !(d[j] - pass.reach > (of_row ? highest : p.highest[other]));
        needed |= own[j] > 0 && (within || (of_row && counted));
      }
      if (__ballot_sync(kWholeWarp, needed) == 0) continue;
      Ranks<N> r;
      find_ranks<N>(p, pass, of_row ? t : pass.threshold, offset, of_row ? pitch : 1, pass.thresholds, own, d,
                    of_row && counted, r);
#pragma unroll
      for (int j = 0; j < N; ++j) weight[j] += own[j] > 0 ? r.to[j] - r.from[j] : 0;
      if (!of_row) break;
      Acc loss = 0, d2_an = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (own[j] == 0) continue;
        const int32_t many = weight[j], terms = r.to[j] - r.term[j];
        loss = fma(static_cast<Acc>(many), d[j] - middle, loss);
        if (many == count) {
          ++whole;
        } else if (many > 0) {
          atomicAdd(active + r.from[j] * pitch, 1);
          if (r.to[j] < count) atomicAdd(active + r.to[j] * pitch, -1);
        }
        if (!counted) continue;
        d2_an = fma(static_cast<Acc>(terms), fabs(cells[begin + j]), d2_an);
        all_terms += terms;
        hard += p.above ? 0 : count - r.farther[j];
        semi_hard += p.above ? many : max(r.farther[j] - r.from[j], 0);
        if (p.closed && terms > 0) {
          int32_t* const histogram = pass.terms(pass.slot(anchor));
          atomicAdd(histogram + r.term[j], 1);
          if (r.to[j] < count) atomicAdd(histogram + r.to[j], -1);
        }
      }
      s.loss[at] += loss;
      s.d2_an[at] += d2_an;
    }
    Acc total = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Acc v = static_cast<Acc>(weight[j]);
      if (p.euclidean) v = d[j] > 0 ? v * pass.slope / d[j] : Acc(0);
      const Acc d2 = cells[begin + j];
      cells[begin + j] = copysign(v, d2);
      total += signbit(d2) ? Acc(0) : v;
    }
    s.total[at] += total;
  }
  if (whole > 0) atomicAdd(active, whole);
  const uint32_t lanes = __ballot_sync(kWholeWarp, s.total[at] != 0);
  if (lane == 0) s.any[warp] = lanes;
  if (!counted) return;
  const int32_t sums[3] = {hard, semi_hard, all_terms};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int64_t sum = warp_sum(static_cast<int64_t>(sums[i]));
    if (lane == 0) atomic_add(s.counts + i, static_cast<uint64_t>(sum));
  }
}

// Where the gradient of a row of the strip is summed.
template <class Acc>
__device__ __forceinline__ Acc* partial_row(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, const DenseItem& item,
                                            int32_t index) {
  const Problem<Acc>& q = p.side[item.side];
  return pass.partial[q.plain || item.side == 1 ? 0 : 1] + (int64_t(item.chunk) * q.anchors.count + index) * q.dim;
}

// partial[i] += sum_j |V[i][j]| (x_j - x_i) over the near pairs of a part, whose V is 0 from then on: of a sum less a total
// mostly rounding would be left. Rows and dimensions are the same lanes' as in multiply_part().
template <class Acc>
__device__ __forceinline__ void add_near(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, const SweepShared<Acc>& s,
                                         int part) {
  const Problem<Acc>& q = p.side[s.item->side];
  const int lane = thread_index() % 32;
  const int32_t* columns = s.tile.column->index + part * kPart<Acc>;
#pragma unroll 1
  for (int i = 0; i < kRowsEach; ++i) {
    const int row = thread_index() / 32 * kRowsEach + i;
    uint32_t lanes = 0;
    for (int group = 0; group < kWarpsPerSide; ++group) lanes |= s.near[group * kWarpsPerSide + row / 32];
    if ((lanes >> row % 32 & 1) == 0) continue;
    Acc* const cells = part_of(s) + row * (kPart<Acc> + 1);
    const int32_t index = s.tile.row->index[row];
#pragma unroll 1
    for (int32_t begin = 0; begin < q.dim; begin += 32) {
      const int32_t d = min(begin + lane, q.dim - 1);
      Acc sum = 0;
#pragma unroll 1
      for (int base = 0; base < kPart<Acc>; base += 32) {
#pragma unroll 1
        for (uint32_t left = __ballot_sync(kWholeWarp, cells[base + lane] < 0); left != 0; left &= left - 1) {
          const int j = base + __ffs(static_cast<int>(left)) - 1;
          const Acc apart = load_row(p, pass.reads_input, s.item->side, columns[j], d) -
                            load_row(p, pass.reads_input, 1 - s.item->side, index, d);
          sum = fma(-cells[j], apart, sum);
        }
      }
      if (begin + lane < q.dim) partial_row(p, pass, *s.item, index)[d] += sum;
    }
    __syncwarp();  // all lanes have read all cells
    for (int base = lane; base < kPart<Acc>; base += 32) cells[base] = cells[base] < 0 ? Acc(0) : cells[base];
  }
}

// partial[i] += sum_j V[i][j] x_j - total[i] x_i for the strip's rows: a warp has kRowsEach rows and kSlice dimensions. 64
// columns are summed before they are added to what there is, so sums that cancel against the total are short.
template <class Acc>
__device__ __forceinline__ void multiply_part(const DenseProblem<Acc>& p, const DensePass<Acc>& pass,
                                              const SweepShared<Acc>& s, int part) {
  const Problem<Acc>& q = p.side[s.item->side];
  const int warp = thread_index() / 32, lane = thread_index() % 32, first = warp * kRowsEach;
  const Acc* weights = part_of(s) + first * (kPart<Acc> + 1);
  const int32_t* columns = s.tile.column->index + part * kPart<Acc>;
#pragma unroll 1
  for (int32_t begin = 0; begin < q.dim; begin += kSlice<Acc>) {
    Acc sum[kRowsEach][kSliceEach<Acc>] = {};
#pragma unroll 1
    for (int deep = 0; deep < kPart<Acc>; deep += kDepth<Acc>) {
      __syncthreads();  // the rows before have been read; the part's weights and totals are there
#pragma unroll(sizeof(Acc) == 4 ? 4 : 1)
      for (int e = thread_index(); e < kDepth<Acc> * kSlice<Acc>; e += kThreads) {
        const int32_t d = begin + e % kSlice<Acc>, index = columns[deep + e / kSlice<Acc>];
        s.x[e] = d < q.dim && index >= 0 ? static_cast<const Acc*>(q.candidates.x)[int64_t(index) * q.dim + d] : Acc(0);
      }
      __syncthreads();  // the rows are there
#pragma unroll(sizeof(Acc) == 4 ? 4 : 1)
      for (int k = 0; k < kDepth<Acc>; ++k) {
        Acc x[kSliceEach<Acc>];
#pragma unroll
        for (int j = 0; j < kSliceEach<Acc>; ++j) x[j] = s.x[k * kSlice<Acc> + 32 * j + lane];
#pragma unroll
        for (int i = 0; i < kRowsEach; ++i) {
          const Acc weight = weights[i * (kPart<Acc> + 1) + deep + k];  // a broadcast
#pragma unroll
          for (int j = 0; j < kSliceEach<Acc>; ++j) sum[i][j] = fma(weight, x[j], sum[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int32_t index = s.tile.row->index[first + i];
      if (index < 0) continue;
      Acc total = 0;
      for (int group = 0; group < kWarpsPerSide; ++group) total += s.total[group * kSide + first + i];
      if (total == 0) continue;
      const Acc* x = static_cast<const Acc*>(q.anchors.x) + int64_t(index) * q.dim;
      Acc* out = partial_row(p, pass, *s.item, index);
#pragma unroll
      for (int j = 0; j < kSliceEach<Acc>; ++j) {
        const int32_t d = begin + 32 * j + lane;
        if (d < q.dim) out[d] += fma(-total, x[d], sum[i][j]);
      }
    }
  }
}

template <class Acc>
__device__ __forceinline__ void open_strip(const DenseProblem<Acc>& p, const DensePass<Acc>& pass,
                                           const SweepShared<Acc>& s) {
  if (thread_index() < kSide) s.sums[thread_index()] = s.sums[kSide + thread_index()] = 0;
  if (s.item->side != 0 || !in_shared(p, pass)) return;
  for (int32_t i = thread_index(); i < pass.thresholds * kSide; i += kThreads) {
    const int32_t a = s.item->row + i % kSide, r = i / kSide;
    s.item->histogram[i] = 0;
    s.threshold[i] = pass.has(a) ? pass.threshold[pass.slot(a) + r] : Acc(0);
  }
}
template <class Acc>
__device__ __forceinline__ void close_strip(const DenseProblem<Acc>& p, const DensePass<Acc>& pass,
                                            const SweepShared<Acc>& s) {
  const int32_t mine = s.item->row + thread_index();
  if (s.item->side != 0) return;
  if (thread_index() < kSide && pass.has(mine)) {
    double* sums = p.negative_sums + (int64_t(s.item->chunk) * p.side[0].anchors.count + mine) * 2;
    sums[0] = s.sums[thread_index()];
    sums[1] = s.sums[kSide + thread_index()];
  }
  if (!in_shared(p, pass)) return;
  for (int32_t i = thread_index(); i < pass.thresholds * kSide; i += kThreads) {
    const int32_t a = s.item->row + i % kSide;
    const int32_t many = s.item->histogram[i];
    if (many != 0) atomicAdd(pass.active(pass.slot(a)) + i / kSide, many);
  }
}

template <Math M, class Acc>
__device__ __forceinline__ void sweep_every(const DenseProblem<Acc>& p, const DensePass<Acc>& pass, uint8_t* shared_memory) {
  Carver carver{shared_memory, 0, true};
  const SweepShared<Acc> s = carve_sweep<Acc>(carver, p.shared_slots);
  if (thread_index() == 0) {
    s.item->unit = -1;
    s.item->histogram = s.active;
  }
  if (thread_index() < 3) s.counts[thread_index()] = 0;
#pragma unroll 1
  for (;;) {
    __syncthreads();  // the strip before is closed
    if (thread_index() == 0) next_item(p, pass, *s.item);
    __syncthreads();  // the item stands
    if (s.item->row < 0) break;
    open_strip(p, pass, s);
#pragma unroll 1
    for (;;) {
      __syncthreads();  // the tile before is done with the ring, the edges and the cursor; the strip is open
      if (thread_index() == 0) next_tile_of(pass, *s.item, *s.tile.cursor);
      __syncthreads();  // the cursor stands
      if (s.tile.cursor->row < 0) break;
      open_tile(p.side[s.item->side], narrow_ring(), pass.max_exponent, s.tile);
      compute_tile<M>(
          p.side[s.item->side], narrow_ring(), s.tile,
          [&](int part) {
            find_near(p, pass, s, part);
            weigh_part(p, pass, s, part);
            __syncthreads();  // weights and sums of the part
            if (thread_index() < kSide) {
              for (int group = 0; group < kWarpsPerSide; ++group) {
                s.sums[thread_index()] += static_cast<double>(s.loss[group * kSide + thread_index()]);
                s.sums[kSide + thread_index()] += static_cast<double>(s.d2_an[group * kSide + thread_index()]);
              }
            }
            if (!multiplies(p, *s.item)) return;
            const auto some = [](const uint32_t* lanes) {
              uint32_t any = 0;
              for (int warp = 0; warp < kWarps; ++warp) any |= lanes[warp];
              return any != 0;
            };
            if (some(s.near)) add_near(p, pass, s, part);
            if (some(s.any)) multiply_part(p, pass, s, part);
          });
    }
    close_strip(p, pass, s);
  }
  if (thread_index() != 0) return;
  atomic_add(&p.totals->hard, s.counts[0]);
  atomic_add(&p.totals->semi_hard, s.counts[1]);
  if (p.closed) atomic_add(&p.totals->terms, s.counts[2]);
}

}  // namespace facenet_ext::cuda
