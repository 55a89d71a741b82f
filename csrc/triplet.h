// The contract of both backends: csrc/cpu and csrc/cuda implement exactly this header, and bindings.cpp calls nothing else.
//
// One problem: anchors [A, D] against candidates [C, D].
//
//   plain loss      anchors == candidates, A == C, anchor_offset = 0
//   one rank of W   anchors are rows offset .. offset + A of the gathered candidates
//   memory          anchors are no candidates at all: anchor_offset = -1
//
// For every ordered pair (anchor a, positive p) — equal labels, p is not a itself — the negative is the closest candidate n of
// another label with d2(a,n) > d2(a,p); of equally close ones that with the lowest index. Where there is none, `fallback`
// decides. The loss term is max(0, d(a,p) - d(a,n) + margin); see facenet_ext/functional.py for the whole semantics.
//
// Rules: pointers, sizes, strides and a stream only. Nothing here allocates, frees, throws or waits for a device; memory comes
// from the caller, sized by *_workspace_bytes, which looks at sizes alone (never at data), so that a CUDA graph can capture.
// T below is float for float32, bfloat16 and float16 input, double for float64. Strides are in elements, not bytes.
#pragma once

#include <cstdint>

namespace facenet_ext {

enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
enum class Distance : int32_t { sqeuclidean = 0, euclidean = 1 };  // what margin and loss are measured in
enum class Fallback : int32_t { farthest = 0, skip = 1 };          // no negative farther than the positive
enum class Reduction : int32_t { mean = 0, mean_active = 1, sum = 2 };

// What went wrong. Both strings have static storage.
enum class Code : int32_t { ok = 0, interrupted = 1, invalid = 2, unsupported = 3, cuda = 4 };
struct Status {
  Code code = Code::ok;
  const char* where = "";  // the function or kernel
  const char* what = "";   // the reason, e.g. cudaGetErrorString
};

struct TripletArgs {
  // inputs
  const void* anchors;              // [A, D] dtype, rows anchor_stride apart, contiguous inside a row
  const void* candidates;           // [C, D] dtype, rows candidate_stride apart, contiguous inside a row
  const int64_t* anchor_labels;     // [A]
  const int64_t* candidate_labels;  // [C]

  // sizes
  int64_t num_anchors;       // A >= 0
  int64_t num_candidates;    // C >= 0, below 2^31
  int64_t dim;               // D >= 1
  int64_t anchor_stride;     // >= D
  int64_t candidate_stride;  // >= D
  int64_t anchor_offset;     // anchor i is candidate anchor_offset + i (same row, same label); -1: anchors are no candidates
  DType dtype;

  // options
  Distance distance;
  Fallback fallback;
  Reduction reduction;
  bool normalize;  // rows are divided by max(norm, 1e-12) first; the gradient goes through that division
  double margin;   // >= 0, in the unit of `distance`

  // outputs of the loss; all null when mining
  void* loss;             // [] T
  void* grad_candidates;  // [C, D] T contiguous, d loss / d candidates (anchors that are candidates included), or null
  void* grad_anchors;     // [A, D] T contiguous, d loss / d anchors where anchor_offset = -1, else null; or null
  int64_t* stat_counts;   // [3] pairs, active, fallback; null: not asked for, and the selection may stop at the margin
  void* stat_d2;          // [3] T: mean d2_ap, mean d2_an, max d2_ap over the counted pairs; null exactly if stat_counts is

  // outputs of mining; all null for the loss. Pairs of anchor a stand at pair_begin[a] .. pair_begin[a + 1], in order of the
  // positive's index: A_p pairs where the anchor has positives and at least one negative, none otherwise (the caller counts
  // them from the labels). fallback = skip is ignored: the caller drops the pairs that carry the flag.
  const int64_t* pair_begin;  // [A + 1]
  int64_t* positive;          // [P] candidate index
  int64_t* negative;          // [P] candidate index
  void* d2_ap;                // [P] T, squared, direct form
  void* d2_an;                // [P] T, squared, direct form
  uint8_t* is_fallback;       // [P] 0 or 1

  // resources
  void* workspace;          // 64-byte aligned (256 on a GPU), at least *_workspace_bytes(args) bytes, contents irrelevant
  int64_t workspace_bytes;
  int32_t num_threads;              // CPU only, >= 1; the result does not depend on it
  bool (*interrupted)(void*);       // CPU only, or null: polled by the calling thread between tiles; true ends the call
  void* interrupted_context;
  void* stream;                     // CUDA only: cudaStream_t of the current device
  int32_t multiprocessors;          // CUDA only: of the current device, asked by the caller once
  int32_t compute_capability;       // CUDA only: 10 * major + minor
};

// A non-finite element anywhere in anchors or candidates makes loss, stat_d2 and every gradient element NaN and the counts 0.
// When mining, a NaN distance is never "farther than" anything and never the farthest while a finite one exists.

namespace cpu {
int64_t triplet_workspace_bytes(const TripletArgs& args);  // reads sizes, dtype and num_threads only
Status launch_triplet(const TripletArgs& args);            // runs to its end; `launch_` for symmetry with CUDA
const char* isa();         // the path in use: "avx512", "avx2" or "portable"
const char* const* isas();  // those compiled in and runnable on this machine, best first, null-terminated
}  // namespace cpu

#ifdef FACENET_EXT_WITH_CUDA
namespace cuda {
int64_t triplet_workspace_bytes(const TripletArgs& args);  // reads sizes, dtype and device facts only
Status launch_triplet(const TripletArgs& args);            // enqueues on args.stream and returns
}  // namespace cuda
#endif

}  // namespace facenet_ext
