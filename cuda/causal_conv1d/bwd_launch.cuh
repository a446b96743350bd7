#pragma once

#include "../common/launch.h"
#include "../common/shares.cuh"
#include "bwd_time_kernel.cuh"
#include "bwd_walk_kernel.cuh"
#include "fwd_launch.cuh"

namespace statescan::causal_conv1d {

inline BackwardParams backward_params(const BackwardArgs& args, const Dims& dims, std::int64_t tokens) {
  BackwardParams params{};
  params.shape = shape_of_call(dims, tokens);
  params.sequences = sequences_of(args, dims);
  params.silu = args.activation == Activation::silu;
  params.x = tokens_of(args.x, args.reverse);
  params.dy = tokens_of(args.dy, args.reverse);
  params.dx = tokens_of(args.dx, args.reverse);
  params.weight = weight_of(args.weight);
  params.bias = weight_of(args.bias);
  params.initial_state = state_of(args.initial_state);
  params.dfinal_state = state_of(args.dfinal_state);
  params.dinitial_state = state_of(args.dinitial_state);
  if (args.dweight || args.dbias) params.partial = static_cast<float*>(args.workspace.data);
  return params;
}

inline void launch_weight_gradient(const BackwardArgs& args, const Dims& dims, const BackwardParams& of, Stream stream) {
  if (!args.dweight && !args.dbias) return;
  const WeightView dweight = weight_of(args.dweight), dbias = weight_of(args.dbias);
  cuda::launch_sum_shares({of.partial,
                           dims.batch * of.shape.segments,
                           dims.dim,
                           static_cast<int>(dims.width) + 1,
                           {dweight.data, dweight.dtype, dweight.channel, dweight.tap},
                           {dbias.data, dbias.dtype, dbias.channel, 0}},
                          stream);
}

inline void launch_initial_gradient(const BackwardParams& params, const Dims& dims, Stream stream) {
  const std::int64_t blocks = divide_up(dims.num_sequences * dims.dim, kThreads);
  if (!params.dinitial_state.data || blocks == 0) return;
  cuda::launch("causal_conv1d_initial_gradient_kernel", causal_conv1d_initial_gradient_kernel,
               {.blocks = blocks, .threads = kThreads, .early = true}, stream, params);
}

template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  constexpr bool kTime = Policy::kWay == Way::time;
  const BackwardParams params = backward_params(
      args, dims, kTime ? backward_time_tokens(dims, Policy::kStep) : backward_walk_tokens(dims, Policy::kChannels));
  const cuda::LaunchShape shape = shape_of_launch<Policy>(dims, params.shape, kThreads);
  if (shape.blocks > 0) {
    if constexpr (kTime)
      cuda::launch(
          "causal_conv1d_backward_time_kernel",
          args.reverse ? causal_conv1d_backward_time_kernel<Policy, true> : causal_conv1d_backward_time_kernel<Policy, false>,
          shape, stream, params);
    else cuda::launch("causal_conv1d_backward_walk_kernel", causal_conv1d_backward_walk_kernel<Policy>, shape, stream, params);
  }
  launch_weight_gradient(args, dims, params, stream);
  launch_initial_gradient(params, dims, stream);
}

}  // namespace statescan::causal_conv1d
