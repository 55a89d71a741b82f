// Kernels on half precision as it is: products of two halves or bfloat16 are exact in float32, so one product serves.
#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {

Status launch_half(const TripletArgs& args) {
  return args.dtype == DType::float16 ? launch_kernel<Math::half, Half>(args, "triplet_kernel<half, float16>")
                                      : launch_kernel<Math::bfloat, Bfloat>(args, "triplet_kernel<bfloat, bfloat16>");
}

}  // namespace facenet_ext::cuda
