#pragma once

#include "general_kernel.cuh"
#include "general_launch.h"
#include "position_states.h"
#include "stages.cuh"

namespace statescan::ssd_scan {

template <class Policy>
void launch_general(const Args& args, const Dims& dims, Stream stream) {
  using Layout = GeneralLayout<Policy>;
  if (dims.nheads == 0 || dims.headdim == 0) return;
  const Segments segments = general_segments<Policy>(args, dims);
  const std::int64_t sequences = dims.num_sequences + (args.cu_seqlens ? 1 : 0);
  if (sequences == 0) return;
  if (segments.computed()) launch_states<Policy>({args, segments}, dims, stream);

  Params params = main_params(args, dims, segments);
  params.tasks = tasks_of<Policy>(dims, segments.count, most_heads<Policy, Layout>());
  params.tasks.sequences = static_cast<std::uint32_t>(sequences), params.tasks.segments_last = segments.handed_on;
  if (segments.handed_on)
    cuda::check(cudaMemsetAsync(params.done, 0, SegmentWorkspace::done_bytes(dims), static_cast<cudaStream_t>(stream)),
                "cudaMemsetAsync");
  const int stages = stages_of<Policy, Layout>(params.tasks.heads);
  cuda::launch("ssd_scan_general_kernel", ssd_scan_general_kernel<Policy>,
               {sequences * segments.count * params.tasks.tiles, Policy::kThreads, Layout::bytes(stages, params.tasks.heads)},
               stream, params, stages);
  if (args.state_positions)
    launch_position_states(args, dims, entries_of(args, dims, segments), Policy::kChunk, stream);
}

}  // namespace statescan::ssd_scan
