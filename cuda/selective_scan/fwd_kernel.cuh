// selective_scan forward
// Math     h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t];  y[t] = C[t] . h[t] + D x[t], times silu(z[t])
// Shapes   x, dt, z, y [b,l,d]; A, h [d,n]; B, C [b,l,g,n] or [d,n]
// Traffic  x, dt, z, y once: 4*b*l*d elements; B, C once a block of 64 channels, from L2
//          b8 l2048 d5120 n16 bf16: 0.67 GB, 0.22 ms at 3.0 TB/s. 1.34 G states take 1.34 G exp2 beside 0.34 G for softplus and
//          silu: 0.45 ms of the special-function units of an H100; and 5.5 instructions a state with 45 a token, 0.38 ms of issue
// Launch   one axis of sequences x segments x blocks; a block: 64 channels, one warp for 4 states of them (8 of long rows)
// Numerics float32. A warp adds up its states of a channel in order, then the warps in order. Where a sequence is cut into
//          segments, a first launch leaves the end of each, started from zero, with the sum of its dt; a segment starts from
//          those before it
#pragma once

#include <statescan/math.h>

#include "decay.cuh"
#include "tile.cuh"

namespace statescan::selective_scan {

// The tokens of a sequence's segment, counted in scan order from the sequence's start.
struct Span {
  std::int64_t row, first, last;   // of the sequence, in memory
  std::int64_t begin, end;         // of the segment
};

// cu_seqlens on a device cannot be checked without waiting for it: wrong values give wrong results, but no wild access.
inline __device__ std::int64_t boundary(const Params& p, std::int64_t i) {
  const std::int64_t at = p.cu_is_int64 ? static_cast<const std::int64_t*>(p.cu_seqlens)[i * p.cu_stride]
                                        : static_cast<const std::int32_t*>(p.cu_seqlens)[i * p.cu_stride];
  return at < 0 ? 0 : (at > p.seqlen ? p.seqlen : at);
}

inline __device__ Span span_of(const Params& p, std::int64_t sequence, std::int64_t segment) {
  Span s{sequence, 0, p.seqlen, 0, 0};
  if (p.cu_seqlens) s = {0, boundary(p, sequence), sequence == p.sequences ? p.seqlen : boundary(p, sequence + 1), 0, 0};
  const std::int64_t length = s.last > s.first ? s.last - s.first : 0;
  const std::int64_t tiles = (length + kTile - 1) / kTile, each = (tiles + p.segments - 1) / p.segments * kTile;
  s.begin = segment * each < length ? segment * each : length;
  s.end = s.begin + each < length ? s.begin + each : length;
  return s;
}

// A [b,l,d] or [b,l,g,n] tensor at a token of a sequence, walked in scan order.
inline __device__ Walk walk_of(const Params& p, const View& t, const Span& s, std::int64_t token, std::int64_t channel) {
  const std::int64_t at = p.reverse ? s.last - 1 - token : s.first + token;
  return {t.data + s.row * t.row + at * t.token + channel * t.channel, p.reverse ? -t.token : t.token, t.channel, t.dtype};
}

// B or C of a tile: each lane moves half of the warp's states of one token, from memory through registers to [token][state].
template <class Policy>
class Projection {
 public:
  static constexpr int kEach = Policy::kStates / 2, kParts = Policy::kParts;

  __device__ void load(const View& t, const Walk& walk, int tokens, std::int64_t states) {
    const int lane = threadIdx.x % kWarp, token = lane / 2, first = lane % 2 * kEach;
    const char* const from = walk.at + token * walk.token + first * t.state;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const bool inside = token < tokens && first + i < states;
        const DType dtype = kParts == 2 ? DType::float32 : t.dtype;
        word_[i * kParts + part] = inside ? cuda::load_bits(from + i * t.state + 4 * part, dtype) : 0;
      }
  }
  __device__ void put(float* tile, DType dtype) const {
    float* const to = tile + threadIdx.x % kWarp * (kEach * kParts);
#pragma unroll
    for (int i = 0; i < kEach * kParts; ++i) to[i] = cuda::widen_bits(word_[i], kParts == 2 ? DType::float32 : dtype);
  }

 private:
  std::uint32_t word_[kEach * kParts];
};

