// Random problems in host memory and the calls of one kernel path on them. No torch, no Python: what csrc/triplet.h says is all
// that is used, and anchors need not be candidates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/layout.h"

namespace facenet_ext::cpu::testing {

struct Random {  // splitmix64: the same numbers with every standard library
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  int64_t size(int64_t most) { return static_cast<int64_t>(std::exp(uniform() * std::log(most + 1.0))); }  // 1 .. most
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
};

struct Problem {
  std::string name;
  int64_t A = 0, C = 0, D = 1, offset = 0;
  std::vector<double> x, ax;             // [C, D], [A, D]: representable in dtype
  std::vector<int64_t> labels, alabels;  // [C], [A]
  int64_t pad = 0;                       // stride - D
  DType dtype = DType::float32;
  Distance distance = Distance::sqeuclidean;
  Fallback fallback = Fallback::farthest;
  Reduction reduction = Reduction::mean;
  bool normalize = false, finite = true;
  bool exact = false;  // small integers: every sum in every path is exact, ties abound
  double margin = 0, band = 0;
  Negatives negatives = Negatives::semi_hard;
  int64_t seed = 0;
  int64_t constants = 0;
  int threads = 1, other_threads = 1;

  int64_t self(int64_t a) const { return offset < 0 ? -1 : offset + a; }
};

inline double rounded(double v, DType dtype) {
  if (dtype == DType::float64) return v;
  const float f = static_cast<float>(v);
  if (dtype == DType::float16) return static_cast<double>(static_cast<_Float16>(f));
  if (dtype == DType::float32 || !std::isfinite(f)) return f;
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  bits &= 0xffff0000u;
  float cut;
  std::memcpy(&cut, &bits, sizeof cut);
  return cut;
}

enum Geometry { kNormal, kUnit, kClusters, kDuplicates, kCollapse, kLattice, kFar, kAntipodes, kScaled, kBroken, kGeometries };
inline const char* geometry_name(int g) {
  static const char* names[] = {"normal", "unit",      "clusters", "duplicates", "collapse",
                                "lattice", "far away", "antipodes", "scaled",    "nan and inf"};
  return names[g];
}

// One row of the given geometry. `earlier`: rows that may be copied.
inline void draw_row(Random& r, int g, int64_t label, double spread, int64_t D, const std::vector<double>& earlier, double* row) {
  Random centre{static_cast<uint64_t>(label) * 77 + 5};
  double square = 0;
  for (int64_t k = 0; k < D; ++k) {
    double v = r.normal();
    if (g == kClusters) v = centre.normal() + spread * v;
    if (g == kCollapse) v = 0.3 + (spread < 0.5 ? 0 : 1e-6 * v);
    if (g == kLattice) v = static_cast<double>(r.below(5) - 2);
    if (g == kFar) v += 100;
    row[k] = v;
    square += v * v;
  }
  if (g == kUnit)
    for (int64_t k = 0; k < D; ++k) row[k] /= std::sqrt(square > 0 ? square : 1);
  if (g == kScaled)
    for (int64_t k = 0; k < D; ++k) row[k] *= spread < 0.5 ? 1e-16 : 1e15;
  const int64_t rows = static_cast<int64_t>(earlier.size()) / D;
  if (rows > 0 && ((g == kDuplicates && !r.one_in(3)) || (g == kAntipodes && r.one_in(2)) || r.one_in(40))) {
    const double* source = &earlier[static_cast<size_t>(r.below(rows) * D)];
    for (int64_t k = 0; k < D; ++k) row[k] = g == kAntipodes ? -source[k] : source[k];
  }
  if (g == kBroken && r.one_in(6)) row[r.below(D)] = r.one_in(2) ? std::nan("") : r.one_in(2) ? INFINITY : -INFINITY;
  if (r.one_in(60)) std::fill(row, row + D, 0.0);
}

// threaded: several tiles and, from a million products on, several threads for certain.
inline Problem random_problem(uint64_t seed, bool wide, bool threaded) {
  Random r{seed * 1000003};
  Problem p;
  p.C = r.size(400);
  p.D = r.size(600);
  const int64_t budget = 6'000'000;  // products: keeps the emulation quick
  while (p.C * p.C * p.D > budget && p.D > 40) p.D /= 2;
  if (threaded) p.C = 400 + r.below(200), p.D = 10 + r.below(10);
  const bool apart = !wide && !threaded && seed % 20 == 12;  // classes far from each other: tiles are screened (cpu/screen.h)
  if (apart) p.C = 390 + r.below(100), p.D = 10 + r.below(20);
  // 0, 1: plain; 2: one rank's rows; 3: anchors are no candidates
  const int form = threaded || apart ? 0 : static_cast<int>(r.below(4));
  p.A = p.C;
  if (form == 2) p.A = r.below(p.C + 1), p.offset = r.below(p.C - p.A + 1);
  if (form == 3) p.A = r.size(300) - r.one_in(20), p.offset = -1;
  if (form == 3 && r.one_in(30)) p.C = 0;
  int64_t K = r.size(300);
  if (threaded || apart) K = 1 + K % 40;
  if (seed % 101 == 7) {  // one class so large that its anchors' slots take several passes
    p.C = p.A = 1100, p.offset = 0, p.D = 3, K = 1050;
    if (seed % 2) p.A = 2000, p.C = 620, K = 590, p.offset = -1;
  }
  const bool contiguous = r.one_in(2);
  const int64_t classes = p.C / K + 1;
  const auto label = [&](int64_t i) { return (contiguous ? i / K : r.below(classes)) * 1'000'000'007 - 12345; };
  for (int64_t i = 0; i < p.C; ++i) p.labels.push_back(r.one_in(50) ? -i - 5 : label(i));

  const int g = static_cast<int>(seed % kGeometries);
  const DType narrow[] = {DType::float32, DType::float32, DType::float32, DType::float32, DType::bfloat16, DType::float16};
  p.dtype = wide ? DType::float64 : g == kScaled ? DType::float32 : narrow[r.below(6)];
  p.pad = r.one_in(3) ? r.below(20) : 0;
  p.distance = r.one_in(2) ? Distance::euclidean : Distance::sqeuclidean;
  p.fallback = r.one_in(3) ? Fallback::skip : Fallback::farthest;
  p.reduction = static_cast<Reduction>(r.below(3));
  p.exact = g == kLattice;
  p.normalize = !p.exact && g != kScaled && r.one_in(3);
  p.threads = static_cast<int>(1 + r.below(3));
  p.other_threads = static_cast<int>(1 + r.below(3));
  if (threaded) p.threads = 3, p.other_threads = 2;

  const double spread = r.uniform() * (apart ? 0.5 : 2);
  const auto draw = [&](std::vector<double>& rows, const std::vector<int64_t>& labels) {
    std::vector<double> row(static_cast<size_t>(p.D));
    for (const int64_t l : labels) {
      draw_row(r, g, l, spread, p.D, p.x, row.data());
      for (const double v : row) {
        rows.push_back(rounded(v, p.dtype));
        p.finite &= std::isfinite(rows.back());
      }
    }
  };
  draw(p.x, p.labels);
  for (int64_t a = 0; a < p.A; ++a)
    p.alabels.push_back(p.offset >= 0 ? p.labels[static_cast<size_t>(p.offset + a)]
                        : p.C == 0 || r.one_in(9) ? 4'000'000'000'000 + r.below(3)  // a label that no candidate has
                                                  : p.labels[static_cast<size_t>(r.below(p.C))]);
  if (p.offset < 0) draw(p.ax, p.alabels);
  else p.ax.assign(p.x.begin() + p.offset * p.D, p.x.begin() + (p.offset + p.A) * p.D);

  double square = 0;
  for (const double v : p.x) square += std::isfinite(v) ? v * v : 0;
  const double typical = p.normalize ? 1 : p.C > 0 ? square / static_cast<double>(p.C) : 1;
  const double factors[] = {0, 0.02, 0.2, 2};
  p.margin = factors[r.below(apart ? 3 : 4)] * (p.distance == Distance::euclidean ? std::sqrt(typical) : typical);
  p.name = "seed " + std::to_string(seed) + (wide ? " float64" : "") + ": " + geometry_name(g) + " A=" + std::to_string(p.A) +
           " C=" + std::to_string(p.C) + " D=" + std::to_string(p.D) + " K=" + std::to_string(K) +
           " offset=" + std::to_string(p.offset) + " dtype=" + std::to_string(static_cast<int>(p.dtype)) +
           (p.normalize ? " normalize" : "") + (p.distance == Distance::euclidean ? " euclidean" : "") +
           (p.fallback == Fallback::skip ? " skip" : "") + " reduction=" + std::to_string(static_cast<int>(p.reduction)) +
           " margin=" + std::to_string(p.margin) + " threads=" + std::to_string(p.threads);
  return p;
}

// ---- calls ------------------------------------------------------------------------------------------------------------------

// Rows in the dtype's own format, `pad` elements of 0xFF bytes (NaN) between them. As long as the contract promises, no more.
inline std::vector<char> stored(const std::vector<double>& rows, int64_t n, const Problem& p) {
  const size_t item = p.dtype == DType::float64 ? 8 : p.dtype == DType::float32 ? 4 : 2;
  std::vector<char> out(n > 0 ? static_cast<size_t>((n - 1) * (p.D + p.pad) + p.D) * item : 0, '\xff');
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < p.D; ++k) {
      const double v = rows[static_cast<size_t>(i * p.D + k)];
      char* to = out.data() + static_cast<size_t>(i * (p.D + p.pad) + k) * item;
      const float f = static_cast<float>(v);
      const _Float16 h = static_cast<_Float16>(f);
      if (p.dtype == DType::float64) std::memcpy(to, &v, 8);
      else if (p.dtype == DType::float32) std::memcpy(to, &f, 4);
      else if (p.dtype == DType::float16) std::memcpy(to, &h, 2);
      else std::memcpy(to, reinterpret_cast<const char*>(&f) + 2, 2);
    }
  return out;
}

template <class T>
struct Loss {
  T loss = 0;
  std::vector<T> grad, agrad;
  int64_t counts[5] = {};
  T d2[3] = {};
};
template <class T>
struct Mined {
  std::vector<int64_t> begin, positive, negative;
  std::vector<T> ap, an;
  std::vector<uint8_t> fallback;
};

struct Call {  // a problem's input in memory and the arguments that do not depend on the output
  std::vector<char> x, ax;
  TripletArgs args{};
  explicit Call(const Problem& p) : x(stored(p.x, p.C, p)), ax(stored(p.ax, p.A, p)) {
    args.anchors = ax.data();
    args.candidates = x.data();
    args.anchor_labels = p.alabels.data();
    args.candidate_labels = p.labels.data();
    args.num_anchors = p.A;
    args.num_candidates = p.C;
    args.dim = p.D;
    args.anchor_stride = args.candidate_stride = p.D + p.pad;
    args.anchor_offset = p.offset;
    args.dtype = p.dtype;
    args.distance = p.distance;
    args.fallback = p.fallback;
    args.reduction = p.reduction;
    args.normalize = p.normalize;
    args.margin = p.margin;
    args.negatives = p.negatives;
    args.band = p.band;
    args.seed = &p.seed;
    args.constants = p.constants;
  }
  // In a workspace of exactly the size asked for, filled with a pattern: what is read before it is written shows.
  Status run(const Kernels& kernels, int threads) {
    args.num_threads = threads;
    const int64_t bytes = triplet_workspace_bytes(args);
    struct Free { void operator()(void* p) const { std::free(p); } };
    const std::unique_ptr<void, Free> workspace(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
    std::memset(workspace.get(), threads == 1 ? 0xFF : 0x3C, static_cast<size_t>(bytes));
    args.workspace = workspace.get();
    args.workspace_bytes = bytes;
    return args.dtype == DType::float64 ? kernels.run_double(args) : kernels.run_float(args);
  }
};

template <class T>
Loss<T> loss_of(const Kernels& kernels, const Problem& p, int threads, bool stats, bool gradient, bool anchor_gradient) {
  Call call(p);
  Loss<T> out;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  out.loss = 77;
  call.args.loss = &out.loss;
  if (gradient) {
    out.grad.assign(static_cast<size_t>((p.C - p.constants) * p.D), nan);
    call.args.grad_candidates = out.grad.data();
  }
  if (anchor_gradient && p.offset < 0) out.agrad.assign(static_cast<size_t>(p.A * p.D), nan), call.args.grad_anchors = out.agrad.data();
  if (stats) call.args.stat_counts = out.counts, call.args.stat_d2 = out.d2;
  call.run(kernels, threads);
  return out;
}

template <class T>
Mined<T> mined(const Kernels& kernels, const Problem& p, const std::vector<int64_t>& begin, int threads) {
  Call call(p);
  Mined<T> out;
  out.begin = begin;
  const size_t n = static_cast<size_t>(begin.back());
  // One more than there are pairs: no pointer is null, and the sentinel must survive.
  out.positive.assign(n + 1, -7), out.negative.assign(n + 1, -7);
  out.ap.assign(n + 1, -7), out.an.assign(n + 1, -7);
  out.fallback.assign(n + 1, 7);
  call.args.pair_begin = out.begin.data();
  call.args.positive = out.positive.data();
  call.args.negative = out.negative.data();
  call.args.d2_ap = out.ap.data();
  call.args.d2_an = out.an.data();
  call.args.is_fallback = out.fallback.data();
  call.run(kernels, threads);
  return out;
}

}  // namespace facenet_ext::cpu::testing
