// causal_conv1d backward, walking over tokens: any layout, channels side by side at best
// Math     g[t] = dy[t] act'(pre[t]); dx[t] = sum_k weight[k] g[t+w-1-k], dweight[k] = sum_t g[t] x[t-w+1+k], dbias = sum_t
// g[t];
//          dfinal_state adds to the dx of the last w-1 inputs
// Shapes   x, dy, dx [b,l,d]; weight [d,w]; states [b or s,d,w-1]
// Traffic  read x and dy, write dx: 3*b*l*d*sizeof(Element); floor: that over 3.0 TB/s. w-1 tokens on either side of a segment
// are
//          read once more, from the L2 cache; the shares of dweight and dbias are 8*(w+1) bytes a segment and channel
// Launch   one axis of blocks of 128 threads over channels (fastest), segments of tokens and rows; a thread takes 4 channels
//          through a segment of 32 to 256 tokens. Then the shares are added up
// Numerics float32; a segment adds up its tokens in order. No atomics: the bits depend on the shape and the values alone
#pragma once

#include <type_traits>

#include "walk.cuh"

namespace statescan::causal_conv1d {

template <class Policy>
__global__ void __launch_bounds__(kThreads, Policy::kTaps == kFour ? 4 : 1)
    causal_conv1d_backward_walk_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kChannels = Policy::kChannels, kTaps = Policy::kTaps, kAhead = Policy::kBackwardAhead;
  using Walk = Walker<Policy>;
  const Walk walk(p.shape);
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (!walk.has_work(p.shape)) return;
  float weight[kTaps][kChannels], bias[kChannels], dweight[kTaps][kChannels] = {}, dbias[kChannels] = {};
  walk.load_weights(p.weight, weight);
  walk.load_bias(p.bias, bias);

#pragma unroll 1
  for (std::int64_t t = walk.first; t < walk.last;) {
    const Span span = span_at(p.sequences, walk.row, t);
    const std::int64_t stop = span.last < walk.last ? span.last : walk.last;
    if (span.sequence < 0) {
      if (p.dx.data) walk.clear(p.dx, t, stop);
      t = stop;
      continue;
    }
    // gradients: those of the sums of the last kTaps - 1 tokens, oldest first; dx follows kTaps - 1 tokens behind.
    float window[kTaps - 1][kChannels], gradients[kTaps - 1][kChannels] = {};
    walk.load_window(p.x, p.initial_state, p.shape.width, span, t, window);
    const std::int64_t end = stop + kTaps - 1, begin = t;
    const char *x_at = walk.at(p.x, t), *dy_at = walk.at(p.dy, t);
    char* dx_at = walk.at(p.dx, t - (kTaps - 1));
    typename Walk::Run packed_x[kAhead], packed_dy[kAhead];
    const auto fetch = [&](int slot, std::int64_t u) {
      const bool wanted = u < span.last && u < end;
      walk.load(packed_x[slot], p.x, x_at, wanted);
      walk.load(packed_dy[slot], p.dy, dy_at, wanted);
      x_at += p.x.token;
      dy_at += p.dy.token;
    };
    // Token u; `is_inner`: it and its dx lie in the segment, and dfinal_state does not reach that far.
    const auto step = [&](int slot, std::int64_t u, auto is_inner) {
      constexpr bool inner = decltype(is_inner)::value;
      float current[kChannels], gradient[kChannels], values[kChannels];
      packed_x[slot].widen(Policy::kDType, current);
      packed_dy[slot].widen(Policy::kDType, gradient);
      fetch(slot, u + kAhead);
      // Past the end 0 would meet what the last tokens make of act', which may not be finite. One branch for all channels: what
      // each waits for goes on beside the others.
      if (p.silu && (inner || u < span.last)) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) gradient[c] *= cuda::fast_dsilu(walk.convolve(weight, bias, window, current, c));
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        values[c] = 0.0f;
#pragma unroll
        for (int k = kTaps - 1; k > 0; --k)
          if (walk.counts(k)) values[c] = fmaf(weight[k][c], gradients[kTaps - 1 - k][c], values[c]);
        if (walk.counts(0)) values[c] = fmaf(weight[0][c], gradient[c], values[c]);
      }
      if (inner || u < stop) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
#pragma unroll
          for (int k = 0; k < kTaps - 1; ++k)
            if (walk.counts(k)) dweight[k][c] = fmaf(gradient[c], window[k][c], dweight[k][c]);
          dweight[kTaps - 1][c] = fmaf(gradient[c], current[c], dweight[kTaps - 1][c]);
          dbias[c] += gradient[c];
        }
      }
      const std::int64_t out = u - (kTaps - 1);
      if (!inner && p.dfinal_state.data && out >= span.last - (p.shape.width - 1)) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          if (c < walk.count) values[c] += from_final_state(p, span, walk.channel + c, out - span.first);
      }
      if (p.dx.data && (inner || out >= begin)) walk.store(p.dx, dx_at, values);
      dx_at += p.dx.token;
      walk.push(window, current);
      walk.push(gradients, gradient);
    };
    const auto inside = [&](std::int64_t u) { return u - (kTaps - 1) >= begin && u + kAhead <= stop; };
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) fetch(slot, t + slot);
#pragma unroll 1
    while (t < end) {
#pragma unroll 1
      for (; inside(t); t += kAhead)
#pragma unroll
        for (int slot = 0; slot < kAhead; ++slot) step(slot, t + slot, std::true_type{});
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot)
        if (t + slot < end) step(slot, t + slot, std::false_type{});
      t += kAhead;
    }
    t = stop;
  }

  if (!p.partial) return;
  float* share = p.partial + walk.segment * (p.shape.width + 1) * p.shape.dim + walk.channel;
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    if (!walk.counts(k)) continue;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (c < walk.count) share[c] = dweight[k][c];
    share += p.shape.dim;
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (c < walk.count) share[c] = dbias[c];
}

}  // namespace statescan::causal_conv1d
