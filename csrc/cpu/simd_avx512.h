// float32 in AVX-512. See simd_generic.h for what each name promises.
#pragma once

#include <immintrin.h>

#include <limits>
#include <type_traits>

#include "simd_generic.h"

namespace facenet_ext::cpu {
namespace {

#ifdef __AVX512BW__  // the emulation (tests/cpu_emulated) has its own
bool has_byte_products() { return __builtin_cpu_supports("avx512vnni"); }
// sum[i] += four products of a byte of `a`, without a sign, and one of `b`. The intrinsic makes GCC 12 copy every sum.
inline void add_byte_products(__m512i& sum, __m512i a, __m512i b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#endif

struct Avx512 {
  using T = float;
  using V = __m512;
  static constexpr int W = 16, MR = 8, NR = 48;  // 24 accumulators + 3 columns + 1 broadcast of 32 registers
  static constexpr bool kSieves = false;         // a search costs too little to be spared (by count, not measured)
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

  // Lanes over which the buckets of K thresholds are spread. 32 are two registers, permuted as one: from 48 on the
  // fifth probe costs less than the comparisons inside the lanes that it halves.
  static constexpr int lanes(int K) { return K < kWideRows ? W : 2 * W; }

  // Hands on what of d[0 .. n) its bucket wants (d <= its key's), as tag | place of the bucket << 16 | column; NaN is never
  // wanted, nor what lies beyond `ceiling`. n is a multiple of W. Returns how many.
  static int search(const T* t, const uint64_t* key, int K, T ceiling, const T* d, int n, uint32_t tag, uint32_t* queue) {
    if (K < 16) return search_in<1, W>(t, key, K, ceiling, d, n, tag, queue);
    if (K < 32) return search_in<2, W>(t, key, K, ceiling, d, n, tag, queue);
    static_assert(kWideRows == 48, "R = 3 at most in rows of W");
    if (K < kWideRows) return search_in<3, W>(t, key, K, ceiling, d, n, tag, queue);
    if (K < 64) return search_in<2, 2 * W>(t, key, K, ceiling, d, n, tag, queue);
    return search_in<0, 2 * W>(t, key, K, ceiling, d, n, tag, queue);
  }

  // A search is one chain of some 80 cycles; three side by side keep the ports busy (Zen 5: 21 -> 16 cycles a vector at R =
  // 3). Where most distances lie beyond the ceiling, as they do once training is under way, those below it are packed first.
  template <int R, int L>
  static int search_in(const T* t, const uint64_t* key, int K, T ceiling, const T* d, int n, uint32_t tag, uint32_t* queue) {
    constexpr int kStep = 3 * W, kPart = 4 * kStep;
    const Finder<R, L> find(t, key, K / L + 1);
    const V top = set1(ceiling);
    const __m512i first = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(tag)),
                                           _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const auto columns = [&](int j) { return _mm512_add_epi32(first, _mm512_set1_epi32(j)); };
    const auto near = [&](int j) { return _mm512_cmp_ps_mask(load(d + j), top, _CMP_LE_OQ); };
    const auto size = [](__mmask16 mask) { return __builtin_popcount(static_cast<unsigned>(mask)); };
    int count = 0;
    for (int begin = 0; begin < n; begin += kPart) {
      const int end = begin + kPart < n ? begin + kPart : n;
      int j = begin;
      if (j + kStep <= end && size(near(j)) + size(near(j + W)) + size(near(j + 2 * W)) > kStep / 2) {
        for (; j + kStep <= end; j += kStep) {
          const V v[3] = {load(d + j), load(d + j + W), load(d + j + 2 * W)};
          const __m512i at[3] = {columns(j), columns(j + W), columns(j + 2 * W)};
          count = find.template put<3>(v, at, queue, count);
        }
      }
      T packed[kPart + W];
      uint32_t packed_at[kPart + W];
      int m = 0;
      const auto pack = [&](int from, __mmask16 mask) {
        _mm512_storeu_ps(packed + m, _mm512_maskz_compress_ps(mask, load(d + from)));
        _mm512_storeu_si512(packed_at + m, _mm512_maskz_compress_epi32(mask, columns(from)));
        m += size(mask);
      };
      for (; j + kStep <= end; j += kStep) {
        const __mmask16 a = near(j), b = near(j + W), c = near(j + 2 * W);
        if (!(a | b | c)) continue;  // late in training nearly always
        pack(j, a);
        pack(j + W, b);
        pack(j + 2 * W, c);
      }
      for (; j < end; j += W) pack(j, near(j));
      store(packed + m, set1(std::numeric_limits<T>::quiet_NaN()));
      int i = 0;
      const auto at_of = [&](int k) { return _mm512_loadu_si512(packed_at + k); };
      for (; i + 2 * W < m; i += kStep) {
        const V v[3] = {load(packed + i), load(packed + i + W), load(packed + i + 2 * W)};
        const __m512i at[3] = {at_of(i), at_of(i + W), at_of(i + 2 * W)};
        count = find.template put<3>(v, at, queue, count);
      }
      if (i + W < m) {
        const V v[2] = {load(packed + i), load(packed + i + W)};
        const __m512i at[2] = {at_of(i), at_of(i + W)};
        count = find.template put<2>(v, at, queue, count);
      } else if (i < m) {
        const V v[1] = {load(packed + i)};
        const __m512i at[1] = {at_of(i)};
        count = find.template put<1>(v, at, queue, count);
      }
    }
    return count;
  }

  static V values(const uint64_t* key) {  // the distances of W keys
    const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_ps(_mm512_permutex2var_epi32(_mm512_loadu_si512(key), odd, _mm512_loadu_si512(key + W / 2)));
  }

  // L entries in L / W registers, looked up as one.
  template <int L>
  struct Table {
    V part[L / W];
    V at(__m512i index) const {
      if constexpr (L == W) return _mm512_permutexvar_ps(index, part[0]);
      else return _mm512_permutex2var_ps(part[0], index, part[1]);
    }
  };
  template <int L>
  static Table<L> table(const T* p) {
    if constexpr (L == W) return {{load(p)}};
    else return {{load(p), load(p + W)}};
  }

  // The entries that end the first three quarters of L in memory.
  struct Quarters {
    V end[3];
  };
  template <int L>
  static Quarters quarters(const T* last) {
    return {{set1(last[L / 4 - 1]), set1(last[L / 2 - 1]), set1(last[3 * L / 4 - 1])}};
  }

  // How many of the first L - 1 in `last` are below each of U vectors of distances, or what kCompare asks. First the quarter,
  // by three comparisons that wait for nothing; then `lane` is the next to ask, L / 16 .. 1 away from the one before.
  template <int kCompare, int L, int U>
  static void find_lanes(const Table<L>& last, const Quarters& quarter, const V (&v)[U], __m512i (&lane)[U]) {
    __mmask16 below[U];
    const auto each = [](auto what) {
#pragma GCC unroll 3
      for (int u = 0; u < U; ++u) what(u);
    };
    each([&](int u) { lane[u] = _mm512_set1_epi32(L / 8 - 1); });
#pragma GCC unroll 3
    for (int q = 0; q < 3; ++q)
      each([&](int u) {
        lane[u] = _mm512_mask_add_epi32(lane[u], _mm512_cmp_ps_mask(quarter.end[q], v[u], kCompare), lane[u],
                                        _mm512_set1_epi32(L / 4));
      });
#pragma GCC unroll 4
    for (int by = L / 8; by > 0; by /= 2) {
      each([&](int u) { below[u] = _mm512_cmp_ps_mask(last.at(lane[u]), v[u], kCompare); });
      const __m512i up = _mm512_set1_epi32(by - by / 2), down = _mm512_set1_epi32(by / 2);
      each([&](int u) {
        lane[u] = _mm512_mask_add_epi32(by > 1 ? _mm512_sub_epi32(lane[u], down) : lane[u], below[u], lane[u], up);
      });
    }
  }

  // The bucket of each of U vectors of distances. R > 0: thresholds and bounds stay in registers; 0: `radix` rows of each,
  // from L1.
  template <int R, int L>
  struct Finder {
    const T* t;
    const int rows;
    Table<L> threshold[R > 0 ? R : 1], bound[R > 0 ? R : 1];
    Table<L> last;
    Quarters quarter;
    T upper[R > 0 ? 1 : kMaxStrided];

    Finder(const T* thresholds, const uint64_t* key, int radix) : t(thresholds), rows(R > 0 ? R : radix) {
      last = table<L>(t + (rows - 1) * L);
      quarter = quarters<L>(t + (rows - 1) * L);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        threshold[i] = table<L>(t + i * L);
        for (int part = 0; part < L / W; ++part) bound[i].part[part] = values(key + i * L + part * W);
      }
      for (int i = 0; R == 0 && i < rows * L; i += W) store(upper + i, values(key + i));
    }

    template <int U>
    int put(const V (&v)[U], const __m512i (&columns)[U], uint32_t* queue, int count) const {
      const __m512i step = _mm512_set1_epi32(L << 16);
      __m512i lane[U], place[U];
      V wanted[U];
      __mmask16 below[U];
      const auto each = [](auto what) {
#pragma GCC unroll 3
        for (int u = 0; u < U; ++u) what(u);
      };
      find_lanes<_CMP_LT_OQ>(last, quarter, v, lane);
      const Table<L> first = R > 0 ? bound[0] : table<L>(upper);
      each([&](int u) {
        place[u] = _mm512_add_epi32(_mm512_slli_epi32(lane[u], 16), columns[u]);
        wanted[u] = first.at(lane[u]);
      });
#pragma GCC unroll 3
      for (int i = 0; i + 1 < rows; ++i) {
        const Table<L> here = R > 0 ? threshold[i] : table<L>(t + i * L);
        const Table<L> next = R > 0 ? bound[i + 1] : table<L>(upper + (i + 1) * L);
        each([&](int u) { below[u] = _mm512_cmp_ps_mask(here.at(lane[u]), v[u], _CMP_LT_OQ); });
        each([&](int u) {
          place[u] = _mm512_mask_add_epi32(place[u], below[u], place[u], step);
          wanted[u] = _mm512_mask_blend_ps(below[u], wanted[u], next.at(lane[u]));
        });
      }
      each([&](int u) {
        const __mmask16 mask = _mm512_cmp_ps_mask(v[u], wanted[u], _CMP_LE_OQ);
        // Compress in the register, then store: the compressing store is microcoded on Zen 4.
        _mm512_storeu_si512(queue + count, _mm512_maskz_compress_epi32(mask, place[u]));
        count += __builtin_popcount(static_cast<unsigned>(mask));
      });
      return count;
    }
  };

