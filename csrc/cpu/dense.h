// Every negative a term: sum over (a, p, n) of max(0, d(a,p) - d(a,n) + m) without a list of triplets.
//
// Of an anchor's sorted positives t[0 .. K), a negative at distance d makes terms with one range of ranks [from, to):
//
//        t[0]      t[from]          t[to]                all            d < t + m        from = #{ t <= d - m },  to = K
//     ─────┼──────────┼──────┼───┼────┼──────> d         all_semi_hard  t < d < t + m    from the same,           to = #{ t <
//     d }
//                   d - m        d
//
// so that two look-ups give the weight of (a, n), to - from, and two histograms of ranks give every positive's, whose prefix
// sums count the ranges that cover it. The loss is the sum of weight times distance, positives less negatives. O(N^2 log K)
// in time and O(N D) in memory for O(N^2 K) terms.
//
// The gradient of the negatives' part is S X less row sums, S the N x N matrix of the pairs' weights, nearly full at the
// beginning of a training. It is made and used up tile by tile, between two products of the sweep:
//
//      distances of a tile  ->  weights S[I,J]: rows' anchors plus columns' anchors
//                           ->  grad[I] += S X[J] - rowsum x,   grad[J] += S' X[I] - columnsum x
//
// 3 N^2 D FLOP in all where anchors and candidates are the same rows: N^2 D for distances, 2 N^2 D for the sums, which are
// made in bytes where the weights are whole numbers (byte_sums). Row sums are taken tile by tile too: no more than 192 terms
// cancel at a time. Distances are expanded squares, since no pair is looked at twice; so that rows far from the origin keep
// their accuracy, all rows are moved there first (centre). Pairs that are close even so are few: their distance and their
// part of the gradient are summed directly.
#pragma once

#include "gradient.h"
#include "tiles.h"

