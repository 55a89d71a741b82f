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

// Neighbours of one row, gathered kList at a time; the order in which they are pushed is the order of the sum.
template <class S>
struct Gather {
  using T = typename S::T;
  using V = typename S::V;
  const T* x;     // [dim] the row itself
  const T* base;  // [*, dim]
  int64_t dim;    // padded
  const T** at;   // [kList]
  T* weight;      // [kList]
  T* out;         // [dim] the sum
  int count = 0;

  void push(int64_t neighbour, T w) {
    at[count] = base + neighbour * dim;
    weight[count] = w;
    if (++count == kList) flush();
  }
  // For a neighbour that is likely in no near cache: its lines arrive while the list fills.
  void push_far(int64_t neighbour, T w) {
    prefetch_row(base + neighbour * dim, dim);
    push(neighbour, w);
  }
  // Two neighbours and four vectors of the row at a time: eight independent chains hide the latency of the fused
  // multiply-add.
  void flush() {
    int64_t k = 0;
    for (; k + 4 * S::W <= dim; k += 4 * S::W) part<4>(k);
    for (; k < dim; k += S::W) part<1>(k);
    count = 0;
  }
  template <int N>
  void part(int64_t k) {
    V mine[N], even[N], odd[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      mine[v] = S::load(x + k + v * S::W);
      even[v] = odd[v] = S::zero();
    }
    int i = 0;
    for (; i + 2 <= count; i += 2) {
      const T* p = at[i] + k;
      const T* q = at[i + 1] + k;
      const V wp = S::set1(weight[i]), wq = S::set1(weight[i + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        even[v] = S::madd(wp, mine[v] - S::load(p + v * S::W), even[v]);
        odd[v] = S::madd(wq, mine[v] - S::load(q + v * S::W), odd[v]);
      }
    }
    if (i < count) {
      const T* p = at[i] + k;
      const V wp = S::set1(weight[i]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) even[v] = S::madd(wp, mine[v] - S::load(p + v * S::W), even[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) S::store(out + k + v * S::W, S::load(out + k + v * S::W) + (even[v] + odd[v]));
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
