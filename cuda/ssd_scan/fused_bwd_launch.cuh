#pragma once

#include <utility>

#include "bwd_sums_launch.cuh"
#include "fused_bwd_kernel.cuh"
#include "fused_bwd_walk_kernel.cuh"
#include "fused_launch.cuh"

namespace statescan::ssd_scan {

template <class Policy>
void launch_fused_backward(const BackwardArgs& args, const Dims& d, const FusedBackwardPlan& plan, Stream stream) {
  FusedBackwardParams p{};
  p.x = cuda::tma_map(args.x), p.dy = cuda::tma_map(args.dy);
  p.has_dx = static_cast<bool>(args.dx);
  if (p.has_dx) p.dealt_dx = cuda::tma_map(args.dx, 8);
  p.B = cuda::tma_map(args.B), p.C = cuda::tma_map(args.C);
  p.dealt_x = cuda::tma_map(args.x, 8), p.dealt_B = cuda::tma_map(args.B, 8);
  const std::int64_t dt_size = size_of(args.dt.dtype);
  p.dt = {static_cast<const char*>(args.dt.data), args.dt.dtype, args.dt.stride[0] * dt_size, args.dt.stride[1] * dt_size,
          args.dt.stride[2] * dt_size};
  p.A = head_view(args.A), p.dt_bias = head_view(args.dt_bias), p.D = head_view(args.D);
  p.initial_state = state_view(args.initial_state), p.dfinal_state = state_view(args.dfinal_state);
  p.dinitial_state = state_view(args.dinitial_state);
  p.has_chunk_states = static_cast<bool>(args.chunk_states);
  if (p.has_chunk_states) p.chunk_states = cuda::tma_map(chunk_states_of(args.chunk_states));
  p.stretches = p.has_chunk_states ? static_cast<unsigned>(d.nstretches) : 1;
  if (args.ddt) {
    const std::int64_t size = size_of(args.ddt.dtype);
    p.ddt = static_cast<char*>(args.ddt.data), p.ddt_dtype = args.ddt.dtype;
    p.ddt_batch = args.ddt.stride[0] * size, p.ddt_token = args.ddt.stride[1] * size, p.ddt_head = args.ddt.stride[2] * size;
  }
  p.dt_softplus = args.dt_softplus;
  p.dt_min = static_cast<float>(args.dt_min), p.dt_max = static_cast<float>(args.dt_max);
  p.seqlen = d.seqlen;
  p.batch = static_cast<int>(d.batch), p.nheads = static_cast<int>(d.nheads), p.headdim = static_cast<int>(d.headdim);
  p.ngroups = static_cast<int>(d.ngroups), p.dstate = static_cast<int>(d.dstate), p.chunks = static_cast<int>(plan.chunks);
  p.pairs = static_cast<int>(plan.pairs);
  p.slices = static_cast<int>(plan.slices), p.heads_per_group = static_cast<int>(d.nheads / d.ngroups);
  p.splits = static_cast<int>(plan.splits);
  p.has_dB = static_cast<bool>(args.dB), p.has_dC = static_cast<bool>(args.dC);
  if (p.has_dB) p.dB = cuda::tma_map(args.dB);
  if (p.has_dC) p.dC = cuda::tma_map(args.dC);

  auto* memory = static_cast<char*>(args.workspace.data);
  const auto take = [&](std::size_t bytes) {
    char* const first = memory;
    memory += bytes;
    return first;
  };
  char* const states = take(plan.states_bytes);
  char* const adjoints = take(plan.states_bytes);
  for (std::uint8_t** exponents : {&p.state_exponents, &p.adjoint_exponents})
    *exponents = reinterpret_cast<std::uint8_t*>(take(plan.exponents_bytes));
  for (WalkSteps** steps : {&p.first_steps, &p.second_steps}) *steps = reinterpret_cast<WalkSteps*>(take(plan.steps_bytes));
  if (plan.sums_in_memory) {
    p.dB_sums = reinterpret_cast<float4*>(take(plan.sums_bytes));
    p.dC_sums = reinterpret_cast<float4*>(take(plan.sums_bytes));
  }
  for (float** shares : {&p.dA_shares, &p.ddt_bias_shares, &p.dD_shares})
    *shares = reinterpret_cast<float*>(take(plan.shares_bytes));

  const std::int64_t multiprocessors = cuda::multiprocessors(args.x.device.index);
  // A kernel's blocks take their places while the one ahead of it ends; the first of all has a stranger ahead of it.
  bool early = false;
  const auto launch = [&](const char* name, auto kernel, std::int64_t blocks, int threads, int bytes, const auto& params) {
    cuda::LaunchShape shape{blocks, threads, bytes};
    shape.early = std::exchange(early, true);
    cuda::launch(name, kernel, shape, stream, params);
  };
  const auto gradient = [](const Tensor& t) -> GradientView {
    if (!t) return {};
    const std::int64_t size = size_of(t.dtype);
    return {static_cast<char*>(t.data), t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
  };
  for (std::int64_t i = 0; i < plan.parts; ++i) {
    p.part = plan.part(d, i);
    p.keeps_sums = plan.splits > 1 || !p.part.is_last;
    const std::int64_t slots = p.part.batches * plan.chunks, items = p.part.total();
    const auto kept = [&](void* data) {  // [pairs, rows, items, states], as boxes of rows and states find them
      const std::int64_t pairs = p.part.batches * plan.pairs;
      Tensor t = Tensor::contiguous(data, args.x.dtype, {pairs, items, kFusedTile, Policy::kState}, args.x.device);
      std::swap(t.shape[1], t.shape[2]), std::swap(t.stride[1], t.stride[2]);
      return cuda::tma_map(t);
    };
    p.kept_items = static_cast<int>(items);
    p.states = kept(states), p.adjoints = kept(adjoints);
    p.items_of_walk = items_of_walk(p.part.batches * items);
    p.walks_per_group = static_cast<int>(divide_up(p.part.items, p.items_of_walk));
    p.walks = static_cast<unsigned>(p.part.batches * p.walks_per_group * p.part.groups);
    launch("ssd_scan_fused_walk_kernel", ssd_scan_fused_walk_kernel<Policy>,
           std::min(std::int64_t{p.walks} * (1 + p.stretches), multiprocessors), 128 * fused::kWalkWarpgroups,
           sizeof(fused::WalkStorage<Policy>), p);
    p.tasks = static_cast<unsigned>(slots * p.part.groups * plan.splits);
    launch("ssd_scan_fused_gradient_kernel", ssd_scan_fused_gradient_kernel<Policy>,
           std::min(std::int64_t{p.tasks}, multiprocessors), 128 * fused::kGradientWarpgroups,
           sizeof(fused::GradientStorage<Policy>), p);
    if (plan.splits == 1 || !p.part.ends_batches) continue;
    const FusedSplitSumParams sums{
        p.dB_sums, p.dC_sums, gradient(args.dB), gradient(args.dC), d.seqlen, p.part.first_batch, static_cast<int>(slots),
        p.chunks,  p.ngroups, p.splits,          p.dstate};
    launch("ssd_scan_fused_split_sum_kernel", fused::ssd_scan_fused_split_sum_kernel<Policy>, 8 * slots * d.ngroups,
           fused::kWarpgroup, 0, sums);
  }
  Sequences sequences{};
  sequences.count = d.batch, sequences.seqlen = d.seqlen, sequences.segments = 1, sequences.chunk = kFusedTile;
  launch_chunk_sums({sequences,
                     {chunk_sum(p.dA_shares, args.dA, 1), chunk_sum(p.ddt_bias_shares, args.ddt_bias, 1),
                      chunk_sum(p.dD_shares, args.dD, 1)}},
                    stream);
}

}  // namespace statescan::ssd_scan
