// causal_conv1d_update
// Math     y = act(bias + sum_k weight[k] window[k]), the window being the state and the new token; then the state shifts
// Shapes   x, y [b,t,d]; state [slots,d,w-1]; weight [d,w]
// Traffic  read x and state, write y and state: b*d*(2t + 2(w-1)) elements; floor: that over 3.0 TB/s. Weights come from L2
// Launch   one axis of channel tiles x batch blocks of 128 threads; a thread takes one channel of one row
// Numerics float32, taps in order; a window holds inputs, which every state dtype keeps exactly: several tokens equal one at a
//          time, bit for bit
#pragma once

#include "../common/element.cuh"
#include "policy.h"

namespace statescan::causal_conv1d_update {

// Strides in bytes. data is null where the tensor is absent.
struct View {
  char* data;
  DType dtype;
  std::int64_t row, token, channel, tap;  // row: of the batch, or a slot
};

struct Params {
  std::uint32_t tiles;
  std::int64_t dim, ntokens, slots;
  int width;
  bool silu;
  View x, y, state, weight, bias;
  const void* indices;  // null: row i has slot i
  bool indices_are_int64;
  std::int64_t index_stride;
};

// -1 for padding; so is what lies outside the slots, which cannot be checked on the host without waiting.
inline __device__ std::int64_t slot_of(const Params& p, std::int64_t row) {
  if (!p.indices) return row;
  const std::int64_t slot = p.indices_are_int64 ? static_cast<const std::int64_t*>(p.indices)[row * p.index_stride]
                                                : static_cast<const std::int32_t*>(p.indices)[row * p.index_stride];
  return slot < p.slots ? slot : -1;
}

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads) causal_conv1d_update_kernel(const __grid_constant__ Params p) {
  constexpr int kTaps = Policy::kTaps;
  const std::int64_t row = blockIdx.x / p.tiles;
  const std::int64_t channel = std::int64_t{blockIdx.x % p.tiles} * Policy::kThreads + threadIdx.x;
  if (channel >= p.dim) return;
  const char* x = p.x.data + (row * p.x.row + channel * p.x.channel);
  char* y = p.y.data + (row * p.y.row + channel * p.y.channel);
  const std::int64_t slot = slot_of(p, row);
  if (slot < 0) {
    for (std::int64_t t = 0; t < p.ntokens; ++t) cuda::store_element(y + t * p.y.token, Policy::kDType, 0.0f);
    return;
  }
  if (p.ntokens == 0) return;

  // Window and weight end at the registers' end; what is before `first` is not used.
  const int first = kTaps - p.width;
  char* const state = p.state.data + (slot * p.state.row + channel * p.state.channel);
  const char* const weight = p.weight.data + channel * p.weight.channel;
  std::uint32_t window_bits[kTaps] = {}, weight_bits[kTaps] = {};
#pragma unroll
  for (int k = 0; k < kTaps - 1; ++k)
    if (k >= first) window_bits[k] = cuda::load_bits(state + (k - first) * p.state.tap, p.state.dtype);
  window_bits[kTaps - 1] = cuda::load_bits(x, Policy::kDType);
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
    if (k >= first) weight_bits[k] = cuda::load_bits(weight + (k - first) * p.weight.tap, p.weight.dtype);
  const float bias = p.bias.data ? cuda::load_element(p.bias.data + channel * p.bias.channel, p.bias.dtype) : 0.0f;
  float window[kTaps], taps[kTaps];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    window[k] = cuda::widen_bits(window_bits[k], k < kTaps - 1 ? p.state.dtype : Policy::kDType);
    taps[k] = cuda::widen_bits(weight_bits[k], p.weight.dtype);
  }

  for (std::int64_t t = 0;;) {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      if (k >= first) sum = fmaf(taps[k], window[k], sum);
    cuda::store_element(y, Policy::kDType, p.silu ? cuda::fast_silu(sum) : sum);
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k) window[k] = window[k + 1];
    if (++t == p.ntokens) break;
    x += p.x.token;
    y += p.y.token;
    window[kTaps - 1] = cuda::load_element(x, Policy::kDType);
  }
#pragma unroll
  for (int k = 0; k < kTaps - 1; ++k)
    if (k >= first) cuda::store_element(state + (k - first) * p.state.tap, p.state.dtype, window[k]);
}

}  // namespace statescan::causal_conv1d_update
