// causal_conv1d forward, for tensors whose tokens lie side by side (channels first)
// Math     y[t,d] = act(bias[d] + sum_k weight[d,k] x[t-w+1+k,d])
// Shapes   x, y [b,l,d] with strides of 1 along l; weight [d,w]; states [b,d,w-1]
// Traffic  read x, write y: 2*b*l*d*sizeof(Element); floor: that over 3.0 TB/s
// Launch   one axis of blocks of 4 warps over segments of tokens (fastest), channels and rows; a lane takes 16 bytes of tokens
//          at a time, and gets those before them from its neighbours. Steps in which a sequence begins or ends look at each
//          token
// Numerics float32, taps in order: the same bits as from the walk
#pragma once

#include "time.cuh"

namespace statescan::causal_conv1d {

template <class Policy, bool kMirrored>
__global__ void __launch_bounds__(kThreads) causal_conv1d_forward_time_kernel(const __grid_constant__ ForwardParams p) {
  constexpr int kTaps = Policy::kTaps, kRun = Policy::kRun, kStep = Policy::kStep, kAhead = Policy::kStepsAhead;
  using Lanes = Track<Policy, kMirrored>;
  const Lanes track(p.shape);
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (!track.has_work(p.shape)) return;  // a whole warp
  float weight[kTaps];
  track.load_weights(p.weight, weight);
  const float bias = p.bias.data ? cuda::load_element(p.bias.data + track.channel * p.bias.channel, p.bias.dtype) : 0.0f;
  const char* const x = track.at(p.x);
  char* const y = track.at(p.y);

  float before[kRun];
  if (track.first == 0) {
    track.load_state(p.initial_state, p.shape.width, before);
  } else {
    typename Lanes::Run packed;
    track.load(packed, x, track.first + (track.lane - kWarp) * kRun, track.is_late());
    track.widen(packed, before);
  }
#pragma unroll 1
  for (int t = track.first + track.lane * kRun; t - track.lane * kRun < track.last; t += kAhead * kStep) {
    typename Lanes::Run packed[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) track.load(packed[i], x, t + i * kStep, t + i * kStep < track.last);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float current[kRun], around[kTaps - 1 + kRun], values[kRun];
      track.widen(packed[i], current);
      track.gather(before, current, around);
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        const float sum = track.convolve(weight, bias, around, r);
        values[r] = p.silu ? cuda::fast_silu(sum) : sum;
        before[r] = current[r];
      }
      track.store(y, t + i * kStep, values);
    }
  }
}

}  // namespace statescan::causal_conv1d
