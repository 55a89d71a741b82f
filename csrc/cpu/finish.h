// From filled buckets to chosen negatives, hinge, weights, sums — or, when mining, to the list of pairs.
#pragma once

#include "mine.h"

namespace facenet_ext::cpu {
namespace {

// An anchor's negatives.
template <class S>
void gather_runs(const Call<S>& c, int64_t row, const Gather<S>& gather) {
  const Row<typename S::T>& r = c.w.rows[row];
  const auto* runs = reinterpret_cast<const Run<typename S::T>*>(c.w.key + r.slot);
  gather.add(r.runs, [=](int64_t i) { return int64_t{runs[i].candidate}; }, [=](int64_t i) { return -runs[i].weight; });
}

template <class S>
void prefetch_runs(const Call<S>& c, int64_t row) {
  const Row<typename S::T>& r = c.w.rows[row];
  for (uint32_t i = 0; i < r.runs; i += 64 / sizeof(*c.w.key)) __builtin_prefetch(c.w.key + r.slot + i);
}

// The gradient of an anchor that is no candidate, unscaled (see gradient.h for the formula): its positives and its negatives,
// beside what a dense rule has summed there already.
template <class S>
void anchor_gradient(const Call<S>& c, int64_t row) {
  using T = typename S::T;
  const auto& w = c.w;
  const auto scratch = c.scratch(omp_get_thread_num());
  fill(scratch.rows, c.Dp, T(0));
  Gather<S> gather{w.ax + row * c.Dp, w.x, c.Dp, scratch.list, scratch.list_weight, scratch.block, scratch.rows, nullptr};
  const Row<T>& r = w.rows[row];
  const T* weight = w.weight + r.slot;
  gather.add_some(
      r.pairs, [&](int64_t i) { return r.positive(static_cast<uint32_t>(i)); }, [&](int64_t i) { return weight[i]; });
  gather_runs(c, row, gather);
  T* const out = static_cast<T*>(c.args.grad_anchors) + w.arow[row] * c.D;
  for (int64_t k = 0; k < c.D; ++k) out[k] = (counts_all(c.args) ? out[k] : T(0)) + scratch.rows[k];
}

// Up to kBatch pairs of one anchor, in order of their positives' distances (hard: of place); only pairs whose distances are
// needed.
constexpr int kBatch = 64;
template <class T>
struct Pairs {
  int count = 0, again = 0;
  uint32_t place[kBatch];    // the positive, see Row
  uint32_t index[kBatch];    // its negative, kNobody: the anchor's farthest
  int32_t negative[kBatch];  // sorted position
  int32_t direct[kBatch];    // [again] pairs whose distances are summed anew
  T d2_ap[kBatch], d2_an[kBatch];
};

// One anchor's selection and loss. Thresholds and buckets hold the distances of the sweep, |a|^2 + |b|^2 - 2 a.b, whose error
// is that of a direct sum of squares unless the rows are near each other: then both of the pair's distances are summed
// directly, so near-duplicates keep full relative accuracy.
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
  const T* threshold;  // [K] by rank
  const Key* chosen;  // [K] by rank, each positive's negative
  const T near;  // distances below it are summed directly
  const bool drawn;
  Key closest = 0;  // hard: every pair's negative
  int64_t farthest = -1;  // the fallback's negative, found only where some positive needs it
  T d2_farthest = 0;
  RowSum sum{};
  uint32_t runs = 0;
  T ordered_t[kMaxStrided];
  Key ordered_key[kMaxStrided];

  Selection(const Call<S>& call, int64_t r)
      : c(call),
        row(r),
        buckets(call.buckets(r)),
        K(static_cast<int>(buckets.row.pairs)),
        x(c.w.ax + r * c.Dp),
        rank(c.w.rank + buckets.row.slot),
        threshold(buckets.t),
        chosen(buckets.key + 1),
        near(c.direct ? std::numeric_limits<T>::infinity() : kNearSelected<T> * (c.w.anorm[r] + c.longest)),
        drawn(draws_one(c.args)) {}