namespace facenet_ext::cpu {
namespace {

// A point amid the rows, in each dimension halfway between the extremes, but a multiple of a power of two that is below the
// spread: moving the rows there loses nothing, and small integers stay exactly what they are. None where the rows lie around
// the origin, or one of them far from all others: moving those would round what the others differ in. O(N D).
template <class S>
void find_centre(Call<S>& c) {
  using T = typename S::T;
  const auto& w = c.w;
  T* const centre = w.centre;
  const int64_t foreign = c.args.anchor_offset < 0 ? c.A : 0;
  const auto low_of = [&](int thread) { return centre + (1 + 2 * thread) * c.Dp; };
  for (int thread = 0; thread < c.threads; ++thread) {
    fill(low_of(thread), c.Dp, std::numeric_limits<T>::max());
    fill(low_of(thread) + c.Dp, c.Dp, std::numeric_limits<T>::lowest());
  }
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t i = 0; i < c.C + foreign; ++i) {
    const int thread = omp_get_thread_num();
    T* const row = c.scratch(thread).rows;
    if (i < c.C) prepare_row(c, c.args.candidates, i * c.args.candidate_stride, row);
    else prepare_row(c, c.args.anchors, (i - c.C) * c.args.anchor_stride, row);
    T *low = low_of(thread), *high = low + c.Dp;
    for (int64_t k = 0; k < c.Dp; ++k) {
      low[k] = row[k] < low[k] ? row[k] : low[k];
      high[k] = row[k] > high[k] ? row[k] : high[k];
    }
  }
  T spread = 0;
  T *low = low_of(0), *high = low + c.Dp;
  for (int64_t k = 0; k < c.Dp; ++k) {
    for (int thread = 1; thread < c.threads; ++thread) {
      const T *l = low_of(thread), *h = l + c.Dp;
      low[k] = l[k] < low[k] ? l[k] : low[k];
      high[k] = h[k] > high[k] ? h[k] : high[k];
    }
    spread = high[k] - low[k] > spread ? high[k] - low[k] : spread;
  }
  const T unit = spread > 0 ? std::ldexp(T(1), std::ilogb(spread)) : 0;
  double radius = 0, length = 0;  // squared
  for (int64_t k = 0; k < c.Dp; ++k) {
    const T half = (high[k] - low[k]) / 2, middle = low[k] + half;
    radius += static_cast<double>(half) * half;
    length += static_cast<double>(middle) * middle;
    centre[k] = unit > 0 ? std::nearbyint(middle / unit) * unit : middle;
  }
  if (4 * radius < length) c.centre = centre;  // all rows are nearer to it than half its length
}

// out[MR, N W] = sum over `depth` rows of x of u[row, k] x[k].
template <class S, int N>
void weighted_rows(const typename S::T* u, int64_t row_step, int64_t depth_step, int64_t depth, const typename S::T* x,
                   int64_t pitch, typename S::T* out) {
  using V = typename S::V;
  V sum[S::MR][N];
#pragma GCC unroll 8
  for (int i = 0; i < S::MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[i][v] = S::zero();
  for (int64_t k = 0; k < depth; ++k) {
    V column[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) column[v] = S::load(x + k * pitch + v * S::W);
#pragma GCC unroll 8
    for (int i = 0; i < S::MR; ++i) {
      const V weight = S::set1(u[i * row_step + k * depth_step]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[i][v] = S::madd(weight, column[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < S::MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) S::store(out + i * S::NR + v * S::W, sum[i][v]);
}

// out(r)[0 .. D) += sum over k of u[r, k] (x[k] - own[r]) for r < rows; total[r] is the sum of u[r, k]. sum_block(r, k0,
// width, sum) has the sums of u x for MR rows from r on, dimensions k0 .. k0 + width: [MR, kWide]. kWide dimensions at a
// time: the rows x then stay in L1.
template <int kWide, class S, class Sum, class Out>
void add_differences(const Call<S>& c, int rows, const typename S::T* total, const typename S::T* own, Sum sum_block,
                     Out out) {
  using T = typename S::T;
  constexpr int MR = S::MR, W = S::W;
  alignas(64) T sum[MR * kWide];
  for (int64_t k0 = 0; k0 < c.Dp; k0 += kWide) {
    const int width = static_cast<int>(c.Dp - k0 < kWide ? c.Dp - k0 : kWide),
              real = static_cast<int>(c.D - k0 < width ? c.D - k0 : width);
    for (int r = 0; r < rows; r += MR) {
      const int n = rows - r < MR ? rows - r : MR;
      bool any = false;
      for (int i = 0; i < n; ++i) any |= total[r + i] != 0;
      if (!any) continue;
      for (int i = 0; i < n; ++i) prefetch_row(out(r + i) + k0, real);
      sum_block(r, k0, width, sum);
      for (int i = 0; i < n; ++i) {
        T* const to = out(r + i) + k0;
        const T* const from = own + (r + i) * c.Dp + k0;
        const typename S::V less = S::set1(-total[r + i]);
        int k = 0;
        for (; k + W <= real; k += W)
          S::store(to + k, S::load(to + k) + S::madd(less, S::load(from + k), S::load(sum + i * kWide + k)));
        for (; k < real; ++k) to[k] += S::madd1(-total[r + i], from[k], sum[i * kWide + k]);
      }
    }
  }
}

// The sums by products of numbers: u is a tile's weights, x the rows of its other side.
template <class S>
auto float_sums(const Call<S>& c, const typename S::T* u, int64_t row_step, int64_t depth_step, int depth,
                const typename S::T* x) {
  return [=, &c](int r, int64_t k0, int width, typename S::T* sum) {
    const typename S::T* const weights = u + r * row_step;
    if (width == S::NR) {
      weighted_rows<S, S::NR / S::W>(weights, row_step, depth_step, depth, x + k0, c.Dp, sum);
      return;
    }
    for (int v = 0; v < width; v += S::W)
      weighted_rows<S, 1>(weights, row_step, depth_step, depth, x + k0 + v, c.Dp, sum + v);
  };
}

// The sums by products of bytes: weights are whole numbers below 256, rows three digits of 8 bits in a common unit, 2^-23 of
// the largest element. Rows of much different length have no such unit, and products of numbers instead. Whatever a sum
// holds, it is exact until its digits are put together. u: four weights side by side. See Avx512::weigh_bytes.
template <class S>
auto byte_sums(const Call<S>& c, const uint8_t* u, int64_t row_step, int64_t quad_step, int depth, int64_t first) {
  return [=, &c](int r, int64_t k0, int, typename S::T* sum) {
    S::weigh_bytes(u + r * row_step, row_step, quad_step, (depth + 3) / 4, c.w.digits + first / 4 * 12 * c.Dp + k0 * 12,
                   12 * c.Dp, c.digit_unit, sum);
  };
}

// Rows in digits, where the weights' sums may be made of bytes.
template <class S>
void find_digits(Call<S>& c) {
  using T = typename S::T;
  const auto& w = c.w;
  const bool whole = c.args.distance != Distance::euclidean && sizeof(T) == 4;
  if (!whole || !c.symmetric || !c.wants_gradient() || !S::multiplies_bytes()) return;
  int32_t largest_class = 0;
  for (int64_t k = 0; k < c.classes.count; ++k) {
    const int32_t size = w.class_begin[k + 1] - w.class_begin[k];
    largest_class = size > largest_class ? size : largest_class;
  }
  if (2 * (largest_class - 1) > 255) return;
  T most = 0, shortest = c.longest;
  for (int64_t i = 0; i < c.C; ++i) shortest = w.norm[i] < shortest ? w.norm[i] : shortest;
  if (c.longest > 16 * shortest) return;
#pragma omp parallel for num_threads(c.threads) schedule(static) reduction(max : most)
  for (int64_t i = 0; i < c.C; ++i)
    for (int64_t k = 0; k < c.D; ++k) {
      const T size = std::fabs(w.x[i * c.Dp + k]);
      most = size > most ? size : most;
    }
  constexpr double kLargest = 127 << 16;
  if (!(most > 0)) return;
  c.digit_unit = static_cast<T>(most / kLargest);
  const T inverse = 1 / c.digit_unit;
  const int64_t quads = round_up(c.C, kColumnPad) / 4;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t quad = 0; quad < quads; ++quad)
    for (int64_t k0 = 0; k0 < c.Dp; k0 += 16) {
      uint32_t digits[3][16] = {};
      for (int row = 0; row < 4; ++row) {
        const T* x = w.x + (4 * quad + row) * c.Dp + k0;
        for (int k = 0; k < 16; ++k) {
          const T scaled = x[k] * inverse;
          const int32_t all = static_cast<int32_t>(scaled + (scaled < 0 ? T(-0.5) : T(0.5)));
          const int32_t low = static_cast<int8_t>(all), rest = (all - low) >> 8, middle = static_cast<int8_t>(rest),
                        high = (rest - middle) >> 8;
          digits[0][k] |= static_cast<uint32_t>(low & 255) << 8 * row;
          digits[1][k] |= static_cast<uint32_t>(middle & 255) << 8 * row;
          digits[2][k] |= static_cast<uint32_t>(high & 255) << 8 * row;
        }
      }
      __builtin_memcpy(w.digits + quad * 12 * c.Dp + k0 * 12, digits, sizeof digits);
    }
}

template <class S>
struct Dense {
  using T = typename S::T;
  using V = typename S::V;
  static constexpr int kT = Call<S>::kT, W = S::W;
  static constexpr int kSparse = 16;  // from so few pairs with a weight on, each by itself costs less than a product
  Call<S>& c;
  const int64_t begin, end;
  const bool euclidean = c.args.distance == Distance::euclidean;
  const bool above = c.args.negatives == Negatives::all_semi_hard;  // only negatives farther than the positive
  const bool closed = above && c.args.band > 0;  // a term where d <= t + width
  const bool stats = c.args.stat_counts != nullptr;
  const T margin = c.scaled(c.args.margin), width = c.scaled(c.args.band);

  // Counts of ranks at an anchor's slots. Few thresholds: how many ranges of active terms cover each rank (from), and how
  // many ranges of terms (term). Many: histograms of where ranges of active terms begin, where ranges end, where ranges of
  // terms begin. An anchor that counts all negatives has no ends, and begins in two histograms by turns: what was just
  // written need not be read at once.
  struct Histograms {
    uint32_t *from, *to, *term;
  };
  static bool few(int64_t K) { return K <= S::kCountable; }
  Histograms histograms(int64_t row) const {
    const int64_t slot = c.w.rows[row].slot, pitch = slot_pitch(c.w.rows[row].positives);
    uint32_t* h = reinterpret_cast<uint32_t*>(c.w.key + slot);
    return {h, h + pitch, closed ? c.w.term + slot : nullptr};
  }

  // Thresholds in the rule's unit, nothing counted yet.
  void start() const {
    const auto& w = c.w;
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pitch = slot_pitch(w.rows[row].positives);
      thresholds_in_unit(c, row);
      const Histograms h = histograms(row);
      fill(h.from, pitch, 0u);
      fill(h.to, pitch, 0u);
      if (closed) fill(h.term, pitch, 0u);
      w.sums[row] = {};
    }
  }

  // The terms of one anchor with the candidates at distances d[0 .. n), n a multiple of W. weight[j], which may be d[j]
  // itself: minus the derivative of the loss by d2 (by d: the factor is put()'s). Returns whether any is not 0.
  bool take(int64_t row, const T* d, int n, T* weight, T* aside) const {
    const Row<T>& r = c.w.rows[row];
    const int K = static_cast<int>(r.positives);
    const T* t = c.w.t + r.slot;
    V lowest = S::load(d);
    for (int j = W; j < n; j += W) lowest = S::smaller(S::load(d + j), lowest);
    T low[W];
    S::store(low, lowest);
    for (int i = 1; i < W; ++i) low[0] = low[i] < low[0] ? low[i] : low[0];
    const T reach = closed && width > margin ? width : margin;
    if (K == 0 || (!stats && low[0] - reach > t[K - 1])) {
      fill(weight, n, T(0));
      return false;
    }
    int32_t* __restrict from = reinterpret_cast<int32_t*>(aside);
    int32_t* __restrict to = from + kT;
    int32_t* __restrict term = to + kT;
    T* __restrict count = aside + 3 * kT;
    const Histograms h = histograms(row);
    int32_t active = 0;
    S::template ranks<true>(t, K, margin, d, n, from);
    if (above || stats) S::template ranks<false>(t, K, T(0), d, n, to);
    if (closed) S::template ranks<false>(t, K, width, d, n, term);
    RowSum& sum = c.w.sums[row];
    if (above) {
      if (closed)
        for (int j = 0; j < n; ++j) {
          from[j] = from[j] > term[j] ? from[j] : term[j];
          term[j] = term[j] < to[j] ? term[j] : to[j];
        }
      for (int j = 0; j < n; ++j) {
        from[j] = from[j] < to[j] ? from[j] : to[j];
        active += to[j] - from[j];
        count[j] = static_cast<T>(to[j] - from[j]);
      }
      if (few(K)) {
        if (active > 0) S::count_covers(from, to, n, K, h.from);
        if (closed) S::count_covers(term, to, n, K, h.term);
      } else if (closed) {
        for (int j = 0; j < n; ++j) {
          ++h.from[from[j]];
          ++h.to[to[j]];
          ++h.term[term[j]];
        }
      } else if (active > 0) {
        // An empty range adds nothing to the difference of both. Where most are, late in training, they are empty at one
        // rank, the last: each would wait for the one before.
        int filled = 0;
        for (int j = 0; j < n; ++j) filled += from[j] < to[j];
        if (2 * filled > n) {
          for (int j = 0; j < n; ++j) {
            ++h.from[from[j]];
            ++h.to[to[j]];
          }
        } else {
          int32_t* __restrict some = reinterpret_cast<int32_t*>(count + kT);
          int m = 0;
          for (int j = 0; j < n; ++j) {
            some[m] = j;
            m += from[j] < to[j];
          }
          for (int i = 0; i < m; ++i) {
            ++h.from[from[some[i]]];
            ++h.to[to[some[i]]];
          }
        }
      }
    } else {
      for (int j = 0; j < n; ++j) {
        active += K - from[j];
        count[j] = static_cast<T>(K - from[j]);
      }
      if (active > 0 && few(K)) {
        S::count_covers(from, nullptr, n, K, h.from);
      } else if (active > 0) {
        for (int j = 0; j < n; j += 2) {
          ++h.from[from[j]];
          ++h.to[from[j + 1]];
        }
      }
      if (stats) {
        int32_t hard = 0, semi_hard = 0;
        for (int j = 0; j < n; ++j) {
          hard += K - to[j];
          semi_hard += to[j] > from[j] ? to[j] - from[j] : 0;
        }
        sum.hard += hard;
        sum.semi_hard += semi_hard;
      }
    }
    if (stats) {
      double total = 0;
      for (int j = 0; j < n; ++j) {
        const int terms = closed ? to[j] - term[j] : above ? to[j] - from[j] : d[j] < kNoNegative<T> ? K : 0;
        const double here = d[j];
        if (terms > 0) total += terms * (euclidean ? here * here : here);
      }
      sum.d2_an += total;
    }
    // Distances relative to one of the thresholds: what is summed in T is as small as the terms are.
    const V middle = S::set1(t[K / 2]);
    V loss = S::zero();
    for (int j = 0; j < n; j += W) {
      const V many = S::load(count + j);
      loss = S::madd(many, S::load(d + j) - middle, loss);
    }
    sum.loss -= static_cast<double>(S::sum(loss));
    if (euclidean)
      for (int j = 0; j < n; ++j) {
        const T each = count[j] / d[j];
        weight[j] = d[j] > 0 ? each : T(0);
      }
    else
      for (int j = 0; j < n; ++j) weight[j] = count[j];
    return active > 0;
  }

  // Distances in, their terms counted, their gradient added.
  void visit(const Tile& tile, T* d) const {
    const auto& w = c.w;
    const auto scratch = c.scratch(omp_get_thread_num());
    const int64_t top = tile.I * kT;
    const int cols = static_cast<int>(round_up(tile.c1 - tile.c0, kSlotPad));
    const int r0 = static_cast<int>(tile.r0 - top), r1 = static_cast<int>(tile.r1 - top);
    bool any = false;
    if (tile.both)
      for (int col = 0; col < cols; col += W) {
        S::transpose(d + col, kT, kT, scratch.strip);
        for (int i = 0; i < W; ++i) {
          const int64_t row = tile.c0 + col + i;
          T* strip = scratch.strip + i * kT;
          if (row >= tile.j0 && row < tile.j1) any |= take(row, strip, kT, strip, scratch.aside);
          else fill(strip, kT, T(0));
        }
        for (int r = 0; r < kT; r += W) {
          T square[W * W];
          S::transpose(scratch.strip + r, kT, W, square);
          for (int i = 0; i < W; ++i) S::store(scratch.weights + (r + i) * kT + col, S::load(square + i * W));
        }
      }
    const int first = tile.both ? 0 : r0, last = tile.both ? kT : r1;
    const int rows = last - first, dense = rows * cols / kSparse;
    T row_total[kT], col_total[kT];
    int nonzero = 0;  // stops at `dense`
    fill(col_total, kT, T(0));
    for (int r = first; r < last; ++r) {
      T* weight = d + r * kT;
      if (r >= r0 && r < r1) any |= take(top + r, weight, cols, weight, scratch.aside);
      else fill(weight, cols, T(0));
      if (!c.wants_gradient()) continue;
      if (tile.both)
        for (int j = 0; j < cols; j += W) S::store(weight + j, S::load(weight + j) + S::load(scratch.weights + r * kT + j));
      NearBits<S>(c, top + r).for_each([&](int j) { add_near(top + r, tile.c0 + j, weight + j); });
      V total = S::zero();
      for (int j = 0; j < cols; j += W) {
        const V sum = S::load(weight + j);
        total = total + sum;
        S::store(col_total + j, S::load(col_total + j) + sum);
      }
      row_total[r] = S::sum(total);
      if (row_total[r] != 0 && nonzero < dense)
        for (int j = 0; j < cols; ++j) nonzero += weight[j] != 0;
    }
    if (!any || !c.wants_gradient()) return;
    if (nonzero < dense) {
      for (int r = first; r < last; ++r)
        if (row_total[r] != 0)
          for (int j = 0; j < cols; ++j) add_near(top + r, tile.c0 + j, d + r * kT + j);
      return;
    }
    T* const of_anchors = anchor_rows();
    T* const of_candidates = static_cast<T*>(c.args.grad_candidates);
    const auto to_anchor = [&](int r) { return of_anchors + place(top + first + r); };
    const auto to_candidate = [&](int r) { return of_candidates + w.order[tile.c0 + r] * c.D; };
    const T* const own_rows = w.ax + (top + first) * c.Dp;
    const T* const own_cols = w.x + tile.c0 * c.Dp;
    const int real_cols = static_cast<int>(tile.c1 - tile.c0);
    if (c.digit_unit > 0 && (top + first) % 4 == 0) {
      uint8_t* const bytes = reinterpret_cast<uint8_t*>(scratch.weights);  // [rows, kT]
      uint8_t* const quads = bytes + kT * kT;  // [rows / 4, kT, 4]
      put_bytes(d + first * kT, rows, cols, bytes, quads);
      add_differences<16>(c, rows, row_total + first, own_rows, byte_sums(c, bytes, kT, 4, cols, tile.c0), to_anchor);
      add_differences<16>(c, real_cols, col_total, own_cols, byte_sums(c, quads, 4, 4 * kT, rows, top + first), to_candidate);
      return;
    }
    if (of_anchors)
      add_differences<S::NR>(c, rows, row_total + first, own_rows, float_sums(c, d + first * kT, kT, 1, cols, own_cols),
                             to_anchor);
    if (of_candidates)
      add_differences<S::NR>(c, real_cols, col_total, own_cols, float_sums(c, d + first * kT, 1, kT, rows, own_rows),
                             to_candidate);
  }

  // A tile's weights in bytes: by rows, and by columns with four rows side by side.
  static void put_bytes(const T* weight, int rows, int cols, uint8_t* bytes, uint8_t* quads) {
    for (int r = 0; r < round_up(rows, 8); ++r)  // a register block is a multiple of 4 rows, and reads at most 8
      for (int j = 0; j < cols; ++j) bytes[r * kT + j] = r < rows ? static_cast<uint8_t>(weight[r * kT + j]) : uint8_t(0);
    for (int r = 0; r < rows; r += 4)
      for (int j = 0; j < cols; ++j)
        for (int i = 0; i < 4; ++i) quads[r * kT + 4 * j + i] = bytes[(r + i) * kT + j];
  }

  // One pair's part by itself; its weight is 0 for the products. Near pairs: those subtract row sums, which would leave
  // rounding alone. Late in training all that are left.
  void add_near(int64_t row, int64_t candidate, T* weight) const {
    if (*weight == 0) return;
    const T *x = c.w.ax + row * c.Dp, *y = c.w.x + candidate * c.Dp;
    if (T* out = anchor_rows()) {
      out += place(row);
      for (int64_t k = 0; k < c.D; ++k) out[k] += *weight * (y[k] - x[k]);
    }
    if (T* out = static_cast<T*>(c.args.grad_candidates)) {
      out += c.w.order[candidate] * c.D;
      for (int64_t k = 0; k < c.D; ++k) out[k] += *weight * (x[k] - y[k]);
    }
    *weight = 0;
  }

  // Where the anchors' gradient is summed: in the output, except where they are some of the candidates.
  T* anchor_rows() const {
    if (c.args.anchor_offset < 0) return static_cast<T*>(c.args.grad_anchors);
    return !c.args.grad_candidates || c.symmetric ? static_cast<T*>(c.args.grad_candidates) : c.w.anchor_grad;
  }
  int64_t place(int64_t row) const {
    if (c.args.anchor_offset < 0) return c.w.arow[row] * c.D;
    return c.symmetric ? c.w.order[row] * c.D : row * c.Dp;
  }

  // From histograms to the positives' weights and every anchor's sums.
  void count() const {
    const auto& w = c.w;
    const TripletArgs& args = c.args;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = w.rows[row].slot, K = w.rows[row].positives;
      const int64_t class_begin = w.class_begin[w.aclass[row]], class_end = w.class_begin[w.aclass[row] + 1];
      const int64_t negatives = c.C - (class_end - class_begin);
      const T* t = w.t + slot;
      const Histograms h = histograms(row);
      RowSum& sum = w.sums[row];
      int64_t active = 0, terms = 0;
      double loss = sum.loss;
      for (int64_t r = 0; r < K; ++r) {
        if (few(K)) active = h.from[r];
        else active += above ? static_cast<int64_t>(h.from[r]) - h.to[r] : static_cast<int64_t>(h.from[r]) + h.to[r];
        terms = !closed  ? (above ? active : negatives)
                : few(K) ? h.term[r]
                         : terms + static_cast<int64_t>(h.term[r]) - h.to[r];
        loss += static_cast<double>(active) * (static_cast<double>(t[r]) - static_cast<double>(t[K / 2]));
        w.weight[slot + w.rank[slot + r]] = static_cast<T>(euclidean ? (t[r] > 0 ? active / t[r] : T(0)) : active);
        sum.active += active;
        sum.pairs += terms;
        if (stats && terms > 0) {
          const double d = static_cast<double>(t[r]);
          const double d2 = c.unscaled((euclidean ? d * d : d) * (args.distance == Distance::cosine ? 2 : 1));
          sum.d2_ap += static_cast<double>(terms) * d2;
          sum.max_d2_ap = d2 > sum.max_d2_ap ? d2 : sum.max_d2_ap;
        }
      }
      if (above) sum.semi_hard = sum.active;
      sum.d2_an = c.unscaled(sum.d2_an * (args.distance == Distance::cosine ? 2 : 1));
      // Rounding may leave less than nothing of terms that are hardly above 0.
      loss = (euclidean ? loss * c.unscale : c.unscaled(loss)) + args.margin * static_cast<double>(sum.active);
      sum.loss = loss > 0 ? loss : 0;
      w.rows[row].runs = 0;
    }
  }

  // Before gradient() adds the positives and scales: the negatives' part of anchors that are some of the candidates joins
  // theirs, and anchors that are none get their positives.
  void join() const {
    const auto& w = c.w;
    if (!c.wants_gradient()) return;
    if (c.symmetric) return;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic, 16)
    for (int64_t row = begin; row < end; ++row) {
      if (c.args.anchor_offset >= 0) {
        T* const out = static_cast<T*>(c.args.grad_candidates) + w.order[w.aself[row]] * c.D;
        for (int64_t k = 0; k < c.D; ++k) out[k] += w.anchor_grad[row * c.Dp + k];
      } else if (c.args.grad_anchors) {
        anchor_gradient(c, row);
      }
    }
  }

  // Sums start from zero: outputs before the first pass, what a pass joins before each.
  void clear() const {
    if (begin == 0) {
      if (c.args.grad_candidates) fill(static_cast<T*>(c.args.grad_candidates), c.C * c.D, T(0));
      if (c.args.grad_anchors) fill(static_cast<T*>(c.args.grad_anchors), c.A * c.D, T(0));
    }
    if (c.w.anchor_grad && c.wants_gradient()) fill(c.w.anchor_grad + begin * c.Dp, (end - begin) * c.Dp, T(0));
  }
};

template <class S>
Status run_dense(const TripletArgs& args) {
  Call<S> c(args);
  inspect(c);
  if (!c.finite) {
    fill_nan(c);
    return {};
  }
  const auto& w = c.w;
  c.classes = sort_labels(args, w.table, w.hash_size, w.scratch_index, w.order, w.position, w.class_of, w.class_begin, w.arow,
                          w.aclass, w.aself, w.row_of, w.class_row);
  if (c.classes.live > 0) {
    find_centre(c);
    pack(c);
    find_digits(c);
  }
  int64_t begin = 0;
  do {
    const int64_t end = plan_pass(c, begin);
    const Dense<S> dense{c, begin, end};
    dense.clear();
    thresholds(c, begin, end);
    c.screening = !(dense.closed && dense.width > dense.margin) && worth_screening(c, begin, end);
    if (c.screening) quantise(c);
    dense.start();
    visit_tiles(c, begin, end, [&](const Tile& tile, typename S::T* d) { dense.visit(tile, d); });
    if (c.stopped) return {Code::interrupted, "triplet", "interrupted"};
    dense.count();
    if (end == c.classes.live) total(c);
    if (c.wants_gradient()) {
      dense.join();
      const Takers<S> nobody(c, begin, end);
      nobody.clear();
      gradient(c, nobody);
    }
    begin = end;
  } while (begin < c.classes.live);
  return {};
}

}  // namespace
}  // namespace facenet_ext::cpu
