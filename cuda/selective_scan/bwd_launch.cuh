#pragma once

#include "bwd_known_kernel.cuh"
#include "bwd_sums.cuh"
#include "fwd_launch.cuh"
#include "lanes_launch.cuh"

namespace statescan::selective_scan {

template <int kParts>
void launch_row_sum(const float* rows, std::int64_t count, std::int64_t channels, std::int64_t states, const View& to,
                    Stream stream) {
  if (to.data && channels * states > 0)
    cuda::launch("selective_scan_row_sum_kernel", selective_scan_row_sum_kernel<kParts>,
                 {divide_up(channels * states * kParts, kRuns), kRuns}, stream,
                 RowSumParams{rows, count, channels, states, to});
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
  const std::int64_t blocks = (params.sequences + (params.cu_seqlens ? 1 : 0)) * params.segments * params.blocks;
  const std::int64_t rows = params.sequences * params.segments;
  if (params.links > 1) cuda::clear(params.turns, kBackwardPasses * turns_of(args, dims) * sizeof(*params.turns), stream);
  launch_checkpoints<Policy>(args, dims, params, stream);
  params.turns += 2 * turns_of(args, dims);
  if constexpr (Policy::kKnown) {
    using Shape = KnownBackward<Policy>;
    if (blocks > 0)
      cuda::launch("selective_scan_known_backward_kernel", selective_scan_known_backward_kernel<Policy>,
                   {blocks * params.links, Shape::kThreads, Shape::kBytes}, stream, params);
  } else if (blocks > 0) {
    cuda::launch("selective_scan_backward_kernel", selective_scan_backward_kernel<Policy, false>,
                 {blocks * params.links, kRuns, BackwardStorage<Policy>::kBytes}, stream, params);
  }

  const std::int64_t tokens = dims.batch * dims.seqlen;
  const std::int64_t values = divide_up(dims.dstate, Policy::kStates) * 2 * Policy::kValues;
  if (wants_projections(args, dims) && tokens * dims.ngroups * values > 0) {
    const std::int64_t last = params.sequences * params.cu_stride;
    const bool is_coarse = Policy::kArithmetic == Arithmetic::fast && args.x.dtype == DType::bfloat16;
    const ProjectionSumParams sum{params.projections,
                                  params.cu_seqlens,
                                  params.cu_is_int64,
                                  last,
                                  dims.seqlen,
                                  tokens,
                                  dims.ngroups,
                                  params.blocks_of_group,
                                  dims.dstate,
                                  values,
                                  is_coarse ? kCutOff : 1.0f,
                                  dims.varying_B && args.dB ? projection_view(args.dB, false) : View{},
                                  dims.varying_C && args.dC ? projection_view(args.dC, false) : View{}};
    cuda::launch("selective_scan_projection_sum_kernel", selective_scan_projection_sum_kernel<Policy>,
                 {divide_up(tokens * dims.ngroups * values, kRuns), kRuns}, stream, sum);
  }
  launch_row_sum<Policy::kParts>(params.dA, rows, dims.dim, dims.dstate, states_view(args.dA), stream);
  if (!dims.varying_B) launch_row_sum<Policy::kParts>(params.dB, rows, dims.dim, dims.dstate, states_view(args.dB), stream);
  if (!dims.varying_C) launch_row_sum<Policy::kParts>(params.dC, rows, dims.dim, dims.dstate, states_view(args.dC), stream);
  launch_row_sum<1>(params.dD, rows, dims.dim, 1, channels_view(args.dD), stream);
  launch_row_sum<1>(params.ddt_bias, rows, dims.dim, 1, channels_view(args.ddt_bias), stream);
}

}  // namespace statescan::selective_scan
