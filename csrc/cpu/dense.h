// Every negative a term: sum over (a, p, n) of max(0, d(a,p) - d(a,n) + m) without a list of triplets.
//
// Of an anchor's sorted positives t[0 .. K), a negative at distance d makes terms with one range of ranks [from, to):
//
//        t[0]      t[from]          t[to]                all            d < t + m        from = #{ t <= d - m },  to = K
//     ─────┼──────────┼──────┼───┼────┼──────> d         all_semi_hard  t < d < t + m    from the same,           to = #{ t <
//     d }
//                   d - m        d
//
// so that two look-ups give the weight of (a, n), to - from, and two histograms of ranks give every positive's, whose prefix
// sums count the ranges that cover it. The loss is the sum of weight times distance, positives less negatives. O(N^2 log K)
// in time and O(N D) in memory for O(N^2 K) terms.
//
// The gradient of the negatives' part is S X less row sums, S the N x N matrix of the pairs' weights, nearly full at the
// beginning of a training. It is made and used up tile by tile, between two products of the sweep:
//
//      distances of a tile  ->  weights S[I,J]: rows' anchors plus columns' anchors
//                           ->  grad[I] += S X[J] - rowsum x,   grad[J] += S' X[I] - columnsum x
//
// 3 N^2 D FLOP in all where anchors and candidates are the same rows (N^2 D for distances, 2 N^2 D for the sums). Row sums
// are taken tile by tile too: no more than 192 terms cancel at a time. Distances are expanded squares, since no pair is
// looked at twice; so that rows far from the origin keep their accuracy, all rows are moved there first (centre). Pairs that
// are close even so are few: their distance and their part of the gradient are summed directly.
#pragma once

#include "gradient.h"
#include "tiles.h"

