#pragma once

#include <utility>

#include "../../cpp/ops/backend.h"
#include "../common/device.h"
#include "../common/launch.h"
#include "../common/tma.h"
#include "fused_combine_kernel.cuh"
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

// dy: what a gated policy makes dz of, in the place of y.
template <class Policy>
void launch_fused(const Args& args, const Dims& d, const FusedPlan& plan, std::uint8_t* y_exponents, const Tensor& dy,
                  Stream stream) {
  if (plan.pairs * d.num_sequences == 0) return;
  FusedParams p{};
  p.x = cuda::tma_map(args.x), p.B = cuda::tma_map(args.B), p.C = cuda::tma_map(args.C), p.y = cuda::tma_map(args.y);
  p.has_z = static_cast<bool>(args.z);
  if (p.has_z) p.z = cuda::tma_map(args.z);
  if constexpr (Policy::kGated) p.dy = cuda::tma_map(dy);
  p.stretches = static_cast<int>(d.nstretches);
  if (args.chunk_states) p.chunk_states = cuda::tma_map(chunk_states_of(args.chunk_states));
  const std::int64_t y_size = size_of(args.y.dtype);
  p.dt = step_view(args.dt);
  const bool ordered =
      !args.reverse && !args.cu_seqlens && plan.pairs_begin_even(d) && cuda::why_not_tma_steps("dt", args.dt).empty();
  if (ordered) p.raw_steps = cuda::tma_map_steps(args.dt, fused::kStepsAtOnce * kFusedTile);
  p.A = head_view(args.A), p.dt_bias = head_view(args.dt_bias), p.D = head_view(args.D);
  p.initial_state = state_view(args.initial_state), p.final_state = state_view(args.final_state);
  p.packed_y = {static_cast<char*>(args.y.data), args.y.stride[1] * y_size, args.y.stride[2] * y_size};
  p.y_exponents = y_exponents;
  if (args.cu_seqlens) {
    p.cu_seqlens = args.cu_seqlens.data, p.cu_is_int64 = args.cu_seqlens.dtype == DType::int64;
    p.cu_stride = args.cu_seqlens.stride[0];
  }
  p.dt_softplus = args.dt_softplus, p.reverse = args.reverse;
  p.dt_min = static_cast<float>(args.dt_min), p.dt_max = static_cast<float>(args.dt_max);
  p.seqlen = d.seqlen;
  p.nheads = static_cast<int>(d.nheads), p.headdim = static_cast<int>(d.headdim), p.dstate = static_cast<int>(d.dstate);
  const auto divisor = [](std::int64_t v) { return Divisor(static_cast<unsigned>(std::max<std::int64_t>(v, 1))); };
  p.heads_per_group = static_cast<int>(d.nheads / d.ngroups);
  p.slices_of_group = static_cast<int>(d.nheads / d.ngroups * plan.slices), p.slices = divisor(plan.slices);
  p.pairs_per_group = divisor(plan.pairs_per_group), p.pairs = divisor(plan.pairs);
  auto* workspace = static_cast<char*>(args.workspace.data);
  const auto entries = workspace + plan.workspace_bytes();
  p.positions = positions_of(args, d, entries, true);
  p.sides = Policy::kSides;
  const std::int64_t at_once = cuda::multiprocessors(args.x.device.index) / Policy::kSides;  // tasks
  std::int64_t takers = 0;                                                                   // of tasks, in turns
  const auto set_turns = [&](const Turns& turns) {
    p.turns = turns, p.left = divisor(turns.left), p.gaps = divisor(std::int64_t{turns.parts} - 1);
  };
  // Tasks of a short segment, if it has chunks, and `segments` of so many; the first chunk and the end of the last given.
  const auto cut = [&](std::int64_t first, std::int64_t short_chunks, std::int64_t segments, std::int64_t chunks_per_segment,
                       std::int64_t limit, std::int64_t places) {
    p.first_chunk = static_cast<int>(first), p.segments = divisor(segments), p.short_chunks = static_cast<int>(short_chunks);
    p.long_segments = static_cast<int>(segments * d.num_sequences);
    p.chunks_per_segment = static_cast<int>(chunks_per_segment), p.chunk_limit = static_cast<int>(limit);
    const std::int64_t items = plan.pairs * d.num_sequences, short_tasks = short_chunks > 0 ? items : 0;
    takers = std::min(items * segments + short_tasks, places);
    set_turns(turns_of(items * segments, short_tasks, places));
  };
  using fused::Extra;
  const auto launch_output = [&](bool early) {
    const cuda::LaunchShape shape{.blocks = takers * Policy::kSides,
                                  .threads = Policy::kThreads,
                                  .shared_bytes = sizeof(fused::SharedStorage<Policy, false>),
                                  .cluster = Policy::kSides,
                                  .early = early};
    const auto launch_as = [&]<Extra extra, class Params>(const Params& params) {
      if constexpr (Policy::kCanWalk)
        if (plan.walks) {
          WalkingParams<Params> walking{params, {}};
          std::copy(std::begin(plan.cuts), std::end(plan.cuts), walking.cuts);
          return cuda::launch("ssd_scan_fused_kernel (walking)",
                              ssd_scan_fused_kernel<Policy, false, WalkingParams<Params>, extra>, shape, stream, walking);
        }
      cuda::launch("ssd_scan_fused_kernel", ssd_scan_fused_kernel<Policy, false, Params, extra>, shape, stream, params);
    };
    // Positions are rare, and y as halves goes to a norm that has the gate.
    const auto launch_with = [&]<Extra extra> {
      if constexpr (extra != Extra::positions && extra != Extra::scaled_y)
        if (ordered && p.has_z) return launch_as.template operator()<extra>(OrderedParams<true>{p});
      if constexpr (extra != Extra::positions && !Policy::kGated)
        if (ordered && !p.has_z) return launch_as.template operator()<extra>(OrderedParams<false>{p});
      launch_as.template operator()<extra>(p);
    };
    if constexpr (Policy::kScalesOutput)
      if (p.y_exponents) return launch_with.template operator()<Extra::scaled_y>();
    if constexpr (Policy::kLeavesStates)
      if (p.positions.data) return launch_with.template operator()<Extra::positions>();
    if constexpr (Policy::kKeepsStates)
      if (args.chunk_states) return launch_with.template operator()<Extra::kept_states>();
    launch_with.template operator()<Extra::nothing>();
  };

  const std::int64_t first = plan.first_chunks;
  if (plan.has_pieces()) {
    p.piece_decays = reinterpret_cast<float*>(workspace);
    p.piece_states = reinterpret_cast<float*>(workspace + plan.decays_bytes);
    p.pieces = static_cast<int>(plan.pieces), p.pieces_per_segment = static_cast<int>(plan.pieces_per_segment);
    p.beside = first > 0;
    if (p.beside) {
      // As any kernel, it begins after those ahead of it: the state pass need not wait for them again.
      cut(0, 0, 1, first, first, at_once);
      const StateView final_state = std::exchange(p.final_state, {});
      launch_output(false);
      p.final_state = final_state;
    }
    cut(first, plan.short_chunks, (plan.long_segments() - 1) * plan.pieces_per_segment, plan.chunks_per_piece,
        first + plan.short_chunks + (plan.long_segments() - 1) * plan.chunks_per_segment,
        p.beside ? std::max<std::int64_t>(at_once - takers, 1) : at_once);
    using OfBlock = FusedPolicy<Policy::kDType, Policy::kState>;  // sides need not meet here
    const cuda::LaunchShape shape{.blocks = takers * Policy::kSides,
                                  .threads = Policy::kThreads,
                                  .shared_bytes = sizeof(fused::SharedStorage<OfBlock, true>),
                                  .early = p.beside};
    constexpr const char* kName = "ssd_scan_fused_kernel (states)";
    if (ordered)
      cuda::launch(kName, ssd_scan_fused_kernel<OfBlock, true, OrderedParams<false>>, shape, stream, OrderedParams<false>{p});
    else cuda::launch(kName, ssd_scan_fused_kernel<OfBlock, true, FusedParams>, shape, stream, p);
    p.beside = false;

    if (plan.combines) {
      constexpr std::int64_t kTiles = kFusedTile * Policy::kSides * Policy::kState / kCombineThreads;
      cuda::launch("ssd_scan_fused_combine_kernel", ssd_scan_fused_combine_kernel,
                   {.blocks = d.num_sequences * d.nheads * plan.slices * kTiles, .threads = kCombineThreads, .early = true},
                   stream, p, static_cast<unsigned>(kTiles));
      p.pieces_combined = true;
    }
  }

  // A block that walks takes one task, be it after others on a device with fewer multiprocessors than planned for.
  const std::int64_t places = plan.walks ? plan.pairs * d.num_sequences * plan.segments : at_once;
  cut(first, plan.short_chunks, plan.long_segments(), plan.chunks_per_segment, divide_up(d.seqlen, kFusedTile), places);
  set_turns(fused_turns(d, plan, static_cast<bool>(args.cu_seqlens), places));
  if (p.turns.parts > 1) {
    const PartBytes bytes(p.turns, Policy::kSides * Policy::kState);
    char* parts = entries + aligned(entry_bytes(args, d, true));
    p.part_states = reinterpret_cast<float*>(parts), p.parts_done = reinterpret_cast<unsigned*>(parts + bytes.states);
    cuda::check(cudaMemsetAsync(p.parts_done, 0, bytes.counts, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
  }

  launch_output(plan.has_pieces());
  if (args.state_positions && !entries_in_place(args, true)) launch_position_states(args, d, entries, 1, stream);
  if (args.cu_seqlens)
    cuda::launch("clear_tail_kernel", fused::clear_tail_kernel<typename cuda::ElementOf<Policy::kDType>::type>, {64, 256},
                 stream, p, d.num_sequences);
}

}  // namespace statescan::ssd_scan
