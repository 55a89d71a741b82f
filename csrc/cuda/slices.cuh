// Phase 5 where a slice of the columns of all rows fits in shared memory: the gradient from there, not from L2. Float rows
// that are anchors and candidates alike, not normalised, in one pass, with no list too long; gradient.cuh does the rest.
//
//   5a lists    a warp per row:  list, ascending by the anchor's index and pair  ->  chosen: anchors and their coefficients
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
  Vector<float, 4>* of_mates;  // [helpers][32]: what a warp without rows has added up for one that has
  float* x;  // [count][4 lanes] by index
};
__host__ __device__ inline SliceShared carve_slice(Carver& carver, int64_t count, int32_t lanes, int32_t helpers) {
  SliceShared s;
  s.totals = carver.take<FinishShared>(1);
  s.sums = carver.take<double>(3 * kWarps);
  s.of_mates = carver.take<Vector<float, 4>>(32 * helpers);
  s.x = carver.take<float>(count * 4 * lanes);
  return s;
}

// A slice of the columns and a group of the rows. A block takes items block_index(), + grid_size(), …
template <int kLanes>
struct SliceItem {
  int32_t column;  // this lane's first
  int32_t row, end;  // positions
  __device__ __forceinline__ SliceItem(const Problem<float>& p, int32_t item) {
    // item / slices, for (item + 1 / 2) / slices is no nearer to a whole number than half of 1 / slices
    const auto group = static_cast<int32_t>(__umulhi(2 * static_cast<uint32_t>(item) + 1, p.slices_reciprocal));
    column = (item - group * p.slices) * (4 * kLanes) + thread_index() % kLanes * 4;
    row = group * p.group_rows;
    end = min(row + p.group_rows, p.candidates.count);
  }
};

// Sends for an item's slice. Nobody may be reading that memory.
template <int kLanes>
__device__ __forceinline__ void fetch_slice(const Problem<float>& p, int32_t item, float* slice) {
  const int32_t column = SliceItem<kLanes>(p, item).column;
  constexpr int32_t kRows = kThreads / kLanes;  // that a block copies at a time
  const int64_t stride = p.candidates.stride;
  const int32_t end = p.candidates.count;
  int32_t row = thread_index() / kLanes;
  if (!p.candidates.aligned) {  // neighbouring lanes copy neighbouring columns: four copies of a lane are kLanes columns apart
    const int32_t lane = thread_index() % kLanes, first = column - 3 * lane;
    const float* from = static_cast<const float*>(p.candidates.x) + first + row * stride;
    float* to = slice + thread_index() * 4 - 3 * lane;
#pragma unroll 1
    for (; row < end && item < p.slice_items; row += kRows, from += kRows * stride, to += kThreads * 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i * kLanes < p.dim) cp_async_4(to + i * kLanes, from + i * kLanes);
      }
    }
  } else if (item < p.slice_items && column < p.dim) {
    const float* from = static_cast<const float*>(p.candidates.x) + column + row * stride;
    float* to = slice + thread_index() * 4;
#pragma unroll 4
    for (; row < end; row += kRows, from += kRows * stride, to += kThreads * 4) cp_async_16(to, from);
  }
  cp_async_commit();
}
__device__ __forceinline__ void fetch_first_slice(const Problem<float>& p, float* slice) {
  if (p.slice_lanes == 8) fetch_slice<8>(p, block_index(), slice);
  else if (p.slice_lanes == 4) fetch_slice<4>(p, block_index(), slice);
  else fetch_slice<2>(p, block_index(), slice);
}

// What chose the rows, four of them side by side; in the memory of `best`.
__device__ __forceinline__ Entry<float>* chosen(const Problem<float>& p) { return reinterpret_cast<Entry<float>*>(p.best); }

// The class of a row, from a multiple of 4 on: its weights and indices are then read by fours.
struct Mates {
  int32_t from, size;
  __device__ __forceinline__ Mates(const Problem<float>& p, int32_t begin, int32_t end)
      : from(begin & ~3), size(count_positives(p, begin, end) > 0 ? end - from : 0) {}
};

// What a warp knows of its row before the lists are there.
struct ListedRow {
  int32_t index, begin, end;
  __device__ __forceinline__ ListedRow(const Problem<float>& p, int32_t position) {
    position = min(position, p.candidates.count - 1);  // no branch, which would cost registers
    index = sorted_index(p, p.candidates)[position];
    begin = p.candidates.mate_begin[position];
    end = p.candidates.mate_end[position];
  }
};
__device__ __forceinline__ int32_t first_listed() { return block_index() * kWarps + thread_index() / 32; }

