// causal_conv1d_update
// Math     y = act(bias + sum_k weight[k] window[k]), the window being the state and the new token; then the state shifts
// Shapes   x, y [b,t,d]; state [slots,d,w-1]; weight [d,w]
// Traffic  read x and state, write y and state: b*d*(2t + 2(w-1)) elements; floor: that over 3.0 TB/s. Weights come from L2
// Launch   one axis of channel tiles x runs of 4 rows, blocks of 128 threads; a thread takes one channel of the rows
// Numerics float32, taps in order; a window holds inputs, which every state dtype keeps exactly: several tokens equal one at a
//          time, bit for bit
#pragma once

#include "../common/early.cuh"
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
  std::int64_t batch, dim, ntokens, slots;
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
  constexpr int kTaps = Policy::kTaps, kRows = Policy::kRows;
  constexpr DType kDType = Policy::kDType;
  const std::int64_t first_row = std::int64_t{blockIdx.x / p.tiles} * kRows;
  const std::int64_t channel = std::int64_t{blockIdx.x % p.tiles} * Policy::kThreads + threadIdx.x;
  const char* const x = p.x.data + (first_row * p.x.row + channel * p.x.channel);
  char* const y = p.y.data + (first_row * p.y.row + channel * p.y.channel);
  char* const state = p.state.data + channel * p.state.channel;

  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (channel >= p.dim || p.ntokens == 0) return;

  // Window and weight end at the registers' end; what is before `unused` does not count. All rows are loaded before the first
  // is worked on.
  const int unused = kTaps - p.width;
  std::int64_t slot[kRows];
  std::uint32_t window_bits[kRows][kTaps] = {}, weight_bits[kTaps] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) slot[r] = first_row + r < p.batch ? slot_of(p, first_row + r) : -1;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (slot[r] < 0) continue;
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k)
      if (k >= unused)
        window_bits[r][k] = cuda::load_bits(state + slot[r] * p.state.row + (k - unused) * p.state.tap, p.state.dtype);
    window_bits[r][kTaps - 1] = cuda::load_bits(x + r * p.x.row, kDType);
  }
  const char* const weight = p.weight.data + channel * p.weight.channel;
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
    if (k >= unused) weight_bits[k] = cuda::load_bits(weight + (k - unused) * p.weight.tap, p.weight.dtype);
  const float bias = p.bias.data ? cuda::load_element(p.bias.data + channel * p.bias.channel, p.bias.dtype) : 0.0f;
  float taps[kTaps];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) taps[k] = cuda::widen_bits(weight_bits[k], p.weight.dtype);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first_row + r >= p.batch) break;
    char* y_at = y + r * p.y.row;
    if (slot[r] < 0) {
      for (std::int64_t t = 0; t < p.ntokens; ++t, y_at += p.y.token) cuda::store_element(y_at, p.y.dtype, 0.0f);
      continue;
    }
    float window[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) window[k] = cuda::widen_bits(window_bits[r][k], k < kTaps - 1 ? p.state.dtype : kDType);
    const char* x_at = x + r * p.x.row;
#pragma unroll 1
    for (std::int64_t t = 0;;) {
      float sum = bias;
#pragma unroll
      for (int k = 0; k < kTaps; ++k)
        if (k >= unused) sum = fmaf(taps[k], window[k], sum);
      cuda::store_element(y_at, p.y.dtype, p.silu ? cuda::fast_silu(sum) : sum);
#pragma unroll
      for (int k = 0; k < kTaps - 1; ++k) window[k] = window[k + 1];
      if (++t == p.ntokens) break;
      x_at += p.x.token;
      y_at += p.y.token;
      window[kTaps - 1] = cuda::load_element(x_at, kDType);
    }
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k)
      if (k >= unused)
        cuda::store_element(state + slot[r] * p.state.row + (k - unused) * p.state.tap, p.state.dtype, window[k]);
  }
}

}  // namespace statescan::causal_conv1d_update
