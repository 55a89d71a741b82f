// The kernel in float32 on CUDA cores, for devices older than sm_80, whose tensor cores lack the mma of the others.
#include "widen.cuh"

namespace facenet_ext::cuda {

Status launch_without_tensor_cores(const TripletArgs& args) {
  if (is_widened<Math::simt32>(args)) {
    const Status status = launch_widen<Math::simt32>(args);
    if (status.code != Code::ok) return status;
  }
  return launch_kernel<Math::simt32, float>(args, "triplet_kernel<simt32, float32>");
}

}  // namespace facenet_ext::cuda
