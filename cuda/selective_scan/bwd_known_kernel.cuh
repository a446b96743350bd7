// selective_scan backward of calls whose tensors are known: 16-bit x, a real A, B and C in vectors that change with the token
// Math     and Shapes as bwd_kernel.cuh
// Traffic  the same; b8 l2048 d5120 n16 bf16: 2.9 GB, 0.95 ms at 3.0 TB/s. 2 exp2 a state beside 5 an element: 0.84 ms of the
//          special-function units of an H100; 22 instructions a state beside those of the checkpoints: 1.0 ms of issue
// Launch   one axis of links x sequences x segments x blocks of 64 channels and 128 threads: a warp for four states of them,
//          two channels a lane. More than 16 states go through in pieces. A block walks its tiles from the last to the first,
//          from a checkpoint 8 tokens forward into registers and back
// Numerics as bwd_kernel.cuh
// Checkpoints of a usual call in segments come as if each started from zero: a start adds what it has become.
// With twice the warps and one channel a lane, in 128 registers, b8 took 2790 us where this took 2400: B and C are loaded twice
// as often then, and what shared memory gives back to the registers bounds it.
#pragma once

#include "../common/early.cuh"
#include "bwd_kernel.cuh"

namespace statescan::selective_scan {

template <class Policy>
struct KnownBackward {
  static constexpr bool kAlongTokens = Policy::kReach == Reach::tokens;
  static constexpr bool kIsCoarse = Policy::kElement == DType::bfloat16;  // what is added up for dB and dC
  static constexpr int kThreads = kRuns, kStates = Policy::kStates, kFours = 4, kPiece = kFours * kStates;
  static constexpr int kReduced = 2 * kStates, kSummed = kWarp / kReduced;  // as BackwardStorage
  static constexpr int kElements = kTile * kChannels, kSubs = kTile / kCheckpoint;
  static constexpr int kCursors = 12;
  // Shared memory, in words of 16 bytes.
  static constexpr int kSteps = kElements / 2, kSums = kElements / 4, kPairs = kElements / 2;
  static constexpr int kStarts = kSubs * kFours * kChannels, kProjected = kTile * kFours * kReduced / 4;
  static constexpr int kProjection = kTile * kPiece / 4;  // of one of B and C
  static constexpr int kTotal = kAlongTokens ? kThreads / 4 : kThreads * kRun / 4;
  static constexpr int kWords = kSteps + kSums + kFours * (kSums + kPairs) + 5 * kThreads + kThreads / 2 + kStarts +
                                kProjected + 2 * kProjection + 2 * kTotal + 2 * kChannels / 4 + kSubs * kChannels / 4 +
                                kCursors;
  static constexpr int kBytes = 16 * kWords;
  static_assert(kThreads == kFours * kWarp && 2 * kWarp == kChannels && kBytes <= 99 * 1024);
};

// Where channel c of token t lies in rows of one, or of two, floats a channel: so that threads that write or read eight
// elements each, and lanes that do two channels each, touch all banks.
template <bool kAlongTokens>
__device__ int place_of_float(int channel, unsigned token) {
  return kAlongTokens ? channel ^ (token / kRun * 16) : place_in_sums(channel);
}
template <bool kAlongTokens>
__device__ int place_of_pair(int channel, unsigned token) {
  return kAlongTokens ? channel ^ (token / kRun * 8) : 2 * slot_of_pair(channel / 2) + channel % 2;
}

// A thread's elements in such rows.
template <bool kAlongTokens>
struct KnownTile {
  const Place& place;

