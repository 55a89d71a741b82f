// The one kernel: every phase of every pass, between grid barriers. See README.md for the way of the data.
#pragma once

#include "slices.cuh"

namespace facenet_ext::cuda {

// The launcher sends no device from sm_80 on to a kernel of simt32: empty there, for compiling costs half a minute each.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
template <Math M>
constexpr bool kIsCompiled = true;
#else
template <Math M>
constexpr bool kIsCompiled = M != Math::simt32;
#endif

template <Math M, class In>
__device__ __forceinline__ void run_phases(const Problem<typename MathTraits<M>::Acc>& p) {
  using Acc = typename MathTraits<M>::Acc;
  constexpr bool kSlices = std::is_same<In, float>::value;
  FACENET_EXT_SHARED_MEMORY(shared_memory);
  // The pass stands in shared memory, not in registers, which the products need; behind it the phases lay out what they use.
  Carver carver{shared_memory, 0, true};
  BlockState& block = *carver.take<BlockState>(1);
  Pass& pass = block.pass;
  constexpr int kStateBytes = (sizeof(BlockState) + 15) / 16 * 16 + kSharedRedzone;
  uint8_t* const scratch = shared_memory + kStateBytes;

  LabelTable labels;
  const bool has_counted = prepare<M, In>(p, scratch, labels);
  grid_arrive(&block.ticket);  // positions, classes and operands of all rows
  clear_counters(p);
  TileShared<Acc> tile;
  // A block that has counted all labels knows the first pass and its own first tile while it waits for the others.
  const bool is_counted = kHasTable<M> && has_counted;
  if (is_counted) {
    if (thread_index() < 32) {
      const int32_t most = count_positives(p, 0, largest_class(labels));
      if (thread_index() == 0) pass = first_pass(p, most);
    }
    __syncthreads();  // the pass stands, the labels have been read
    tile = lay_out_tile(p, pass, scratch);
    begin_sweep(p, pass, tile);
    if (pass.in_shared) empty_buckets(p, pass);
  }
  bool has_buckets = is_counted;  // those of the pass are empty, where they will be in shared memory
  grid_wait(&block.ticket);
  bool is_sent = is_counted && tile.cursor->row >= 0;
  const bool has_edge = is_sent && thread_index() < 2 * kSide;
  EdgeRow<Acc> edge;
  if (is_sent && has_edge) edge = load_edge_of_tile(p, tile);
  if (thread_index() / 32 == kWarps - 1) {  // of 16 warps the last has no edge to load
    const EdgeRow<Acc> row = load_first_row(p);
    const Facts facts = gather_facts(p);
    if (thread_index() % 32 == 0) {
      if (!is_counted) pass = first_pass(p, facts.max_positives);
      pass.scale(facts);
      block.is_nan = facts.has_nonfinite && !p.mining;
    }
    if (!is_counted) {
      __syncwarp();  // the pass stands for this warp
      tile = lay_out_tile(p, pass, scratch);
    }
    store_first_row(row, facts.max_exponent, tile);
  }
  if (is_sent) {
    address_tile(p, tile, *tile.cursor);
    send_tile(p, layout_of(p, pass), tile);
  }
  __syncthreads();  // the pass stands
  if (block.is_nan) {
    cp_async_wait<0>();
    write_nan(p);
    return;
  }
  if (!is_counted) tile = lay_out_tile(p, pass, scratch);
  if (has_edge) store_edge_of_tile(edge, pass.max_exponent, tile);

#pragma unroll 1
  for (;;) {
    if (pass.in_shared && !has_buckets) empty_buckets(p, pass);
    has_buckets = false;
    find_thresholds<M>(p, pass, tile);
    grid_arrive(&block.ticket);  // d2_ap, thresholds, empty buckets; the sweep waits once it has products to compare
#pragma unroll 1
    for (int round = 0; round < MathTraits<M>::kRounds; ++round) {
      if (round > 0) grid_sync();  // the buckets' least distances
      if (!is_sent) {
        begin_sweep(p, pass, tile);
        if (tile.cursor->row >= 0) open_tile(p, layout_of(p, pass), pass.max_exponent, tile);
      }
      is_sent = false;
      sweep<M>(p, pass, round, &block.ticket, tile);
    }
    grid_arrive(&block.ticket);  // best and farthest
    __syncthreads();  // the block is done with the sweep's memory
    const bool is_last = pass.is_last(p.anchors.count);
    // Columns of X for phase 5, on their way while phase 4 runs; then nobody needs other passes.
    Carver later{scratch, 0, true};
    const SliceShared slice = carve_slice(later, p.candidates.count, p.slice_lanes, p.slice_helpers);
    Counted<Acc> counted = finish<In>(p, pass, &block.ticket, *slice.totals, [&] {
      if constexpr (kSlices) {
        if (pass.sliced) fetch_first_slice(p, slice.x);
      }
    });
    if (!pass.sliced) counted.store(p, *slice.totals);
    grid_arrive(&block.ticket);  // coefficients and lists; where there is no barrier to come, the counters too
    if (pass.sliced) counted.store(p, *slice.totals);
    [[maybe_unused]] const auto facts_of_rows = [&] {
      if constexpr (kSlices) return RowsOfPhase5{ListedRow(p, first_listed()), first_gathered(p)};
      else return 0;
    }();
    grid_wait(&block.ticket);
    if (is_last && !p.mining && !pass.sliced) write_loss(p, slice.sums);
    if (p.wants_gradient) {
      if constexpr (kSlices) {
        if (pass.sliced && order_lists(p, pass, facts_of_rows.listed)) {
          grid_arrive(&block.ticket);  // lists, weights and counters, for gather_slices(), which waits where it needs them
          if (p.slice_lanes == 8) gather_slices<8>(p, pass, &block.ticket, slice, facts_of_rows.gathered);
          else if (p.slice_lanes == 4) gather_slices<4>(p, pass, &block.ticket, slice, facts_of_rows.gathered);
          else gather_slices<2>(p, pass, &block.ticket, slice, facts_of_rows.gathered);
          write_loss(p, slice.sums);
          return;
        }
        cp_async_wait<0>();
        __syncthreads();  // nothing arrives in the memory any more that gather_gradients() lays out anew
      }
      const bool overflow = p.counters->list_overflows != 0;  // the same for all blocks
      if (overflow) {
        reserve_lists(p);
        grid_sync();  // list_begin; nobody reads the lists that finish() began
        fill_lists(p, pass);
        grid_sync();  // list
        if (pass.sliced) write_loss(p, slice.sums);
      }
      gather_gradients<In>(p, pass, overflow, scratch);
    }
    if (is_last) return;
    grid_sync();  // all are done with the slots, and the block with the pass
    if (thread_index() == 0) pass.advance(p.anchors.count);
    __syncthreads();  // the next pass stands
    tile = lay_out_tile(p, pass, scratch);  // other phases had the memory
  }
}

template <Math M, class In>
__global__ void __launch_bounds__(kThreads, 1)
    triplet_kernel(const __grid_constant__ Problem<typename MathTraits<M>::Acc> p) {
  if constexpr (kIsCompiled<M>) run_phases<M, In>(p);
}

// Bytes of shared memory, each layout with as many buckets per anchor as a block may have. has_more: some block has more than
// one tile.
template <Math M>
int64_t choose_shared(Problem<typename MathTraits<M>::Acc>& p, bool has_more) {
  using Acc = typename MathTraits<M>::Acc;
  const auto state = [] {
    Carver carver{nullptr, 0, true};
    carver.take<BlockState>(1);
    return carver;
  };
  const int64_t limit = max_shared_bytes();
  const int32_t most = M == Math::simt64 ? 0 : min(kMaxSharedSlots, kWarpSort), whole = p.pitch / kStageBytes;
  int layouts = 0;
  int64_t tile_bytes = 0;
  const auto add = [&](int32_t group, int32_t stages, bool apart) {
    RingLayout layout{group, stages, apart, most};
    const auto bytes = [&] {
      Carver carver = state();
      carve_tile<Acc, sizeof(Acc) == 4>(carver, layout);
      return carver.used;
    };
    while (layout.slots > 0 && bytes() > limit) --layout.slots;
    if (bytes() > limit) return;
    tile_bytes = max(tile_bytes, bytes());
    p.layouts[layouts++] = layout;
  };
  for (const bool apart : {true, false}) {
    if (M == Math::simt64 || (apart && !has_more)) continue;
    if (whole <= kMostStages) add(whole, whole, apart);
    add(2, 6, apart);
  }
  add(1, kStages, false);
  while (layouts < kLayouts) p.layouts[layouts] = p.layouts[layouts - 1], ++layouts;
  return max(tile_bytes, choose_table<M>(p, state().used, limit));  // other phases take less; for slices see below
}

template <Math M, class In>
Status launch_kernel(const TripletArgs& args, const char* name) {
  Problem<typename MathTraits<M>::Acc> problem;
  const int64_t bytes = make_problem<M>(args, static_cast<uint8_t*>(args.workspace), problem);
  if (args.workspace_bytes < bytes) return {Code::invalid, name, "workspace smaller than triplet_workspace_bytes"};
  const int64_t blocks = share_rows(args, problem);
  const int64_t down = divide_up(args.num_anchors, kSide), along = divide_up(args.num_candidates, kSide);
  const bool has_more = (problem.plain ? down * (down + 1) / 2 : down * along) > blocks;
  int64_t shared = choose_shared<M>(problem, has_more);
  if constexpr (std::is_same<In, float>::value) {
    int64_t slice_bytes = 0;
    choose_slice(args, problem, blocks, max_shared_bytes(), &slice_bytes);
    if (slice_bytes > shared) shared = slice_bytes;
  }
  return launch_cooperative(triplet_kernel<M, In>, name, static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared),
                            args.stream, problem);
}

// Each is defined in the .cu file that compiles its kernels, so that they compile in parallel.
Status launch_float32(const TripletArgs& args);   // and widened rows
Status launch_half(const TripletArgs& args);      // float16 and bfloat16
Status launch_float64(const TripletArgs& args);
Status launch_without_tensor_cores(const TripletArgs& args);  // float32 and widened rows
Status launch_dense(const TripletArgs& args);  // a term for every negative: all types and devices
int64_t dense_workspace_bytes(const TripletArgs& args);

}  // namespace facenet_ext::cuda
