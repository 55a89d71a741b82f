// From rows to selection state: packing, squared distances by register blocks, and the filter that decides which few
// distances touch an anchor's buckets.
//
// An anchor with K positives keeps their sorted distances t[0 .. K) and, for each of the K + 1 buckets between them, the
// least (distance, index) of a negative seen there. Bucket b holds t[b-1] < d <= t[b]. Only a distance inside
//     t[b-1] < d <= best[b]
// can change anything: K narrow bands, narrower with every hit, so that about K ln(N / K) of N negatives pass. To test one
// distance against all K bands at once, the range of d is cut into 256 or more equal cells and a bit says whether a band
// touches the cell. The map from d to cell is monotone and the same for thresholds and negatives: a cleared bit is proof, a
// set bit only a hint, and what passes is compared exactly. A dozen vector instructions filter W distances.
#pragma once

#include <cmath>
#include <limits>

#include "layout.h"

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

// One register block: out[MR, NR] of squared distances (last) or of partial products.
template <class S, bool kFirst, bool kLast>
void block(const typename S::T* a,  // [MR, lda]
           int64_t lda,
           const typename S::T* b,  // [depth, NR]
           int64_t depth,
           const typename S::T* anorm,  // [MR]
           const typename S::T* bnorm,  // [NR]
           typename S::T* out,  // [MR, ldo]
           int64_t ldo) {
  using V = typename S::V;
  constexpr int MR = S::MR, W = S::W, NV = S::NR / W;
  V sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[i][v] = S::zero();
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    V column[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) column[v] = S::load(b + k * S::NR + v * W);
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

// out[rows, cols] = max(0, |a|^2 + |b|^2 - 2 a.b) for rows a multiple of MR and cols a multiple of NR. FLOPs: 2 rows cols
// dim. d(a, b) == d(b, a) to the bit: each product is one chain over k in which the factors commute. With `upper`, blocks
// that lie wholly below the diagonal are left out.
template <class S>
void squared_distances(const typename S::T* a, int64_t lda, const typename S::T* anorm, const typename S::T* panels,
                       int64_t panel_size, const typename S::T* bnorm, int64_t dim, int rows, int cols, bool upper,
                       typename S::T* out, int64_t ldo) {
  for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
    const bool first = k0 == 0, last = k0 + kDepth >= dim;
    const int64_t depth = last ? dim - k0 : kDepth;
    for (int c = 0; c < cols; c += S::NR) {
      const typename S::T* b = panels + c / S::NR * panel_size + k0 * S::NR;
      const int end = upper && c + S::NR < rows ? c + S::NR : rows;
      for (int r = 0; r < end; r += S::MR) {
        const typename S::T* x = a + r * lda + k0;
        typename S::T* o = out + r * ldo + c;
        if (first && last) block<S, true, true>(x, lda, b, depth, anorm + r, bnorm + c, o, ldo);
        else if (first) block<S, true, false>(x, lda, b, depth, anorm + r, bnorm + c, o, ldo);
        else if (last) block<S, false, true>(x, lda, b, depth, anorm + r, bnorm + c, o, ldo);
        else block<S, false, false>(x, lda, b, depth, anorm + r, bnorm + c, o, ldo);
      }
    }
  }
}

template <class T>
typename KeyOf<T>::Key make_key(T d, uint32_t index) {
  typename KeyOf<T>::Bits bits;
  __builtin_memcpy(&bits, &d, sizeof bits);
  return static_cast<typename KeyOf<T>::Key>(bits) << 32 | index;
}
template <class T>
constexpr typename KeyOf<T>::Key kNoKey = ~typename KeyOf<T>::Key{0};
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

// Beyond limit(t) a negative of a positive at distance t has hinge 0 for certain, whichever way both distances were rounded.
template <class T>
struct Limit {
  T margin, slack;  // in scaled units
  bool euclidean, on;
  static constexpr T kUp = 1 + 8 * std::numeric_limits<T>::epsilon();
  T operator()(T t) const {
    const T root = euclidean ? std::sqrt(t) + margin : 0;
    return (euclidean ? root * root : t + margin) * kUp + slack;
  }
  template <class S>
  typename S::V of(typename S::V t) const {
    typename S::V d = t + S::set1(margin);
    if (euclidean) {
      const typename S::V root = S::sqrt(t) + S::set1(margin);
      d = root * root;
    }
    return d * S::set1(kUp) + S::set1(slack);
  }
};