  __device__ void put(float* to, const float (&v)[kRun]) const {
    if constexpr (kAlongTokens) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) to[float_at(i)] = v[i];
    } else {
#pragma unroll
      for (int i = 0; i < kRun; i += 4)
        *reinterpret_cast<float4*>(to + float_at(i)) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
  }
  __device__ void get(const float* from, float (&v)[kRun]) const {
    if constexpr (kAlongTokens) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) v[i] = from[float_at(i)];
    } else {
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + float_at(i));
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
      }
    }
  }
  __device__ void put(float2* to, const float (&first)[kRun], const float (&second)[kRun]) const {
    if constexpr (kAlongTokens) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) to[pair_at(i)] = make_float2(first[i], second[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; i += 2)
        *reinterpret_cast<float4*>(to + pair_at(i)) = make_float4(first[i], second[i], first[i + 1], second[i + 1]);
    }
  }
  __device__ void get(const float2* from, float (&first)[kRun], float (&second)[kRun]) const {
    if constexpr (kAlongTokens) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float2 v = from[pair_at(i)];
        first[i] = v.x, second[i] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun; i += 2) {
        const float4 v = *reinterpret_cast<const float4*>(from + pair_at(i));
        first[i] = v.x, second[i] = v.y, first[i + 1] = v.z, second[i + 1] = v.w;
      }
    }
  }

 private:
  // Of element i, with others as the accesses above take them. A thread's tokens all lie in one half of the tile.
  __device__ int float_at(int i) const {
    if constexpr (kAlongTokens)
      return place_of_float<true>(place.channel, place.token) + (place.token + i * place.token_step) * kChannels;
    return place_of_float<false>(place.channel + i, 0) + place.token * kChannels;
  }
  __device__ int pair_at(int i) const {
    if constexpr (kAlongTokens)
      return place_of_pair<true>(place.channel, place.token) + (place.token + i * place.token_step) * kChannels;
    return place_of_pair<false>(place.channel + i, 0) + place.token * kChannels;
  }
};

// Where the block's part of something begins, from tile to tile.
struct alignas(16) Cursor {
  char* at;
  std::int64_t step;  // in bytes
};

inline __device__ void put_four(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}

// What a lane reads of a token: {dt, u} of both its channels, and the warp's states of B and C.
struct KnownToken {
  float4 step, B, C;

  __device__ void read(const float2* steps, const float* B_of_states, const float* C_of_states) {
    step = *reinterpret_cast<const float4*>(steps);
    B = *reinterpret_cast<const float4*>(B_of_states), C = *reinterpret_cast<const float4*>(C_of_states);
  }
  __device__ float dt(int c) const { return c == 0 ? step.x : step.z; }
  __device__ float u(int c) const { return c == 0 ? step.y : step.w; }
};
inline __device__ float value_of(const float4& v, int i) { return i == 0 ? v.x : (i == 1 ? v.y : (i == 2 ? v.z : v.w)); }