  static int count_below(const T* t, int n, T v) {
    const V value = set1(v);
    int below = 0;
    for (int i = 0; i < n; i += W)
      below += __builtin_popcount(static_cast<unsigned>(_mm512_cmp_ps_mask(load(t + i), value, _CMP_LT_OQ)));
    return below;
  }

  static void sorted_places(const T* t, int n, T* sorted, uint32_t* rank) {
    uint32_t at[3 * W];
    for (int i = 0; i < n; i += 3 * W) {
      const int vectors = (n - i + W - 1) / W;
      if (vectors > 2) places<3>(t, n, i, at);
      else if (vectors > 1) places<2>(t, n, i, at);
      else places<1>(t, n, i, at);
      for (int j = i; j < i + 3 * W && j < n; ++j) {
        sorted[at[j - i]] = t[j];
        rank[at[j - i]] = static_cast<uint32_t>(j);
      }
    }
  }
  // Where t[first + 0 .. U W) belong. An entry comes after those that are less, and after equal ones before it.
  template <int U>
  static void places(const T* t, int n, int first, uint32_t* at) {
    const __m512i one = _mm512_set1_epi32(1);
    V mine[U];
    __m512i before[U];
#pragma GCC unroll 3
    for (int u = 0; u < U; ++u) {
      mine[u] = load(t + first + u * W);
      before[u] = _mm512_setzero_si512();
    }
    const auto count = [&](int u, __mmask16 mask) { before[u] = _mm512_mask_add_epi32(before[u], mask, before[u], one); };
    for (int j = 0; j < first; ++j) {
      const V other = set1(t[j]);
#pragma GCC unroll 3
      for (int u = 0; u < U; ++u) count(u, _mm512_cmp_ps_mask(other, mine[u], _CMP_LE_OQ));
    }
#pragma GCC unroll 3
    for (int own = 0; own < U; ++own)
      for (int lane = 0; lane < W; ++lane) {
        const V other = set1(t[first + own * W + lane]);
#pragma GCC unroll 3
        for (int u = 0; u < U; ++u) {
          if (u > own) count(u, _mm512_cmp_ps_mask(other, mine[u], _CMP_LE_OQ));
          else count(u, _mm512_cmp_ps_mask(other, mine[u], _CMP_LT_OQ));
        }
        const unsigned later = 0xfffeu << lane;  // equal ones behind it
        count(own, static_cast<__mmask16>(_mm512_cmp_ps_mask(other, mine[own], _CMP_EQ_OQ) & later));
      }
    for (int j = first + U * W; j < n; ++j) {
      const V other = set1(t[j]);
#pragma GCC unroll 3
      for (int u = 0; u < U; ++u) count(u, _mm512_cmp_ps_mask(other, mine[u], _CMP_LT_OQ));
    }
#pragma GCC unroll 3
    for (int u = 0; u < U; ++u) _mm512_storeu_si512(at + u * W, before[u]);
  }

