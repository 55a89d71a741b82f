// Kernels in float32 on CUDA cores, for devices older than sm_80, whose tensor cores lack the mma of the others.
#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {

Status launch_without_tensor_cores(const TripletArgs& args) {
  switch (args.dtype) {
    case DType::float32:
      return launch_kernel<Math::simt32, float>(args, "triplet_kernel<simt32, float32>");
    case DType::float16:
      return launch_kernel<Math::simt32, Half>(args, "triplet_kernel<simt32, float16>");
    case DType::bfloat16:
      return launch_kernel<Math::simt32, Bfloat>(args, "triplet_kernel<simt32, bfloat16>");
    default:
      return {Code::invalid, "launch_without_tensor_cores", "dtype is float64"};
  }
}

}  // namespace facenet_ext::cuda
