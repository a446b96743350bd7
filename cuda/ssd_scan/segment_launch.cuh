#pragma once

#include "general_launch.h"
#include "segment_kernel.cuh"
#include "stages.cuh"

namespace statescan::ssd_scan {

template <class Policy>
void launch_states(const StateArgs& args, const Dims& dims, Stream stream) {
  using Layout = SegmentLayout<Policy>;
  if (dims.num_sequences == 0 || dims.dstate == 0) return;
  const Segments& segments = args.segments;
  const std::int64_t pieces = segments.states() - 1, first = segments.passing == Passing::beside ? 1 : 0;
  // What the last segment adds is of no use.
  Params params = main_params(args, dims, segments);
  params.sequences.segments *= segments.pieces, params.sequences.pieces = 1;  // pieces are this kernel's segments
  params.tasks = tasks_of<Policy>(dims, dims.num_sequences, first, pieces, Policy::kMaxHeads);
  const int heads = static_cast<int>(params.tasks.heads), stages = stages_of<Policy, Layout>(heads);
  cuda::LaunchShape shape{dims.num_sequences * (pieces - first) * params.tasks.tiles, Policy::kThreads,
                          Layout::bytes(stages, heads)};
  shape.early = first > 0;
  cuda::launch("ssd_scan_states_kernel", ssd_scan_states_kernel<Policy>, shape, stream, params, stages);

  if (first > 0) return;  // the output adds them up
  const std::int64_t tiles = divide_up(dims.headdim * dims.dstate, kCombineThreads);
  const SegmentWorkspace workspace(args.workspace.data, dims, segments);
  const CombineParams combine{state_view(args.initial_state),
                              workspace.states,
                              workspace.log2_decay,
                              dims.nheads,
                              dims.headdim,
                              dims.dstate,
                              static_cast<std::uint32_t>(segments.states()),
                              static_cast<std::uint32_t>(segments.pieces),
                              static_cast<std::uint32_t>(tiles)};
  cuda::LaunchShape of_combine{dims.num_sequences * dims.nheads * tiles, kCombineThreads};
  of_combine.early = starts_early();
  cuda::launch("ssd_scan_segment_combine_kernel", ssd_scan_segment_combine_kernel, of_combine, stream, combine);
}

}  // namespace statescan::ssd_scan
