#pragma once

#include "../common/launch.h"
#include "bwd_kernel.cuh"

namespace statescan::state_scan {

template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  const Layout layout = layout_of(args, dims);
  const Tasks tasks = layout.tasks(Policy::kThreads * Policy::kVector);
  const std::int64_t warps = warps_per_slice(dims, Policy::kDType);
  constexpr bool kCluster = Policy::kSums == Sums::cluster;
  float* const partial = args.dlog_decay && !kCluster ? static_cast<float*>(args.workspace.data) : nullptr;
  if (tasks.blocks() > 0) {
    const BackwardParams params{tasks,
                                layout.slice(),
                                layout.sequences(),
                                args.reverse,
                                layout.decay(args.log_decay),
                                layout.chunks(args.states),
                                layout.chunks(args.dstates),
                                layout.chunks(args.dupdate),
                                layout.state(args.dfinal_state),
                                layout.state(args.dinitial_state),
                                layout.decay(args.dlog_decay),
                                partial,
                                dims.nheads,
                                warps};
    cuda::LaunchShape shape{tasks.blocks(), Policy::kThreads};
    shape.early = true;
    if (kCluster) {
      shape.cluster = static_cast<int>(tasks.tiles);
      shape.shared_bytes = static_cast<int>(cluster_sums_bytes(dims));
    }
    cuda::launch("state_scan_backward_kernel", state_scan_backward_kernel<Policy>, shape, stream, params);
  }
  if (kCluster) return;
  const std::int64_t slices = dims.batch * dims.nchunks * dims.nheads;
  if (!args.dlog_decay || slices == 0) return;
  const DecayGradientParams params{layout.sequences(), layout.decay(args.log_decay), layout.decay(args.dlog_decay),
                                   partial, dims.nheads, warps, slices};
  cuda::launch("state_scan_decay_gradient_kernel", state_scan_decay_gradient_kernel,
               {.blocks = divide_up(slices, kDecayGradientThreads / kWarp), .threads = kDecayGradientThreads, .early = true}, stream,
               params);
}

}  // namespace statescan::state_scan
