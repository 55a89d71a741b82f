// The sieve: which of many distances are worth a search.
//
// An anchor's buckets (buckets.h) want d where t[b-1] < d <= key[b] for some b. After n candidates those are K slivers, each
// about 1 / n of all distances, and an AVX2 search spends 32 + 5 R instructions on 8 distances of which hardly any is wanted.
// The sieve is a map of the slivers: a bit for each of 256, 512 or 1024 cells of equal width between the first threshold and
// the ceiling, set where the cell touches one. Asking it takes 20, 23 or 29 instructions for 8 distances, in a chain half as
// long, and only what it lets through is searched: 8 of 100 distances at the beginning of training and 2 of 100 later on with
// 15 thresholds and 4,096 rows, 16 and 5 with 39 and 1,800. On a Zen 3 that takes 0 to 12 % off a call
// (benchmarks/results/NOTES.md).
//
//        t0        t1     t2           t3     ceiling          The cell of d is the low bits of float(d scale + bias), since
//     ---|=====----|==----|====--------|===---|--- d           bias is about 1.5 * 2^23, where floats are whole numbers.
//        1 1 1 0 0 1 1 0 0 1 1 1 0 0 0 1 1 0 0 0 0   cells     Rounded or not, that never falls as d rises.
//
// So a wanted d lies in a cell between those of its sliver's ends, all of which are set: nothing wanted is ever lost, and the
// search decides about the rest. What lies outside is moved to a cell just beyond the ends. Keys only fall, so an old sieve
// lets more through than it need, but is never wrong: it is made anew when the anchor has seen kSieveAgain times as many
// candidates, at some 18 cycles a bucket. No result depends on when, or on whether there is one: where more than half gets
// through, there is none for a while.
#pragma once

#include <limits>

#include "layout.h"

namespace facenet_ext::cpu {
namespace {

constexpr uint32_t kSieveFirst = 192;  // candidates after which an anchor's first sieve is made
constexpr uint32_t kSieveAgain = 4;

// How many cells for K thresholds: 8, 16 or 32 words, of which permutations of 8 find one.
constexpr uint32_t sieve_cells(int K) { return K < 24 ? 256 : K < 64 ? 512 : 1024; }

inline void start_sieve(Sieve& s) {
  s.cells = s.taken = 0;
  s.next = kSieveFirst;
}

// Sets cells first .. last.
inline void mark_cells(uint32_t* cell, uint32_t first, uint32_t last) {
  uint32_t mask = ~uint32_t{0} >> (first & 31);  // a word's first cell is its sign, which a vector of words can be asked for
  for (uint32_t word = first >> 5; word < last >> 5; ++word) {
    cell[word] |= mask;
    mask = ~uint32_t{0};
  }
  cell[last >> 5] |= mask & ~uint32_t{0} << (31 - (last & 31));
}

// Made of the buckets as they stand, R rows of L lanes. Left empty (cells = 0) where distances have no width to divide.
template <class S>
void make_sieve(Sieve& s, const Row<float>& row,
                const float* t,  // [R, L] thresholds, +inf behind the last
                const uint64_t* key,  // [R, L]
                int R, int L) {
  using V = typename S::V;
  constexpr int W = S::W;
  const uint32_t cells = sieve_cells(static_cast<int>(row.positives));
  // Until a negative beyond all positives is known, whatever lies there is wanted.
  const float low = t[0] > 0 ? t[0] : 0, high = row.top_empty ? row.farthest_positive : row.ceiling;
  s.cells = 0;
  if (!(high > 0 && high < std::numeric_limits<float>::max())) return;
  const float width = high - low > high / 256 ? high - low : high / 256;  // d scale stays far below 2^22
  // Cells 3 .. cells - 3; rounding the bias moves all of them by half a cell at most.
  s.scale = static_cast<float>(cells - 6) / width;
  s.bias = 12582912 + 3 - low * s.scale;
  s.bottom = low - 1.5f / s.scale;
  s.top = high + 1.5f / s.scale;
  if (!(s.scale < std::numeric_limits<float>::max())) return;

  for (uint32_t word = 0; word < cells / 32; ++word) s.cell[word] = 0;
  const V scale = S::set1(s.scale), bias = S::set1(s.bias);
  const V bottom = S::set1(s.bottom), top = S::set1(s.top);
  const auto cell_of = [&](V d, uint32_t* cell) {
    const V at = S::madd(d, scale, bias);
    __builtin_memcpy(cell, &at, sizeof at);
  };
  for (int lane = 0; lane < L; lane += W) {
    float before[W];  // the threshold before a lane's first is the last of the lane before
    for (int p = 0; p < W; ++p)
      before[p] = lane + p > 0 ? t[(R - 1) * L + lane + p - 1] : std::numeric_limits<float>::infinity();
    V from = S::load(before);
    for (int place = lane; place < R * L; place += L) {
      const V threshold = S::load(t + place), to = S::smaller(S::smaller(S::values(key + place), threshold), top);
      float begin[W], end[W];
      uint32_t first[W], last[W];
      S::store(begin, from);
      S::store(end, to);
      cell_of(S::larger(from, bottom), first);
      cell_of(to, last);
      for (int p = 0; p < W; ++p)  // no sliver: closed, nothing between equal thresholds, or behind the last
        if (begin[p] < end[p]) mark_cells(s.cell, first[p] & (cells - 1), last[p] & (cells - 1));
      from = threshold;
    }
  }
  s.cells = cells;
}

}  // namespace
}  // namespace facenet_ext::cpu
