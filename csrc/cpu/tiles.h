// The sweep for rules that look at every distance: the same tiles as in sweep.h, but in an order that sums can rely on.
//
// Two tiles that touch one block of rows add to the same numbers, so the order in which they do decides the last bits. Each
// block therefore has turns: a tile draws a ticket for both of its blocks as it is dealt, all tiles are dealt in one fixed
// order, and a tile waits until its tickets are called. The tile dealt first of all unfinished ones never waits, so nothing
// stalls; and one that is dealt two rounds of a tournament later rarely finds its blocks taken:
//
//   round 0   (0,5) (1,4) (2,3)         B blocks play B - 1 rounds (the circle method), each block once a round;
//   round 1   (1,5) (2,0) (3,4)         an odd B leaves one block over a round, which meets itself.
//   ...
#pragma once

#include "screen.h"

namespace facenet_ext::cpu {
namespace {

// One tile: anchors' rows [r0, r1) of this pass among those of block I, candidates [c0, c1) of block J. `both`: the
// candidates of J are anchors of this pass too (those in [j0, j1)), and their negatives in I are this tile's as well.
struct Tile {
  int64_t I, J;
  bool both;
  int64_t r0, r1, c0, c1, j0, j1;
};

// The tiles of a pass over the anchors [begin, end), dealt one after the other.
template <class S>
struct Deal {
  static constexpr int64_t kT = Call<S>::kT;
  const int64_t begin, end, A, C;
  const bool symmetric;
  const int64_t first, own, rest, shared, count;
  Deal(const Call<S>& c, int64_t b, int64_t e)
      : begin(b),
        end(e),
        A(c.A),
        C(c.C),
        symmetric(c.symmetric),
        first(b / kT),
        own(e > b ? (e + kT - 1) / kT - first : 0),
        rest((c.C + kT - 1) / kT - (c.symmetric ? own : 0)),
        shared(c.symmetric ? own * (own + 1) / 2 : 0),
        count(shared + own * rest) {}

  Tile operator[](int64_t i) const {
    if (i >= shared) {  // own anchors with candidates that are none of this pass's anchors
      i -= shared;
      const bool wide = own <= rest;
      const int64_t few = wide ? own : rest, many = wide ? rest : own, a = i % few, b = (i / few + a) % many;
      const int64_t J = wide ? b : a;
      return at(first + (wide ? a : b), symmetric && J >= first ? J + own : J, false);
    }
    const int64_t players = own + own % 2, rounds = players - 1, meet = players / 2;
    if (i >= rounds * meet) return meeting(i - rounds * meet, i - rounds * meet);  // an even number: nobody was left over
    const int64_t round = i / meet, k = i % meet;
    if (k > 0) return meeting((round + k) % rounds, (round + rounds - k) % rounds);
    return meeting(round, own % 2 ? round : own - 1);
  }

