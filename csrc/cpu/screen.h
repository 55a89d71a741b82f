// Late in training nearly every negative is so far that nobody asks for it. There a tile is looked at in whole numbers of 8 bits
// first, and only what may be wanted is computed: at four times the speed where AVX-512 has VNNI, at 1.8 to 2 times with AVX2.
// Where statistics are asked for every positive has its negative, however far; but beyond all of an anchor's positives that is
// one and the same, the closest, and of what is seen later ever less is closer than the closest so far.
//
//   x = s q + e, q in -m .. m, s as small as m allows (m = 127; with AVX2 63, and see Avx2::screen). |e| is known for each row.
//   With L the longest row,
//       |a.b - s_a s_b q_a.q_b| <= |e_a| |b| + (|a| + |e_a|) |e_b| <= u_a + u_b,    u = L (1 + sqrt(D) / 2 m) |e|,
//   so |a|^2 + |b|^2 - 2 (s_a s_b q_a.q_b + u_a + u_b) is below the true squared distance, and, less the slack that Limit has
//   for it, below the float32 one. Where that is beyond the ceilings of both rows (buckets.h), neither wants the pair.
//
// What is left is summed in float32 by the same chain of operations as elsewhere, so no bit of any result depends on whether a
// tile was screened, nor on how far another thread had lowered the ceilings. Cost: D integer products a pair, N D bytes.
#pragma once

#include "mine.h"

namespace facenet_ext::cpu {
namespace {

constexpr int64_t kMaxScreenDim = 32768;  // 255 * 127 * D has to fit 32 bits
constexpr int64_t kScreenAnchors = 128;  // fewer do not win back what whole numbers of every candidate cost

// |a.b - s_a s_b q_a.q_b| <= spread (|e_a| + |e_b|).
template <class S>
double spread(const Call<S>& c) {
  return std::sqrt(static_cast<double>(c.longest)) * (1 + std::sqrt(static_cast<double>(c.D)) / (2 * S::kCoarse));
}

// Is it worth it? By a sample of pairs of other labels: how many are within reach of the anchor's farthest positive. Where
// statistics, a soft margin or mining ask for every positive's negative, how many may be closer than it, as far as whole numbers
// can tell; beyond it the closest so far is wanted, which among few candidates changes often. Where the closest negative is all
// that counts, always.
template <class S>
bool worth_screening(const Call<S>& c, int64_t begin, int64_t end) {
  using T = typename S::T;
  const Screening set = screening_switch();
  const bool may = (!counts_all(c.args) || c.limit.on) && c.finite && begin < end && set != Screening::never;
  if (!may || c.D > kMaxScreenDim || !S::screens()) return false;
  if (set == Screening::always) return true;
  if (c.A < kScreenAnchors || c.C < (c.far_is_zero ? 2 : 8) * c.kT) return false;
  if (c.hard) return true;
  const double error = 4 * spread(c) * std::sqrt(static_cast<double>(c.D) / 12);  // of a squared distance, in steps
  const auto reach = [&](int64_t row) {
    const T farthest = c.w.rows[row].farthest_positive;
    return c.limit.on ? c.limit(farthest) : farthest + static_cast<T>(error) * S::coarse_step(c.w.ax + row * c.Dp, c.Dp);
  };
  // W pairs, asked for from both sides: if so few are within reach, most vectors are not wanted.
  constexpr int kTries = 1024;
  const int most = kTries / ((c.limit.on ? 4 : 16) * S::W);
  int tried = 0, near = 0;
  for (int i = 0; i < kTries && near < most; ++i) {
    const int64_t row = begin + (end - begin) * i / kTries;
    const int64_t other = static_cast<int64_t>(mix(static_cast<uint64_t>(i)) % static_cast<uint64_t>(c.C));
    if (c.w.class_of[other] == c.w.aclass[row]) continue;
    ++tried;
    near += direct_distance(c, row, other) <= reach(row);
  }
  return near * kTries < most * tried;
}

// An anchor wants every distance until it knows a negative beyond all its positives. One that is looked for beforehand, among
// four rows, spares it the tile in which it would find it; nobody asks which one it was.
template <class S>
void find_far(const Call<S>& c, int64_t begin, int64_t end) {
  if (!c.limit.on) return;
  const auto& w = c.w;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t row = begin; row < end; ++row) {
    Buckets<S> buckets = c.buckets(row);
    const int32_t k = w.aclass[row];
    const int64_t first = w.class_begin[k + 1], others = c.C - (first - w.class_begin[k]);
    for (int i = 0; i < 4 && buckets.row.top_empty; ++i) {
      const typename S::T d = direct_distance(c, row, (first + others * i / 4) % c.C);
      if (d - c.limit.slack > buckets.row.farthest_positive) buckets.know_far(c.limit);
    }
  }
}

// Where row `at` stands among the coarse rows: by panels of NR rows, 4 numbers of a row side by side.
template <class S>
int8_t* coarse_row(const Call<S>& c, const Coarse<typename S::T>& rows, int64_t at) {
  return rows.numbers + at / S::NR * S::NR * c.Dp + at % S::NR * 4;
}

// Every row as whole numbers, and how far it reaches with them.
template <class S>
void quantise(const Call<S>& c,
              const typename S::T* x,  // [count, Dp]
              const typename S::T* norm,  // [count]
              int64_t count, const Coarse<typename S::T>& rows) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr T kRound = T(3) / 2 / std::numeric_limits<T>::epsilon();
  constexpr T kLeast = 1 / std::numeric_limits<T>::max() * 4;  // a step whose inverse is no number takes every element for 0
  const double factor = 2.002 * spread(c);  // a thousandth for the rounding of all this
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t at = 0; at < count; ++at) {
    const T* const from = x + at * c.Dp;
    T* const q = c.scratch(omp_get_thread_num()).rows;
    const T step = S::coarse_step(from, c.Dp), inverse = step > kLeast ? 1 / step : 0;
    const V to = S::set1(kRound);  // adding it rounds to a whole number
    V error = S::zero();
    for (int64_t k = 0; k < c.Dp; k += S::W) {
      const V whole = S::madd(S::load(from + k), S::set1(inverse), to) - to;
      const V e = S::load(from + k) - S::set1(step) * whole;
      error = S::madd(e, e, error);
      S::store(q + k, whole);
    }
    int32_t sum = 0;
    for (int64_t k = 0; k < c.Dp; ++k) sum += static_cast<int32_t>(q[k]);
    int8_t* const row = reinterpret_cast<int8_t*>(q);  // behind what is read
    for (int64_t k = 0; k < c.Dp; k += S::W) {
      int8_t some[S::W];
      for (int i = 0; i < S::W; ++i) some[i] = static_cast<int8_t>(q[k + i]);
      __builtin_memcpy(row + k, some, sizeof some);
    }
    int8_t* const out = coarse_row(c, rows, at);
    for (int64_t k = 0; k < c.Dp; k += 4) __builtin_memcpy(out + k * S::NR, row + k, 4);
    rows.step[at] = step;
    rows.level[at] = -S::kUp * sum;
    // The slack once for both rows of a pair.
    rows.reach[at] = norm[at] - static_cast<T>(factor * std::sqrt(static_cast<double>(S::sum(error)))) - c.limit.slack / 2;
  }
}
template <class S>
void quantise(const Call<S>& c) {
  const auto& w = c.w;
  for (int t = 0; t < c.threads; ++t) *c.scratch(t).coarse_rows = -1;
  quantise(c, w.x, w.norm, round_up(c.C, kColumnPad), w.coarse);
  if (!c.symmetric) quantise(c, w.ax, w.anorm, round_up(c.A, kColumnPad), w.acoarse);
}

