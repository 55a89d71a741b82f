// The kernel on split floats: float32 input, and half precision that is normalised first, which leaves its own format.
#include "widen.cuh"

namespace facenet_ext::cuda {

Status launch_float32(const TripletArgs& args) {
  if (is_widened<Math::split>(args)) {
    const Status status = launch_widen<Math::split>(args);
    if (status.code != Code::ok) return status;
  }
  return launch_kernel<Math::split, float>(args, "triplet_kernel<split, float32>");
}

}  // namespace facenet_ext::cuda
