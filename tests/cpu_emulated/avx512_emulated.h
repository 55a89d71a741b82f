// Lets csrc/cpu/triplet_avx512.cpp compile and run where there is no AVX-512: g++ -include avx512_emulated.h, without -mavx512*.
//
// Every AVX-512 intrinsic that the kernels use stands here once more, lane by lane, as the description of the instruction has
// it, in the kernels' own namespace. Unqualified names are looked up from the inside out, so the kernels find these before the
// compiler's, which their target attribute would refuse; no source is changed. An intrinsic that is missing here does not
// compile ("inlining failed ... target specific option mismatch"). What runs is the logic of the AVX-512 path: tiling,
// shuffles, masks, the bounds of loads and stores. Speed and the compiler's own AVX-512 code are not seen.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifndef __OPTIMIZE__
#error "without optimisation immintrin.h defines some intrinsics as macros, which no namespace can hide: use -O1 at least"
#endif
#ifdef __AVX512F__
#error "this file stands in for AVX-512: compile without -mavx512* and -march=native"
#endif
// simd_generic.h (float64) asks for these: 64-byte vectors and fused products, as in the real build.
#define __AVX512F__ 1
#ifndef __FMA__
#define __FMA__ 1
#endif

namespace facenet_ext::cpu {
namespace {

typedef int32_t Int16 __attribute__((vector_size(64)));    // 16 lanes of 32 bits
typedef uint32_t Word16 __attribute__((vector_size(64)));
inline Int16 ints(__m512i v) { return reinterpret_cast<Int16>(v); }
inline Word16 words(__m512i v) { return reinterpret_cast<Word16>(v); }

// Every lane of the result on its own.
template <class R, class F>
inline R lanes(F f) {
  constexpr int n = sizeof(R) / sizeof(R{}[0]);
  R r{};
  for (int i = 0; i < n; ++i) r[i] = f(i);
  return r;
}
template <class F>
inline __m512i int_lanes(F f) { return reinterpret_cast<__m512i>(lanes<Int16>(f)); }
template <class F>
inline __m512i word_lanes(F f) { return reinterpret_cast<__m512i>(lanes<Word16>(f)); }
template <class R, class P>
inline R from_memory(const P* p) {
  R r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

// ---- moves and reinterpretations ----
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float x) { return lanes<__m512>([&](int) { return x; }); }
inline __m512i _mm512_set1_epi32(int x) { return int_lanes([&](int) { return x; }); }
inline __m512i _mm512_set1_epi8(char x) { return _mm512_set1_epi32(static_cast<int>(static_cast<uint8_t>(x) * 0x01010101u)); }
template <class... E>
inline __m512i _mm512_set_epi32(E... e) {  // the last argument is lane 0
  static_assert(sizeof...(e) == 16, "");
  const int32_t given[16] = {e...};
  return int_lanes([&](int i) { return given[15 - i]; });
}
inline __m512 _mm512_loadu_ps(const float* p) { return from_memory<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return from_memory<__m512i>(p); }
inline void _mm512_storeu_ps(float* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
inline __m512 _mm512_castsi512_ps(__m512i v) { return reinterpret_cast<__m512>(v); }
inline __m512d _mm512_castps_pd(__m512 v) { return reinterpret_cast<__m512d>(v); }
inline __m256 _mm256_castpd_ps(__m256d v) { return reinterpret_cast<__m256>(v); }
inline __m256 _mm512_castps512_ps256(__m512 v) { return from_memory<__m256>(&v); }
inline __m128 _mm256_castps256_ps128(__m256 v) { return from_memory<__m128>(&v); }
inline __m256d _mm512_extractf64x4_pd(__m512d v, int which) {
  return lanes<__m256d>([&](int i) { return v[4 * (which & 1) + i]; });
}
inline __m128 _mm256_extractf128_ps(__m256 v, int which) {
  return lanes<__m128>([&](int i) { return v[4 * (which & 1) + i]; });
}

// ---- arithmetic ----
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes<__m512>([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
inline __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return lanes<__m512d>([&](int i) { return __builtin_fma(a[i], b[i], c[i]); });
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes<__m512>([&](int i) { return __builtin_fmaf(-a[i], b[i], c[i]); });
}
inline __m256 _mm256_add_ps(__m256 a, __m256 b) { return a + b; }
// The second operand where one is NaN, and where both are zeros.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return lanes<__m512>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; }); }
inline __m512 _mm512_min_ps(__m512 a, __m512 b) { return lanes<__m512>([&](int i) { return a[i] < b[i] ? a[i] : b[i]; }); }
inline __m512 _mm512_sqrt_ps(__m512 a) { return lanes<__m512>([&](int i) { return std::sqrt(a[i]); }); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return word_lanes([&](int i) { return words(a)[i] + words(b)[i]; }); }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return word_lanes([&](int i) { return words(a)[i] - words(b)[i]; }); }

inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return word_lanes([&](int i) { return words(a)[i] * words(b)[i]; }); }
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return lanes<__m512>([&](int i) { return static_cast<float>(ints(a)[i]); });
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return word_lanes([&](int i) { return words(a)[i] ^ words(b)[i]; }); }
// vpdpbusd: sum[i] += four products of a byte without a sign and one with.
inline bool has_byte_products() { return true; }
inline void add_byte_products(__m512i& sum, __m512i a, __m512i b) {
  sum = word_lanes([&](int i) {
    uint32_t total = words(sum)[i];
    for (int k = 0; k < 32; k += 8)
      total += static_cast<uint32_t>(static_cast<int32_t>(words(a)[i] >> k & 0xff) * static_cast<int8_t>(words(b)[i] >> k));
    return total;
  });
}
inline __m512i _mm512_min_epi32(__m512i a, __m512i b) {
  return int_lanes([&](int i) { return ints(a)[i] < ints(b)[i] ? ints(a)[i] : ints(b)[i]; });
}

inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return int_lanes([&](int i) { return ints(a)[i] > ints(b)[i] ? ints(a)[i] : ints(b)[i]; });
}
typedef uint8_t Byte64 __attribute__((vector_size(64)));
inline Byte64 bytes(__m512i v) { return reinterpret_cast<Byte64>(v); }
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) { return reinterpret_cast<__m512i>(bytes(a) - bytes(b)); }
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {  // the low byte of each lane
  uint8_t low[16];
  for (int i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>(words(a)[i]);
  return from_memory<__m128i>(low);
}

// ---- comparisons and masks ----
inline __mmask64 _mm512_cmplt_epu8_mask(__m512i a, __m512i b) {
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<__mmask64>(bytes(a)[i] < bytes(b)[i]) << i;
  return mask;
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    bool holds = false;  // ordered: false where one is NaN
    if (predicate == _CMP_LT_OQ) holds = a[i] < b[i];
    else if (predicate == _CMP_LE_OQ) holds = a[i] <= b[i];
    else if (predicate == _CMP_EQ_OQ) holds = a[i] == b[i];
    else if (predicate == _CMP_NGT_UQ) holds = !(a[i] > b[i]);  // unordered: true
    else __builtin_trap();  // the kernels use no other
    mask |= static_cast<unsigned>(holds) << i;
  }
  return static_cast<__mmask16>(mask);
}
inline __mmask16 _mm512_kor(__mmask16 a, __mmask16 b) { return static_cast<__mmask16>(a | b); }
inline __m512i _mm512_maskz_compress_epi32(__mmask16 mask, __m512i a) {  // kept lanes to the front, zeros behind
  Int16 r{};
  for (int i = 0, at = 0; i < 16; ++i)
    if (mask >> i & 1) r[at++] = ints(a)[i];
  return reinterpret_cast<__m512i>(r);
}
inline __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 a) {
  return reinterpret_cast<__m512>(_mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(a)));
}

