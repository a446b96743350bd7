// The step sizes of a chunk in the fused backward, by one warp: two tokens a lane.
#pragma once

#include "fused_bwd_span.cuh"

namespace statescan::ssd_scan::fused {

inline constexpr float kLog2e = 1.4426950408889634f;

// Of tokens 2 lane and 2 lane + 1 of the scan. Logarithms are to base 2, from the chunk's start through the token.
struct LaneSteps {
  float raw[2], free[2], dt[2], log_decay[2], total;  // raw: with its bias; free: before it is limited
};

// Of the sequence, in memory.
inline __device__ int token_of_lane(const Span& span, int chunk, int k) {
  return span.place_of(chunk) * kTile + to_memory(span.reverse, 2 * (threadIdx.x % 32) + k);
}

struct StepReader {
  float A, bias;
  const char* from;  // the first token of the sequence

  __device__ StepReader(const FusedBackwardParams& p, const Span& span, int head)
      : A(*reinterpret_cast<const float*>(p.A.data + head * p.A.head) * kLog2e),
        bias(p.dt_bias.data ? *reinterpret_cast<const float*>(p.dt_bias.data + head * p.dt_bias.head) : 0.0f),
        from(p.dt.data + span.batch * p.dt.batch + span.first * p.dt.token + head * p.dt.head) {}

  __device__ void fetch(const FusedBackwardParams& p, const Span& span, int chunk, std::uint32_t (&bits)[2]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (const std::int64_t token = token_of_lane(span, chunk, k); token < span.length)
        bits[k] = cuda::load_bits(from + token * p.dt.token, p.dt.dtype);
  }
};

// Tokens past the end take a step of zero.
inline __device__ LaneSteps scan_steps(const FusedBackwardParams& p, const Span& span, int chunk, float A, float bias,
                                       const std::uint32_t (&bits)[2]) {
  const int lane = threadIdx.x % 32;
  LaneSteps s;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float value = cuda::widen_bits(bits[k], p.dt.dtype);
    s.raw[k] = value + bias;
    s.free[k] = p.dt_softplus ? cuda::fast_softplus(s.raw[k]) : s.raw[k];
    s.dt[k] = token_of_lane(span, chunk, k) < span.length ? clamp(s.free[k], p.dt_min, p.dt_max) : 0.0f;
  }
  const float own[2] = {s.dt[0] * A, s.dt[1] * A};
  float before = own[0] + own[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_up_sync(~0u, before, distance);
    if (lane >= distance) before += other;
  }
  s.total = __shfl_sync(~0u, before, 31);
  before = __shfl_up_sync(~0u, before, 1);
  if (lane == 0) before = 0.0f;
  s.log_decay[0] = before + own[0];
  s.log_decay[1] = before + (own[0] + own[1]);
  return s;
}

inline __device__ void store2(float* to, int pair, float a, float b) {
  reinterpret_cast<float2*>(to)[pair] = make_float2(a, b);
}

// The same of tokens i and i + 1 of the scan, to where `place` has i: the two lie in this order there, or the other way round.
inline __device__ void store_steps(float* to, int place, float a, float b, bool reverse) {
  store2(to, place / 2, reverse ? b : a, reverse ? a : b);
}

// By the warp that has these steps, in the order of memory.
inline __device__ void store_walk_steps(WalkSteps& to, const LaneSteps& s, bool backward, bool reverse) {
  float weight[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) weight[k] = backward ? fast_exp2(s.log_decay[k]) : s.dt[k] * fast_exp2(s.total - s.log_decay[k]);
  const int lane = threadIdx.x % 32;
  store_steps(to.weight, to_memory(reverse, 2 * lane), weight[0], weight[1], reverse);
  if (lane == 0) to.total = fast_exp2(s.total);
}

// Every kThreads-th run of eight elements of a tile, times the weight of its row. `rest`, where it is kept, is what rounding
// takes from them; `gates` are z of a tile of dy, and may lie where the rest will.
template <class NativeElement, int kThreads, int kUnroll, bool kKeepsRest = false, bool kGated = false>
__device__ void weight_tile(void* tile, const WalkSteps& steps, int thread, [[maybe_unused]] void* rest = nullptr,
                            [[maybe_unused]] const void* gates = nullptr) {
  auto* const units = static_cast<uint4*>(tile);
#pragma unroll kUnroll
  for (int unit = thread; unit < kTileBytes / 16; unit += kThreads) {
    const float weight = steps.weight[unit / (kTile / 8)];
    const uint4 v = units[unit];
    std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
    [[maybe_unused]] std::uint32_t rests[4];
    [[maybe_unused]] uint4 z;
    if constexpr (kGated) z = static_cast<const uint4*>(gates)[unit];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float pair[2], weighted[2];
      cuda::widen_word<NativeElement>(words[w], pair);
      if constexpr (kGated) {
        float gate[2];
        cuda::widen_word<NativeElement>(w == 0 ? z.x : w == 1 ? z.y : w == 2 ? z.z : z.w, gate);
        pair[0] *= cuda::fast_silu(gate[0]), pair[1] *= cuda::fast_silu(gate[1]);
      }
      weighted[0] = pair[0] * weight, weighted[1] = pair[1] * weight;
      words[w] = cuda::narrow_word<NativeElement>(weighted);
      if constexpr (kKeepsRest) {
        float rounded[2];
        cuda::widen_word<NativeElement>(words[w], rounded);
        const float lost[2] = {fmaf(pair[0], weight, -rounded[0]), fmaf(pair[1], weight, -rounded[1])};
        rests[w] = cuda::narrow_word<NativeElement>(lost);
      }
    }
    units[unit] = make_uint4(words[0], words[1], words[2], words[3]);
    if constexpr (kKeepsRest) static_cast<uint4*>(rest)[unit] = make_uint4(rests[0], rests[1], rests[2], rests[3]);
  }
}

}  // namespace statescan::ssd_scan::fused
