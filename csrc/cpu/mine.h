// Passes and thresholds: which anchors' slots fit at a time, and the sorted distances of their positives.
#pragma once

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
  const int64_t first = begin / S::MR * S::MR;  // pieces of kColumnPad rows are whole register blocks too
  own_rows_first(c, first, end, kColumnPad, [&](int64_t piece, int64_t piece_end) {
    for (int64_t r0 = piece; r0 < piece_end; r0 += S::MR) {
      const auto scratch = c.scratch(omp_get_thread_num());
      const int64_t from = r0 < begin ? begin : r0, to = r0 + S::MR < end ? r0 + S::MR : end;
      // Anchors are sorted by class, so their classes' candidates are one range.
      const int64_t low = w.class_begin[w.aclass[from]] / S::W * S::W, high = w.class_begin[w.aclass[to - 1] + 1];
      for (int64_t c0 = low; c0 < high; c0 += c.kT) {
        const int cols = static_cast<int>(c0 + c.kT < high ? c.kT : round_up(high - c0, S::W));
        squared_distances<S>(w.ax + r0 * c.Dp, c.Dp, w.anorm + r0, w.panels, c.panel_size, c0, w.norm, c.D, S::MR, cols,
                             false, scratch.tile, c.kT);
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
          const T* const d = scratch.tile + (row - r0) * c.kT - c0;
          const int64_t hole = r.hole < a ? a : r.hole < b ? r.hole : b;
          // Nothing is farther than a positive at distance NaN.
          for (int64_t j = a; j < hole; ++j) t[j - own_begin] = d[j] <= kMost ? d[j] : kMost;
          for (int64_t j = hole + (hole == r.hole); j < b; ++j) t[j - own_begin - 1] = d[j] <= kMost ? d[j] : kMost;
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
        if (counts_all(c.args)) {
          r.farthest_positive = K > 0 ? t[K - 1] : -1;
          r.ceiling = K > 0 ? c.limit(t[K - 1]) : -1;
        } else if (!draws_one(c.args)) {
          buckets.start(want_farthest);
          if (c.hard && c.far_is_zero && K > 0) {  // the one bucket closes where no positive's hinge reaches
            const T* d2_ap = w.weight + r.slot;
            T most = d2_ap[0];
            for (uint32_t i = 1; i < r.pairs; ++i) most = d2_ap[i] > most ? d2_ap[i] : most;
            buckets.close_all(c.limit(most));
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace facenet_ext::cpu
