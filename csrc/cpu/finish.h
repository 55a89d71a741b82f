// From filled buckets to chosen negatives, hinge, weights, sums — or, when mining, to the list of pairs.
#pragma once

#include "mine.h"

namespace facenet_ext::cpu {
namespace {

// A run: one distinct negative of an anchor and the weight of all positives that took it. Lives where the buckets were.
template <class T>
struct Run {
  T weight;
  uint32_t candidate;  // sorted position
};
static_assert(sizeof(Run<float>) <= sizeof(KeyOf<float>::Key) && sizeof(Run<double>) <= sizeof(KeyOf<double>::Key), "");

// An anchor's own share of the gradient that selection has at hand: its negatives, whose rows are in the near caches just
// now, and, where anchors are no candidates, its positives. Unscaled, into the output row (see gradient.h for the formula).
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
    for (uint32_t place = 0; place < w.rows[row].pairs; ++place)
      if (w.weight[slot + place] != 0) gather.push(w.rows[row].positive(place), w.weight[slot + place]);
  const Run<T>* runs = reinterpret_cast<const Run<T>*>(w.key + slot);
  for (uint32_t i = 0; i < w.rows[row].runs; ++i) gather.push(runs[i].candidate, -runs[i].weight);
  gather.flush();
  // A candidate's row may hold what earlier passes' anchors gave it.
  if ((!inside || first) && !counts_all(c.args))
    for (int64_t k = 0; k < c.D; ++k) out[k] = scratch.row[k];
  else
    for (int64_t k = 0; k < c.D; ++k) out[k] += scratch.row[k];
}

// Up to kBatch pairs of one anchor, in order of their positives' distances (hard: of place); only pairs whose distances are
// needed.
constexpr int kBatch = 64;
template <class T>
struct Pairs {
  int count = 0, distinct = 0;
  uint32_t place[kBatch];    // the positive, see Row
  int32_t negative[kBatch];  // sorted position
  uint8_t fallback[kBatch];
  uint8_t fresh[kBatch];     // not the negative of the pair before
  int32_t run_of[kBatch];    // [distinct] the fresh negatives
  T d2_ap[kBatch], d2_an[kBatch];
};

// One anchor's selection and loss. The buckets only choose; distances that enter the loss are summed directly, so
// near-duplicates keep full relative accuracy.
template <class S>
struct Selection {
  using T = typename S::T;
  using Key = typename KeyOf<T>::Key;
  const Call<S>& c;
  const int64_t row;
  const Buckets<S> buckets;
  const int K;           // pairs
  const T* x;            // [Dp] the anchor
  const uint32_t* rank;  // [K] order of distance -> place
  Key closest = kNoKey<T>;  // hard: every pair's negative
  int64_t farthest = -1;  // the fallback's negative, found only where some positive needs it
  int32_t last = -1;      // the negative of the pair before, and its distance
  T last_d2 = 0;
  RowSum sum{};
  uint32_t runs = 0;

  Selection(const Call<S>& call, int64_t r)
      : c(call),
        row(r),
        buckets(call.buckets(r)),
        K(static_cast<int>(buckets.row.pairs)),
        x(c.w.ax + r * c.Dp),
        rank(c.w.rank + buckets.row.slot) {}

  // Suffix minimum, in place: key[r + 1] becomes the negative of the positive of rank r. Tied positives share one.
  void nearest_farther() {
    const T* t = buckets.t;
    Key* key = buckets.key;
    Key nearest = kNoKey<T>;
    for (int r = K - 1; r >= 0; --r) {
      if (r == K - 1 || t[r] < t[r + 1]) nearest = key[r + 1] < nearest ? key[r + 1] : nearest;
      key[r + 1] = nearest;
    }
    if (key[K] != kNoKey<T> || !buckets.row.track_far) return;
    farthest = buckets.row.far ? c.w.position[~key_index(buckets.row.far)] : c.w.position[first_negative()];
  }

  void nearest() {
    if (K > 0) closest = buckets.key[1];
    if (K > 0 && closest == kNoKey<T>)
      closest = make_key(std::numeric_limits<T>::quiet_NaN(), static_cast<uint32_t>(first_negative()));
  }

  int64_t first_negative() const {  // by index; for an anchor whose every distance is NaN
    int64_t i = 0;
    while (c.w.class_of[c.w.position[i]] == c.w.aclass[row]) ++i;
    return i;
  }

