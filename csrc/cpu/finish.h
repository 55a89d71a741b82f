// From filled buckets to chosen negatives, hinge, weights, sums — or, when mining, to the list of pairs.
#pragma once

#include <cmath>

#include "mine.h"

namespace facenet_ext::cpu {
namespace {

// sum_k (x_k - y_k)^2 for M rows y at once, dim a multiple of kSlotPad (zero padded).
template <class S, int M>
void direct_distances(const typename S::T* x, const typename S::T* const* y, int64_t dim, typename S::T* out) {
  using V = typename S::V;
  V sum[M], more[M];
  for (int m = 0; m < M; ++m) sum[m] = more[m] = S::zero();
  int64_t k = 0;
  for (; k + 2 * S::W <= dim; k += 2 * S::W) {
    const V x0 = S::load(x + k), x1 = S::load(x + k + S::W);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V d0 = x0 - S::load(y[m] + k), d1 = x1 - S::load(y[m] + k + S::W);
      sum[m] = S::madd(d0, d0, sum[m]);
      more[m] = S::madd(d1, d1, more[m]);
    }
  }
  for (; k < dim; k += S::W)
    for (int m = 0; m < M; ++m) {
      const V d0 = S::load(x + k) - S::load(y[m] + k);
      sum[m] = S::madd(d0, d0, sum[m]);
    }
  for (int m = 0; m < M; ++m) out[m] = S::sum(sum[m] + more[m]);
}

// The same for any number of rows of `base`; at(i) says which.
template <class S, class At>
void direct_distances(const typename S::T* x, const typename S::T* base, int64_t dim, int n, At at, typename S::T* out) {
  const typename S::T* y[4];
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int m = 0; m < 4; ++m) y[m] = base + at(i + m) * dim;
    direct_distances<S, 4>(x, y, dim, out + i);
  }
  for (; i < n; ++i) {
    y[0] = base + at(i) * dim;
    direct_distances<S, 1>(x, y, dim, out + i);
  }
}

// A run: one distinct negative of an anchor and the weight of all positives that took it. Lives where the buckets were.
template <class T>
struct Run {
  T weight;
  uint32_t candidate;  // sorted position
};
static_assert(sizeof(Run<float>) <= sizeof(KeyOf<float>::Key) && sizeof(Run<double>) <= sizeof(KeyOf<double>::Key), "");


