#pragma once

#include "../common/launch.h"
#include "fwd_kernel.cuh"

namespace statescan::selective_scan {

template <class Policy, Pass kPass>
void launch_pass(const Params& params, std::int64_t sequences, std::int64_t segments, Stream stream) {
  const std::int64_t warps = std::max<std::int64_t>(divide_up(params.piece, Policy::kStates), kRuns / kWarp);
  const int shared_bytes = 16 * (Storage<Policy>::kShared + static_cast<int>(warps) * Storage<Policy>::kPerWarp);
  const std::int64_t blocks = sequences * segments * params.blocks;
  if (blocks > 0)
    cuda::launch("selective_scan_forward_kernel", selective_scan_forward_kernel<Policy, kPass>,
                 {blocks, static_cast<int>(warps) * kWarp, shared_bytes}, stream, params);
}

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream) {
  if (dims.dim == 0) return;
  const Params params = params_of(args, dims);
  launch_pass<Policy, Pass::ends>(params, params.sequences, params.segments - 1, stream);
  const std::int64_t tasks = params.sequences + (params.cu_seqlens ? 1 : 0);
  if (params.positions) launch_pass<Policy, Pass::positions>(params, tasks, params.segments, stream);
  else launch_pass<Policy, Pass::output>(params, tasks, params.segments, stream);
}

}  // namespace statescan::selective_scan
