// What both directions of the kernels for channels-first tensors share.
#pragma once

#include "window.cuh"

namespace statescan::causal_conv1d {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// The channel of a warp, and the segment of tokens that it goes through, kStep at a time. Mirrored, token t lies before token
// t-1 in memory: a run is then loaded from its last token on, and turned round in registers.
template <class Policy, bool kMirrored>
class Track {
 public:
  static constexpr int kTaps = Policy::kTaps, kRun = Policy::kRun;
  static constexpr bool kExact = kTaps == kFour;
  static constexpr int kReach = (kTaps - 1 + kRun - 1) / kRun;  // how many lanes away the window begins
  using Run = cuda::Run<Access::vector, kRun>;

  std::int64_t row, channel, segment;
  int first, last, seqlen;  // tokens
  int lane, unused;

  __device__ explicit Track(const Shape& shape)
      : seqlen(static_cast<int>(shape.seqlen)), lane(threadIdx.x % kWarp), unused(kTaps - shape.width) {
    const std::int64_t unit = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp, line = unit / shape.segments;
    row = line / shape.dim;
    channel = line % shape.dim;
    const std::int64_t part = unit % shape.segments;
    segment = row * shape.segments + part;
    first = static_cast<int>(part * shape.tokens);
    last = static_cast<int>(shape.tokens) < seqlen - first ? first + static_cast<int>(shape.tokens) : seqlen;
  }

  __device__ bool has_work(const Shape& shape) const { return row < shape.batch; }
  __device__ bool counts(int k) const { return kExact || k >= unused; }

  __device__ char* at(const TokenView& t) const { return t.data + (row * t.batch + channel * t.channel); }

  // The run of tokens from t on, in the order of memory; zeros where it is not wanted.
  __device__ void load(Run& run, const char* base, int t, bool wanted) const {
    run.load(base + offset(t), Policy::kDType, 0, wanted ? kRun : 0);
  }
  __device__ void prefetch(const char* base, int t) const { cuda::prefetch(base + offset(t)); }
  __device__ void widen(const Run& run, float (&values)[kRun]) const {
    run.widen(Policy::kDType, values);
    turn(values);
  }
  __device__ void store(char* base, int t, float (&values)[kRun]) const {
    turn(values);
    Run::store(base + offset(t), Policy::kDType, 0, t < last ? kRun : 0, values);
  }

  __device__ void load_weights(const WeightView& t, float (&weight)[kTaps]) const {
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      weight[k] = counts(k) ? cuda::load_element(t.data + (channel * t.channel + (k - unused) * t.tap), t.dtype) : 0.0f;
  }

  // Whether the next step's first lanes look at this one; whether the step before's last lanes do.
  __device__ bool is_late() const { return lane >= kWarp - kReach; }
  __device__ bool is_early() const { return lane < kReach; }

  // around = the kTaps - 1 tokens before the lane's run, then the run. `before`: what the lanes of the step before hold; only
  // the last lanes' matter.
  __device__ void gather(const float (&before)[kRun], const float (&current)[kRun], float (&around)[kTaps - 1 + kRun]) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) around[kTaps - 1 + i] = current[i];
#pragma unroll
    for (int back = 1; back < kTaps; ++back) {
      const int lanes = (back + kRun - 1) / kRun, i = lanes * kRun - back;  // the token lies that many lanes before, at i
      const float given = lane >= kWarp - lanes ? before[i] : current[i];
      around[kTaps - 1 - back] = __shfl_sync(kAllLanes, given, (lane - lanes) & (kWarp - 1));
    }
  }

  // The same for the kTaps - 1 tokens after the run, which come after it.
  __device__ void gather_after(const float (&current)[kRun], const float (&after)[kRun],
                               float (&around)[kTaps - 1 + kRun]) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) around[i] = current[i];
#pragma unroll
    for (int ahead = 0; ahead < kTaps - 1; ++ahead) {
      const int lanes = ahead / kRun + 1, i = ahead % kRun;
      const float given = lane < lanes ? after[i] : current[i];
      around[kRun + ahead] = __shfl_sync(kAllLanes, given, (lane + lanes) & (kWarp - 1));
    }
  }

  // What stands before token 0, as lanes before it would hold it.
  __device__ void load_state(const StateView& t, int width, float (&before)[kRun]) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int tap = (lane - kWarp) * kRun + i + width - 1;
      before[i] = t.data && tap >= 0
                      ? cuda::load_element(t.data + (row * t.sequence + channel * t.channel + tap * t.tap), t.dtype)
                      : 0.0f;
    }
  }

  // bias + sum of weight and the tokens around token i of the run, taps in order.
  __device__ float convolve(const float (&weight)[kTaps], float bias, const float (&around)[kTaps - 1 + kRun], int i) const {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      if (counts(k)) sum = fmaf(weight[k], around[i + k], sum);
    return sum;
  }

 private:
  static __device__ std::int64_t offset(int t) {
    return std::int64_t{kMirrored ? -(t + kRun - 1) : t} * cuda::bytes_of(Policy::kDType);
  }
  static __device__ void turn(float (&v)[kRun]) {
#pragma unroll
    for (int i = 0; i < kRun / 2 && kMirrored; ++i) {
      const float kept = v[i];
      v[i] = v[kRun - 1 - i];
      v[kRun - 1 - i] = kept;
    }
  }
};

}  // namespace statescan::causal_conv1d
