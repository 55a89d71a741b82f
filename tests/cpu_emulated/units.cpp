// Every name of one trait struct (csrc/cpu/simd_*.h) against a plain loop. Compiled once for each: -DUNIT_HEADER="cpu/simd_avx2.h"
// -DUNIT_STRUCT=Avx2, with the flags of its kernels. Exits with 1 on a failure.
#include UNIT_HEADER

#include <algorithm>
#include <cstdio>
#include <limits>
#include <vector>

namespace facenet_ext::cpu {
namespace {

using S = UNIT_STRUCT;
using T = S::T;
using V = S::V;
using Key = KeyOf<T>::Key;
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
  const Lanes root = of(S::sqrt(S::max0(a.v()))), one = of(S::set1(a.at[0])), none = of(S::zero());
  for (int i = 0; i < W; ++i) {
    check(same(fused.at[i], S::madd1(a.at[i], b.at[i], c.at[i])), "madd is not madd1 in every lane");
    check(same(most.at[i], a.at[i] < 0 ? T(0) : a.at[i]), "max0: NaN stays");
    check(same(less.at[i], a.at[i] < b.at[i] ? a.at[i] : b.at[i]), "smaller: the second operand where the first is NaN");
    check(same(root.at[i], std::sqrt(most.at[i])), "sqrt");
    // By value: set1(-0) may be +0, which no product or comparison tells apart.
    check((one.at[i] == a.at[0] || same(one.at[i], a.at[0])) && same(none.at[i], T(0)), "set1, zero");
  }
  Lanes whole;  // small integers: exact in any order
  T total = 0;
  for (T& e : whole.at) total += e = static_cast<T>(draw() % 1000);
  check(S::sum(whole.v()) == total, "sum");
}

void keys() {
  Key key[W];
  T d[W];
  for (int i = 0; i < W; ++i) {
    d[i] = uniform();
    KeyOf<T>::Bits bits;
    std::memcpy(&bits, &d[i], sizeof bits);
    const bool empty = draw() % 5 == 0;
    if (empty) d[i] = kNan;
    key[i] = empty ? ~Key{0} : static_cast<Key>(bits) << 32 | static_cast<uint32_t>(draw());
  }
  const Lanes values = of(S::key_values(key));
  for (int i = 0; i < W; ++i) check(same(values.at[i], d[i]), "key_values");
}

template <class S, int N>  // S again: a struct that keeps no thresholds in registers has no below
void below(const std::vector<T>& t, T v) {
  if constexpr (N > 0) {
    if (static_cast<int>(t.size()) == N * W) {
      V held[N];
      for (int i = 0; i < N; ++i) held[i] = S::load(t.data() + i * W);
      int count = 0;
      for (const T e : t) count += e < v;
      check(S::template below<N>(held, v) == count, "below");
    }
    below<S, N - 1>(t, v);
  }
}

void counting() {
  std::vector<T> t(static_cast<size_t>(1 + draw() % 8) * W);
  for (T& e : t) e = uniform() * 4;
  if (draw() % 2) std::fill(t.begin() + static_cast<int64_t>(draw() % t.size()), t.end(), kInf);
  for (const T v : {value(), t[draw() % t.size()]}) {
    int count = 0;
    for (const T e : t) count += e < v;
    check(S::count_below(t.data(), static_cast<int>(t.size()), v) == count, "count_below");
    below<S, S::kMaxHeld>(t, v);
  }
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

int plain_cell(T d, T scale, T bias, int cells) {
  const T c = S::madd1(d, scale, bias);
  return c > 1 ? static_cast<int>(std::min(c, static_cast<T>(cells - 1))) : 1;
}

void filter() {
  uint32_t count = S::kMinWords << draw() % 4;
  count = std::min<uint32_t>(count, kMaxWords);
  if (draw() % 8 == 0) count = kMaxWords;
  const int cells = static_cast<int>(count) * 32;
  std::vector<uint32_t> words(count);
  for (uint32_t& w : words) w = static_cast<uint32_t>(draw() & draw());
  words[0] &= ~1u;  // cell 0 is NaN's: never set
  const T scale = draw() % 9 ? static_cast<T>(cells - 4) * (uniform() + T(0.1)) : 0, bias = scale > 0 ? uniform() * 4 - 2 : 1;
  const int n = static_cast<int>(1 + draw() % (kTile<T> / W)) * W;
  std::vector<T> d(static_cast<size_t>(n));
  for (T& e : d) e = draw() % 10 == 0 ? value() : uniform() * T(1.2);
  std::vector<uint32_t> queue(static_cast<size_t>(n) + W, 0xABCDEFu);  // whole vectors are stored, up to W beyond the last
  const int passed = S::filter(words.data(), count, scale, bias, d.data(), n, queue.data());
  check(passed >= 0 && passed <= n, "filter: count");
  check(std::is_sorted(queue.begin(), queue.begin() + passed), "filter: order");
  int at = 0;
  for (int j = 0; j < n; ++j) {
    const bool handed = at < passed && queue[static_cast<size_t>(at)] == static_cast<uint32_t>(j);
    at += handed;
    const int cell = plain_cell(d[static_cast<size_t>(j)], scale, bias, cells);
    const bool set = words[static_cast<size_t>(cell >> 5)] >> (cell & 31) & 1;
    if (d[static_cast<size_t>(j)] != d[static_cast<size_t>(j)]) check(!handed, "filter: NaN passed");
    else if (S::madd1(d[static_cast<size_t>(j)], scale, bias) >= 1) check(handed == set, "filter: not the bit of the cell");
    // Below cell 1 lie no bands: passing is harmless and staying away too.
  }
  check(at == passed, "filter: a column twice, or none");
}

void bands() {
  const int cells = static_cast<int>(S::kMinWords << draw() % 4) * 32;
  const T scale = static_cast<T>(cells - 4), bias = 2;
  Lanes lower, upper;
  for (int i = 0; i < W; ++i) {
    lower.at[i] = uniform();
    upper.at[i] = draw() % 6 ? lower.at[i] + uniform() * T(0.1) : std::numeric_limits<T>::max();
  }
  int32_t from[W], to[W];
  uint32_t mask[W];
  S::band_masks(lower.v(), upper.v(), S::set1(scale), S::set1(bias), cells, from, to, mask);
  for (int i = 0; i < W; ++i) {
    const int a = plain_cell(lower.at[i], scale, bias, cells), b = plain_cell(upper.at[i], scale, bias, cells);
    check(S::cell(lower.at[i], scale, bias, cells) == a && S::cell(upper.at[i], scale, bias, cells) == b, "cell");
    check(from[i] == a && to[i] == b, "band_masks: cells");
    if (a >> 5 != b >> 5) continue;
    uint32_t bits = 0;
    for (int c = a; c <= b; ++c) bits |= 1u << (c & 31);
    check(mask[i] == bits, "band_masks: bits");
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

}  // namespace
}  // namespace facenet_ext::cpu

int main() {
  using namespace facenet_ext::cpu;
  for (int i = 0; i < 3000; ++i) {
    arithmetic();
    keys();
    counting();
    ranks();
    filter();
    bands();
    transpose();
  }
  std::printf("3000 rounds of %d lanes of %zu bytes, %d failures\n", W, sizeof(T), failures);
  return failures ? 1 : 0;
}
