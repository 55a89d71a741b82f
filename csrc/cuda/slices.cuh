// Phase 5 where a slice of the columns of all rows fits in shared memory: the gradient from there, not from L2. Float rows
// that are anchors and candidates alike, not normalised, in one pass, with no list too long; gradient.cuh does the rest.
//
//   5a lists    a warp per row:  list, ascending by slot  ->  chosen: anchors and their coefficients
//                                coefficients of the class, both directions added  ->  weight
//   5b gather   a block per slice and group of rows; it reads its rows' partners from the slice, which holds every row
//
//              32 columns   32 ..  32 ..  32 ..           A warp has R rows of the group at a time (32 columns: R = 4), 128 /
//              R
//            +-----------+-----------+-----+-----+        bytes, that is L = 32 / R lanes, for each.
//    group 0 |  block 0  |  block 1  |     |     |
//            +-----------+-----------+-----+-----+        class        L lanes a row: R rows hear of one row of their class
//            at
//    group 1 |  block 4  |           |     |     |                     a time, which is one broadcast
//            +-----------+-----------+-----+-----+        own, chosen  L lanes an entry: R entries of one row's list at a
//            time, :                                   :                     added over the groups of lanes in the end
//
// The slice is on its way while phase 4 runs. Bytes from L2: X once per group, each list once per slice. Shared memory: 128
// bytes a row and entry or, of a class, every R of them.
#pragma once

#include "gradient.cuh"

namespace facenet_ext::cuda {

struct SliceShared {
  FinishShared* totals;  // finish() runs beside the slice that arrives
  double* sums;  // [3 kWarps]; and so does write_loss()
  uint32_t* ticket;  // of the grid barrier between 5a and 5b
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

__device__ __forceinline__ void add_difference(float coefficient, const Four& x, const Four& other, Four& sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum.element[i] = fmaf(coefficient, x.element[i] - other.element[i], sum.element[i]);
}

// sum += coefficient * (x - row) over entries first, first + step, … of `count`; get(e) loads one.
template <class Get>
__device__ __forceinline__ void add_entries(const Four* slice, int32_t lanes, int32_t first, int32_t step, int32_t count,
                                            const Four& x, Four& sum, Get get) {
  constexpr int kInFlight = 10;
#pragma unroll 1
  for (; first < count; first += kInFlight * step) {
    Entry<float> entry[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) entry[i] = first + i * step < count ? get(first + i * step) : Entry<float>{0, 0.f};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {  // not 0 * (x - row), which may be 0 * infinity
      if (entry[i].coefficient != 0) add_difference(entry[i].coefficient, x, slice[entry[i].row * lanes], sum);
    }
  }
}

// Phase 5b. The first item's slice is on its way; grid_arrive() stands behind 5a.
__device__ __forceinline__ void gather_slices(const Problem<float>& p, const Pass& pass, const uint32_t* ticket,
                                              const SliceShared& s) {
  const float scale = static_cast<float>((p.euclidean || p.cosine ? 1 : 2) / divisor(p));
  const SliceGrid grid(p);
  const int32_t lanes = p.slice_lanes, rows_each = 32 / lanes;
  const int32_t warp = thread_index() / 32, group = thread_index() % 32 / lanes;
  const Four* slice = reinterpret_cast<const Four*>(s.x) + thread_index() % lanes;
  const Rows<float>& rows = p.candidates;
  bool is_first = true;  // the lists may not be there yet
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
    for (int32_t top = grid.row(p, item / grid.slices); top < end; top += kWarps * rows_each) {
      const int32_t position = top + warp * rows_each + group;
      const bool has = position < end;
      const int32_t index = has ? sorted_index(p, rows)[position] : 0, slot = has ? pass.slot(position) : 0;
      const int32_t begin = has ? rows.mate_begin[position] : 0, mates_end = has ? rows.mate_end[position] : 0;
      const int32_t count = has ? count_positives(p, begin, mates_end) : 0, length = has ? p.times_chosen[index] : 0;
      const Four x = slice[index * lanes];
      Four sum{};
      // Of one row's list each group of lanes adds every rows_each-th entry; then the groups' sums are added in pairs.
      const auto subtract_list = [&](auto entries_of, int32_t its_count) {
#pragma unroll 1
        for (int32_t r = 0; r < rows_each; ++r) {
          const int32_t from = r * lanes, entries = __shfl_sync(kWholeWarp, its_count, from);
          if (entries == 0) continue;
          const int32_t of_index = __shfl_sync(kWholeWarp, index, from), of_slot = __shfl_sync(kWholeWarp, slot, from);
          Four part{};
          const Entry<float>* list = entries_of(of_index, of_slot);
          add_entries(slice, lanes, group, rows_each, entries, slice[of_index * lanes], part,
                      [&](int32_t e) { return list[e]; });
          for (int32_t by = 16; by >= lanes; by /= 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) part.element[i] += __shfl_xor_sync(kWholeWarp, part.element[i], by);
          }
          if (group == r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sum.element[i] -= part.element[i];
          }
        }
      };
      subtract_list([&](int32_t, int32_t of_slot) { return p.entry + of_slot; }, count);
      if (is_first) grid_wait(ticket);  // 5a of all blocks
      is_first = false;
      add_entries(slice, lanes, 0, 1, count > 0 ? mates_end - begin : 0, x, sum, [&](int32_t e) -> Entry<float> {
        const int32_t mate = begin + e;
        if (mate == position) return {index, 0.f};
        // weight(row, mate) = weight(mate, row): those of neighbouring rows are neighbours
        return {sorted_index(p, rows)[mate], p.threshold[pass.slot(mate) + positive_rank(begin, mate, position)]};
      });
      subtract_list([&](int32_t of_index, int32_t) { return chosen_of(p, of_index); }, length);
      if (!has || column >= p.dim) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.element[i] *= scale;
      *reinterpret_cast<Four*>(static_cast<float*>(rows.gradient_out) + int64_t(index) * p.dim + column) = sum;
    }
  }
  if (is_first) {  // no item: neither a copy nor a barrier may be left open
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
  while (lanes > 1 && 2 * lanes >= p.dim) lanes /= 2;  // fewer have all columns
  for (; lanes > 0; lanes /= 2) {
    Carver carver{nullptr, 0, true};
    carver.take<BlockState>(1);
    carve_slice(carver, args.num_candidates, lanes);
    *bytes = carver.used;
    if (carver.used <= limit) return lanes;
    if (lanes == 2) break;  // narrower slices would read the lists too often
  }
  *bytes = 0;
  return 0;
}

}  // namespace facenet_ext::cuda
