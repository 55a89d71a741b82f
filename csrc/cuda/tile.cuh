// One kSide x kSide tile of squared distances: d(a, b) = norm_a + norm_b - 2 a.b, in units of the largest row's scale.
//
//            columns: 32 per warp                    A warp (m, n) owns 32 x 32 products, all of them in registers.
//          n = 0     1     2     3                   The rows stream through shared memory in stages of 64 bytes per row
//        +-----+-----+-----+-----+                   (16 KB for both operands), copied asynchronously (RingLayout).
//  m = 0 |w 0  |w 1  |w 2  |w 3  |  32 rows          At the end the distances go to shared memory, part by part
//        +-----+-----+-----+-----+                   (kPart columns of all rows), where any thread may walk along a row or
//      1 |w 4  |     |     |     |                   down a column: the fragment layout of the products suits neither.
//        +-----+-----+-----+-----+
//      2 |     |     |     |     |                   FLOPs: 2 kSide^2 D per product of the format (split: 3).
//        +-----+-----+-----+-----+                   Bytes from L2: 2 kSide pitch.
//      3 |     |     |     |w 15 |                   Rows beyond the end repeat the last one; who reads a distance
//        +-----+-----+-----+-----+                   must know the true edge.
#pragma once

#include "prepare.cuh"