  // The pairs of ranks (hard: places) r0 .. r0 + n. Those whose negative lies beyond the hinge's reach are only counted.
  template <bool kHard>
  void choose(int r0, int n, Pairs<T>& pairs) {
    pairs.count = pairs.distinct = 0;
    T* weight = c.w.weight + buckets.row.slot;
    for (int i = 0; i < n; ++i) {
      const Key chosen = kHard ? closest : buckets.key[r0 + i + 1];
      const uint32_t place = kHard ? static_cast<uint32_t>(r0 + i) : rank[r0 + i];
      const T threshold = kHard ? weight[place] : buckets.t[r0 + i];
      const bool none = chosen == kNoKey<T>;
      weight[place] = 0;
      sum.fallback += none;
      if (none && farthest < 0) {  // the pair does not count
        if (c.mining) list_none(place);
        continue;
      }
      ++sum.pairs;
      if (!none && c.far_is_zero && key_value<T>(chosen) > c.limit(threshold)) continue;
      const int32_t negative = none ? static_cast<int32_t>(farthest) : c.w.position[key_index(chosen)];
      const int at = pairs.count++;
      pairs.fresh[at] = negative != last;
      if (negative != last) {
        pairs.run_of[pairs.distinct++] = negative;
        prefetch_row(c.w.x + negative * c.Dp, c.Dp);
      }
      pairs.negative[at] = last = negative;
      pairs.place[at] = place;
      pairs.fallback[at] = none;
    }
    T distinct_d2[kBatch];
    const Row<T>& own = buckets.row;
    direct_distances<S>(x, c.w.x, c.Dp, pairs.count, [&](int i) { return own.positive(pairs.place[i]); }, pairs.d2_ap);
    direct_distances<S>(x, c.w.x, c.Dp, pairs.distinct, [&](int i) { return pairs.run_of[i]; }, distinct_d2);
    for (int i = 0, at = -1; i < pairs.count; ++i) {
      at += pairs.fresh[i];
      pairs.d2_an[i] = last_d2 = at < 0 ? last_d2 : distinct_d2[at];
    }
  }

  void list_none(uint32_t place) const {
    const TripletArgs& args = c.args;
    const int64_t pair = args.pair_begin[c.w.arow[row]] + place;
    args.positive[pair] = c.w.order[buckets.row.positive(place)];
    args.negative[pair] = -1;
    static_cast<T*>(args.d2_ap)[pair] = static_cast<T*>(args.d2_an)[pair] = std::numeric_limits<T>::quiet_NaN();
    args.is_fallback[pair] = 1;
  }

  // Mining: the pairs as they are.
  void list(const Pairs<T>& pairs) const {
    const TripletArgs& args = c.args;
    for (int i = 0; i < pairs.count; ++i) {
      const int64_t pair = args.pair_begin[c.w.arow[row]] + pairs.place[i];
      args.positive[pair] = c.w.order[buckets.row.positive(pairs.place[i])];
      args.negative[pair] = c.w.order[pairs.negative[i]];
      static_cast<T*>(args.d2_ap)[pair] = static_cast<T>(pairs.d2_ap[i] * c.unscale);
      static_cast<T*>(args.d2_an)[pair] = static_cast<T>(pairs.d2_an[i] * c.unscale);
      args.is_fallback[pair] = pairs.fallback[i];
    }
  }

