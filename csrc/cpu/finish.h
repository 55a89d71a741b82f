// From filled buckets to chosen negatives, hinge, weights, sums — or, when mining, to the list of pairs.
#pragma once

#include "gather.h"

namespace facenet_ext::cpu {
namespace {

// A run: one distinct negative of an anchor and the weight of all positives that took it. Lives where the buckets were.
template <class T>
struct Run {
  T weight;
  uint32_t candidate;  // sorted position
};
static_assert(sizeof(Run<float>) <= sizeof(KeyOf<float>::Key) && sizeof(Run<double>) <= sizeof(KeyOf<double>::Key), "");


// An anchor's own share of the gradient that selection has at hand: its negatives, whose rows are in the near caches just now,
// and, where anchors are no candidates, its positives. Unscaled, into the output row (see gradient.h for the formula).
template <class S>
void own_gradient(const Call<S>& c, int64_t row, bool first) {
  using T = typename S::T;
  const auto& w = c.w;
  const bool inside = c.args.anchor_offset >= 0;
  T* out = inside ? static_cast<T*>(c.args.grad_candidates) : static_cast<T*>(c.args.grad_anchors);
  if (!out) return;
  out += (inside ? w.order[w.aself[row]] : w.arow[row]) * c.D;
  const auto scratch = c.scratch(omp_get_thread_num());
  fill(scratch.row, c.Dp, T(0));
  Gather<S> gather{w.ax + row * c.Dp, w.x, c.Dp, scratch.list, scratch.list_weight, scratch.row};
  const int64_t slot = w.rows[row].slot;
  if (!inside)
    for (uint32_t place = 0; place < w.rows[row].positives; ++place)
      if (w.weight[slot + place] != 0) gather.push(w.class_begin[w.aclass[row]] + place, w.weight[slot + place]);
  const Run<T>* runs = reinterpret_cast<const Run<T>*>(w.key + slot);
  for (uint32_t i = 0; i < w.rows[row].runs; ++i) gather.push(runs[i].candidate, -runs[i].weight);
  gather.flush();
  // A candidate's row may hold what earlier passes' anchors gave it.
  if (!inside || first)
    for (int64_t k = 0; k < c.D; ++k) out[k] = scratch.row[k];
  else
    for (int64_t k = 0; k < c.D; ++k) out[k] += scratch.row[k];
}

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
  constexpr int kBatch = 64;
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
    int64_t pairs = 0, active = 0, fallbacks = 0;
    double loss = 0;
    Run<T>* runs = reinterpret_cast<Run<T>*>(key);
    uint32_t run_count = 0;
    int32_t last = -1;  // the negative of the last pair, and its distance
    T last_d2 = 0;
    for (int r0 = 0; r0 < K; r0 += kBatch) {
      const int n = K - r0 < kBatch ? K - r0 : kBatch;
      // Which pairs need their distances: those with a negative that the hinge may not reach need none.
      int32_t negative[kBatch];
      uint32_t place[kBatch];    // of the needed pairs' positives, inside the class
      uint8_t fallback[kBatch];
      uint8_t fresh[kBatch];     // not the negative of the pair before
      int32_t run_of[kBatch];    // the distinct negatives in order
      T d2_ap[kBatch], d2_an[kBatch], distinct_d2[kBatch];
      int needed = 0, distinct = 0;
      for (int i = 0; i < n; ++i) {
        const Key chosen = key[r0 + i + 1];
        const uint32_t at = rank[r0 + i];
        const bool none = chosen == kNoKey<T>;
        if (!c.mining) weight[at] = 0;
        fallbacks += none;
        if (none && farthest < 0) continue;  // fallback = skip
        ++pairs;
        if (!none && c.limit.on && key_value<T>(chosen) > c.limit(t[r0 + i])) continue;
        const int32_t n_at = none ? static_cast<int32_t>(farthest) : w.position[key_index(chosen)];
        fresh[needed] = n_at != last;
        if (n_at != last) {
          run_of[distinct++] = n_at;
          prefetch_row(w.x + n_at * c.Dp, c.Dp);
        }
        last = n_at;
        negative[needed] = n_at;
        place[needed] = at;
        fallback[needed] = none;
        ++needed;
      }
      direct_distances<S>(x, w.x, c.Dp, needed, [&](int i) { return candidate_of(place[i]); }, d2_ap);
      direct_distances<S>(x, w.x, c.Dp, distinct, [&](int i) { return run_of[i]; }, distinct_d2);
      for (int i = 0, at = -1; i < needed; ++i) {
        at += fresh[i];
        d2_an[i] = at < 0 ? last_d2 : distinct_d2[at];
      }
      if (needed > 0) last_d2 = d2_an[needed - 1];

      if (c.mining) {
        for (int i = 0; i < needed; ++i) {
          const int64_t pair = args.pair_begin[w.arow[row]] + place[i];
          args.positive[pair] = w.order[candidate_of(place[i])];
          args.negative[pair] = w.order[negative[i]];
          static_cast<T*>(args.d2_ap)[pair] = static_cast<T>(d2_ap[i] * c.unscale);
          static_cast<T*>(args.d2_an)[pair] = static_cast<T>(d2_an[i] * c.unscale);
          args.is_fallback[pair] = fallback[i];
        }
        continue;
      }
      if (stats)
        for (int i = 0; i < needed; ++i) {
          sum.d2_ap += d2_ap[i] * c.unscale;
          sum.d2_an += d2_an[i] * c.unscale;
          sum.max_d2_ap = d2_ap[i] * c.unscale > sum.max_d2_ap ? d2_ap[i] * c.unscale : sum.max_d2_ap;
        }
      // In scaled units first: two distances beyond the number range may still have a difference.
      double hinge[kBatch];
      T push[kBatch], pull[kBatch];
      if (euclidean) {
        for (int i = 0; i < needed; ++i) {
          const double ap = std::sqrt(static_cast<double>(d2_ap[i])), an = std::sqrt(static_cast<double>(d2_an[i]));
          hinge[i] = (ap - an) / c.scale + args.margin;
          push[i] = static_cast<T>(ap > 0 ? 1 / ap : 0);
          pull[i] = static_cast<T>(an > 0 ? 1 / an : 0);
        }
      } else {
        for (int i = 0; i < needed; ++i) {
          hinge[i] = (static_cast<double>(d2_ap[i]) - static_cast<double>(d2_an[i])) * c.unscale + args.margin;
          push[i] = pull[i] = 1;
        }
      }
      for (int i = 0; i < needed; ++i) {
        if (!(hinge[i] > 0)) continue;
        loss += hinge[i];
        ++active;
        weight[place[i]] = push[i];
        if (run_count > 0 && runs[run_count - 1].candidate == static_cast<uint32_t>(negative[i])) {
          runs[run_count - 1].weight += pull[i];
        } else {
          runs[run_count].weight = pull[i];
          runs[run_count++].candidate = static_cast<uint32_t>(negative[i]);
        }
      }
    }
    sum.loss = loss;
    sum.pairs = pairs;
    sum.active = active;
    sum.fallback = fallbacks;
    buckets.row.runs = run_count;
    w.sums[row] = sum;
    if (c.wants_gradient()) own_gradient(c, row, begin == 0);
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