namespace facenet_ext::cuda {

// Columns of a part: two warps of floats, one of doubles.
template <class Acc>
constexpr int kPartWarps = sizeof(Acc) == 4 ? kWarpsPerSide / 2 : 1;
template <class Acc>
constexpr int kPart = 32 * kPartWarps<Acc>;
// Floats from row to row: rows are read by fours and columns one by one without a bank conflict, and products are written by
// twos with no more than two at a bank.
template <class Acc>
constexpr int kPartPitch = kPart<Acc> + (sizeof(Acc) == 4 ? 12 : 1);
template <class Acc>
constexpr int kParts = kWarpsPerSide / kPartWarps<Acc>;

// What a tile knows of its rows and columns beside their operands.
template <class Acc>
struct Edge {
  Acc norm[kSide];
  Acc scale[kSide];
  int32_t index[kSide];       // in the input; -1 beyond the end
  int32_t mate_begin[kSide];  // the class, as positions among the columns' set
  int32_t mate_end[kSide];
  int32_t own[kSide];         // the row's own position among the candidates, or -1
};

constexpr int32_t kShortStride = 64;  // two positives a lane

// Phase 2 (select.cuh): some anchors, columns that may be their positives, and distances, where no anchor has more positives,
// and none that a block sorts.
template <class Acc>
struct StripShared {
  Edge<Acc> row, column;
  alignas(16) Acc d2_ap[kStrip][kShortStride];
};

constexpr int kNotOffered = -1;  // stands for the distance of a pair that is no anchor with its negative

// Where a block stands among its tiles. One thread moves it; the others read it, so that no register holds it meanwhile.
struct Cursor {
  int32_t row, column;  // first position of the tile; row < 0: no tile is left
  int32_t top, next;    // first row of tiles of the group, next tile of this block in the group
  int32_t part_at;      // where distances stand, in bytes behind the ring's begin
  bool is_first;
};

// Whether the tile's columns are anchors too: it stands for its mirror image.
template <class Acc>
__device__ __forceinline__ bool serves_columns(const Problem<Acc>& p, const Cursor& cursor) {
  return p.plain && cursor.row != cursor.column;
}

// Buckets of the tile's anchors in shared memory (buckets.cuh). The rows are places 0 .. kSide, behind them the columns of a
// part. A pitch of whole 128 bytes: lanes that are anchors meet no bank conflict, at whatever buckets.
constexpr int kBucketPitch = kSide + kPart<float>;
constexpr int kMaxSharedSlots = 63;  // thresholds that six steps of a search tell apart
constexpr int kBeyond = 8;           // rows of infinite thresholds that a search may look at

struct Buckets {  // row r of [RingLayout::slots + 1 + kBeyond]
  float threshold[kBucketPitch];  // number r - 1; infinite where there is no positive. Of row 0: nobody reads it
  uint32_t least[kBucketPitch];   // the least tag in bucket r. Of row 0: what serves no positive
};
struct Ranges {  // of distances that tags tell apart
  float base[kBucketPitch];    // the lowest
  int32_t last[kBucketPitch];  // the row of the last bucket; 0: no anchor of the pass, or without positives
  uint32_t
      far[kBucketPitch];  // bits: no farther negative than this is wanted; infinite: none beyond the last threshold is known
};
struct Order {  // of the tile's candidates by index
  uint32_t rank[kSide];
  int32_t index[kSide];  // by rank
};

constexpr int kPieces = 2 * kSide * (kStageBytes / 16) / kThreads;  // of 16 bytes, that a thread copies per stage
static_assert(kPieces % 2 == 0, "as many of rows as of columns, whatever the thread");

constexpr int32_t kStageStep = 2 * kSide * kStageBytes;  // bytes of the ring

template <class Acc>
struct TileShared {
  Cursor* cursor;  // [2] this tile, the next one
  Edge<Acc>* row;
  Edge<Acc>* column;
  uint32_t*
      from;  // [kPieces][kThreads] where a thread's pieces begin in the operands, in units of 16 bytes
  Ranges* ranges;
  Order* order;  // of rows and of columns
  uint8_t* ring;  // [stages][2 kSide][kStageBytes]
  int32_t part_at, strip_at, buckets_at;  // bytes behind `ring`: not pointers, which would wait in registers
  // [kSide][kPartPitch], in the ring's memory, which is empty when a part is written, or beside it (RingLayout). What the offset
  // is stands with the cursor: here it would wait in a register, and be spilled.
  __device__ __forceinline__ Acc* part() const { return reinterpret_cast<Acc*>(ring + cursor->part_at); }
  // Where nothing is sent to before phase 2 ends.
  __host__ __device__ __forceinline__ StripShared<Acc>* strip() const { return reinterpret_cast<StripShared<Acc>*>(ring + strip_at); }
  __host__ __device__ __forceinline__ Buckets* buckets() const {  // [RingLayout::slots + 1 + kBeyond], or none
    return reinterpret_cast<Buckets*>(ring + buckets_at);
  }
};

template <class Acc, bool kBuckets>
__host__ __device__ TileShared<Acc> carve_tile(Carver& carver, const RingLayout& layout) {
  const int64_t ring = int64_t(layout.stages) * 2 * kSide * kStageBytes;
  constexpr int64_t kPartBytes = int64_t(kSide) * kPartPitch<Acc> * sizeof(Acc);
  TileShared<Acc> s;
  s.cursor = carver.take<Cursor>(2);
  s.row = carver.take<Edge<Acc>>(1);
  s.column = carver.take<Edge<Acc>>(1);
  s.from = carver.take<uint32_t>(kPieces * kThreads);
  s.ranges = carver.take<Ranges>(kBuckets ? 1 : 0);
  s.order = carver.take<Order>(kBuckets ? 2 : 0);
  int64_t memory = ring > kPartBytes || layout.apart ? ring : kPartBytes;
  if (sizeof(Acc) == 8 && memory < kStages * int64_t(kStageStep)) memory = kStages * int64_t(kStageStep);  // for the strip
  s.ring = carver.take<uint8_t>(memory);
  const auto behind_ring = [&](const void* p) {
    return static_cast<int32_t>(reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(s.ring));
  };
  s.part_at = s.strip_at = 0;
  if (layout.apart) s.part_at = behind_ring(carver.take<Acc>(int64_t(kSide) * kPartPitch<Acc>));
  static_assert(sizeof(StripShared<float>) <= kStageStep && sizeof(StripShared<double>) <= kStages * kStageStep);
  if (sizeof(Acc) == 4) {  // tiles of doubles are sent for behind phase 2
    if (layout.stages == 3 * layout.group) s.strip_at = (layout.stages - 1) * kStageStep;
    else if (layout.apart) s.strip_at = s.part_at;
    else s.strip_at = behind_ring(carver.take<StripShared<Acc>>(kBuckets ? 1 : 0));
  }
  s.buckets_at = behind_ring(carver.take<Buckets>(kBuckets && layout.slots > 0 ? layout.slots + 1 + kBeyond : 0));
  return s;
}

// 2^e, e <= 127, and not below the least normal float.
template <class Acc>
__device__ __forceinline__ Acc two_to(int32_t e) {
  return __uint_as_float(static_cast<uint32_t>(max(e, -126) + 127) << 23);
}

// What an edge knows of the row at a position, the last one for positions behind it. are_anchors: the rows are anchors, whose
// class is looked up among the candidates.
template <class Acc>
struct EdgeRow {
  int32_t exponent, index, mate_begin, mate_end, own;
  Acc norm;
  EdgeRow() = default;
  __device__ __forceinline__ EdgeRow(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t position, bool are_anchors) {
    const bool inside = position < rows.count;
    const int32_t source = inside ? position : rows.count - 1;
    exponent = rows.exponent[source];
    norm = rows.norm[source];
    index = inside ? sorted_index(p, rows)[source] : -1;
    mate_begin = are_anchors ? rows.mate_begin[source] : 0;
    mate_end = are_anchors ? rows.mate_end[source] : 0;
    own = are_anchors ? own_position(p, source) : -1;
  }
  __device__ __forceinline__ void store(int32_t max_exponent, Edge<Acc>& edge, int at) const {
    const Acc scale = sizeof(Acc) == 8 ? Acc(1) : two_to<Acc>(exponent - max_exponent);
    edge.scale[at] = scale;
    const Acc scaled = norm * (scale * scale);
    edge.norm[at] = scaled + (scaled - scaled);  // infinite: NaN, whichever format the products have
    edge.index[at] = index;
    edge.mate_begin[at] = mate_begin;
    edge.mate_end[at] = mate_end;
    edge.own[at] = own;
  }
};

// Loads an edge, thread 0 its first row; the barrier is the caller's.
template <class Acc>
__device__ __forceinline__ void load_edge(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t first, int32_t max_exponent,
                                          bool are_anchors, int thread, Edge<Acc>& edge) {
  if (thread < 0 || thread >= kSide) return;
  EdgeRow<Acc>(p, rows, first + thread, are_anchors).store(max_exponent, edge, thread);
}

// A row or a column of the cursor's tile, by a thread below 2 kSide.
template <class Acc>
__device__ __forceinline__ EdgeRow<Acc> load_edge_of_tile(const Problem<Acc>& p, const TileShared<Acc>& s) {
  const int thread = thread_index();
  if (thread < kSide) return {p, p.anchors, s.cursor->row + thread, true};
  return {p, p.candidates, s.cursor->column + thread - kSide, serves_columns(p, *s.cursor)};
}
template <class Acc>
__device__ __forceinline__ void store_edge_of_tile(const EdgeRow<Acc>& edge, int32_t max_exponent, const TileShared<Acc>& s) {
  const int thread = thread_index();
  edge.store(max_exponent, thread < kSide ? *s.row : *s.column, thread % kSide);
}

// The one expression for d_ap and d_an. The edges' factors come from memory: nothing that a compiler could contract
// differently.
template <class Acc>
__device__ __forceinline__ Acc squared_distance(const Edge<Acc>& rows, int row, const Edge<Acc>& columns, int column,
                                                Acc product) {
  // Exact: powers of two, of doubles 1.
  const Acc factor = sizeof(Acc) == 8 ? Acc(-2) : Acc(-2) * rows.scale[row] * columns.scale[column];
  return at_least_zero(fma(product, factor, rows.norm[row] + columns.norm[column]));
}

// The products of one warp's 32 x 32 and the way to them.
template <Math M>
struct Products {  // on tensor cores
  static constexpr bool kSplit = M == Math::split;
  static constexpr bool kByTwos = true;  // products 2j and 2j + 1 of a lane are neighbours in a row
  float hh[2][4][4];
  float hl[kSplit ? 2 : 1][kSplit ? 4 : 1][4];

