// The gradient, without atomics.
//
// Every active pair (a, p) puts weight w on (a, p) and -w' on (a, n): w = w' = 1 for the squared distance, 1 / d for the
// Euclidean one, with a soft margin times the logistic function. The gradient of any row i is then one sum over its
// neighbours j,
//     grad_i = f * sum_j w_ij (x_i - x_j),    f = 2 / count (squared) or 1 / count,
// over i's own negatives (finish.h has summed those), the positives both ways (i as anchor, i as positive), and the anchors
// that took i as their negative, which the reverse lists give. Differences, not x_i * sum w - sum w x_j: rows far from the
// origin lose nothing. Up to 3 neighbours a pair, each D loads from L2 and 2 D FLOP more than the floor: N K D * 3 * 4 bytes
// in all.
#pragma once

#include "finish.h"

namespace facenet_ext::cpu {
namespace {

// Candidate -> (anchor row, weight) of the anchors that took it, by ascending row: a stable counting sort whose parts, one a
// bin, cover ascending ranges of anchors. The lists take the memory of the thresholds and ranks, which selection has used up.
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

// Adds `sum` to one output row; after the last pass, scales it and takes it back through the normalisation.
template <class S>
void put(const Call<S>& c, typename S::T* sum, typename S::T* out, const typename S::T* x, typename S::T inverse, bool add,
         bool last) {
  using T = typename S::T;
  if (add)
    for (int64_t k = 0; k < c.D; ++k) sum[k] = out[k] + sum[k];
  if (last) {
    // Differences of scaled rows carry `scale`; over a distance they do not.
    const double f = c.factor * (c.args.distance == Distance::sqeuclidean ? 2 / c.scale : 1);
    const T factor = static_cast<T>(f);
    if (std::fabs(factor) >= std::numeric_limits<T>::min() && factor <= std::numeric_limits<T>::max())
      for (int64_t k = 0; k < c.D; ++k) sum[k] *= factor;
    else
      for (int64_t k = 0; k < c.D; ++k) sum[k] = static_cast<T>(sum[k] * f);
    if (c.args.normalize && c.classes.live > 0) {  // x = u |x|: grad = (g - (g.u) u) / |x|
      const auto u = [&](int64_t k) -> double { return c.centre ? static_cast<double>(x[k]) + c.centre[k] : x[k]; };
      double along = 0;
      if (inverse > 0)
        for (int64_t k = 0; k < c.D; ++k) along += static_cast<double>(sum[k]) * u(k);
      for (int64_t k = 0; k < c.D; ++k) sum[k] = static_cast<T>((sum[k] - along * u(k)) * std::fabs(inverse));
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
  const auto weight_of = [&](int64_t row, int64_t candidate) {
    const int64_t place = w.rows[row].place(candidate);
    return place >= 0 ? w.weight[w.rows[row].slot + place] : T(0);
  };
  const auto in_pass = [&](int64_t row) { return row >= begin && row < end; };

  if (args.grad_candidates) {
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
    for (int64_t j = 0; j < c.C; ++j) {
      const auto scratch = c.scratch(omp_get_thread_num());
      fill(scratch.row, c.Dp, T(0));
      const T* x = w.x + j * c.Dp;
      bool own_part = false;  // own_gradient has been here in this pass
      if (end > begin) {
        Gather<S> gather{x, inside ? w.x : w.ax, c.Dp, scratch.list, scratch.list_weight, scratch.row};
        const int64_t k = w.class_of[j], class_begin = w.class_begin[k], class_end = w.class_begin[k + 1];
        if (inside) {
          own_part = in_pass(w.row_of[j]);
          const int64_t row0 = w.class_row[k], K = class_end - class_begin - 1;
          if (c.every_pair && K > 0 && w.class_row[k + 1] - row0 == K + 1 && in_pass(row0) && in_pass(row0 + K)) {
            // The whole class is in hand: its anchors' weights are a K + 1 by K block, rows `pitch` apart.
            const int64_t pitch = slot_pitch(K), me = j - class_begin;
            const T* block = w.weight + w.rows[row0].slot;
            const T* own = block + me * pitch;
            for (int64_t p = 0; p < me; ++p) {
              const T weight = own[p] + block[p * pitch + me - 1];
              if (weight != 0) gather.push(class_begin + p, weight);
            }
            for (int64_t p = me + 1; p <= K; ++p) {
              const T weight = own[p - 1] + block[p * pitch + me];
              if (weight != 0) gather.push(class_begin + p, weight);
            }
          } else
            for (int64_t p = class_begin; p < class_end; ++p) {
              if (p == j) continue;
              const T weight =
                  (own_part ? weight_of(w.row_of[j], p) : T(0)) + (in_pass(w.row_of[p]) ? weight_of(w.row_of[p], j) : T(0));
              if (weight != 0) gather.push(p, weight);
            }
        } else {
          for (int64_t row = w.class_row[k]; row < w.class_row[k + 1]; ++row) {
            const T weight = in_pass(row) ? weight_of(row, j) : T(0);
            if (weight != 0) gather.push(row, weight);
          }
        }
        for (int64_t i = w.reverse_begin[j]; i < w.reverse_begin[j + 1]; ++i)
          gather.push_far(inside ? w.aself[w.rank[i]] : static_cast<int64_t>(w.rank[i]), -w.t[i]);
        gather.flush();
      }
      put(c, scratch.row, static_cast<T*>(args.grad_candidates) + w.order[j] * c.D, x,
          args.normalize && end > begin ? w.inverse_length[j] : T(1), own_part || !first || counts_all(args), last);
    }
  }
  if (args.grad_anchors && last) {  // own_gradient has filled the rows of anchors with a pair
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = 0; row < c.A; ++row) {
      const auto scratch = c.scratch(omp_get_thread_num());
      const bool live = row < c.classes.live;
      fill(scratch.row, c.Dp, T(0));
      put(c, scratch.row, static_cast<T*>(args.grad_anchors) + w.arow[row] * c.D, w.ax + row * c.Dp,
          args.normalize && live ? w.ainverse_length[row] : T(1), live, true);
    }
  }
}

}  // namespace
}  // namespace facenet_ext::cpu
