// Every name of one trait struct (csrc/cpu/simd_*.h) against a plain loop. Compiled once for each:
// -DUNIT_HEADER="cpu/simd_avx2.h" -DUNIT_STRUCT=Avx2, with the flags of its kernels. Exits with 1 on a failure.
#include UNIT_HEADER

#include "cpu/share.h"
#include "cpu/sieve.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

namespace facenet_ext::cpu {
namespace {

using S = UNIT_STRUCT;
using T = S::T;
using V = S::V;
constexpr int W = S::W;
constexpr T kInf = std::numeric_limits<T>::infinity(), kNan = std::numeric_limits<T>::quiet_NaN();
int failures = 0;

void check(bool ok, const char* what) {
  if (!ok && ++failures <= 20) std::printf("FAILED %s\n", what);
}
bool same(T a, T b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

uint64_t state = 1;
uint64_t draw() {
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
T uniform() { return static_cast<T>(draw() >> 40) / T(1 << 24); }
// Distances, and now and then what else may stand in a register.
T value() {
  const T special[] = {T(0), -T(0), kInf, -kInf, kNan, std::numeric_limits<T>::max(), std::numeric_limits<T>::min(), T(-1)};
  return draw() % 4 == 0 ? special[draw() % 8] : uniform() * 4;
}
struct Lanes {
  T at[W];
  V v() const { return S::load(at); }
};
Lanes any() {
  Lanes l;
  for (T& e : l.at) e = value();
  return l;
}
Lanes of(V v) {
  Lanes l;
  S::store(l.at, v);
  return l;
}

void arithmetic() {
  const Lanes a = any(), b = any(), c = any();
  const Lanes fused = of(S::madd(a.v(), b.v(), c.v())), most = of(S::max0(a.v())), less = of(S::smaller(a.v(), b.v()));
  const Lanes more = of(S::larger(a.v(), b.v()));
  const Lanes root = of(S::sqrt(S::max0(a.v()))), one = of(S::set1(a.at[0])), none = of(S::zero());
  for (int i = 0; i < W; ++i) {
    check(same(fused.at[i], S::madd1(a.at[i], b.at[i], c.at[i])), "madd is not madd1 in every lane");
    check(same(most.at[i], a.at[i] < 0 ? T(0) : a.at[i]), "max0: NaN stays");
    check(same(less.at[i], a.at[i] < b.at[i] ? a.at[i] : b.at[i]), "smaller: the second operand where the first is NaN");
    check(same(more.at[i], a.at[i] > b.at[i] ? a.at[i] : b.at[i]), "larger: the second operand where the first is NaN");
    check(same(root.at[i], std::sqrt(most.at[i])), "sqrt");
    // By value: set1(-0) may be +0, which no product or comparison tells apart.
    check((one.at[i] == a.at[0] || same(one.at[i], a.at[0])) && same(none.at[i], T(0)), "set1, zero");
  }
  Lanes whole;  // small integers: exact in any order
  T total = 0;
  for (T& e : whole.at) total += e = static_cast<T>(draw() % 1000);
  check(S::sum(whole.v()) == total, "sum");
  V four[4] = {a.v(), b.v(), whole.v(), c.v()};
  T sums[4];
  S::sums(four, sums);
  for (int m = 0; m < 4; ++m) check(same(sums[m], S::sum(four[m])), "sums: not sum to the bit");
}

void counting() {
  std::vector<T> t(static_cast<size_t>(1 + draw() % 8) * W);
  for (T& e : t) e = uniform() * 4;
  if (draw() % 2) std::fill(t.begin() + static_cast<int64_t>(draw() % t.size()), t.end(), kInf);
  for (const T v : {value(), t[draw() % t.size()]}) {
    int count = 0;
    for (const T e : t) count += e < v;
    check(S::count_below(t.data(), static_cast<int>(t.size()), v) == count, "count_below");
  }
}

void sorted_places() {
  const int n = static_cast<int>(1 + draw() % 100), padded = static_cast<int>(round_up(n, kSlotPad));
  std::vector<T> t(static_cast<size_t>(padded), kInf);
  for (int i = 0; i < n; ++i)
    t[static_cast<size_t>(i)] = i > 0 && draw() % 4 == 0 ? t[draw() % static_cast<size_t>(i)] : uniform();
  std::vector<T> sorted(static_cast<size_t>(n));
  std::vector<uint32_t> rank(static_cast<size_t>(n));
  S::sorted_places(t.data(), n, sorted.data(), rank.data());
  std::vector<uint32_t> order(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) order[static_cast<size_t>(i)] = static_cast<uint32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return t[a] < t[b]; });
  check(rank == order, "sorted_places: rank");
  for (int r = 0; r < n; ++r) check(sorted[static_cast<size_t>(r)] == t[order[static_cast<size_t>(r)]], "sorted_places");
}

// Lists of every length that one table of steps holds, and longer ones; ties, and values that are thresholds.
void ranks() {
  const int K = static_cast<int>(draw() % (draw() % 8 ? 70 : 1500));
  std::vector<T> t(static_cast<size_t>(slot_pitch(K)), kInf);
  for (int i = 0; i < K; ++i) t[static_cast<size_t>(i)] = static_cast<T>(draw() % 64) / 16;
  std::sort(t.begin(), t.begin() + K);
  const int n = static_cast<int>(1 + draw() % 4) * W;
  const T shift = draw() % 2 ? T(0.25) : T(0);
  std::vector<T> d(static_cast<size_t>(n));
  for (T& e : d) e = draw() % 9 == 0 ? std::numeric_limits<T>::max() / 4 : static_cast<T>(draw() % 80) / 16;
  std::vector<int32_t> below(d.size(), -1), until(d.size(), -1);
  S::template ranks<false>(t.data(), K, shift, d.data(), n, below.data());
  S::template ranks<true>(t.data(), K, shift, d.data(), n, until.data());
  for (size_t j = 0; j < d.size(); ++j) {
    check(below[j] == std::lower_bound(t.begin(), t.begin() + K, d[j] - shift) - t.begin(), "ranks: how many are below");
    check(until[j] == std::upper_bound(t.begin(), t.begin() + K, d[j] - shift) - t.begin(), "ranks: how many are no greater");
  }
}

template <class S>  // S again: a struct whose buckets stay in order has no search
void search() {
  if constexpr (S::kStrided) {
    const int K = static_cast<int>(1 + draw() % (draw() % 3 ? 100 : kMaxStrided - 1)), L = S::lanes(K), R = K / L + 1;
    const int n = static_cast<int>(1 + draw() % (kTile<T> / W)) * W;
    const auto size = static_cast<size_t>(R * L);
    std::vector<T> sorted(static_cast<size_t>(K)), t(size, kInf), upper(size), d(static_cast<size_t>(n));
    std::vector<uint64_t> key(size);
    for (T& e : sorted) e = draw() % 5 ? uniform() : T(0.5);
    std::sort(sorted.begin(), sorted.end());
    for (int r = 0; r < K; ++r) t[static_cast<size_t>(r % R * L + r / R)] = sorted[static_cast<size_t>(r)];
    for (T& e : upper) e = draw() % 4 ? uniform() * 2 - T(0.5) : std::numeric_limits<T>::max();
    for (size_t i = 0; i < size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &upper[i], sizeof bits);
      key[i] = uint64_t{bits} << 32 | static_cast<uint32_t>(draw());
    }
    for (T& e : d) e = draw() % 8 == 0 ? value() : draw() % 8 == 0 ? sorted[draw() % sorted.size()] : uniform() * T(1.2);
    const T ceiling = draw() % 2 ? std::numeric_limits<T>::max() : uniform() * T(0.2);
    const auto tag = static_cast<uint32_t>(draw() % 64) << 26;
    std::vector<uint32_t> queue(static_cast<size_t>(n) + W, 0xABCDEFu);  // whole vectors are stored, up to W beyond the last
    const int found = S::search(t.data(), key.data(), K, ceiling, d.data(), n, tag, queue.data());
    check(found >= 0 && found <= n, "search: count");
    int at = 0;
    for (int j = 0; j < n; ++j) {
      const T v = d[static_cast<size_t>(j)];
      const int b = static_cast<int>(std::lower_bound(sorted.begin(), sorted.end(), v) - sorted.begin());
      const uint32_t place = v == v ? static_cast<uint32_t>(b % R * L + b / R) : 0;
      const bool wanted = v == v && v <= upper[place];
      const bool handed = at < found && (queue[static_cast<size_t>(at)] & 0xffff) == static_cast<uint32_t>(j);
      // What lies beyond the ceiling need not be handed on, but may be.
      check(handed == wanted || (wanted && v > ceiling), "search: not what the bucket wants");
      if (handed) check(queue[static_cast<size_t>(at++)] == (tag | place << 16 | static_cast<uint32_t>(j)), "search: place");
    }
    check(at == found, "search: a column twice, or out of order");
  }
}

// What is sifted and then searched is what a search finds, in the same order; what is out of reach does not get through.
template <class S>
void sieve() {
  if constexpr (S::kSieves) {
    const int K = static_cast<int>(1 + draw() % (draw() % 3 ? 100 : kMaxStrided - 1)), L = S::lanes(K), R = K / L + 1;
    const int n = static_cast<int>(1 + draw() % (kTile<T> / W)) * W;
    const T unit = std::ldexp(T(1), static_cast<int>(draw() % 60) - 30);
    const T base = draw() % 2 ? unit : T(0), width = draw() % 3 ? unit : unit * T(1e-6);  // far from 0, and hardly any
    const auto distance = [&] { return base + uniform() * width; };
    std::vector<T> sorted(static_cast<size_t>(K)), d(static_cast<size_t>(n)), upper(static_cast<size_t>(K) + 1);
    for (T& e : sorted) e = draw() % 5 ? distance() : base + width / 2;
    std::sort(sorted.begin(), sorted.end());
    if (draw() % 8 == 0) sorted.back() = unit * 1000;
    const int seen = 1 << draw() % 10;  // negatives a bucket has seen, if any
    Row<T> row{};
    row.positives = static_cast<uint32_t>(K);
    row.farthest_positive = sorted.back();
    for (int b = 1; b <= K; ++b) {
      const T from = sorted[static_cast<size_t>(b) - 1], to = b < K ? sorted[static_cast<size_t>(b)] : from + width / 8;
      upper[static_cast<size_t>(b)] =
          draw() % 4 ? from + (to - from) * uniform() / static_cast<T>(seen) : std::numeric_limits<T>::max();
    }
    upper[0] = -1;
    row.top_empty = upper.back() == std::numeric_limits<T>::max();
    row.ceiling = std::max(row.farthest_positive, upper.back());
    std::vector<T> t(static_cast<size_t>(R * L), kInf);
    std::vector<uint64_t> key(t.size());
    for (int b = 0; b < R * L; ++b) {
      const auto place = static_cast<size_t>(b % R * L + b / R);
      const T end = b <= K ? upper[static_cast<size_t>(b)] : std::numeric_limits<T>::max();
      uint32_t bits;
      std::memcpy(&bits, &end, sizeof bits);
      key[place] = uint64_t{bits} << 32 | static_cast<uint32_t>(draw());
      if (b < K) t[place] = sorted[static_cast<size_t>(b)];
    }
    for (T& e : d) {
      const auto b = draw() % static_cast<size_t>(K);
      e = draw() % 4 == 0 ? (draw() % 2 ? sorted[b] : std::max(upper[b], T(0))) : distance();
      if (draw() % 8 == 0) e = draw() % 2 ? std::fabs(value()) : base + width * 4;
    }
    Sieve s;
    start_sieve(s);
    make_sieve<S>(s, row, t.data(), key.data(), R, L);
    check(s.cells == sieve_cells(K), "sieve: not made");
    std::vector<uint8_t> column(static_cast<size_t>(n) + W);
    const int through = S::sift(s, d.data(), n, column.data());
    check(through >= 0 && through <= n, "sieve: count");
    std::vector<T> picked(static_cast<size_t>(n) + W, kNan);
    for (int i = 0; i < through; ++i) {
      const size_t at = column[static_cast<size_t>(i)];
      picked[static_cast<size_t>(i)] = d[at];
      check(i == 0 || at > column[static_cast<size_t>(i) - 1], "sieve: order");
      check(!(d[at] > row.ceiling + (row.ceiling - sorted[0]) / 16) || row.top_empty || width < unit,
            "sieve: beyond the ceiling");
    }
    const auto tag = static_cast<uint32_t>(draw() % 64) << 26;
    std::vector<uint32_t> all(static_cast<size_t>(n) + W), sifted(static_cast<size_t>(n) + W);
    const int want = S::search(t.data(), key.data(), K, kInf, d.data(), n, tag, all.data());
    const int got = S::search_sifted(t.data(), key.data(), K, picked.data(), column.data(), through, tag, sifted.data());
    check(got == want && std::equal(all.begin(), all.begin() + want, sifted.begin()), "sieve: not what a search finds");
  }
}

void transpose() {
  const int rows = static_cast<int>(1 + draw() % (kTile<T> / W)) * W;
  const int64_t stride = W + static_cast<int64_t>(draw() % 40);
  std::vector<T> tile(static_cast<size_t>((rows - 1) * stride + W)), out(static_cast<size_t>(rows * W), T(-1));
  for (size_t i = 0; i < tile.size(); ++i) tile[i] = static_cast<T>(i);
  S::transpose(tile.data(), stride, rows, out.data());
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < W; ++c)
      check(out[static_cast<size_t>(c * rows + r)] == tile[static_cast<size_t>(r * stride + c)], "transpose");
}

