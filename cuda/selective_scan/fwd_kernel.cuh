// selective_scan forward
// Math     h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t];  y[t] = C[t] . h[t] + D x[t], times silu(z[t])
// Shapes   x, dt, z, y [b,l,d]; A, h [d,n]; B, C [b,l,g,n] or [d,n]
// Traffic  x, dt, z, y once: 4*b*l*d elements; B, C once a block of 64 channels, from L2
//          b8 l2048 d5120 n16 bf16: 0.67 GB, 0.22 ms at 3.0 TB/s. 1.34 G states take 1.34 G exp2 beside 0.34 G for softplus and
//          silu: 0.45 ms of the special-function units of an H100; 5.6 instructions a state and 55 an element: 0.42 ms of issue
// Launch   one axis of links x sequences x segments x blocks; a block: 64 channels, one warp for 4 states of them (8 of long
//          rows)
// Numerics float32. A warp adds up its states of a channel by output_of, pairs of warps go on to y in order. Where a sequence
//          is cut into segments, a first launch leaves the end of each, started from zero, with the sum of its dt; a segment
//          starts from those before it. The backward takes its checkpoints from this kernel, or from lanes_kernel.cuh
#pragma once

#include <statescan/math.h>

#include "projection.cuh"

namespace statescan::selective_scan {

// Shared memory, in words of 16 bytes: what a block shares, and what each of its warps has.
template <class Policy>
struct Storage {
  static constexpr int kSteps = kTile * kChannels / 2, kPerChannel = 2 * kChannels / 4;
  static constexpr int kFetched = kRuns * (2 * 2 * Policy::kWords + 2);  // two tiles of x and of z, one of dt
  static constexpr int kShared = kSteps + kPerChannel + kFetched;
  static constexpr int kSums = kTile * kChannels / 4;
  static constexpr int kProjection = kTile * Policy::kValues / 4;                              // of one of B and C
  static constexpr int kRaw = kWarp * Policy::kValues / 4;                                     // of both, as they came
  static constexpr int kFixed = Policy::kTimeInvariant ? kChannels * Policy::kValues / 4 : 0;  // of one
  static constexpr int kPerWarp = kSums + 2 * kProjection + kRaw + 2 * kFixed;
};

// dt and dt x of the thread's elements. `slope`, where it is wanted: the derivative of dt by what it is made from.
template <class Policy, bool kAlongTokens>
__device__ void put_steps_of(const Params& p, const Place& place, const Slot<kRun>& slot_dt, const Slot<kRun>& slot_x,
                             const float* bias, int tokens, int channels, float4* steps, float* slope = nullptr) {
  float dt[kRun], u[kRun];
  slot_dt.widen(dtype_of<Policy>(p.dt), dt);
  slot_x.widen(dtype_of<Policy>(p.x), u);
#pragma unroll
  for (int i = 0; i < kRun; ++i) dt[i] += of_channel<kAlongTokens>(bias, place, i);
  if (slope) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) slope[i] = 1.0f;
  }
  if (p.dt_softplus) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (slope) slope[i] = softplus_slope(dt[i]);
      dt[i] = softplus<Policy::kArithmetic>(dt[i]);
    }
  }
  if (p.dt_limited) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (slope && (dt[i] < p.dt_min || dt[i] > p.dt_max)) slope[i] = 0.0f;
      dt[i] = clamp(dt[i], p.dt_min, p.dt_max);
    }
  }
  if (tokens < kTile || channels < kChannels) {  // outside, a step of zero leaves the states alone
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (holds<Policy>(place, i, tokens, channels)) continue;
      dt[i] = 0.0f;
      if constexpr (!Policy::kKnown) u[i] = 0.0f;  // what comes in vectors is zero there
      if (slope && !Policy::kKnown) slope[i] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) u[i] *= dt[i];
  put_steps<kAlongTokens>(steps, place, dt, u);
}

// y of the thread's elements from the sums of the warps.
template <class Policy, bool kAlongTokens>
__device__ void finish(const Params& p, const Place& place, const Slot<kRun>& slot_x, const Slot<kRun>& slot_z,
                       const float* skip, float (&y)[kRun]) {
  float values[kRun];
  if (p.D.data) {
    slot_x.widen(dtype_of<Policy>(p.x), values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) y[i] = fmaf(of_channel<kAlongTokens>(skip, place, i), values[i], y[i]);
  }
  if (p.z.data) {
    slot_z.widen(dtype_of<Policy>(p.z), values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) y[i] *= cuda::fast_silu(values[i]);
  }
}

