#pragma once

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
  if (p.has_dx) p.dx = cuda::tma_map(args.dx);
  p.B = cuda::tma_map(args.B), p.C = cuda::tma_map(args.C);
  const std::int64_t dt_size = size_of(args.dt.dtype);
  p.dt = {static_cast<const char*>(args.dt.data), args.dt.dtype, args.dt.stride[0] * dt_size, args.dt.stride[1] * dt_size,
          args.dt.stride[2] * dt_size};
  p.A = head_view(args.A), p.dt_bias = head_view(args.dt_bias), p.D = head_view(args.D);
  p.initial_state = state_view(args.initial_state), p.dfinal_state = state_view(args.dfinal_state);
  p.dinitial_state = state_view(args.dinitial_state);
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
  p.slices = static_cast<int>(plan.slices), p.heads_per_group = static_cast<int>(d.nheads / d.ngroups);
  p.splits = static_cast<int>(plan.splits);
  const auto gradient = [](const Tensor& t, OutputView& view, std::int64_t& batch) {
    if (!t) return;
    view = {static_cast<char*>(t.data), t.stride[1] * size_of(t.dtype), t.stride[2] * size_of(t.dtype)};
    batch = t.stride[0] * size_of(t.dtype);
  };
  gradient(args.dB, p.dB, p.dB_batch);
  gradient(args.dC, p.dC, p.dC_batch);

  auto* memory = static_cast<char*>(args.workspace.data);
  const auto take = [&](std::size_t bytes) {
    char* const first = memory;
    memory += bytes;
    return first;
  };
  char* const states = take(plan.states_bytes);
  char* const adjoints = take(plan.states_bytes);
  if (plan.sums_in_memory) {
    p.dB_sums = reinterpret_cast<float*>(take(plan.sums_bytes));
    p.dC_sums = reinterpret_cast<float*>(take(plan.sums_bytes));
  }
  for (float** shares : {&p.dA_shares, &p.ddt_bias_shares, &p.dD_shares})
    *shares = reinterpret_cast<float*>(take(plan.shares_bytes));

  for (std::int64_t i = 0; i < plan.parts; ++i) {
    p.part = plan.part(d, i);
    const std::int64_t slots = plan.slots, items = p.part.total();
    const auto kept = [&](void* data) {  // [slots, rows, items, states], as boxes of rows and states find them
      Tensor t = Tensor::contiguous(data, args.x.dtype, {slots, items, kFusedTile, Policy::kState}, args.x.device);
      std::swap(t.shape[1], t.shape[2]), std::swap(t.stride[1], t.stride[2]);
      return cuda::tma_map(t);
    };
    p.states = kept(states), p.adjoints = kept(adjoints);
    p.pairs_per_group = static_cast<int>(divide_up(p.part.items, 2));
    p.walks = static_cast<unsigned>(d.batch * p.pairs_per_group * p.part.groups);
    cuda::launch("ssd_scan_fused_walk_kernel", ssd_scan_fused_walk_kernel<Policy>,
                 {2 * std::int64_t{p.walks}, Policy::kThreads, sizeof(fused::WalkStorage<Policy>)}, stream, p);
    cuda::launch(
        "ssd_scan_fused_gradient_kernel", ssd_scan_fused_gradient_kernel<Policy>,
        {slots * p.part.groups * plan.splits, 128 * fused::kGradientWarpgroups, sizeof(fused::GradientStorage<Policy>)}, stream,
        p);
  }
  if (plan.splits > 1) {
    launch_split_sum(p.dB_sums, plan.splits, args.dB, d, stream);
    launch_split_sum(p.dC_sums, plan.splits, args.dC, d, stream);
  }
  Sequences sequences{};
  sequences.count = d.batch, sequences.seqlen = d.seqlen, sequences.segments = 1, sequences.chunk = kFusedTile;
  launch_chunk_sum(p.dA_shares, sequences, args.dA, 1, stream);
  launch_chunk_sum(p.ddt_bias_shares, sequences, args.ddt_bias, 1, stream);
  launch_chunk_sum(p.dD_shares, sequences, args.dD, 1, stream);
}

}  // namespace statescan::ssd_scan