void count_covers() {
  if (S::kCountable == 0) return;
  const int K = static_cast<int>(1 + draw() % static_cast<uint64_t>(S::kCountable));
  const int n = static_cast<int>(1 + draw() % (kTile<T> / W)) * W;
  std::vector<int32_t> from(static_cast<size_t>(n)), to(from.size());
  for (size_t j = 0; j < from.size(); ++j) {
    from[j] = static_cast<int32_t>(draw() % static_cast<uint64_t>(K + 1));
    to[j] = draw() % 3 ? static_cast<int32_t>(draw() % static_cast<uint64_t>(K + 1)) : K;
  }
  std::vector<uint32_t> count(static_cast<size_t>(K) + 1, 7);
  const bool open = draw() % 3 == 0;
  S::count_covers(from.data(), open ? nullptr : to.data(), n, K, count.data());
  for (int r = 0; r < K; ++r) {
    uint32_t want = 7;
    for (size_t j = 0; j < from.size(); ++j) want += from[j] <= r && (open || r < to[j]);
    check(count[static_cast<size_t>(r)] == want, "count_covers");
  }
  check(count[static_cast<size_t>(K)] == 7, "count_covers: beyond K");
}

void weigh_bytes() {
  if (!S::multiplies_bytes()) return;
  constexpr int MR = S::MR;
  const int64_t quads = 1 + static_cast<int64_t>(draw() % 48), digit_step = 192 * (1 + static_cast<int64_t>(draw() % 3));
  const bool by_rows = draw() % 2;
  const int64_t row_step = by_rows ? 4 * quads : 4, quad_step = by_rows ? 4 : 4 * MR;
  std::vector<uint8_t> u(static_cast<size_t>(4 * quads * MR));
  std::vector<int8_t> digits(static_cast<size_t>(quads * digit_step));
  for (uint8_t& e : u) e = static_cast<uint8_t>(draw());
  for (int8_t& e : digits) e = static_cast<int8_t>(draw());
  T out[MR * W];
  S::weigh_bytes(u.data(), row_step, quad_step, quads, digits.data(), digit_step, T(1) / 1024, out);
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < W; ++j) {
      int64_t want = 0, size = 0;
      for (int64_t k = 0; k < quads; ++k)
        for (int row = 0; row < 4; ++row) {
          const int8_t* x = digits.data() + k * digit_step + 4 * j + row;
          const int64_t product =
              u[static_cast<size_t>(i * row_step + k * quad_step + row)] * (x[0] + 256 * x[64] + 65536 * x[128]);
          want += product;
          size += product < 0 ? -product : product;
        }
      const double error = std::fabs(static_cast<double>(out[i * W + j]) * 1024 - static_cast<double>(want));
      check(error <= 2e-7 * static_cast<double>(size), "weigh_bytes");
    }
}

