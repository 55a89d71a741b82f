// Input: finiteness and range, conversion, scaling or normalisation, sorted rows, panels, norms. O(N D), bandwidth-bound.
#pragma once

#include "share.h"

namespace facenet_ext::cpu {
namespace {

template <class T>
void fill(T* out, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

template <class In, class T>
void convert(const In* in, int64_t n, T* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = static_cast<T>(in[k]);
}

template <class T>
void load_row(DType dtype, const void* source, int64_t begin, int64_t n, T* out) {
  switch (dtype) {
    case DType::float32:
      convert(static_cast<const float*>(source) + begin, n, out);
      break;
    case DType::float64:
      convert(static_cast<const double*>(source) + begin, n, out);
      break;
    case DType::float16:
      convert(static_cast<const _Float16*>(source) + begin, n, out);
      break;
    case DType::bfloat16: {
      const uint16_t* in = static_cast<const uint16_t*>(source) + begin;
      for (int64_t k = 0; k < n; ++k) {
        const uint32_t bits = static_cast<uint32_t>(in[k]) << 16;
        float v;
        __builtin_memcpy(&v, &bits, sizeof v);
        out[k] = static_cast<T>(v);
      }
      break;
    }
  }
}

// Is everything finite? And the largest finite |x|: where squares would leave the number range, all rows are multiplied by a
// power of two, which changes no bit of any comparison, and results are scaled back in float64.
template <class S>
void inspect(Call<S>& c) {
  using T = typename S::T;
  using Bits = typename KeyOf<T>::Bits;
  constexpr Bits kExponent = sizeof(T) == 4 ? Bits(0x7f800000u) : Bits(0x7ff0000000000000u);
  Bits largest = 0;
  int bad = 0;
  const auto look = [&](const void* source, int64_t n, int64_t stride) {
#pragma omp parallel for num_threads(c.threads) schedule(static) reduction(max : largest) reduction(| : bad)
    for (int64_t i = 0; i < n; ++i) {
      T* row = c.scratch(omp_get_thread_num()).rows;
      load_row(c.args.dtype, source, i * stride, c.D, row);
      Bits most = 0;
      for (int64_t k = 0; k < c.D; ++k) {
        Bits bits;
        __builtin_memcpy(&bits, row + k, sizeof bits);
        bits &= ~Bits(0) >> 1;
        most = bits > most ? bits : most;
      }
      if (most >= kExponent) bad = 1;
      else largest = most > largest ? most : largest;
    }
  };
  look(c.args.candidates, c.C, c.args.candidate_stride);
  if (c.args.anchor_offset < 0) look(c.args.anchors, c.A, c.args.anchor_stride);
  c.finite = !bad;
  T most;
  __builtin_memcpy(&most, &largest, sizeof most);
  const int exponent = most > 0 ? std::ilogb(most) : 0;
  constexpr int kSafe = sizeof(T) == 4 ? 30 : 300;
  if (!c.args.normalize && (exponent > kSafe || exponent < -kSafe)) {
    const int e = exponent > -1023 ? exponent : -1023;  // of denormal numbers: 2^1024 is none
    c.scale = std::ldexp(1.0, -e);
    c.unscale = std::ldexp(1.0, e);
  }
}

// One sorted row: converted, scaled or normalised, moved to the centre, zero padded. Returns the inverse length, negative
// where the length is below 1e-12: there the divisor is a constant and no gradient flows through it.
template <class S>
typename S::T prepare_row(const Call<S>& c, const void* source, int64_t begin, typename S::T* out) {
  using T = typename S::T;
  load_row(c.args.dtype, source, begin, c.D, out);
  for (int64_t k = c.D; k < c.Dp; ++k) out[k] = 0;
  if (c.args.normalize) {
    double square = 0;
    for (int64_t k = 0; k < c.D; ++k) square += static_cast<double>(out[k]) * static_cast<double>(out[k]);
    const double length = std::sqrt(square);
    const bool constant = length < 1e-12;
    const double inverse = 1 / (constant ? 1e-12 : length);
    for (int64_t k = 0; k < c.D; ++k) out[k] = static_cast<T>(out[k] * inverse);
    if (c.centre)
      for (int64_t k = 0; k < c.D; ++k) out[k] -= c.centre[k];
    return static_cast<T>(constant ? -inverse : inverse);
  }
  if (c.scale != 1)
    for (int64_t k = 0; k < c.D; ++k) out[k] = static_cast<T>(out[k] * c.scale);
  if (c.centre)
    for (int64_t k = 0; k < c.D; ++k) out[k] -= c.centre[k];
  return 1;
}

// A row with a NaN or infinity (only mining gets here with one) is at distance NaN from everything.
template <class T>
T guarded(T norm) {
  return norm <= std::numeric_limits<T>::max() ? norm : std::numeric_limits<T>::quiet_NaN();
}

template <class S>
void pack(Call<S>& c) {
  using T = typename S::T;
  using V = typename S::V;
  const Workspace<T>& w = c.w;
  const TripletArgs& args = c.args;
  const int64_t Dp = c.Dp, panels = round_up(c.C, kColumnPad) / S::NR;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p) {
    T* rows = w.x + p * S::NR * Dp;
    for (int i = 0; i < S::NR; ++i) {
      const int64_t at = p * S::NR + i;
      if (at < c.C) {
        const T inverse = prepare_row(c, args.candidates, w.order[at] * args.candidate_stride, rows + i * Dp);
        if (args.normalize) w.inverse_length[at] = inverse;
      } else {
        fill(rows + i * Dp, Dp, T(0));
      }
    }
    T* panel = w.panels + p * c.panel_size;
    for (int64_t k = 0; k < Dp; k += S::W) S::transpose(rows + k, Dp, S::NR, panel + k * S::NR);
    T* norm = w.norm + p * S::NR;
    for (int i = 0; i < S::NR; i += S::W)
      S::store(norm + i,
               squared_norm(c.D, S::zero(), S::madd, [&](int64_t k) -> V { return S::load(panel + k * S::NR + i); }));
    for (int i = 0; i < S::NR; ++i) norm[i] = p * S::NR + i < c.C ? guarded(norm[i]) : std::numeric_limits<T>::quiet_NaN();
  }
  if (!c.symmetric) {
    const bool inside = args.anchor_offset >= 0;
    const int64_t padded = round_up(c.A, kColumnPad);
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t r = 0; r < padded; ++r) {
      T* row = w.ax + r * Dp;
      if (r < c.A) {
        const T inverse = inside
                              ? prepare_row(c, args.candidates, (args.anchor_offset + w.arow[r]) * args.candidate_stride, row)
                              : prepare_row(c, args.anchors, w.arow[r] * args.anchor_stride, row);
        if (args.normalize) w.ainverse_length[r] = inverse;
      } else {
        fill(row, Dp, T(0));
      }
      w.anorm[r] = guarded(squared_norm(c.D, T(0), S::madd1, [&](int64_t k) -> T { return row[k]; }));
    }
  }
  // The error of an expanded distance is below 2 (kDepth + D / kDepth + 4) eps (|a|^2 + |b|^2).
  T& longest = c.longest;
  for (int64_t i = 0; i < c.C; ++i) longest = w.norm[i] > longest ? w.norm[i] : longest;
  if (!c.symmetric)
    for (int64_t r = 0; r < c.A; ++r) longest = w.anorm[r] > longest ? w.anorm[r] : longest;
  const double depth = static_cast<double>(c.D < kDepth ? c.D : kDepth) + static_cast<double>(c.D) / kDepth + 4;
  c.direct = c.mining || draws_one(args) || sizeof(T) == 8;
  c.far_is_zero = !c.mining && !args.stat_counts && !args.soft_margin && !draws_one(args);
  c.limit.on = c.far_is_zero && !c.hard;  // the closest negative may lie beyond every limit
  c.limit.euclidean = args.distance == Distance::euclidean;
  c.limit.margin = c.scaled(args.distance == Distance::cosine ? 2 * args.margin : args.margin);
  c.limit.slack = static_cast<T>(8 * depth * static_cast<double>(std::numeric_limits<T>::epsilon()) * longest);
}

// A non-finite element: the loss must not look like a number.
template <class S>
void fill_nan(const Call<S>& c) {
  using T = typename S::T;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  *static_cast<T*>(c.args.loss) = nan;
  if (c.args.grad_candidates) fill(static_cast<T*>(c.args.grad_candidates), c.gradient_rows * c.D, nan);
  if (c.args.grad_anchors) fill(static_cast<T*>(c.args.grad_anchors), c.A * c.D, nan);
  if (!c.args.stat_counts) return;
  fill(c.args.stat_counts, 5, int64_t{0});
  fill(static_cast<T*>(c.args.stat_d2), 3, nan);
}

}  // namespace
}  // namespace facenet_ext::cpu
