// Sums over rows that stand anywhere: direct distances and weighted differences.
#pragma once

#include "prepare.h"

namespace facenet_ext::cpu {
namespace {

// Rows beyond the near caches come a line at a time and out of order: asked for early, all of them at once.
template <class T>
void prefetch_row(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t end = dim < 16 * kLine ? dim : 16 * kLine;
  for (int64_t k = 0; k < end; k += kLine) __builtin_prefetch(row + k);
}

// sum_k (x_k - y_k)^2 for M rows y at once, dim a multiple of kSlotPad (zero padded).
template <class S, int M>
void direct_distances(const typename S::T* x, const typename S::T* const* y, int64_t dim, typename S::T* out) {
  using V = typename S::V;
  V sum[M], more[M];
  for (int m = 0; m < M; ++m) sum[m] = more[m] = S::zero();
  int64_t k = 0;
  for (; k + 2 * S::W <= dim; k += 2 * S::W) {
    const V x0 = S::load(x + k), x1 = S::load(x + k + S::W);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V d0 = x0 - S::load(y[m] + k), d1 = x1 - S::load(y[m] + k + S::W);
      sum[m] = S::madd(d0, d0, sum[m]);
      more[m] = S::madd(d1, d1, more[m]);
    }
  }
  for (; k < dim; k += S::W)
    for (int m = 0; m < M; ++m) {
      const V d0 = S::load(x + k) - S::load(y[m] + k);
      sum[m] = S::madd(d0, d0, sum[m]);
    }
  for (int m = 0; m < M; ++m) sum[m] = sum[m] + more[m];
  if constexpr (M == 4) S::sums(sum, out);
  else
    for (int m = 0; m < M; ++m) out[m] = S::sum(sum[m]);
}

// The same for any number of rows of `base`; at(i) says which.
template <class S, class At>
void direct_distances(const typename S::T* x, const typename S::T* base, int64_t dim, int n, At at, typename S::T* out) {
  const typename S::T* y[4];
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int m = 0; m < 4; ++m) y[m] = base + at(i + m) * dim;
    direct_distances<S, 4>(x, y, dim, out + i);
  }
  for (; i < n; ++i) {
    y[0] = base + at(i) * dim;
    direct_distances<S, 1>(x, y, dim, out + i);
  }
}

// A list longer than kBlock is summed block by block, each into a row that starts from 0: added straight to a total that
// has outgrown them, thousands of terms would each lose what the total's last bit rounds away. add(to, first, end) sums a
// part of the list into `to`. Not where the total loses nothing (carry).
template <class T, class Add>
void in_blocks(int64_t n, T* out, T* block, const T* carry, int64_t size, Add add) {
  if (n <= kBlock || carry != nullptr) return add(out, 0, n);
  for (int64_t first = 0; first < n; first += kBlock) {
    fill(block, size, T(0));
    add(block, first, first + kBlock < n ? first + kBlock : n);
    for (int64_t k = 0; k < size; ++k) out[k] += block[k];
  }
}

// total += sum, and into `carry`, where there is one, what the total's last bit rounds away, exactly (Knuth's two-sum). In a
// large class the positives make a total that the negatives then all but take away.
template <class S>
void add_to_total(typename S::T* total, typename S::T* carry, typename S::V sum) {
  const typename S::V before = S::load(total), after = before + sum;
  S::store(total, after);
  if (carry == nullptr) return;
  const typename S::V added = after - before;
  S::store(carry, S::load(carry) + ((before - (after - added)) + (sum - added)));
}

// A row's weighted differences to rows of `base`, summed into `out` in the order in which they are given.
template <class S>
struct Gather {
  using T = typename S::T;
  using V = typename S::V;
  const T* x;     // [dim] the row itself
  const T* base;  // [*, dim]
  int64_t dim;    // padded
  int32_t* at;    // [kList]
  T* weight;      // [kList]
  T* block;       // [dim]
  T* out;         // [dim]
  T* carry;       // [dim] or none: add_to_total()
  int64_t each() const { return carry != nullptr ? kList / 2 : kList; }  // neighbours that are summed before the total is

  // out += sum over i < n of weight_of(i) (x - base[row_of(i)]), each() at a time.
  template <class RowOf, class WeightOf>
  void add(int64_t n, RowOf row_of, WeightOf weight_of) const {
    in_blocks(n, out, block, carry, dim, [&](T* to, int64_t first, int64_t end) { add(to, first, end, row_of, weight_of); });
  }
  // The same where many weights are 0, as they are late in training: those are left out first, without a branch.
  template <class RowOf, class WeightOf>
  void add_some(int64_t n, RowOf row_of, WeightOf weight_of) const {
    int32_t* const list = at;
    T* const list_weight = weight;
    in_blocks(n, out, block, carry, dim, [&](T* to, int64_t i, int64_t last) {
      while (i < last) {
        int64_t some = 0;
        const int64_t end = i + each() < last ? i + each() : last;
        for (; i < end; ++i) {
          const T w = weight_of(i);
          typename KeyOf<T>::Bits bits;  // a comparison of numbers asks for NaN too, by a jump
          __builtin_memcpy(&bits, &w, sizeof bits);
          list[some] = static_cast<int32_t>(row_of(i));
          list_weight[some] = w;
          some += (bits << 1) != 0;
        }
        add(to, 0, some, [=](int64_t j) { return int64_t{list[j]}; }, [=](int64_t j) { return list_weight[j]; });
      }
    });
  }
  // A part of a list, into `to`.
  template <class RowOf, class WeightOf>
  void add(T* to, int64_t first, int64_t last, RowOf row_of, WeightOf weight_of) const {
    constexpr int kWide = S::W == 16 ? 8 : 4;  // vectors that leave registers for their sums
    for (; first < last; first += each()) {
      const int64_t end = first + each() < last ? first + each() : last;
      int64_t k = 0;
      for (; k + kWide * S::W <= dim; k += kWide * S::W) part<kWide>(to, k, first, end, row_of, weight_of);
      for (; k < dim; k += S::W) part<1>(to, k, first, end, row_of, weight_of);
    }
  }