  __device__ __forceinline__ void clear() {
    for (int m = 0; m < 2; ++m) {
      for (int n = 0; n < 4; ++n) {
        for (int i = 0; i < 4; ++i) hh[m][n][i] = hl[kSplit ? m : 0][kSplit ? n : 0][i] = 0;
      }
    }
  }
  // Eight lanes read 128 contiguous bytes of two neighbouring rows: no bank conflict.
  __device__ __forceinline__ void add_stage(const uint8_t* rows, const uint8_t* columns, int lane) {
    const int at = lane / 4 * kStageBytes + lane % 4 * 16;
    const auto load = [&](const uint8_t* from, int row) {
      return *reinterpret_cast<const uint4*>(from + row * kStageBytes + at);
    };
    const Fragments<M> a[2] = {Fragments<M>::of(load(rows, 0), load(rows, 8)),
                               Fragments<M>::of(load(rows, 16), load(rows, 24))};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint4 b = load(columns, 8 * n);
#pragma unroll
      for (int m = 0; m < 2; ++m) a[m].multiply(b, hh[m][n], hl[kSplit ? m : 0][kSplit ? n : 0]);
    }
  }
  // Calls body(i, row, column, product) for each of the 32 products of this lane.
  template <class Body>
  __device__ __forceinline__ void for_each(int lane, Body body) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float product = kSplit ? combine(hh[m][n][i], hl[kSplit ? m : 0][kSplit ? n : 0][i]) : hh[m][n][i];
          body(16 * m + 4 * n + i, 16 * m + lane / 4 + i / 2 * 8, 8 * n + lane % 4 * 2 + i % 2, product);
        }
      }
    }
  }
};

