// The one kernel: every phase of every pass, between grid barriers. See README.md for the way of the data.
#pragma once

#include "gradient.cuh"

namespace facenet_ext::cuda {

template <Math M, class In>
__global__ void __launch_bounds__(kThreads, 1) 
    triplet_kernel(const __grid_constant__ Problem<typename MathTraits<M>::Acc> p) {
  FACENET_EXT_SHARED_MEMORY(shared_memory);
  // The pass stands in shared memory, not in registers, which the products need; behind it the phases lay out what they use.
  Carver carver{shared_memory, 0, true};
  Pass& pass = *carver.take<Pass>(1);
  constexpr int kPassBytes = (sizeof(Pass) + 15) / 16 * 16 + kSharedRedzone;
  uint8_t* const scratch = shared_memory + kPassBytes;

  prepare<M, In>(p, scratch);
  grid_sync();  // positions, classes and operands of all rows
  const Facts facts = gather_facts(p, scratch);
  if (facts.has_nonfinite && !p.mining) {
    write_nan<In>(p);
    return;
  }
  if (thread_index() == 0) pass = first_pass(p, facts);

#pragma unroll 1
  for (;;) {
    __syncthreads();  // the pass stands
#pragma unroll 1
    for (;;) {
      visit_tiles<M>(p, pass, scratch);
      grid_sync();  // d2_ap; after round 0 the buckets' least distances; after the last all of best and farthest
      if (pass.task == MathTraits<M>::kRounds - 1) break;
      if (pass.task == kPositives) sort_thresholds(p, pass);
      grid_sync();  // thresholds, empty buckets; the block is done with pass.task
      if (thread_index() == 0) ++pass.task;
      __syncthreads();  // the next task stands
    }
    finish<In>(p, pass, scratch);
    grid_sync();  // coefficients, times_chosen, the counters that scale the gradient, loss_of_anchor
    if (p.wants_gradient) {
      reserve_lists(p);
      grid_sync();  // list_begin
      fill_lists(p, pass);
      grid_sync();  // list
      gather_gradients<In>(p, pass);
    }
    if (pass.is_last(p.anchors.count)) break;
    grid_sync();  // all are done with the slots, and the block with the pass
    if (thread_index() == 0) pass.advance(p.anchors.count);
  }
  if (p.mining) return;
  __syncthreads();  // shared memory is free
  write_loss(p, scratch);
}

// Bytes of shared memory, with as many buckets per anchor as a block may have.
template <Math M>
int64_t shared_bytes(int32_t* shared_slots) {
  using Acc = typename MathTraits<M>::Acc;
  const auto bytes = [](int32_t slots) {
    Carver carver{nullptr, 0, true};
    carver.take<Pass>(1);
    carve_tile<Acc>(carver, slots);
    return carver.used;
  };
  const int64_t limit = max_shared_bytes();
  int32_t slots = 0;
  if (M != Math::simt64) {
    while (slots < 64 && bytes(slots + 1) <= limit) ++slots;
  }
  *shared_slots = slots;
  return bytes(slots);  // of all phases the tiles take most: write_loss() has 24 bytes per thread, prepare() less
}

template <Math M, class In>
Status launch_kernel(const TripletArgs& args, const char* name) {
  Problem<typename MathTraits<M>::Acc> problem;
  const int64_t bytes = make_problem<M>(args, static_cast<uint8_t*>(args.workspace), problem);
  if (args.workspace_bytes < bytes) return {Code::invalid, name, "workspace smaller than triplet_workspace_bytes"};
  const int64_t shared = shared_bytes<M>(&problem.shared_slots);
  // One block per multiprocessor: all are resident, as a cooperative launch demands. Small problems take fewer.
  const int64_t units = divide_up(args.num_candidates, kUnit) + (problem.plain ? 0 : divide_up(args.num_anchors, kUnit));
  const int64_t tiles = divide_up(args.num_anchors, kSide) * divide_up(args.num_candidates, kSide);
  const int64_t work = units > tiles ? units : tiles;
  const int64_t blocks = work < args.multiprocessors ? work : args.multiprocessors;
  return launch_cooperative(triplet_kernel<M, In>, name, static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared),
                            args.stream, problem);
}

// Each is defined in the .cu file that compiles its kernels, so that they compile in parallel.
Status launch_float32(const TripletArgs& args);   // also half precision that is normalised first
Status launch_half(const TripletArgs& args);      // float16 and bfloat16
Status launch_float64(const TripletArgs& args);
Status launch_without_tensor_cores(const TripletArgs& args);  // every type but float64

}  // namespace facenet_ext::cuda
