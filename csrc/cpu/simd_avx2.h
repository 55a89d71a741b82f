// float32 in AVX2 and FMA. See simd_generic.h for what each name promises.
#pragma once

#include <immintrin.h>

#include <cstring>
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
  static bool multiplies_bytes() { return false; }
  static void weigh_bytes(const uint8_t*, int64_t, int64_t, int64_t, const int8_t*, int64_t, T, T*) {}
  static constexpr bool kStrided = true;        // buckets stand as buckets.h shows
  static constexpr int lanes(int) { return W; }

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

  static void sums(const V (&v)[4], T* out) {
    for (int m = 0; m < 4; ++m) out[m] = sum(v[m]);
  }
  static V sqrt(V v) { return _mm256_sqrt_ps(v); }
  static V smaller(V a, V b) { return _mm256_min_ps(a, b); }
  static V larger(V a, V b) { return _mm256_max_ps(a, b); }

  static V values(const uint64_t* key) {  // the distances of W keys
    const V a = load(reinterpret_cast<const T*>(key)), b = load(reinterpret_cast<const T*>(key + W / 2));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xDD)), 0xD8));
  }

  // See Avx512::search.
  static int search(const T* t, const uint64_t* key, int K, T ceiling, const T* d, int n, uint32_t tag, uint32_t* queue) {
    return find<false>(t, key, K, ceiling, d, nullptr, n, tag, queue);
  }
  // The same for n distances d, with NaN up to a whole vector, that stand in columns column[0 .. n).
  static int search_sifted(const T* t, const uint64_t* key, int K, const T* d, const uint8_t* column, int n, uint32_t tag,
                           uint32_t* queue) {
    return n == 0 ? 0 : find<true>(t, key, K, std::numeric_limits<T>::infinity(), d, column, n, tag, queue);
  }

  // The numbers of those of d[0 .. n) that the sieve lets through, and W zeros. Returns how many; NaN may be among them.
  static constexpr bool kSieves = true;
  static int sift(const Sieve& s, const T* d, int n, uint8_t* column) {
    return s.cells == 256   ? sift_by<1>(s, d, n, column)
           : s.cells == 512 ? sift_by<2>(s, d, n, column)
                            : sift_by<4>(s, d, n, column);
  }
  template <int P>  // permutations of W words each
  static int sift_by(const Sieve& s, const T* d, int n, uint8_t* column) {
    const V scale = set1(s.scale), bias = set1(s.bias), bottom = set1(s.bottom), top = set1(s.top);
    __m256i cell[P];
    for (int i = 0; i < P; ++i) cell[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.cell + i * W));
    constexpr uint64_t kNext = 0x0808080808080808;
    uint64_t first = 0;  // number of the vector's first distance, in 8 bytes
    int count = 0;
