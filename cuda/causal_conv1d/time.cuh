// What both directions of the kernels for channels-first tensors share.
#pragma once

#include "window.cuh"

namespace statescan::causal_conv1d {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// The channel of a warp, and the segment of tokens that it goes through, kStep at a time. With `reverse` token t lies before
// token t-1 in memory: a run is then loaded from its last token on, and turned round in registers.
template <class Policy>
class Track {
 public:
  static constexpr int kTaps = Policy::kTaps, kRun = Policy::kRun;
  static constexpr bool kExact = kTaps == kFour;
  static constexpr int kReach = (kTaps - 1 + kRun - 1) / kRun;  // how many lanes away the window begins
  using Run = cuda::Run<Access::vector, kRun>;

  std::int64_t row, channel, segment, first, last, seqlen;
  int lane, unused;

  __device__ Track(const Shape& shape, bool mirrored)
      : seqlen(shape.seqlen), lane(threadIdx.x % kWarp), unused(kTaps - shape.width), mirrored_(mirrored) {
    const std::int64_t unit = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp, line = unit / shape.segments;
    row = line / shape.dim;
    channel = line % shape.dim;
    const std::int64_t part = unit % shape.segments;
    segment = row * shape.segments + part;
    first = part * shape.tokens;
    last = first + shape.tokens < seqlen ? first + shape.tokens : seqlen;
  }

  __device__ bool has_work(const Shape& shape) const { return row < shape.batch; }
  __device__ bool counts(int k) const { return kExact || k >= unused; }

  __device__ char* at(const TokenView& t) const { return t.data + (row * t.batch + channel * t.channel); }

  // The run of tokens from t on, in the order of memory; zeros where it is not wanted.
  __device__ void load(Run& run, const char* base, std::int64_t t, bool wanted) const {
    run.load(base + offset(t), Policy::kDType, 0, wanted ? kRun : 0);
  }
  __device__ void widen(const Run& run, float (&values)[kRun]) const {
    run.widen(Policy::kDType, values);
    turn(values);
  }
  // The same of several runs, with one branch.
  __device__ void widen(const Run& a, float (&of_a)[kRun], const Run& b, float (&of_b)[kRun], const Run& c,
                        float (&of_c)[kRun]) const {
    a.widen(Policy::kDType, of_a), b.widen(Policy::kDType, of_b), c.widen(Policy::kDType, of_c);
    turn(of_a, of_b, of_c);
  }
  __device__ void store(char* base, std::int64_t t, float (&values)[kRun]) const {
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
  bool mirrored_;

  __device__ std::int64_t offset(std::int64_t t) const {
    return (mirrored_ ? -(t + kRun - 1) : t) * cuda::bytes_of(Policy::kDType);
  }
  template <class... Values>
  __device__ void turn(Values&... values) const {
    if (!mirrored_) return;
    asm volatile("");  // a branch: selections would cost every call what turning costs
    const auto turn_one = [](float (&v)[kRun]) {
#pragma unroll
      for (int i = 0; i < kRun / 2; ++i) {
        const float kept = v[i];
        v[i] = v[kRun - 1 - i];
        v[kRun - 1 - i] = kept;
      }
    };
    (turn_one(values), ...);
  }
};

}  // namespace statescan::causal_conv1d
