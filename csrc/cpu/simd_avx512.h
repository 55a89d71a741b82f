// float32 in AVX-512. See simd_generic.h for what each name promises.
#pragma once

#include <immintrin.h>

#include <limits>

#include "simd_generic.h"

namespace facenet_ext::cpu {
namespace {

struct Avx512 {
  using T = float;
  using V = __m512;
  static constexpr int W = 16, MR = 8, NR = 48;  // 24 accumulators + 3 columns + 1 broadcast of 32 registers
  static constexpr uint32_t kMinWords = 16;      // one register of filter words
  static constexpr int kMaxHeld = 4;             // registers of thresholds that the drain keeps

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(T v) { return _mm512_set1_ps(v); }
  static V load(const T* p) { return _mm512_loadu_ps(p); }
  static void store(T* p, V v) { _mm512_storeu_ps(p, v); }
  static T madd1(T a, T b, T c) { return __builtin_fmaf(a, b, c); }
  static V madd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max0(V v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }  // maxps returns its second operand on NaN
  // In the order of Avx2::sum after the first fold; both are fixed, so either way is reproducible.
  static T sum(V v) {
    const __m256 h =
        _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  // As in Avx2::cells.
  static __m512i cells(V d, V scale, V bias, V last) {
    return _mm512_cvttps_epi32(_mm512_min_ps(last, _mm512_fmadd_ps(d, scale, bias)));
  }
  static int cell(T d, T scale, T bias, int cell_count) {
    const int c = _mm_cvtsi128_si32(
        _mm512_castsi512_si128(cells(set1(d), set1(scale), set1(bias), set1(static_cast<float>(cell_count - 1)))));
    return c < 1 ? 1 : c;
  }
  static V sqrt(V v) { return _mm512_sqrt_ps(v); }
  static V smaller(V a, V b) { return _mm512_min_ps(a, b); }
  static V key_values(const uint64_t* key) {
    const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_ps(_mm512_permutex2var_epi32(_mm512_loadu_si512(key), odd, _mm512_loadu_si512(key + 8)));
  }
  static void band_masks(V lower, V upper, V scale, V bias, int cell_count, int32_t* from, int32_t* to, uint32_t* mask) {
    const V last = set1(static_cast<float>(cell_count - 1));
    const __m512i a = cells(lower, scale, bias, last), b = cells(upper, scale, bias, last), low5 = _mm512_set1_epi32(31);
    _mm512_storeu_si512(from, a);
    _mm512_storeu_si512(to, b);
    _mm512_storeu_si512(mask, _mm512_sub_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(2), _mm512_and_si512(b, low5)),
                                               _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_and_si512(a, low5))));
  }