// What a launch is for.
enum class Pass {
  output,       // y and the final state
  positions,    // and states at chosen positions
  ends,         // the end of each segment but the last, started from zero
  checkpoints,  // the state before every kCheckpoint-th token
  segments,     // the same of segments as if each started from zero, with their ends and those of their adjoints
};

constexpr __host__ __device__ bool gives_output(Pass pass) { return pass == Pass::output || pass == Pass::positions; }

// What a warp reads of a tile, in shared memory. fixed_B and fixed_C are null where B and C change with the token.
struct TileInputs {
  const float4* steps;
  const float *tile_B, *tile_C, *fixed_B, *fixed_C;
};

// The inputs of one token, for the two channels of a lane.
template <class Policy, bool kWithC>
struct TokenInputs {
  static constexpr int kOwn = Policy::kTimeInvariant ? 2 : 1;  // B and C may differ from channel to channel
  float dt[2], u[2], B[kOwn][Policy::kValues], C[kWithC ? kOwn : 1][Policy::kValues];

  __device__ void read(const TileInputs& in, int token) {
    const float4 step = in.steps[token * (kChannels / 2)];
    dt[0] = step.x, dt[1] = step.y, u[0] = step.z, u[1] = step.w;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      read_projection<Policy>(B[c], in.tile_B, in.fixed_B, token, c);
      if constexpr (kWithC) read_projection<Policy>(C[c], in.tile_C, in.fixed_C, token, c);
    }
  }
  __device__ const float* B_of(int c) const { return B[c % kOwn]; }
  __device__ const float* C_of(int c) const { return C[c % kOwn]; }
};

// Tokens first..last-1 of a tile: h goes through them, and the warp's part of y to `sums`.
template <class Policy, Pass kPass>
__device__ void scan(const TileInputs& in, int first, int last, const float (&rate)[2][Policy::kValues],
                     float (&h)[2][Policy::kValues], float (&total)[2], float* sums) {
  constexpr int kParts = Policy::kParts;
  constexpr bool kOutput = gives_output(kPass);
  TokenInputs<Policy, kOutput> next;
  if (first < last) next.read(in, first);
  constexpr int kUnroll = Policy::kArithmetic == Arithmetic::complex_rate || kPass == Pass::positions ? 1
                          : Policy::kArithmetic == Arithmetic::fast && kOutput                        ? 64 / Policy::kStates
                                                                                                      : 4;
#pragma unroll(kUnroll)
  for (int t = first; t < last; ++t) {
    const TokenInputs<Policy, kOutput> now = next;
    if (t + 1 < last) next.read(in, t + 1);  // before y is stored, which the compiler takes for a hazard
    float y[2] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if constexpr (kPass == Pass::ends) total[c] += now.dt[c];
#pragma unroll
      for (int v = 0; v < Policy::kValues; v += kParts) {
        advance<Policy::kArithmetic>(&h[c][v], step_of<Policy::kArithmetic>(now.dt[c], &rate[c][v]), now.u[c], now.B_of(c) + v);
      }
      if constexpr (kOutput) y[c] = output_of<kParts, Policy::kStates>(now.C_of(c), h[c]);
    }
    if constexpr (kOutput) *reinterpret_cast<float2*>(sums + t * kChannels) = make_float2(kParts * y[0], kParts * y[1]);
  }
}

