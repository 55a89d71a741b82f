// No anchors, or no candidates: there is no pair, and everything is 0, unless the other set has an element that is not finite.
// A memory's first step is such a call, and must not hide what it starts with. Bytes: the rows once, the gradient once.
#pragma once

#include "problem.cuh"

namespace facenet_ext::cuda {

struct EmptyArgs {
  const void* x;  // [rows, dim] input type, rows `stride` elements apart: the set that is not empty
  int64_t rows, dim, stride;
  bool is_bfloat;
  void* loss;  // [] Acc, 0: NaN as soon as some block has met what is not finite
  void* gradient;  // [gradient_elements] Acc, or null
  int64_t gradient_elements;
  int64_t* stat_counts;  // [5], or null
  void* stat_d2;  // [3] Acc, likewise
};

template <class In, class Acc>
__global__ void __launch_bounds__(kThreads, 1) empty_kernel(const __grid_constant__ EmptyArgs e) {
  const int64_t own = int64_t(block_index()) * kThreads + thread_index(), step = int64_t(grid_size()) * kThreads;
  bool finite = true;
  for (int64_t i = own; i < e.rows * e.dim; i += step) {
    const Acc value = widen(static_cast<const In*>(e.x)[i / e.dim * e.stride + i % e.dim], e.is_bfloat);
    finite &= value - value == 0;
  }
  using Bits = decltype(ordered_bits(Acc(0)));
  if (!finite) atomic_max(static_cast<Bits*>(e.loss), ordered_bits(Acc(NAN)));
  grid_sync();
  const Acc value = from_ordered_bits(*static_cast<volatile Bits*>(e.loss));
  for (int64_t i = own; i < e.gradient_elements; i += step) static_cast<Acc*>(e.gradient)[i] = value;
  if (e.stat_counts == nullptr) return;
  if (own < 5) e.stat_counts[own] = 0;
  if (own < 3) static_cast<Acc*>(e.stat_d2)[own] = value;
}

template <class In, class Acc>
Status launch_empty(const TripletArgs& args) {
  if (args.loss == nullptr) return {};  // nothing to list
  const bool has_anchors = args.num_anchors > 0;  // rows of their own: without candidates none of them is one
  EmptyArgs e{};
  e.x = has_anchors ? args.anchors : args.candidates;
  e.rows = args.num_anchors + args.num_candidates;  // one of the two
  e.dim = args.dim;
  e.stride = has_anchors ? args.anchor_stride : args.candidate_stride;
  e.is_bfloat = args.dtype == DType::bfloat16;
  e.loss = args.loss;
  e.gradient = has_anchors ? args.grad_anchors : args.grad_candidates;
  e.gradient_elements = e.gradient == nullptr ? 0 : (e.rows - (has_anchors ? 0 : args.constants)) * args.dim;
  e.stat_counts = args.stat_counts;
  e.stat_d2 = args.stat_d2;
  const Status status = fill_zero(args.loss, sizeof(Acc), args.stream);
  if (status.code != Code::ok) return status;
  const int64_t work = divide_up(e.rows * e.dim + 1, kThreads);
  return launch_cooperative(empty_kernel<In, Acc>, "empty_kernel",
                            static_cast<unsigned>(work < args.multiprocessors ? work : args.multiprocessors), kThreads, 0,
                            args.stream, e);
}

}  // namespace facenet_ext::cuda