  // As in Avx2::filter: 512 cells in one register, 1,024 in two, more are gathered.
  static int filter(const uint32_t* words, uint32_t word_count, T scale, T bias, const T* d, int n, uint32_t* queue) {
    const V s = set1(scale), b = set1(bias), last = set1(static_cast<float>(word_count * 32 - 1));
    const __m512i low5 = _mm512_set1_epi32(31);
    int count = 0;
    __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const auto emit = [&](__m512i word, __m512i c) {
      const __mmask16 mask = _mm512_movepi32_mask(_mm512_sllv_epi32(word, _mm512_andnot_si512(c, low5)));
      // Compress in the register, then store: the compressing store is microcoded on Zen 4.
      _mm512_storeu_si512(queue + count, _mm512_maskz_compress_epi32(mask, lanes));
      count += __builtin_popcount(static_cast<unsigned>(mask));
      lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(W));
    };
    if (word_count == 16) {
      const __m512i w0 = _mm512_loadu_si512(words);
      for (int j = 0; j < n; j += W) {
        const __m512i c = cells(load(d + j), s, b, last);
        emit(_mm512_permutexvar_epi32(_mm512_srli_epi32(c, 5), w0), c);
      }
    } else if (word_count == 32) {
      const __m512i w0 = _mm512_loadu_si512(words), w1 = _mm512_loadu_si512(words + 16);
      for (int j = 0; j < n; j += W) {
        const __m512i c = cells(load(d + j), s, b, last);
        emit(_mm512_permutex2var_epi32(w0, _mm512_srli_epi32(c, 5), w1), c);
      }
    } else {
      const __m512i wrap = _mm512_set1_epi32(static_cast<int>(word_count - 1));
      for (int j = 0; j < n; j += W) {
        const __m512i c = cells(load(d + j), s, b, last);
        emit(_mm512_i32gather_epi32(_mm512_and_si512(_mm512_srli_epi32(c, 5), wrap), words, 4), c);
      }
    }
    return count;
  }

  template <int N>
  static int below(const V* held, T v) {
    const V value = set1(v);
    int count = 0;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
      count += __builtin_popcount(static_cast<unsigned>(_mm512_cmp_ps_mask(held[i], value, _CMP_LT_OQ)));
    return count;
  }
  static int count_below(const T* t, int n, T v) {
    const V value = set1(v);
    int below = 0;
    for (int i = 0; i < n; i += W)
      below += __builtin_popcount(static_cast<unsigned>(_mm512_cmp_ps_mask(load(t + i), value, _CMP_LT_OQ)));
    return below;
  }

  // As in Generic::ranks: 64 steps of the list in four registers, and what lies between two of them from memory. Six permutations
  // for up to 63 entries, then one gather for each doubling.
  template <bool kClosed>
  static void ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    constexpr int kCompare = kClosed ? _CMP_LE_OQ : _CMP_LT_OQ;
    int stride = 1;
    while (stride * 64 <= K) stride *= 2;
    T steps[64];
    if (stride > 1)
      for (int i = 0; i < 64; ++i) steps[i] = (i + 1) * stride <= K ? t[(i + 1) * stride - 1] : std::numeric_limits<T>::infinity();
    const auto part = [&](int i) {  // an anchor's slots end with the vector that holds entry K
      return stride > 1 ? load(steps + i) : i <= K ? load(t + i) : set1(std::numeric_limits<T>::infinity());
    };
    const V a0 = part(0), a1 = part(16), a2 = part(32), a3 = part(48), s = set1(shift);
    const V middle = set1(stride > 1 ? steps[31] : t[K < 31 ? K : 31]);
    const auto step = [](__m512i at, __mmask16 above, int by) { return _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(by)); };
    const __m512i last = _mm512_set1_epi32(K);  // t[K] is +inf
    for (int j = 0; j < n; j += W) {
      const V v = load(d + j) - s;
      __m512i at = _mm512_set1_epi32(-1);  // the entries 0 .. at are below
      if (K < 32) {
#pragma GCC unroll 5
        for (int by = 16; by > 0; by /= 2) {
          const V probe = _mm512_permutex2var_ps(a0, _mm512_add_epi32(at, _mm512_set1_epi32(by)), a1);
          at = step(at, _mm512_cmp_ps_mask(probe, v, kCompare), by);
        }
      } else {
        const __mmask16 upper = _mm512_cmp_ps_mask(middle, v, kCompare);
        at = step(at, upper, 32);
#pragma GCC unroll 5
        for (int by = 16; by > 0; by /= 2) {
          const __m512i next = _mm512_add_epi32(at, _mm512_set1_epi32(by));  // five bits of it count
          const V probe = _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(a0, next, a1), _mm512_permutex2var_ps(a2, next, a3));
          at = step(at, _mm512_cmp_ps_mask(probe, v, kCompare), by);
        }
      }
      at = _mm512_add_epi32(at, _mm512_set1_epi32(1));
      if (stride > 1) {
        at = _mm512_mullo_epi32(at, _mm512_set1_epi32(stride));
        for (int by = stride / 2; by > 0; by /= 2) {
          const __m512i probe = _mm512_min_epi32(_mm512_add_epi32(at, _mm512_set1_epi32(by - 1)), last);
          at = step(at, _mm512_cmp_ps_mask(_mm512_i32gather_ps(probe, t, 4), v, kCompare), by);
        }
      }
      _mm512_storeu_si512(rank + j, at);
    }
  }

  static void transpose(const T* tile, int64_t stride, int rows, T* out) {
    for (int r = 0; r < rows; r += 16) {
      const T* in = tile + r * stride;
      V v[16], u[16];
      for (int i = 0; i < 16; ++i) v[i] = load(in + i * stride);
      for (int i = 0; i < 16; i += 2) {
        u[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        u[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
      }
      for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
          v[i + 2 * k] = _mm512_shuffle_ps(u[i + k], u[i + k + 2], 0x44);
          v[i + 2 * k + 1] = _mm512_shuffle_ps(u[i + k], u[i + k + 2], 0xEE);
        }
      // v[4 g + c] holds column 4 q + c of rows 4 g .. 4 g + 4 in its 128-bit lane q: a 4 x 4 transpose of lanes is left.
      for (int c = 0; c < 4; ++c) {
        const V a = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88), b = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xDD);
        const V e = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88), f = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xDD);
        store(out + (0 + c) * rows + r, _mm512_shuffle_f32x4(a, e, 0x88));
        store(out + (8 + c) * rows + r, _mm512_shuffle_f32x4(a, e, 0xDD));
        store(out + (4 + c) * rows + r, _mm512_shuffle_f32x4(b, f, 0x88));
        store(out + (12 + c) * rows + r, _mm512_shuffle_f32x4(b, f, 0xDD));
      }
    }
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
