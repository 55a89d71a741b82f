// The gradient, without atomics.
//
// Every active pair (a, p) puts weight w on (a, p) and -w' on (a, n): w = w' = 1 for the squared distance, 1 / d for the Euclidean
// one. The gradient of any row i is then one sum over its neighbours j,
//     grad_i = f * sum_j w_ij (x_i - x_j),    f = 2 / count or 1 / count,
// over the positives both ways (i as anchor, i as positive), i's own negatives, and the anchors that took i as their negative,
// which the reverse lists give. Differences, not x_i * sum w - sum w x_j: rows far from the origin lose nothing.
// Up to 3 neighbours a pair, each D loads from L2 and 2 D FLOP more than the floor: N K D * 3 * 4 bytes in all.
#pragma once

#include "finish.h"

namespace facenet_ext::cpu {
namespace {

// Neighbours of one row, gathered kList at a time; the order in which they are pushed is the order of the sum.
template <class S>
struct Gather {
  using T = typename S::T;
  using V = typename S::V;
  const T* x;     // [dim] the row itself
  const T* base;  // [*, dim]
  int64_t dim;    // padded
  int32_t* at;    // [kList]
  T* weight;      // [kList]
  T* out;         // [dim] the sum
  int count = 0;

  void push(int64_t neighbour, T w) {
    at[count] = static_cast<int32_t>(neighbour);
    weight[count] = w;
    if (++count == kList) flush();
  }
  // Two neighbours and four vectors of the row at a time: eight independent chains hide the latency of the fused multiply-add.
  void flush() {
    int64_t k = 0;
    for (; k + 4 * S::W <= dim; k += 4 * S::W) part<4>(k);
    for (; k < dim; k += S::W) part<1>(k);
    count = 0;
  }
  template <int N>
  void part(int64_t k) {
    V mine[N], even[N], odd[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      mine[v] = S::load(x + k + v * S::W);
      even[v] = odd[v] = S::zero();
    }
    int i = 0;
    for (; i + 2 <= count; i += 2) {
      const T* p = base + at[i] * dim + k;
      const T* q = base + at[i + 1] * dim + k;
      const V wp = S::set1(weight[i]), wq = S::set1(weight[i + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        even[v] = S::madd(wp, mine[v] - S::load(p + v * S::W), even[v]);
        odd[v] = S::madd(wq, mine[v] - S::load(q + v * S::W), odd[v]);
      }
    }
    if (i < count) {
      const T* p = base + at[i] * dim + k;
      const V wp = S::set1(weight[i]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) even[v] = S::madd(wp, mine[v] - S::load(p + v * S::W), even[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) S::store(out + k + v * S::W, S::load(out + k + v * S::W) + (even[v] + odd[v]));
  }
};

// Candidate -> (anchor row, weight) of the anchors that took it, by ascending row: a stable counting sort whose parts, one a bin,
// cover ascending ranges of anchors. The lists take the memory of the thresholds and ranks, which selection has used up.
template <class S>
void reverse(Call<S>& c, int64_t begin, int64_t end) {
  using T = typename S::T;
  const auto& w = c.w;
  const int bins = c.threads < kMaxBins ? c.threads : kMaxBins;
  const auto first = [&](int bin) { return begin + (end - begin) * bin / bins; };
  const auto runs_of = [&](int64_t row) { return reinterpret_cast<const Run<T>*>(w.key + w.rows[row].slot); };
#pragma omp parallel for num_threads(c.threads) schedule(static, 1)
  for (int bin = 0; bin < bins; ++bin) {
    int32_t* count = w.bins + bin * c.C;
    fill(count, c.C, int32_t{0});
    for (int64_t row = first(bin); row < first(bin + 1); ++row) {
      const Run<T>* runs = runs_of(row);
      for (uint32_t i = 0; i < w.rows[row].runs; ++i) ++count[runs[i].candidate];
    }
  }
  int64_t at = 0;
  for (int64_t j = 0; j < c.C; ++j) {
    w.reverse_begin[j] = at;
    int32_t before = 0;
    for (int bin = 0; bin < bins; ++bin) {
      const int32_t here = w.bins[bin * c.C + j];
      w.bins[bin * c.C + j] = before;
      before += here;
    }
    at += before;
  }
  w.reverse_begin[c.C] = at;
#pragma omp parallel for num_threads(c.threads) schedule(static, 1)
  for (int bin = 0; bin < bins; ++bin) {
    int32_t* next = w.bins + bin * c.C;
    for (int64_t row = first(bin); row < first(bin + 1); ++row) {
      const Run<T>* runs = runs_of(row);
      for (uint32_t i = 0; i < w.rows[row].runs; ++i) {
        const int64_t place = w.reverse_begin[runs[i].candidate] + next[runs[i].candidate]++;
        w.rank[place] = static_cast<uint32_t>(row);
        w.t[place] = runs[i].weight;
      }
    }
  }
}

// Adds this pass's part to one output row; after the last pass, scales it and takes it back through the normalisation.
template <class S>
void put(const Call<S>& c, typename S::T* sum, typename S::T* spare, typename S::T* out, const typename S::T* x,
         typename S::T inverse, bool first, bool last) {
  using T = typename S::T;
  if (!first)
    for (int64_t k = 0; k < c.D; ++k) sum[k] = out[k] + sum[k];
  if (last) {
    const bool euclidean = c.args.distance == Distance::euclidean;
    const double f = c.factor * (euclidean ? 1 : 2 / c.scale);  // differences of scaled rows carry `scale`; over d they do not
    if (static_cast<double>(static_cast<T>(f)) != 0 && std::isfinite(static_cast<T>(f))) {
      const T factor = static_cast<T>(f);
      for (int64_t k = 0; k < c.D; ++k) sum[k] *= factor;
    } else {
      for (int64_t k = 0; k < c.D; ++k) sum[k] = static_cast<T>(sum[k] * f);
    }
    if (c.args.normalize) {  // x = u |x|: grad = (g - (g.u) u) / |x|
      double along = 0;
      if (inverse > 0)
        for (int64_t k = 0; k < c.D; ++k) along += static_cast<double>(sum[k]) * static_cast<double>(x[k]);
      for (int64_t k = 0; k < c.D; ++k) spare[k] = static_cast<T>((sum[k] - along * x[k]) * std::fabs(inverse));
      for (int64_t k = 0; k < c.D; ++k) sum[k] = spare[k];
    }
  }
  for (int64_t k = 0; k < c.D; ++k) out[k] = sum[k];
}

template <class S>
void gradient(Call<S>& c, int64_t begin, int64_t end) {
  using T = typename S::T;
  const auto& w = c.w;
  const TripletArgs& args = c.args;
  const bool first = begin == 0, last = end == c.classes.live;
  const bool inside = args.anchor_offset >= 0;  // anchors are candidates: one gather over the rows x serves everything
  const auto weight_of = [&](int64_t row, int64_t candidate, int64_t class_begin) {
    const int64_t self = w.aself[row];
    return w.weight[w.rows[row].slot + candidate - class_begin - (self >= 0 && candidate > self)];
  };
  const auto in_pass = [&](int64_t row) { return row >= begin && row < end; };

  if (args.grad_candidates) {
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
    for (int64_t j = 0; j < c.C; ++j) {
      const auto scratch = c.scratch(omp_get_thread_num());
      fill(scratch.row, c.Dp, T(0));
      const T* x = w.x + j * c.Dp;
      if (end > begin) {
        Gather<S> gather{x, inside ? w.x : w.ax, c.Dp, scratch.list, scratch.list_weight, scratch.row};
        const int64_t k = w.class_of[j], class_begin = w.class_begin[k], class_end = w.class_begin[k + 1];
        if (inside) {
          const int64_t own = w.row_of[j];
          const bool anchor = in_pass(own);
          if (class_end - class_begin > 1)
            for (int64_t p = class_begin; p < class_end; ++p) {
              if (p == j) continue;
              const T weight = (anchor ? weight_of(own, p, class_begin) : T(0)) +
                               (in_pass(w.row_of[p]) ? weight_of(w.row_of[p], j, class_begin) : T(0));
              if (weight != 0) gather.push(p, weight);
            }
          if (anchor) {
            const Run<T>* runs = reinterpret_cast<const Run<T>*>(w.key + w.rows[own].slot);
            for (uint32_t i = 0; i < w.rows[own].runs; ++i) gather.push(runs[i].candidate, -runs[i].weight);
          }
        } else {
          for (int64_t row = w.class_row[k]; row < w.class_row[k + 1]; ++row)
            if (in_pass(row)) {
              const T weight = weight_of(row, j, class_begin);
              if (weight != 0) gather.push(row, weight);
            }
        }
        for (int64_t i = w.reverse_begin[j]; i < w.reverse_begin[j + 1]; ++i)
          gather.push(inside ? w.aself[w.rank[i]] : w.rank[i], -w.t[i]);
        gather.flush();
      }
      put(c, scratch.row, scratch.spare, static_cast<T*>(args.grad_candidates) + w.order[j] * c.D, x,
          args.normalize && end > begin ? w.inverse_length[j] : T(1), first, last);
    }
  }
  if (args.grad_anchors) {  // anchors that are no candidates
    const int64_t stop = last ? c.A : end;  // rows beyond the live ones have no pair: zeros
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
    for (int64_t row = begin; row < stop; ++row) {
      const auto scratch = c.scratch(omp_get_thread_num());
      fill(scratch.row, c.Dp, T(0));
      const T* x = w.ax + row * c.Dp;
      if (row < end) {
        Gather<S> gather{x, w.x, c.Dp, scratch.list, scratch.list_weight, scratch.row};
        const int64_t k = w.aclass[row], class_begin = w.class_begin[k], class_end = w.class_begin[k + 1];
        for (int64_t p = class_begin; p < class_end; ++p) {
          const T weight = weight_of(row, p, class_begin);
          if (weight != 0) gather.push(p, weight);
        }
        const Run<T>* runs = reinterpret_cast<const Run<T>*>(w.key + w.rows[row].slot);
        for (uint32_t i = 0; i < w.rows[row].runs; ++i) gather.push(runs[i].candidate, -runs[i].weight);
        gather.flush();
      }
      // The factor is known after the last pass only; earlier rows are scaled then.
      for (int64_t i = 0; i < c.D; ++i) static_cast<T*>(args.grad_anchors)[w.arow[row] * c.D + i] = scratch.row[i];
    }
    if (last) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
      for (int64_t row = 0; row < c.A; ++row) {
        const auto scratch = c.scratch(omp_get_thread_num());
        T* out = static_cast<T*>(args.grad_anchors) + w.arow[row] * c.D;
        fill(scratch.row, c.Dp, T(0));
        put(c, scratch.row, scratch.spare, out, w.ax + row * c.Dp,
            args.normalize && row < c.classes.live ? w.ainverse_length[row] : T(1), false, true);
      }
    }
  }
}

}  // namespace
}  // namespace facenet_ext::cpu