  // Suffix minimum: the negative of the positive of rank r is the least of the buckets behind it. (Behind a positive that is
  // tied with the next one stands an empty bucket.) Strided buckets are put in order on the way.
  void nearest_farther() {
    Key best = ~Key{0};
    const auto less = [&](Key key) { return best = key < best ? key : best; };
    if (buckets.row.radix > 1) {
      const int L = buckets.lanes(), R = buckets.radix();
      for (int p = L - 1, b = R * L - 1; p >= 0; --p)
        for (int i = R - 1; i >= 0; --i, --b) {
          if (b <= K) ordered_key[b] = less(buckets.key[i * L + p]);
          ordered_t[b] = buckets.t[i * L + p];
        }
      threshold = ordered_t;
      chosen = ordered_key + 1;
    } else {
      for (int b = K; b > 0; --b) buckets.key[b] = less(buckets.key[b]);
    }
    if (!buckets.row.track_far) return;
    farthest = buckets.row.far ? c.w.position[~key_index(buckets.row.far)] : c.w.position[first_negative()];
    d2_farthest = key_value<T>(buckets.row.far);
  }

  void nearest() {
    if (K > 0) closest = buckets.key[1];
    if (K > 0 && key_index(closest) == kNobody && !c.far_is_zero)
      closest = make_key(std::numeric_limits<T>::quiet_NaN(), static_cast<uint32_t>(first_negative()));
  }

  int64_t first_negative() const {  // by index; for an anchor whose every distance is NaN
    int64_t i = 0;
    while (c.w.class_of[c.w.position[i]] == c.w.aclass[row]) ++i;
    return i;
  }

  // The pairs of ranks (hard: places) r0 .. r0 + n. Those whose negative lies beyond the hinge's reach are only counted.
  // Which they are is a coin toss at some stages of training: no branch depends on it.
  template <bool kHard>
  void choose(int r0, int n, Pairs<T>& pairs) {
    const Key* const key_of = chosen + r0;
    const uint32_t* const place_of = rank + r0;
    const T* const t = threshold + r0;
    T* const weight = c.w.weight + buckets.row.slot;
    const Limit<T> limit = c.limit;
    const bool far_is_zero = c.far_is_zero, may_be_none = !kHard && (drawn || buckets.row.top_empty),
               falls_back = farthest >= 0;
    int count = 0, fallbacks = 0, counted = 0;
    for (int i = 0; i < n; ++i) {
      const Key key = kHard ? closest : key_of[i];
      const uint32_t place = kHard ? static_cast<uint32_t>(r0 + i) : place_of[i];
      // A negative that no bucket holds lies beyond the hinge's reach, or there is none.
      const bool nobody = key_index(key) == kNobody, none = nobody && may_be_none;
      const T d2_ap = kHard ? weight[place] : t[i], d2_an = none ? d2_farthest : key_value<T>(key);
      const bool counts = !none || falls_back, beyond = far_is_zero && !none && (nobody || d2_an > limit(d2_ap));
      fallbacks += none;
      counted += counts;
      weight[place] = 0;
      pairs.index[count] = key_index(key);
      pairs.place[count] = place;
      pairs.d2_ap[count] = d2_ap;
      pairs.d2_an[count] = d2_an;
      count += counts && !beyond;
    }
    sum.fallback += fallbacks;
    sum.pairs += counted;
    if (c.mining && counted < n) {
      for (int i = 0; i < n; ++i)
        if (key_index(key_of[i]) == kNobody) list_none(place_of[i]);
    }
    int again_count = 0;
    const int32_t* const position = c.w.position;
    for (int i = 0; i < count; ++i) {
      const bool none = pairs.index[i] == kNobody;
      pairs.negative[i] = none ? static_cast<int32_t>(farthest) : position[none ? 0 : pairs.index[i]];
      pairs.direct[again_count] = i;
      again_count += !(pairs.d2_ap[i] >= near && pairs.d2_an[i] >= near);
    }
    pairs.count = count;
    pairs.again = again_count;
    T again[kBatch];
    const Row<T>& own = buckets.row;
    for (int i = 0; i < pairs.again; ++i) prefetch_row(c.w.x + pairs.negative[pairs.direct[i]] * c.Dp, c.Dp);
    direct_distances<S>(
        x, c.w.x, c.Dp, pairs.again, [&](int i) { return own.positive(pairs.place[pairs.direct[i]]); }, again);
    for (int i = 0; i < pairs.again; ++i) pairs.d2_ap[pairs.direct[i]] = again[i];
    direct_distances<S>(x, c.w.x, c.Dp, pairs.again, [&](int i) { return pairs.negative[pairs.direct[i]]; }, again);
    for (int i = 0; i < pairs.again; ++i) pairs.d2_an[pairs.direct[i]] = again[i];
  }