template <class Policy>
__global__ void __launch_bounds__(KnownBackward<Policy>::kThreads, 2)
    selective_scan_known_backward_kernel(const __grid_constant__ BackwardParams p) {
  using Shape = KnownBackward<Policy>;
  constexpr bool kAlongTokens = Shape::kAlongTokens;
  constexpr int kThreads = Shape::kThreads, kStates = Shape::kStates, kReduced = Shape::kReduced;
  constexpr int kSub = kCheckpoint, kSummed = Shape::kSummed, kElementBytes = 2;
  extern __shared__ uint4 memory[];
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();  // the sums, which need not wait for all of this one

  const unsigned thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int four = warp, own = 2 * lane;  // the warp's states of a piece, the lane's first channel
  const std::uint32_t tasks = gridDim.x / p.links, link = blockIdx.x / tasks, index = blockIdx.x % tasks;
  const Task task = task_of(p, index, p.segments);
  Span span = span_of(p, task.sequence, task.segment);
  if (p.cu_seqlens && task.sequence == p.sequences) {
    if (task.segment == 0) clear_rows(p.dx, span, task), clear_rows(p.ddt, span, task), clear_rows(p.dz, span, task);
    return;
  }
  if (p.links > 1) {
    span = backward_link_of(p, span, link);
    if (link > 0) wait_for_turn(p.turns + index, link);
  }

  uint4* free_memory = memory;
  const auto take = [&](int words) {
    uint4* const at = free_memory;
    free_memory += words;
    return reinterpret_cast<float*>(at);
  };
  float2* const steps = reinterpret_cast<float2*>(take(Shape::kSteps));  // {dt, u}, [token][channel] as the following
  float* const gradients = take(Shape::kSums);                           // dy silu(z)
  float* const sums = take(Shape::kFours * Shape::kSums);                // of y, [four][token][channel]
  float2* const pairs = reinterpret_cast<float2*>(take(Shape::kFours * Shape::kPairs));  // of du and A.q
  // Raw dt and z of a thread make room for its slopes of dt, raw dy for its dy silu'(z).
  uint4* const fetched = reinterpret_cast<uint4*>(take(5 * kThreads)) + thread;
  const Slot<kRun> slot_dt{fetched, kThreads}, slot_z{fetched + kThreads, kThreads}, slot_dy{fetched + 2 * kThreads, kThreads},
      slot_x{fetched + 4 * kThreads, kThreads};
  const OwnFloats slopes{reinterpret_cast<float4*>(slot_dt.at)}, gate_gradients{reinterpret_cast<float4*>(slot_dy.at)};
  uint2* const raw_BC = reinterpret_cast<uint2*>(take(kThreads / 2)) + thread;
  float* const starts = take(Shape::kStarts);        // [checkpoint of the tile][four][place of a channel][state]
  float* const projected = take(Shape::kProjected);  // what is added to dB and dC, [token][four][of B, then C]
  float *const tile_B = take(Shape::kProjection), *const tile_C = take(Shape::kProjection);  // [token][state]
  // Sums of a thread: of its channel, or of each of its channels.
  float *const totals_D = take(Shape::kTotal), *const totals_bias = take(Shape::kTotal);
  const auto total_of = [&](float* totals) {
    if constexpr (kAlongTokens) return totals + thread;
    else return OwnFloats{reinterpret_cast<float4*>(totals) + thread};
  };
  const auto total_D = total_of(totals_D), total_bias = total_of(totals_bias);
  float *const bias = take(kChannels / 4), *const skip = take(kChannels / 4);
  float* const checkpoint_steps = take(Shape::kSubs * kChannels / 4);
  // Those up to the checkpoints are at the first token of the next tile to fetch, the others at that of the tile in work.
  enum { kX, kDt, kDy, kZ, kB, kC, kCheckpoints, kCheckpointSteps, kDx, kDdt, kDz, kProjections };
  Cursor* const cursors = reinterpret_cast<Cursor*>(take(Shape::kCursors));

  load_channels(p.dt_bias, task, bias);
  load_channels(p.D, task, skip);
  for (int i = thread; i < 4 * Shape::kTotal; i += kThreads) totals_D[i] = 0.0f, totals_bias[i] = 0.0f;

  const Place place = place_of<Policy>(p.reach, p.reverse, thread);
  const KnownTile<kAlongTokens> mine{place};
  const auto offset_of = [&](const View& t) {  // of the thread's elements in a tile
    return kAlongTokens ? place.channel * t.channel + place.token * (p.reverse ? -kElementBytes : kElementBytes)
                        : place.token * t.step + place.channel * kElementBytes;
  };
  const std::int64_t row = task.sequence * p.segments + task.segment, ends = p.segments - 1;
  const int tiles = static_cast<int>((span.end - span.begin + kTile - 1) / kTile);
  const int tokens_of_last = static_cast<int>(span.end - span.begin) - (tiles - 1) * kTile;
  const std::int64_t last = span.begin + (tiles - 1) * std::int64_t{kTile};
  const std::int64_t fours = (p.dstate + kStates - 1) / kStates;
  const std::int64_t checkpoint_bytes = p.blocks * fours * (kChannels * kStates * sizeof(float));
  const std::int64_t projection_bytes = (p.reverse ? -1 : 1) * std::int64_t{p.blocks} * fours * (kReduced * sizeof(float));
  const bool from_zero = p.checkpoint_steps;

#pragma unroll 1
  for (std::int64_t piece = 0; piece < p.dstate || piece == 0; piece += Shape::kPiece) {
    const bool first_piece = piece == 0, last_piece = piece + Shape::kPiece >= p.dstate;
    const int held = static_cast<int>(min(p.dstate - piece, std::int64_t{Shape::kPiece}));  // states of the piece
    const std::int64_t state = piece + four * kStates;
    const bool scans = four * kStates < held;

    float rate[2][kStates], g[2][kStates];
    Totals<Policy> totals;
    load_rates<Policy>(p, task, state, held - four * kStates, rate);
    load_states<Policy>(link > 0 ? view_of<Policy>(p, p.carried) : p.dfinal_state, link > 0 ? row : task.sequence, task, state,
                        held - four * kStates, g);
    if (link > 0) load_states<Policy>(view_of<Policy>(p, p.dA), row, task, state, held - four * kStates, totals.A);
    if (link == 0) {
#pragma unroll 1
      for (std::int64_t after = ends; after > task.segment; --after)
        cross_segment<Policy>(p, p.adjoint_ends, task.sequence * ends + after - 1, task, state, held - four * kStates, rate, g);
    }
    // Checkpoints that know nothing of their segment's start get what that has become by then.
    float4* const start =
        reinterpret_cast<float4*>(p.starts) + ((row * p.blocks + task.block) * fours + state / kStates) * kChannels + lane;
    if (from_zero && scans && link == 0) {
      float h[2][kStates];
      load_states<Policy>(p.initial_state, task.sequence, task, state, held - four * kStates, h);
#pragma unroll 1
      for (std::int64_t before = 0; before < task.segment; ++before)
        cross_segment<Policy>(p, p.ends, task.sequence * ends + before, task, state, held - four * kStates, rate, h);
      LaneStates<Policy>::store(start, h);
    }

    __syncthreads();  // the piece before has done with what follows
    if (thread == 0) {
      const auto set = [&](int i, char* at, std::int64_t step, bool waits) { cursors[i] = {waits ? at - step : at, step}; };
      const auto set_tile = [&](int i, const View& t, bool waits) {
        set(i, row_at(p, t, span, last) + task.channel * t.channel, -kTile * t.step, waits);
      };
      const auto set_states = [&](int i, const View& t) {
        set(i, row_at(p, t, span, last) + task.group * t.channel + piece * t.state, -kTile * t.step, false);
      };
      set_tile(kX, p.x, false), set_tile(kDt, p.dt, false), set_tile(kDy, p.dy, false), set_tile(kZ, p.z, false);
      set_tile(kDx, p.dx, true), set_tile(kDdt, p.ddt, true), set_tile(kDz, p.dz, true);
      set_states(kB, p.B), set_states(kC, p.C);
      const std::int64_t number = checkpoint_number(p, span, task, last) * p.blocks + task.block;
      set(kCheckpoints, reinterpret_cast<char*>(p.checkpoints + (number * fours + piece / kStates) * (kChannels * kStates)),
          -Shape::kSubs * checkpoint_bytes, false);
      set(kCheckpointSteps, reinterpret_cast<char*>(p.checkpoint_steps + number * kChannels),
          -Shape::kSubs * std::int64_t{p.blocks} * (kChannels * sizeof(float)), false);
      const std::int64_t token = span.row * p.seqlen + (p.reverse ? span.last - 1 - last : span.first + last);
      set(kProjections,
          reinterpret_cast<char*>(p.projections + ((token * p.blocks + task.block) * fours + piece / kStates) * kReduced),
          -kTile * projection_bytes, true);
    }
    if (!scans) {  // others add up what it has there
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        *reinterpret_cast<float2*>(sums + (four * kTile + t) * kChannels + own) = make_float2(0.0f, 0.0f);
        *reinterpret_cast<float4*>(pairs + (four * kTile + t) * kChannels + own) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
    __syncthreads();

    // B and C: four values of a token for each thread.
    const unsigned token_of_BC = thread / (2 * Shape::kFours), state_of_BC = thread % Shape::kFours * kStates;
    const bool is_C = thread & Shape::kFours;
    const auto at_cursor = [&](int i) {
      char* const at = cursors[i].at;
      __builtin_assume(__isGlobal(at));
      return at;
    };
    const auto fetch_tile = [&](int tile) {
      if (tile >= 0) {
        const int tokens = tile + 1 == tiles ? tokens_of_last : kTile;
        const bool wanted = place.holds(0, tokens, task.channels);
        // All addresses before the first copy, which loads do not pass.
        const char *const at_dt = at_cursor(kDt), *const at_x = at_cursor(kX), *const at_dy = at_cursor(kDy),
                          *const at_z = at_cursor(kZ), *const at_BC = at_cursor(is_C ? kC : kB),
                          *const at_checkpoints = at_cursor(kCheckpoints);
        slot_dt.fetch_vector(at_dt + offset_of(p.dt), Policy::kElement, wanted);
        slot_x.fetch_vector(at_x + offset_of(p.x), Policy::kElement, wanted);
        slot_dy.fetch_vector(at_dy + offset_of(p.dy), Policy::kElement, wanted);
        if (p.z.data) slot_z.fetch_vector(at_z + offset_of(p.z), Policy::kElement, wanted);
        copy_async<8>(raw_BC, at_BC + token_of_BC * (is_C ? p.C.step : p.B.step) + kElementBytes * state_of_BC,
                      token_of_BC < tokens && state_of_BC < held);
#pragma unroll
        for (int i = 0; i < Shape::kStarts / kThreads; ++i) {
          constexpr int kOfSub = Shape::kFours * kChannels;
          if (i * kThreads % kOfSub / kChannels * kStates + thread / kChannels * kStates < held)
            copy_async<16>(starts + (i * kThreads + thread) * kStates,
                           at_checkpoints + i * kThreads / kOfSub * checkpoint_bytes + (i * kThreads % kOfSub + thread) * 16,
                           true);
        }
        if (from_zero && thread < Shape::kSubs * kChannels / 4) {
          constexpr unsigned kWords = kChannels / 4, kRow = kChannels * sizeof(float);
          copy_async<16>(checkpoint_steps + thread * 4,
                         at_cursor(kCheckpointSteps) + thread / kWords * (p.blocks * std::int64_t{kRow}) + thread % kWords * 16,
                         true);
        }
      }
      commit_copies();
    };
    fetch_tile(tiles - 1);

#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int tokens = tile + 1 == tiles ? tokens_of_last : kTile;
      wait_for_copies();
      {  // the tile is made ready
        float dt[kRun], u[kRun], z[kRun], dr[kRun], slope[kRun];
        slot_dt.widen(Policy::kElement, dt), slot_x.widen(Policy::kElement, u), slot_dy.widen(Policy::kElement, dr);
        if (p.z.data) {
          slot_z.widen(Policy::kElement, z);
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const float gate = cuda::fast_reciprocal(1.0f + cuda::fast_exp2(-1.44269504f * z[i])), gated = dr[i] * gate;
            dr[i] = gated * z[i];
            z[i] = fmaf(dr[i], 1.0f - gate, gated);
          }
          gate_gradients.put(z);
        }
        mine.put(gradients, dr);
#pragma unroll
        for (int i = 0; i < kRun; ++i) dt[i] += of_channel<kAlongTokens>(bias, place, i), slope[i] = 1.0f;
        if (p.dt_softplus) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) slope[i] = softplus_slope(dt[i]), dt[i] = softplus<Arithmetic::fast>(dt[i]);
        }
        if (p.dt_limited) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (dt[i] < p.dt_min || dt[i] > p.dt_max) slope[i] = 0.0f;
            dt[i] = clamp(dt[i], p.dt_min, p.dt_max);
          }
        }
        if (!place.holds(0, tokens, task.channels)) {  // a step of zero leaves the states alone; what else comes is zero there
#pragma unroll
          for (int i = 0; i < kRun; ++i) dt[i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) u[i] *= dt[i];
        slopes.put(slope);
        mine.put(steps, dt, u);
        float four_values[4];
        Slot<4>{reinterpret_cast<uint4*>(raw_BC), 1}.widen(Policy::kElement, four_values);
        put_four((is_C ? tile_C : tile_B) + token_of_BC * Shape::kPiece + state_of_BC, four_values);
      }
      float first[2][kStates] = {};  // on its way while the block gathers: H100, b1, 2593 us instead of 2625
      if (from_zero && scans) LaneStates<Policy>::load(start, first);
      __syncthreads();

      if (thread < Shape::kCursors) cursors[thread].at += cursors[thread].step;
      if (scans) {
        float4* const own_starts = reinterpret_cast<float4*>(starts) + four * kChannels + lane;
        constexpr int kStart = Shape::kFours * kChannels;
        if (from_zero) {
          float h[2][kStates];
#pragma unroll
          for (int i = 0; i < Shape::kSubs; ++i) {
            const float2 dt = *reinterpret_cast<const float2*>(checkpoint_steps + i * kChannels + own);
            LaneStates<Policy>::load(own_starts + i * kStart, h);
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
              for (int k = 0; k < kStates; ++k)  // a growth beyond what a float holds is of states that are zero, or lost
                h[c][k] = fmaf(cuda::fast_exp2(fminf((c == 0 ? dt.x : dt.y) * rate[c][k], 126.0f)), first[c][k], h[c][k]);
            LaneStates<Policy>::store(own_starts + i * kStart, h);
          }
        }
        // Back, 8 tokens at a time: their states forward into registers, then their gradients from the last to the first.
        // Stores hold up the loads after them, and wait where they can.
        const auto read = [&](KnownToken& token, int t) {
          const int pair = t * kChannels + place_of_pair<kAlongTokens>(own, t);
          token.read(steps + pair, tile_B + t * Shape::kPiece + four * kStates, tile_C + t * Shape::kPiece + four * kStates);
        };
        KnownToken first_token;
        read(first_token, kTile - kSub);
#pragma unroll 1
        for (int sub = Shape::kSubs - 1; sub >= 0; --sub) {
          const int first = sub * kSub, row_of_sums = four * kTile + first;
          const int float_at = place_of_float<kAlongTokens>(own, first), pair_at = place_of_pair<kAlongTokens>(own, first);
          const float2* const own_steps = steps + first * kChannels + pair_at;
          const float* const own_gradients = gradients + first * kChannels + float_at;
          float* const own_sums = sums + row_of_sums * kChannels + float_at;
          float2* const own_pairs = pairs + row_of_sums * kChannels + pair_at;
          const float *const own_B = tile_B + first * Shape::kPiece + four * kStates, *const own_C = tile_C +
                                                                                                     first * Shape::kPiece +
                                                                                                     four * kStates;
          float h[kSub + 1][2][kStates], factor[kSub][2][kStates], y[kSub][2];
          LaneStates<Policy>::load(own_starts + sub * kStart, h[0]);
          KnownToken now = first_token;
#pragma unroll
          for (int i = 0; i < kSub; ++i) {
            if (i > 0) now.read(own_steps + i * kChannels, own_B + i * Shape::kPiece, own_C + i * Shape::kPiece);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              y[i][c] = 0.0f;
#pragma unroll
              for (int k = 0; k < kStates; ++k) {
                factor[i][c][k] = cuda::fast_exp2(now.dt(c) * rate[c][k]);
                h[i + 1][c][k] = fmaf(factor[i][c][k], h[i][c][k], now.u(c) * value_of(now.B, k));
                y[i][c] = fmaf(value_of(now.C, k), h[i + 1][c][k], y[i][c]);
              }
            }
          }
          float2 gradient = *reinterpret_cast<const float2*>(own_gradients + (kSub - 1) * kChannels);
#pragma unroll
          for (int i = 0; i < kSub; ++i) *reinterpret_cast<float2*>(own_sums + i * kChannels) = make_float2(y[i][0], y[i][1]);

          CoarseSum coarse[kSub / kSummed];
          float total[kSub / kSummed];
          float4 back[kSub];
#pragma unroll
          for (int summed = kSub - kSummed; summed >= 0; summed -= kSummed) {
            float terms[kWarp];  // [token][state of B, then of C]
#pragma unroll
            for (int j = kSummed - 1; j >= 0; --j) {
              const int i = summed + j;
              if (i + 1 < kSub) {
                now.read(own_steps + i * kChannels, own_B + i * Shape::kPiece, own_C + i * Shape::kPiece);
                gradient = *reinterpret_cast<const float2*>(own_gradients + i * kChannels);
              }
              float du[2] = {}, dlog[2] = {}, *const of_token = terms + j * kReduced;
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const float u = now.u(c), dr = c == 0 ? gradient.x : gradient.y;
#pragma unroll
                for (int k = 0; k < kStates; ++k) {
                  g[c][k] = fmaf(value_of(now.C, k), dr, g[c][k]);
                  of_token[k] = c == 0 ? g[c][k] * u : fmaf(g[c][k], u, of_token[k]);
                  of_token[kStates + k] = c == 0 ? h[i + 1][c][k] * dr : fmaf(h[i + 1][c][k], dr, of_token[kStates + k]);
                  du[c] = fmaf(g[c][k], value_of(now.B, k), du[c]);
                  g[c][k] *= factor[i][c][k];
                  const float q = g[c][k] * h[i][c][k];
                  dlog[c] = fmaf(q, rate[c][k], dlog[c]);
                  totals.A[c][k] = fmaf(q, now.dt(c), totals.A[c][k]);
                }
              }
              back[i] = make_float4(du[0], dlog[0], du[1], dlog[1]);
            }
            if constexpr (Shape::kIsCoarse) coarse[summed / kSummed].add(terms, lane);
            else total[summed / kSummed] = sum_over_warp(terms);
          }
          if (sub > 0) read(first_token, first - kSub);
