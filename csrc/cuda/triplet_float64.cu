// The float64 kernel.
#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {

Status launch_float64(const TripletArgs& args) {
  return launch_kernel<Math::simt64, double>(args, "triplet_kernel<simt64, float64>");
}

}  // namespace facenet_ext::cuda
