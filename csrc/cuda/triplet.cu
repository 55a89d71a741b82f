// The CUDA side of triplet.h: sizes the workspace, picks the kernel.
#include "empty.cuh"
#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {
namespace {

// Half precision that is not normalised is multiplied as it is; everything else of it is widened to floats.
bool multiplies_halves(const TripletArgs& args) {
  return (args.dtype == DType::float16 || args.dtype == DType::bfloat16) && !args.normalize;
}

// A term for every negative: kernels of their own.
bool is_dense(const TripletArgs& args) {
  return args.negatives == Negatives::all || args.negatives == Negatives::all_semi_hard;
}

bool has_tensor_cores(const TripletArgs& args) { return args.compute_capability >= 80; }

template <Math M>
int64_t bytes_with(const TripletArgs& args) {
  Problem<typename MathTraits<M>::Acc> unused;
  return make_problem<M>(args, nullptr, unused);
}

}  // namespace

int64_t triplet_workspace_bytes(const TripletArgs& args) {
  if (args.num_anchors == 0 || args.num_candidates == 0) return 0;
  if (is_dense(args)) return dense_workspace_bytes(args);
  const int64_t bytes = args.dtype == DType::float64 ? bytes_with<Math::simt64>(args)
                        : multiplies_halves(args) && has_tensor_cores(args) ? bytes_with<Math::half>(args)
                                                                            : bytes_with<Math::split>(args);
  const bool plain = args.num_anchors == args.num_candidates && args.anchor_offset == 0;
  const int64_t rows = args.num_candidates + (plain ? 0 : args.num_anchors);
  const int64_t promised = 24 * rows * args.dim + 1024 * rows;
  return bytes <= promised ? bytes : -1;  // -1 never happens: tests/emulated walks the sizes
}

Status launch_triplet(const TripletArgs& args) {
  const char* const name = "cuda::launch_triplet";
  if (args.num_candidates >= INT32_MAX || args.num_anchors >= INT32_MAX) {
    return {Code::unsupported, name, "2^31 rows or more"};
  }
  if (args.dim < 1 || args.dim >= INT32_MAX / 8) return {Code::unsupported, name, "rows of no or of 2^28 elements"};
  const int64_t longest = args.num_anchors > args.num_candidates ? args.num_anchors : args.num_candidates;
  if (longest * ((args.dim * 8 + 63) / 64) >= int64_t(1) << 30)
    return {Code::unsupported, name, "rows of 64 GB in all or more"};
  if (args.multiprocessors < 1) return {Code::invalid, name, "multiprocessors is not set"};
  if (args.compute_capability < 75) return {Code::unsupported, name, "the device is older than compute capability 7.5"};

  if (args.anchor_offset >= 0 && args.anchor_offset + args.num_anchors > args.num_candidates)
    return {Code::invalid, name, "anchors are no rows of the candidates"};
  if (args.constants < 0 || args.constants > args.num_candidates || (is_dense(args) && args.constants > 0))
    return {Code::invalid, name, "constants are some of the candidates, and none under a rule of every negative"};

  if (args.num_anchors == 0 || args.num_candidates == 0) {
    switch (args.dtype) {
      case DType::float64: return launch_empty<double, double>(args);
      case DType::float32: return launch_empty<float, float>(args);
      default: return launch_empty<Half, float>(args);
    }
  }
  if (is_dense(args)) return launch_dense(args);
  if (args.dtype == DType::float64) return launch_float64(args);
  if (!has_tensor_cores(args)) return launch_without_tensor_cores(args);
  return multiplies_halves(args) ? launch_half(args) : launch_float32(args);
}

}  // namespace facenet_ext::cuda
