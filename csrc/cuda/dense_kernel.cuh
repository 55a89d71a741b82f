// The kernel of the rules that give every negative a term, and its launcher. See README.md for the way of the data.
#pragma once

#include "dense_finish.cuh"
#include "triplet_kernel.cuh"

namespace facenet_ext::cuda {

template <Math M>
__global__ void __launch_bounds__(kThreads, 1)
    dense_kernel(const __grid_constant__ DenseProblem<typename MathTraits<M>::Acc> p) {
  if constexpr (kIsCompiled<M>) {
    using Acc = typename MathTraits<M>::Acc;
    FACENET_EXT_SHARED_MEMORY(shared_memory);
    // The pass stands in shared memory, not in registers, which the products need; behind it the phases lay out what they
    // use.
    Carver carver{shared_memory, 0, true};
    DensePass<Acc>& pass = *carver.take<DensePass<Acc>>(1);
    constexpr int kPassBytes = (sizeof(DensePass<Acc>) + 15) / 16 * 16 + kSharedRedzone;
    uint8_t* const scratch = shared_memory + kPassBytes;

    survey_rows(p, scratch);
    grid_sync();  // norms, radius
    copy_rows(p, scratch);
    grid_sync();  // the copy
    LabelTable labels;
    prepare<M, Acc>(p.side[0], scratch, labels);
    grid_sync();  // positions, classes and operands of all rows
    const Facts facts = gather_facts(p.side[0]);
    if (facts.has_nonfinite) {
      write_nan(p.side[0]);
      return;
    }
    if (thread_index() == 0) pass = first_dense_pass(p, facts);

#pragma unroll 1
    for (;;) {
      __syncthreads();  // the pass stands
      place_thresholds<M>(p, pass, scratch);
      grid_sync();  // d2_ap, thresholds, who is kept, empty histograms, zero sums
      sweep_every<M>(p, pass, scratch);
      grid_sync();  // histograms, partial sums
      count_terms(p, pass, scratch);
      grid_sync();  // coefficients, the totals that scale the gradient, loss_of_anchor
      collect_gradient(p, pass);
      if (pass.is_last(p.side[0].anchors.count)) break;
      grid_sync();  // all are done with the slots, and the block with the pass
      if (thread_index() == 0) pass.advance(p.side[0].anchors.count);
    }
    write_totals(p, scratch);
  }
}

// Of the workspace: all that is promised. What the rows leave of it goes to the pool, to slots and partial sums.
inline int64_t dense_bytes(const TripletArgs& args) {
  const bool plain = args.num_anchors == args.num_candidates && args.anchor_offset == 0;
  const int64_t rows = args.num_candidates + (plain ? 0 : args.num_anchors);
  return 24 * rows * args.dim + 1024 * rows;
}

// Lays the workspace out from `base` (null: only to see that it is enough). Returns its bytes, or -1.
template <Math M>
int64_t make_dense(const TripletArgs& args, uint8_t* base, DenseProblem<typename MathTraits<M>::Acc>& p) {
  using Acc = typename MathTraits<M>::Acc;
  Carver carver{base};
  Problem<Acc>& q = p.side[0];
  q = {};
  lay_out_sizes<M>(args, q);
  q.normalize = false;  // the copy is what it should be
  p.source[0] = {args.candidates, args.candidate_stride, carver.take<Acc>(args.num_candidates)};
  p.source[1] = p.source[0];
  lay_out_rows(carver, q, q.candidates, carver.take<Acc>(args.num_candidates * args.dim), args.candidate_labels, args.dim,
               args.num_candidates, args.grad_candidates, sizeof(Acc));
  if (q.plain) {
    q.anchors = q.candidates;
  } else {
    p.source[1] = {args.anchors, args.anchor_stride, carver.take<Acc>(args.num_anchors)};
    lay_out_rows(carver, q, q.anchors, carver.take<Acc>(args.num_anchors * args.dim), args.anchor_labels, args.dim,
                 args.num_anchors, args.grad_anchors, sizeof(Acc));
  }
  q.loss_of_anchor = carver.take<double>(args.num_anchors);
  q.sum_d2_ap = carver.take<double>(args.num_anchors);
  q.sum_d2_an = carver.take<double>(args.num_anchors);
  lay_out_facts(carver, args, q);
  p.kept_begin = carver.take<int32_t>(args.num_anchors);
  p.kept_end = carver.take<int32_t>(args.num_anchors);
  p.count = carver.take<int32_t>(args.num_anchors);
  p.highest = carver.take<Acc>(args.num_anchors);
  p.chosen = carver.take<int32_t>(args.num_anchors);
  p.negative_sums = carver.take<double>(2 * kMaxChunks * args.num_anchors);
  p.radius = carver.take<uint64_t>(divide_up(args.num_candidates + (q.plain ? 0 : args.num_anchors), kRowsPerBlock));
  p.totals = carver.take<DenseTotals>(1);
  p.pool = carver.take<uint8_t>(0);
  p.pool_bytes = dense_bytes(args) - carver.used;
  const int64_t rows = args.num_candidates + (q.plain ? 0 : args.num_anchors);
  const int64_t least = 4 * int64_t(sizeof(Acc)) * (args.num_candidates + 3) + rows * args.dim * int64_t(sizeof(Acc));

  q.loss = args.loss;
  q.stat_counts = args.stat_counts;
  q.stat_d2 = args.stat_d2;
  p.side[1] = q;
  p.side[1].anchors = q.candidates;
  p.side[1].candidates = q.anchors;
  p.side[1].anchors_are_candidates = false;
  p.multiplies[0] = (args.anchor_offset >= 0 ? args.grad_candidates : args.grad_anchors) != nullptr;
  p.multiplies[1] = !q.plain && args.grad_candidates != nullptr;
  p.dtype = args.dtype;
  p.normalize = args.normalize;
  p.euclidean = args.distance == Distance::euclidean;
  p.stats = args.stat_counts != nullptr;
  p.unordered = args.pairs == PairOrder::unordered;
  p.above = args.negatives == Negatives::all_semi_hard;
  p.closed = p.above && args.band > 0;
  p.positives = args.positives;
  p.reduction = args.reduction;
  p.eligible = static_cast<int32_t>(args.num_candidates - args.negatives_only);
  p.unit = args.distance == Distance::cosine ? 0.5 : 1;
  p.margin = args.margin / p.unit;
  p.band = args.band / p.unit;
  return p.pool_bytes >= least ? dense_bytes(args) : -1;
}

// Bytes of shared memory, with as many thresholds per anchor as a block may have.
template <Math M>
int64_t choose_dense_shared(DenseProblem<typename MathTraits<M>::Acc>& p) {
  using Acc = typename MathTraits<M>::Acc;
  const auto state = [] {
    Carver carver{nullptr, 0, true};
    carver.take<DensePass<Acc>>(1);
    return carver;
  };
  const auto bytes = [&](int32_t slots) {
    Carver carver = state();
    carve_sweep<Acc>(carver, slots);
    return carver.used;
  };
  const int64_t limit = max_shared_bytes();
  p.shared_slots = 0;
  while (p.shared_slots < 64 && bytes(p.shared_slots + 1) <= limit) ++p.shared_slots;
  return max(bytes(p.shared_slots), choose_table<M>(p.side[0], state().used, limit));  // other phases take less
}

template <Math M>
Status launch_dense_kernel(const TripletArgs& args, const char* name) {
  DenseProblem<typename MathTraits<M>::Acc> problem;
  const int64_t bytes = make_dense<M>(args, static_cast<uint8_t*>(args.workspace), problem);
  if (bytes < 0 || args.workspace_bytes < bytes)
    return {Code::invalid, name, "workspace smaller than triplet_workspace_bytes"};
  const int64_t shared = choose_dense_shared<M>(problem);
  const int64_t blocks = share_rows(args, problem.side[0]);
  return launch_cooperative(dense_kernel<M>, name, static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared),
                            args.stream, problem);
}

}  // namespace facenet_ext::cuda
