// causal_conv1d at the two ends of each sequence: the final state, and the gradient of the initial one
// Math     final_state = the last w-1 inputs, those of the initial state included; with g as in bwd_walk_kernel.cuh,
//          dinitial_state[m] = sum over i <= m of weight[m-i] g[i], plus what dfinal_state hands back to a shorter sequence
// Shapes   states [b or s,d,w-1]
// Traffic  w-1 tokens and taps of each sequence and channel
// Launch   a thread for each sequence and channel, after the tokens' own kernel: the final state may lie where the initial one
// lay Numerics float32, taps in order
#pragma once

#include "window.cuh"

namespace statescan::causal_conv1d {

struct End {
  std::int64_t sequence, channel;
};

template <class Params>
__device__ End end_of(const Params& p) {
  const std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  return {index / p.shape.dim, index % p.shape.dim};
}

// The row of the batch that a sequence lies in.
inline __device__ std::int64_t row_of(const Sequences& s, std::int64_t sequence) { return s.cu_seqlens ? 0 : sequence; }

inline __global__ void __launch_bounds__(kThreads) causal_conv1d_final_state_kernel(const __grid_constant__ ForwardParams p) {
  const auto [sequence, channel] = end_of(p);
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (sequence >= p.sequences.count) return;
  const Span span = span_of(p.sequences, sequence);
  const StateView& to = p.final_state;
  char* at = to.data + (sequence * to.sequence + channel * to.channel);
  // In order: in place, taps are read before they are written.
  for (std::int64_t after = span.last - span.first - (p.shape.width - 1); after < span.last - span.first; ++after, at += to.tap)
    cuda::store_element(at, to.dtype,
                        input_at(p.x, p.initial_state, p.shape.width, row_of(p.sequences, sequence), span, channel, after));
}

inline __global__ void __launch_bounds__(kThreads)
    causal_conv1d_initial_gradient_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kMostTaps = static_cast<int>(kMaxWidth) - 1;
  const auto [sequence, channel] = end_of(p);
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (sequence >= p.sequences.count) return;
  const Span span = span_of(p.sequences, sequence);
  const std::int64_t row = row_of(p.sequences, sequence);
  const int width = p.shape.width;
  float weight[kMostTaps + 1], sums[kMostTaps];
#pragma unroll
  for (int k = 0; k <= kMostTaps; ++k)
    weight[k] =
        k < width ? cuda::load_element(p.weight.data + (channel * p.weight.channel + k * p.weight.tap), p.weight.dtype) : 0.0f;
#pragma unroll
  for (int m = 0; m < kMostTaps; ++m) sums[m] = m < width - 1 ? from_final_state(p, span, channel, m - (width - 1)) : 0.0f;
#pragma unroll
  for (int i = 0; i < kMostTaps; ++i) {
    if (i >= width - 1 || i >= span.last - span.first) break;
    float gradient = token_at(p.dy, row, span.first + i, channel);
    if (p.silu) {
      float sum = p.bias.data ? cuda::load_element(p.bias.data + channel * p.bias.channel, p.bias.dtype) : 0.0f;
#pragma unroll
      for (int k = 0; k <= kMostTaps; ++k)
        if (k < width)
          sum = fmaf(weight[k], input_at(p.x, p.initial_state, width, row, span, channel, i - (width - 1) + k), sum);
      gradient *= cuda::fast_dsilu(sum);
    }
#pragma unroll
    for (int m = i; m < kMostTaps; ++m) sums[m] = fmaf(weight[m - i], gradient, sums[m]);
  }
  const StateView& to = p.dinitial_state;
  char* const at = to.data + (sequence * to.sequence + channel * to.channel);
#pragma unroll
  for (int m = 0; m < kMostTaps; ++m)
    if (m < width - 1) cuda::store_element(at + m * to.tap, to.dtype, sums[m]);
}

}  // namespace statescan::causal_conv1d
