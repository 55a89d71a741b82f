// Kernels on split floats: float32 input, and half precision that is normalised first, which leaves its own format.
#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {

Status launch_float32(const TripletArgs& args) {
  switch (args.dtype) {
    case DType::float32:
      return launch_kernel<Math::split, float>(args, "triplet_kernel<split, float32>");
    case DType::float16:
      return launch_kernel<Math::split, Half>(args, "triplet_kernel<split, float16>");
    case DType::bfloat16:
      return launch_kernel<Math::split, Bfloat>(args, "triplet_kernel<split, bfloat16>");
    default:
      return {Code::invalid, "launch_float32", "dtype is float64"};
  }
}

}  // namespace facenet_ext::cuda
