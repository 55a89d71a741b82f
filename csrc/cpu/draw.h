// Rules that draw: of the negatives that a pair may take, the one whose hash comes first.
//
// A negative of anchor a has one priority, hash(seed, a, n), whichever positive asks for it: no generator's state, no order
// of visits, so any number of threads and of ranks draws alike. Of the sorted positives t[0 .. K), a negative at distance d
// is eligible for one range of ranks [from, to):
//
//     random_semi_hard   d - m < t < d    from = #{ t <= d - m }  (a band: #{ t < d - band }),  to = #{ t < d }
//     random_active      d - m < t        from the same,                                        to = K
//
// Both ends grow with d, rounding or not, so all ranges of an anchor have an order, and their sum from + to tells them apart:
// at most 2 K + 1 different ones. The sweep keeps the least (hash, index) of each; a pass over them with a queue then finds
// every positive's least, those of the ranges that hold its rank, in O(K). O(N^2 log K) in time, O(N K) in memory.
#pragma once

#include "finish.h"
#include "tiles.h"

namespace facenet_ext::cpu {
namespace {

template <class S>
struct Draw {
  using T = typename S::T;
  static constexpr int kT = Call<S>::kT, W = S::W;
  Call<S>& c;
  const int64_t begin, end;
  const bool above = c.args.negatives == Negatives::random_semi_hard;  // only negatives farther than the positive
  const bool closed = above && c.args.band > 0;  // eligible where d <= t + width
  const T width = c.scaled(closed ? c.args.band : c.args.margin);

  // Thresholds in the rule's unit, nothing drawn yet. A positive at distance NaN has no eligible negative.
  void start() const {
    const auto& w = c.w;
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = begin; row < end; ++row) {
      Row<T>& r = w.rows[row];
      const T* t = w.t + r.slot;
      while (r.positives > 0 && t[r.positives - 1] == std::numeric_limits<T>::max()) --r.positives;
      thresholds_in_unit(c, row);
      r.radix = 0;
      fill(w.draws + 2 * r.slot, 2 * int64_t{r.pairs} + 1, kNoDraw);
    }
  }

  // The candidates index[0 .. real) at distances d[0 .. n), n a multiple of W, for one anchor.
  void take(int64_t row, const T* d, int n, const int32_t* index, int real, T* aside) const {
    const Row<T>& r = c.w.rows[row];
    const int pairs = static_cast<int>(r.pairs), K = static_cast<int>(r.positives);
    if (K == 0) return;
    const T* t = c.w.t + r.slot;
    int32_t* __restrict from = reinterpret_cast<int32_t*>(aside);
    int32_t* __restrict to = from + kT;
    uint64_t* __restrict priority = reinterpret_cast<uint64_t*>(to + kT);
    if (closed) S::template ranks<false>(t, pairs, width, d, n, from);
    else S::template ranks<true>(t, pairs, width, d, n, from);
    if (above) S::template ranks<false>(t, pairs, T(0), d, n, to);
    else fill(to, n, K);
    int32_t any = 0;
    for (int j = 0; j < n; ++j) {
      if (!(d[j] < kNoNegative<T>)) to[j] = 0;  // NaN too
      any |= from[j] < to[j];
    }
    if (!any) return;
    const uint64_t key = draw_key(row);
    for (int j = 0; j < real; ++j)
      priority[j] = mix(key ^ (static_cast<uint32_t>(index[j]) * uint64_t{0xd1342543de82ef95u} + 1));
    uint64_t* const least = c.w.draws + 2 * r.slot;
    uint32_t* const first = first_rank(row);
    for (int j = 0; j < real; ++j) {
      if (from[j] >= to[j]) continue;
      const uint64_t draw = (priority[j] >> 32 << 32) | static_cast<uint32_t>(index[j]);
      const int at = from[j] + to[j];
      if (draw >= least[at]) continue;
      least[at] = draw;
      first[at] = static_cast<uint32_t>(from[j]);
    }
  }

  void visit(const Tile& tile, const T* d) const {
    const auto scratch = c.scratch(omp_get_thread_num());
    const int64_t top = tile.I * kT;
    const int cols = static_cast<int>(round_up(tile.c1 - tile.c0, kSlotPad));
    for (int64_t row = tile.r0; row < tile.r1; ++row)
      take(row, d + (row - top) * kT, cols, c.w.order + tile.c0, static_cast<int>(tile.c1 - tile.c0), scratch.aside);
    if (!tile.both) return;
    for (int col = 0; col < cols; col += W) {
      S::transpose(d + col, kT, kT, scratch.strip);
      for (int i = 0; i < W; ++i) {
        const int64_t row = tile.c0 + col + i;
        if (row >= tile.j0 && row < tile.j1) take(row, scratch.strip + i * kT, kT, c.w.order + top, kT, scratch.aside);
      }
    }
  }

  // Every positive's negative, where select() looks for it: key[r + 1] for rank r.
  void finish() const {
    const auto& w = c.w;
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = w.rows[row].slot;
      const int pairs = static_cast<int>(w.rows[row].pairs);
      uint64_t* const draw = w.draws + 2 * slot;
      uint32_t* const first = first_rank(row);
      uint32_t* const drawn = reinterpret_cast<uint32_t*>(w.weight + slot);
      // The queue holds ranges that may still win, in the memory of those gone by: draws ascend, and so do the ends.
      int head = 0, tail = 0, next = 0;
      for (int r = 0; r < pairs; ++r) {
        for (; next <= 2 * pairs && (draw[next] == kNoDraw || first[next] <= static_cast<uint32_t>(r)); ++next) {
          if (draw[next] == kNoDraw) continue;
          const uint64_t mine = draw[next];
          const uint32_t last = static_cast<uint32_t>(next) - first[next];
          while (tail > head && draw[tail - 1] > mine) --tail;
          draw[tail] = mine;
          first[tail++] = last;
        }
        while (head < tail && first[head] <= static_cast<uint32_t>(r)) ++head;
        drawn[r] = head < tail ? static_cast<uint32_t>(draw[head]) : kNobody;
      }
      for (int r = 0; r < pairs; ++r) w.key[slot + r + 1] = make_key(T(0), drawn[r]);
    }
  }

 private:
  static constexpr uint64_t kNoDraw = ~uint64_t{0};

  uint64_t draw_key(int64_t row) const {
    const int64_t place = c.args.anchor_offset < 0 ? c.C : c.args.anchor_offset;
    const uint64_t anchor = static_cast<uint64_t>(place + c.w.arow[row]);
    return mix(static_cast<uint64_t>(*c.args.seed) + 0x9e3779b97f4a7c15u * (anchor + 1));
  }
  // [2 K + 1] where each range begins; where the buckets of other rules are.
  uint32_t* first_rank(int64_t row) const { return reinterpret_cast<uint32_t*>(c.w.key + c.w.rows[row].slot); }
};

}  // namespace
}  // namespace facenet_ext::cpu