// Bytes that a row may consist of: any up to the largest, and with AVX2 at most 258 in 8 of 16 dimensions, lane by lane.
void limit(int8_t* row, int64_t quads, int64_t stride) {
  if (S::kUp != 64) return;
  for (int64_t k = 0; k < quads; k += 4)
    for (int lane = 0; lane < 4; lane += 2) {
      int total = 0;
      for (int64_t q = k; q < k + 4; ++q)
        for (int side = lane; side < lane + 2; ++side) {
          int8_t& e = row[q * stride + side];
          const int room = 258 - total, size = std::abs(e) < room ? std::abs(e) : room;
          e = static_cast<int8_t>(e < 0 ? -size : size);
          total += size;
        }
    }
}

// A vector is handed on where one of its pairs may be wanted: the least a pair can be apart is not above both ceilings.
void screen() {
  if (!S::screens()) return;
  constexpr int MR = S::MR, NR = S::NR, kMost = S::kCoarse;
  constexpr bool kInPlace = NR % MR == 0;  // in their panel, or side by side and moved up
  constexpr int kRows = kInPlace ? NR : MR;
  const int64_t quads = 4 * (1 + static_cast<int64_t>(draw() % 9));
  std::vector<int8_t> a(static_cast<size_t>(quads * kRows * 4)), b(static_cast<size_t>(quads * NR * 4)), up;
  const int least = draw() % 4 == 0 ? kMost : -kMost;  // all as large as they get: sums at the edge
  for (auto* numbers : {&a, &b})
    for (int8_t& e : *numbers)
      e = static_cast<int8_t>(least + static_cast<int>(draw() % static_cast<unsigned>(kMost - least + 1)));
  if (draw() % 4 == 0)
    for (int8_t& e : b) e = static_cast<int8_t>(-e);
  for (int j = 0; j < NR; ++j) limit(b.data() + 4 * j, quads, 4 * NR);
  up = a;
  if (!kInPlace)
    for (int8_t& e : up) e = static_cast<int8_t>(e + S::kUp);
  T row_step[MR], row_reach[MR], row_ceiling[MR], step[NR], reach[NR], ceiling[NR];
  int32_t row_level[MR], level[NR];
  const auto element = [](const std::vector<int8_t>& of, int64_t k, int rows, int row, int side) {
    return static_cast<int64_t>(of[static_cast<size_t>((k * rows + row) * 4 + side)]);
  };
  const auto sum = [&](const std::vector<int8_t>& of, int rows, int row) {
    int64_t total = 0;
    for (int64_t k = 0; k < quads; ++k)
      for (int side = 0; side < 4; ++side) total += element(of, k, rows, row, side);
    return static_cast<int32_t>(total);
  };
  for (int i = 0; i < MR; ++i) {
    row_step[i] = T(1) / 64;
    row_reach[i] = static_cast<T>(draw() % 16);
    row_ceiling[i] = draw() % 3 == 0 ? -kInf : static_cast<T>(draw() % 64) - 40;
    row_level[i] = -S::kUp * sum(a, kRows, i);
  }
  for (int j = 0; j < NR; ++j) {
    step[j] = T(1) / 128;
    reach[j] = draw() % 32 == 0 ? kNan : static_cast<T>(draw() % 16);
    ceiling[j] = draw() % 3 == 0 ? -kInf : static_cast<T>(draw() % 64) - 40;
    level[j] = -S::kUp * sum(b, NR, j);
  }
  const uint32_t near =
      S::screen(up.data(), b.data(), quads, row_step, row_level, row_reach, row_ceiling, step, level, reach, ceiling);
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NR / W; ++v) {
      bool wanted = false;
      for (int j = v * W; j < v * W + W; ++j) {
        int64_t product = 0;
        for (int64_t k = 0; k < quads; ++k)
          for (int side = 0; side < 4; ++side) product += element(a, k, kRows, i, side) * element(b, k, NR, j, side);
        // Exact in T: whole numbers below 2^24 over a power of two.
        const T apart = reach[j] - 2 * row_step[i] * step[j] * static_cast<T>(product);
        wanted |= !(apart > row_ceiling[i] - row_reach[i]) || !(apart - ceiling[j] > -row_reach[i]);
      }
      check((near >> (i * (NR / W) + v) & 1) == wanted, "screen");
    }
}