// Selection and loss of every anchor of the pass. The buckets only choose; distances that enter the loss are summed directly,
// so near-duplicates keep full relative accuracy.
template <class S>
void select(Call<S>& c, int64_t begin, int64_t end) {
  using T = typename S::T;
  using Key = typename KeyOf<T>::Key;
  const auto& w = c.w;
  const TripletArgs& args = c.args;
  const bool euclidean = args.distance == Distance::euclidean;
  const bool stats = args.stat_counts != nullptr;
  constexpr int kBatch = 128;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
  for (int64_t row = begin; row < end; ++row) {
    Buckets<S> buckets = c.buckets(row);
    const int K = static_cast<int>(buckets.row.positives);
    const T* t = buckets.t;
    Key* key = buckets.key;
    const uint32_t* rank = w.rank + buckets.row.slot;
    T* weight = w.weight + buckets.row.slot;
    const T* x = w.ax + row * c.Dp;
    const int64_t class_begin = w.class_begin[w.aclass[row]];
    const int64_t self = w.aself[row];
    const auto candidate_of = [&](uint32_t place) {  // position inside the class, self left out -> sorted candidate
      const int64_t at = class_begin + place;
      return at + (self >= 0 && at >= self);
    };

    // Suffix minimum, in place: key[r + 1] becomes the negative of the positive of rank r. Tied positives share one.
    Key nearest = kNoKey<T>;
    for (int r = K - 1; r >= 0; --r) {
      if (r == K - 1 || t[r] < t[r + 1]) nearest = key[r + 1] < nearest ? key[r + 1] : nearest;
      key[r + 1] = nearest;
    }
    // The farthest negative, for positives without a farther one. Where every distance is NaN: the first of another class.
    int64_t farthest = -1;
    if (key[K] == kNoKey<T> && buckets.row.track_far) {
      if (buckets.row.far) {
        farthest = w.position[~key_index(buckets.row.far)];
      } else {
        farthest = 0;
        for (int64_t i = 0; i < c.C; ++i)
          if (w.class_of[w.position[i]] != w.aclass[row]) {
            farthest = w.position[i];
            break;
          }
      }
    }

    RowSum sum{};
    Run<T>* runs = reinterpret_cast<Run<T>*>(key);
    uint32_t run_count = 0;
    int64_t previous = -1;  // the negative of the run in hand, whose direct distance is `previous_d2`
    double previous_d2 = 0;
    int64_t negative[kBatch];
    bool fallback[kBatch], needed[kBatch];
    T d2_ap[kBatch], d2_an[kBatch];
    int64_t wanted[kBatch];
    int32_t slot_of[kBatch];
    for (int r0 = 0; r0 < K; r0 += kBatch) {
      const int n = K - r0 < kBatch ? K - r0 : kBatch;
      // Which negative; and is the pair surely inactive? Then no distance is needed.
      int distinct = 0;
      int64_t last = previous;
      for (int i = 0; i < n; ++i) {
        const Key chosen = key[r0 + i + 1];
        fallback[i] = chosen == kNoKey<T>;
        negative[i] = fallback[i] ? farthest : w.position[key_index(chosen)];
        needed[i] = negative[i] >= 0 && (fallback[i] || !c.limit.on || !(key_value<T>(chosen) > c.limit(t[r0 + i])));
        if (!needed[i]) continue;
        if (negative[i] != last) wanted[distinct++] = last = negative[i];
        slot_of[i] = distinct - 1;  // -1: the run goes on from the last batch
      }
      T distinct_d2[kBatch];
      direct_distances<S>(x, w.x, c.Dp, distinct, [&](int i) { return wanted[i]; }, distinct_d2);
      // Distances to the needed positives, compacted.
      int count = 0;
      int32_t place[kBatch];
      for (int i = 0; i < n; ++i)
        if (needed[i]) place[count++] = i;
      direct_distances<S>(x, w.x, c.Dp, count, [&](int i) { return candidate_of(rank[r0 + place[i]]); }, d2_ap);
      for (int i = count - 1; i >= 0; --i) d2_ap[place[i]] = d2_ap[i];
      for (int i = 0; i < n; ++i)
        if (needed[i]) d2_an[i] = slot_of[i] < 0 ? static_cast<T>(previous_d2) : distinct_d2[slot_of[i]];

      for (int i = 0; i < n; ++i) {
        const uint32_t at = rank[r0 + i];
        if (c.mining) {
          const int64_t pair = args.pair_begin[w.arow[row]] + at;
          args.positive[pair] = w.order[candidate_of(at)];
          args.negative[pair] = w.order[negative[i]];
          static_cast<T*>(args.d2_ap)[pair] = static_cast<T>(d2_ap[i] * c.unscale);
          static_cast<T*>(args.d2_an)[pair] = static_cast<T>(d2_an[i] * c.unscale);
          args.is_fallback[pair] = fallback[i];
          continue;
        }
        weight[at] = 0;
        if (negative[i] < 0) continue;  // fallback = skip
        ++sum.pairs;
        if (!needed[i]) continue;
        const double ap = d2_ap[i] * c.unscale, an = d2_an[i] * c.unscale;
        sum.fallback += fallback[i];
        if (stats) {
          sum.d2_ap += ap;
          sum.d2_an += an;
          sum.max_d2_ap = ap > sum.max_d2_ap ? ap : sum.max_d2_ap;
        }
        // In scaled units first: two distances beyond the number range may still have a difference.
        const double dap = euclidean ? std::sqrt(static_cast<double>(d2_ap[i])) : d2_ap[i];
        const double dan = euclidean ? std::sqrt(static_cast<double>(d2_an[i])) : d2_an[i];
        const double hinge = (dap - dan) * (euclidean ? 1 / c.scale : c.unscale) + args.margin;
        if (!(hinge > 0)) continue;
        sum.loss += hinge;
        ++sum.active;
        weight[at] = static_cast<T>(euclidean ? (dap > 0 ? 1 / dap : 0) : 1);
        const T pull = static_cast<T>(euclidean ? (dan > 0 ? 1 / dan : 0) : 1);
        if (run_count > 0 && runs[run_count - 1].candidate == static_cast<uint32_t>(negative[i])) {
          runs[run_count - 1].weight += pull;
        } else {
          runs[run_count].weight = pull;
          runs[run_count++].candidate = static_cast<uint32_t>(negative[i]);
        }
      }
      if (distinct > 0) previous = wanted[distinct - 1], previous_d2 = static_cast<double>(distinct_d2[distinct - 1]);
    }
    buckets.row.runs = run_count;
    w.sums[row] = sum;
  }
}

// Sums over all anchors, in their order, in float64; the loss and the statistics.
template <class S>
void total(Call<S>& c) {
  using T = typename S::T;
  const TripletArgs& args = c.args;
  RowSum s{};
  for (int64_t row = 0; row < c.classes.live; ++row) {
    const RowSum& r = c.w.sums[row];
    s.loss += r.loss;
    s.d2_ap += r.d2_ap;
    s.d2_an += r.d2_an;
    s.max_d2_ap = r.max_d2_ap > s.max_d2_ap ? r.max_d2_ap : s.max_d2_ap;
    s.pairs += r.pairs;
    s.active += r.active;
    s.fallback += r.fallback;
  }
  const int64_t count = args.reduction == Reduction::sum ? 1 : args.reduction == Reduction::mean ? s.pairs : s.active;
  c.factor = count > 0 ? 1.0 / static_cast<double>(count) : 0;
  *static_cast<T*>(args.loss) = static_cast<T>(s.loss * c.factor);
  if (args.stat_counts) {
    const double pairs = s.pairs > 0 ? static_cast<double>(s.pairs) : 1;
    args.stat_counts[0] = s.pairs;
    args.stat_counts[1] = s.active;
    args.stat_counts[2] = s.fallback;
    static_cast<T*>(args.stat_d2)[0] = static_cast<T>(s.d2_ap / pairs);
    static_cast<T*>(args.stat_d2)[1] = static_cast<T>(s.d2_an / pairs);
    static_cast<T*>(args.stat_d2)[2] = static_cast<T>(s.max_d2_ap);
  }
}

}  // namespace
}  // namespace facenet_ext::cpu
