// The gradient, without atomics.
//
// Every active pair (a, p) puts weight w on (a, p) and -w' on (a, n): w = w' = 1 for the squared distance, 1 / d for the
// Euclidean one, with a soft margin times the logistic function. The gradient of any row i is then one sum over its
// neighbours j,
//     grad_i = f * sum_j w_ij (x_i - x_j),    f = 2 / count (squared) or 1 / count,
// over the positives both ways (i as anchor, i as positive), i's own negatives, and the anchors that took i as their
// negative, which the reverse lists give. Differences, not x_i * sum w - sum w x_j: rows far from the origin lose nothing. Up
// to 3 neighbours a pair, each D loads and 3 D FLOP: N K D * 3 * 4 bytes in all, positives from L1, the others from L2, 64
// bytes in 2 cycles.
#pragma once

#include "finish.h"

namespace facenet_ext::cpu {
namespace {

// Candidate -> (anchor, weight) of the anchors that took it, by ascending row: a counting sort of every bin's anchors by
// itself, bins being ascending ranges of anchors. An anchor that is a candidate goes by its sorted position. The lists stand
// where thresholds and ranks were, which selection has used up, each bin's at its own anchors' slots: their lines are no
// other thread's.
template <class S>
struct Takers {
  using T = typename S::T;
  const Call<S>& c;
  const int64_t begin, end;  // the pass's anchors
  const int bins;
  int64_t slot[kMaxBins];  // where each bin's lists begin

  Takers(const Call<S>& call, int64_t b, int64_t e)
      : c(call), begin(b), end(e), bins(call.threads < kMaxBins ? call.threads : kMaxBins) {
    for (int bin = 0; bin < bins; ++bin) slot[bin] = end > begin && first(bin) < end ? c.w.rows[first(bin)].slot : 0;
  }
  int64_t first(int bin) const { return begin + (end - begin) * bin / bins; }
  Run<T>* lists() const { return reinterpret_cast<Run<T>*>(c.w.t); }
  int32_t* ends(int bin) const { return c.w.bins + bin * c.C; }  // [C] of each candidate's list, from the bin's slot on