// Phase 5a. `row`: that at first_listed(). False, the same for all blocks, and nothing is done, where a list is too long.
__device__ __forceinline__ bool order_lists(const Problem<float>& p, const Pass& pass, ListedRow row) {
  const int lane = thread_index() % 32;
  const int32_t overflows = p.counters->list_overflows;  // looked at when the first row's loads are on their way too
#pragma unroll 1
  for (int32_t position = first_listed(); position < p.candidates.count; position += grid_size() * kWarps) {
    if (position != first_listed()) row = ListedRow(p, position);
    const int32_t index = row.index, begin = row.begin, end = row.end;
    constexpr int kOwn = 2;  // mates of a lane, then entries, that are in flight together
    // weight(row, mate) = weight(mate, row), 0 for the row itself and outside of the class: both directions, at the mate's
    // rank among the row's positives and at the row's among the mate's.
    const Mates mates(p, begin, end);
    const int32_t stride = pass.stride, own_slot = position * stride - begin, own_rank = position - begin;
    const auto weight_of = [&](int32_t e) -> float {
      const int32_t other = mates.from + e;
      const bool is_mate = e < mates.size && other >= begin && other != position, is_behind = other > position;
      const float to = is_mate ? p.d2_ap[own_slot + other - (is_behind ? 1 : 0)] : 0.f;
      const float from = is_mate ? p.d2_ap[other * stride + own_rank - (is_behind ? 0 : 1)] : 0.f;
      return to + from;
    };
    const int32_t length = p.times_chosen[index];
    float weight[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) weight[i] = weight_of(lane + 32 * i);
    const int32_t* list = p.list + index * p.list_places;
    int32_t own[kOwn];  // longer lists are read again and again
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i] = kOwn * lane + i < min(length, p.list_places) ? list[kOwn * lane + i] : 0;
    if (overflows != 0) return false;
    float* const weights = p.threshold + side_by_side<4>(position, pass.weight_places(), lane);
    const int32_t padded = (mates.size + 3) & ~3;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (lane + 32 * i < padded) weights[4 * 32 * i] = weight[i];
    }