void set_bits(uint32_t* words, int from, int to) {
  for (int word = from >> 5; word <= to >> 5; ++word) {
    uint32_t bits = ~0u;
    if (word == from >> 5) bits &= ~0u << (from & 31);
    if (word == to >> 5) bits &= ~0u >> (31 - (to & 31));
    words[word] |= bits;
  }
}

// An anchor's selection state and the three things that happen to it.
template <class S>
struct Buckets {
  using T = typename S::T;
  using V = typename S::V;
  using Key = typename KeyOf<T>::Key;
  static constexpr T kMost = std::numeric_limits<T>::max();  // finite: 0 * kMost stays a number
  Row<T>& row;
  T* t;  // [K], padded with +inf to a multiple of kSlotPad
  Key* key;  // [K + 1]
  uint32_t* words;  // [row.words]

  int cells() const { return static_cast<int>(row.words) * 32; }

  // Fresh: no negative seen, every distance passes.
  void start(bool want_farthest) {
    const int K = static_cast<int>(row.positives);
    for (int b = 0; b <= K; ++b) key[b] = kNoKey<T>;
    uint32_t count = S::kMinWords;
    while (count < static_cast<uint32_t>(kMaxWords) && count * 32 < 10 * row.positives) count *= 2;
    row.words = count;
    for (uint32_t i = 0; i < count; ++i) words[i] = 0;
    words[0] = row.positives ? 2 : 0;  // cell 1 holds everything; cell 0 is NaN's and never set
    row.scale = 0;
    row.bias = 1;
    row.far = 0;
    row.fresh = row.positives != 0;  // without a positive nothing passes, ever
    row.top_empty = true;
    row.track_far = want_farthest && row.positives != 0;
  }

  // Draws the bands anew, with the cells spread over the range that still matters. O(K).
  void rebuild(const Limit<T>& limit) {
    const int K = static_cast<int>(row.positives);
    const bool top = key[K] != kNoKey<T>;
    row.fresh = false;
    row.top_empty = !top;
    row.track_far &= row.top_empty;
    // Cells below the first that matters are not told apart: the farthest so far may lie below all thresholds.
    const T low = row.track_far && row.far && key_value<T>(row.far) < t[0] ? key_value<T>(row.far) : t[0];
    // A negative beyond all positives exists: nobody needs the fallback, and the hinge closes every band at its limit.
    const bool prune = limit.on && top;
    T high = t[K - 1];
    if (top) high = key_value<T>(key[K]);
    if (prune && limit(t[K - 1]) < high) high = limit(t[K - 1]);
    // The cap keeps bias within a fraction of a cell: the least threshold lands in cell 1 or 2 and no band below cell 1.
    T scale = static_cast<T>(cells() - 4) / (high - low);
    const T cap = static_cast<T>(1 << 20) / low;
    if (scale > cap) scale = cap;
    T bias = 2 - low * scale;
    if (!(scale > 0 && scale < T(1e30))) scale = 0, bias = 1;
    row.scale = scale;
    row.bias = bias;
    for (uint32_t i = 0; i < row.words; ++i) words[i] = 0;
    // Band b + 1 reaches from t[b] to its best, to the next threshold while it is empty, to the hinge's end at most. An empty
    // bucket's key reads as NaN, and so does the padding's; smaller() then takes its second operand. Bands come in ascending
    // order, so a word is complete when the next begins: it is stored over and over while it grows, and never loaded.
    const V s = S::set1(scale), add = S::set1(bias), most = S::set1(kMost);
    int32_t from[S::W], to[S::W];
    uint32_t mask[S::W];
    Key tail[S::W];
    int current = 0;
    uint32_t bits = 0;
    for (int b = 0; b < K; b += S::W) {
      const int n = K - b < S::W ? K - b : S::W;
      const Key* best = key + b + 1;
      if (n < S::W) {  // beyond stand the next anchor's buckets, which another thread may be filling
        for (int i = 0; i < S::W; ++i) tail[i] = i < n ? best[i] : kNoKey<T>;
        best = tail;
      }
      const V lower = S::load(t + b);
      V upper = S::smaller(S::key_values(best), S::smaller(S::load(t + b + 1), most));
      if (prune) upper = S::smaller(limit.template of<S>(lower), upper);
      S::band_masks(lower, upper, s, add, cells(), from, to, mask);
      for (int i = 0; i < n; ++i) {
        const int first = from[i] >> 5, last = to[i] >> 5;
        bits = first == current ? bits : 0;
        current = first;
        if (first == last) {
          bits |= mask[i];
        } else {
          words[current] = bits | ~0u << (from[i] & 31);
          while (++current < last) words[current] = ~0u;
          bits = ~0u >> (31 - (to[i] & 31));
        }
        words[current] = bits;
      }
    }
    if (row.track_far) set_bits(words, row.far ? S::cell(key_value<T>(row.far), scale, bias, cells()) : 1, cells() - 1);
  }

