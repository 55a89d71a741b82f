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

// Candidate -> (anchor row, weight) of the anchors that took it, by ascending row: a counting sort of every bin's anchors by
// itself, bins being ascending ranges of anchors. Each takes the memory of its own anchors' thresholds and ranks, which
// selection has used up, so that no two threads write to one cache line.
template <class S>
struct Takers {
  const Call<S>& c;
  const int64_t begin, end;  // the pass's anchors
  const int bins;
  int64_t slot[kMaxBins];  // where each bin's lists begin

  Takers(const Call<S>& call, int64_t b, int64_t e)
      : c(call), begin(b), end(e), bins(call.threads < kMaxBins ? call.threads : kMaxBins) {
    for (int bin = 0; bin < bins; ++bin) slot[bin] = end > begin && first(bin) < end ? c.w.rows[first(bin)].slot : 0;
  }
  int64_t first(int bin) const { return begin + (end - begin) * bin / bins; }
  int32_t* ends(int bin) const { return c.w.bins + bin * c.C; }  // [C] of each candidate's list, from the bin's slot on

  void list() const {
    const auto& w = c.w;
#pragma omp parallel for num_threads(c.threads) schedule(static, 1)
    for (int bin = 0; bin < bins; ++bin) {
      int32_t* next = ends(bin);
      fill(next, c.C, int32_t{0});
      const auto for_each_run = [&](auto visit) {
        for (int64_t row = first(bin); row < first(bin + 1); ++row) {
          const auto* runs = reinterpret_cast<const Run<typename S::T>*>(w.key + w.rows[row].slot);
          for (uint32_t i = 0; i < w.rows[row].runs; ++i) visit(row, runs[i]);
        }
      };
      for_each_run([&](int64_t, const auto& run) { ++next[run.candidate]; });
      int32_t before = 0;
      for (int64_t j = 0; j < c.C; ++j) {
        const int32_t here = next[j];
        next[j] = before;
        before += here;
      }
      for_each_run([&](int64_t row, const auto& run) {  // where a list ends in the end is where the next one begins
        const int64_t place = slot[bin] + next[run.candidate]++;
        w.rank[place] = static_cast<uint32_t>(row);
        w.t[place] = run.weight;
      });
    }
  }
  void clear() const {
    for (int bin = 0; bin < bins; ++bin) fill(ends(bin), c.C, int32_t{0});
  }
  template <class Visit>
  void for_each(int64_t candidate, Visit visit) const {
    for (int bin = 0; bin < bins; ++bin) {
      const int32_t* next = ends(bin);
      for (int64_t i = slot[bin] + (candidate > 0 ? next[candidate - 1] : 0); i < slot[bin] + next[candidate]; ++i)
        visit(static_cast<int64_t>(c.w.rank[i]), c.w.t[i]);
    }
  }
};

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
void gradient(Call<S>& c, const Takers<S>& takers) {
  using T = typename S::T;
  const auto& w = c.w;
  const int64_t begin = takers.begin, end = takers.end;
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
        takers.for_each(j, [&](int64_t row, T weight) { gather.push_far(inside ? w.aself[row] : row, -weight); });
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
