// Phase 5 where a slice of the columns of all rows fits in shared memory: the gradient from there, not from L2. Float rows
// that are anchors and candidates alike, not normalised, in one pass, with no list too long; gradient.cuh does the rest.
//
//   5a lists    a warp per row:  list, ascending by place  ->  chosen: anchors and their coefficients
//                                coefficients of the class, both directions added  ->  weight, in the memory of `threshold`
//   5b gather   a block per slice and group of rows; it reads its rows' partners from the slice, which holds every row
//
//              32 columns  32 ..  32 ..  32 ..       A warp has R rows of the group at a time, L = 32 / R lanes for each,
//            +-----------+------+------+------+      16 bytes a lane (32 columns: L = 8, R = 4).
//    group 0 |  block 0  |  1   |  2   |  3   |
//            +-----------+------+------+------+      class: R rows hear of one mate at a time, mostly of the same
//    group 1 |  block 4  |  5   |      |      |      own negatives, chosen: each of the R rows its own; lists of four rows
//            +-----------+------+------+------+      stand side by side, so that one access brings an entry of each
//            :                                :
//
// The slice is on its way while phase 4 runs. The grid barrier behind 5a is in halves: own negatives do not wait for it.
// Bytes from L2: X once per group, each list once per slice. Shared memory: 16 L bytes per entry; per mate for R rows.
#pragma once

#include "gradient.cuh"

namespace facenet_ext::cuda {

struct SliceShared {
  FinishShared* totals;  // finish() runs beside the slice that arrives
  double* sums;  // [3 kWarps]; and so does write_loss()
  float* x;  // [count][4 lanes] by index
};
__host__ __device__ inline SliceShared carve_slice(Carver& carver, int64_t count, int32_t lanes) {
  SliceShared s;
  s.totals = carver.take<FinishShared>(1);
  s.sums = carver.take<double>(3 * kWarps);
  s.x = carver.take<float>(count * 4 * lanes);
  return s;
}

// Which slices and groups there are. A block takes items block_index(), + grid_size(), …
struct SliceGrid {
  int32_t slices, groups;
  __device__ __forceinline__ explicit SliceGrid(const Problem<float>& p)
      : slices((p.dim + 4 * p.slice_lanes - 1) / (4 * p.slice_lanes)), groups(max(grid_size() / slices, 1)) {}
  __device__ __forceinline__ int32_t items() const { return slices * groups; }
  __device__ __forceinline__ int32_t column(const Problem<float>& p, int32_t item) const {  // of this lane
    return item % slices * 4 * p.slice_lanes + thread_index() % p.slice_lanes * 4;
  }
  // First position of a group of rows: whole fours.
  __device__ __forceinline__ int32_t row(const Problem<float>& p, int32_t group) const {
    return group == groups ? p.candidates.count : static_cast<int32_t>(int64_t(p.candidates.count) * group / groups / 4 * 4);
  }
};

// Sends for an item's slice. Nobody may be reading that memory.
__device__ __forceinline__ void fetch_slice(const Problem<float>& p, int32_t item, float* slice) {
  const SliceGrid grid(p);
  const int32_t lanes = p.slice_lanes, column = grid.column(p, item);
  const float* x = static_cast<const float*>(p.candidates.x) + column;
  if (item < grid.items() && column < p.dim) {
    for (int32_t row = thread_index() / lanes; row < p.candidates.count; row += kThreads / lanes) {
      cp_async_16(slice + (row * lanes + thread_index() % lanes) * 4, x + int64_t(row) * p.candidates.stride);
    }
  }
  cp_async_commit();
}

// What chose the rows, four of them side by side; in the memory of `best`.
__device__ __forceinline__ Entry<float>* chosen(const Problem<float>& p) { return reinterpret_cast<Entry<float>*>(p.best); }

// The class of a row, from a multiple of 4 on: its weights and indices are then read by fours.
struct Mates {
  int32_t from, size;
  __device__ __forceinline__ Mates(const Problem<float>& p, int32_t begin, int32_t end)
      : from(begin / 4 * 4), size(count_positives(p, begin, end) > 0 ? end - from : 0) {}
};

// What a warp knows of its row before the lists are there.
struct Listed {
  int32_t index = 0, begin = 0, end = 0;
  __device__ __forceinline__ Listed(const Problem<float>& p, int32_t position) {
    if (position >= p.candidates.count) return;
    index = sorted_index(p, p.candidates)[position];
    begin = p.anchors.mate_begin[position];
    end = p.anchors.mate_end[position];
  }
};
__device__ __forceinline__ int32_t first_listed() { return block_index() * kWarps + thread_index() / 32; }

// Phase 5a. `row`: that at first_listed().
__device__ __forceinline__ void order_lists(const Problem<float>& p, const Pass& pass, Listed row) {
  const int lane = thread_index() % 32;
#pragma unroll 1
  for (int32_t position = first_listed(); position < p.candidates.count; position += grid_size() * kWarps) {
    if (position != first_listed()) row = Listed(p, position);
    const int32_t index = row.index, begin = row.begin, end = row.end;
    const int32_t length = p.times_chosen[index];
    const int32_t* list = p.list + int64_t(index) * p.list_places;
    // Two entries a lane; longer lists are read again and again.
    constexpr int kOwn = 2;
    int32_t place[kOwn], rank[kOwn] = {};
    Entry<float> entry[kOwn];
    const auto write = [&](int32_t e, const Entry<float>& x) {
      chosen(p)[side_by_side<2>(position, p.list_places, e)] = x;
    };
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      place[i] = lane + 32 * i < length ? list[lane + 32 * i] : INT32_MAX;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (place[i] != INT32_MAX) entry[i] = {sorted_index(p, p.anchors)[pass.anchor(place[i])], p.entry[place[i]].coefficient};
    }
    // weight(row, mate) = weight(mate, row), 0 for the row itself and outside of the class
    const Mates mates(p, begin, end);
    for (int32_t e = lane; e < (mates.size + 3) / 4 * 4; e += 32) {
      const int32_t other = mates.from + e;
      float weight = 0;
      if (other >= begin && other < end && other != position) {
        weight = p.d2_ap[pass.slot(position) + positive_rank(begin, position, other)] +
                 p.d2_ap[pass.slot(other) + positive_rank(begin, other, position)];
      }
      p.threshold[side_by_side<4>(position, pass.weight_places(), e)] = weight;
    }
    if (length % 2 == 1 && lane == 0) write(length, {index, 0.f});  // entries are read in pairs
    if (length <= 32 * kOwn) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int32_t others = min(length - 32 * i, 32);
#pragma unroll 8
        for (int32_t j = 0; j < others; ++j) {
          const int32_t other = __shfl_sync(kWholeWarp, place[i], j);
#pragma unroll
          for (int k = 0; k < kOwn; ++k) count_if_less(rank[k], other, place[k]);
        }
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (place[i] != INT32_MAX) write(rank[i], entry[i]);
      }
      continue;
    }
    for (int32_t e = lane; e < length; e += 32) {
      write(counted_place(list, 0, length, e), {sorted_index(p, p.anchors)[pass.anchor(list[e])], p.entry[list[e]].coefficient});
    }
  }
}