// A warp's part of a [d,n] tensor or of one sequence's states: two channels of each lane.
template <class Policy, class Visit>
__device__ void visit_states(const View& t, std::int64_t row, std::int64_t channel, int channels, std::int64_t state,
                             std::int64_t states, Visit visit) {
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int k = 0; k < Policy::kStates; ++k) {
      const int lane_channel = threadIdx.x % kWarp * 2 + c;
      if (lane_channel >= channels || k >= states) continue;
      char* const at = t.data + row * t.row + (channel + lane_channel) * t.channel + (state + k) * t.state;
#pragma unroll
      for (int part = 0; part < Policy::kParts; ++part) visit(c, k * Policy::kParts + part, at + 4 * part);
    }
}

template <class Policy>
__device__ void load_states(const View& t, std::int64_t row, std::int64_t channel, int channels, std::int64_t state,
                            std::int64_t states, float (&values)[2][Policy::kValues]) {
  const DType dtype = Policy::kParts == 2 ? DType::float32 : t.dtype;
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int v = 0; v < Policy::kValues; ++v) values[c][v] = 0.0f;
  if (!t.data) return;
  visit_states<Policy>(t, row, channel, channels, state, states,
                       [&](int c, int v, const char* at) { values[c][v] = cuda::load_element(at, dtype); });
}

// Floats of shared memory: what a block shares, and what each of its warps has.
template <class Policy>
struct Storage {
  static constexpr int kSteps = kTile * kChannels * 2, kPerChannel = 2 * kChannels;
  static constexpr int kProjection = kTile * Policy::kValues;                                  // of one of B and C
  static constexpr int kFixed = Policy::kTimeInvariant ? kChannels * Policy::kValues : 0;      // the same
  static constexpr int kSums = kTile * kChannels;
  static constexpr int kShared = kSteps + kPerChannel, kPerWarp = kSums + 2 * kProjection + 2 * kFixed;
};