template <class Acc>
struct CoreProducts {  // on CUDA cores: one chain of fused multiply-adds in order of k, so d(a, b) = d(b, a) here too
  static constexpr bool kByTwos = false;
  Acc sum[4][8];

  __device__ __forceinline__ void clear() {
    for (int m = 0; m < 4; ++m) {
      for (int n = 0; n < 8; ++n) sum[m][n] = 0;
    }
  }
  __device__ __forceinline__ void add_stage(const uint8_t* rows, const uint8_t* columns, int lane) {
    constexpr int kElements = kStageBytes / int(sizeof(Acc));
    const Acc* a = reinterpret_cast<const Acc*>(rows) + lane / 4 * kElements;
    const Acc* b = reinterpret_cast<const Acc*>(columns) + lane % 4 * kElements;
#pragma unroll 1  // two would spill in float64
    for (int k = 0; k < kElements; ++k) {
      Acc column[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) column[n] = b[4 * n * kElements + k];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const Acc row = a[8 * m * kElements + k];
#pragma unroll
        for (int n = 0; n < 8; ++n) sum[m][n] = fma(row, column[n], sum[m][n]);
      }
    }
  }
  template <class Body>
  __device__ __forceinline__ void for_each(int lane, Body body) const {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) body(8 * m + n, lane / 4 + 8 * m, lane % 4 + 4 * n, sum[m][n]);
    }
  }
};
template <>
struct Products<Math::simt32> : CoreProducts<float> {};
template <>
struct Products<Math::simt64> : CoreProducts<double> {};

// Where this thread's pieces of a tile begin: 16 bytes of a row (the first half of its pieces) or of a column in
// every stage.
template <class Acc>
__device__ __forceinline__ void address_tile(const Problem<Acc>& p, const TileShared<Acc>& s, const Cursor& cursor) {
  const int thread = thread_index();
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = i * kThreads + thread, row = piece / (kStageBytes / 16);
    const int32_t position = i < kPieces / 2 ? cursor.row + row : cursor.column + row - kSide;
    const int32_t last = (i < kPieces / 2 ? p.anchors.count : p.candidates.count) - 1;
    s.from[i * kThreads + thread] =
        static_cast<uint32_t>(min(position, last)) * static_cast<uint32_t>(p.pitch / 16) + piece % (kStageBytes / 16);
  }
}
struct Pieces {
  uint32_t from[kPieces];
  template <class Acc>
  __device__ __forceinline__ explicit Pieces(const TileShared<Acc>& s) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) from[i] = s.from[i * kThreads + thread_index()];
  }
  template <class Acc>
  __device__ __forceinline__ void copy_stage(const Problem<Acc>& p, const TileShared<Acc>& s,
                                             int32_t to,       // offset in the ring
                                             int32_t k) const {  // byte of the rows
    const int piece = thread_index();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint8_t* operand = i < kPieces / 2 ? p.anchors.operand : p.candidates.operand;
      cp_async_16(s.ring + to + (i * kThreads + piece) * 16, operand + int64_t(from[i]) * 16 + k);
    }
  }
};
// Sends for the first two groups of stages.
template <class Acc>
__device__ __forceinline__ void send_tile(const Problem<Acc>& p, const RingLayout& layout, const TileShared<Acc>& s) {
  const Pieces pieces(s);
  const int32_t group = layout.group * kStageBytes;
#pragma unroll 1
  for (int32_t begin = 0; begin < 2 * group; begin += group) {
#pragma unroll 1
    for (int32_t k = begin; k < min(begin + group, p.pitch); k += kStageBytes) {
      pieces.copy_stage(p, s, k * (kStageStep / kStageBytes), k);
    }
    cp_async_commit();  // also when empty: the count of groups then does not depend on the length of rows
  }
}
template <class Acc>
__device__ __forceinline__ void load_edges(const Problem<Acc>& p, int32_t max_exponent, const TileShared<Acc>& s) {
  if (thread_index() < 2 * kSide) store_edge_of_tile(load_edge_of_tile(p, s), max_exponent, s);
}
// All that compute_tile() expects.
template <class Acc>
__device__ __forceinline__ void open_tile(const Problem<Acc>& p, const RingLayout& layout, int32_t max_exponent,
                                          const TileShared<Acc>& s) {
  address_tile(p, s, *s.cursor);
  send_tile(p, layout, s);
  load_edges(p, max_exponent, s);
}

