// The steps of a chunk of one head: bias, softplus, limit, and the prefix sums of dt A, by one warp.
#pragma once

#include <statescan/math.h>

#include "../common/element.cuh"
#include "walk.cuh"

namespace statescan::ssd_scan {

// 2^v. The argument is a difference of prefix sums; far below zero it gives zero.
inline __device__ float exp2_fast(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// With s[i] = log2(e) * sum_{k<=i} dt[k] A, as a sum of two floats: a difference keeps its digits where s is large.
template <int kChunk>
struct Steps {
  float high[kChunk], low[kChunk];  // s
  float dt[kChunk];
  float from_start[kChunk];  // exp(s[i]): what is left of the state before the chunk. Its last: the chunk's decay
  float to_end[kChunk];      // exp(s[last] - s[j]) dt[j]: the weight of token j in the state after the chunk

  __device__ float2 pair(const float (&of)[kChunk], int i) const { return *reinterpret_cast<const float2*>(&of[i]); }

  // The weight of token j in the state after the first `tokens`.
  __device__ float weight(int j, int tokens) const {
    return j < tokens ? exp2_fast((high[tokens - 1] - high[j]) + (low[tokens - 1] - low[j])) * dt[j] : 0.0f;
  }
};

// Reads a chunk ahead, so that no load is waited for.
template <int kChunk>
class StepLoader {
 public:
  __device__ StepLoader(const Params& p, const Walk& walk, std::int64_t head)
      : p_(p),
        sign_(walk.sign),
        from_(p.dt.data + walk.batch * p.dt.batch + walk.origin * p.dt.token + head * p.dt.head),
        A_(*reinterpret_cast<const float*>(p.A.data + head * p.A.head)),
        bias_(p.dt_bias.data ? *reinterpret_cast<const float*>(p.dt_bias.data + head * p.dt_bias.head) : 0.0f) {}

  __device__ void load(std::int64_t start, int count) {
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      const int i = threadIdx.x % 32 * kOfLane + k;
      inside_[k] = i < count;
      bits_[k] = inside_[k] ? cuda::load_bits(from_ + (start + i) * sign_ * p_.dt.token, p_.dt.dtype) : 0;
    }
  }

  // The steps of what was loaded; returns s[last]. Tokens past the end take a step of zero. Sums are in double: their order
  // then does not show, and low is exact.
  __device__ double finish(Steps<kChunk>& steps) const {
    const int lane = threadIdx.x % 32;
    float dt[kOfLane];
    double s[kOfLane], sum = 0;
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      dt[k] =
          inside_[k] ? discretise(cuda::widen_bits(bits_[k], p_.dt.dtype), bias_, p_.dt_softplus, p_.dt_min, p_.dt_max) : 0.0f;
      sum += double(dt[k]) * (inside_[k] ? A_ * kLog2e : 0.0);
      s[k] = sum;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double before = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += before;
    }
    double before = __shfl_up_sync(~0u, sum, 1);
    if (lane == 0) before = 0;
    const double last = __shfl_sync(~0u, sum, 31);
    const float last_high = static_cast<float>(last), last_low = static_cast<float>(last - last_high);
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      const int i = lane * kOfLane + k;
      if (i >= kChunk) break;
      const double at = before + s[k];
      const float high = static_cast<float>(at), low = static_cast<float>(at - high), from_start = exp2_fast(high);
      steps.high[i] = high;
      steps.low[i] = low;
      steps.dt[i] = dt[k];
      steps.from_start[i] = fmaf(from_start, low * kLn2, from_start);
      steps.to_end[i] = exp2_fast((last_high - high) + (last_low - low)) * dt[k];
    }
    return last;
  }

 private:
  static constexpr int kOfLane = kChunk > 32 ? kChunk / 32 : 1;
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr float kLn2 = 0.69314718f;

  const Params& p_;
  int sign_;
  const char* from_;
  float A_, bias_;
  std::uint32_t bits_[kOfLane];
  bool inside_[kOfLane];
};

}  // namespace statescan::ssd_scan
