// What both directions of the walk over tokens share.
#pragma once

#include "window.cuh"

namespace statescan::causal_conv1d {

// The channels of a thread, and the segment of tokens that it takes them through.
template <class Policy>
class Walker {
 public:
  static constexpr int kTaps = Policy::kTaps, kChannels = Policy::kChannels;
  static constexpr bool kExact = kTaps == kFour;
  using Run = cuda::Run<Policy::kAccess, kChannels>;

  std::int64_t row, channel, segment, first, last;
  int count;   // of the channels, how many there are
  int unused;  // taps of the registers that come before the filter's

  __device__ explicit Walker(const Shape& shape) : unused(kTaps - shape.width) {
    const std::int64_t groups = (shape.dim + kChannels - 1) / kChannels;
    const std::int64_t unit = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    channel = unit % groups * kChannels;
    segment = unit / groups;
    row = segment / shape.segments;
    first = segment % shape.segments * shape.tokens;
    last = first + shape.tokens < shape.seqlen ? first + shape.tokens : shape.seqlen;
    count = shape.dim - channel < kChannels ? static_cast<int>(shape.dim - channel) : kChannels;
  }

  __device__ bool has_work(const Shape& shape) const { return row < shape.batch; }

  // Whether tap k counts.
  __device__ bool counts(int k) const { return kExact || k >= unused; }

  __device__ char* at(const TokenView& t, std::int64_t token) const {
    return t.data + (row * t.batch + token * t.token + channel * t.channel);
  }
  __device__ void load(Run& run, const TokenView& t, const char* from, bool wanted) const {
    run.load(from, Policy::kDType, step_of(t), wanted ? count : 0);
  }
  __device__ void store(const TokenView& t, char* to, const float (&values)[kChannels]) const {
    Run::store(to, Policy::kDType, step_of(t), count, values);
  }

  __device__ void load_weights(const WeightView& t, float (&weight)[kTaps][kChannels]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const char* const from = t.data + (channel + c) * t.channel;
      if constexpr (kExact && Policy::kAccess == Access::vector) {
        cuda::Run<Access::vector, kFour> packed;
        float taps[kFour];
        packed.load(from, t.dtype, 0, kFour);
        packed.widen(t.dtype, taps);
#pragma unroll
        for (int k = 0; k < kTaps; ++k) weight[k][c] = taps[k];
      } else {
#pragma unroll
        for (int k = 0; k < kTaps; ++k)
          weight[k][c] = counts(k) && c < count ? cuda::load_element(from + (k - unused) * t.tap, t.dtype) : 0.0f;
      }
    }
  }
  __device__ void load_bias(const WeightView& t, float (&bias)[kChannels]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      bias[c] = t.data && c < count ? cuda::load_element(t.data + (channel + c) * t.channel, t.dtype) : 0.0f;
  }

  // The inputs before token t, oldest first.
  __device__ void load_window(const TokenView& x, const StateView& state, int width, const Span& span, std::int64_t t,
                              float (&window)[kTaps - 1][kChannels]) const {
    if (t - span.first >= kTaps - 1) {
      Run packed[kTaps - 1];
#pragma unroll
      for (int k = 0; k < kTaps - 1; ++k) load(packed[k], x, at(x, t - (kTaps - 1) + k), true);
#pragma unroll
      for (int k = 0; k < kTaps - 1; ++k) packed[k].widen(Policy::kDType, window[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k)
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        window[k][c] = c < count ? input_at(x, state, width, row, span, channel + c, t - span.first - (kTaps - 1) + k) : 0.0f;
  }

  // bias + sum of weight and window, taps in order.
  __device__ float convolve(const float (&weight)[kTaps][kChannels], const float (&bias)[kChannels],
                            const float (&window)[kTaps - 1][kChannels], const float (&current)[kChannels], int c) const {
    float sum = bias[c];
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k)
      if (counts(k)) sum = fmaf(weight[k][c], window[k][c], sum);
    return fmaf(weight[kTaps - 1][c], current[c], sum);
  }

  // Lets the oldest entry go.
  __device__ static void push(float (&window)[kTaps - 1][kChannels], const float (&current)[kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int k = 0; k + 1 < kTaps - 1; ++k) window[k][c] = window[k + 1][c];
      window[kTaps - 2][c] = current[c];
    }
  }

  // Zeros in tokens [from, to).
  __device__ void clear(const TokenView& t, std::int64_t from, std::int64_t to) const {
    const float zeros[kChannels] = {};
#pragma unroll 1
    for (; from < to; ++from) store(t, at(t, from), zeros);
  }

 private:
  // From one channel to the next, in bytes; a constant where it can be.
  __device__ static std::int64_t step_of(const TokenView& t) {
    return Policy::kAccess == Access::vector ? cuda::bytes_of(Policy::kDType) : t.channel;
  }
};

}  // namespace statescan::causal_conv1d
