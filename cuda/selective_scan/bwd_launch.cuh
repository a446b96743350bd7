#pragma once

#include "bwd_known_kernel.cuh"
#include "bwd_sums.cuh"
#include "fwd_launch.cuh"
#include "lanes_launch.cuh"

namespace statescan::selective_scan {

// How what the blocks leave for dB and dC is added up.
template <class Policy>
ProjectionSums projection_sums(const BackwardArgs& args, const Dims& dims, const BackwardParams& params) {
  ProjectionSums sums{};
  if (!wants_projections(args, dims)) return sums;
  if (dims.varying_B && args.dB) sums.dB = projection_view(args.dB, false);
  if (dims.varying_C && args.dC) sums.dC = projection_view(args.dC, false);
  sums.scale = Policy::kArithmetic == Arithmetic::fast && args.x.dtype == DType::bfloat16 ? kCutOff : 1.0f;
  sums.values = divide_up(dims.dstate, Policy::kStates) * 2 * Policy::kValues;
  sums.tokens = dims.batch * dims.seqlen;
  if (Policy::kKnown && params.links > 1) {
    const std::int64_t rows = params.sequences * params.segments, tiles = longest_segment(params);
    const auto parts = [&](int link) { return parts_after(link, params.links, params.segments > 1); };
    sums.early_blocks = tiles * rows * dims.ngroups;
    sums.tokens_of_row = divide_up(tiles * parts(static_cast<int>(params.links) - 2), parts(-1)) * kTile;
    sums.tokens = rows * sums.tokens_of_row;
  }
  return sums;
}

// What the blocks, the segments and the sequences left of the gradients that they share.
template <class Policy>
void launch_sums(const BackwardArgs& args, const Dims& dims, const BackwardParams& params, Stream stream) {
  RowSums sums{};
  std::int64_t blocks = params.sums.early_blocks;
  const auto add_rows = [&](int i, const float* rows, std::int64_t states, std::int64_t parts, const View& to) {
    if (!to.data) return;
    RowSumParams& sum = sums.rows[i];
    sum = {rows, params.sequences * params.segments, dims.dim, states, parts, to, divide_up(dims.dim * states * parts, kRuns)};
    blocks += sum.blocks;
  };
  add_rows(0, params.dA, dims.dstate, Policy::kParts, states_view(args.dA));
  if (!dims.varying_B) add_rows(1, params.dB, dims.dstate, Policy::kParts, states_view(args.dB));
  if (!dims.varying_C) add_rows(2, params.dC, dims.dstate, Policy::kParts, states_view(args.dC));
  add_rows(3, params.dD, 1, 1, channels_view(args.dD));
  add_rows(4, params.ddt_bias, 1, 1, channels_view(args.ddt_bias));
  blocks += divide_up(params.sums.tokens * dims.ngroups * params.sums.values / 4, kRuns);
  if (blocks > 0)
    cuda::launch("selective_scan_sums_kernel", selective_scan_sums_kernel<Policy>,
                 {.blocks = blocks, .threads = kRuns, .early = true}, stream, params, sums);
}

// The states before every kCheckpoint-th token, and the adjoints at the ends of segments.
template <class Policy>
void launch_checkpoints(const BackwardArgs& args, const Dims& dims, const BackwardParams& params, Stream stream) {
  if constexpr (Policy::kKnown) {
    if (suits_lanes(args, dims)) {
      const LanesPlan plan = checkpoints_plan(args, dims);
      const BackwardScratch scratch(args, dims);
      float* const memory = static_cast<float*>(args.workspace.data);
      Params lanes = params;
      set_lanes(lanes, dims, plan, memory + scratch.lanes_carried, memory + scratch.lanes_turns);
      return plan.segments > 1 ? launch_lanes_pass<Policy, Pass::segments>(lanes, plan, stream)
                               : launch_lanes_pass<Policy, Pass::checkpoints>(lanes, plan, stream);
    }
  }
  launch_pass<Policy, Pass::ends>(params, 0, params.sequences, params.segments - 1, stream);
  launch_pass<Policy, Pass::checkpoints>(params, 1, params.sequences, params.segments, stream);
  if (const std::int64_t blocks = params.sequences * (params.segments - 1) * params.blocks; blocks > 0)
    cuda::launch("selective_scan_backward_kernel", selective_scan_backward_kernel<Policy, true>,
                 {blocks, kRuns, BackwardStorage<Policy>::kBytesOfEnds}, stream, params);
}

template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  if (dims.ngroups == 0) return;
  BackwardParams params = params_of(args, dims);
  params.sums = projection_sums<Policy>(args, dims, params);
  const std::int64_t blocks = (params.sequences + (params.cu_seqlens ? 1 : 0)) * params.segments * params.blocks;
  if (const std::int64_t turns = BackwardScratch(args, dims).all_turns; turns > 0)
    cuda::clear(params.turns, turns * sizeof(*params.turns), stream);
  launch_checkpoints<Policy>(args, dims, params, stream);
  params.turns += 2 * turns_of(args, dims);
  if constexpr (Policy::kKnown) {
    using Shape = KnownBackward<Policy>;
    if (blocks > 0)
      cuda::launch("selective_scan_known_backward_kernel", selective_scan_known_backward_kernel<Policy>,
                   {.blocks = blocks * params.links, .threads = Shape::kThreads, .shared_bytes = Shape::kBytes, .early = true},
                   stream, params);
  } else if (blocks > 0) {
    cuda::launch("selective_scan_backward_kernel", selective_scan_backward_kernel<Policy, false>,
                 {blocks * params.links, kRuns, BackwardStorage<Policy>::kBytes}, stream, params);
  }
  launch_sums<Policy>(args, dims, params, stream);
}

}  // namespace statescan::selective_scan