  // No pair is near, none falls back, and a term is a difference of squares: early in training nearly always. Then a negative
  // beyond the hinge's reach needs no attention of its own, its term is below 0, and all that choose() and hinge() find out a
  // pair at a time comes from whole vectors.
  bool plain() const {
    return c.far_is_zero && !c.hard && c.args.distance != Distance::euclidean && !buckets.row.top_empty && K > 0 &&
           threshold[0] >= near;
  }
  void plain_hinge(int r0, int n) {
    constexpr int kSums = 8;  // partial sums, side by side
    const double half = c.args.distance == Distance::cosine ? 0.5 : 1, margin = c.args.margin;
    double term[kBatch], sums[kSums] = {};
    uint32_t active[kBatch], index[kBatch];
    for (int i = 0; i < n; ++i) {
      const double gap = static_cast<double>(threshold[r0 + i]) - static_cast<double>(key_value<T>(chosen[r0 + i]));
      term[i] = c.unscaled(gap * half) + margin;
      active[i] = term[i] > 0;
      index[i] = key_index(chosen[r0 + i]);
    }
    for (int i = n; i % kSums != 0; ++i) term[i] = 0;
    for (int i = 0; i < n; i += kSums)
      for (int j = 0; j < kSums; ++j) sums[j] += term[i + j] > 0 ? term[i + j] : 0;
    for (const double part : sums) sum.loss += part;
    sum.pairs += n;
    T* const weight = c.w.weight + buckets.row.slot;
    for (int i = 0; i < n; ++i) weight[rank[r0 + i]] = static_cast<T>(active[i]);
    uint32_t length[kBatch + 1], of[kBatch + 1];  // runs, by index; the one before the first is nobody's
    uint32_t end = 0, last = kNobody, so_far = 0;
    for (int i = 0; i < n; ++i) {
      const uint32_t begins = active[i] & static_cast<uint32_t>(index[i] != last);
      end += begins;
      so_far = (so_far & (begins - 1)) + active[i];
      last = active[i] ? index[i] : last;
      length[end] = so_far;
      of[end] = last;
    }
    Run<T>* const out = reinterpret_cast<Run<T>*>(buckets.key);  // in the place of buckets that have been read
    const int32_t* const position = c.w.position;
    const uint32_t before = runs;
    int64_t terms = 0;
    for (uint32_t i = 1; i <= end; ++i) {
      out[before + i - 1] = {static_cast<T>(length[i]), static_cast<uint32_t>(position[of[i]])};
      terms += length[i];
    }
    runs += end;
    sum.active += terms;
    // The first may go on where the last batch ended.
    if (before > 0 && end > 0 && out[before - 1].candidate == out[before].candidate) {
      out[before].weight += out[before - 1].weight;
      for (uint32_t i = before; i < runs; ++i) out[i - 1] = out[i];
      --runs;
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
      static_cast<T*>(args.d2_ap)[pair] = static_cast<T>(c.unscaled(pairs.d2_ap[i]));
      static_cast<T*>(args.d2_an)[pair] = static_cast<T>(c.unscaled(pairs.d2_an[i]));
      args.is_fallback[pair] = pairs.index[i] == kNobody;
    }
  }