#pragma GCC unroll 2
    for (int j = 0; j < n; j += W, first += kNext) {
      const V inside = larger(smaller(load(d + j), top), bottom);
      const __m256i at = _mm256_castps_si256(madd(inside, scale, bias)), word = _mm256_srli_epi32(at, 5);
      const auto words = [&](int i) { return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(cell[i < P ? i : 0], word)); };
      V bits = words(0);
      if (P > 1) {
        const V ninth = _mm256_castsi256_ps(_mm256_slli_epi32(at, 23)),
                tenth = _mm256_castsi256_ps(_mm256_slli_epi32(at, 22));
        bits = _mm256_blendv_ps(bits, words(1), ninth);
        if (P > 2) bits = _mm256_blendv_ps(bits, _mm256_blendv_ps(words(2), words(3), ninth), tenth);
      }
      const __m256i bit = _mm256_sllv_epi32(_mm256_castps_si256(bits), _mm256_and_si256(at, _mm256_set1_epi32(31)));
      const unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(bit)));
      const uint64_t numbers = kCompress.lanes[mask] + first;
      __builtin_memcpy(column + count, &numbers, sizeof numbers);
      count += __builtin_popcount(mask);
    }
    __builtin_memset(column + count, 0, W);
    return count;
  }

  // -1 in each lane where entry `at` of the table is below v, or, as kCompare has it, no greater.
  template <int kCompare>
  static __m256i below(V table, __m256i at, V v) {
    return _mm256_castps_si256(_mm256_cmp_ps(_mm256_permutevar8x32_ps(table, at), v, kCompare));
  }
  // How many of the first 7 entries of `last`, ascending, are that: three probes. middle: its entry 3, in every lane.
  template <int kCompare>
  static __m256i lane_of(V last, V middle, V v) {
    // A true comparison is -1: the probe moves on by -2 mask - 1, and so on.
    const __m256i one = _mm256_set1_epi32(1), half = _mm256_castps_si256(_mm256_cmp_ps(middle, v, kCompare));
    __m256i probe = _mm256_sub_epi32(one, _mm256_slli_epi32(half, 2));
    probe = _mm256_sub_epi32(_mm256_sub_epi32(probe, one), _mm256_slli_epi32(below<kCompare>(last, probe, v), 1));
    return _mm256_sub_epi32(probe, below<kCompare>(last, probe, v));
  }

  // The lanes that a mask names, lowest first.
  static __m256i packing(unsigned mask) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kCompress.lanes[mask])));
  }
  template <bool kSifted>
  static int find(const T* t, const uint64_t* key, int K, T ceiling, const T* d, const uint8_t* column, int n, uint32_t tag,
                  uint32_t* queue) {
    const int radix = K / W + 1;
    const V last = load(t + (radix - 1) * W), middle = set1(t[(radix - 1) * W + 3]), top = set1(ceiling);
    T upper[kMaxStrided];
    for (int i = 0; i < radix * W; i += W) store(upper + i, values(key + i));
    const V first_bound = load(upper);
    const __m256i tags = _mm256_set1_epi32(static_cast<int>(tag));
    __m256i columns = _mm256_add_epi32(tags, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    int count = 0;
    for (int j = 0; j < n; j += W, columns = _mm256_add_epi32(columns, _mm256_set1_epi32(W))) {
      const V v = load(d + j);
      if (!kSifted && !_mm256_movemask_ps(_mm256_cmp_ps(v, top, _CMP_LE_OQ))) continue;
      if (kSifted)
        columns = _mm256_add_epi32(tags, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(column + j))));
      const __m256i lane = lane_of<_CMP_LT_OQ>(last, middle, v);
      __m256i more = _mm256_setzero_si256();
      V wanted = _mm256_permutevar8x32_ps(first_bound, lane);
      for (int i = 0; i + 1 < radix; ++i) {
        const __m256i mask = below<_CMP_LT_OQ>(load(t + i * W), lane, v);
        more = _mm256_sub_epi32(more, mask);
        wanted =
            _mm256_blendv_ps(wanted, _mm256_permutevar8x32_ps(load(upper + (i + 1) * W), lane), _mm256_castsi256_ps(mask));
      }
      const __m256i place = _mm256_slli_epi32(_mm256_add_epi32(lane, _mm256_slli_epi32(more, 3)), 16);
      const unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, wanted, _CMP_LE_OQ)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(queue + count),
                          _mm256_permutevar8x32_epi32(_mm256_add_epi32(place, columns), packing(mask)));
      count += __builtin_popcount(mask);
    }
    return count;
  }

  // As Avx512::screen; here it is the row that is moved up, by 64. Products of bytes are added up in 16 bits, 8 of them
  // before they go on into 32: where every factor of one side is at most 127, and those 8 of the other at most 258 together,
  // nothing overflows. 12 sums in 16 bits, 2 columns, a row and a product fill the registers; the sums in 32 bits wait in L1.
  static constexpr int kCoarse = 63, kUp = 64;
  static bool screens() { return true; }
  // The least step with which x[0 .. dims) keeps within that: the 8 are dimensions 0 1 4 5 8 9 12 13 of 16, or the others,
  // and rounding adds 4 to them at most.
  static T coarse_step(const T* x, int64_t dims) {
    const V sign = set1(-0.0f);
    V most = zero(), crowd = zero();
    for (int64_t k = 0; k < dims; k += 2 * W) {
      const V low = _mm256_andnot_ps(sign, load(x + k)), high = _mm256_andnot_ps(sign, load(x + k + W));
      const V both = low + high, pairs = _mm256_hadd_ps(both, both);
      most = larger(most, larger(low, high));
      crowd = larger(crowd, pairs + _mm256_permute2f128_ps(pairs, pairs, 1));
    }
    T step[W], largest = 0;
    store(step, larger(most / set1(kCoarse), crowd / set1(254)));
    for (const T s : step) largest = s > largest ? s : largest;
    return largest;
  }
  static uint32_t screen(const int8_t* a,  // [quads, MR, 4]
                         const int8_t* b,  // [quads, NR, 4]
                         int64_t quads,  // a multiple of 4
                         const T* row_step,  // [MR]
                         const int32_t*,
                         const T* row_reach,  // [MR]
                         const T* row_ceiling,  // [MR]
                         const T* step,  // [NR]
                         const int32_t* level,  // [NR]
                         const T* reach,  // [NR]
                         const T* ceiling) {  // [NR]
    constexpr int NV = NR / W;
    const auto integers = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
    __m256i sum[MR][NV];
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v) sum[i][v] = integers(level + v * W);
    const __m256i one = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < quads; k += 4) {
      __m256i part[MR][NV];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s, a += 4 * MR, b += 4 * NR) {
        const __m256i left = integers(b), right = integers(b + 4 * W);
#pragma GCC unroll 6
        for (int i = 0; i < MR; ++i) {
          // From intrinsics GCC 12 orders these so that sums have to wait in memory.
          const auto& four = *reinterpret_cast<const int8_t (*)[4]>(a + 4 * i);
          __m256i x, y;
          if (s == 0)
            asm("vpbroadcastd %3, %2\n\tvpmaddubsw %4, %2, %0\n\tvpmaddubsw %5, %2, %1"
                : "=&x"(part[i][0]), "=x"(part[i][1]), "=&x"(x)
                : "m"(four), "x"(left), "x"(right));
          else
            asm("vpbroadcastd %4, %2\n\tvpmaddubsw %5, %2, %3\n\tvpaddw %3, %0, %0\n\tvpmaddubsw %6, %2, %2\n\t"
                "vpaddw %2, %1, %1"
                : "+&x"(part[i][0]), "+x"(part[i][1]), "=&x"(x), "=&x"(y)
                : "m"(four), "x"(left), "x"(right));
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sum[i][v] = _mm256_add_epi32(sum[i][v], _mm256_madd_epi16(part[i][v], one));
    }
    V wanted[MR][NV], any = zero();
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const V twice = set1(2 * row_step[i]), row = set1(row_ceiling[i]), less = set1(row_reach[i]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        const V least = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(sum[i][v]), twice * load(step + v * W), load(reach + v * W));
        // "not greater": a NaN, as in the padding, is never screened away
        wanted[i][v] = _mm256_cmp_ps(least, larger(row, load(ceiling + v * W)) - less, _CMP_NGT_UQ);
        any = _mm256_or_ps(any, wanted[i][v]);
      }
    }
    if (!_mm256_movemask_ps(any)) return 0;
    uint32_t near = 0;
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v) near |= static_cast<uint32_t>(_mm256_movemask_ps(wanted[i][v]) != 0) << (i * NV + v);
    return near;
  }

  // #{ i < n : t[i] < v }, n a multiple of W.
  static int count_below(const T* t, int n, T v) {
    const V value = set1(v);
    int count = 0;
    for (int i = 0; i < n; i += W)
      count += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(load(t + i), value, _CMP_LT_OQ))));
    return count;
  }

  static void sorted_places(const T* t, int n, T* sorted, uint32_t* rank) {
    uint32_t at[4 * W];
    for (int i = 0; i < n; i += 4 * W) {
      const int vectors = (n - i + W - 1) / W;
      if (vectors > 3) places<4>(t, n, i, at);
      else if (vectors > 2) places<3>(t, n, i, at);
      else if (vectors > 1) places<2>(t, n, i, at);
      else places<1>(t, n, i, at);
      for (int j = i; j < i + 4 * W && j < n; ++j) {
        sorted[at[j - i]] = t[j];
        rank[at[j - i]] = static_cast<uint32_t>(j);
      }
    }
  }
  // As Avx512::places.
  template <int U>
  static void places(const T* t, int n, int first, uint32_t* at) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    V mine[U];
    __m256i before[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      mine[u] = load(t + first + u * W);
      before[u] = _mm256_setzero_si256();
    }
    const auto count = [&](int u, V mask) { before[u] = _mm256_sub_epi32(before[u], _mm256_castps_si256(mask)); };
    for (int j = 0; j < first; ++j) {
      const V other = set1(t[j]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) count(u, _mm256_cmp_ps(other, mine[u], _CMP_LE_OQ));
    }
