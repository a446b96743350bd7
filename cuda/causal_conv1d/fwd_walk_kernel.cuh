// causal_conv1d forward, walking over tokens: any layout, channels side by side at best
// Math     y[t,d] = act(bias[d] + sum_k weight[d,k] x[t-w+1+k,d])
// Shapes   x, y [b,l,d]; weight [d,w]; states [b or s,d,w-1]
// Traffic  read x, write y: 2*b*l*d*sizeof(Element); floor: that over 3.0 TB/s. The w-1 tokens before a segment are read once
//          more, from the L2 cache
// Launch   one axis of blocks of 64 threads over channels (fastest), segments of tokens and rows; a thread takes 4
//          channels through a segment of 16 to 128 tokens, of four taps up to 24
// Numerics float32, taps in order: the bits depend on the window alone
#pragma once

#include "walk.cuh"

namespace statescan::causal_conv1d {

template <class Policy>
__global__ void __launch_bounds__(kForwardWalkThreads)
    causal_conv1d_forward_walk_kernel(const __grid_constant__ ForwardParams p) {
  constexpr int kChannels = Policy::kChannels, kTaps = Policy::kTaps, kAhead = Policy::kForwardAhead;
  using Walk = Walker<Policy>;
  const Walk walk(p.shape);
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (!walk.has_work(p.shape)) return;
  float weight[kTaps][kChannels], bias[kChannels];
  walk.load_weights(p.weight, weight);
  walk.load_bias(p.bias, bias);

#pragma unroll 1
  for (std::int64_t t = walk.first; t < walk.last;) {
    const Span span = span_at(p.sequences, walk.row, t);
    const std::int64_t stop = span.last < walk.last ? span.last : walk.last;
    if (span.sequence < 0) {
      walk.clear(p.y, t, stop);
      t = stop;
      continue;
    }
    float window[kTaps - 1][kChannels];
    walk.load_window(p.x, p.initial_state, p.shape.width, span, t, window);

    // A ring of kAhead tokens on their way: a slot is filled again as soon as it is used.
    const char* from = walk.at(p.x, t);
    char* to = walk.at(p.y, t);
    typename Walk::Run packed[kAhead];
    const auto fetch = [&](int slot, bool wanted) {
      walk.load(packed[slot], p.x, from, wanted);
      from += p.x.token;
    };
    const auto step = [&](int slot, std::int64_t token) {
      float current[kChannels], values[kChannels];
      packed[slot].widen(Policy::kDType, current);
      fetch(slot, token + kAhead < stop);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float sum = walk.convolve(weight, bias, window, current, c);
        values[c] = p.silu ? cuda::fast_silu(sum) : sum;
      }
      walk.store(p.y, to, values);
      to += p.y.token;
      walk.push(window, current);
    };
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) fetch(slot, t + slot < stop);
#pragma unroll 1
    for (; t + kAhead <= stop; t += kAhead)
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot) step(slot, t + slot);
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot)
      if (t + slot < stop) step(slot, t + slot);
    t = stop;
  }
}

}  // namespace statescan::causal_conv1d
