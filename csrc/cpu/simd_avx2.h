// float32 in AVX2 and FMA. See simd_generic.h for what each name promises.
#pragma once

#include <immintrin.h>

#include <limits>

#include "simd_generic.h"

namespace facenet_ext::cpu {
namespace {

// For every 8-bit mask, the numbers of its set bits as bytes, lowest first: AVX2 has no compress.
struct CompressTable {
  uint64_t lanes[256];
  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      uint64_t packed = 0;
      int place = 0;
      for (int bit = 0; bit < 8; ++bit)
        if (mask >> bit & 1) packed |= static_cast<uint64_t>(bit) << (8 * place++);
      lanes[mask] = packed;
    }
  }
};
constexpr CompressTable kCompress;

struct Avx2 {
  using T = float;
  using V = __m256;
  static constexpr int W = 8, MR = 6, NR = 16;  // 12 accumulators + 2 columns + 1 broadcast of 16 registers
  static constexpr uint32_t kMinWords = 8;      // one register of filter words
  static constexpr int kMaxHeld = 8;            // registers of thresholds that the drain keeps

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(T v) { return _mm256_set1_ps(v); }
  static V load(const T* p) { return _mm256_loadu_ps(p); }
  static void store(T* p, V v) { _mm256_storeu_ps(p, v); }
  static T madd1(T a, T b, T c) { return __builtin_fmaf(a, b, c); }
  static V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max0(V v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }  // maxps returns its second operand on NaN
  static T sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  // NaN falls through the comparison (second operand) and converts to INT_MIN, whose low bits are cell 0: never set.
  // Distances below all thresholds may get any cell, since no band is there: the drain sorts out what passes for nothing.
  static __m256i cells(V d, V scale, V bias, V last) {
    return _mm256_cvttps_epi32(_mm256_min_ps(last, _mm256_fmadd_ps(d, scale, bias)));
  }
  static int cell(T d, T scale, T bias, int cell_count) {
    const int c = _mm256_cvtsi256_si32(cells(set1(d), set1(scale), set1(bias), set1(static_cast<float>(cell_count - 1))));
    return c < 1 ? 1 : c;
  }
  static V sqrt(V v) { return _mm256_sqrt_ps(v); }
  static V smaller(V a, V b) { return _mm256_min_ps(a, b); }
  static V key_values(const uint64_t* key) {
    const V low = load(reinterpret_cast<const float*>(key)), high = load(reinterpret_cast<const float*>(key + 4));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xDD));  // keys 0 1 4 5 | 2 3 6 7
    return _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xD8));
  }
  static void band_masks(V lower, V upper, V scale, V bias, int cell_count, int32_t* from, int32_t* to, uint32_t* mask) {
    const V last = set1(static_cast<float>(cell_count - 1));
    const __m256i a = cells(lower, scale, bias, last), b = cells(upper, scale, bias, last), low5 = _mm256_set1_epi32(31);
    const __m256i bits = _mm256_sub_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(2), _mm256_and_si256(b, low5)),
                                          _mm256_sllv_epi32(_mm256_set1_epi32(1), _mm256_and_si256(a, low5)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(from), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), b);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), bits);
  }

  // The cell's bit moves to the sign by a variable shift; the sign bits are the mask. Up to 256 cells live in one register,
  // 512 in two (bit 8 of the cell picks), more are gathered.
  static int filter(const uint32_t* words, uint32_t word_count, T scale, T bias, const T* d, int n, uint32_t* queue) {
    const V s = set1(scale), b = set1(bias), last = set1(static_cast<float>(word_count * 32 - 1));
    const __m256i low5 = _mm256_set1_epi32(31);
    int count = 0;
    __m256i lanes_base = _mm256_setzero_si256();
    const __m256i step = _mm256_set1_epi32(W);
    const auto emit = [&](__m256i word, __m256i c) {
      const __m256i bit = _mm256_sllv_epi32(word, _mm256_andnot_si256(c, low5));
      const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(bit));
      const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kCompress.lanes[mask]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(queue + count),
                          _mm256_add_epi32(lanes_base, _mm256_cvtepu8_epi32(packed)));
      count += __builtin_popcount(static_cast<unsigned>(mask));
      lanes_base = _mm256_add_epi32(lanes_base, step);
    };
    if (word_count == 8) {
      const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
      for (int j = 0; j < n; j += W) {
        const __m256i c = cells(load(d + j), s, b, last);
        emit(_mm256_permutevar8x32_epi32(w0, _mm256_srli_epi32(c, 5)), c);
      }
    } else if (word_count == 16) {
      const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
      const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8));
      for (int j = 0; j < n; j += W) {
        const __m256i c = cells(load(d + j), s, b, last);
        const __m256i at = _mm256_srli_epi32(c, 5);
        const __m256 picked = _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_permutevar8x32_epi32(w0, at)),
                                               _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(w1, at)),
                                               _mm256_castsi256_ps(_mm256_slli_epi32(c, 23)));
        emit(_mm256_castps_si256(picked), c);
      }
    } else {
      const __m256i wrap = _mm256_set1_epi32(static_cast<int>(word_count - 1));
      for (int j = 0; j < n; j += W) {
        const __m256i c = cells(load(d + j), s, b, last);
        const __m256i at = _mm256_and_si256(_mm256_srli_epi32(c, 5), wrap);
        emit(_mm256_i32gather_epi32(reinterpret_cast<const int*>(words), at, 4), c);
      }
    }
    return count;
  }

  // #{ held < v }. Four comparisons become 32 mask bytes, so one movemask and one popcount serve them.
  template <int N>
  static int below(const V* held, T v) {
    const V value = set1(v);
    const auto less = [&](int i) { return _mm256_castps_si256(_mm256_cmp_ps(held[i], value, _CMP_LT_OQ)); };
    int count = 0;
    constexpr int kFours = N / 4 * 4;
#pragma GCC unroll 2
    for (int i = 0; i < kFours; i += 4) {
      const __m256i a = _mm256_packs_epi32(less(i), less(i + 1)), b = _mm256_packs_epi32(less(i + 2), less(i + 3));
      count += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_epi8(_mm256_packs_epi16(a, b))));
    }
    if constexpr (N % 4 == 3) {
      const __m256i a = _mm256_packs_epi32(less(kFours), less(kFours + 1));
      const __m256i b = _mm256_packs_epi32(less(kFours + 2), _mm256_setzero_si256());
      count += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_epi8(_mm256_packs_epi16(a, b))));
    } else if constexpr (N % 4 == 2) {
      const __m256i a = _mm256_packs_epi32(less(kFours), less(kFours + 1));
      count += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_epi8(a))) >> 1;
    } else if constexpr (N % 4 == 1) {
      count += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(less(kFours)))));
    }
    return count;
  }
  // #{ i < n : t[i] < v }, n a multiple of W.
  static int count_below(const T* t, int n, T v) {
    const V value = set1(v);
    int count = 0;
    for (int i = 0; i < n; i += W)
      count += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(load(t + i), value, _CMP_LT_OQ))));
    return count;
  }

  // As in Avx512::ranks, with 8 steps in one register.
  template <bool kClosed>
  static void ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    constexpr int kCompare = kClosed ? _CMP_LE_OQ : _CMP_LT_OQ;
    int stride = 1;
    while (stride * 8 <= K) stride *= 2;
    T steps[8];
    for (int i = 0; i < 8; ++i) steps[i] = (i + 1) * stride <= K ? t[(i + 1) * stride - 1] : std::numeric_limits<T>::infinity();
    const V table = load(steps), s = set1(shift);
    const auto step = [](__m256i at, V above, int by) {
      return _mm256_add_epi32(at, _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(by)));
    };
    const __m256i last = _mm256_set1_epi32(K);  // t[K] is +inf
    for (int j = 0; j < n; j += W) {
      const V v = load(d + j) - s;
      __m256i at = _mm256_setzero_si256();
#pragma GCC unroll 3
      for (int by = 4; by > 0; by /= 2) {
        const V probe = _mm256_permutevar8x32_ps(table, _mm256_add_epi32(at, _mm256_set1_epi32(by - 1)));
        at = step(at, _mm256_cmp_ps(probe, v, kCompare), by);
      }
      at = _mm256_mullo_epi32(at, _mm256_set1_epi32(stride));
      for (int by = stride / 2; by > 0; by /= 2) {
        const __m256i probe = _mm256_min_epi32(_mm256_add_epi32(at, _mm256_set1_epi32(by - 1)), last);
        at = step(at, _mm256_cmp_ps(_mm256_i32gather_ps(t, probe, 4), v, kCompare), by);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rank + j), at);
    }
  }

  static void transpose(const T* tile, int64_t stride, int rows, T* out) {
    for (int r = 0; r < rows; r += 8) {
      const T* in = tile + r * stride;
      V v[8], u[8];
      for (int i = 0; i < 8; ++i) v[i] = load(in + i * stride);
      for (int i = 0; i < 8; i += 2) {
        u[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        u[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
      }
      for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; ++k) {
          v[i + 2 * k] = _mm256_shuffle_ps(u[i + k], u[i + k + 2], 0x44);
          v[i + 2 * k + 1] = _mm256_shuffle_ps(u[i + k], u[i + k + 2], 0xEE);
        }
      for (int i = 0; i < 4; ++i) {
        store(out + i * rows + r, _mm256_permute2f128_ps(v[i], v[i + 4], 0x20));
        store(out + (i + 4) * rows + r, _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
      }
    }
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
