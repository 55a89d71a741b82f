// Thresholds and the sweep: what fills the buckets.
//
//             candidates J
//           +----+----+----+----+   Symmetric case: tile (I, J) serves the anchors of I (its rows) and, transposed strip by
//           | \\ | ## | ## |    |   strip, the anchors of J (its columns), so every product is made once. The tiles of a
//   anchors +----+----+----+----+   pass are dealt diagonal by diagonal, (i, i + s), so that neighbours in time share no
//      I    |    | \\ | ## | ## |   anchors and rarely wait for each other's lock.
//           +----+----+----+----+
//           | ## |    | \\ | ## |   A tile: 192 x 192 float32 distances = 144 KiB, in L2. Bytes from L3 or memory per tile:
//           +----+----+----+----+   2 * 192 * D * 4, against 192^2 * D products: below 1 byte a cycle.
#pragma once

#include <sched.h>

#include "gather.h"

namespace facenet_ext::cpu {
namespace {

// How many of the ascending values[0 .. n) are below `limit`.
int64_t count_until(const int32_t* values, int64_t n, int32_t limit) {
  int64_t low = 0;
  while (low < n) {
    const int64_t middle = low + (n - low) / 2;
    if (values[middle] < limit) low = middle + 1;
    else n = middle;
  }
  return low;
}

// The longest run of live anchors from `begin` on whose slots fit; sets their places. At least one anchor always fits.
template <class S>
int64_t plan_pass(Call<S>& c, int64_t begin) {
  using T = typename S::T;
  const auto& w = c.w;
  int64_t used = 0, row = begin;
  for (; row < c.classes.live; ++row) {
    const int32_t k = w.aclass[row], self = w.aself[row];
    int32_t first = w.class_begin[k], end = w.class_begin[k + 1];
    if (c.args.negatives_only > 0) {  // they stand at the end, since a class is sorted by index
      const int32_t limit = static_cast<int32_t>(c.C - c.args.negatives_only);
      end = first + static_cast<int32_t>(count_until(w.order + first, end - first, limit));
    }
    if (c.args.pairs == PairOrder::unordered) first = self + 1;
    const bool inside = self >= first && self < end;
    const int32_t K = first < end ? end - first - inside : 0;
    const int64_t slots = slot_pitch(c.one_positive && K > 1 ? 1 : K);
    if (used + slots > w.slots) break;
    Row<T>& r = w.rows[row];
    r.pairs = static_cast<uint32_t>(K);
    r.first = first;
    r.hole = inside ? self : kNoHole;
    r.slot = used;
    used += slots;
  }
  return row;
}

// One positive an anchor: the farthest or closest of candidates [a, b), d their distances by position, and of those seen
// before: its distance stays in t[0], its position in rank[0]. A NaN is never the farthest (-1 for now) nor the closest.
template <class S>
void keep_one(const Call<S>& c, const typename S::T* d, int64_t a, int64_t b, const Row<typename S::T>& row, typename S::T* t,
              uint32_t* rank) {
  using T = typename S::T;
  constexpr T kMost = std::numeric_limits<T>::max();
  const bool farthest = c.args.positives == Positives::hardest;
  for (int64_t j = a; j < b; ++j) {
    if (j == row.hole) continue;
    const T value = d[j] <= kMost ? d[j] : farthest ? T(-1) : kMost;
    const bool first = j == row.positive(0);
    if (first || (farthest ? value > t[0] : value < t[0])) {
      t[0] = value;
      rank[0] = static_cast<uint32_t>(j);
    }
  }
}

// Where no pair is looked at again, an expanded square that is small against its rows, and so mostly their rounding, gives
// way to the direct sum: a Euclidean distance's gradient divides by it.
template <class T>
constexpr T kNear = T(1) / 64;
template <class T>
constexpr T kNearSelected = T(1) / 4;  // the same where only the chosen pairs are looked at again (finish.h)
template <class S>
bool is_near(const Call<S>& c, typename S::T d, int64_t row, int64_t candidate) {
  return d < kNear<typename S::T> * (c.w.anorm[row] + c.w.norm[candidate]);
}
template <class S>
typename S::T direct_distance(const Call<S>& c, int64_t row, int64_t candidate) {
  const typename S::T* y = c.w.x + candidate * c.Dp;
  typename S::T d;
  direct_distances<S, 1>(c.w.ax + row * c.Dp, &y, c.Dp, &d);
  return d;
}

// Sorted distances of every anchor's positives, by the block products of the sweep: a positive and a negative at the same
// true distance differ by rounding of the same kind, and identical rows do not differ at all. 2 N K D FLOP and up to N NR D
// wasted.
template <class S>
void thresholds(Call<S>& c, int64_t begin, int64_t end) {
  using T = typename S::T;
  const auto& w = c.w;
  constexpr T kMost = std::numeric_limits<T>::max();
  const bool want_farthest = !c.hard && (c.mining || c.args.fallback == Fallback::farthest);
  const int64_t first = begin / S::MR * S::MR;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 4)
  for (int64_t r0 = first; r0 < end; r0 += S::MR) {
    const auto scratch = c.scratch(omp_get_thread_num());
    const int64_t from = r0 < begin ? begin : r0, to = r0 + S::MR < end ? r0 + S::MR : end;
    // Anchors are sorted by class, so their classes' candidates are one range.
    const int64_t low = w.class_begin[w.aclass[from]] / S::NR * S::NR, high = w.class_begin[w.aclass[to - 1] + 1];
    for (int64_t c0 = low; c0 < high; c0 += c.kT) {
      const int cols = static_cast<int>(c0 + c.kT < high ? c.kT : round_up(high - c0, S::NR));
      squared_distances<S>(w.ax + r0 * c.Dp, c.Dp, w.anorm + r0, w.panels + c0 / S::NR * c.panel_size, c.panel_size,
                           w.norm + c0, c.D, S::MR, cols, false, scratch.tile, c.kT);
      for (int64_t row = from; row < to; ++row) {
        const Row<T>& r = w.rows[row];
        if (r.pairs == 0) continue;
        const int64_t own_begin = r.first, own_end = r.positive(r.pairs - 1) + 1;
        const int64_t a = own_begin > c0 ? own_begin : c0, b = own_end < c0 + cols ? own_end : c0 + cols;
        T* t = (c.hard ? w.weight : w.t) + r.slot;
        if (counts_all(c.args))
          for (int64_t j = a; j < b; ++j) {
            T& d = scratch.tile[(row - r0) * c.kT + (j - c0)];
            if (is_near(c, d, row, j)) d = direct_distance(c, row, j);
          }
        if (c.one_positive) {
          keep_one(c, scratch.tile + (row - r0) * c.kT - c0, a, b, r, t, w.rank + r.slot);
          continue;
        }
        for (int64_t j = a; j < b; ++j) {
          if (j == r.hole) continue;
          const T d = scratch.tile[(row - r0) * c.kT + (j - c0)];
          // Nothing is farther than a positive at distance NaN.
          t[j - own_begin - (j > r.hole)] = d <= kMost ? d : kMost;
        }
      }
    }
    for (int64_t row = from; row < to; ++row) {
      Buckets<S> buckets = c.buckets(row);
      Row<T>& r = buckets.row;
      T* t = buckets.t;
      uint32_t* rank = w.rank + r.slot;
      if (c.one_positive && r.pairs > 0) {
        r.first = static_cast<int32_t>(rank[0]);
        r.pairs = 1;
        r.hole = kNoHole;
        T& d = (c.hard ? w.weight : w.t)[r.slot];
        if (d < 0) d = kMost;
      }
      r.positives = r.pairs;
      if (c.hard && r.pairs > 0) {  // one threshold below every distance: the bucket beyond it keeps the closest negative
        r.positives = 1;
        t[0] = -1;
      }
      const int K = static_cast<int>(r.positives);
      for (int64_t i = K; i < slot_pitch(K); ++i) t[i] = std::numeric_limits<T>::infinity();
      if (K < kMaxStrided) {  // by counting: K^2 / W comparisons and no branch
        T* sorted = scratch.strip;
        S::sorted_places(t, K, sorted, rank);
        for (int i = 0; i < K; ++i) t[i] = sorted[i];
      } else {
        sort_thresholds(t, rank, K);
      }
      if (!counts_all(c.args) && !draws_one(c.args)) buckets.start(want_farthest);
    }
  }
}

struct Lock {
  int32_t* word;
  explicit Lock(int32_t* w) : word(w) {
    while (__atomic_exchange_n(word, 1, __ATOMIC_ACQUIRE)) sched_yield();
  }
  ~Lock() { __atomic_store_n(word, 0, __ATOMIC_RELEASE); }
  Lock(const Lock&) = delete;
};

// Takes the distances d[g stride + 0 .. n) into the buckets of anchors row .. row + count, g apart. The searches of a group
// run one after the other without a branch that depends on the data; what they found is worked off in one loop.
template <class S>
void take_rows(const Call<S>& c, int64_t row, int count, const typename S::T* d, int64_t stride, int n, const int32_t* index,
               uint32_t* queue) {
  const auto& w = c.w;
  for (int g0 = 0; g0 < count; g0 += kGroup) {
    const int group = count - g0 < kGroup ? count - g0 : kGroup;
    int wanted = 0;
    for (int g = 0; g < group; ++g) {
      Buckets<S> buckets = c.buckets(row + g0 + g);
      const typename S::T* from = d + (g0 + g) * stride;
      if (buckets.row.radix >= kFarRadix)
        for (int at = 0; at < buckets.radix() * S::W; at += 64 / sizeof(*buckets.key)) __builtin_prefetch(buckets.key + at);
      if (buckets.searchable()) wanted += buckets.search(from, n, static_cast<uint32_t>(g) << 26, queue + wanted);
      else buckets.take(from, n, index, c.limit, queue + wanted);
    }
    for (int i = 0; i < wanted; ++i) {
      const uint32_t g = queue[i] >> 26, at = queue[i] >> 16 & 0x3ff, column = queue[i] & 0xffff;
      const int64_t slot = w.rows[row + g0 + g].slot + at;
      improve(w.key + slot, w.upper + slot, d[(g0 + g) * stride + column], index[column]);
    }
    for (int g = 0; g < group; ++g) c.buckets(row + g0 + g).look_for_top(d + (g0 + g) * stride, n, index, c.limit);
  }
}

// One tile: anchors' rows [r0, ..) of tile I against candidates [c0, ..) of tile J; anchors outside [begin, end) are not of
// this pass. `both`: the candidates of J are anchors of this pass too.
template <class S>
void sweep_tile(Call<S>& c, int64_t I, int64_t J, bool both, int64_t begin, int64_t end, int64_t first_tile) {
  using T = typename S::T;
  const auto& w = c.w;
  constexpr int kT = Call<S>::kT;
  const auto scratch = c.scratch(omp_get_thread_num());
  const int64_t r0 = I * kT, c0 = J * kT;
  const int64_t from = r0 > begin ? r0 : begin, to = r0 + kT < end ? r0 + kT : end;  // this pass's anchors among the rows
  const int cols = static_cast<int>(c0 + kT < c.C ? kT : round_up(c.C - c0, S::NR));
  int row0 = 0, rows;
  if (both) {  // every row is a candidate to the columns' anchors; the padding's norm is NaN
    rows = static_cast<int>(r0 + kT < c.A ? kT : round_up(c.A - r0, kColumnPad));
  } else {
    row0 = static_cast<int>((from - r0) / S::MR * S::MR);
    rows = static_cast<int>(round_up(to - r0, S::MR));
  }
  T* tile = scratch.tile;
  squared_distances<S>(w.ax + (r0 + row0) * c.Dp, c.Dp, w.anorm + r0 + row0, w.panels + c0 / S::NR * c.panel_size,
                       c.panel_size, w.norm + c0, c.D, rows - row0, cols, I == J && both, tile + row0 * kT, kT);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const int real_rows = static_cast<int>(r0 + rows < c.A ? rows : c.A - r0);
  for (int r = row0; r < real_rows; ++r) {  // candidates of the anchor's own class are no negatives
    const int32_t k = w.aclass[r0 + r];
    if (k < 0) continue;
    const int64_t a = w.class_begin[k] > c0 ? w.class_begin[k] : c0;
    const int64_t b = w.class_begin[k + 1] < c0 + cols ? w.class_begin[k + 1] : c0 + cols;
    for (int64_t j = a; j < b; ++j) tile[r * kT + (j - c0)] = nan;
    if (both && I == J) fill(tile + r * kT, r + 1 < cols ? r + 1 : cols, nan);
  }
  if (both && I == J)
    for (int r = real_rows; r < rows; ++r) fill(tile + r * kT, cols, nan);

  if (from < to) {
    Lock lock(w.locks + I - first_tile);
    for (int64_t row = from; row < to;) {
      const int skip = both && I == J ? static_cast<int>((row - r0) / S::W * S::W) : 0;  // below the diagonal
      const int64_t last = row - (row - r0) % S::W + S::W < to ? row - (row - r0) % S::W + S::W : to;
      take_rows(c, row, static_cast<int>(last - row), tile + (row - r0) * kT + skip, kT, cols - skip, w.order + c0 + skip,
                scratch.queue);
      row = last;
    }
  }
  if (both) {
    Lock lock(w.locks + J - first_tile);
    for (int col = 0; col < cols; col += S::W) {
      const int64_t a = c0 + col > begin ? c0 + col : begin, b = c0 + col + S::W < end ? c0 + col + S::W : end;
      if (a >= b) continue;
      const int height =
          I == J ? static_cast<int>(round_up(col + S::W, kColumnPad) < rows ? round_up(col + S::W, kColumnPad) : rows) : rows;
      S::transpose(tile + col, kT, height, scratch.strip);
      take_rows(c, a, static_cast<int>(b - a), scratch.strip + (a - c0 - col) * height, height, height, w.order + r0,
                scratch.queue);
    }
  }
}

// All tiles of a pass. The calling thread asks after each whether to go on (the callback paces itself).
template <class S>
void sweep(Call<S>& c, int64_t begin, int64_t end) {
  constexpr int kT = Call<S>::kT;
  const int64_t first = begin / kT, own = (end + kT - 1) / kT - first, all = (c.C + kT - 1) / kT;
  const int64_t shared = c.symmetric ? own * (own + 1) / 2 : 0;
  const int64_t single = own * (c.symmetric ? all - own : all);
  for (int64_t i = 0; i < own; ++i) c.w.locks[i] = 0;
  const int64_t run = own >= 32 ? 4 : 1;
  int stop = 0;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, run)
  for (int64_t i = 0; i < shared + single; ++i) {
    int halted;
#pragma omp atomic read
    halted = stop;
    if (halted) continue;
    if (i < shared) {
      // Runs of `run` tiles share their anchors, whose rows then stay in L2.
      const int64_t full = own / 2 / run * run * own, run_index = i / run;
      const int64_t I = i < full ? run_index % own : i % own;
      const int64_t J = (I + (i < full ? run_index / own * run + i % run : i / own)) % own;
      sweep_tile(c, first + (I < J ? I : J), first + (I < J ? J : I), true, begin, end, first);
    } else {
      const int64_t n = i - shared, I = n % own;
      int64_t J = c.symmetric ? n / own : (n / own + I) % all;
      if (c.symmetric && J >= first) J += own;
      sweep_tile(c, first + I, J, false, begin, end, first);
    }
    if (c.args.interrupted && omp_get_thread_num() == 0 && c.args.interrupted(c.args.interrupted_context)) {
#pragma omp atomic write
      stop = 1;
    }
  }
  c.stopped = stop != 0;
}

}  // namespace
}  // namespace facenet_ext::cpu