  // Terms, sums, and the weights of d2_ap (by place) and d2_an (one run per distinct negative, over buckets already read).
  void hinge(const Pairs<T>& pairs) {
    const int n = pairs.count;
    const double margin = c.args.margin;
    if (c.args.stat_counts)
      for (int i = 0; i < n; ++i) {
        const double ap = c.unscaled(pairs.d2_ap[i]);
        sum.d2_ap += ap;
        sum.d2_an += c.unscaled(pairs.d2_an[i]);
        sum.max_d2_ap = ap > sum.max_d2_ap ? ap : sum.max_d2_ap;
      }
    // In scaled units first: two distances beyond the number range may still have a difference.
    double loss[kBatch];  // d_ap - d_an, then the term
    T push[kBatch], pull[kBatch];
    const double half = c.args.distance == Distance::cosine ? 0.5 : 1;
    if (c.args.distance == Distance::euclidean) {
      for (int i = 0; i < n; ++i) {
        const double ap = std::sqrt(static_cast<double>(pairs.d2_ap[i])), an = std::sqrt(static_cast<double>(pairs.d2_an[i]));
        loss[i] = (ap - an) * c.unscale;
        push[i] = static_cast<T>(ap > 0 ? 1 / ap : 0);
        pull[i] = static_cast<T>(an > 0 ? 1 / an : 0);
      }
    } else {
      for (int i = 0; i < n; ++i) {
        loss[i] = c.unscaled((static_cast<double>(pairs.d2_ap[i]) - static_cast<double>(pairs.d2_an[i])) * half);
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
    T* const weight = c.w.weight + buckets.row.slot;
    Run<T>* const run = reinterpret_cast<Run<T>*>(buckets.key);
    const bool soft = c.args.soft_margin;  // a soft term is above 0, if only in exact arithmetic
    int active = 0;
    uint32_t last = runs > 0 ? run[runs - 1].candidate : kNobody, end = runs;
    double total = 0;
    for (int i = 0; i < n; ++i) {  // without a branch: which terms are active, and which share a negative, nobody can predict
      const bool is_active = loss[i] > 0;
      active += soft || is_active;
      total += is_active ? loss[i] : 0;
      weight[pairs.place[i]] = is_active ? push[i] : T(0);
      const uint32_t negative = static_cast<uint32_t>(pairs.negative[i]), at = negative == last ? end - 1 : end;
      const T so_far = negative == last ? run[at].weight : T(0);
      run[at] = {so_far + (is_active ? pull[i] : T(0)), negative};  // in the place of a bucket that has been read
      end = is_active ? at + 1 : end;
      last = is_active ? negative : last;
    }
    sum.active += active;
    sum.loss += total;
    runs = end;
  }
};

template <class S>
void select(Call<S>& c, int64_t begin, int64_t end) {
  own_rows_first(c, begin, end, kRows, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      Selection<S> selection(c, row);
      Pairs<typename S::T> pairs;
      if (c.hard) selection.nearest();
      else if (!draws_one(c.args)) selection.nearest_farther();  // what is drawn stands there already (draw.h)
      const bool plain = selection.plain();
      for (int r0 = 0; r0 < selection.K; r0 += kBatch) {
        const int n = selection.K - r0 < kBatch ? selection.K - r0 : kBatch;
        if (plain) {
          selection.plain_hinge(r0, n);
          continue;
        }
        if (c.hard) selection.template choose<true>(r0, n, pairs);
        else selection.template choose<false>(r0, n, pairs);
        if (c.mining) selection.list(pairs);
        else selection.hinge(pairs);
      }
      c.w.rows[row].runs = selection.runs;
      c.w.sums[row] = selection.sum;
      if (c.args.grad_anchors) anchor_gradient(c, row);
    }
  });
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