namespace facenet_ext::cpu {
namespace {

// A point amid the rows, in each dimension halfway between the extremes, but a multiple of a power of two that is below the
// spread: moving the rows there loses nothing, and small integers stay exactly what they are. None where the rows lie around
// the origin, or one of them far from all others: moving those would round what the others differ in. O(N D).
template <class S>
void find_centre(Call<S>& c) {
  using T = typename S::T;
  const auto& w = c.w;
  T* const centre = w.centre;
  const int64_t foreign = c.args.anchor_offset < 0 ? c.A : 0;
  const auto low_of = [&](int thread) { return centre + (1 + 2 * thread) * c.Dp; };
  for (int thread = 0; thread < c.threads; ++thread) {
    fill(low_of(thread), c.Dp, std::numeric_limits<T>::max());
    fill(low_of(thread) + c.Dp, c.Dp, std::numeric_limits<T>::lowest());
  }
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t i = 0; i < c.C + foreign; ++i) {
    const int thread = omp_get_thread_num();
    T* const row = c.scratch(thread).row;
    if (i < c.C) prepare_row(c, c.args.candidates, i * c.args.candidate_stride, row);
    else prepare_row(c, c.args.anchors, (i - c.C) * c.args.anchor_stride, row);
    T *low = low_of(thread), *high = low + c.Dp;
    for (int64_t k = 0; k < c.Dp; ++k) {
      low[k] = row[k] < low[k] ? row[k] : low[k];
      high[k] = row[k] > high[k] ? row[k] : high[k];
    }
  }
  T spread = 0;
  T *low = low_of(0), *high = low + c.Dp;
  for (int64_t k = 0; k < c.Dp; ++k) {
    for (int thread = 1; thread < c.threads; ++thread) {
      const T *l = low_of(thread), *h = l + c.Dp;
      low[k] = l[k] < low[k] ? l[k] : low[k];
      high[k] = h[k] > high[k] ? h[k] : high[k];
    }
    spread = high[k] - low[k] > spread ? high[k] - low[k] : spread;
  }
  const T unit = spread > 0 ? std::ldexp(T(1), std::ilogb(spread)) : 0;
  double radius = 0, length = 0;  // squared
  for (int64_t k = 0; k < c.Dp; ++k) {
    const T half = (high[k] - low[k]) / 2, middle = low[k] + half;
    radius += static_cast<double>(half) * half;
    length += static_cast<double>(middle) * middle;
    centre[k] = unit > 0 ? std::nearbyint(middle / unit) * unit : middle;
  }
  if (4 * radius < length) c.centre = centre;  // all rows are nearer to it than half its length
}

// out[MR, N W] = sum over `depth` rows of x of u[row, k] x[k].
template <class S, int N>
void weighted_rows(const typename S::T* u, int64_t row_step, int64_t depth_step, int64_t depth, const typename S::T* x,
                   typename S::T* out) {
  using V = typename S::V;
  V sum[S::MR][N];
#pragma GCC unroll 8
  for (int i = 0; i < S::MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[i][v] = S::zero();
  for (int64_t k = 0; k < depth; ++k) {
    V column[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) column[v] = S::load(x + k * S::NR + v * S::W);
#pragma GCC unroll 8
    for (int i = 0; i < S::MR; ++i) {
      const V weight = S::set1(u[i * row_step + k * depth_step]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[i][v] = S::madd(weight, column[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < S::MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) S::store(out + i * S::NR + v * S::W, sum[i][v]);
}

// out(r)[0 .. D) += sum over k of u[r, k] (x[k] - own[r]) for r < rows; total[r] is the sum of u[r, k]. Rows and `depth` are
// those of a tile. The dimensions are gone through in panels that stay in L1, copied to `panel`.
template <class S, class Out>
void add_differences(const Call<S>& c, const typename S::T* u, int64_t row_step, int64_t depth_step, int rows, int depth,
                     const typename S::T* total, const typename S::T* own, const typename S::T* x, typename S::T* panel,
                     Out out) {
  using T = typename S::T;
  constexpr int NR = S::NR, MR = S::MR, W = S::W;
  alignas(64) T sum[MR * NR];
  for (int64_t k0 = 0; k0 < c.Dp; k0 += NR) {
    const int width = static_cast<int>(c.Dp - k0 < NR ? c.Dp - k0 : NR),
              real = static_cast<int>(c.D - k0 < width ? c.D - k0 : width);
    for (int k = 0; k < depth; ++k)
      for (int v = 0; v < width; v += W) S::store(panel + k * NR + v, S::load(x + k * c.Dp + k0 + v));
    for (int r = 0; r < rows; r += MR) {
      const int n = rows - r < MR ? rows - r : MR;
      bool any = false;
      for (int i = 0; i < n; ++i) any |= total[r + i] != 0;
      if (!any) continue;
      const T* weights = u + r * row_step;
      if (width == NR) weighted_rows<S, NR / W>(weights, row_step, depth_step, depth, panel, sum);
      else
        for (int v = 0; v < width; v += W) weighted_rows<S, 1>(weights, row_step, depth_step, depth, panel + v, sum + v);
      for (int i = 0; i < n; ++i) {
        T* const to = out(r + i) + k0;
        const T* const from = own + (r + i) * c.Dp + k0;
        for (int k = 0; k < real; ++k) to[k] += sum[i * NR + k] - total[r + i] * from[k];
      }
    }
  }
}

template <class S>
struct Dense {
  using T = typename S::T;
  using V = typename S::V;
  static constexpr int kT = Call<S>::kT, W = S::W;
  static constexpr int kSparse = 16;  // from so few pairs with a weight on, each by itself costs less than a product
  Call<S>& c;
  const int64_t begin, end;
  const bool euclidean = c.args.distance == Distance::euclidean;
  const bool above = c.args.negatives == Negatives::all_semi_hard;  // only negatives farther than the positive
  const bool closed = above && c.args.band > 0;  // a term where d <= t + width
  const bool stats = c.args.stat_counts != nullptr;
  const double unit = euclidean ? c.scale : c.scale * c.scale;  // of distances
  const T margin = static_cast<T>(c.args.margin * unit), width = static_cast<T>(c.args.band * unit);

  // Histograms of ranks at an anchor's slots: where ranges of active terms begin, where ranges end, where ranges of terms
  // begin. An anchor that counts all negatives has no ends, and begins in two histograms by turns: what was just written
  // need not be read at once.
  struct Histograms {
    uint32_t *from, *to, *term;
  };
  Histograms histograms(int64_t row) const {
    const int64_t slot = c.w.rows[row].slot, pitch = slot_pitch(c.w.rows[row].positives);
    uint32_t* h = reinterpret_cast<uint32_t*>(c.w.key + slot);
    return {h, h + pitch, reinterpret_cast<uint32_t*>(c.w.upper + slot)};
  }

  // Thresholds in the rule's unit, nothing counted yet.
  void start() const {
    const auto& w = c.w;
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pitch = slot_pitch(w.rows[row].positives);
      thresholds_in_unit(c, row);
      const Histograms h = histograms(row);
      fill(h.from, pitch, 0u);
      fill(h.to, pitch, 0u);
      fill(h.term, pitch, 0u);
      w.sums[row] = {};
    }
  }

  // The terms of one anchor with the candidates at distances d[0 .. n), n a multiple of W. weight[j], which may be d[j]
  // itself: minus the derivative of the loss by d2 (by d: the factor is put()'s). Returns whether any is not 0.
  bool take(int64_t row, const T* d, int n, T* weight, T* aside) const {
    const Row<T>& r = c.w.rows[row];
    const int K = static_cast<int>(r.positives);
    const T* t = c.w.t + r.slot;
    V lowest = S::load(d);
    for (int j = W; j < n; j += W) lowest = S::smaller(S::load(d + j), lowest);
    T low[W];
    S::store(low, lowest);
    for (int i = 1; i < W; ++i) low[0] = low[i] < low[0] ? low[i] : low[0];
    const T reach = closed && width > margin ? width : margin;
    if (K == 0 || (!stats && low[0] - reach > t[K - 1])) {
      fill(weight, n, T(0));
      return false;
    }
    int32_t* __restrict from = reinterpret_cast<int32_t*>(aside);
    int32_t* __restrict to = from + kT;
    int32_t* __restrict term = to + kT;
    T* __restrict count = aside + 3 * kT;
    const Histograms h = histograms(row);
    int32_t active = 0;
    S::template ranks<true>(t, K, margin, d, n, from);
    if (above || stats) S::template ranks<false>(t, K, T(0), d, n, to);
    if (closed) S::template ranks<false>(t, K, width, d, n, term);
    RowSum& sum = c.w.sums[row];
    if (above) {
      if (closed)
        for (int j = 0; j < n; ++j) {
          from[j] = from[j] > term[j] ? from[j] : term[j];
          term[j] = term[j] < to[j] ? term[j] : to[j];
        }
      for (int j = 0; j < n; ++j) {
        from[j] = from[j] < to[j] ? from[j] : to[j];
        active += to[j] - from[j];
        count[j] = static_cast<T>(to[j] - from[j]);
      }
      if (closed) {
        for (int j = 0; j < n; ++j) {
          ++h.from[from[j]];
          ++h.to[to[j]];
          ++h.term[term[j]];
        }
      } else if (active > 0) {
        // An empty range adds nothing to the difference of both. Where most are, late in training, they are empty at one
        // rank, the last: each would wait for the one before.
        int filled = 0;
        for (int j = 0; j < n; ++j) filled += from[j] < to[j];
        if (2 * filled > n) {
          for (int j = 0; j < n; ++j) {
            ++h.from[from[j]];
            ++h.to[to[j]];
          }
        } else {
          int32_t* __restrict some = reinterpret_cast<int32_t*>(count + kT);
          int m = 0;
          for (int j = 0; j < n; ++j) {
            some[m] = j;
            m += from[j] < to[j];
          }
          for (int i = 0; i < m; ++i) {
            ++h.from[from[some[i]]];
            ++h.to[to[some[i]]];
          }
        }
      }
    } else {
      for (int j = 0; j < n; ++j) {
        active += K - from[j];
        count[j] = static_cast<T>(K - from[j]);
      }
      if (active > 0)
        for (int j = 0; j < n; j += 2) {
          ++h.from[from[j]];
          ++h.to[from[j + 1]];
        }
      if (stats) {
        int32_t hard = 0, semi_hard = 0;
        for (int j = 0; j < n; ++j) {
          hard += K - to[j];
          semi_hard += to[j] > from[j] ? to[j] - from[j] : 0;
        }
        sum.hard += hard;
        sum.semi_hard += semi_hard;
      }
    }
    if (stats) {
      double total = 0;
      for (int j = 0; j < n; ++j) {
        const int terms = closed ? to[j] - term[j] : above ? to[j] - from[j] : d[j] < kNoNegative<T> ? K : 0;
        const double here = d[j];
        if (terms > 0) total += terms * (euclidean ? here * here : here);
      }
      sum.d2_an += total;
    }
    // Distances relative to one of the thresholds: what is summed in T is as small as the terms are.
    const V middle = S::set1(t[K / 2]);
    V loss = S::zero();
    for (int j = 0; j < n; j += W) {
      const V many = S::load(count + j);
      loss = S::madd(many, S::load(d + j) - middle, loss);
    }
    sum.loss -= static_cast<double>(S::sum(loss));
    if (euclidean)
      for (int j = 0; j < n; ++j) {
        const T each = count[j] / d[j];
        weight[j] = d[j] > 0 ? each : T(0);
      }
    else
      for (int j = 0; j < n; ++j) weight[j] = count[j];
    return active > 0;
  }

  // Distances in, their terms counted, their gradient added.
  void visit(const Tile& tile, T* d) const {
    const auto& w = c.w;
    const auto scratch = c.scratch(omp_get_thread_num());
    const int64_t top = tile.I * kT;
    const int cols = static_cast<int>(round_up(tile.c1 - tile.c0, kSlotPad));
    const int r0 = static_cast<int>(tile.r0 - top), r1 = static_cast<int>(tile.r1 - top);
    bool any = false;
    if (tile.both)
      for (int col = 0; col < cols; col += W) {
        S::transpose(d + col, kT, kT, scratch.strip);
        for (int i = 0; i < W; ++i) {
          const int64_t row = tile.c0 + col + i;
          T* strip = scratch.strip + i * kT;
          if (row >= tile.j0 && row < tile.j1) any |= take(row, strip, kT, strip, scratch.aside);
          else fill(strip, kT, T(0));
        }
        for (int r = 0; r < kT; r += W) {
          T square[W * W];
          S::transpose(scratch.strip + r, kT, W, square);
          for (int i = 0; i < W; ++i) S::store(scratch.weights + (r + i) * kT + col, S::load(square + i * W));
        }
      }
    const int first = tile.both ? 0 : r0, last = tile.both ? kT : r1;
    T row_total[kT], col_total[kT];
    int nonzero = 0;
    fill(col_total, kT, T(0));
    for (int r = first; r < last; ++r) {
      T* weight = d + r * kT;
      if (r >= r0 && r < r1) any |= take(top + r, weight, cols, weight, scratch.aside);
      else fill(weight, cols, T(0));
      if (!c.wants_gradient()) continue;
      if (tile.both)
        for (int j = 0; j < cols; j += W) S::store(weight + j, S::load(weight + j) + S::load(scratch.weights + r * kT + j));
      NearBits<S>(c, top + r).for_each([&](int j) { add_near(top + r, tile.c0 + j, weight + j); });
      V total = S::zero();
      for (int j = 0; j < cols; j += W) {
        const V sum = S::load(weight + j);
        total = total + sum;
        S::store(col_total + j, S::load(col_total + j) + sum);
      }
      row_total[r] = S::sum(total);
      if (row_total[r] != 0)
        for (int j = 0; j < cols; ++j) nonzero += weight[j] != 0;
    }
    if (!any || !c.wants_gradient()) return;
    const int rows = last - first;
    if (nonzero * kSparse < rows * cols) {
      for (int r = first; r < last; ++r)
        if (row_total[r] != 0)
          for (int j = 0; j < cols; ++j) add_near(top + r, tile.c0 + j, d + r * kT + j);
      return;
    }
    if (T* out = anchor_rows())
      add_differences(c, d + first * kT, kT, 1, rows, cols, row_total + first, w.ax + (top + first) * c.Dp,
                      w.x + tile.c0 * c.Dp, scratch.aside, [&](int r) { return out + place(top + first + r); });
    if (T* out = static_cast<T*>(c.args.grad_candidates))
      add_differences(c, d + first * kT, 1, kT, static_cast<int>(tile.c1 - tile.c0), rows, col_total, w.x + tile.c0 * c.Dp,
                      w.ax + (top + first) * c.Dp, scratch.aside, [&](int r) { return out + w.order[tile.c0 + r] * c.D; });
  }

  // One pair's part by itself; its weight is 0 for the products. Near pairs: those subtract row sums, which would leave
  // rounding alone. Late in training all that are left.
  void add_near(int64_t row, int64_t candidate, T* weight) const {
    if (*weight == 0) return;
    const T *x = c.w.ax + row * c.Dp, *y = c.w.x + candidate * c.Dp;
    if (T* out = anchor_rows()) {
      out += place(row);
      for (int64_t k = 0; k < c.D; ++k) out[k] += *weight * (y[k] - x[k]);
    }
    if (T* out = static_cast<T*>(c.args.grad_candidates)) {
      out += c.w.order[candidate] * c.D;
      for (int64_t k = 0; k < c.D; ++k) out[k] += *weight * (x[k] - y[k]);
    }
    *weight = 0;
  }

  // Where the anchors' gradient is summed: in the output, except where they are some of the candidates.
  T* anchor_rows() const {
    if (c.args.anchor_offset < 0) return static_cast<T*>(c.args.grad_anchors);
    return !c.args.grad_candidates || c.symmetric ? static_cast<T*>(c.args.grad_candidates) : c.w.anchor_grad;
  }
  int64_t place(int64_t row) const {
    if (c.args.anchor_offset < 0) return c.w.arow[row] * c.D;
    return c.symmetric ? c.w.order[row] * c.D : row * c.Dp;
  }

  // From histograms to the positives' weights and every anchor's sums.
  void count() const {
    const auto& w = c.w;
    const TripletArgs& args = c.args;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = w.rows[row].slot, K = w.rows[row].positives;
      const int64_t class_begin = w.class_begin[w.aclass[row]], class_end = w.class_begin[w.aclass[row] + 1];
      const int64_t negatives = c.C - (class_end - class_begin);
      const T* t = w.t + slot;
      const Histograms h = histograms(row);
      RowSum& sum = w.sums[row];
      const double d_to_loss = euclidean ? 1 / c.scale : c.unscale;
      int64_t active = 0, terms = 0;
      double loss = sum.loss;
      for (int64_t r = 0; r < K; ++r) {
        active += above ? static_cast<int64_t>(h.from[r]) - h.to[r] : static_cast<int64_t>(h.from[r]) + h.to[r];
        terms = closed ? terms + static_cast<int64_t>(h.term[r]) - h.to[r] : above ? active : negatives;
        loss += static_cast<double>(active) * (static_cast<double>(t[r]) - static_cast<double>(t[K / 2]));
        w.weight[slot + w.rank[slot + r]] = static_cast<T>(euclidean ? (t[r] > 0 ? active / t[r] : T(0)) : active);
        sum.active += active;
        sum.pairs += terms;
        if (stats && terms > 0) {
          const double d2 = c.unscale * (euclidean ? static_cast<double>(t[r]) * t[r] : static_cast<double>(t[r])) *
                            (args.distance == Distance::cosine ? 2 : 1);
          sum.d2_ap += static_cast<double>(terms) * d2;
          sum.max_d2_ap = d2 > sum.max_d2_ap ? d2 : sum.max_d2_ap;
        }
      }
      if (above) sum.semi_hard = sum.active;
      sum.d2_an *= c.unscale * (args.distance == Distance::cosine ? 2 : 1);
      // Rounding may leave less than nothing of terms that are hardly above 0.
      loss = loss * d_to_loss + args.margin * static_cast<double>(sum.active);
      sum.loss = loss > 0 ? loss : 0;
      w.rows[row].runs = 0;
    }
  }

  // Before gradient() adds the positives and scales: the negatives' part of anchors that are some of the candidates joins
  // theirs, and anchors that are none get their positives.
  void join() const {
    const auto& w = c.w;
    if (!c.wants_gradient()) return;
    if (c.symmetric) return;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
    for (int64_t row = begin; row < end; ++row) {
      if (c.args.anchor_offset >= 0) {
        T* const out = static_cast<T*>(c.args.grad_candidates) + w.order[w.aself[row]] * c.D;
        for (int64_t k = 0; k < c.D; ++k) out[k] += w.anchor_grad[row * c.Dp + k];
      } else {
        own_gradient(c, row, false);
      }
    }
  }

  // Sums start from zero: outputs before the first pass, what a pass joins before each.
  void clear() const {
    if (begin == 0) {
      if (c.args.grad_candidates) fill(static_cast<T*>(c.args.grad_candidates), c.C * c.D, T(0));
      if (c.args.grad_anchors) fill(static_cast<T*>(c.args.grad_anchors), c.A * c.D, T(0));
    }
    if (c.w.anchor_grad && c.wants_gradient()) fill(c.w.anchor_grad + begin * c.Dp, (end - begin) * c.Dp, T(0));
  }
};

template <class S>
Status run_dense(const TripletArgs& args) {
  Call<S> c(args);
  inspect(c);
  if (!c.finite) {
    fill_nan(c);
    return {};
  }
  const auto& w = c.w;
  c.classes = sort_labels(args, w.table, w.hash_size, w.scratch_index, w.order, w.position, w.class_of, w.class_begin, w.arow,
                          w.aclass, w.aself, w.row_of, w.class_row);
  if (c.classes.live > 0) {
    find_centre(c);
    pack(c);
  }
  int64_t begin = 0;
  do {
    const int64_t end = plan_pass(c, begin);
    const Dense<S> dense{c, begin, end};
    dense.clear();
    thresholds(c, begin, end);
    c.screening = !(dense.closed && dense.width > dense.margin) && worth_screening(c, begin, end);
    if (c.screening) quantise(c);
    dense.start();
    visit_tiles(c, begin, end, [&](const Tile& tile, typename S::T* d) { dense.visit(tile, d); });
    if (c.stopped) return {Code::interrupted, "triplet", "interrupted"};
    dense.count();
    if (end == c.classes.live) total(c);
    if (c.wants_gradient()) {
      dense.join();
      const Takers<S> nobody(c, begin, end);
      nobody.clear();
      gradient(c, nobody);
    }
    begin = end;
  } while (begin < c.classes.live);
  return {};
}

}  // namespace
}  // namespace facenet_ext::cpu