// kEndsOnly: the state at the end of each segment but the last, started from zero.
template <class Policy, bool kEndsOnly>
__global__ void __launch_bounds__(Policy::kMostThreads, Policy::kLeastBlocks)
    selective_scan_forward_kernel(const __grid_constant__ Params p) {
  constexpr int kStates = Policy::kStates, kValues = Policy::kValues, kParts = Policy::kParts;
  using Memory = Storage<Policy>;
  extern __shared__ float4 memory[];
  float4* const steps = memory;
  float* const bias = reinterpret_cast<float*>(memory) + Memory::kSteps;
  float* const skip = bias + kChannels;
  float* const sums = skip + kChannels;  // [warp][token][channel]

  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const std::uint32_t block = blockIdx.x % p.blocks, group = block / p.blocks_of_group;
  const std::uint32_t within = block % p.blocks_of_group * kChannels;
  const int channels = min(static_cast<int>(p.group_channels - within), kChannels);
  const std::int64_t channel = static_cast<std::int64_t>(group) * p.group_channels + within;
  const std::int64_t ends = p.segments - 1, segments = kEndsOnly ? ends : p.segments;
  const std::int64_t segment = blockIdx.x / p.blocks % segments, sequence = blockIdx.x / p.blocks / segments;
  const Span span = span_of(p, sequence, segment);
  if (p.cu_seqlens && sequence == p.sequences) {  // the rows past the last packed token
    if (segment > 0) return;
    const int places = blockDim.x / kChannels;
    for (std::int64_t t = span.first + thread / kChannels; t < span.last; t += places)
      if (thread % kChannels < channels)
        cuda::store_element(p.y.data + t * p.y.token + (channel + thread % kChannels) * p.y.channel, p.y.dtype, 0.0f);
    return;
  }

  for (int c = thread; c < kChannels; c += blockDim.x) {
    const auto value = [&](const View& t) {
      return t.data && c < channels ? *reinterpret_cast<const float*>(t.data + (channel + c) * t.channel) : 0.0f;
    };
    bias[c] = value(p.dt_bias), skip[c] = value(p.D);
  }
  __syncthreads();

  const bool moves = thread < kRuns;
  const Place place = place_of(p.reach, p.reverse, thread % kRuns);
  const float4* const lane_steps = steps + slot_of_pair(lane);
  float* const lane_sums = sums + warp * Memory::kSums + place_in_sums(2 * lane);
  float* const tiles = sums + blockDim.x / kWarp * Memory::kSums + warp * (Memory::kPerWarp - Memory::kSums);
  float* const tile_B = tiles;
  float* const tile_C = tiles + Memory::kProjection;
  float* const fixed_B = tile_C + Memory::kProjection;  // [channel of the lane][lane][state]
  float* const fixed_C = fixed_B + Memory::kFixed;

#pragma unroll 1
  for (std::int64_t piece = 0; piece < p.dstate || piece == 0; piece += p.piece) {
    const bool first_piece = piece == 0, last_piece = piece + p.piece >= p.dstate;
    const std::int64_t held = last_piece ? p.dstate - piece : p.piece;
    const int scanners = static_cast<int>((held + kStates - 1) / kStates);
    const std::int64_t state = piece + warp * kStates, states = held - warp * kStates;  // of this warp
    const bool scans = warp < scanners;

    float rate[2][kValues], h[2][kValues];
    load_states<Policy>(p.A, 0, channel, channels, state, states, rate);
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int k = 0; k < kStates; ++k) rate[c][k * kParts] *= kRateScale;
    load_states<Policy>(kEndsOnly ? View{} : p.initial_state, sequence, channel, channels, state, states, h);
    const std::int64_t end_token = p.dstate * kParts * 4;
    const View end_view{reinterpret_cast<char*>(p.end_state), DType::float32, p.dim * end_token, 0, end_token, 4 * kParts};
    if constexpr (!kEndsOnly) {
#pragma unroll 1
      for (std::int64_t before = sequence * ends; before < sequence * ends + segment; ++before) {
        float end[2][kValues];
        load_states<Policy>(end_view, before, channel, channels, state, states, end);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float dt = 2 * lane + c < channels ? p.end_step[before * p.dim + channel + 2 * lane + c] : 0.0f;
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            advance<Policy::kArithmetic>(&h[c][k * kParts], dt, &rate[c][k * kParts], 1.0f, &end[c][k * kParts]);
        }
      }
    }
    if constexpr (Policy::kTimeInvariant) {
      const auto keep = [&](const View& t, bool varying, float* fixed) {
        if (varying) return;
        float values[2][kValues];
        load_states<Policy>(t, 0, channel, channels, state, states, values);
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int v = 0; v < kValues; ++v) fixed[(c * kWarp + lane) * kValues + v] = values[c][v];
      };
      if (scans) {
        keep(p.B, p.varying_B, fixed_B);
        keep(p.C, p.varying_C, fixed_C);
      }
    }

    // What the next tile needs, on its way while this one is scanned.
    Run<Policy::kXBytes> x, z, next_x, next_z;
    Run<4> next_dt;
    Projection<Policy> next_B, next_C;
    const auto fetch = [&](std::int64_t token) {
      const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
      if (moves) {
        load_run(next_x, walk_of(p, p.x, span, token, channel), place, tokens, channels);
        load_run(next_dt, walk_of(p, p.dt, span, token, channel), place, tokens, channels);
        if (!kEndsOnly && last_piece && p.z.data)
          load_run(next_z, walk_of(p, p.z, span, token, channel), place, tokens, channels);
      }
      if (!scans) return;
      if (p.varying_B) {
        Walk walk = walk_of(p, p.B, span, token, group);
        walk.at += state * p.B.state;
        next_B.load(p.B, walk, tokens, states);
      }
      if (!kEndsOnly && p.varying_C) {
        Walk walk = walk_of(p, p.C, span, token, group);
        walk.at += state * p.C.state;
        next_C.load(p.C, walk, tokens, states);
      }
    };
    next_z.clear();
    fetch(span.begin);
    float total[2] = {};