// Anchors r0 .. of a tile by groups of MR, as a register block reads them where they do not stand in one panel, and moved up:
// [kT / MR, Dp / 4, MR, 4]. A thread's tiles come in strips (share.h), so they are seldom made anew.
template <class S>
const int8_t* side_by_side(const Call<S>& c, int64_t r0) {
  const auto scratch = c.scratch(omp_get_thread_num());
  int8_t* const aside = scratch.coarse;
  if (*scratch.coarse_rows == r0) return aside;
  *scratch.coarse_rows = r0;
  const int64_t padded = round_up(c.A, kColumnPad) - r0, rows = padded < c.kT ? padded : c.kT, dims = c.Dp;
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* const from = coarse_row(c, c.w.acoarse, r0 + r);
    int8_t* const to = aside + r / S::MR * S::MR * dims + r % S::MR * 4;
    for (int64_t k = 0; k < dims; k += 4)
      for (int i = 0; i < 4; ++i) to[k * S::MR + i] = static_cast<int8_t>(from[k * S::NR + i] + S::kUp);
  }
  return aside;
}

// What an anchor of this pass still wants at most; nothing, if the row is none. Another thread may be lowering it.
template <class S>
typename S::T ceiling(const Call<S>& c, int64_t row, int64_t begin, int64_t end) {
  using T = typename S::T;
  if (row < begin || row >= end) return -std::numeric_limits<T>::infinity();
  T value;
  __atomic_load(&c.w.rows[row].ceiling, &value, __ATOMIC_RELAXED);
  return value;
}