 private:
  Tile meeting(int64_t a, int64_t b) const { return at(first + (a < b ? a : b), first + (a < b ? b : a), a != b); }
  Tile at(int64_t I, int64_t J, bool both) const {
    const auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    return {I,
            J,
            both,
            most(I * kT, begin),
            least((I + 1) * kT, end),
            J * kT,
            least((J + 1) * kT, C),
            both ? most(J * kT, begin) : 0,
            both ? least((J + 1) * kT, end) : 0};
  }
};

// Larger than any distance, with room to be shifted: candidates that are no negatives of the anchor.
template <class T>
constexpr T kNoNegative = std::numeric_limits<T>::max() / 4;

// Which entries of a tile are small enough to be summed directly: a bit each, in the thread's queue.
template <class S>
struct NearBits {
  static constexpr int kWords = (Call<S>::kT + 31) / 32;
  uint32_t* of_row;  // [kWords]
  NearBits(const Call<S>& c, int64_t row) : of_row(c.scratch(omp_get_thread_num()).queue + row % Call<S>::kT * kWords) {}
  void clear() const { fill(of_row, kWords, 0u); }
  void set(int64_t j) const { of_row[j / 32] |= 1u << (j % 32); }
  template <class Visit>
  void for_each(Visit visit) const {
    for (int i = 0; i < kWords; ++i)
      for (uint32_t bits = of_row[i]; bits != 0; bits &= bits - 1) visit(32 * i + __builtin_ctz(bits));
  }
};
template <class S>
void find_near(const Call<S>& c, const Tile& tile, int64_t row, int cols, typename S::T* d) {
  static_assert(Call<S>::kT * NearBits<S>::kWords <= kQueue, "");
  using T = typename S::T;
  const auto& w = c.w;
  const NearBits<S> near(c, row);
  near.clear();
  const typename S::V bound = S::set1(kNear<T> * (w.anorm[row] + c.longest));  // of the longest candidate
  typename S::V least = bound;
  for (int j = 0; j < cols; j += S::W) least = S::smaller(S::load(d + j), least);
  if (S::sum(least - bound) == 0) return;
  for (int64_t j = tile.c0; j < tile.c1; ++j) {
    if (w.class_of[j] == w.aclass[row] || !is_near(c, d[j - tile.c0], row, j)) continue;
    d[j - tile.c0] = direct_distance(c, row, j);
    near.set(j - tile.c0);
  }
}

// Distances in the rule's unit, [rows of I, columns of J], kNoNegative where the labels agree and in the padding. All of I's
// rows where `both`, else those of the pass.
template <class S>
void tile_distances(const Call<S>& c, const Tile& tile, int64_t begin, int64_t end, typename S::T* out) {
  using T = typename S::T;
  const auto& w = c.w;
  constexpr int kT = Call<S>::kT;
  const int64_t top = tile.I * kT, low = tile.both ? 0 : (tile.r0 - top) / S::MR * S::MR;
  const int64_t bottom = tile.both ? (top + kT < c.A ? top + kT : c.A) : tile.r1;
  const int rows = static_cast<int>(round_up(bottom - top, S::MR) - low);
  const int cols = static_cast<int>(round_up(tile.c1 - tile.c0, S::NR));
  if (is_screened(c, tile.I, tile.J)) {
    uint64_t near[kT];
    const int first = static_cast<int>(low);
    screened_distances(c, top, first, first + rows, tile.c0, cols, tile.both, begin, end, out, near);
    for (int r = first; r < first + rows; ++r)
      for (int v = 0; v < cols / S::W; ++v)
        if (!(near[r] >> v & 1)) S::store(out + r * kT + v * S::W, S::set1(kNoNegative<T>));
  } else {
    squared_distances<S>(w.ax + (top + low) * c.Dp, c.Dp, w.anorm + top + low, w.panels, c.panel_size, tile.c0, w.norm, c.D,
                         rows, cols, false, out + low * kT, kT);
  }
  out += low * kT;
  if (counts_all(c.args))
    for (int64_t row = top + low; row < bottom; ++row) find_near(c, tile, row, cols, out + (row - top - low) * kT);
  if (c.args.distance != Distance::sqeuclidean)
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < cols; j += S::W) {
        T* d = out + r * kT + j;
        S::store(d, c.args.distance == Distance::cosine ? S::load(d) * S::set1(T(0.5)) : S::sqrt(S::load(d)));
      }
  const int real = static_cast<int>(tile.c1 - tile.c0);
  const int padded = static_cast<int>(round_up(real, kSlotPad));
  for (int64_t row = top + low; row < bottom; ++row, out += kT) {
    fill(out + real, padded - real, kNoNegative<T>);
    const int32_t k = w.aclass[row];
    if (k < 0) continue;
    const int64_t a = w.class_begin[k] > tile.c0 ? w.class_begin[k] : tile.c0;
    const int64_t b = w.class_begin[k + 1] < tile.c1 ? w.class_begin[k + 1] : tile.c1;
    if (a < b) fill(out + (a - tile.c0), b - a, kNoNegative<T>);
  }
}

// An anchor's thresholds from squared distances to the rule's unit.
template <class S>
void thresholds_in_unit(const Call<S>& c, int64_t row) {
  using T = typename S::T;
  T* const t = c.w.t + c.w.rows[row].slot;
  for (int64_t i = 0; i < slot_pitch(c.w.rows[row].pairs); i += S::W) {
    if (c.args.distance == Distance::euclidean) S::store(t + i, S::sqrt(S::load(t + i)));
    if (c.args.distance == Distance::cosine) S::store(t + i, S::load(t + i) * S::set1(T(0.5)));
  }
}

// visit(tile, distances) for each tile of a pass, tiles of one block in the order in which they are dealt. The calling thread
// asks after each whether to go on.
template <class S, class Visit>
void visit_tiles(Call<S>& c, int64_t begin, int64_t end, Visit visit) {
  const Deal<S> deal(c, begin, end);
  const int64_t blocks = (c.A + Call<S>::kT - 1) / Call<S>::kT;
  const int64_t places = blocks + (c.symmetric ? 0 : (c.C + Call<S>::kT - 1) / Call<S>::kT);
  int32_t* const lock = c.w.turns;
  int32_t* const ticket = c.w.turns + 1;
  int32_t* const called = ticket + places;
  fill(c.w.turns, 1 + 2 * places, int32_t{0});
  int64_t next = 0;
  int stop = 0;
#pragma omp parallel num_threads(c.threads)
  for (;;) {
    Tile tile;
    int64_t place[2];
    int32_t mine[2];
    {
      const Lock dealing(lock);
      if (__atomic_load_n(&stop, __ATOMIC_RELAXED) || next == deal.count) break;
      tile = deal[next++];
      place[0] = tile.I;
      place[1] = c.symmetric ? tile.J : blocks + tile.J;
      mine[0] = ticket[place[0]]++;
      mine[1] = place[1] == place[0] ? mine[0] : ticket[place[1]]++;
    }
    typename S::T* distances = c.scratch(omp_get_thread_num()).tile;
    tile_distances(c, tile, begin, end, distances);
    for (int i = 0; i < 2; ++i)
      while (__atomic_load_n(called + place[i], __ATOMIC_ACQUIRE) != mine[i]) sched_yield();
    visit(tile, distances);
    for (int i = 0; i < (place[0] == place[1] ? 1 : 2); ++i)
      __atomic_store_n(called + place[i], mine[i] + 1, __ATOMIC_RELEASE);
    if (c.args.interrupted && omp_get_thread_num() == 0 && c.args.interrupted(c.args.interrupted_context))
      __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
  }
  c.stopped = stop != 0;
}

}  // namespace
}  // namespace facenet_ext::cpu
