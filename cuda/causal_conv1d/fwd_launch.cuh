#pragma once

#include "../common/launch.h"
#include "ends_kernel.cuh"
#include "fwd_time_kernel.cuh"
#include "fwd_walk_kernel.cuh"

namespace statescan::causal_conv1d {

// For every segment of every channel: a warp for each, or a thread for kChannels of them.
template <class Policy>
cuda::LaunchShape shape_of_launch(const Dims& dims, const Shape& shape, int threads) {
  const std::int64_t rows = dims.batch * shape.segments;
  const std::int64_t blocks = Policy::kWay == Way::time ? divide_up(rows * dims.dim, threads / kWarp)
                                                        : divide_up(rows * divide_up(dims.dim, Policy::kChannels), threads);
  return {.blocks = blocks, .threads = threads, .early = true};
}

inline ForwardParams forward_params(const Args& args, const Dims& dims, std::int64_t tokens) {
  ForwardParams params{};
  params.shape = shape_of_call(dims, tokens);
  params.sequences = sequences_of(args, dims);
  params.silu = args.activation == Activation::silu;
  params.x = tokens_of(args.x, args.reverse);
  params.y = tokens_of(args.y, args.reverse);
  params.weight = weight_of(args.weight);
  params.bias = weight_of(args.bias);
  params.initial_state = state_of(args.initial_state);
  params.final_state = state_of(args.final_state);
  return params;
}

// The final state after the tokens' own kernel.
inline void launch_final_state(const ForwardParams& params, const Dims& dims, Stream stream) {
  const std::int64_t blocks = divide_up(dims.num_sequences * dims.dim, kThreads);
  if (!params.final_state.data || blocks == 0) return;
  cuda::launch("causal_conv1d_final_state_kernel", causal_conv1d_final_state_kernel,
               {.blocks = blocks, .threads = kThreads, .early = true}, stream, params);
}

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream) {
  constexpr bool kTime = Policy::kWay == Way::time;
  const ForwardParams params = forward_params(
      args, dims, kTime ? forward_time_tokens(dims, Policy::kStep) : forward_walk_tokens(dims, Policy::kChannels));
  const cuda::LaunchShape shape = shape_of_launch<Policy>(dims, params.shape, kTime ? kThreads : kForwardWalkThreads);
  if (shape.blocks > 0) {
    if constexpr (kTime)
      cuda::launch(
          "causal_conv1d_forward_time_kernel",
          args.reverse ? causal_conv1d_forward_time_kernel<Policy, true> : causal_conv1d_forward_time_kernel<Policy, false>,
          shape, stream, params);
    else cuda::launch("causal_conv1d_forward_walk_kernel", causal_conv1d_forward_walk_kernel<Policy>, shape, stream, params);
  }
  launch_final_state(params, dims, stream);
}

}  // namespace statescan::causal_conv1d