  // Terms, sums, and the weights of d2_ap (by place) and d2_an (one run per distinct negative, over buckets already read).
  void hinge(const Pairs<T>& pairs) {
    const int n = pairs.count;
    const double margin = c.args.margin;
    if (c.args.stat_counts)
      for (int i = 0; i < n; ++i) {
        const double ap = pairs.d2_ap[i] * c.unscale;
        sum.d2_ap += ap;
        sum.d2_an += pairs.d2_an[i] * c.unscale;
        sum.max_d2_ap = ap > sum.max_d2_ap ? ap : sum.max_d2_ap;
      }
    // In scaled units first: two distances beyond the number range may still have a difference.
    double loss[kBatch];  // d_ap - d_an, then the term
    T push[kBatch], pull[kBatch];
    const double unit = c.args.distance == Distance::cosine ? c.unscale / 2 : c.unscale;
    if (c.args.distance == Distance::euclidean) {
      for (int i = 0; i < n; ++i) {
        const double ap = std::sqrt(static_cast<double>(pairs.d2_ap[i])), an = std::sqrt(static_cast<double>(pairs.d2_an[i]));
        loss[i] = (ap - an) / c.scale;
        push[i] = static_cast<T>(ap > 0 ? 1 / ap : 0);
        pull[i] = static_cast<T>(an > 0 ? 1 / an : 0);
      }
    } else {
      for (int i = 0; i < n; ++i) {
        loss[i] = (static_cast<double>(pairs.d2_ap[i]) - static_cast<double>(pairs.d2_an[i])) * unit;
        push[i] = pull[i] = 1;
      }
    }
    if (c.args.stat_counts)
      for (int i = 0; i < n; ++i) {
        const bool hard = pairs.d2_an[i] <= pairs.d2_ap[i];
        sum.hard += hard;
        sum.semi_hard += !hard && loss[i] + margin > 0;
      }
    if (c.args.soft_margin)
      for (int i = 0; i < n; ++i) {  // log(1 + exp(g)) without overflow; its slope is the logistic function
        const double small = std::exp(-std::fabs(loss[i]));
        const T slope = static_cast<T>((loss[i] > 0 ? 1 : small) / (1 + small));
        loss[i] = (loss[i] > 0 ? loss[i] : 0) + std::log1p(small);
        push[i] *= slope;
        pull[i] *= slope;
      }
    else
      for (int i = 0; i < n; ++i) loss[i] += margin;
    T* weight = c.w.weight + buckets.row.slot;
    Run<T>* run = reinterpret_cast<Run<T>*>(buckets.key);
    for (int i = 0; i < n; ++i) {
      sum.active += c.args.soft_margin || loss[i] > 0;  // a soft term is above 0, if only in exact arithmetic
      if (!(loss[i] > 0)) continue;
      sum.loss += loss[i];
      weight[pairs.place[i]] = push[i];
      const uint32_t negative = static_cast<uint32_t>(pairs.negative[i]);
      if (runs > 0 && run[runs - 1].candidate == negative) run[runs - 1].weight += pull[i];
      else run[runs++] = {pull[i], negative};
    }
  }
};

template <class S>
void select(Call<S>& c, int64_t begin, int64_t end) {
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
  for (int64_t row = begin; row < end; ++row) {
    c.buckets(row).settle();
    Selection<S> selection(c, row);
    Pairs<typename S::T> pairs;
    if (c.hard) selection.nearest();
    else if (!draws_one(c.args)) selection.nearest_farther();  // what is drawn stands there already (draw.h)
    for (int r0 = 0; r0 < selection.K; r0 += kBatch) {
      const int n = selection.K - r0 < kBatch ? selection.K - r0 : kBatch;
      if (c.hard) selection.template choose<true>(r0, n, pairs);
      else selection.template choose<false>(r0, n, pairs);
      if (c.mining) selection.list(pairs);
      else selection.hinge(pairs);
    }
    c.w.rows[row].runs = selection.runs;
    c.w.sums[row] = selection.sum;
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
    s.hard += r.hard;
    s.semi_hard += r.semi_hard;
  }
  const int64_t count = args.reduction == Reduction::sum ? 1 : args.reduction == Reduction::mean ? s.pairs : s.active;
  c.factor = count > 0 ? 1.0 / static_cast<double>(count) : 0;
  *static_cast<T*>(args.loss) = static_cast<T>(s.loss * c.factor);
  if (args.stat_counts) {
    const double pairs = s.pairs > 0 ? static_cast<double>(s.pairs) : 1;
    args.stat_counts[0] = s.pairs;
    args.stat_counts[1] = s.active;
    args.stat_counts[2] = s.fallback;
    args.stat_counts[3] = s.hard;
    args.stat_counts[4] = s.semi_hard;
    static_cast<T*>(args.stat_d2)[0] = static_cast<T>(s.d2_ap / pairs);
    static_cast<T*>(args.stat_d2)[1] = static_cast<T>(s.d2_an / pairs);
    static_cast<T*>(args.stat_d2)[2] = static_cast<T>(s.max_d2_ap);
  }
}

}  // namespace
}  // namespace facenet_ext::cpu
