#pragma once

#include "../common/launch.h"
#include "fwd_kernel.cuh"

namespace statescan::selective_scan {

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream) {
  if (dims.dim == 0) return;
  const Params params = params_of(args, dims);
  const std::int64_t warps = std::max<std::int64_t>(divide_up(params.piece, Policy::kStates), kRuns / kWarp);
  const int threads = static_cast<int>(warps) * kWarp;
  const int shared_bytes = 4 * (Storage<Policy>::kShared + static_cast<int>(warps) * Storage<Policy>::kPerWarp);
  if (params.segments > 1)
    cuda::launch("selective_scan_forward_kernel", selective_scan_forward_kernel<Policy, true>,
                 {params.sequences * (params.segments - 1) * params.blocks, threads, shared_bytes}, stream, params);
  const std::int64_t tasks = params.sequences + (params.cu_seqlens ? 1 : 0);
  if (tasks > 0)
    cuda::launch("selective_scan_forward_kernel", selective_scan_forward_kernel<Policy, false>,
                 {tasks * params.segments * params.blocks, threads, shared_bytes}, stream, params);
}

}  // namespace statescan::selective_scan
