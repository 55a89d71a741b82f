// From rows to selection state: squared distances by register blocks, and the search that finds a distance's bucket
// and whether the bucket wants it.
//
// An anchor with K positives keeps their sorted distances t[0 .. K) and, for each of the K + 1 buckets between them, a key:
// the least (distance, index) of a negative seen there, or (where the hinge ends, nobody). Bucket b holds t[b-1] < d <= t[b].
// Only a distance that is not beyond its bucket's key can change anything: about K ln(N / K) of N negatives do. The search is
// exact and runs on whole vectors. Rank r stands at place (r mod R) L + r / R of R = ceil((K + 1) / L) rows of L lanes, one
// vector or two, so lane p holds the ranks R p .. R p + R - 1 in order:
//
//         lane 0   1    2    3          W distances at a time:
//   row 0   t0     t3   t6   t9           lane   log2(L) probes into the last row, by permutation
//   row 1   t1     t4   t7   t10          rank   R - 1 comparisons inside the lane
//   row 2   t2     t5   t8   t11          keys   looked up beside each of them
//
// At K = 40 and L = 16 (R = 3) that is about 40 instructions for 16 distances, whatever they are: no branch depends on them.
// With vectors of 8 it is more than twice as much; there a sieve decides first what is searched (sieve.h).
#pragma once

#include <cmath>
#include <limits>

#include "sieve.h"

