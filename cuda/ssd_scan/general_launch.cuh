#pragma once

#include <utility>

#include "general_kernel.cuh"
#include "general_launch.h"
#include "position_states.h"
#include "stages.cuh"

namespace statescan::ssd_scan {

template <class Policy>
void launch_general(const Args& args, const Dims& dims, Stream stream) {
  using Layout = GeneralLayout<Policy>;
  if (dims.nheads == 0 || dims.headdim == 0) return;
  const Segments segments = args.y ? general_segments<Policy>(args, dims) : Segments{.chunk = Policy::kChunk};
  const std::int64_t sequences = dims.num_sequences + (args.cu_seqlens && args.y ? 1 : 0);
  if (sequences == 0) return;
  const auto launch = [&](Params params, std::int64_t first, std::int64_t end, bool early) {
    params.tasks = tasks_of<Policy>(dims, sequences, first, end, most_heads<Policy, Layout>());
    const int heads = static_cast<int>(params.tasks.heads), stages = stages_of<Policy, Layout>(heads);
    cuda::LaunchShape shape{sequences * (end - first) * params.tasks.tiles, Policy::kThreads, Layout::bytes(stages, heads)};
    shape.early = early;
    cuda::launch("ssd_scan_general_kernel", ssd_scan_general_kernel<Policy>, shape, stream, params, stages);
  };

  Params params = main_params(args, dims, segments);
  if (segments.passing == Passing::handed_on)
    cuda::check(cudaMemsetAsync(params.done, 0, SegmentWorkspace::done_bytes(dims), static_cast<cudaStream_t>(stream)),
                "cudaMemsetAsync");
  std::int64_t begun = 0;
  if (segments.passing == Passing::beside) {
    Params first = params;
    first.final_state = params.between, first.final_state.sequence *= std::exchange(first.places, 0);
    launch(first, 0, ++begun, false);
  }
  if (segments.computed()) launch_states<Policy>({args, segments}, dims, stream);
  if (segments.passing == Passing::combined) params.log2_decay = nullptr;
  launch(params, begun, segments.count, segments.computed() && starts_early());
  if (args.state_positions && args.y)
    launch_position_states(args, dims, entries_of(args, dims, segments), Policy::kChunk, stream);
}

}  // namespace statescan::ssd_scan
