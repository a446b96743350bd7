#pragma once

#include "../common/launch.h"
#include "fwd_kernel.cuh"

namespace statescan::state_scan {

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream) {
  const Layout layout = layout_of(args, dims);
  const Tasks tasks = layout.tasks(Policy::kThreads * Policy::kVector);
  if (tasks.blocks() == 0) return;
  const ForwardParams params{tasks, layout.slice(), layout.sequences(), args.reverse, layout.decay(args.log_decay),
                             layout.chunks(args.update), layout.chunks(args.states), layout.state(args.initial_state),
                             layout.state(args.final_state)};
  cuda::launch("state_scan_forward_kernel", state_scan_forward_kernel<Policy>,
               {.blocks = tasks.blocks(), .threads = Policy::kThreads, .early = true}, stream, params);
}

}  // namespace statescan::state_scan