using Four = Vector<float, 4>;

constexpr int kInFlight = 10;  // entries on their way from L2
constexpr int kMatesInFlight = 8;

// sum += coefficient * (x - row), `row` in shared memory.
__device__ __forceinline__ void add_row(uint32_t row, float coefficient, const Four& x, Four& sum) {
  const Four other = *reinterpret_cast<const Four*>(shared_words(row));
#pragma unroll
  for (int k = 0; k < 4; ++k) sum.element[k] = fmaf(coefficient, x.element[k] - other.element[k], sum.element[k]);
}

// Loads kCount vectors that stand four vectors apart, the first `count` of them; the others are 0.
template <int kCount, class T>
__device__ __forceinline__ void load_fourth(const T* from, int32_t count, T (&to)[kCount]) {
  if (count >= kCount) {  // without a question for each
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[4 * i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = T{};
      if (i < count) to[i] = from[4 * i];
    }
  }
}

// sum += coefficient * (x - row) over `count` entries, in pairs that stand four pairs apart. `slice`: in shared memory, this
// lane's part of row 0. An entry of coefficient 0 may name any row: no difference of rows overflows.
template <int kLanes>
__device__ __forceinline__ void add_list(uint32_t slice, const Entry<float>* list, int32_t count, const Four& x, Four& sum) {
  using Pair = Vector<Entry<float>, 2>;
  const Pair* pairs = reinterpret_cast<const Pair*>(list);
#pragma unroll 1
  for (int32_t left = (count + 1) / 2; left > 0; left -= kInFlight / 2) {
    Pair pair[kInFlight / 2];
    load_fourth(pairs, left, pair);
    pairs += 4 * (kInFlight / 2);
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) any |= ordered_bits(pair[i / 2].element[i % 2].coefficient);
    if (any == 0) continue;  // late in training most pairs have no term
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const Entry<float>& entry = pair[i / 2].element[i % 2];
      add_row(slice + static_cast<uint32_t>(entry.row) * (16 * kLanes), entry.coefficient, x, sum);
    }
  }
}