#pragma unroll
          for (int i = 0; i < kSub; ++i) *reinterpret_cast<float4*>(own_pairs + i * kChannels) = back[i];
          const int summed_row = Shape::kIsCoarse ? CoarseSum::row_of_lane(lane) : lane;
#pragma unroll
          for (int i = 0; i < kSub / kSummed; ++i)
            if constexpr (Shape::kIsCoarse) total[i] = coarse[i].over_warp(lane);
#pragma unroll
          for (int i = 0; i < kSub / kSummed; ++i) {
            const int t = first + i * kSummed + summed_row / kReduced;
            projected[(t * Shape::kFours + four) * kReduced + summed_row % kReduced] = total[i];
          }
        }
      }
      __syncthreads();

      float x[kRun], dt[kRun], slope[kRun], gradient[kRun], gate_gradient[kRun] = {};
      {
        float u[kRun];
        slot_x.widen(Policy::kElement, x);
        slopes.get(slope);
        if (p.z.data) gate_gradients.get(gate_gradient);
        mine.get(steps, dt, u), mine.get(gradients, gradient);
      }
      char *const at_dx = at_cursor(kDx), *const at_ddt = at_cursor(kDdt), *const at_dz = at_cursor(kDz);
      char* const at_projections = at_cursor(kProjections);
      // Along the channels some sums are on their way before the copies of the next tile, which loads do not pass: H100, b8,
      // 2298 us instead of 2350. Along the tokens, where they are single floats, copies go first: 2364 instead of 2394.
      constexpr int kEarlyFours = kAlongTokens ? 0 : 2;
      float y[kRun] = {}, du[kRun] = {}, dlog[kRun] = {};
