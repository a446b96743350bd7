#pragma once

#include "../common/device.h"
#include "../common/launch.h"
#include "../common/tma.h"
#include "short_kernel.cuh"
#include "short_plan.h"

namespace statescan::ssd_scan {

template <class Policy>
void launch_short(const Args& args, const Dims& d, Stream stream) {
  const ShortPlan plan = short_plan(d);
  if (plan.packets == 0) return;
  const auto i32 = [](std::int64_t v) { return static_cast<int>(v); };
  ShortParams p{};
  p.x = cuda::tma_map(args.x, kShortTokens), p.B = cuda::tma_map(args.B, kShortTokens);
  p.C = cuda::tma_map(args.C, kShortTokens), p.y = cuda::tma_map(args.y);
  p.has_z = static_cast<bool>(args.z);
  if (p.has_z) p.z = cuda::tma_map(args.z);
  p.dt = step_view(args.dt), p.A = head_view(args.A), p.dt_bias = head_view(args.dt_bias), p.D = head_view(args.D);
  p.dt_softplus = args.dt_softplus;
  p.dt_min = static_cast<float>(args.dt_min), p.dt_max = static_cast<float>(args.dt_max);
  p.seqlen = i32(d.seqlen), p.headdim = i32(d.headdim);
  p.slices = i32(plan.slices), p.slices_of_group = i32(plan.slices_of_group);
  p.packets_of_group = i32(plan.packets_of_group), p.groups = i32(d.ngroups), p.packets = i32(plan.packets);
  const std::int64_t blocks = std::min<std::int64_t>(plan.packets, cuda::multiprocessors(args.x.device.index));
  cuda::launch("ssd_scan_short_kernel", ssd_scan_short_kernel<Policy>,
               {blocks, Policy::kThreads, sizeof(short_rows::SharedStorage<Policy>)}, stream, p);
}

}  // namespace statescan::ssd_scan