// The same over the row's class.
template <int kLanes>
__device__ __forceinline__ void add_mates(uint32_t slice, const float* weights, const int32_t* mates, int32_t size, int32_t own,
                                          const Four& x, Four& sum) {
  using Index = Vector<int32_t, 4>;
#pragma unroll 1
  for (int32_t first = 0; first < size; first += kMatesInFlight) {
    Four weight[kMatesInFlight / 4];
    Index mate[kMatesInFlight / 4];
    load_fourth(reinterpret_cast<const Four*>(weights + 4 * first), (size - first + 3) / 4, weight);
    if (size - first >= kMatesInFlight) {
#pragma unroll
      for (int i = 0; i < kMatesInFlight / 4; ++i) mate[i] = reinterpret_cast<const Index*>(mates + first)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kMatesInFlight; ++i) mate[i / 4].element[i % 4] = first + i < size ? mates[first + i] : own;
    }
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kMatesInFlight; ++i) any |= ordered_bits(weight[i / 4].element[i % 4]);
    if (any == 0) continue;
#pragma unroll
    for (int i = 0; i < kMatesInFlight; ++i) {
      add_row(slice + static_cast<uint32_t>(mate[i / 4].element[i % 4]) * (16 * kLanes), weight[i / 4].element[i % 4], x, sum);
    }
  }
}

// Phase 5b. The first item's slice is on its way; grid_arrive() stands behind 5a.
template <int kLanes>
__device__ __forceinline__ void gather_slices(const Problem<float>& p, const Pass& pass, const uint32_t* ticket,
                                              const SliceShared& s) {
  constexpr int kRows = 32 / kLanes;  // that a warp has at a time
  const float scale = static_cast<float>((p.euclidean || p.cosine ? 1 : 2) / divisor(p));
  const SliceGrid grid(p);
  const int32_t warp = thread_index() / 32, group = thread_index() % 32 / kLanes;
  const uint32_t slice = shared_address(s.x + thread_index() % kLanes * 4);
  const Rows<float>& rows = p.candidates;
  bool is_waiting = true;  // the lists of other blocks may not be there yet
#pragma unroll 1
  for (int32_t item = block_index(); item < grid.items(); item += grid_size()) {
    if (item != block_index()) {
      __syncthreads();  // the slice before has been read
      fetch_slice(p, item, s.x);
    }
    cp_async_wait<0>();
    __syncthreads();  // everybody's part of the slice has landed
    const int32_t end = grid.row(p, item / grid.slices + 1), column = grid.column(p, item);
#pragma unroll 1
    for (int32_t top = grid.row(p, item / grid.slices); top < end; top += kWarps * kRows) {
      const int32_t position = top + warp * kRows + group;
      const bool has = position < end;
      const int32_t index = has ? sorted_index(p, rows)[position] : 0;
      const int32_t begin = has ? rows.mate_begin[position] : 0, mates_end = has ? rows.mate_end[position] : 0;
      const int32_t length = has ? p.times_chosen[index] : 0;
      const Four x = *reinterpret_cast<const Four*>(shared_words(slice + static_cast<uint32_t>(index) * (16 * kLanes)));
      Four negatives{}, sum{};
      add_list<kLanes>(slice, p.entry + pass.entry(position, 0), count_positives(p, begin, mates_end), x, negatives);
      if (is_waiting) grid_wait(ticket);  // 5a of all blocks
      is_waiting = false;
      const Mates mates(p, begin, mates_end);
      add_mates<kLanes>(slice, p.threshold + side_by_side<4>(position, pass.weight_places(), 0),
                        sorted_index(p, rows) + mates.from, mates.size, index, x, sum);
      add_list<kLanes>(slice, chosen(p) + side_by_side<2>(position, p.list_places, 0), length, x, negatives);
      if (!has || column >= p.dim) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.element[i] = (sum.element[i] - negatives.element[i]) * scale;
      *reinterpret_cast<Four*>(static_cast<float*>(rows.gradient_out) + int64_t(index) * p.dim + column) = sum;
    }
  }
  if (is_waiting) {  // no row: neither a copy nor a barrier may be left open
    cp_async_wait<0>();
    grid_wait(ticket);
  }
}

// Lanes of 16 bytes that a slice of each row takes, and the block's shared memory with it; 0: no slice fits, or the rows are
// not of the kind above.
inline int32_t choose_slice(const TripletArgs& args, const Problem<float>& p, int64_t limit, int64_t* bytes) {
  const bool aligned = p.candidates.aligned && reinterpret_cast<uintptr_t>(p.candidates.gradient_out) % 16 == 0;
  if (!p.plain || p.normalize || !aligned || p.candidates.gradient_out == nullptr) return 0;
  int32_t lanes = 8;
  while (lanes > 2 && 2 * lanes >= p.dim) lanes /= 2;  // fewer have all columns
  for (; lanes >= 2; lanes /= 2) {  // narrower slices would read the lists too often
    Carver carver{nullptr, 0, true};
    carver.take<BlockState>(1);
    carve_slice(carver, args.num_candidates, lanes);
    *bytes = carver.used;
    if (carver.used <= limit) return lanes;
  }
  *bytes = 0;
  return 0;
}

}  // namespace facenet_ext::cuda
