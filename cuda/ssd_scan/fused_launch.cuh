#pragma once

#include "../../cpp/ops/backend.h"
#include "../common/device.h"
#include "../common/overlap.h"
#include "../common/tma.h"
#include "fused_kernel.cuh"
#include "fused_plan.h"
#include "position_states.h"

namespace statescan::ssd_scan {

namespace fused {

// Zeros past the last packed token, in the output.
template <class Element>
__global__ void clear_tail_kernel(const __grid_constant__ FusedParams p, std::int64_t num_sequences) {
  const std::int64_t first = Task::bound(p, num_sequences);
  const std::int64_t row = static_cast<std::int64_t>(p.nheads) * p.headdim;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < (p.seqlen - first) * row;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t token = first + i / row, head = i % row / p.headdim, channel = i % p.headdim;
    reinterpret_cast<Element*>(p.packed_y.data + token * p.packed_y.token + head * p.packed_y.head)[channel] = Element(0.0f);
  }
}

}  // namespace fused

template <class Policy>
void launch_fused(const Args& args, const Dims& d, const FusedPlan& plan, Stream stream) {
  if (plan.pairs * d.num_sequences == 0) return;
  FusedParams p{};
  p.x = cuda::tma_map(args.x), p.B = cuda::tma_map(args.B), p.C = cuda::tma_map(args.C), p.y = cuda::tma_map(args.y);
  p.has_z = static_cast<bool>(args.z);
  if (p.has_z) p.z = cuda::tma_map(args.z);
  const std::int64_t dt_size = size_of(args.dt.dtype), y_size = size_of(args.y.dtype);
  p.dt = {static_cast<const char*>(args.dt.data), args.dt.dtype, args.dt.stride[0] * dt_size, args.dt.stride[1] * dt_size,
          args.dt.stride[2] * dt_size};
  p.A = head_view(args.A), p.dt_bias = head_view(args.dt_bias), p.D = head_view(args.D);
  p.initial_state = state_view(args.initial_state), p.final_state = state_view(args.final_state);
  p.packed_y = {static_cast<char*>(args.y.data), args.y.stride[1] * y_size, args.y.stride[2] * y_size};
  if (args.cu_seqlens) {
    p.cu_seqlens = args.cu_seqlens.data, p.cu_is_int64 = args.cu_seqlens.dtype == DType::int64;
    p.cu_stride = args.cu_seqlens.stride[0];
  }
  p.dt_softplus = args.dt_softplus, p.reverse = args.reverse;
  p.dt_min = static_cast<float>(args.dt_min), p.dt_max = static_cast<float>(args.dt_max);
  p.seqlen = d.seqlen;
  p.nheads = static_cast<int>(d.nheads), p.headdim = static_cast<int>(d.headdim), p.dstate = static_cast<int>(d.dstate);
  p.heads_per_group = static_cast<int>(d.nheads / d.ngroups), p.slices = static_cast<int>(plan.slices);
  p.pairs_per_group = static_cast<int>(plan.pairs_per_group), p.pairs = static_cast<int>(plan.pairs);
  p.segments = static_cast<int>(plan.segments), p.chunks_per_segment = static_cast<int>(plan.chunks_per_segment);
  p.tasks = static_cast<unsigned>(plan.pairs * plan.segments * d.num_sequences);
  p.positions = positions_of(args, d, static_cast<char*>(args.workspace.data) + plan.workspace_bytes());
  const std::int64_t blocks = std::min<std::int64_t>(p.tasks, cuda::multiprocessors(args.x.device.index));

  if (plan.segments > 1) {
    auto* workspace = static_cast<char*>(args.workspace.data);
    p.segment_decays = reinterpret_cast<float*>(workspace);
    const auto states_at = [&](char* data) {
      return Tensor::contiguous(data, DType::float32, {d.num_sequences * plan.segments, d.nheads, d.headdim, d.dstate},
                                args.x.device);
    };
    p.segment_states = state_view(states_at(workspace + plan.decays_bytes));
    cuda::launch("ssd_scan_fused_kernel (states)", ssd_scan_fused_kernel<Policy, true>,
                 {blocks, Policy::kThreads, sizeof(fused::SharedStorage<Policy, true>)}, stream, p);

    if (plan.combines) {
      char* entering = workspace + plan.decays_bytes + plan.states_bytes;
      const auto view = [&](const void* data, std::initializer_list<std::int64_t> shape) {
        return Tensor::contiguous(data, DType::float32, shape, args.x.device);
      };
      state_scan::Args scan;
      scan.log_decay = view(p.segment_decays, {d.num_sequences, plan.segments, d.nheads});
      scan.update = view(p.segment_states.data, {d.num_sequences, plan.segments, d.nheads, d.headdim, d.dstate});
      scan.states = view(entering, {d.num_sequences, plan.segments, d.nheads, d.headdim, d.dstate});
      scan.initial_state = args.initial_state;
      state_scan::run_cuda(scan, state_scan::validate(scan), stream);
      p.segment_states = state_view(states_at(entering)), p.segments_combined = true;
    }
  }

  const cuda::LaunchShape shape{blocks, Policy::kThreads, sizeof(fused::SharedStorage<Policy, false>)};
  const auto launch = plan.segments > 1 && !plan.combines ? cuda::launch_overlapping<FusedParams> : cuda::launch<FusedParams>;
  launch("ssd_scan_fused_kernel", ssd_scan_fused_kernel<Policy, false>, shape, stream, p);
  if (args.state_positions)
    launch_position_states(args, d, static_cast<char*>(args.workspace.data) + plan.workspace_bytes(), {kFusedTile, args.reverse},
                           stream);
  if (args.cu_seqlens)
    cuda::launch("clear_tail_kernel", fused::clear_tail_kernel<typename cuda::ElementOf<Policy::kDType>::type>, {64, 256},
                 stream, p, d.num_sequences);
}

}  // namespace statescan::ssd_scan
