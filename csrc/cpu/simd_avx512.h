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
  static constexpr bool kStrided = true;         // buckets stand as buckets.h shows

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

  // out[m] = sum(v[m]), to the bit: the four are folded side by side.
  static void sums(const V (&v)[4], T* out) {
    const V ab = _mm512_shuffle_f32x4(v[0], v[1], 0x44) + _mm512_shuffle_f32x4(v[0], v[1], 0xEE);
    const V cd = _mm512_shuffle_f32x4(v[2], v[3], 0x44) + _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
    V s = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xDD);  // a quarter for each
    s = s + _mm512_shuffle_ps(s, s, 0x4E);
    s = s + _mm512_shuffle_ps(s, s, 0xB1);
    const __m512i fourth = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(out, _mm256_castps256_ps128(_mm512_castps512_ps256(_mm512_permutexvar_ps(fourth, s))));
  }
  static V sqrt(V v) { return _mm512_sqrt_ps(v); }
  static V smaller(V a, V b) { return _mm512_min_ps(a, b); }
  static V larger(V a, V b) { return _mm512_max_ps(a, b); }

  // Hands on what of d[0 .. n) its bucket wants (d <= upper), as tag | place of the bucket << 16 | column; NaN is never
  // wanted, nor what lies beyond `ceiling`. n is a multiple of W. Returns how many.
  static int search(const T* t, const T* upper, int radix, T ceiling, const T* d, int n, uint32_t tag, uint32_t* queue) {
    switch (radix) {
      case 1:
        return search_in<1>(t, upper, 1, ceiling, d, n, tag, queue);
      case 2:
        return search_in<2>(t, upper, 2, ceiling, d, n, tag, queue);
      case 3:
        return search_in<3>(t, upper, 3, ceiling, d, n, tag, queue);
      case 4:
        return search_in<4>(t, upper, 4, ceiling, d, n, tag, queue);
      default:
        return search_in<0>(t, upper, radix, ceiling, d, n, tag, queue);
    }
  }
  // R > 0: thresholds and bounds stay in registers; 0: `radix` of each, from L1.
  template <int R>
  static int search_in(const T* t, const T* upper, int radix, T ceiling, const T* d, int n, uint32_t tag, uint32_t* queue) {
    V threshold[R > 0 ? R : 1], bound[R > 0 ? R : 1];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      threshold[i] = load(t + i * W);
      bound[i] = load(upper + i * W);
    }
    const int vectors = R > 0 ? R : radix;
    const V last = load(t + (vectors - 1) * W), middle = set1(t[(vectors - 1) * W + 7]), top = set1(ceiling);
    const __m512i one = _mm512_set1_epi32(1), two = _mm512_set1_epi32(2), step = _mm512_set1_epi32(W << 16);
    __m512i columns = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(tag)),
                                       _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    int count = 0;
    for (int j = 0; j < n; j += W, columns = _mm512_add_epi32(columns, _mm512_set1_epi32(W))) {
      const V v = load(d + j);
      if (!_mm512_cmp_ps_mask(v, top, _CMP_LE_OQ)) continue;  // late in training nearly always
      // The lane: how many of the first 15 in `last` are below v. `probe` is the next to ask, then one 4, 2, 1 away.
      __m512i probe =
          _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(middle, v, _CMP_LT_OQ), _mm512_set1_epi32(3), _mm512_set1_epi32(11));
      const auto below = [&](V table, __m512i at) {
        return _mm512_cmp_ps_mask(_mm512_permutexvar_ps(at, table), v, _CMP_LT_OQ);
      };
      probe = _mm512_mask_add_epi32(_mm512_sub_epi32(probe, two), below(last, probe), probe, two);
      probe = _mm512_mask_add_epi32(_mm512_sub_epi32(probe, one), below(last, probe), probe, one);
      const __m512i lane = _mm512_mask_add_epi32(probe, below(last, probe), probe, one);
      __m512i place = _mm512_slli_epi32(lane, 16);
      V wanted = _mm512_permutexvar_ps(lane, R > 0 ? bound[0] : load(upper));
#pragma GCC unroll 3
      for (int i = 0; i + 1 < vectors; ++i) {
        const __mmask16 more = below(R > 0 ? threshold[i] : load(t + i * W), lane);
        place = _mm512_mask_add_epi32(place, more, place, step);
        wanted = _mm512_mask_permutexvar_ps(wanted, more, lane, R > 0 ? bound[i + 1] : load(upper + (i + 1) * W));
      }
      const __mmask16 mask = _mm512_cmp_ps_mask(v, wanted, _CMP_LE_OQ);
      // Compress in the register, then store: the compressing store is microcoded on Zen 4.
      _mm512_storeu_si512(queue + count, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(place, columns)));
      count += __builtin_popcount(static_cast<unsigned>(mask));
    }
    return count;
  }

  static int count_below(const T* t, int n, T v) {
    const V value = set1(v);
    int below = 0;
    for (int i = 0; i < n; i += W)
      below += __builtin_popcount(static_cast<unsigned>(_mm512_cmp_ps_mask(load(t + i), value, _CMP_LT_OQ)));
    return below;
  }

  static void sorted_places(const T* t, int n, int first, uint32_t* at) {
    const V mine = load(t + first);
    const __m512i one = _mm512_set1_epi32(1);
    __m512i below = _mm512_setzero_si512();
    for (int j = 0; j < first; ++j)
      below = _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(set1(t[j]), mine, _CMP_LE_OQ), below, one);
    for (int j = first; j < first + W; ++j) {
      const unsigned later = 0xfffeu << (j - first);
      const __mmask16 mask = static_cast<__mmask16>(_mm512_cmp_ps_mask(set1(t[j]), mine, _CMP_LT_OQ) |
                                                    (_mm512_cmp_ps_mask(set1(t[j]), mine, _CMP_EQ_OQ) & later));
      below = _mm512_mask_add_epi32(below, mask, below, one);
    }
    for (int j = first + W; j < n; ++j)
      below = _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(set1(t[j]), mine, _CMP_LT_OQ), below, one);
    _mm512_storeu_si512(at + first, below);
  }

  // As in Generic::ranks: 64 steps of the list in four registers, and what lies between two of them from memory. Six
  // permutations for up to 63 entries, then one gather for each doubling.
  template <bool kClosed>
  static void ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    constexpr int kCompare = kClosed ? _CMP_LE_OQ : _CMP_LT_OQ;
    int stride = 1;
    while (stride * 64 <= K) stride *= 2;
    T steps[64];
    if (stride > 1)
      for (int i = 0; i < 64; ++i)
        steps[i] = (i + 1) * stride <= K ? t[(i + 1) * stride - 1] : std::numeric_limits<T>::infinity();
    const auto part = [&](int i) {  // an anchor's slots end with the vector that holds entry K
      return stride > 1 ? load(steps + i) : i <= K ? load(t + i) : set1(std::numeric_limits<T>::infinity());
    };
    const V a0 = part(0), a1 = part(16), a2 = part(32), a3 = part(48), s = set1(shift);
    const V middle = set1(stride > 1 ? steps[31] : t[K < 31 ? K : 31]);
    const auto step = [](__m512i at, __mmask16 above, int by) {
      return _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(by));
    };
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
          const V probe =
              _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(a0, next, a1), _mm512_permutex2var_ps(a2, next, a3));
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