#pragma GCC unroll 4
    for (int own = 0; own < U; ++own)
#pragma GCC unroll 8
      for (int lane = 0; lane < W; ++lane) {
        const V other = set1(t[first + own * W + lane]);
        const __m256i behind = _mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(lane));  // equal ones behind it
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) {
          const V less = _mm256_cmp_ps(other, mine[u], _CMP_LT_OQ), no_greater = _mm256_cmp_ps(other, mine[u], _CMP_LE_OQ);
          count(u, u > own ? no_greater : u < own ? less : _mm256_blendv_ps(less, no_greater, _mm256_castsi256_ps(behind)));
        }
      }
    for (int j = first + U * W; j < n; ++j) {
      const V other = set1(t[j]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) count(u, _mm256_cmp_ps(other, mine[u], _CMP_LT_OQ));
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + u * W), before[u]);
  }

  // The list is searched as in find(): lane p of R rows holds t[R p .. R p + R). Three probes into the last row find the
  // lane, R - 1 comparisons the place in it; a gather of 8, which steps of halves would take, costs as much as five of those.
  template <bool kClosed>
  static void ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    constexpr int kCompare = kClosed ? _CMP_LE_OQ : _CMP_LT_OQ;
    constexpr int kMostRows = 32;
    if (K >= kMostRows * W) return long_ranks<kClosed>(t, K, shift, d, n, rank);
    const int rows = K / W + 1;
    T row[kMostRows * W];  // [rows, W]
    for (int p = 0; p < W; ++p)
      for (int i = 0; i < rows; ++i) row[i * W + p] = t[p * rows + i];
    const V last = load(row + (rows - 1) * W), middle = set1(row[(rows - 1) * W + 3]), s = set1(shift);
    const __m256i of_lane = _mm256_set1_epi32(rows);
    for (int j = 0; j < n; j += W) {
      const V v = load(d + j) - s;
      const __m256i lane = lane_of<kCompare>(last, middle, v);
      __m256i at = _mm256_mullo_epi32(lane, of_lane);
      for (int i = 0; i + 1 < rows; ++i) at = _mm256_sub_epi32(at, below<kCompare>(load(row + i * W), lane, v));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rank + j), at);
    }
  }
  // As in Avx512::ranks, with 8 steps in one register.
  template <bool kClosed>
  static void long_ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    constexpr int kCompare = kClosed ? _CMP_LE_OQ : _CMP_LT_OQ;
    int stride = 1;
    while (stride * 8 <= K) stride *= 2;
    T steps[8];
    for (int i = 0; i < 8; ++i)
      steps[i] = (i + 1) * stride <= K ? t[(i + 1) * stride - 1] : std::numeric_limits<T>::infinity();
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

  // See Avx512::count_covers. Matches are counted in bytes, which are added up four ranks at a time.
  static constexpr int kCountable = 60;
  static void count_covers(const int32_t* from, const int32_t* to, int n, int K, uint32_t* count) {
    if (to) count_by_four<true>(from, to, n, K, count);
    else count_by_four<false>(from, to, n, K, count);
  }
  template <bool kEnds>
  static void count_by_four(const int32_t* from, const int32_t* to, int n, int K, uint32_t* count) {
    constexpr int kVectors = kTile<T> / 32, kNever = 127;
    int8_t begin[kTile<T>], end[kTile<T>];
    std::memset(begin, kNever, sizeof begin);
    std::memset(end, 0, sizeof end);
    for (int j = 0; j < n; ++j) begin[j] = static_cast<int8_t>(from[j]);
    for (int j = 0; j < n && kEnds; ++j) end[j] = static_cast<int8_t>(to[j]);
    const auto vector = [](const int8_t* bytes, int v) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * v));
    };
    for (int r = 0; r < K; r += 4) {
      __m256i sum[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i here = _mm256_set1_epi8(static_cast<char>(r + i));
        __m256i found = kEnds ? _mm256_setzero_si256() : _mm256_set1_epi8(kVectors);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const __m256i later = _mm256_cmpgt_epi8(vector(begin, v), here);
          if (kEnds) found = _mm256_sub_epi8(found, _mm256_andnot_si256(later, _mm256_cmpgt_epi8(vector(end, v), here)));
          else found = _mm256_add_epi8(found, later);
        }
        sum[i] = _mm256_sad_epu8(found, _mm256_setzero_si256());  // four of them, in the low half of 64 bits each
      }
      const __m256i first = _mm256_or_si256(sum[0], _mm256_slli_epi64(sum[1], 32)),
                    second = _mm256_or_si256(sum[2], _mm256_slli_epi64(sum[3], 32)),
                    both = _mm256_add_epi32(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second));
      const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
      __m128i* const counts = reinterpret_cast<__m128i*>(count + r);
      if (r + 4 <= K) {
        _mm_storeu_si128(counts, _mm_add_epi32(_mm_loadu_si128(counts), four));
      } else {
        uint32_t last[4];
        std::memcpy(last, &four, sizeof last);
        for (int i = 0; r + i < K; ++i) count[r + i] += last[i];
      }
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