  // #{ t < d }: the bucket.
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

  // Takes in the distances d[0 .. n) to the candidates index[0 .. n); NaN marks those that are no negatives.
  void take(const T* d, int n, const int32_t* index, const Limit<T>& limit, uint32_t* queue) {
    int done = 0;
    for (; row.fresh && done < n; done += kColumnPad)  // without a filter everything passes: draw it early
      take_some(d + done, n - done < kColumnPad ? n - done : kColumnPad, index + done, limit, queue);
    if (done < n) take_some(d + done, n - done, index + done, limit, queue);
  }

 private:
  void take_some(const T* d, int n, const int32_t* index, const Limit<T>& limit, uint32_t* queue) {
    const int passed = S::filter(words, row.words, row.scale, row.bias, d, n, queue);
    if (passed == 0) return;
    const int K = static_cast<int>(row.positives);
    int changes = 0;
    if (K <= S::kMaxHeld * S::W) {
      switch ((K + S::W - 1) / S::W) {
        case 1:
          changes = drain<1>(d, index, queue, passed);
          break;
        case 2:
          changes = drain<2>(d, index, queue, passed);
          break;
        case 3:
          changes = drain<3>(d, index, queue, passed);
          break;
        case 4:
          changes = drain<4>(d, index, queue, passed);
          break;
        case 5:
          changes = drain<5>(d, index, queue, passed);
          break;
        case 6:
          changes = drain<6>(d, index, queue, passed);
          break;
        case 7:
          changes = drain<7>(d, index, queue, passed);
          break;
        default:
          changes = drain<8>(d, index, queue, passed);
          break;
      }
    } else {
      changes = drain<0>(d, index, queue, passed);
    }
    if (row.track_far) {
      const Key before = row.far;
      Key far = before;
      for (int i = 0; i < passed; ++i) {
        const Key candidate = make_key(d[queue[i]], ~static_cast<uint32_t>(index[queue[i]]));
        far = candidate > far ? candidate : far;
      }
      row.far = far;
      if (changes || far != before) rebuild(limit);
      return;
    }
    // A stale filter only lets more pass. Closing the bands one by one costs more than it saves (measured), so all are drawn
    // anew once a quarter of them has moved in one go: early, and then hardly ever.
    if (4 * changes > K || (row.top_empty && key[K] != kNoKey<T>)) rebuild(limit);
  }

  // Every distance in the queue into its bucket. Returns how often one improved. No branch on the
  // outcome: it is a coin toss early on, and a misprediction costs more than the work. The thresholds stay in NV registers
  // (0: in memory).
  template <int NV>
  int drain(const T* d, const int32_t* index, const uint32_t* queue, int passed) {
    constexpr int kHeld = NV <= S::kMaxHeld ? NV : 0;  // larger NV are never called
    V held[kHeld > 0 ? kHeld : 1];
    for (int i = 0; i < kHeld; ++i) held[i] = S::load(t + i * S::W);
    int changes = 0;
    for (int i = 0; i < passed; ++i) {
      const uint32_t j = queue[i];
      int b;
      if constexpr (kHeld > 0) b = S::template below<kHeld>(held, d[j]);
      else b = bucket(d[j]);
      const Key candidate = make_key(d[j], static_cast<uint32_t>(index[j])), old = key[b];
      const bool better = candidate < old;
      key[b] = better ? candidate : old;
      changes += better;
    }
    return changes;
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