#pragma unroll
      for (int f = 0; f < Shape::kFours; ++f) {
        if (f == kEarlyFours) fetch_tile(tile - 1);
        float more[kRun], more_du[kRun], more_dlog[kRun];
        mine.get(sums + f * Shape::kElements, more), mine.get(pairs + f * Shape::kElements, more_du, more_dlog);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          y[i] = f == 0 ? more[i] : y[i] + more[i];
          du[i] = f == 0 ? more_du[i] : du[i] + more_du[i], dlog[i] = f == 0 ? more_dlog[i] : dlog[i] + more_dlog[i];
        }
      }
      if (p.projections) {  // four values of a token for each thread
        constexpr unsigned kValues = Shape::kFours * kReduced;
        const unsigned t = thread / (kValues / 4), value = thread % (kValues / 4) * 4;
        if (t < tokens && value / kReduced * kStates < held)
          *reinterpret_cast<float4*>(at_projections + t * projection_bytes + value * sizeof(float)) =
              *reinterpret_cast<const float4*>(projected + t * kValues + value);
      }
      if (!first_piece || !last_piece) {
        const std::int64_t size = p.cu_seqlens ? p.seqlen * p.dim : p.sequences * p.seqlen * p.dim;
        const std::int64_t token = span.begin + tile * std::int64_t{kTile};
        const auto pass = [&](float* partial, float (&values)[kRun]) {
          pass_on(partial, p, span, token, place, tokens, task, first_piece, last_piece, values);
        };
        pass(p.partial, y), pass(p.partial_steps, du), pass(p.partial_steps + size, dlog);
      }
      if (last_piece && place.holds(0, tokens, task.channels)) {
        constexpr float kUnscale = 1.0f / kRateScale;
        float dx[kRun], ddt[kRun], dz[kRun], dD[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float D = of_channel<kAlongTokens>(skip, place, i);
          dx[i] = fmaf(D, gradient[i], dt[i] * du[i]);
          ddt[i] = fmaf(x[i], du[i], dlog[i] * kUnscale) * slope[i];
          dz[i] = fmaf(D, x[i], y[i]) * gate_gradient[i];
          dD[i] = gradient[i] * x[i];
        }
        if constexpr (kAlongTokens) {
          const auto sum = [](const float (&v)[kRun]) {
            return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
          };
          *total_D += sum(dD), *total_bias += sum(ddt);
        } else {
          total_D.add(dD), total_bias.add(ddt);
        }
        if (p.dx.data) store_vector(at_dx + offset_of(p.dx), Policy::kElement, dx);
        if (p.ddt.data) store_vector(at_ddt + offset_of(p.ddt), Policy::kElement, ddt);
        if (p.dz.data) store_vector(at_dz + offset_of(p.dz), Policy::kElement, dz);
      }
    }

    if (scans) {
      const auto store_all = [&](const View& t, std::int64_t of_row, const float (&values)[2][kStates]) {
        store_states<Policy>(t, of_row, task, state, held - four * kStates, values);
      };
      if (link + 1 < p.links) store_all(view_of<Policy>(p, p.carried), row, g);
      else if (task.segment == 0 && p.dinitial_state.data) store_all(p.dinitial_state, task.sequence, g);
      store_all(view_of<Policy>(p, p.dA), row, totals.A);
    }
  }

  // What the threads of a channel have of dD and ddt_bias, in the order of their tokens.
  __syncthreads();
  if (thread < task.channels) {
    const std::int64_t at = row * p.dim + task.channel + thread;
    float of_D = link > 0 ? p.dD[at] : 0.0f, of_bias = link > 0 ? p.ddt_bias[at] : 0.0f;
#pragma unroll
    for (int t = 0; t < (kAlongTokens ? kTile / kRun : kTile); ++t) {
      const unsigned mover = kAlongTokens ? 2 * thread + t : t * (kChannels / kRun) + thread / kRun;
      const unsigned from = kAlongTokens ? mover : thread % kRun / 4 * (4 * kThreads) + 4 * mover + thread % 4;
      of_D += totals_D[from], of_bias += totals_bias[from];
    }
    p.dD[at] = of_D, p.ddt_bias[at] = of_bias;
  }
  if (link + 1 < p.links) end_turn(p.turns + index, link + 1);
}

}  // namespace statescan::selective_scan