// Vectors of a tile that have to be computed, up to kUnits side by side: one alone would wait for its own chain.
template <class S>
struct Units {
  using T = typename S::T;
  using V = typename S::V;
  static constexpr int kUnits = 8;
  const Call<S>& c;
  const int64_t r0, c0;
  T* tile;
  int count = 0;
  int row[kUnits], column[kUnits];

  void push(int r, int col) {
    row[count] = r;
    column[count] = col;
    if (++count == kUnits) flush();
  }
  void flush() {
    if (count == 0) return;
    const T* a[kUnits];
    const T* b[kUnits];
    V sum[kUnits];
    for (int u = 0; u < kUnits; ++u) {
      const int of = u < count ? u : 0;
      a[u] = c.w.ax + (r0 + row[of]) * c.Dp;
      const int64_t at = c0 + column[of];
      b[u] = c.w.panels + at / S::NR * c.panel_size + at % S::NR;
    }
    for (int64_t k0 = 0; k0 < c.D; k0 += kDepth) {  // as squared_distances()
      V part[kUnits];
      for (int u = 0; u < kUnits; ++u) part[u] = S::zero();
      const int64_t end = k0 + kDepth < c.D ? k0 + kDepth : c.D;
      for (int64_t k = k0; k < end; ++k)
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) part[u] = S::madd(S::set1(a[u][k]), S::load(b[u] + k * S::NR), part[u]);
      for (int u = 0; u < kUnits; ++u) sum[u] = k0 == 0 ? part[u] : sum[u] + part[u];
    }
    for (int u = 0; u < count; ++u)
      S::store(tile + row[u] * c.kT + column[u],
               S::max0(S::madd(S::set1(-2), sum[u], S::set1(c.w.anorm[r0 + row[u]]) + S::load(c.w.norm + c0 + column[u]))));
    count = 0;
  }
};

// A tile whose rows and columns are the same rows is not: near the diagonal nearly all is wanted.
template <class S>
bool is_screened(const Call<S>& c, int64_t I, int64_t J) {
  return c.screening && (I != J || !c.symmetric);
}

// Of rows row0 .. rows of such a tile, the vectors in which an anchor of [begin, end) may want a pair, as
// squared_distances() has them: bit v of near[row] for columns v W and on. The others are left as they are.
template <class S>
void screened_distances(const Call<S>& c, int64_t r0, int row0, int rows, int64_t c0, int cols, bool both, int64_t begin,
                        int64_t end, typename S::T* tile, uint64_t* near) {
  using T = typename S::T;
  const auto& w = c.w;
  constexpr int kT = Call<S>::kT;
  T row_ceiling[kT], column_ceiling[kT];
  for (int i = row0; i < rows; ++i) row_ceiling[i] = ceiling(c, r0 + i, begin, end);
  for (int j = 0; j < cols; ++j)
    column_ceiling[j] = both ? ceiling(c, c0 + j, begin, end) : -std::numeric_limits<T>::infinity();
  Units<S> units{c, r0, c0, tile, 0, {}, {}};
  static_assert(kT / S::W <= 64, "a bit for each vector");
  fill(near, rows, uint64_t{0});
  constexpr bool kInPlace = S::NR % S::MR == 0;  // a register block's rows stand in one panel
  const int8_t* const aside = kInPlace ? nullptr : side_by_side(c, r0);
  for (int col = 0; col < cols; col += S::NR)
    for (int r = row0; r < rows; r += S::MR) {
      const int8_t* const a = kInPlace ? coarse_row(c, w.acoarse, r0 + r) : aside + r * c.Dp;
      uint32_t wanted = S::screen(a, coarse_row(c, w.coarse, c0 + col), c.Dp / 4, w.acoarse.step + r0 + r,
                                  w.acoarse.level + r0 + r, w.acoarse.reach + r0 + r, row_ceiling + r,
                                  w.coarse.step + c0 + col, w.coarse.level + c0 + col, w.coarse.reach + c0 + col,
                                  column_ceiling + col);
      if (wanted == 0) continue;
      constexpr int NV = S::NR / S::W;
      const bool most = __builtin_popcount(wanted) > S::MR * NV / 4;
      if (most) {
        wanted = ~uint32_t{0};
        squared_distances<S>(w.ax + (r0 + r) * c.Dp, c.Dp, w.anorm + r0 + r, w.panels, c.panel_size, c0 + col, w.norm, c.D,
                             S::MR, S::NR, false, tile + r * kT + col, kT);
      }
      for (int i = 0; i < S::MR; ++i) {
        const uint32_t here = wanted >> (i * NV) & ((1u << NV) - 1);
        near[r + i] |= uint64_t{here} << col / S::W;
        for (int v = 0; v < NV && !most; ++v)
          if (here >> v & 1) units.push(r + i, col + v * S::W);
      }
    }
  units.flush();
}

}  // namespace
}  // namespace facenet_ext::cpu
