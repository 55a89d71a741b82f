// Phase 5 where a slice of the columns of all rows fits in shared memory: the gradient from there, not from L2. Float rows
// that are anchors and candidates alike, not normalised, in one pass, with no list too long; gradient.cuh does the rest.
//
//   5a lists    a warp per row:  list, ascending by slot  ->  chosen: anchors and their coefficients
//                                coefficients of the class, both directions added  ->  weight
//   5b gather   a block per slice and group of rows; it reads its rows' partners from the slice, which holds every row
//
//              32 columns  32 ..  32 ..  32 ..       A warp has R rows of the group at a time, L = 32 / R lanes for each,
//            +-----------+------+------+------+      16 bytes a lane (32 columns: L = 8, R = 4).
//    group 0 |  block 0  |  1   |  2   |  3   |
//            +-----------+------+------+------+      class: L lanes have a row; R rows hear of one mate at a time
//    group 1 |  block 4  |  5   |      |      |      own negatives, chosen: L lanes have an entry; R entries of one row's
//            +-----------+------+------+------+      list at a time, whose sums are added in the end
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
  // First position of a group of rows.
  __device__ __forceinline__ int32_t row(const Problem<float>& p, int32_t group) const {
    return static_cast<int32_t>(int64_t(p.candidates.count) * group / groups);
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

__device__ __forceinline__ Entry<float>* chosen_of(const Problem<float>& p, int32_t index) {
  return reinterpret_cast<Entry<float>*>(p.best) + int64_t(index) * p.list_places;
}

// Phase 5a.
__device__ __forceinline__ void order_lists(const Problem<float>& p, const Pass& pass) {
  const int lane = thread_index() % 32;
  for (int32_t position = block_index() * kWarps + thread_index() / 32; position < p.candidates.count;
       position += grid_size() * kWarps) {
    const int32_t index = sorted_index(p, p.candidates)[position];
    const int32_t length = p.times_chosen[index];
    const int32_t* list = p.list + int64_t(index) * p.list_places;
    for (int32_t e = lane; e < length; e += 32) {
      const int32_t slot = list[e];
      int32_t place = 0;
#pragma unroll 8
      for (int32_t j = 0; j < length; ++j) place += list[j] < slot ? 1 : 0;  // a broadcast from L1
      chosen_of(p, index)[place] = {sorted_index(p, p.anchors)[pass.begin + slot / pass.stride], p.entry[slot].coefficient};
    }
    const int32_t begin = p.anchors.mate_begin[position], count = count_positives(p, begin, p.anchors.mate_end[position]);
    const int32_t slot = pass.slot(position);
    for (int32_t e = lane; e < count; e += 32) {
      const int32_t other = begin + e + (begin + e >= position ? 1 : 0);
      p.threshold[slot + e] = p.d2_ap[slot + e] + p.d2_ap[pass.slot(other) + positive_rank(begin, other, position)];
    }
  }
}

using Four = Vector<float, 4>;

constexpr int kInFlight = 10;  // entries on their way from L2

// sum += coefficient * (x - row) for a batch of entries. `slice`: in shared memory, this lane's part of row 0. An entry of
// coefficient 0 names a row that is not far away: its product is 0, not 0 * infinity.
template <int kLanes>
__device__ __forceinline__ void add_batch(uint32_t slice, const Entry<float> (&entry)[kInFlight], const Four& x, Four& sum) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) any |= ordered_bits(entry[i].coefficient);
  if (any == 0) return;  // late in training most pairs have no term
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const Four row =
        *reinterpret_cast<const Four*>(shared_words(slice + static_cast<uint32_t>(entry[i].row) * (16 * kLanes)));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum.element[k] = fmaf(entry[i].coefficient, x.element[k] - row.element[k], sum.element[k]);
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
  const auto load_row = [&](int32_t index) {
    return *reinterpret_cast<const Four*>(shared_words(slice + static_cast<uint32_t>(index) * (16 * kLanes)));
  };
  const int32_t stride = pass.stride;
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
      const int32_t index = has ? sorted_index(p, rows)[position] : 0, slot = has ? pass.slot(position) : 0;
      const int32_t begin = has ? rows.mate_begin[position] : 0, mates_end = has ? rows.mate_end[position] : 0;
      const int32_t count = has ? count_positives(p, begin, mates_end) : 0, length = has ? p.times_chosen[index] : 0;
      const Four x = load_row(index);
      Four sum{};
#pragma unroll 1
      for (int list = 0; list < 2; ++list) {  // own, then chosen
        if (list == 1) {
          if (is_waiting) grid_wait(ticket);  // 5a of all blocks
          is_waiting = false;
          // weight(row, mate) = weight(mate, row): those of neighbouring rows are neighbours
          const int32_t size = count > 0 ? mates_end - begin : 0, own = position - begin;
          const int32_t* mates = sorted_index(p, rows) + begin;
          const float* weights = p.threshold + pass.slot(begin);
#pragma unroll 1
          for (int32_t first = 0; first < size; first += kInFlight) {
            Entry<float> entry[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
              const int32_t e = first + i;
              entry[i] = {index, 0.f};
              if (e < size && e != own) {
                const float weight = weights[e * stride + own - (e < own ? 1 : 0)];
                entry[i] = {weight != 0 ? mates[e] : index, weight};
              }
            }
            add_batch<kLanes>(slice, entry, x, sum);
          }
        }
        // Of one row's list each group of lanes adds every kRows-th entry; then the groups' sums are added in pairs.
#pragma unroll 1
        for (int r = 0; r < kRows; ++r) {
          const int32_t entries = __shfl_sync(kWholeWarp, list == 0 ? count : length, r * kLanes);
          if (entries == 0) continue;
          const int32_t its_index = __shfl_sync(kWholeWarp, index, r * kLanes);
          const int32_t its_slot = __shfl_sync(kWholeWarp, slot, r * kLanes);
          const Entry<float>* its_list = list == 0 ? p.entry + its_slot : chosen_of(p, its_index);
          const Four its_x = load_row(its_index);
          Four part{};
#pragma unroll 1
          for (int32_t first = group; first < entries; first += kInFlight * kRows) {
            const Entry<float>* at = its_list + first;
            Entry<float> entry[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
              entry[i] = first + i * kRows < entries ? at[i * kRows] : Entry<float>{its_index, 0.f};
            }
            add_batch<kLanes>(slice, entry, its_x, part);
          }
#pragma unroll
          for (int by = 16; by >= kLanes; by /= 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) part.element[i] += __shfl_xor_sync(kWholeWarp, part.element[i], by);
          }
          if (group == r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sum.element[i] -= part.element[i];
          }
        }
      }
      if (!has || column >= p.dim) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.element[i] *= scale;
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