namespace facenet_ext::cpu {
namespace {

constexpr int kDepth =
    256;  // products are summed over at most this many dimensions before the partial sums are added: a panel
          // of candidates stays in L1, and the rounding error grows with kDepth and D / kDepth, not with D

// The squared length of a row, by the very chain of operations that products() applies to a pair of rows.
template <class V, class Madd, class Get>
V squared_norm(int64_t dim, V zero, Madd madd, Get get) {
  V total = zero;
  for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
    V part = zero;
    const int64_t end = k0 + kDepth < dim ? k0 + kDepth : dim;
    for (int64_t k = k0; k < end; ++k) {
      const V v = get(k);
      part = madd(v, v, part);
    }
    total = k0 == 0 ? part : total + part;
  }
  return total;
}

// One register block: out[MR, NV W] of squared distances (last) or of partial products.
template <class S, bool kFirst, bool kLast, int NV>
void block(const typename S::T* a,  // [MR, lda]
           int64_t lda,
           const typename S::T* const (&b)[NV],  // W columns each: [depth, NR] from there on
           int64_t depth,
           const typename S::T* anorm,  // [MR]
           const typename S::T* bnorm,  // [NV W]
           typename S::T* out,  // [MR, ldo]
           int64_t ldo) {
  using V = typename S::V;
  constexpr int MR = S::MR, W = S::W;
  V sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[i][v] = S::zero();
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    V column[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) column[v] = S::load(b[v] + k * S::NR);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const V x = S::set1(a[i * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] = S::madd(x, column[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      V s = sum[i][v];
      typename S::T* o = out + i * ldo + v * W;
      if (!kFirst) s = S::load(o) + s;
      if (kLast) s = S::max0(S::madd(S::set1(-2), s, S::set1(anorm[i]) + S::load(bnorm + v * W)));
      S::store(o, s);
    }
}

// out[rows, NV W] = max(0, |a|^2 + |b|^2 - 2 a.b) with the columns from `column` on, for rows a multiple of MR and `column`
// of W. d(a, b) == d(b, a) to the bit: each product is one chain over k in which the factors commute.
template <class S, int NV>
void strip_distances(const typename S::T* a,  // [rows, lda]
                     int64_t lda,
                     const typename S::T* anorm,  // [rows]
                     const typename S::T* panels,  // [columns / NR, panel_size]
                     int64_t panel_size, int64_t column,
                     const typename S::T* norm,  // [columns]
                     int64_t dim, int64_t rows,
                     typename S::T* out,  // [rows, ldo]
                     int64_t ldo) {
  for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
    const bool first = k0 == 0, last = k0 + kDepth >= dim;
    const int64_t depth = last ? dim - k0 : kDepth;
    const typename S::T* b[NV];
    for (int v = 0; v < NV; ++v) {
      const int64_t at = column + v * S::W;
      b[v] = panels + at / S::NR * panel_size + at % S::NR + k0 * S::NR;
    }
    for (int64_t r = 0; r < rows; r += S::MR) {
      const typename S::T* x = a + r * lda + k0;
      typename S::T* o = out + r * ldo;
      if (first && last) block<S, true, true>(x, lda, b, depth, anorm + r, norm + column, o, ldo);
      else if (first) block<S, true, false>(x, lda, b, depth, anorm + r, norm + column, o, ldo);
      else if (last) block<S, false, true>(x, lda, b, depth, anorm + r, norm + column, o, ldo);
      else block<S, false, false>(x, lda, b, depth, anorm + r, norm + column, o, ldo);
    }
  }
}

// The square of NV W columns on the diagonal from `at` on: what lies below its W x W blocks is left out.
template <class S, int NV>
void corner_distances(const typename S::T* a, int64_t lda, const typename S::T* anorm, const typename S::T* panels,
                      int64_t panel_size, int64_t column, const typename S::T* norm, int64_t dim, int at, int rows,
                      typename S::T* out, int64_t ldo) {
  if (at >= rows) return;
  strip_distances<S, NV>(a + at * lda, lda, anorm + at, panels, panel_size, column, norm, dim, S::W, out + at * ldo, ldo);
  if constexpr (NV > 1)
    corner_distances<S, NV - 1>(a, lda, anorm, panels, panel_size, column + S::W, norm, dim, at + S::W, rows, out + S::W,
                                ldo);
}

// The same for cols columns, a multiple of W. FLOPs: 2 rows cols dim. With `upper`, blocks that lie wholly below the diagonal
// are left out.
template <class S>
void squared_distances(const typename S::T* a, int64_t lda, const typename S::T* anorm, const typename S::T* panels,
                       int64_t panel_size, int64_t column, const typename S::T* norm, int64_t dim, int rows, int cols,
                       bool upper, typename S::T* out, int64_t ldo) {
  constexpr int NV = S::NR / S::W;
  constexpr bool kCorners = S::W % S::MR == 0;  // rows of a corner are whole blocks
  int c = 0;
  for (; c + S::NR <= cols; c += S::NR) {
    const int end = !upper || rows < c ? rows : kCorners ? c : c + S::NR < rows ? c + S::NR : rows;
    strip_distances<S, NV>(a, lda, anorm, panels, panel_size, column + c, norm, dim, end, out + c, ldo);
    if constexpr (kCorners)
      if (upper) corner_distances<S, NV>(a, lda, anorm, panels, panel_size, column + c, norm, dim, c, rows, out + c, ldo);
  }
  for (; c < cols; c += S::W)
    strip_distances<S, 1>(a, lda, anorm, panels, panel_size, column + c, norm, dim, rows, out + c, ldo);
}

template <class T>
typename KeyOf<T>::Key make_key(T d, uint32_t index) {
  typename KeyOf<T>::Bits bits;
  __builtin_memcpy(&bits, &d, sizeof bits);
  return static_cast<typename KeyOf<T>::Key>(bits) << 32 | index;
}
template <class T, class Key>
T key_value(Key key) {
  const auto bits = static_cast<typename KeyOf<T>::Bits>(key >> 32);
  T d;
  __builtin_memcpy(&d, &bits, sizeof d);
  return d;
}
template <class Key>
uint32_t key_index(Key key) {
  return static_cast<uint32_t>(key);
}
constexpr uint32_t kNobody = ~uint32_t{0};  // the index where a bucket holds no negative: its distance is where it closes

// Beyond limit(t) a negative of a positive at distance t has hinge 0 for certain, whichever way both distances were rounded:
// neither is off by more than half the slack. (A root magnifies that of the positive's where t is small.)
template <class T>
struct Limit {
  T margin, slack;  // in scaled units
  bool euclidean, on;
  static constexpr T kUp = 1 + 8 * std::numeric_limits<T>::epsilon();
  T operator()(T t) const {
    const T root = euclidean ? std::sqrt(t + slack) + margin : 0;
    return (euclidean ? root * root : t + margin) * kUp + slack;
  }
  template <class S>
  typename S::V of(typename S::V t) const {
    typename S::V d = t + S::set1(margin);
    if (euclidean) {
      const typename S::V root = S::sqrt(t + S::set1(slack)) + S::set1(margin);
      d = root * root;
    }
    return d * S::set1(kUp) + S::set1(slack);
  }
};

// No branch on the outcome: it is a coin toss early on, and a misprediction costs more than the work.
template <class Key>
void improve(Key* key, Key candidate) {
  const Key best = *key;
  *key = candidate < best ? candidate : best;
}

// An anchor's selection state and what happens to it.
template <class S>
struct Buckets {
  using T = typename S::T;
  using V = typename S::V;
  using Key = typename KeyOf<T>::Key;
  static constexpr T kMost = std::numeric_limits<T>::max();
  Row<T>& row;
  T* t;  // [K], padded with +inf to a multiple of kSlotPad
  Key* key;  // [K + 1]
  Sieve* sieve;

  int radix() const { return static_cast<int>(row.radix); }
  int lanes() const { return S::lanes(static_cast<int>(row.positives)); }
  int size() const { return row.radix ? radix() * lanes() : static_cast<int>(row.positives) + 1; }
  int place(int rank) const { return row.radix ? rank % radix() * lanes() + rank / radix() : rank; }

  // No negative seen: every distance beyond the nearest positive is wanted. Nobody asks for the negatives before it.
  void start(bool want_farthest) {
    const int K = static_cast<int>(row.positives);
    row.radix = S::kStrided && K < kMaxStrided ? static_cast<uint32_t>(K / lanes() + 1) : 0;
    row.farthest_positive = K > 0 ? t[K - 1] : -1;
    row.top = static_cast<uint32_t>(place(K));
    if (row.radix) {
      const int L = lanes(), R = radix();
      T sorted[kMaxStrided];
      for (int r = 0; r < R * L; ++r) sorted[r] = t[r];
      for (int p = 0, r = 0; p < L; ++p)
        for (int i = 0; i < R; ++i) t[i * L + p] = sorted[r++];
    }
    for (int b = 0, n = size(); b < n; ++b) key[b] = make_key(kMost, kNobody);
    key[0] = make_key(T(-1), kNobody);
    row.far = 0;
    row.fresh = true;
    row.top_empty = K > 0;  // without a positive nothing is wanted, ever
    row.track_far = want_farthest && K > 0;
    if constexpr (S::kSieves) start_sieve(*sieve);
    row.ceiling = K > 0 ? kMost : -1;
  }

  // Nothing beyond `end` is wanted by the bucket behind the last threshold.
  void close_all(T end) {
    improve(key + row.top, make_key(end, kNobody));
    row.ceiling = key_value<T>(key[row.top]);
  }

  // Once a negative beyond all positives is known, nobody needs the fallback, and every bucket closes where the hinge ends.
  void know_far(const Limit<T>& limit) {
    row.top_empty = row.track_far = false;
    if (limit.on) close(limit);
    lower_ceiling();
  }

  // The distances d[0 .. n) to the candidates index[0 .. n) are taken in two steps, so that the searches of several anchors
  // can run ahead of what they find (sweep.h). NaN marks those that are no negatives. n is a multiple of W.
  bool searchable() const { return S::kStrided && row.radix && !row.fresh; }
  int search(const T* d, int n, uint32_t tag, uint32_t* queue) const {
    if constexpr (S::kStrided) return S::search(t, key, static_cast<int>(row.positives), row.ceiling, d, n, tag, queue);
    else return 0;
  }
  // The same in two steps where there is a sieve: how many of d[0 .. n) it lets through, their numbers in column (-1: all
  // have to be searched), and the search of those.
  int sift(const T* d, int n, uint8_t* column) const {
    if constexpr (S::kSieves) {
      if (sieve->cells == 0) return -1;
      const int through = S::sift(*sieve, d, n, column);
      if (2 * through > n) sieve->cells = 0;  // more than it saves, until it is made anew
      return through;
    }
    return -1;
  }
  int search_sifted(const T* d, const uint8_t* column, int n, uint32_t tag, uint32_t* queue) const {
    if constexpr (S::kSieves) return S::search_sifted(t, key, static_cast<int>(row.positives), d, column, n, tag, queue);
    else return 0;
  }
  void count_taken(int n) {  // once they are in their buckets
    if constexpr (S::kSieves) {
      sieve->taken += static_cast<uint32_t>(n);
      if (sieve->taken < sieve->next || row.radix == 0 || row.positives == 0) return;
      sieve->next = kSieveAgain * sieve->taken;
      make_sieve<S>(*sieve, row, t, key, radix(), lanes());
    }
  }
  // To be called once d is taken in. While no negative beyond all positives is known, some positive may need the fallback,
  // the farthest negative.
  void look_for_top(const T* d, int n, const int32_t* index, const Limit<T>& limit) {
    look(limit);
    if (row.track_far) take_farthest(d, n, index);
  }

  // Both steps for one anchor: at first nearly everything is wanted, soon much less.
  void take(const T* d, int n, const int32_t* index, const Limit<T>& limit, uint32_t* queue) {
    row.fresh = false;
    for (int done = 0; done < n; done += kColumnPad) {
      const int step = n - done < kColumnPad ? n - done : kColumnPad;
      const T* from = d + done;
      if (searchable()) {
        const int wanted = search(from, step, 0, queue);
        for (int i = 0; i < wanted; ++i) put(from, index + done, queue[i] & 0xffff, queue[i] >> 16);
      } else {
        for (int j = 0; j < step; ++j)
          if (from[j] <= row.ceiling)
            put(from, index + done, static_cast<uint32_t>(j), static_cast<uint32_t>(bucket(from[j])));
      }
      look(limit);
    }
  }

 private:
  void put(const T* d, const int32_t* index, uint32_t column, uint32_t at) {
    improve(key + at, make_key(d[column], static_cast<uint32_t>(index[column])));
  }

  // #{ t < d }, t in order.
  int bucket(T d) const {
    const int K = static_cast<int>(row.positives);
    if (K <= 64) return S::count_below(t, static_cast<int>(round_up(K, S::W)), d);
    int base = 0, length = K;
    while (length > 32) {
      const int half = length / 2;
      base += t[base + half - 1] < d ? half : 0;
      length -= half;
    }
    // A window of 32 that ends inside the padding; all before it are below d.
    const int last = static_cast<int>(round_up(K, kSlotPad)) - 32;
    base = base < last ? base : last;
    return base + S::count_below(t + base, 32, d);
  }

  void look(const Limit<T>& limit) {
    if (row.top_empty) {
      if (key_index(key[row.top]) == kNobody) return;
      know_far(limit);
      return;
    }
    lower_ceiling();
  }
  void lower_ceiling() {  // read by threads that screen a tile (screen.h)
    const T last = key_value<T>(key[row.top]), ceiling = row.farthest_positive > last ? row.farthest_positive : last;
    __atomic_store(&row.ceiling, &ceiling, __ATOMIC_RELAXED);
  }
  void close(const Limit<T>& limit) {
    if (!row.radix) {
      for (uint32_t b = 1; b <= row.positives; ++b) improve(key + b, make_key(limit(t[b - 1]), kNobody));
      return;
    }
    const int L = lanes(), last = size() - L;  // where the last row begins
    T end[kMaxStrided];
    for (int at = 0; at < last + L; at += S::W) S::store(end + at, limit.template of<S>(S::load(t + at)));
    for (int at = 0; at < last; ++at) improve(key + L + at, make_key(end[at], kNobody));
    for (int p = 1; p < L; ++p) improve(key + p, make_key(end[last + p - 1], kNobody));
  }

  void take_farthest(const T* d, int n, const int32_t* index) {
    V most = S::set1(-1);
    for (int j = 0; j < n; j += S::W) most = S::larger(S::load(d + j), most);
    T lanes[S::W];
    S::store(lanes, most);
    T value = -1;
    for (const T lane : lanes) value = lane > value ? lane : value;
    if (value < 0 || (row.far && value < key_value<T>(row.far))) return;
    for (int j = 0; j < n; ++j) {
      if (d[j] != value) continue;
      const Key candidate = make_key(value, ~static_cast<uint32_t>(index[j]));
      row.far = candidate > row.far ? candidate : row.far;
    }
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
