// The sweep: what fills the buckets.
//
//             candidates J
//           +----+----+----+----+   Symmetric case: tile (I, J) serves the anchors of I (its rows) and, transposed strip by
//           | \\ | ## | ## |    |   strip, the anchors of J (its columns), so every product is made once. Which thread
//   anchors +----+----+----+----+   makes which tile when: share.h.
//      I    |    | \\ | ## | ## |
//           +----+----+----+----+
//           | ## |    | \\ | ## |   A tile: 192 x 192 float32 distances = 144 KiB, in L2. Bytes from L3 or memory per tile:
//           +----+----+----+----+   2 * 192 * D * 4, against 192^2 * D products: below 1 byte a cycle.
#pragma once

#include "screen.h"

namespace facenet_ext::cpu {
namespace {

// What the sieves of a group of anchors let through of a strip of distances.
template <class S>
struct Sifted {
  using T = typename S::T;
  static constexpr int kRoom = kTile<T> + kSlotPad;  // whole vectors are written and read
  static_assert(kTile<T> <= 256, "a column in a byte");
  int count[kGroup];  // -1: the anchor has no sieve
  uint8_t column[kGroup][kRoom];
  T d[kGroup][kRoom];  // what stands in those columns, then NaN

  // In two rounds over the group: what overlapping stores have written is read when it is long in the cache.
  void sift(const Call<S>& c, int64_t row, int group, const T* from, int64_t stride, int n) {
    for (int g = 0; g < group; ++g) count[g] = c.buckets(row + g).sift(from + g * stride, n, column[g]);
    for (int g = 0; g < group; ++g) {
      for (int i = 0; i < count[g]; i += S::W)
#pragma GCC unroll 16
        for (int p = 0; p < S::W; ++p) d[g][i + p] = from[g * stride + column[g][i + p]];
      if (count[g] > 0) S::store(d[g] + count[g], S::set1(std::numeric_limits<T>::quiet_NaN()));
    }
  }
};

// Takes the distances d[g stride + 0 .. n) into the buckets of anchors row .. row + count, g apart. The searches of a group
// run one after the other without a branch that depends on the data; what they found is worked off in one loop.
template <class S>
void take_rows(const Call<S>& c, int64_t row, int count, const typename S::T* d, int64_t stride, int n, const int32_t* index,
               uint32_t* queue) {
  Sifted<S> sifted;
  for (int g0 = 0; g0 < count; g0 += kGroup) {
    const int group = count - g0 < kGroup ? count - g0 : kGroup;
    if constexpr (S::kSieves) sifted.sift(c, row + g0, group, d + g0 * stride, stride, n);
    int wanted = 0;
    struct {
      const typename S::T* d;
      typename KeyOf<typename S::T>::Key* key;
    } of[kGroup];
    for (int g = 0; g < group; ++g) {
      Buckets<S> buckets = c.buckets(row + g0 + g);
      const typename S::T* from = d + (g0 + g) * stride;
      const uint32_t tag = static_cast<uint32_t>(g) << 26;
      of[g] = {from, buckets.key};
      if (buckets.row.radix > 0 && buckets.size() >= kFarBuckets)
        for (int at = 0; at < buckets.size(); at += 64 / sizeof(*buckets.key)) __builtin_prefetch(buckets.key + at);
      if (S::kSieves && sifted.count[g] >= 0)
        wanted += buckets.search_sifted(sifted.d[g], sifted.column[g], sifted.count[g], tag, queue + wanted);
      else if (buckets.searchable()) wanted += buckets.search(from, n, tag, queue + wanted);
      else buckets.take(from, n, index, c.limit, queue + wanted);
    }
    for (int i = 0; i < wanted; ++i) {
      const auto& anchor = of[queue[i] >> 26];
      const uint32_t at = queue[i] >> 16 & 0x3ff, column = queue[i] & 0xffff;
      improve(anchor.key + at, make_key(anchor.d[column], static_cast<uint32_t>(index[column])));
    }
    for (int g = 0; g < group; ++g) {
      Buckets<S> buckets = c.buckets(row + g0 + g);
      if (!S::kSieves || sifted.count[g] != 0 || buckets.row.track_far)
        buckets.look_for_top(d + (g0 + g) * stride, n, index, c.limit);
      if (!c.screening) buckets.count_taken(n);  // what screening leaves over is seldom worth a sieve
    }
  }
}

// The same for a tile of which only the vectors in `near` have been computed (screen.h). rows: this pass's anchors among its
// rows; pass: all of this pass's. What is within an anchor's ceiling after all is copied side by side and taken at once: few
// anchors find anything, while most strips of W anchors hold a vector for one of them.
template <class S>
void take_near(const Call<S>& c, int64_t I, int64_t J, bool both, Range rows, Range pass, int real_rows,
               const typename S::T* tile,  // [kT, kT]
               const uint64_t* near,       // [kT]
               int64_t first_tile) {
  using T = typename S::T;
  const auto& w = c.w;
  constexpr int kT = Call<S>::kT, W = S::W;
  const auto scratch = c.scratch(omp_get_thread_num());
  const int64_t r0 = I * kT, c0 = J * kT;
  int32_t index[kT];
  T picked[kT * W];  // [n], or [n, W] before it is transposed
  if (rows.size() > 0) {
    Lock lock(w.locks + I - first_tile);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T* const from = tile + (row - r0) * kT;
      const T ceiling = w.rows[row].ceiling;
      int n = 0;
      for (uint64_t left = near[row - r0]; left; left &= left - 1) {
        const int col = __builtin_ctzll(left) * W;
        bool wanted = false;
        for (int p = 0; p < W; ++p) wanted |= from[col + p] <= ceiling;
        __builtin_memcpy(picked + n, from + col, W * sizeof(T));
        // Behind the last candidate whatever follows in the workspace: its distance is NaN.
        __builtin_memcpy(index + n, w.order + c0 + col, W * sizeof *index);
        n += wanted ? W : 0;  // or overwritten by the next
      }
      if (n > 0) take_rows(c, row, 1, picked, n, n, index, scratch.queue);
    }
  }
  if (!both) return;
  uint8_t of[kT / W][kT];  // the rows near each strip of columns
  int count[kT / W] = {};
  for (int r = 0; r < real_rows; ++r)
    for (uint64_t left = near[r]; left; left &= left - 1) {
      const int v = __builtin_ctzll(left);
      of[v][count[v]++] = static_cast<uint8_t>(r);
    }
  Lock lock(w.locks + J - first_tile);
  for (int v = 0; v < kT / W; ++v) {
    if (count[v] == 0) continue;
    T ceiling[W];
    for (int p = 0; p < W; ++p) {
      const int64_t row = c0 + v * W + p;
      ceiling[p] = row >= pass.begin && row < pass.end ? w.rows[row].ceiling : T(-1);
    }
    int n = 0;
    int32_t wanted[W] = {};
    for (int i = 0; i < count[v]; ++i) {
      const T* const from = tile + of[v][i] * kT + v * W;
      int32_t here[W], any = 0;
      for (int p = 0; p < W; ++p) any |= here[p] = from[p] <= ceiling[p];
      for (int p = 0; p < W; ++p) wanted[p] |= here[p];
      __builtin_memcpy(picked + n * W, from, W * sizeof(T));
      index[n] = w.order[r0 + of[v][i]];
      n += any;
    }
    if (n == 0) continue;
    for (; n % W != 0; ++n) S::store(picked + n * W, S::set1(std::numeric_limits<T>::quiet_NaN()));
    S::transpose(picked, W, n, scratch.strip);
    for (int p = 0; p < W; ++p)
      if (wanted[p]) take_rows(c, c0 + v * W + p, 1, scratch.strip + p * n, n, n, index, scratch.queue);
  }
}

// One tile: anchors' rows [r0, ..) of tile I against candidates [c0, ..) of tile J; anchors outside [begin, end) are not of
// this pass. `both`: the candidates of J are anchors of this pass too.
template <class S>
void sweep_tile(Call<S>& c, int64_t I, int64_t J, bool both, int64_t begin, int64_t end, int64_t first_tile) {
  using T = typename S::T;
  const auto& w = c.w;
  constexpr int kT = Call<S>::kT;
  const auto scratch = c.scratch(omp_get_thread_num());
  const int64_t r0 = I * kT, c0 = J * kT;
  const int64_t from = r0 > begin ? r0 : begin, to = r0 + kT < end ? r0 + kT : end;  // this pass's anchors among the rows
  const bool screened = is_screened(c, I, J);
  // What is looked at in whole numbers first comes in whole register blocks.
  const int cols = static_cast<int>(c0 + kT < c.C ? kT : round_up(c.C - c0, screened ? S::NR : kSlotPad));
  int row0 = 0, rows;
  if (both) {  // every row is a candidate to the columns' anchors; the padding's norm is NaN
    rows = static_cast<int>(r0 + kT < c.A ? kT : round_up(c.A - r0, kSlotPad % S::MR == 0 ? kSlotPad : kColumnPad));
  } else {
    row0 = static_cast<int>((from - r0) / S::MR * S::MR);
    rows = static_cast<int>(round_up(to - r0, S::MR));
  }
  T* tile = scratch.tile;
  uint64_t near[kT];
  if (screened) {
    screened_distances(c, r0, row0, rows, c0, cols, both, begin, end, tile, near);
  } else {
    squared_distances<S>(w.ax + (r0 + row0) * c.Dp, c.Dp, w.anorm + r0 + row0, w.panels, c.panel_size, c0, w.norm, c.D,
                         rows - row0, cols, I == J && both, tile + row0 * kT, kT);
  }
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const int real_rows = static_cast<int>(r0 + rows < c.A ? rows : c.A - r0);
  for (int r = row0; r < real_rows; ++r) {  // candidates of the anchor's own class are no negatives
    const int32_t k = w.aclass[r0 + r];
    if (k < 0) continue;
    const int64_t a = w.class_begin[k] > c0 ? w.class_begin[k] : c0;
    const int64_t b = w.class_begin[k + 1] < c0 + cols ? w.class_begin[k + 1] : c0 + cols;
    for (int64_t j = a; j < b; ++j) tile[r * kT + (j - c0)] = nan;
    if (both && I == J) fill(tile + r * kT, r + 1 < cols ? r + 1 : cols, nan);
  }
  if (both && I == J)
    for (int r = real_rows; r < rows; ++r) fill(tile + r * kT, cols, nan);
  if (screened) {
    take_near(c, I, J, both, {from, to}, {begin, end}, real_rows, tile, near, first_tile);
    return;
  }

  if (from < to) {
    Lock lock(w.locks + I - first_tile);
    for (int64_t row = from; row < to;) {
      const int skip = both && I == J ? static_cast<int>((row - r0) / S::W * S::W) : 0;  // below the diagonal
      const int64_t last = row - (row - r0) % S::W + S::W < to ? row - (row - r0) % S::W + S::W : to;
      take_rows(c, row, static_cast<int>(last - row), tile + (row - r0) * kT + skip, kT, cols - skip, w.order + c0 + skip,
                scratch.queue);
      row = last;
    }
  }
  if (both) {
    Lock lock(w.locks + J - first_tile);
    for (int col = 0; col < cols; col += S::W) {
      const int64_t a = c0 + col > begin ? c0 + col : begin, b = c0 + col + S::W < end ? c0 + col + S::W : end;
      if (a >= b) continue;
      const int height =
          I == J ? static_cast<int>(round_up(col + S::W, kColumnPad) < rows ? round_up(col + S::W, kColumnPad) : rows) : rows;
      S::transpose(tile + col, kT, height, scratch.strip);
      take_rows(c, a, static_cast<int>(b - a), scratch.strip + (a - c0 - col) * height, height, height, w.order + r0,
                scratch.queue);
    }
  }
}

// All tiles of a pass. The calling thread asks after each whether to go on (the callback paces itself).
template <class S>
void sweep(Call<S>& c, int64_t begin, int64_t end) {
  constexpr int kT = Call<S>::kT;
  const int64_t first = begin / kT, own = (end + kT - 1) / kT - first, all = (c.C + kT - 1) / kT;
  for (int64_t i = 0; i < own; ++i) c.w.locks[i] = 0;
  int stop = 0;
  const auto visit = [&](int64_t I, int64_t J, bool both) {
    if (__atomic_load_n(&stop, __ATOMIC_RELAXED)) return;
    sweep_tile(c, I, J, both, begin, end, first);
    if (c.args.interrupted && omp_get_thread_num() == 0 && c.args.interrupted(c.args.interrupted_context))
      __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
  };
  if (c.symmetric) {
    const Tournament tournament{own, c.threads};
    own_first(
        c, [&](int t) { return tournament.count(t); },
        [&](int t, int64_t i) {
          const auto [I, J] = tournament.meeting(t, i);
          visit(first + I, first + J, true);
        });
  }
  // The pass's anchors with candidates that are none of its anchors.
  const int64_t rest = c.symmetric ? all - own : all;
  own_first(
      c, [&](int t) { return own * (t + 1) / c.threads * rest - own * t / c.threads * rest; },
      [&](int t, int64_t i) {
        const int64_t J = i % rest;
        visit(first + own * t / c.threads + i / rest, c.symmetric && J >= first ? J + own : J, false);
      });
  c.stopped = stop != 0;
}

}  // namespace
}  // namespace facenet_ext::cpu
