// Vectors by the compiler's own vector types: float on machines without AVX2, double everywhere. The same names as in
// simd_avx2.h and simd_avx512.h: all that is included by engine.h is written against these names alone.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace facenet_ext::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kGenericBytes = 64;
#elif defined(__AVX2__)
constexpr int kGenericBytes = 32;
#else
constexpr int kGenericBytes = 16;
#endif

template <class E>
struct Generic {
  using T = E;
  static constexpr int W = kGenericBytes / sizeof(T);
  typedef T V __attribute__((vector_size(kGenericBytes)));
  // The register block: MR anchors by NR candidates, NR / W vectors wide. 4 x 2 vectors fit 16 registers, 8 x 3 fit 32.
#if defined(__AVX512F__)
  static constexpr int MR = 8, NR = 3 * W;
#else
  static constexpr int MR = 4, NR = 2 * W;
#endif
  static bool multiplies_bytes() { return false; }  // no fast products of bytes
  static void weigh_bytes(const uint8_t*, int64_t, int64_t, int64_t, const int8_t*, int64_t, T, T*) {}
  static constexpr int kCoarse = 127, kUp = 128;
  static bool screens() { return false; }  // no fast products of whole numbers (screen.h)
  static T coarse_step(const T*, int64_t) { return 0; }
  static uint32_t screen(...) { return ~uint32_t{0}; }
  static constexpr bool kSieves = false;  // a sieve says what is worth a search (sieve.h)
  static constexpr bool kStrided = false;  // no permutation by variable: buckets stay in order and are searched one by one
  static constexpr int lanes(int) { return W; }

  static V zero() { return V{}; }
  static V set1(T v) { return V{} + v; }
  static V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
  // Fused where the machine fuses. Every dot product and every norm goes through this one function, so that a row's product
  // with itself and its norm agree to the bit and identical rows are at distance exactly 0.
  static V madd(V a, V b, V c) {
#if defined(__AVX512F__)
    static_assert(sizeof(T) == 8, "float has its own file");
    return reinterpret_cast<V>(
        _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__AVX2__)
    static_assert(sizeof(T) == 8, "float has its own file");
    return reinterpret_cast<V>(
        _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#else
    return a * b + c;
#endif
  }
  static T madd1(T a, T b, T c) {
#if defined(__FMA__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  static V max0(V v) { return v < V{} ? V{} : v; }  // NaN stays
  static T sum(V v) {
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
  }

  static void sums(const V (&v)[4], T* out) {
    for (int m = 0; m < 4; ++m) out[m] = sum(v[m]);
  }
  static V sqrt(V v) {
    for (int i = 0; i < W; ++i) v[i] = std::sqrt(v[i]);
    return v;
  }
  static V smaller(V a, V b) { return a < b ? a : b; }  // b where a is NaN
  static V larger(V a, V b) { return a > b ? a : b; }  // b where a is NaN
  // #{ i < n : t[i] < v }, t padded with +inf to a multiple of kSlotPad.
  static int count_below(const T* t, int n, T v) {
    int below = 0;
    for (int i = 0; i < n; ++i) below += t[i] < v;
    return below;
  }

  // sorted = t[0 .. n) in ascending order, rank = where each stood; equal ones in order of place. t is padded with +inf.
  static void sorted_places(const T* t, int n, T* sorted, uint32_t* rank) {
    for (int i = 0; i < n; ++i) {
      int at = 0;
      for (int j = 0; j < i; ++j) at += t[j] <= t[i];
      for (int j = i; j < n; ++j) at += t[j] < t[i];
      sorted[at] = t[i];
      rank[at] = static_cast<uint32_t>(i);
    }
  }

  // rank[j] = #{ i < K : t[i] < d[j] - shift }, kClosed: <=. t ascends and is +inf at K; n is a multiple of W; no NaN. O(n
  // log K)
  template <bool kClosed>
  static void ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    int half = 1;
    while (2 * half <= K) half *= 2;
    for (int j = 0; j < n; ++j) {
      const T v = d[j] - shift;
      int at = 0;
      for (int by = half; by > 0; by /= 2) {
        const int probe = at + by - 1 < K ? at + by - 1 : K;
        at += (kClosed ? t[probe] <= v : t[probe] < v) ? by : 0;
      }
      rank[j] = at;
    }
  }

  static constexpr int kCountable = 0;  // up to so many ranks count_covers() is worth it
  // count[r] += #{ j < n : from[j] <= r < to[j] } for r < K <= kCountable; n is a multiple of W, at most a tile's. Without
  // `to` every range ends at K.
  static void count_covers(const int32_t* from, const int32_t* to, int n, int K, uint32_t* count) {
    for (int j = 0; j < n; ++j)
      for (int r = from[j]; r < K && (!to || r < to[j]); ++r) ++count[r];
  }

  // out[c * rows + r] = tile[r * stride + c] for W columns; rows is a multiple of W.
  static void transpose(const T* tile, int64_t stride, int rows, T* out) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < W; ++c) out[c * rows + r] = tile[r * stride + c];
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