template <class Policy, Pass kPass>
__global__ void __launch_bounds__(Policy::kMostThreads, Policy::kLeastBlocks)
    selective_scan_forward_kernel(const __grid_constant__ Params p) {
  constexpr int kStates = Policy::kStates, kValues = Policy::kValues;
  constexpr bool kOutput = gives_output(kPass), kEnds = kPass == Pass::ends;
  using Memory = Storage<Policy>;
  extern __shared__ uint4 memory[];

  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const std::int64_t ends = p.segments - 1;
  const std::uint32_t tasks = gridDim.x / p.links, link = blockIdx.x / tasks, index = blockIdx.x % tasks;
  const Task task = task_of(p, index, kEnds ? ends : p.segments);
  Span span = span_of(p, task.sequence, task.segment);
  if (p.cu_seqlens && task.sequence == p.sequences) {
    if (task.segment == 0) clear_rows(p.y, span, task);
    return;
  }

  if (p.links > 1) {
    span = link_of(span, link, p.links);
    if (link > 0) wait_for_turn(p.turns + index, link);
  }
  const std::int64_t row = task.sequence * (kEnds ? ends : p.segments) + task.segment;

  float4* const steps = reinterpret_cast<float4*>(memory);
  float* const bias = reinterpret_cast<float*>(memory + Memory::kSteps);
  float* const skip = bias + kChannels;
  uint4* const fetched = memory + Memory::kSteps + Memory::kPerChannel + thread % kRuns;
  const Slot<kRun> slot_dt{fetched, kRuns};
  const Slot<kRun> slots_x{fetched + 2 * kRuns, kRuns}, slots_z{slots_x.at + 2 * Policy::kWords * kRuns, kRuns};
  float* const sums = reinterpret_cast<float*>(memory + Memory::kShared);  // [warp][token][channel]
  uint4* const own = memory + Memory::kShared + blockDim.x / kWarp * Memory::kSums + warp * (Memory::kPerWarp - Memory::kSums);
  uint4* const raw = own + 2 * Memory::kProjection + lane;
  float* const tile_B = reinterpret_cast<float*>(own);
  float* const tile_C = reinterpret_cast<float*>(own + Memory::kProjection);
  float* const fixed_B = reinterpret_cast<float*>(own + 2 * Memory::kProjection + Memory::kRaw) + lane * kValues;
  float* const fixed_C = fixed_B + 4 * Memory::kFixed;

  const TileInputs in{steps + slot_of_pair(lane), tile_B, tile_C, p.varying_B ? nullptr : fixed_B,
                      p.varying_C ? nullptr : fixed_C};

  load_channels(p.dt_bias, task, bias);
  load_channels(p.D, task, skip);
  __syncthreads();

  const bool moves = Policy::kMostThreads == kRuns || thread < kRuns;
  const Place place = place_of<Policy>(p.reach, p.reverse, thread % kRuns);

#pragma unroll 1
  for (std::int64_t piece = 0; piece < p.dstate || piece == 0; piece += p.piece) {
    const bool first_piece = piece == 0, last_piece = piece + p.piece >= p.dstate;
    const std::int64_t held = last_piece ? p.dstate - piece : p.piece;
    const int scanners = static_cast<int>((held + kStates - 1) / kStates);
    const std::int64_t state = piece + warp * kStates, states = held - warp * kStates;  // of this warp
    const bool scans = warp < scanners, gates = kOutput && last_piece && p.z.data;

    float rate[2][kValues], h[2][kValues];
    load_rates<Policy>(p, task, state, states, rate);
    if (link > 0) load_states<Policy>(view_of<Policy>(p, kEnds ? p.ends.states : p.carried), row, task, state, states, h);
    else load_states<Policy>(kEnds ? View{} : p.initial_state, task.sequence, task, state, states, h);
    if (!kEnds && link == 0) {
#pragma unroll 1
      for (std::int64_t before = 0; before < task.segment; ++before)
        cross_segment<Policy>(p, p.ends, task.sequence * ends + before, task, state, states, rate, h);
    }
    if constexpr (Policy::kTimeInvariant) {
      if (scans && !p.varying_B) keep_fixed<Policy>(p.B, task, state, states, fixed_B);
      if (scans && !p.varying_C) keep_fixed<Policy>(p.C, task, state, states, fixed_C);
    }

    const char* at_x = place_at(p, p.x, span, place, span.begin, task.channel);
    const char* at_dt = place_at(p, p.dt, span, place, span.begin, task.channel);
    const char* at_z = place_at(p, p.z, span, place, span.begin, task.channel);
    char* at_y = place_at(p, p.y, span, place, span.begin, task.channel);
    const bool of_C = lane >= kTile;
    Projection<Policy> projection(p, of_C, scans && (kOutput || !of_C), span, span.begin, task.group, state, states, raw);
    int parity = 0;  // of the tile that is fetched next
    const auto fetch_next = [&](std::int64_t token) {
      const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
      if (tokens > 0) {
        if (moves) {
          const int half = parity * (Policy::kWords * kRuns);
          fetch<Policy>(slot_dt, at_dt, p, p.dt, place, tokens, task.channels);
          fetch<Policy>({slots_x.at + half, kRuns}, at_x, p, p.x, place, tokens, task.channels);
          if (gates) fetch<Policy>({slots_z.at + half, kRuns}, at_z, p, p.z, place, tokens, task.channels);
          at_dt += kTile * p.dt.step, at_x += kTile * p.x.step, at_z += kTile * p.z.step;
        }
        projection.fetch(p, tokens, 1);
      }
      commit_copies();
      parity ^= 1;
    };
    fetch_next(span.begin);
    float total[2] = {};
    if (kEnds && link > 0) load_steps(p, p.ends, row, task, total);
    Positions positions(p, task, span);
    if (kPass == Pass::positions && scans && task.segment == 0 && link == 0)
      positions.template store_first<Policy>(task, state, states, h);

#pragma unroll 1
    for (std::int64_t token = span.begin; token < span.end; token += kTile) {
      const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
      const int half = (parity ^ 1) * (Policy::kWords * kRuns);
      const Slot<kRun> slot_x{slots_x.at + half, kRuns}, slot_z{slots_z.at + half, kRuns};
      wait_for_copies();
      if (moves) {
        if (place.along_tokens) put_steps_of<Policy, true>(p, place, slot_dt, slot_x, bias, tokens, task.channels, steps);
        else put_steps_of<Policy, false>(p, place, slot_dt, slot_x, bias, tokens, task.channels, steps);
      }
      projection.put(p, of_C ? tile_C : tile_B);
      __syncthreads();
      fetch_next(token + kTile);
      if (scans) {
        const auto scan_tokens = [&](int first, int last) {
          scan<Policy, kPass>(in, first, last, rate, h, total, sums + warp * 4 * Memory::kSums + place_in_sums(2 * lane));
        };
        if constexpr (kPass == Pass::positions) {
          int first = 0;
          for (; positions.next() - token <= kTile; positions.step()) {
            const int last = static_cast<int>(positions.next() - token);
            scan_tokens(first, last);
            store_states<Policy>(positions.view(), task.sequence, task, state, states, h);
            first = last;
          }
          scan_tokens(first, kTile);
        } else if constexpr (kPass == Pass::checkpoints) {
#pragma unroll
          for (int first = 0; first < kTile; first += kCheckpoint) {
            LaneStates<Policy>::store(checkpoint_at<Policy>(p, span, task, token + first, state), h);
            scan_tokens(first, first + kCheckpoint);
          }
        } else {
          scan_tokens(0, kTile);
        }
      }
      __syncthreads();

      if constexpr (kOutput) {
        if (!moves) continue;
        float y[kRun] = {};
#pragma unroll 1
        for (int w = 0; w < scanners; w += 2) {
          float pair[kRun] = {};
          for (int k = w; k < w + 2 && k < scanners; ++k) {
            if (place.along_tokens) add_sums<true>(sums + k * 4 * Memory::kSums, place, pair);
            else add_sums<false>(sums + k * 4 * Memory::kSums, place, pair);
          }
#pragma unroll
          for (int i = 0; i < kRun; ++i) y[i] += pair[i];
        }
        if (!first_piece || !last_piece) {
          pass_on(p.partial, p, span, token, place, tokens, task, first_piece, last_piece, y);
          if (!last_piece) continue;
        }
        if (place.along_tokens) finish<Policy, true>(p, place, slot_x, slot_z, skip, y);
        else finish<Policy, false>(p, place, slot_x, slot_z, skip, y);
        store<Policy>(at_y, p, p.y, place, tokens, task.channels, y);
        at_y += kTile * p.y.step;
      }
    }

    if (!scans) continue;
    if constexpr (kEnds) store_end<Policy>(p, p.ends, row, task, state, states, h, total);
    else if (link + 1 < p.links) store_states<Policy>(view_of<Policy>(p, p.carried), row, task, state, states, h);
    else if (kOutput && task.segment == ends && p.final_state.data)
      store_states<Policy>(p.final_state, task.sequence, task, state, states, h);
  }
  if (link + 1 < p.links) end_turn(p.turns + index, link + 1);
}

}  // namespace statescan::selective_scan