#pragma unroll 1
    for (int32_t e = lane + 32 * kOwn; e < padded; e += 32) weights[4 * (e - lane)] = weight_of(e);
    const auto entry_of = [&](Listed listed) -> Entry<float> {
      const int32_t times = listed.times();
      if (times > 0) return {listed.index(), static_cast<float>(times)};
      const int32_t a = p.anchors.position[listed.index()];
      return {listed.index(), p.entry[side_by_side<2>(a, pass.entry_places(), listed.pair())].coefficient};
    };
    const auto write = [&](int32_t e, const Entry<float>& x) {
      chosen(p)[side_by_side<2>(position, p.list_places, e)] = x;
    };
    uint32_t keys[kOwn];  // of this lane's entries, twice in a word: an anchor speaks once in 32 pairs
    const int32_t turns = static_cast<int32_t>(static_cast<uint32_t>(pass.stride + 31) / 32);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool has = kOwn * lane + i < length;
      const Listed listed(own[i]);
      const int32_t key = listed.index() * turns + (listed.pair() >> 5);
      keys[i] = static_cast<uint32_t>(has ? key : 0x7bff) * 0x10001u;
    }
    if (length % 2 == 1 && lane == 0) write(length, {index, 0.f});  // entries are read in pairs
    if (length <= 32 * kOwn) {
      const uint32_t both = __byte_perm(keys[0], keys[1], 0x5410);
      uint32_t ranks = 0;
#pragma unroll 4
      for (int32_t j = 0; j < (length + 1) >> 1; ++j) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) count_halves_if_less(ranks, __shfl_sync(kWholeWarp, keys[i], j), both);
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (kOwn * lane + i < length) write(count_of_half(ranks, i), entry_of(Listed(own[i])));
      }
      continue;
    }
    for (int32_t e = lane; e < length; e += 32) write(counted_place(list, 0, length, e), entry_of(Listed(list[e])));
  }
  return overflows == 0;
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
// lane's part of row 0. An entry of coefficient 0 may name any row: no difference of rows overflows. kSome: few may have
// another one; late in training most pairs have no term.
template <int kLanes, bool kSome>
__device__ __forceinline__ void add_list(uint32_t slice, const Entry<float>* list, int32_t count, const Four& x, Four& sum) {
  using Pair = Vector<Entry<float>, 2>;
  const Pair* pairs = reinterpret_cast<const Pair*>(list);
#pragma unroll 1
  for (int32_t left = (count + 1) / 2; left > 0; left -= kInFlight / 2) {
    Pair pair[kInFlight / 2];
    load_fourth(pairs, left, pair);
    pairs += 4 * (kInFlight / 2);
    if constexpr (kSome) {
      uint32_t any = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) any |= ordered_bits(pair[i / 2].element[i % 2].coefficient);
      if (any == 0) continue;
    }
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
  for (int32_t left = size; left > 0; left -= kMatesInFlight, weights += 4 * kMatesInFlight, mates += kMatesInFlight) {
    Four weight[kMatesInFlight / 4];
    Index mate[kMatesInFlight / 4];
    load_fourth(reinterpret_cast<const Four*>(weights), (left + 3) >> 2, weight);
    if (left >= kMatesInFlight) {
#pragma unroll
      for (int i = 0; i < kMatesInFlight / 4; ++i) mate[i] = reinterpret_cast<const Index*>(mates)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kMatesInFlight; ++i) mate[i / 4].element[i % 4] = i < left ? mates[i] : own;
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

// What a lane has in one turn of a group's rows, of which a warp has `rows` at a time, kLanes lanes each.
struct GatherTurn {
  int32_t busy, helpers;  // warps: those with rows, the first of them helped by as many without
  bool helps;
  int32_t position;  // maybe behind the group's end: no row
  __device__ __forceinline__ GatherTurn(const Problem<float>& p, int32_t rows, int32_t top, int32_t end)
      : busy(min((end - top + rows - 1) / rows, kWarps)), helpers(min(min(p.slice_helpers, kWarps - busy), busy)) {
    const int32_t warp = thread_index() / 32;
    helps = warp >= busy && warp < busy + helpers;
    position = top + (helps ? warp - busy : warp) * rows + thread_index() % 32 * rows / 32;
  }
};
// What a lane knows of its row before the coefficients are there.
struct GatherRow {
  int32_t index, begin, end;  // no row: an empty class
  __device__ __forceinline__ GatherRow(const Problem<float>& p, int32_t position, int32_t behind) {
    const int32_t at = min(position, p.candidates.count - 1);
    index = sorted_index(p, p.candidates)[at];
    begin = p.candidates.mate_begin[at];
    end = position < behind ? p.candidates.mate_end[at] : begin;
  }
};
__device__ __forceinline__ GatherRow first_gathered(const Problem<float>& p) {
  const SliceItem<8> here(p, block_index());  // the rows do not depend on the lanes
  return {p, GatherTurn(p, p.slice_rows, here.row, here.end).position, here.end};
}

// What threads know of their first rows of 5a and 5b.
struct RowsOfPhase5 {
  ListedRow listed;
  GatherRow gathered;
};

// Phase 5b. The first item's slice is on its way; grid_arrive() stands behind 5a. `row`: first_gathered(). Warps for which
// there are no rows add up the class for the first warps, which have one warp more on their schedulers: the sums are the
// same, bit for bit.
template <int kLanes>
__device__ __forceinline__ void gather_slices(const Problem<float>& p, const Pass& pass, const uint32_t* ticket,
                                              const SliceShared& s, GatherRow row) {
  constexpr int kRows = 32 / kLanes;  // that a warp has at a time
  uint64_t count = 0;  // that the gradient is divided by
  const int32_t warp = thread_index() / 32, lane = thread_index() % 32;
  const uint32_t slice = shared_address(s.x + thread_index() % kLanes * 4);
  const Rows<float>& rows = p.candidates;
  bool is_waiting = true;  // the lists of other blocks may not be there yet
#pragma unroll 1
  for (int32_t item = block_index(); item < p.slice_items; item += grid_size()) {
    if (item != block_index()) {
      __syncthreads();  // the slice before has been read
      fetch_slice<kLanes>(p, item, s.x);
    }
    cp_async_wait<0>();
    __syncthreads();  // everybody's part of the slice has landed
    const SliceItem<kLanes> here(p, item);
    const int32_t end = here.end, column = here.column;
#pragma unroll 1
    for (int32_t top = here.row; top < end; top += kWarps * kRows) {
      const GatherTurn turn(p, kRows, top, end);
      const int32_t busy = turn.busy, position = turn.position;
      const bool helps = turn.helps, is_helped = warp < turn.helpers, has = position < end;
      if (item != block_index() || top != here.row) row = GatherRow(p, position, end);
      const int32_t index = row.index, begin = row.begin, mates_end = row.end;
      const int32_t length = has ? p.times_chosen[index] : 0;
      const Four x = *reinterpret_cast<const Four*>(shared_words(slice + static_cast<uint32_t>(index) * (16 * kLanes)));
      Four negatives{}, sum{};
      const int32_t positives = helps ? 0 : count_positives(p, begin, mates_end);
      add_list<kLanes, true>(slice, p.entry + side_by_side<2>(position, pass.entry_places(), 0), positives, x, negatives);
      if (is_waiting) {
        grid_wait(ticket);  // 5a of all blocks
        count = divisor_count(p);  // on its way to the end
        is_waiting = false;
      }
      const Mates mates(p, begin, mates_end);
      add_mates<kLanes>(slice, p.threshold + side_by_side<4>(position, pass.weight_places(), 0),
                        sorted_index(p, rows) + mates.from, is_helped ? 0 : mates.size, index, x, sum);
      if (helps) s.of_mates[(warp - busy) * 32 + lane] = sum;
      add_list<kLanes, false>(slice, chosen(p) + side_by_side<2>(position, p.list_places, 0), helps ? 0 : length, x,
                              negatives);
      if (turn.helpers > 0) {
        __syncthreads();  // the helpers' sums
        if (is_helped) sum = s.of_mates[warp * 32 + lane];
      }
      if (!has || helps || column >= p.dim) continue;
      auto scale = static_cast<float>(p.slope / divisor_of(count));
      if (p.euclidean) scale *= two_to<float>(-root_exponent<float>(pass));
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.element[i] = (sum.element[i] - negatives.element[i]) * scale;
      float* const out = static_cast<float*>(rows.gradient_out) + int64_t(index) * p.dim + column;
      if (p.writes_fours) {
        *reinterpret_cast<Four*>(out) = sum;
      } else {  // behind the last column a slice holds anything
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (column + i < p.dim) out[i] = sum.element[i];
        }
      }
    }
  }
  if (is_waiting) {  // no row: neither a copy nor a barrier may be left open
    cp_async_wait<0>();
    grid_wait(ticket);
  }
}

// How wide slices are and which items there are, and the block's shared memory with one; slice_lanes stays 0 where none fits,
// or the rows are not of the kind above. Where the rows lie changes how they are copied, not who sums what: the same bits.
inline void choose_slice(const TripletArgs& args, Problem<float>& p, int64_t blocks, int64_t limit, int64_t* bytes) {
  if (!p.plain || p.normalize || p.candidates.gradient_out == nullptr || args.constants > 0 || blocks == 0) return;
  p.writes_fours = p.dim % 4 == 0 && reinterpret_cast<uintptr_t>(p.candidates.gradient_out) % 16 == 0;
  if (p.dim >= 1 << 18) return;  // SliceItem counts on few slices
  int32_t lanes = 8;
  while (lanes > 2 && 2 * lanes >= p.dim) lanes /= 2;  // fewer have all columns
  for (; lanes >= 2; lanes /= 2) {  // narrower slices would read the lists too often
    int64_t used = 0;
    const auto fits = [&](int32_t helpers) {
      Carver carver{nullptr, 0, true};
      carver.take<BlockState>(1);
      carve_slice(carver, args.num_candidates, lanes, helpers);
      used = carver.used;
      return used <= limit;
    };
    if (!fits(0)) continue;
    p.slice_lanes = lanes;
    p.slice_rows = 32 / lanes;
    p.slices = static_cast<int32_t>(divide_up(p.dim, 4 * lanes));
    p.slices_reciprocal = static_cast<uint32_t>(divide_up(int64_t(1) << 31, p.slices));
    const int64_t groups = max(blocks / p.slices, int64_t(1));
    p.group_rows = static_cast<int32_t>(divide_up(args.num_candidates, 4 * groups) * 4);  // whole fours
    p.slice_items = static_cast<int32_t>(divide_up(args.num_candidates, p.group_rows)) * p.slices;
    const int32_t rows = 32 / lanes, busy = static_cast<int32_t>(divide_up((p.group_rows - 1) % (rows * kWarps) + 1, rows));
    p.slice_helpers = min(kWarps - busy, busy);
    while (!fits(p.slice_helpers)) --p.slice_helpers;
    *bytes = used;
    return;
  }
}

}  // namespace facenet_ext::cuda
