// Half precision that is to be normalised, or that meets no tensor cores, leaves its format: its rows become floats once, so
// that one kernel serves every type. 6 bytes of memory traffic an element.
#pragma once

#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {

struct WidenArgs {
  const uint16_t* from;  // [rows, dim], rows `stride` elements apart
  float* to;             // [rows, dim]
  int64_t stride;
  int64_t rows;
  int64_t dim;
  bool is_bfloat;
};

static __global__ void __launch_bounds__(kThreads, 1) widen_kernel(const __grid_constant__ WidenArgs w) {
  const int64_t elements = w.rows * w.dim;
  for (int64_t i = int64_t(block_index()) * kThreads + thread_index(); i < elements; i += int64_t(grid_size()) * kThreads) {
    w.to[i] = widen(Half{w.from[i / w.dim * w.stride + i % w.dim]}, w.is_bfloat);
  }
}

// Fills what make_problem<M>() laid out for the rows of half precision.
template <Math M>
Status launch_widen(const TripletArgs& args) {
  const char* const name = "widen_kernel";
  Problem<float> p;
  if (args.workspace_bytes < make_problem<M>(args, static_cast<uint8_t*>(args.workspace), p))
    return {Code::invalid, name, "workspace smaller than triplet_workspace_bytes"};
  const auto launch = [&](const Rows<float>& rows, const void* from, int64_t stride) {
    const WidenArgs w{static_cast<const uint16_t*>(from), static_cast<float*>(const_cast<void*>(rows.x)), stride, rows.count,
                      p.dim, p.is_bfloat};
    const int64_t work = divide_up(w.rows * w.dim, kThreads);
    const int64_t blocks = work < args.multiprocessors ? work : args.multiprocessors;
    return launch_cooperative(widen_kernel, name, static_cast<unsigned>(blocks), kThreads, 0, args.stream, w);
  };
  const Status status = launch(p.candidates, args.candidates, args.candidate_stride);
  if (status.code != Code::ok || p.plain) return status;
  return launch(p.anchors, args.anchors, args.anchor_stride);
}

}  // namespace facenet_ext::cuda