  void list() const {
    const auto& w = c.w;
    const bool inside = c.args.anchor_offset >= 0;
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
        lists()[place] = {run.weight, static_cast<uint32_t>(inside ? w.aself[row] : row)};
      });
    }
  }
  void clear() const {
    for (int bin = 0; bin < bins; ++bin) fill(ends(bin), c.C, int32_t{0});
  }
  void prefetch(int64_t candidate) const {
    for (int bin = 0; bin < bins; ++bin) {
      const int32_t* next = ends(bin);
      for (int64_t i = candidate > 0 ? next[candidate - 1] : 0; i < next[candidate]; i += 64 / sizeof(Run<T>))
        __builtin_prefetch(lists() + slot[bin] + i);
    }
  }
  // The lists of all bins as one, so that the order of the sum, kList at a time, does not depend on their number.
  void gather(int64_t candidate, const Gather<S>& gather) const {
    Run<T> list[kList];
    int64_t count = 0, summed = 0;
    T* to = gather.out;
    const auto flush = [&] {
      gather.add(
          to, 0, count, [&](int64_t i) { return int64_t{list[i].candidate}; }, [&](int64_t i) { return -list[i].weight; });
      summed += count;
      count = 0;
    };
    const auto end_block = [&] {
      if (to == gather.block)
        for (int64_t k = 0; k < gather.dim; ++k) gather.out[k] += gather.block[k];
    };
    for (int bin = 0; bin < bins; ++bin) {
      const int64_t from = candidate > 0 ? ends(bin)[candidate - 1] : 0;
      for (int64_t i = slot[bin] + from, end = slot[bin] + ends(bin)[candidate]; i < end;) {
        const int64_t some = end - i < kList - count ? end - i : kList - count;
        for (int64_t j = 0; j < some; ++j) list[count + j] = lists()[i + j];
        i += some;
        count += some;
        if (count < kList) continue;
        flush();
        if (summed % kBlock != 0 || gather.carry != nullptr) continue;
        end_block();  // how long the list is shows only in the end: its first block goes straight to the total
        to = gather.block;
        fill(to, gather.dim, T(0));
      }
    }
    flush();
    end_block();
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
    const double f = c.factor * (c.args.distance == Distance::sqeuclidean ? 2 * c.unscale : 1);
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
  const auto is_constant = [&](int64_t j) { return w.order[j] >= c.gradient_rows; };

  // Is the class of candidate j in hand as a whole, all of its pairs in both directions?
  const auto whole_class = [&](int64_t j) {
    const int64_t k = w.class_of[j], size = w.class_begin[k + 1] - w.class_begin[k], row0 = w.class_row[k];
    return inside && c.every_pair && w.class_row[k + 1] - row0 == size && size > 1 && in_pass(row0) &&
           in_pass(row0 + size - 1);
  };
  // The positives of candidates j .. j + count of a whole class. Its anchors' weights are a block, rows `pitch` apart.
  const auto add_class = [&](int64_t j, int count, T* block, T* out, T* carry) {
    const int64_t k = w.class_of[j], class_begin = w.class_begin[k], size = w.class_begin[k + 1] - class_begin;
    const int64_t pitch = slot_pitch(size - 1);
    const T* const weights = w.weight + w.rows[w.class_row[k]].slot;
    const GatherTogether<S> gather{w.x + j * c.Dp, count, w.x + class_begin * c.Dp, c.Dp, block, out, carry};
    constexpr int kTogether = GatherTogether<S>::kTogether;
    const int64_t first = j - class_begin;
    const T* own[kTogether];
    for (int r = 0; r < kTogether; ++r) own[r] = weights + (first + (r < count ? r : 0)) * pitch;
    gather.add(size, [&](int64_t p, T* weight) {  // an anchor's block leaves out the anchor
      const T* const column = weights + p * pitch + first;
      if (count == kTogether && p < first) {
        for (int r = 0; r < kTogether; ++r) weight[r] = own[r][p] + column[r - 1];
      } else if (count == kTogether && p >= first + kTogether) {
        for (int r = 0; r < kTogether; ++r) weight[r] = own[r][p - 1] + column[r];
      } else {
        for (int r = 0; r < kTogether; ++r) {
          const int64_t me = first + r;
          weight[r] = p == me || r >= count ? T(0) : own[r][p - (p > me)] + column[r - (p < me)];
        }
      }
    });
  };
  // Candidate j's positives, into out, in any case.
  const auto add_positives = [&](int64_t j, const Gather<S>& gather) {
    const int64_t k = w.class_of[j], class_begin = w.class_begin[k], size = w.class_begin[k + 1] - class_begin;
    const int64_t row0 = w.class_row[k], rows = w.class_row[k + 1] - row0;
    const auto member = [=](int64_t i) { return class_begin + i; };
    if (!inside) {
      gather.add_some(
          rows, [=](int64_t i) { return row0 + i; },
          [&](int64_t i) { return in_pass(row0 + i) ? weight_of(row0 + i, j) : T(0); });
    } else {
      const int64_t own = w.row_of[j];
      gather.add_some(size, member, [&](int64_t i) {
        const int64_t p = class_begin + i;
        if (p == j) return T(0);
        return (in_pass(own) ? weight_of(own, p) : T(0)) + (in_pass(w.row_of[p]) ? weight_of(w.row_of[p], j) : T(0));
      });
    }
  };

  if (args.grad_candidates) {
    // All positives of a few rows, then all negatives: the former share what the latter would drive out of L1.
    own_rows_first(c, 0, c.C, kRows, [&](int64_t j0, int64_t j1) {
      while (j0 < j1 && is_constant(j0)) ++j0;  // most of a memory's rows
      if (j0 == j1) return;
      const auto scratch = c.scratch(omp_get_thread_num());
      fill(scratch.rows, (j1 - j0) * c.Dp, T(0));
      const auto carry_of = [&](int64_t j) -> T* {
        const int64_t k = w.class_of[j];
        const bool is_large = sizeof(T) == 4 && w.class_begin[k + 1] - w.class_begin[k] > kCarried;
        return is_large ? scratch.carry + (j - j0) * c.Dp : nullptr;
      };
      fill(scratch.carry, sizeof(T) == 4 ? (j1 - j0) * c.Dp : 0, T(0));
      const auto gather_for = [&](int64_t j) -> Gather<S> {
        auto* const x = inside ? w.x : w.ax;
        T* const rows = scratch.rows + (j - j0) * c.Dp;
        return {w.x + j * c.Dp, x, c.Dp, scratch.list, scratch.list_weight, scratch.block, rows, carry_of(j)};
      };
      for (int64_t j = j0; end > begin && j < j1;) {
        if (is_constant(j)) {
          ++j;
          continue;
        }
        if (!whole_class(j)) {
          add_positives(j, gather_for(j));
          ++j;
          continue;
        }
        int count = 1;
        while (count < GatherTogether<S>::kTogether && j + count < j1 && w.class_of[j + count] == w.class_of[j]) ++count;
        add_class(j, count, scratch.block, scratch.rows + (j - j0) * c.Dp, carry_of(j));
        j += count;
      }
      for (int64_t j = j0; j < j1; ++j) {
        if (is_constant(j)) continue;
        const Gather<S> gather = gather_for(j);
        if (end > begin) {
          if (j + 1 < c.C) {  // a list that comes from afar is waited for before the first row it names can be asked for
            takers.prefetch(j + 1);
            if (inside && in_pass(w.row_of[j + 1])) prefetch_runs(c, w.row_of[j + 1]);
          }
          if (inside && in_pass(w.row_of[j])) gather_runs(c, w.row_of[j], gather);
          takers.gather(j, gather);
        }
        if (gather.carry != nullptr)
          for (int64_t k = 0; k < c.D; ++k)  // of a total beyond the range there is none
            gather.out[k] += gather.carry[k] - gather.carry[k] == 0 ? gather.carry[k] : T(0);
        put(c, gather.out, static_cast<T*>(args.grad_candidates) + w.order[j] * c.D, gather.x,
            args.normalize && end > begin ? w.inverse_length[j] : T(1), !first || counts_all(args), last);
      }
    });
  }
  if (args.grad_anchors && last) {  // anchor_gradient() has filled the rows of anchors with a pair
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = 0; row < c.A; ++row) {
      const auto scratch = c.scratch(omp_get_thread_num());
      const bool live = row < c.classes.live;
      fill(scratch.rows, c.Dp, T(0));
      put(c, scratch.rows, static_cast<T*>(args.grad_anchors) + w.arow[row] * c.D, w.ax + row * c.Dp,
          args.normalize && live ? w.ainverse_length[row] : T(1), live, true);
    }
  }
}

}  // namespace
}  // namespace facenet_ext::cpu