inline __m512i _mm512_mask_add_epi32(__m512i kept, __mmask16 mask, __m512i a, __m512i b) {
  return word_lanes([&](int i) { return mask >> i & 1 ? words(a)[i] + words(b)[i] : words(kept)[i]; });
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {  // b where the bit is set
  return int_lanes([&](int i) { return mask >> i & 1 ? ints(b)[i] : ints(a)[i]; });
}

inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { return mask >> i & 1 ? b[i] : a[i]; });
}

// ---- permutations ----
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {  // bit 4 picks the source
  return lanes<__m512>([&](int i) {
    const uint32_t at = words(index)[i];
    return at & 16 ? b[at & 15] : a[at & 15];
  });
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
  return reinterpret_cast<__m512i>(_mm512_permutex2var_ps(reinterpret_cast<__m512>(a), index, reinterpret_cast<__m512>(b)));
}
inline __m512 _mm512_i32gather_ps(__m512i index, const void* base, int scale) {
  return lanes<__m512>([&](int i) {
    return from_memory<float>(static_cast<const char*>(base) + static_cast<int64_t>(ints(index)[i]) * scale);
  });
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {  // four bits of the index count
  return lanes<__m512>([&](int i) { return a[words(index)[i] & 15]; });
}
inline __m512 _mm512_mask_permutexvar_ps(__m512 kept, __mmask16 mask, __m512i index, __m512 a) {
  return lanes<__m512>([&](int i) { return mask >> i & 1 ? a[words(index)[i] & 15] : kept[i]; });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned by) {
  return word_lanes([&](int i) { return by < 32 ? words(a)[i] << by : 0u; });
}
// Inside each 128-bit quarter: lanes 0 and 1 (2 and 3) of a and b in turn.
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { const int at = (i & 12) + (i >> 1 & 1); return i & 1 ? b[at] : a[at]; });
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { const int at = (i & 12) + 2 + (i >> 1 & 1); return i & 1 ? b[at] : a[at]; });
}
// Inside each quarter: two lanes of a, two of b, each picked by two bits.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int pick) {
  return lanes<__m512>([&](int i) { const int at = (i & 12) + (pick >> 2 * (i & 3) & 3); return i & 2 ? b[at] : a[at]; });
}
// Whole quarters: two of a, two of b, each picked by two bits.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int pick) {
  return lanes<__m512>([&](int i) { const int at = 4 * (pick >> 2 * (i >> 2) & 3) + (i & 3); return i & 8 ? b[at] : a[at]; });
}

}  // namespace
}  // namespace facenet_ext::cpu