// With the step that is chosen for a row, its whole numbers are such as screen() can add up.
void coarse_step() {
  if (!S::screens()) return;
  constexpr int64_t kDims = 64;
  T x[kDims];
  const T size = static_cast<T>(std::ldexp(1.0, static_cast<int>(draw() % 60) - 30));
  const unsigned kind = draw() % 4;  // anything, all alike, all nearly alike, one in 8 other than 0
  for (T& e : x)
    e = size * (kind == 0    ? uniform() - T(0.5)
                : kind == 1  ? T(1)
                : kind == 2  ? 1 - uniform() / 64
                : draw() % 8 ? T(0)
                             : T(1));
  const T step = S::coarse_step(x, kDims);
  int8_t row[kDims], allowed[kDims];
  for (int64_t k = 0; k < kDims; ++k) {
    const T whole = std::nearbyint(x[k] * (step > 0 ? 1 / step : 0));
    check(std::fabs(whole) <= S::kCoarse, "coarse_step: a number too large");
    row[k] = allowed[k] = static_cast<int8_t>(whole);
  }
  limit(allowed, kDims / 4, 4);
  check(std::memcmp(row, allowed, sizeof row) == 0, "coarse_step: a crowd too large");
  T most = 0;
  for (const T e : x) most = std::fabs(e) > most ? std::fabs(e) : most;
  check(step * 20 <= most, "coarse_step: coarser than it has to be");
}