#pragma unroll 1
    for (std::int64_t token = span.begin; token < span.end; token += kTile) {
      const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
      if (moves) {
        x = next_x, z = next_z;
        float dt[kRun], u[kRun];
        next_dt.widen(p.dt.dtype, dt);
        x.widen(p.x.dtype, u);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          dt[i] += bias[place.channel_of(i)];
          if (p.dt_softplus) dt[i] = cuda::fast_softplus(dt[i]);
          dt[i] = clamp(dt[i], p.dt_min, p.dt_max);
          const bool inside = place.holds(i, tokens, channels);  // outside, a step of zero leaves the states alone
          dt[i] = inside ? dt[i] : 0.0f;
          u[i] = inside ? u[i] * dt[i] : 0.0f;
        }
        put_steps(steps, place, dt, u);
      }
      if (scans) {
        if (p.varying_B) next_B.put(tile_B, p.B.dtype);
        if (!kEndsOnly && p.varying_C) next_C.put(tile_C, p.C.dtype);
      }
      __syncthreads();
      if (token + kTile < span.end) fetch(token + kTile);

      if (scans) {
#pragma unroll 4
        for (int t = 0; t < kTile; ++t) {
          const float4 step = lane_steps[t * (kChannels / 2)];
          const float dt[2] = {step.x, step.y}, u[2] = {step.z, step.w};
          float B[kValues], C[kValues], y[2] = {};
          const auto read = [&](float (&to)[kValues], const float* tile, bool varying, const float* fixed, int c) {
            if (Policy::kTimeInvariant || c == 0) {
              const float4* const from = reinterpret_cast<const float4*>(
                  !Policy::kTimeInvariant || varying ? tile + t * kValues : fixed + (c * kWarp + lane) * kValues);
#pragma unroll
              for (int v = 0; v < kValues; v += 4) {
                const float4 four = from[v / 4];
                to[v] = four.x, to[v + 1] = four.y, to[v + 2] = four.z, to[v + 3] = four.w;
              }
            }
          };
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            read(B, tile_B, p.varying_B, fixed_B, c);
            if constexpr (!kEndsOnly) read(C, tile_C, p.varying_C, fixed_C, c);
            if constexpr (kEndsOnly) total[c] += dt[c];
#pragma unroll
            for (int v = 0; v < kValues; v += kParts) {
              advance<Policy::kArithmetic>(&h[c][v], dt[c], &rate[c][v], u[c], &B[v]);
              if constexpr (!kEndsOnly) y[c] = read_out<kParts>(&C[v], &h[c][v], y[c]);
            }
          }
          if constexpr (!kEndsOnly) *reinterpret_cast<float2*>(lane_sums + t * kChannels) = make_float2(y[0], y[1]);
        }
      }
      __syncthreads();

      if constexpr (!kEndsOnly) {
        if (!moves) continue;
        float y[kRun] = {};
        for (int w = 0; w < scanners; ++w) add_sums(sums + w * Memory::kSums, place, y);
        if (!first_piece || !last_piece) {
          const View view{reinterpret_cast<char*>(p.partial), DType::float32, 4 * p.seqlen * p.dim, 4 * p.dim, 4, 0};
          const Walk walk = walk_of(p, view, span, token, channel);
          Place one_by_one = place;
          one_by_one.is_vector = false;
          Run<4> before;
          before.clear();
          if (!first_piece) load_run(before, walk, one_by_one, tokens, channels);
          float values[kRun];
          before.widen(DType::float32, values);
#pragma unroll
          for (int i = 0; i < kRun; ++i) y[i] += values[i];
          if (!last_piece) {
            store_run<4>(walk, one_by_one, tokens, channels, y);
            continue;
          }
        }
        float values[kRun];
        x.widen(p.x.dtype, values);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          y[i] *= kParts;
          if (p.D.data) y[i] = fmaf(skip[place.channel_of(i)], values[i], y[i]);
        }
        if (p.z.data) {
          z.widen(p.x.dtype, values);
#pragma unroll
          for (int i = 0; i < kRun; ++i) y[i] *= cuda::fast_silu(values[i]);
        }
        store_run<Policy::kXBytes>(walk_of(p, p.y, span, token, channel), place, tokens, channels, y);
      }
    }

    if (!scans) continue;
    const bool ends_sequence = !kEndsOnly && segment == ends && p.final_state.data;
    if (kEndsOnly || ends_sequence) {
      const View& to = kEndsOnly ? end_view : p.final_state;
      const DType dtype = kParts == 2 ? DType::float32 : to.dtype;
      visit_states<Policy>(to, kEndsOnly ? sequence * ends + segment : sequence, channel, channels, state, states,
                           [&](int c, int v, char* at) { cuda::store_element(at, dtype, h[c][v]); });
    }
    if constexpr (kEndsOnly) {
      if (first_piece && warp == 0)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (2 * lane + c < channels) p.end_step[(sequence * ends + segment) * p.dim + channel + 2 * lane + c] = total[c];
    }
  }
}

}  // namespace statescan::selective_scan
