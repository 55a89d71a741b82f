// Python's way into csrc/triplet.h: integers in, a TripletArgs filled, the GIL released, a Status turned into an exception.
// No mathematics and no defaults: facenet_ext/_backend.py is the only caller and gives every field by name.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>

#include "triplet.h"

namespace py = pybind11;
using namespace facenet_ext;

namespace {

template <typename T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Asks Python whether a signal (Ctrl-C) is waiting. The kernels poll often and with the GIL released; taking it can cost a whole
// switch interval when another Python thread computes, so Python is asked at most every 20 ms.
struct SignalPoll {
  using Clock = std::chrono::steady_clock;
  Clock::time_point last = Clock::now();

  static bool interrupted(void* context) {
    auto& poll = *static_cast<SignalPoll*>(context);
    const Clock::time_point now = Clock::now();
    if (now - poll.last < std::chrono::milliseconds(20)) return false;
    poll.last = now;
    const PyGILState_STATE gil = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;  // runs the handler; KeyboardInterrupt stays set in this thread's state
    PyGILState_Release(gil);
    return raised;
  }
};

[[noreturn]] void raise(const Status& status) {
  if (status.code == Code::interrupted && PyErr_Occurred()) throw py::error_already_set();
  const std::string message = std::string(status.where) + ": " + status.what;
  if (status.code == Code::invalid) throw py::value_error(message);
  PyErr_SetString(PyExc_RuntimeError, message.c_str());
  throw py::error_already_set();
}

void put_options(TripletArgs& args, int32_t distance, int32_t fallback, int32_t reduction, bool normalize, double margin,
                 int32_t negatives, int32_t positives, int32_t pairs, bool soft_margin, double band, int64_t negatives_only) {
  args.distance = static_cast<Distance>(distance);
  args.fallback = static_cast<Fallback>(fallback);
  args.reduction = static_cast<Reduction>(reduction);
  args.normalize = normalize;
  args.margin = margin;
  args.negatives = static_cast<Negatives>(negatives);
  args.positives = static_cast<Positives>(positives);
  args.pairs = static_cast<PairOrder>(pairs);
  args.soft_margin = soft_margin;
  args.band = band;
  args.negatives_only = negatives_only;
}

int64_t workspace_bytes(bool on_cuda, int64_t num_anchors, int64_t num_candidates, int64_t dim, int64_t anchor_offset,
                        int32_t dtype, int32_t distance, int32_t fallback, int32_t reduction, bool normalize, double margin,
                        int32_t negatives, int32_t positives, int32_t pairs, bool soft_margin, double band,
                        int64_t negatives_only, int32_t num_threads, int32_t multiprocessors, int32_t compute_capability) {
  TripletArgs args{};
  put_options(args, distance, fallback, reduction, normalize, margin, negatives, positives, pairs, soft_margin, band,
              negatives_only);
  args.num_anchors = num_anchors;
  args.num_candidates = num_candidates;
  args.dim = dim;
  args.anchor_stride = dim;
  args.candidate_stride = dim;
  args.anchor_offset = anchor_offset;
  args.dtype = static_cast<DType>(dtype);
  args.num_threads = num_threads;
  args.multiprocessors = multiprocessors;
  args.compute_capability = compute_capability;
#ifdef FACENET_EXT_WITH_CUDA
  if (on_cuda) return cuda::triplet_workspace_bytes(args);
#else
  (void)on_cuda;
#endif
  return cpu::triplet_workspace_bytes(args);
}

// Parameters in the order of TripletArgs; shapes and meanings stand there.
void launch_triplet(bool on_cuda,
                    // inputs
                    std::uintptr_t anchors, std::uintptr_t candidates, std::uintptr_t anchor_labels,
                    std::uintptr_t candidate_labels,
                    // sizes
                    int64_t num_anchors, int64_t num_candidates, int64_t dim, int64_t anchor_stride, int64_t candidate_stride,
                    int64_t anchor_offset, int32_t dtype,
                    // options
                    int32_t distance, int32_t fallback, int32_t reduction, bool normalize, double margin, int32_t negatives,
                    int32_t positives, int32_t pairs, bool soft_margin, double band, int64_t negatives_only,
                    int64_t constants, std::uintptr_t seed,
                    // outputs of the loss
                    std::uintptr_t loss, std::uintptr_t grad_candidates, std::uintptr_t grad_anchors,
                    std::uintptr_t stat_counts, std::uintptr_t stat_d2,
                    // outputs of mining
                    std::uintptr_t pair_begin, std::uintptr_t positive, std::uintptr_t negative, std::uintptr_t d2_ap,
                    std::uintptr_t d2_an, std::uintptr_t is_fallback,
                    // resources
                    std::uintptr_t workspace, int64_t workspace_size, int32_t num_threads, std::uintptr_t stream,
                    int32_t multiprocessors, int32_t compute_capability) {
  TripletArgs args{};
  args.anchors = pointer(anchors);
  args.candidates = pointer(candidates);
  args.anchor_labels = pointer<const int64_t>(anchor_labels);
  args.candidate_labels = pointer<const int64_t>(candidate_labels);
  args.num_anchors = num_anchors;
  args.num_candidates = num_candidates;
  args.dim = dim;
  args.anchor_stride = anchor_stride;
  args.candidate_stride = candidate_stride;
  args.anchor_offset = anchor_offset;
  args.dtype = static_cast<DType>(dtype);
  put_options(args, distance, fallback, reduction, normalize, margin, negatives, positives, pairs, soft_margin, band,
              negatives_only);
  args.constants = constants;
  args.seed = pointer<const int64_t>(seed);
  args.loss = pointer(loss);
  args.grad_candidates = pointer(grad_candidates);
  args.grad_anchors = pointer(grad_anchors);
  args.stat_counts = pointer<int64_t>(stat_counts);
  args.stat_d2 = pointer(stat_d2);
  args.pair_begin = pointer<const int64_t>(pair_begin);
  args.positive = pointer<int64_t>(positive);
  args.negative = pointer<int64_t>(negative);
  args.d2_ap = pointer(d2_ap);
  args.d2_an = pointer(d2_an);
  args.is_fallback = pointer<uint8_t>(is_fallback);
  args.workspace = pointer(workspace);
  args.workspace_bytes = workspace_size;
  args.num_threads = num_threads;
  args.stream = pointer(stream);
  args.multiprocessors = multiprocessors;
  args.compute_capability = compute_capability;

  SignalPoll poll;
  Status status;
  {
    py::gil_scoped_release without_gil;
    if (on_cuda) {
#ifdef FACENET_EXT_WITH_CUDA
      status = cuda::launch_triplet(args);
#else
      status = {Code::unsupported, "launch_triplet", "built without CUDA: " FACENET_EXT_CUDA_REASON};
#endif
    } else {
      args.interrupted = SignalPoll::interrupted;
      args.interrupted_context = &poll;
      status = cpu::launch_triplet(args);
    }
  }
  if (status.code != Code::ok) raise(status);
}

py::dict build_info() {
  py::list isas;
  for (const char* const* name = cpu::isas(); *name; ++name) isas.append(*name);
  py::list archs;
  std::string names = FACENET_EXT_CUDA_ARCHS;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    archs.append(names.substr(begin, end - begin));
    begin = end + 1;
  }
  py::dict info;
  info["version"] = FACENET_EXT_VERSION;
#ifdef FACENET_EXT_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = archs;
  info["cuda_reason"] = FACENET_EXT_CUDA_REASON;
  info["cpu_isa"] = isas;
  info["compiler"] = FACENET_EXT_COMPILER;
  return info;
}

