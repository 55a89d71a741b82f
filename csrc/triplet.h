// The contract of both backends: csrc/cpu and csrc/cuda implement exactly this header, and bindings.cpp calls nothing else.
//
// One problem: anchors [A, D] against candidates [C, D].
//
//   plain loss      anchors == candidates, A == C, anchor_offset = 0
//   one rank of W   anchors are rows offset .. offset + A of the gathered candidates
//   memory          candidates are the batch, then earlier rows, the last `constants` of which have no gradient and the last
//                   `negatives_only` of which are never positives
//   foreign rows    anchors are no candidates at all: anchor_offset = -1
//
// Positives of anchor a: candidates of its label, not a itself; `positives` and `pairs` keep some of them. Negatives:
// candidates of another label; `negatives` says which of them make a term with (a, p). The term is max(0, d(a,p) - d(a,n) +
// margin), or log(1 + exp(d(a,p) - d(a,n))); see facenet_ext/functional.py for the whole semantics.
//
// Rules: pointers, sizes, strides and a stream only. Nothing here allocates, frees, throws or waits for a device; memory
// comes from the caller, sized by *_workspace_bytes, which looks at sizes alone (never at data), so that a CUDA graph can
// capture. T below is float for float32, bfloat16 and float16 input, double for float64. Strides are in elements, not bytes.
#pragma once

#include <cstdint>

namespace facenet_ext {

enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
enum class Distance : int32_t {  // d, what margin, band and loss are measured in
  sqeuclidean = 0,  // d2
  euclidean = 1,    // sqrt(d2)
  cosine = 2        // d2 / 2, which is 1 - cos because the caller sets `normalize`
};
// Which negatives of (a, p), g = d(a,n) - d(a,p). Distances are compared as d2 where only their order matters; ties go to the
// lowest index.
enum class Negatives : int32_t {
  semi_hard = 0,         // the closest with g > 0; `fallback` where there is none
  hard = 1,              // the closest
  random_semi_hard = 2,  // one of those with g in the band, drawn by `seed`; a pair that has none does not count
  random_active = 3,     // one of those with g < margin, drawn by `seed`; a pair that has none does not count
  all = 4,               // every one: a term each
  all_semi_hard = 5      // every one with g in the band: a term each
};
enum class Positives : int32_t { all = 0, hardest = 1, easiest = 2 };  // per anchor: each, the farthest, the closest
enum class PairOrder : int32_t {
  ordered = 0,
  unordered = 1
};  // unordered: positives of a higher index than the anchor's only
enum class Fallback : int32_t { farthest = 0, skip = 1 };  // no negative farther than the positive
enum class Reduction : int32_t { mean = 0, mean_active = 1, sum = 2 };

// What went wrong. Both strings have static storage.
enum class Code : int32_t { ok = 0, interrupted = 1, invalid = 2, unsupported = 3, cuda = 4 };
struct Status {
  Code code = Code::ok;
  const char* where = "";  // the function or kernel
  const char* what = "";  // the reason, e.g. cudaGetErrorString
};

struct TripletArgs {
  // inputs
  const void* anchors;  // [A, D] dtype, rows anchor_stride apart, contiguous inside a row
  const void* candidates;  // [C, D] dtype, rows candidate_stride apart, contiguous inside a row
  const int64_t* anchor_labels;  // [A]
  const int64_t* candidate_labels;  // [C]

  // sizes
  int64_t num_anchors;  // A >= 0
  int64_t num_candidates;  // C >= 0, below 2^31
  int64_t dim;  // D >= 1
  int64_t anchor_stride;  // >= D
  int64_t candidate_stride;  // >= D
  int64_t anchor_offset;  // anchor i is candidate anchor_offset + i (same row, same label); -1: anchors are no candidates
  DType dtype;