// Computes the cursor's tile, which is open, and calls body(part) for each part in s.part, between barriers: body may read
// s.part, the edges and the cursor freely and must not wait for anything but this block. Distances inside a class and beyond
// the edges become kNotOffered; few tiles have any. kPitch: of a row of the part. is_free(): the ring has been read, and may be
// sent for where the part stands beside it.
template <Math M, int kPitch = kPart<typename MathTraits<M>::Acc> + 1, class Acc, class Body, class Free = Nothing>
__device__ __forceinline__ void compute_tile(const Problem<Acc>& p, const RingLayout& layout, const TileShared<Acc>& s, Body body,
                                             Free is_free = {}) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const Pieces pieces(s);  // in registers: shared memory has all that it can do with the stages
  Products<M> products;
  products.clear();
  int32_t at = 0, next = 0;  // the stage in the ring; the byte of the rows where the next group begins
#pragma unroll 1  // unrolled, it would not fit in 128 registers
  for (int32_t k = 0; k < p.pitch; k += kStageBytes) {
    if (k == next) {
      const int32_t group = layout.group, end = layout.stages * kStageStep;
      cp_async_wait<1>();  // this thread's pieces of the group have landed
      __syncthreads();  // everybody's have, and everybody is done with the group that is overwritten next
      next += group * kStageBytes;
      int32_t to = at + 2 * group * kStageStep;
#pragma unroll 1
      for (int32_t sent = next + group * kStageBytes; sent < min(next + 2 * group * kStageBytes, p.pitch); sent += kStageBytes) {
        pieces.copy_stage(p, s, to >= end ? to - end : to, sent);
        to += kStageStep;
      }
      cp_async_commit();
    }
    const uint8_t* ring = s.ring + at;
    products.add_stage(ring + 32 * (warp / kWarpsPerSide) * kStageBytes,
                       ring + (kSide + 32 * (warp % kWarpsPerSide)) * kStageBytes, lane);
    at = at + kStageStep == layout.stages * kStageStep ? 0 : at + kStageStep;
  }
  cp_async_wait<0>();

  const int after = thread_index(), m = after / 32 / kWarpsPerSide, n = after / 32 % kWarpsPerSide;
  Acc d2[32];  // half the registers of the accumulators, which end here
  products.for_each(after % 32, [&](int i, int r, int c, Acc product) {
    d2[i] = squared_distance(*s.row, 32 * m + r, *s.column, 32 * n + c, product);
  });
  // Pairs that are no anchor and negative. Classes ascend with the positions: those of 32 rows lie between the first one's
  // begin and the last one's end.
  const int32_t first_row = s.cursor->row + 32 * m, first_column = s.cursor->column + 32 * n;
  if (first_row + 32 > p.anchors.count || first_column + 32 > p.candidates.count ||
      (s.row->mate_begin[32 * m] < first_column + 32 && s.row->mate_end[32 * m + 31] > first_column)) {
    products.for_each(after % 32, [&](int i, int r, int c, Acc) {
      const int row = 32 * m + r;
      const int32_t position = first_column + c, begin = s.row->mate_begin[row], size = s.row->mate_end[row] - begin;
      const bool in_class = static_cast<uint32_t>(position - begin) < static_cast<uint32_t>(size);
      d2[i] = in_class | (position >= p.candidates.count) | (first_row + r >= p.anchors.count) ? kNotOffered : d2[i];
    });
  }
#pragma unroll 1
  for (int part = 0; part < kParts<Acc>; ++part) {
    __syncthreads();  // the ring, or the part before, has been read
    if (n / kPartWarps<Acc> == part) {
      Acc* const cells = s.part() + 32 * m * kPitch + 32 * n - part * kPart<Acc>;
      products.for_each(after % 32, [&](int i, int r, int c, Acc) {
        Acc* to = cells + r * kPitch + c;
        if constexpr (Products<M>::kByTwos && kPitch % 2 == 0) {
          if (i % 2 == 0) *reinterpret_cast<Vector<Acc, 2>*>(to) = {d2[i], d2[i + 1]};
        } else {
          *to = d2[i];
        }
      });
    }
    cp_async_wait<0>();  // what body() has sent for while it had the part before
    __syncthreads();  // the part is complete
    if (part == 0) is_free();
    body(part);
  }
}

}  // namespace facenet_ext::cuda
