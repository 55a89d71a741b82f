// The kernel on half precision: products of two halves are exact in float32, so one product serves.
#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {

Status launch_half(const TripletArgs& args) {
  return launch_kernel<Math::half, Half>(args, "triplet_kernel<half>");
}

}  // namespace facenet_ext::cuda
