#pragma once

#include "general_launch.h"
#include "segment_kernel.cuh"
#include "stages.cuh"

namespace statescan::ssd_scan {

template <class Policy>
void launch_segment_starts(const SegmentArgs& args, const Dims& dims, Stream stream) {
  using Layout = SegmentLayout<Policy>;
  if (dims.num_sequences == 0 || dims.nheads == 0 || dims.headdim == 0 || dims.dstate == 0) return;
  Params params = params_of(args, dims, args.segments);
  params.final_state = segment_states(args.workspace, dims, args.segments);
  params.log2_decay = args.workspace.log2_decay;
  params.tasks = tasks_of<Policy>(dims, args.segments.count - 1, Policy::kMaxHeads);
  const int stages = stages_of<Policy, Layout>(params.tasks.heads);
  cuda::launch("ssd_scan_segment_states_kernel", ssd_scan_segment_states_kernel<Policy>,
               {dims.num_sequences * (args.segments.count - 1) * params.tasks.tiles, Policy::kThreads,
                Layout::bytes(stages, params.tasks.heads)},
               stream, params, stages);

  const std::int64_t tiles = divide_up(dims.headdim * dims.dstate, kCombineThreads);
  const CombineParams combine{state_view(args.initial_state),
                              args.workspace.states,
                              args.workspace.log2_decay,
                              dims.nheads,
                              dims.headdim,
                              dims.dstate,
                              static_cast<std::uint32_t>(args.segments.count),
                              static_cast<std::uint32_t>(tiles)};
  cuda::launch("ssd_scan_segment_combine_kernel", ssd_scan_segment_combine_kernel,
               {dims.num_sequences * dims.nheads * tiles, kCombineThreads}, stream, combine);
}

template <class Policy>
void launch_position_states(const PositionArgs& args, const Dims& dims, Stream stream) {
  using Layout = SegmentLayout<Policy>;
  if (dims.num_sequences == 0 || dims.npositions == 0) return;
  Params params = main_params(args, dims, args.segments);
  params.positions = positions_of(args, dims);
  params.tasks = tasks_of<Policy>(dims, params.sequences.segments, Policy::kMaxHeads);
  const int stages = stages_of<Policy, Layout>(params.tasks.heads);
  cuda::launch("ssd_scan_position_states_kernel", ssd_scan_position_states_kernel<Policy>,
               {dims.num_sequences * params.sequences.segments * params.tasks.tiles, Policy::kThreads,
                Layout::bytes(stages, params.tasks.heads)},
               stream, params, stages);
  const OutsideParams outside{params.positions, params.sequences, state_view(args.initial_state),
                              dims.nheads,      dims.headdim,     dims.dstate};
  cuda::launch("ssd_scan_outside_positions_kernel", ssd_scan_outside_positions_kernel,
               {dims.num_sequences * dims.npositions * dims.nheads, kOutsideThreads}, stream, outside);
}

}  // namespace statescan::ssd_scan
