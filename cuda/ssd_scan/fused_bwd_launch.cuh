#pragma once

#include <utility>

#include "bwd_sums_launch.cuh"
#include "fused_bwd_kernel.cuh"
#include "fused_bwd_walk_kernel.cuh"
#include "fused_launch.cuh"

namespace statescan::ssd_scan {

// of_side: for some of the states, one after the other; adds_to_dx: to what lies there.
template <class Policy>
void launch_fused_backward(const BackwardArgs& args, const Dims& d, const FusedBackwardPlan& plan, bool of_side,
                           bool adds_to_dx, Stream stream) {
  FusedBackwardParams p{};
  p.has_dx = static_cast<bool>(args.dx), p.has_dB = static_cast<bool>(args.dB), p.has_dC = static_cast<bool>(args.dC);
  p.maps.x = cuda::tma_map(args.x), p.maps.dy = cuda::tma_map(args.dy);
  p.maps.B = cuda::tma_map(args.B), p.maps.C = cuda::tma_map(args.C);
  p.maps.x_eights = cuda::tma_map(args.x, 8), p.maps.dy_eights = cuda::tma_map(args.dy, 8);
  if constexpr (Policy::kGated) p.maps.z = cuda::tma_map(args.z), p.maps.z_eights = cuda::tma_map(args.z, 8);
  p.maps.B_eights = cuda::tma_map(args.B, 8), p.maps.C_eights = cuda::tma_map(args.C, 8);
  if (p.has_dx) p.maps.dx_eights = cuda::tma_map(args.dx, 8);
  if (p.has_dB) p.maps.dB = cuda::tma_map(args.dB);
  if (p.has_dC) p.maps.dC = cuda::tma_map(args.dC);
  const bool packed = static_cast<bool>(args.cu_seqlens);
  p.sequences = sequences_of(args, d, {.chunk = kFusedTile});
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
  p.dt_softplus = args.dt_softplus, p.D_per_channel = d.D_per_channel;
  p.dt_min = static_cast<float>(args.dt_min), p.dt_max = static_cast<float>(args.dt_max);
  p.nheads = static_cast<int>(d.nheads), p.headdim = static_cast<int>(d.headdim);
  p.ngroups = static_cast<int>(d.ngroups), p.dstate = static_cast<int>(d.dstate), p.chunks = static_cast<int>(plan.chunks);
  p.pairs = static_cast<int>(plan.pairs);
  p.slices = static_cast<int>(plan.slices), p.heads_per_group = static_cast<int>(d.nheads / d.ngroups);
  p.splits = static_cast<int>(plan.splits), p.adjoints_in_dx = plan.adjoints_in_dx;
  p.from_forward = plan.from_forward;
  const std::int64_t directions = p.from_forward ? 1 : 2;

  auto* memory = static_cast<char*>(args.workspace.data);
  const auto take = [&](std::size_t bytes) {
    char* const first = memory;
    memory += bytes;
    return first;
  };
  char* const states = take(plan.states_bytes);
  char* const adjoints = take(plan.adjoints_bytes);
  for (std::uint8_t** exponents : {&p.state_exponents, &p.adjoint_exponents})
    *exponents = reinterpret_cast<std::uint8_t*>(take(plan.exponents_bytes));
  for (WalkSteps** steps : {&p.first_steps, &p.second_steps}) *steps = reinterpret_cast<WalkSteps*>(take(plan.steps_bytes));
  if (plan.sums_in_memory) {
    p.dB_sums = reinterpret_cast<float4*>(take(plan.sums_bytes));
    p.dC_sums = reinterpret_cast<float4*>(take(plan.sums_bytes));
  }
  for (float** shares : {&p.dA_shares, &p.ddt_bias_shares}) *shares = reinterpret_cast<float*>(take(plan.shares_bytes));
  p.dD_shares = reinterpret_cast<float*>(take(plan.D_shares_bytes));
  if (packed) {
    p.packed_chunks = reinterpret_cast<PackedChunk*>(take(plan.packed_chunks_bytes));
    p.packed_count = reinterpret_cast<unsigned*>(take(plan.packed_order_bytes)), p.packed_order = p.packed_count + 1;
    p.ends = reinterpret_cast<TokenMaps*>(take(plan.ends_bytes));
  }

  const std::int64_t multiprocessors = cuda::multiprocessors(args.x.device.index);
  // A kernel's blocks take their places while the one ahead of it ends; the first of all has a stranger ahead of it.
  bool early = false;
  const auto launch = [&](const char* name, auto kernel, std::int64_t blocks, int threads, int bytes, const auto& params,
                          int cluster = 1) {
    cuda::LaunchShape shape{blocks, threads, bytes, cluster};
    shape.early = std::exchange(early, true);
    cuda::launch(name, kernel, shape, stream, params);
  };
  const auto gradient = [](const Tensor& t) -> GradientView {
    if (!t) return {};
    const std::int64_t size = size_of(t.dtype);
    return {static_cast<char*>(t.data), t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
  };
  p.of_side = of_side;
  if (adds_to_dx) p.dx_before = gradient(args.dx);
  if (packed) {
    p.slots = static_cast<unsigned>(plan.slots);
    launch("ssd_scan_fused_packed_kernel", fused::ssd_scan_fused_packed_kernel, divide_up(d.num_sequences, fused::kPackedWarps),
           32 * fused::kPackedWarps, 0, p);
  }
  for (std::int64_t i = 0; i < plan.parts; ++i) {
    p.part = plan.part(d, i);
    p.keeps_sums = plan.splits > 1 || !p.part.is_last;
    const std::int64_t slots = p.part.batches * plan.chunks, items = p.part.total();
    const std::int64_t sequences = packed ? d.num_sequences : p.part.batches;
    const auto kept = [&](void* data) {  // [pairs, rows, items, states], as boxes of rows and states find them
      const std::int64_t pairs = p.part.batches * plan.pairs;
      Tensor t = Tensor::contiguous(data, args.x.dtype, {pairs, items, kFusedTile, Policy::kState}, args.x.device);
      std::swap(t.shape[1], t.shape[2]), std::swap(t.stride[1], t.stride[2]);
      return cuda::tma_map(t);
    };
    p.kept_items = static_cast<int>(items);
    const bool zeros = begins_with_zeros(args, d);  // past the end of x, as of any tensor
    if (p.from_forward) p.states = cuda::tma_map(zeros ? args.x : chunk_states_of(args.chunk_states));
    else p.states = kept(states);
    p.first_pair = static_cast<int>(zeros ? d.batch : p.part.first_batch * plan.pairs);
    p.adjoints = plan.adjoints_in_dx ? cuda::tma_map(args.dx) : kept(adjoints);
    p.slots = static_cast<unsigned>(slots);
    p.items_of_walk = items_of_walk(directions * sequences * items);
    p.walks_per_group = static_cast<int>(divide_up(p.part.items, p.items_of_walk));
    p.walks = static_cast<unsigned>(sequences * p.walks_per_group * p.part.groups);
    launch("ssd_scan_fused_walk_kernel", ssd_scan_fused_walk_kernel<Policy>, std::min(directions * p.walks, multiprocessors),
           128 * fused::WalkStorage<Policy>::kWarpgroups, sizeof(fused::WalkStorage<Policy>), p);
    p.tasks = static_cast<unsigned>(slots * p.part.groups * plan.splits);
    const auto kernel_of = [&]<bool rare> {
      return p.from_forward ? ssd_scan_fused_gradient_kernel<fused::GradientPolicy<Policy, rare, true>>
                            : ssd_scan_fused_gradient_kernel<fused::GradientPolicy<Policy, rare, false>>;
    };
    auto kernel = kernel_of.template operator()<false>();
    if constexpr (Policy::kState == 128)
      if (packed || args.reverse || d.D_per_channel || of_side) kernel = kernel_of.template operator()<true>();
    const int cluster = p.adjoints_in_dx ? 2 : 1;  // a pair of chunks
    launch("ssd_scan_fused_gradient_kernel", kernel, std::min(std::int64_t{p.tasks}, multiprocessors / cluster * cluster),
           128 * fused::kGradientWarpgroups, sizeof(fused::GradientStorage<fused::GradientPolicy<Policy, false, false>>), p,
           cluster);
    if (plan.splits == 1 || !p.part.ends_batches) continue;
    const FusedSplitSumParams sums{
        p.dB_sums, p.dC_sums,          gradient(args.dB),       gradient(args.dC), p.packed_chunks, p.packed_count,
        d.seqlen,  p.part.first_batch, static_cast<int>(slots), p.chunks,          p.ngroups,       p.splits,
        p.dstate,  args.reverse};
    launch("ssd_scan_fused_split_sum_kernel", fused::ssd_scan_fused_split_sum_kernel<Policy>, 8 * slots * d.ngroups,
           fused::kWarpgroup, 0, sums);
  }
  launch_chunk_sums<true>(
      {p.sequences,
       {chunk_sum(p.dA_shares, args.dA, 1), chunk_sum(p.ddt_bias_shares, args.ddt_bias, 1), chunk_sum(p.dD_shares, args.dD, 1)},
       p.packed_count},
      stream);
  if (packed) launch_clear(p.sequences, args, d, stream);
}

// Side `side` of a tensor's states, its last axis.
inline Tensor side_of(const Tensor& t, int side) {
  if (!t) return t;
  Tensor of_side = t;
  const std::int64_t first = side * kMostStatesOfBlock;
  const int last = t.ndim - 1;
  of_side.data = static_cast<char*>(t.data) + first * t.stride[last] * size_of(t.dtype);
  of_side.shape[last] = std::min<std::int64_t>(t.shape[last] - first, kMostStatesOfBlock);
  return of_side;
}

template <class Policy>
void launch_fused_backward_sides(const BackwardArgs& args, const Dims& d, const FusedBackwardSides& sides, Stream stream) {
  auto* const ddt = reinterpret_cast<float*>(static_cast<char*>(args.workspace.data) + sides.kept_bytes());
  float *const dA = ddt + 2 * sides.steps, *const ddt_bias = dA + 2 * sides.heads;
  const auto sum_of = [](const Tensor& t, float* sums, int side) {
    if (!t) return t;
    if (t.ndim == 1) return Tensor::contiguous(sums + side * t.numel(), DType::float32, {t.shape[0]}, t.device);
    return Tensor::contiguous(sums + side * t.numel(), DType::float32, {t.shape[0], t.shape[1], t.shape[2]}, t.device);
  };
  for (int turn = 0; turn < 2; ++turn) {
    const int side = 1 - turn;  // the smaller one first, and without D: its dx is rounded once more
    BackwardArgs call = args;
    Dims dims = d;
    for (Tensor BackwardArgs::* tensor : {&BackwardArgs::dB, &BackwardArgs::dC, &BackwardArgs::dinitial_state,
                                          &BackwardArgs::dfinal_state, &BackwardArgs::chunk_states})
      call.*tensor = side_of(args.*tensor, side);
    for (Tensor Inputs::* tensor : {&Inputs::B, &Inputs::C, &Inputs::initial_state}) call.*tensor = side_of(args.*tensor, side);
    dims.dstate = call.B.shape[3];
    call.ddt = sum_of(args.ddt, ddt, side), call.dA = sum_of(args.dA, dA, side);
    call.ddt_bias = sum_of(args.ddt_bias, ddt_bias, side);
    if (turn == 0) call.D = call.dD = {}, dims.D_per_channel = false;
    launch_fused_backward<Policy>(call, dims, sides.calls[turn], true, turn == 1, stream);
  }
  const auto add_up = [&](const float* sums, Tensor gradient) {
    if (!gradient) return;
    Dims dims = d;
    dims.ngroups = d.nheads, dims.dstate = 1;
    if (gradient.ndim == 1) {  // as [1,1,h,1]
      dims.seqlen = 1;
      gradient.shape[2] = gradient.shape[0], gradient.stride[2] = gradient.stride[0];
      gradient.shape[0] = gradient.shape[1] = 1, gradient.stride[0] = gradient.stride[1] = 0;
    }
    gradient.ndim = 4, gradient.shape[3] = gradient.stride[3] = 1;
    launch_split_sum<true>(sums, 2, gradient, dims, stream);
  };
  add_up(ddt, args.ddt), add_up(dA, args.dA), add_up(ddt_bias, args.ddt_bias);
}

}  // namespace statescan::ssd_scan