 private:
  // N vectors of the row at a time, each in two chains: shorter sums err less, and hide the latency of the multiply-add.
  template <int N, class RowOf, class WeightOf>
  void part(T* to_row, int64_t k, int64_t first, int64_t end, RowOf row_of, WeightOf weight_of) const {
    V mine[N], even[N], odd[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      mine[v] = S::load(x + k + v * S::W);
      even[v] = odd[v] = S::zero();
    }
    const auto take = [&](int64_t i, V(&to)[N]) {
      const T* y = base + row_of(i) * dim + k;
      const V w = S::set1(weight_of(i));
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) to[v] = S::madd(w, mine[v] - S::load(y + v * S::W), to[v]);
    };
    int64_t i = first;
    for (; i + 2 <= end; i += 2) {
      take(i, even);
      take(i + 1, odd);
    }
    if (i < end) take(i, even);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const int64_t at_v = k + v * S::W;
      add_to_total<S>(to_row + at_v, carry != nullptr ? carry + at_v : nullptr, even[v] + odd[v]);
    }
  }
};

// The same for up to kTogether neighbouring rows and one list of partners, each of which is loaded once for all of them.
template <class S>
struct GatherTogether {
  using T = typename S::T;
  using V = typename S::V;
  // Two vectors of each row and of its two sums stay in registers.
  static constexpr int kTogether = S::W == 16 ? cpu::kTogether : 2;
  const T* x;     // [count, dim] the rows themselves
  int count;      // <= kTogether
  const T* base;  // [*, dim]
  int64_t dim;    // padded
  T* block;       // [count, dim]
  T* out;         // [count, dim]
  T* carry;       // [count, dim] or none
  int each() const { return carry != nullptr ? kList / 2 : kList; }

  // out[r] += sum over i < n of w[r] (x[r] - base[i]), each() at a time, where weights_of(i, w) gives all kTogether weights;
  // what has weight 0 for all of them is left out.
  template <class WeightsOf>
  void add(int64_t n, WeightsOf weights_of) const {
    const T* partner[kList];
    T weight[kList][kTogether];
    in_blocks(n, out, block, carry, count * dim, [&](T* to, int64_t i, int64_t end) {
      while (i < end) {
        int some = 0;
        for (; i < end && some < each(); ++i) {  // without a branch on the weights, none of which is below 0
          T own[kTogether], all = 0;
          weights_of(i, own);
#pragma GCC unroll 4
          for (int r = 0; r < kTogether; ++r) all += own[r];
          typename KeyOf<T>::Bits bits;
          __builtin_memcpy(&bits, &all, sizeof bits);
          for (int r = 0; r < kTogether; ++r) weight[some][r] = own[r];
          partner[some] = base + i * dim;
          some += (bits << 1) != 0;
        }
        int64_t k = 0;
        for (; k + 2 * S::W <= dim; k += 2 * S::W) part<2>(to, k, some, partner, weight);
        for (; k < dim; k += S::W) part<1>(to, k, some, partner, weight);
      }
    });
  }

 private:
  template <int N>
  void part(T* to_rows, int64_t k, int n, const T* const* partner, const T (*weight)[kTogether]) const {
    V mine[kTogether][N], even[kTogether][N], odd[kTogether][N];
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        mine[r][v] = S::load(x + (r < count ? r : 0) * dim + k + v * S::W);
        even[r][v] = odd[r][v] = S::zero();
      }
    const auto take = [&](int i, V(&to)[kTogether][N]) {
      V y[N];
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) y[v] = S::load(partner[i] + k + v * S::W);
#pragma GCC unroll 4
      for (int r = 0; r < kTogether; ++r) {
        const V w = S::set1(weight[i][r]);
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) to[r][v] = S::madd(w, mine[r][v] - y[v], to[r][v]);
      }
    };
    int i = 0;
    for (; i + 2 <= n; i += 2) {
      take(i, even);
      take(i + 1, odd);
    }
    if (i < n) take(i, even);
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        const int64_t at = r * dim + k + v * S::W;
        add_to_total<S>(to_rows + at, carry != nullptr ? carry + at : nullptr, even[r][v] + odd[r][v]);
      }
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