// Every pair of blocks meets once, at whichever thread.
void tournament() {
  const Tournament all{static_cast<int64_t>(draw() % 40), static_cast<int>(1 + draw() % 9)};
  const auto blocks = static_cast<size_t>(all.blocks);
  std::vector<int> met(blocks * blocks);
  for (int t = 0; t < all.threads; ++t)
    for (int64_t i = 0; i < all.count(t); ++i) {
      const auto [I, J] = all.meeting(t, i);
      const bool pair = I >= 0 && I <= J && J < all.blocks;
      check(pair, "tournament: no pair of blocks");
      if (pair) ++met[static_cast<size_t>(I) * blocks + static_cast<size_t>(J)];
    }
  for (size_t I = 0; I < blocks; ++I)
    for (size_t J = I; J < blocks; ++J) check(met[I * blocks + J] == 1, "tournament: a pair left out, or twice");
}

}  // namespace
}  // namespace facenet_ext::cpu

int main() {
  using namespace facenet_ext::cpu;
  for (int i = 0; i < 3000; ++i) {
    arithmetic();
    counting();
    sorted_places();
    ranks();
    search<S>();
    sieve<S>();
    transpose();
    if (i % 10 == 0) screen();
    coarse_step();
    if (i % 10 == 0) weigh_bytes();
    if (i % 10 == 0) count_covers();
    if (i % 10 == 0) tournament();
  }
  std::printf("3000 rounds of %d lanes of %zu bytes, %d failures\n", W, sizeof(T), failures);
  return failures ? 1 : 0;
}
