#pragma once

#include "general_launch.h"
#include "segment_kernel.cuh"
#include "stages.cuh"

namespace statescan::ssd_scan {

template <class Policy>
void launch_states(const StateArgs& args, const Dims& dims, Stream stream) {
  using Layout = SegmentLayout<Policy>;
  if (dims.num_sequences == 0 || dims.nheads == 0 || dims.headdim == 0 || dims.dstate == 0) return;
  Params params = main_params(args, dims, args.segments);
  const bool whole = args.segments.count == 1;
  const std::int64_t pieces = whole ? 1 : args.segments.states() - 1;  // what the last segment adds is of no use
  const SegmentWorkspace workspace(args.workspace.data, dims, args.segments);
  if (!whole) {  // pieces are this kernel's segments
    params.sequences.segments *= params.sequences.pieces, params.sequences.pieces = 1;
    params.start = {}, params.positions = {}, params.kept = {};
    params.final_state = segment_states(workspace, dims, args.segments);
    params.log2_decay = workspace.log2_decay;
  }
  params.tasks = tasks_of<Policy>(dims, pieces, Policy::kMaxHeads);
  const int stages = stages_of<Policy, Layout>(params.tasks.heads);
  cuda::launch("ssd_scan_states_kernel", ssd_scan_states_kernel<Policy>,
               {dims.num_sequences * pieces * params.tasks.tiles, Policy::kThreads, Layout::bytes(stages, params.tasks.heads)},
               stream, params, stages);
  if (whole) return;

  const std::int64_t tiles = divide_up(dims.headdim * dims.dstate, kCombineThreads);
  const CombineParams combine{state_view(args.initial_state),
                              workspace.states,
                              workspace.log2_decay,
                              dims.nheads,
                              dims.headdim,
                              dims.dstate,
                              static_cast<std::uint32_t>(args.segments.states()),
                              static_cast<std::uint32_t>(args.segments.pieces),
                              static_cast<std::uint32_t>(tiles)};
  cuda::launch("ssd_scan_segment_combine_kernel", ssd_scan_segment_combine_kernel,
               {dims.num_sequences * dims.nheads * tiles, kCombineThreads}, stream, combine);
}

}  // namespace statescan::ssd_scan
