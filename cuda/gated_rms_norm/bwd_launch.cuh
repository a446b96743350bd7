#pragma once

#include "../common/shares.cuh"
#include "bwd_kernel.cuh"
#include "fwd_launch.cuh"

namespace statescan::gated_rms_norm {

template <class Policy>
void launch_backward(const GradientArgs& args, const Dims& dims, Stream stream) {
  if (dims.dim == 0) return;
  const Layout layout(args, dims, {&args.x, &args.z, &args.dy, &args.dx, &args.dz});
  BackwardParams params{};
  params.rows = layout.rows();
  params.shares = shares_of_rows(dims);
  params.x = layout.view(args.x);
  params.z = layout.view(args.z);
  params.weight = layout.view(args.weight);
  params.dy = layout.view(args.dy);
  params.dx = layout.view(args.dx);
  params.dz = layout.view(args.dz);
  params.end = args.end;
  params.x_exponents = args.x_exponents;
  if (args.dweight) params.partial = static_cast<float*>(args.workspace.data);

  const std::int64_t teams = params.shares * params.rows.groups;
  const auto launch = [&](auto kernel, std::int64_t blocks, int threads) {
    if (blocks == 0) return;
    cuda::launch("gated_rms_norm_backward_kernel", kernel, {.blocks = blocks, .threads = threads, .early = true}, stream,
                 params);
  };
  const auto threads_of = [&](int held) {
    return static_cast<int>(std::min<std::int64_t>(divide_up(dims.group_size, kWarp * held) * kWarp, backward_threads(held)));
  };
  const int many = threads_of(kManyHeld);
  params.rows.chunks = divide_up(dims.group_size, many * kManyHeld);
  if (dims.group_size <= kWarp * kFewHeld)
    launch(gated_rms_norm_backward_kernel<Policy, Team::warp, kFewHeld>, divide_up(teams, Policy::kSmallThreads / kWarp),
           Policy::kSmallThreads);
  else if (backward_held(dims) == kFewHeld)
    launch(gated_rms_norm_backward_kernel<Policy, Team::block, kFewHeld>, teams, threads_of(kFewHeld));
  else if (params.rows.chunks == 1) launch(gated_rms_norm_backward_kernel<Policy, Team::block, kManyHeld>, teams, many);
  else launch(gated_rms_norm_backward_kernel<Policy, Team::chunked_block, kManyHeld>, teams, many);
  if (!args.dweight) return;
  const View dweight = layout.view(args.dweight);
  cuda::launch_sum_shares({params.partial, params.shares, dims.dim, 1, {}, {dweight.data, dweight.dtype, dweight.column, 0}},
                          stream);
}

}  // namespace statescan::gated_rms_norm
