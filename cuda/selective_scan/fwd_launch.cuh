#pragma once

#include "../common/clear.h"
#include "../common/launch.h"
#include "fwd_kernel.cuh"

namespace statescan::selective_scan {

// `number`: of the call's launches that have turns.
template <class Policy, Pass kPass>
void launch_pass(Params params, int number, std::int64_t sequences, std::int64_t segments, Stream stream) {
  const std::int64_t warps = std::max<std::int64_t>(divide_up(params.piece, Policy::kStates), kRuns / kWarp);
  const int shared_bytes = 16 * (Storage<Policy>::kShared + static_cast<int>(warps) * Storage<Policy>::kPerWarp);
  const std::int64_t blocks = sequences * segments * params.blocks * params.links;
  params.turns += number * params.sequences * params.segments * params.blocks;
  if (blocks > 0)
    cuda::launch("selective_scan_forward_kernel", selective_scan_forward_kernel<Policy, kPass>,
                 {blocks, static_cast<int>(warps) * kWarp, shared_bytes}, stream, params);
}

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream) {
  if (dims.dim == 0) return;
  const Params params = params_of(args, dims);
  if (params.links > 1) cuda::clear(params.turns, kForwardPasses * turns_of(args, dims) * sizeof(*params.turns), stream);
  launch_pass<Policy, Pass::ends>(params, 0, params.sequences, params.segments - 1, stream);
  const std::int64_t tasks = params.sequences + (params.cu_seqlens ? 1 : 0);
  if (params.positions) launch_pass<Policy, Pass::positions>(params, 1, tasks, params.segments, stream);
  else launch_pass<Policy, Pass::output>(params, 1, tasks, params.segments, stream);
}

}  // namespace statescan::selective_scan
