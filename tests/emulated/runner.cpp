// Runs cases through csrc/triplet.h. Reads them from a file, writes the outputs to another; test_*.py makes the cases and knows
// the right answers. Every array is an allocation of its own, exactly as large as the contract says, so that AddressSanitizer
// sees each access beyond it; outputs and workspace are filled with a pattern before.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulated_cuda.h"
#include "triplet.h"

namespace fe = facenet_ext;

namespace {

struct Header {  // as struct.pack in emulation.py writes it
  int64_t anchors, candidates, dim, anchor_stride, candidate_stride, offset, dtype, distance, fallback, reduction, normalize;
  int64_t want_grad_candidates, want_grad_anchors, want_stats, mining, pairs, multiprocessors, capability, schedule, seed;
  int64_t late_copies, shared_kib, negatives, positives, pair_order, negatives_only, soft_margin, draw_seed;
  int64_t constants;
  double margin, band;
};

std::FILE* in;
std::FILE* out;

void* read_array(int64_t bytes) {
  void* memory = malloc(bytes > 0 ? size_t(bytes) : 1);
  if (bytes > 0 && fread(memory, 1, size_t(bytes), in) != size_t(bytes)) {
    fprintf(stderr, "runner: the case file ends early\n");
    exit(2);
  }
  return memory;
}
void* output(int64_t bytes, bool wanted, uint64_t seed) {
  if (!wanted) return nullptr;
  uint8_t* memory = static_cast<uint8_t*>(malloc(bytes > 0 ? size_t(bytes) : 1));
  for (int64_t i = 0; i < bytes; ++i) memory[i] = uint8_t(0x51 * (i + 1) + seed * 29);
  emu::fresh(memory, bytes);
  return memory;
}
void write_and_free(void* memory, int64_t bytes) {
  if (memory != nullptr && bytes > 0) fwrite(memory, 1, size_t(bytes), out);
  free(memory);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: runner CASES RESULTS\n");
    return 2;
  }
  in = fopen(argv[1], "rb");
  out = fopen(argv[2], "wb");
  if (in == nullptr || out == nullptr) return 2;
  Header h;
  while (fread(&h, sizeof h, 1, in) == 1) {
    const int64_t element = h.dtype == 0 ? 4 : h.dtype == 1 ? 8 : 2, scalar = h.dtype == 1 ? 8 : 4;
    const bool same = h.anchors == h.candidates && h.offset == 0;
    void* candidates = read_array(h.candidates > 0 ? ((h.candidates - 1) * h.candidate_stride + h.dim) * element : 0);
    void* candidate_labels = read_array(h.candidates * 8);
    void* anchors = same ? candidates : read_array(h.anchors > 0 ? ((h.anchors - 1) * h.anchor_stride + h.dim) * element : 0);
    void* anchor_labels = same ? candidate_labels : read_array(h.anchors * 8);
    void* pair_begin = h.mining ? read_array((h.anchors + 1) * 8) : nullptr;

    fe::TripletArgs args{};
    args.anchors = anchors;
    args.candidates = candidates;
    args.anchor_labels = static_cast<int64_t*>(anchor_labels);
    args.candidate_labels = static_cast<int64_t*>(candidate_labels);
    args.num_anchors = h.anchors;
    args.num_candidates = h.candidates;
    args.dim = h.dim;
    args.anchor_stride = h.anchor_stride;
    args.candidate_stride = h.candidate_stride;
    args.anchor_offset = h.offset;
    args.dtype = fe::DType(h.dtype);
    args.distance = fe::Distance(h.distance);
    args.fallback = fe::Fallback(h.fallback);
    args.reduction = fe::Reduction(h.reduction);
    args.normalize = h.normalize != 0;
    args.margin = h.margin;
    args.negatives = fe::Negatives(h.negatives);
    args.positives = fe::Positives(h.positives);
    args.pairs = fe::PairOrder(h.pair_order);
    args.soft_margin = h.soft_margin != 0;
    args.band = h.band;
    args.negatives_only = h.negatives_only;
    args.constants = h.constants;
    int64_t* draw_seed = static_cast<int64_t*>(malloc(8));
    *draw_seed = h.draw_seed;
    args.seed = draw_seed;
    args.loss = output(scalar, !h.mining, 1);
    const int64_t grad_candidates = (h.candidates - h.constants) * h.dim * scalar;
    args.grad_candidates = output(grad_candidates, h.want_grad_candidates, 2);
    args.grad_anchors = output(h.anchors * h.dim * scalar, h.want_grad_anchors, 3);
    args.stat_counts = static_cast<int64_t*>(output(40, h.want_stats, 4));
    args.stat_d2 = output(3 * scalar, h.want_stats, 5);
    args.pair_begin = static_cast<int64_t*>(pair_begin);
    args.positive = static_cast<int64_t*>(output(h.pairs * 8, h.mining, 6));
    args.negative = static_cast<int64_t*>(output(h.pairs * 8, h.mining, 7));
    args.d2_ap = output(h.pairs * scalar, h.mining, 8);
    args.d2_an = output(h.pairs * scalar, h.mining, 9);
    args.is_fallback = static_cast<uint8_t*>(output(h.pairs, h.mining, 10));
    args.multiprocessors = int32_t(h.multiprocessors);
    args.compute_capability = int32_t(h.capability);
    args.workspace_bytes = fe::cuda::triplet_workspace_bytes(args);
    if (args.workspace_bytes < 0) {
      fprintf(stderr, "runner: the workspace is larger than promised\n");
      return 3;
    }
    args.workspace = nullptr;
    if (posix_memalign(&args.workspace, 256, size_t(args.workspace_bytes)) != 0) return 2;
    for (int64_t i = 0; i < args.workspace_bytes; ++i) {
      static_cast<uint8_t*>(args.workspace)[i] = uint8_t(i * 37 + h.seed * 101);
    }
    emu::fresh(args.workspace, args.workspace_bytes);

    emu::config.schedule = emu::Schedule(h.schedule);
    emu::config.seed = uint64_t(h.seed);
    emu::config.late_copies = h.late_copies != 0;
    emu::config.max_shared_bytes = h.shared_kib * 1024;
    const fe::Status status = fe::cuda::launch_triplet(args);
    emu::forget();
    if (status.code != fe::Code::ok) {
      fprintf(stderr, "runner: %s: %s\n", status.where, status.what);
      return 4;
    }
    fwrite(&args.workspace_bytes, 8, 1, out);
    write_and_free(args.loss, scalar);
    write_and_free(args.grad_candidates, grad_candidates);
    write_and_free(args.grad_anchors, h.anchors * h.dim * scalar);
    write_and_free(args.stat_counts, 40);
    write_and_free(args.stat_d2, 3 * scalar);
    write_and_free(args.positive, h.pairs * 8);
    write_and_free(args.negative, h.pairs * 8);
    write_and_free(args.d2_ap, h.pairs * scalar);
    write_and_free(args.d2_an, h.pairs * scalar);
    write_and_free(args.is_fallback, h.pairs);
    fflush(out);  // whoever waits at the other end of a pipe has this case's results
    free(args.workspace);
    free(draw_seed);
    free(candidates);
    free(candidate_labels);
    if (!same) free(anchors);
    if (!same) free(anchor_labels);
    free(pair_begin);
  }
  fclose(in);
  return fclose(out) == 0 ? 0 : 2;
}
