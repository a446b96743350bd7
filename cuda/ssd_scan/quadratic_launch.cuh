#pragma once

#include "general_launch.h"
#include "position_states.h"
#include "quadratic_kernel.cuh"
#include "stages.cuh"

namespace statescan::ssd_scan {

template <class Policy>
void launch_quadratic(const Args& args, const Dims& dims, Stream stream) {
  using Layout = GeneralLayout<Policy>;
  if (dims.nheads == 0 || dims.headdim == 0) return;
  const Segments whole{.count = 1, .chunk = Policy::kChunk};
  Params params = main_params(args, dims, whole);
  const std::int64_t sequences = dims.num_sequences + (args.cu_seqlens ? 1 : 0);
  params.tasks = tasks_of<Policy>(dims, sequences, 0, divide_up(dims.seqlen, Policy::kChunk), most_heads<Policy, Layout>());
  const std::int64_t blocks = sequences * params.tasks.end_segment * params.tasks.tiles;
  if (blocks > 0)
    cuda::launch("ssd_scan_quadratic_kernel", ssd_scan_quadratic_kernel<Policy>,
                 {blocks, Policy::kThreads, Layout::bytes(1, params.tasks.heads)}, stream, params);
  // After y: final_state may lie where initial_state does.
  if (args.final_state || args.state_positions || args.chunk_states) {
    Args states = args;
    states.y = {};
    launch_general<Policy>(states, dims, stream);
  }
  if (args.state_positions) launch_position_states(args, dims, entries_of(args, dims, whole), Policy::kChunk, stream);
}

}  // namespace statescan::ssd_scan