  // options
  Distance distance;
  Fallback fallback;
  Reduction reduction;
  bool normalize;  // rows are divided by max(norm, 1e-12) first; the gradient goes through that division
  double margin;  // >= 0, in the unit of `distance`
  Negatives negatives;
  Positives positives;
  PairOrder pairs;  // unordered: anchor_offset >= 0
  bool soft_margin;  // the second form of the term; `margin` still bounds the band and the statistics. One negative a pair
  double band;  // > 0: the band is 0 < g <= band; 0: it is 0 < g < margin
  int64_t
      negatives_only;  // the last so many candidates are nobody's positives: an anchor's own class there counts for nothing
  // The last so many candidates are constants: nobody asks for their gradient. 0 under the rules that give every negative a
  // term.
  int64_t constants;
  const int64_t* seed;  // [1] where the inputs are; random rules only. A draw depends on it and on indices, on nothing else

  // outputs of the loss; all null when mining
  void* loss;  // [] T
  // [C - constants, D] T contiguous, d loss / d candidates (anchors that are candidates included), or null
  void* grad_candidates;
  void* grad_anchors;  // [A, D] T contiguous, d loss / d anchors where anchor_offset = -1, else null; or null
  // [5] terms, active (loss > 0), fallback (pairs without a negative that the rule wants: terms if it is semi_hard and the
  // fallback farthest, else left out; 0 where every negative makes a term), hard (g <= 0), semi-hard (0 < g < margin); null:
  // not asked for, and the selection may stop at the margin
  int64_t* stat_counts;
  void* stat_d2;  // [3] T: mean d2_ap, mean d2_an, max d2_ap over the terms; null exactly if stat_counts is

  // outputs of mining, of one pair or more; all null for the loss. Pairs of anchor a stand at pair_begin[a] .. pair_begin[a +
  // 1], in order of the positive's index: as many as `positives` and `pairs` keep where the anchor has a negative, none
  // otherwise (the caller counts them from the labels). fallback = skip is ignored: the caller drops the pairs that carry the
  // flag. negatives = -1 and the flag: a random rule found none. Not for the rules that give every negative a term: the
  // caller lists those.
  const int64_t* pair_begin;  // [A + 1]
  int64_t* positive;  // [P] candidate index
  int64_t* negative;  // [P] candidate index
  void* d2_ap;  // [P] T, squared, direct form
  void* d2_an;  // [P] T, squared, direct form
  uint8_t* is_fallback;  // [P] 0 or 1

  // resources
  void* workspace;  // 64-byte aligned (256 on a GPU), at least *_workspace_bytes(args) bytes, contents irrelevant
  int64_t workspace_bytes;
  int32_t num_threads;  // CPU only, >= 1; the result does not depend on it
  bool (*interrupted)(void*);  // CPU only, or null: polled by the calling thread between tiles; true ends the call
  void* interrupted_context;
  void* stream;  // CUDA only: cudaStream_t of the current device
  int32_t multiprocessors;  // CUDA only: of the current device, asked by the caller once
  int32_t compute_capability;  // CUDA only: 10 * major + minor
};

// A non-finite element anywhere in anchors or candidates makes loss, stat_d2 and every gradient element NaN and the counts 0.
// When mining, a NaN distance is never "farther than" anything and never the farthest while a finite one exists.

namespace cpu {
int64_t triplet_workspace_bytes(const TripletArgs& args);  // reads sizes, dtype, options and num_threads only
Status launch_triplet(const TripletArgs& args);  // runs to its end; `launch_` for symmetry with CUDA
const char* isa();  // the path in use: "avx512", "avx2" or "portable"
const char* const* isas();  // those compiled in and runnable on this machine, best first, null-terminated
}  // namespace cpu

#ifdef FACENET_EXT_WITH_CUDA
namespace cuda {
int64_t triplet_workspace_bytes(const TripletArgs& args);  // reads sizes, dtype, options and device facts only
Status launch_triplet(const TripletArgs& args);  // enqueues on args.stream and returns
}  // namespace cuda
#endif

}  // namespace facenet_ext
