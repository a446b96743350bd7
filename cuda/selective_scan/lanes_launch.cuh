#pragma once

#include "../common/clear.h"
#include "../common/launch.h"
#include "lanes_kernel.cuh"

namespace statescan::selective_scan {

// `params`: of a call that suits_lanes. Pass::output, or Pass::checkpoints or Pass::segments for the backward, both with 8
// states a lane.
template <class Policy, Pass kPass>
void launch_lanes_pass(const Params& params, const LanesPlan& plan, Stream stream) {
  const bool clears = kPass == Pass::output && params.cu_seqlens;  // what lies past the last packed token
  const std::int64_t blocks = plan.tasks * plan.links + (clears ? params.blocks : 0);
  const auto launch = [&]<int states> {
    if (blocks > 0)
      cuda::launch("selective_scan_lanes_kernel", selective_scan_lanes_kernel<Policy, states, kPass>,
                   {blocks, kLaneThreads, Lanes<Policy, states, kPass>::kBytes}, stream, params);
  };
  if (kPass != Pass::output || plan.states == 8) launch.template operator()<8>();
  else if constexpr (kPass == Pass::output) launch.template operator()<2>();
}

template <class Policy>
void launch_lanes(const Args& args, const Dims& dims, Stream stream) {
  const Params params = params_of(args, dims);
  const LanesPlan plan = lanes_plan(args, dims);
  if (plan.links > 1) cuda::clear(params.turns, plan.tasks * sizeof(*params.turns), stream);
  launch_lanes_pass<Policy, Pass::output>(params, plan, stream);
}

}  // namespace statescan::selective_scan