  // As in Generic::ranks. Up to 63 thresholds stand in registers as buckets do (buckets.h): four permutations find the lane,
  // R - 1 the rank inside it. Of more, 64 steps stand in four registers, six permutations, and what lies between two of them
  // comes from memory, one gather for each doubling.
  template <bool kClosed>
  static void ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    if (K < 16) few_ranks<kClosed, 1>(t, shift, d, n, rank);
    else if (K < 32) few_ranks<kClosed, 2>(t, shift, d, n, rank);
    else if (K < 48) few_ranks<kClosed, 3>(t, shift, d, n, rank);
    else if (K < 64) few_ranks<kClosed, 4>(t, shift, d, n, rank);
    else many_ranks<kClosed>(t, K, shift, d, n, rank);
  }

  // Three vectors side by side: each is one chain of some 70 cycles.
  template <class Some>
  static void by_threes(int n, Some some) {
    int j = 0;
    for (; j + 3 * W <= n; j += 3 * W) some(j, std::integral_constant<int, 3>{});
    for (; j < n; j += W) some(j, std::integral_constant<int, 1>{});
  }

  // table[i], lane p: t[R p + i] of 16 R.
  template <int R>
  static void put_in_lanes(const T* t, V (&table)[R]) {
    V in[4];
    for (int i = 0; i < 4; ++i) in[i] = load(t + (i < R ? i : 0) * W);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      int32_t from[W], high[W];
      for (int p = 0; p < W; ++p) {
        from[p] = R * p + i;
        high[p] = from[p] < 2 * W ? p : W + (from[p] - 2 * W) % W;  // what comes from the third register
      }
      const __m512i at = _mm512_loadu_si512(from);
      table[i] = R == 1 ? in[0] : _mm512_permutex2var_ps(in[0], at, in[1]);
      if (R == 3) table[i] = _mm512_permutex2var_ps(table[i], _mm512_loadu_si512(high), in[2]);
      if (R == 4) table[i] = _mm512_mask_blend_ps(0xff00, table[i], _mm512_permutex2var_ps(in[2], at, in[3]));
    }
  }

  template <bool kClosed, int R>
  static void few_ranks(const T* t, T shift, const T* d, int n, int32_t* rank) {
    constexpr int kCompare = kClosed ? _CMP_LE_OQ : _CMP_LT_OQ;
    V table[R];
    put_in_lanes<R>(t, table);
    const V s = set1(shift);
    const Quarters quarter{{set1(t[R * 4 - 1]), set1(t[R * 8 - 1]), set1(t[R * 12 - 1])}};
    const __m512i one = _mm512_set1_epi32(1);
    by_threes(n, [&](int j, auto width) {
      constexpr int U = decltype(width)::value;
      V v[U];
      __m512i at[U], found[U];
      __mmask16 below[U];
      const auto each = [](auto what) {
#pragma GCC unroll 3
        for (int u = 0; u < U; ++u) what(u);
      };
      const auto ask = [&](V of) {
        each([&](int u) { below[u] = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(at[u], of), v[u], kCompare); });
      };
      each([&](int u) { v[u] = load(d + j + u * W) - s; });
      find_lanes<kCompare>(Table<W>{{table[R - 1]}}, quarter, v, at);
      each([&](int u) {
        found[u] = R == 1 ? at[u] : _mm512_slli_epi32(at[u], R == 4 ? 2 : 1);
        if (R == 3) found[u] = _mm512_add_epi32(found[u], at[u]);
      });
#pragma GCC unroll 3
      for (int i = 0; i + 1 < R; ++i) {
        ask(table[i]);
        each([&](int u) { found[u] = _mm512_mask_add_epi32(found[u], below[u], found[u], one); });
      }
      each([&](int u) { _mm512_storeu_si512(rank + j + u * W, found[u]); });
    });
  }

  template <bool kClosed>
  static void many_ranks(const T* t, int K, T shift, const T* d, int n, int32_t* rank) {
    constexpr int kCompare = kClosed ? _CMP_LE_OQ : _CMP_LT_OQ;
    int stride = 1;
    while (stride * 64 <= K) stride *= 2;
    T steps[64];
    for (int i = 0; i < 64; ++i)
      steps[i] = (i + 1) * stride <= K ? t[(i + 1) * stride - 1] : std::numeric_limits<T>::infinity();
    const V a0 = load(steps), a1 = load(steps + 16), a2 = load(steps + 32), a3 = load(steps + 48), s = set1(shift);
    const V middle = set1(steps[31]);
    const auto step = [](__m512i at, __mmask16 above, int by) {
      return _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(by));
    };
    const __m512i last = _mm512_set1_epi32(K);  // t[K] is +inf
    by_threes(n, [&](int j, auto width) {
      constexpr int U = decltype(width)::value;
      V v[U];
      __m512i at[U];  // the entries 0 .. at are below
      __mmask16 upper[U];
      const auto each = [](auto what) {
#pragma GCC unroll 3
        for (int u = 0; u < U; ++u) what(u);
      };
      each([&](int u) {
        v[u] = load(d + j + u * W) - s;
        upper[u] = _mm512_cmp_ps_mask(middle, v[u], kCompare);
        at[u] = step(_mm512_set1_epi32(-1), upper[u], 32);
      });
#pragma GCC unroll 5
      for (int by = 16; by > 0; by /= 2)
        each([&](int u) {
          const __m512i next = _mm512_add_epi32(at[u], _mm512_set1_epi32(by));  // five bits of it count
          const V probe =
              _mm512_mask_blend_ps(upper[u], _mm512_permutex2var_ps(a0, next, a1), _mm512_permutex2var_ps(a2, next, a3));
          at[u] = step(at[u], _mm512_cmp_ps_mask(probe, v[u], kCompare), by);
        });
      each([&](int u) {
        at[u] = _mm512_mullo_epi32(_mm512_add_epi32(at[u], _mm512_set1_epi32(1)), _mm512_set1_epi32(stride));
      });
      for (int by = stride / 2; by > 0; by /= 2)
        each([&](int u) {
          const __m512i probe = _mm512_min_epi32(_mm512_add_epi32(at[u], _mm512_set1_epi32(by - 1)), last);
          at[u] = step(at[u], _mm512_cmp_ps_mask(_mm512_i32gather_ps(probe, t, 4), v[u], kCompare), by);
        });
      each([&](int u) { _mm512_storeu_si512(rank + j + u * W, at[u]); });
    });
  }

  // One register block in 8 bits: a bit for each vector of [MR, NR / W] that holds a pair which one of its two rows may want.
  // See screen.h. The products take one factor without a sign, so columns are moved up by 128 and `level` takes that back.
  static bool multiplies_bytes() { return has_byte_products(); }
  static constexpr int kCoarse = 127, kUp = 128;  // the largest number; what moves all of them above 0
  static bool screens() { return has_byte_products(); }
  // The least step with which x[0 .. dims) gives no larger number.
  static T coarse_step(const T* x, int64_t dims) {
    V most = zero();
    for (int64_t k = 0; k < dims; k += W) most = larger(most, larger(load(x + k), -load(x + k)));
    T lanes[W], largest = 0;
    store(lanes, most);
    for (const T lane : lanes) largest = lane > largest ? lane : largest;
    return largest / kCoarse;
  }
  static uint32_t screen(const int8_t* a,  // [quads, NR, 4], from the first row on
                         const int8_t* b,  // [quads, NR, 4]
                         int64_t quads,
                         const T* row_step,  // [MR]
                         const int32_t* level,  // [MR]
                         const T* row_reach,  // [MR]
                         const T* row_ceiling,  // [MR]
                         const T* step,  // [NR]
                         const int32_t*,
                         const T* reach,  // [NR]
                         const T* ceiling) {  // [NR]
    constexpr int NV = NR / W;
    __m512i sum[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) sum[i][v] = _mm512_set1_epi32(level[i]);
    const __m512i up = _mm512_set1_epi8(-128);
    for (int64_t k = 0; k < quads; ++k) {
      __m512i column[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) column[v] = _mm512_xor_si512(_mm512_loadu_si512(b + (k * NR + v * W) * 4), up);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        int32_t four;
        __builtin_memcpy(&four, a + (k * NR + i) * 4, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) add_byte_products(sum[i][v], column[v], x);
      }
    }
    uint32_t near = 0;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const V twice = set1(2 * row_step[i]), row = set1(row_ceiling[i]), less = set1(row_reach[i]);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) {
        const V least = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum[i][v]), twice * load(step + v * W), load(reach + v * W));
        // "not greater": a NaN, as in the padding, is never screened away
        const __mmask16 wanted = _mm512_cmp_ps_mask(least, larger(row, load(ceiling + v * W)) - less, _CMP_NGT_UQ);
        near |= static_cast<uint32_t>(wanted != 0) << (i * NV + v);
      }
    }
    return near;
  }

  // A histogram's counter waits for its last sum, and each range has two of them. Ranges in bytes, a whole row of a tile in
  // three registers, are asked for every rank instead: about 5 cycles a rank, whatever the data.
  static constexpr int kCountable = 120;
  static void count_covers(const int32_t* from, const int32_t* to, int n, int K, uint32_t* count) {
    constexpr int kVectors = kTile<T> / 64;
    uint8_t first[kTile<T>], length[kTile<T>];
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(length + 64 * v, _mm512_setzero_si512());
    const auto put = [](uint8_t* out, __m512i v) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(v));
    };
    for (int j = 0; j < n; j += W) {
      const __m512i begin = _mm512_loadu_si512(from + j), end = to ? _mm512_loadu_si512(to + j) : _mm512_set1_epi32(K);
      put(first + j, begin);
      put(length + j, _mm512_max_epi32(_mm512_sub_epi32(end, begin), _mm512_setzero_si512()));
    }
    __m512i begins[kVectors], lengths[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      begins[v] = _mm512_loadu_si512(first + 64 * v);
      lengths[v] = _mm512_loadu_si512(length + 64 * v);
    }
    for (int r = 0; r < K; ++r) {
      const __m512i here = _mm512_set1_epi8(static_cast<char>(r));
      int64_t found = 0;
      for (int v = 0; v < kVectors; ++v)  // r - from, less than 0 a large number
        found += __builtin_popcountll(_mm512_cmplt_epu8_mask(_mm512_sub_epi8(here, begins[v]), lengths[v]));
      count[r] += static_cast<uint32_t>(found);
    }
  }

  // out[MR, 16] = unit * sum over k < 4 quads of u[row, k] x[k]: weights in bytes, four of a row side by side, times whole
  // numbers of three digits, four rows of x side by side. Three products of bytes cost 3/4 of one of float32, and are exact.
  __attribute__((noinline))  // inlined, GCC 12 keeps the sums in memory
  static void weigh_bytes(const uint8_t* u,  // row i, weights 4 k ..: u + i row_step + k quad_step
                          int64_t row_step, int64_t quad_step, int64_t quads,
                          const int8_t* digits,  // [quads] x digit_step, of which [3, 16, 4]
                          int64_t digit_step, T unit, T* out) {
    __m512i sum[MR][3];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
      for (int digit = 0; digit < 3; ++digit) sum[i][digit] = _mm512_setzero_si512();
    for (int64_t k = 0; k < quads; ++k) {
      __m512i x[3];
#pragma GCC unroll 3
      for (int digit = 0; digit < 3; ++digit) x[digit] = _mm512_loadu_si512(digits + k * digit_step + digit * 64);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        int32_t four;
        __builtin_memcpy(&four, u + i * row_step + k * quad_step, sizeof four);
        const __m512i weights = _mm512_set1_epi32(four);
#pragma GCC unroll 3
        for (int digit = 0; digit < 3; ++digit) add_byte_products(sum[i][digit], weights, x[digit]);
      }
    }
    const V one = set1(unit), more = set1(unit * 256), most = set1(unit * 65536);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const V low = _mm512_cvtepi32_ps(sum[i][0]), middle = _mm512_cvtepi32_ps(sum[i][1]),
              high = _mm512_cvtepi32_ps(sum[i][2]);
      store(out + i * W, madd(most, high, madd(more, middle, one * low)));
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
