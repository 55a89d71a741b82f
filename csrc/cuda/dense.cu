// Kernels of the rules that give every negative a term. The copy of the rows is in float or double whatever the input is, so
// one kernel serves float32, float16 and bfloat16.
#include "dense_kernel.cuh"

namespace facenet_ext::cuda {

Status launch_dense(const TripletArgs& args) {
  if (args.pair_begin != nullptr)
    return {Code::invalid, "launch_dense", "terms of every negative are not mined: the caller lists them"};
  if (args.soft_margin) return {Code::unsupported, "launch_dense", "soft_margin with a term for every negative"};
  if (args.dtype == DType::float64) return launch_dense_kernel<Math::simt64>(args, "dense_kernel<simt64>");
  if (args.compute_capability < 80) return launch_dense_kernel<Math::simt32>(args, "dense_kernel<simt32>");
  return launch_dense_kernel<Math::split>(args, "dense_kernel<split>");
}

int64_t dense_workspace_bytes(const TripletArgs& args) {
  DenseProblem<float> floats;
  DenseProblem<double> doubles;
  return args.dtype == DType::float64 ? make_dense<Math::simt64>(args, nullptr, doubles)
                                      : make_dense<Math::split>(args, nullptr, floats);
}

}  // namespace facenet_ext::cuda