template <typename Enum>
void put(py::dict& names, const char* name, Enum value) {
  names[name] = static_cast<int32_t>(value);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // Names to the integers of triplet.h, so that no number stands in both languages.
  py::dict dtypes, distances, negatives, positives, pairs, fallbacks, reductions;
  put(dtypes, "float32", DType::float32);
  put(dtypes, "float64", DType::float64);
  put(dtypes, "bfloat16", DType::bfloat16);
  put(dtypes, "float16", DType::float16);
  put(distances, "sqeuclidean", Distance::sqeuclidean);
  put(distances, "euclidean", Distance::euclidean);
  put(distances, "cosine", Distance::cosine);
  put(negatives, "semi_hard", Negatives::semi_hard);
  put(negatives, "hard", Negatives::hard);
  put(negatives, "random_semi_hard", Negatives::random_semi_hard);
  put(negatives, "random_active", Negatives::random_active);
  put(negatives, "all", Negatives::all);
  put(negatives, "all_semi_hard", Negatives::all_semi_hard);
  put(positives, "all", Positives::all);
  put(positives, "hardest", Positives::hardest);
  put(positives, "easiest", Positives::easiest);
  put(pairs, "ordered", PairOrder::ordered);
  put(pairs, "unordered", PairOrder::unordered);
  put(fallbacks, "farthest", Fallback::farthest);
  put(fallbacks, "skip", Fallback::skip);
  put(reductions, "mean", Reduction::mean);
  put(reductions, "mean_active", Reduction::mean_active);
  put(reductions, "sum", Reduction::sum);
  m.attr("dtypes") = dtypes;
  m.attr("distances") = distances;
  m.attr("negatives") = negatives;
  m.attr("positives") = positives;
  m.attr("pairs") = pairs;
  m.attr("fallbacks") = fallbacks;
  m.attr("reductions") = reductions;

  m.def("build_info", &build_info);
  m.def("cpu_isa_active", [] { return std::string(cpu::isa()); });
  m.def("workspace_bytes", &workspace_bytes);
  m.def("launch_triplet", &launch_triplet);
}
