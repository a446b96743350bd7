// selective_scan forward for the usual call: 16-bit x, a real A, 16 states, B and C in vectors that change with the token
// Math     h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t];  y[t] = C[t] . h[t] + D x[t], times silu(z[t])
// Shapes   x, dt, z, y [b,l,d]; A, h [d,16]; B, C [b,l,g,16]
// Traffic  x, dt, z, y once: 4*b*l*d elements; B, C once a block, from L2. For the backward instead of z, y and C a state every
//          8 tokens: b*l*d*16/8 floats
// Launch   one axis of links x sequences x blocks of 128 threads. A lane has `states` states, of one channel where y is wanted,
//          else of two; a block has 8 `states` channels: 8 states a lane need the least instructions, with 2 a batch of one
//          fills the chip without segments. A tile is 128 / `states` tokens, 8 elements of x, dt, z and y for each thread; it
//          is fetched while the one before is made ready and the one before that scanned, with one barrier for the three
// Numerics float32. y is summed over a lane's states by output_of, over lanes as a tree: the same bits for every `states`, and
//          those of fwd_kernel.cuh
// Of a backward in segments these are worked on side by side, as if each started from zero: the gradients' kernel adds what
// their start makes of a checkpoint. Their adjoints' ends come along: with P the product of the decays so far, the sum of
// P[t] C[t] dy[t] silu(z[t])
#pragma once

#include "../common/early.cuh"
#include "fwd_kernel.cuh"

namespace statescan::selective_scan {

template <class Policy, int states, Pass kPass>
struct Lanes {
  static constexpr int kThreads = kLaneThreads;
  static constexpr bool kOutput = kPass == Pass::output;
  // Channels of a lane, and states of each. Two channels share what a lane reads of B and C; of y they would need more
  // shuffles.
  static constexpr int kOwn = kOutput ? 1 : 2, kStates = states / kOwn;
  static constexpr int kLanes = kLaneStates / kStates;      // of a channel
  static constexpr int kWidth = lanes_width(states);        // channels of a block
  static constexpr int kTokens = kThreads * kRun / kWidth;  // of a tile
  static constexpr int kAlike = kWarp / kLanes;             // lanes of a warp that have the same states
  static constexpr int kOfWarp = kAlike * kOwn;             // channels of a warp
  // Shared memory in floats: steps [pair of tokens][channel] of {dt, u, dt, u}, y [token][channel]. Rows, gaps behind every few
  // channels and behind every eight tokens are such that threads that write or read eight elements, along either axis, and
  // lanes that do a channel or two touch all banks, all at constants from one another.
  static constexpr bool kWide = kWidth == 64;
  static constexpr int kStepGap = kWide ? 1 : 4, kStepSkew = kWide ? 0 : 4, kSumSkew = kWide ? 16 : 4;
  static constexpr int kStepRow = kWide ? 4 * 71 : 4 * 21, kSumRow = kWide ? (kOutput ? 80 : 68) : 28;
  static constexpr int kSteps = kTokens / 2 * kStepRow + kTokens / kRun * kStepSkew,
                       kSums = kTokens * kSumRow + kTokens / kRun * kSumSkew;
  // B and C as floats, [token][state] each. With 2 states a lane, which are bound by shared memory, 16-bit as they come: both
  // of two states and two tokens in one word, of three tiles since nothing is left to make ready.
  static constexpr bool kPaired = states == 2;
  static constexpr int kProjection =
      kPaired ? kTokens / 2 * kLanes * 4 : kTokens * kLaneStates;  // of one tile, of B or C alone
  static constexpr int kProjections = kPaired ? 3 : 4;
  static constexpr int kValues = kTokens * 2 * kLaneStates / kThreads;  // of B or C that a thread moves
  static constexpr int kSlot = kThreads * 4;                            // one word of 16 bytes of each thread
  static constexpr int kSlots = 3 + 1 + 1 + (kPaired ? 0 : 1);          // x of three tiles, dt, z, B and C as they come
  static constexpr int kFloats = kSlots * kSlot + 2 * (kSteps + kSums) + kProjections * kProjection + 2 * kWidth;
  static_assert(kPaired || kValues <= 8);

  // Where the steps of an even token begin, and y of one, and a channel in these.
  static constexpr __device__ int step_at(int token) { return token / 2 * kStepRow + token / kRun * kStepSkew; }
  static constexpr __device__ int sum_at(int token) { return token * kSumRow + token / kRun * kSumSkew; }
  static constexpr __device__ int in_steps(int channel) { return 4 * (channel + channel / kRun * kStepGap); }
  static constexpr __device__ int in_sums(int channel) { return channel + (kWide ? channel / kWarp * 4 : channel / kRun * 8); }
  static constexpr int kBytes = 4 * kFloats;
};

// The elements of a tile that a thread moves.
template <class Policy, class Shape>
__device__ Place lanes_place(bool reverse, int thread) {
  if constexpr (Policy::kReach == Reach::channels) {
    return {thread / (Shape::kWidth / kRun), thread % (Shape::kWidth / kRun) * kRun, false, true, 1};
  } else {
    constexpr int kRunsOfChannel = Shape::kTokens / kRun;
    return {thread % kRunsOfChannel * kRun + (reverse ? kRun - 1 : 0), thread / kRunsOfChannel, true, true, reverse ? -1 : 1};
  }
}

// The backward's blocks up to the one of a channel, at the checkpoint before the first token of a span.
inline __device__ std::int64_t lanes_checkpoint_block(const Params& p, const Span& s, const Task& task, std::int64_t channel) {
  const std::int64_t number = checkpoint_number(p, s, task, s.begin), within = channel - task.group * p.group_channels;
  const std::int64_t blocks = (p.group_channels + kChannels - 1) / kChannels;  // of the backward, in a group
  return number * blocks * p.groups + task.group * blocks + within / kChannels;
}
// Where its lanes look for some states of it.
inline __device__ float* lanes_checkpoint_at(const Params& p, std::int64_t block, int channel_of_block, int state) {
  const std::int64_t four = block * (kLaneStates / 4) + state / 4;
  const int place = channel_of_block % 2 * kWarp + channel_of_block / 2;  // as LaneStates
  return p.checkpoints + (four * 2 * kWarp + place) * 4 + state % 4;
}
// Marked as of no further use: L2 keeps the lines of which the next tiles take the rest instead. H100, b1 l16384 d5120 along
// the tokens: the backward took 2617 us instead of 2667.
inline __device__ void store_lane_states(float* to, const float (&h)[2][4]) {
#pragma unroll
  for (int c = 0; c < 2; ++c)
    __stcs(reinterpret_cast<float4*>(to + c * kWarp * 4), make_float4(h[c][0], h[c][1], h[c][2], h[c][3]));
}

template <class Policy, int states, Pass kPass>
__global__ void __launch_bounds__(kLaneThreads, states == 8 ? 5 : 3)
    selective_scan_lanes_kernel(const __grid_constant__ Params p) {
  using Shape = Lanes<Policy, states, kPass>;
  constexpr int kThreads = Shape::kThreads, kLanes = Shape::kLanes, kWidth = Shape::kWidth, kTokens = Shape::kTokens;
  constexpr int kOwn = Shape::kOwn, kStates = Shape::kStates;
  constexpr bool kAlongTokens = Policy::kReach == Reach::tokens, kOutput = kPass == Pass::output;
  constexpr bool kFromZero = kPass == Pass::segments;
  extern __shared__ uint4 memory[];
  cuda::let_next_kernel_in();
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const std::uint32_t tasks = gridDim.x / p.links, link = blockIdx.x / tasks, index = blockIdx.x % tasks;
  Task task;
  task.block = index % p.blocks;
  task.group = task.block / p.blocks_of_group;
  const std::uint32_t within = task.block % p.blocks_of_group * kWidth;
  task.channels = min(static_cast<int>(p.group_channels - within), kWidth);
  task.channel = task.group * p.group_channels + within;
  task.sequence = index / p.blocks, task.segment = 0;
  if constexpr (kFromZero) task.segment = task.sequence % p.segments, task.sequence /= p.segments;
  Span span = span_of(p, task.sequence, task.segment);
  const bool has_adjoint = kFromZero && task.segment > 0;  // nobody asks for the first segment's
  if (p.cu_seqlens && task.sequence == p.sequences) {
    if (kOutput) clear_rows(p.y, span, task);
    return;
  }
  if (!kFromZero && p.links > 1) span = lanes_link_of(span, link, p.links);

  uint4* const slot_x = memory + thread;  // of three tiles by turns
  const Slot<kRun> slot_dt{slot_x + 3 * kThreads, kThreads}, slot_z{slot_x + 4 * kThreads, kThreads};
  uint4* const raw = slot_x + 5 * kThreads;
  const Slot<kRun> slot_dy{slot_x + kThreads, kThreads};  // from zero: one tile of x suffices
  float* floats = reinterpret_cast<float*>(memory + Shape::kSlots * kThreads);
  const auto take = [&](int count) {
    float* const at = floats;
    floats += count;
    return at;
  };
  float *const steps = take(2 * Shape::kSteps), *const sums = take(2 * Shape::kSums);
  float* const tile_BC = take(Shape::kProjections * Shape::kProjection);
  float *const bias = take(kWidth), *const skip = take(kWidth);
  for (int c = thread; c < kWidth; c += kThreads) {
    const auto value = [&](const View& t) {
      return t.data && c < task.channels ? *reinterpret_cast<const float*>(t.data + (task.channel + c) * t.channel) : 0.0f;
    };
    bias[c] = value(p.dt_bias), skip[c] = value(p.D);
  }

  // The lane's channels and states.
  const int part = states >= 4 ? lane / Shape::kAlike : lane % kLanes;
  const int own = warp * Shape::kOfWarp + (states >= 4 ? lane % Shape::kAlike * kOwn : lane / kLanes);
  const std::int64_t channel = task.channel + own;
  const auto visit = [&](const View& t, std::int64_t row, auto visitor) {
    if (!t.data) return;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      if (own + c >= task.channels) continue;
      char* const at = t.data + row * t.row + (channel + c) * t.channel + part * kStates * t.state;
#pragma unroll
      for (int k = 0; k < kStates; ++k) visitor(c, k, at + k * t.state);
    }
  };
  const auto load = [&](const View& t, std::int64_t row, float (&values)[kOwn][kStates]) {
    visit(t, row, [&](int c, int k, const char* at) { values[c][k] = cuda::load_element(at, t.dtype); });
  };
  const auto store = [&](const View& t, std::int64_t row, const float (&values)[kOwn][kStates]) {
    visit(t, row, [&](int c, int k, char* at) { cuda::store_element(at, t.dtype, values[c][k]); });
  };
  float rate[kOwn][kStates] = {}, h[kOwn][kStates] = {};
  load(p.A, 0, rate);
#pragma unroll
  for (int c = 0; c < kOwn; ++c)
#pragma unroll
    for (int k = 0; k < kStates; ++k) rate[c][k] *= kRateScale;
  if (link == 0 && !kFromZero) load(p.initial_state, task.sequence, h);

  const Place place = lanes_place<Policy, Shape>(p.reverse, thread);
  const char* at_x = place_at(p, p.x, span, place, span.begin, task.channel);
  const char* at_dt = place_at(p, p.dt, span, place, span.begin, task.channel);
  const char* at_z = place_at(p, p.z, span, place, span.begin, task.channel);
  const char* at_dy = kFromZero ? place_at(p, p.dy, span, place, span.begin, task.channel) : nullptr;
  char* at_y = place_at(p, p.y, span, place, span.begin, task.channel);
  // B and C: each thread has the same number of values of each of its tokens, one of which, or pairs of states far apart.
  constexpr bool kPaired = Shape::kPaired;
  constexpr int kValues = kPaired ? 2 : Shape::kValues, kOfToken = 2 * kLaneStates / kValues;
  const bool raw_is_C = kPaired ? lane & 1 : thread % kOfToken >= kOfToken / 2;
  const int raw_token = kPaired ? 2 * warp + lane / 2 % 2 : thread / kOfToken;
  const int raw_state = kPaired ? lane / 4 * 2 : thread % (kOfToken / 2) * kValues;
  const View& raw_view = raw_is_C ? p.C : p.B;
  const char* at_raw = row_at(p, raw_view, span, span.begin) + raw_token * raw_view.step + task.group * raw_view.channel +
                       raw_state * raw_view.state;
  const int tiles = static_cast<int>((span.end - span.begin + kTokens - 1) / kTokens);
  const int tokens_of_last = static_cast<int>(span.end - span.begin - (tiles - 1) * std::int64_t{kTokens});
  const auto tokens_of = [&](int left) { return left > 1 ? kTokens : (left == 1 ? tokens_of_last : 0); };  // tiles with it
  const auto slot_x_of = [&](int turn) { return Slot<kRun>{slot_x + (kFromZero ? 0 : turn) * kThreads, kThreads}; };
  const auto fetch_inputs = [&](int turn, int tokens) {
    if (tokens > 0) {
      fetch<Policy>(slot_dt, at_dt, p, p.dt, place, tokens, task.channels);
      if (has_adjoint) {
        fetch<Policy>(slot_dy, at_dy, p, p.dy, place, tokens, task.channels);
        if (p.z.data) fetch<Policy>(slot_z, at_z, p, p.z, place, tokens, task.channels);
        at_dy += kTokens * p.dy.step, at_z += kTokens * p.z.step;
      }
      fetch<Policy>(slot_x_of(turn), at_x, p, p.x, place, tokens, task.channels);
      if constexpr (kPaired) {
        constexpr int kApart = 2 * kThreads / kWarp;
        float* const to = tile_BC + turn * Shape::kProjection + warp * kWarp + lane;
        const char* from = at_raw;
#pragma unroll
        for (int t = 0; t < kTokens; t += kApart, from += kApart * raw_view.step)
          copy_async<4>(to + t / 2 * kWarp, from, raw_token + t < tokens);
      } else {
        copy_async<2 * kValues>(raw, at_raw, raw_token < tokens);
      }
      at_dt += kTokens * p.dt.step, at_x += kTokens * p.x.step;
      at_raw += kTokens * raw_view.step;
    }
  };
  const auto fetch_gate = [&](int tokens) {
    if (kOutput && p.z.data && tokens > 0) fetch<Policy>(slot_z, at_z, p, p.z, place, tokens, task.channels);
    if constexpr (kOutput) at_z += kTokens * p.z.step;
  };

  // Along the tokens a thread's eight are one run, in memory order: calls `visit` with each one's place in that run.
  const int run = kAlongTokens ? place.token / kRun * kRun : place.token;
  const auto in_run = [&](auto visit) {
    if (kAlongTokens && p.reverse) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) visit(i, kRun - 1 - i);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) visit(i, i);
    }
  };
  const int own_sums = Shape::sum_at(run) + Shape::in_sums(place.channel);

  // dy silu(z) of a tile, in the place of y.
  const auto put_gradients = [&](int half) {
    float dr[kRun], z[kRun];
    slot_dy.widen(Policy::kElement, dr);
    if (p.z.data) {
      slot_z.widen(Policy::kElement, z);
#pragma unroll
      for (int i = 0; i < kRun; ++i) dr[i] *= cuda::fast_silu(z[i]);
    }
    float* const to = sums + half * Shape::kSums + own_sums;
    if constexpr (kAlongTokens) {
      in_run([&](int i, int token) { to[token * Shape::kSumRow] = dr[i]; });
    } else {
#pragma unroll
      for (int i = 0; i < kRun; i += 4)
        *reinterpret_cast<float4*>(to + i) = make_float4(dr[i], dr[i + 1], dr[i + 2], dr[i + 3]);
    }
  };
  // dt, u, B and C of a tile, as the lanes read them.
  const auto convert = [&](int turn, int half, int tokens) {
    float dt[kRun], u[kRun];
    slot_dt.widen(Policy::kElement, dt);
    slot_x_of(turn).widen(Policy::kElement, u);
#pragma unroll
    for (int i = 0; i < kRun; ++i) dt[i] += of_channel<kAlongTokens>(bias, place, i);
    if (p.dt_softplus) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) dt[i] = softplus<Arithmetic::fast>(dt[i]);
    }
    if (p.dt_limited) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) dt[i] = clamp(dt[i], p.dt_min, p.dt_max);
    }
    if (tokens < kTokens || task.channels < kWidth) {  // outside, a step of zero leaves the states alone
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (!place.holds(i, tokens, task.channels)) dt[i] = 0.0f, u[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) u[i] *= dt[i];
    float* const to = steps + half * Shape::kSteps;
    if constexpr (kAlongTokens) {
      float* const at = to + Shape::step_at(run) + Shape::in_steps(place.channel);
      in_run([&](int i, int token) {
        const int other = i == token ? i + 1 : i - 1;  // of the pair
        if (token % 2 == 0)
          *reinterpret_cast<float4*>(at + token / 2 * Shape::kStepRow) = make_float4(dt[i], u[i], dt[other], u[other]);
      });
    } else {
      float* const at = to + Shape::step_at(place.token) + place.token % 2 * 2 + Shape::in_steps(place.channel);
#pragma unroll
      for (int i = 0; i < kRun; ++i) *reinterpret_cast<float2*>(at + 4 * i) = make_float2(dt[i], u[i]);
    }
    if (has_adjoint) put_gradients(half);
    if constexpr (!kPaired) {
      float values[kValues];
      Slot<kValues>{raw, kThreads}.widen(Policy::kElement, values);
      float* const at = tile_BC + (2 * half + raw_is_C) * Shape::kProjection + raw_token * kLaneStates + raw_state;
#pragma unroll
      for (int i = 0; i < kValues; i += 4)
        *reinterpret_cast<float4*>(at + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  };

  // Where the lane's states before the first token go, and on from one checkpoint to the next.
  const std::int64_t checkpoint_step =
      std::int64_t{p.groups} * ((p.group_channels + kChannels - 1) / kChannels) * kChannels * kLaneStates;
  float *checkpoint = nullptr, *checkpoint_steps = nullptr;
  if constexpr (!kOutput) {  // of all channels of a block: those that do not exist stay zero
    const std::int64_t block = lanes_checkpoint_block(p, span, task, channel);
    const int of_block = static_cast<int>((channel - task.group * p.group_channels) % kChannels);
    checkpoint = lanes_checkpoint_at(p, block, of_block, part * kStates);
    if (kFromZero && part == 0) checkpoint_steps = p.checkpoint_steps + block * kChannels + of_block;
  }
  float product[kOwn][kStates], adjoint[kOwn][kStates] = {}, total_dt[kOwn] = {};  // of the segment, from zero
#pragma unroll
  for (int c = 0; c < kOwn; ++c)
#pragma unroll
    for (int k = 0; k < kStates; ++k) product[c][k] = 1.0f;
  const int sum_token = part;  // of each kLanes tokens, the one whose y the lane ends with
  const auto scan_tile = [&]<bool kAdjoint>(int turn, int half, int tokens) {
    const float* const from = steps + half * Shape::kSteps + Shape::in_steps(own);
    const float* const B = tile_BC + (kPaired ? turn : 2 * half) * Shape::kProjection + part * (kPaired ? 4 : kStates);
    [[maybe_unused]] const float* const C = B + Shape::kProjection;  // where it is apart
    float* const to = sums + half * Shape::kSums + Shape::in_sums(own);
    constexpr int kAtOnce = states == 8 ? 8 : 16;
    // y of some tokens, of which each lane has a part.
    const auto put = [&](float (&parts)[kAtOnce], int first) {
      constexpr int kFirstDistance = states >= 4 ? Shape::kAlike : 1;
#pragma unroll
      for (int group = 0; group < kAtOnce; group += kLanes) {
        float* const left = parts + group;
#pragma unroll
        for (int width = 1; width < kLanes; width *= 2) {
          const bool odd = part & width;
#pragma unroll
          for (int k = 0; k < kLanes / 2 / width; ++k) {
            const float kept = odd ? left[2 * k + 1] : left[2 * k], given = odd ? left[2 * k] : left[2 * k + 1];
            left[k] = kept + __shfl_xor_sync(0xffffffffu, given, width * kFirstDistance);
          }
        }
        to[Shape::sum_at(first + group) + sum_token * Shape::kSumRow] = left[0];
      }
    };
    // Where there are few warps, tokens are put while the next are worked out: a store holds up the loads after it.
    constexpr bool kLate = kOutput && kPaired;
    [[maybe_unused]] float before[kAtOnce];
#pragma unroll(states == 2 ? kTokens / kAtOnce : 1)
    for (int first = 0; first < kTokens; first += kAtOnce) {
      if (!kOutput && first >= tokens) break;
      [[maybe_unused]] float y[kAtOnce];
#pragma unroll
      for (int pair = 0; pair < kAtOnce; pair += 2) {
        const int t = first + pair;
        if constexpr (!kOutput) {
          if (pair % kCheckpoint == 0) store_lane_states(checkpoint, h), checkpoint += checkpoint_step;
          if (kFromZero && checkpoint_steps && pair % kCheckpoint == 0) {
            *reinterpret_cast<float2*>(checkpoint_steps) = make_float2(total_dt[0], total_dt[kOwn - 1]);
            checkpoint_steps += checkpoint_step / kLaneStates;
          }
        }
        float4 step[kOwn];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) step[c] = *reinterpret_cast<const float4*>(from + Shape::step_at(t) + 4 * c);
        float own_B[2][kStates], own_C[2][kStates];
        if constexpr (kPaired) {
          using Element = typename cuda::ElementOf<Policy::kElement>::type;
          const uint4 v = *reinterpret_cast<const uint4*>(B + t / 2 * (kLanes * 4));
          cuda::widen_word<Element>(v.x, own_B[0]), cuda::widen_word<Element>(v.y, own_C[0]);
          cuda::widen_word<Element>(v.z, own_B[1]), cuda::widen_word<Element>(v.w, own_C[1]);
        } else {
          const auto read = [&](const float* tile, float (&values)[2][kStates]) {
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int k = 0; k < kStates; k += 4) {
                const float4 v = *reinterpret_cast<const float4*>(tile + (t + j) * kLaneStates + k);
                values[j][k] = v.x, values[j][k + 1] = v.y, values[j][k + 2] = v.z, values[j][k + 3] = v.w;
              }
          };
          read(B, own_B);
          if constexpr (kOutput || kAdjoint) read(C, own_C);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float2 dr;
          if constexpr (kAdjoint) dr = *reinterpret_cast<const float2*>(to + Shape::sum_at(t) + j * Shape::kSumRow);
#pragma unroll
          for (int c = 0; c < kOwn; ++c) {
            const float dt = j == 0 ? step[c].x : step[c].z, u = j == 0 ? step[c].y : step[c].w;
#pragma unroll
            for (int k = 0; k < kStates; ++k) {
              const Step<Arithmetic::fast> decay = step_of<Arithmetic::fast>(dt, &rate[c][k]);
              advance<Arithmetic::fast>(&h[c][k], decay, u, &own_B[j][k]);
              if constexpr (kAdjoint) {
                product[c][k] *= decay.factor[0];
                adjoint[c][k] = fmaf(product[c][k], own_C[j][k] * (c == 0 ? dr.x : dr.y), adjoint[c][k]);
              }
            }
            if constexpr (kFromZero) total_dt[c] += dt;
          }
          if constexpr (kOutput) y[pair + j] = output_of<1, kStates>(own_C[j], h[0]);
        }
      }
      if constexpr (kLate) {
        if (first > 0) put(before, first - kAtOnce);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) before[i] = y[i];
      } else if constexpr (kOutput) {
        put(y, first);
      }
    }
    if constexpr (kLate) put(before, kTokens - kAtOnce);
  };

  const auto finish_tile = [&](int turn, int half, int tokens) {
    float y[kRun], values[kRun];
    const float* const from = sums + half * Shape::kSums + own_sums;
    if constexpr (kAlongTokens) {
      in_run([&](int i, int token) { y[i] = from[token * Shape::kSumRow]; });
    } else {
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + i);
        y[i] = v.x, y[i + 1] = v.y, y[i + 2] = v.z, y[i + 3] = v.w;
      }
    }
    if (p.D.data) {
      Slot<kRun>{slot_x + turn * kThreads, kThreads}.widen(Policy::kElement, values);
#pragma unroll
      for (int i = 0; i < kRun; ++i) y[i] = fmaf(of_channel<kAlongTokens>(skip, place, i), values[i], y[i]);
    }
    if (p.z.data) {
      slot_z.widen(Policy::kElement, values);
#pragma unroll
      for (int i = 0; i < kRun; ++i) y[i] *= cuda::fast_silu(values[i]);
    }
    if (place.holds(0, tokens, task.channels)) store_vector(at_y, Policy::kElement, y);
    at_y += kTokens * p.y.step;
  };

  // A tile is fetched while the one before it is made ready and the one before that is scanned; one barrier a tile.
  fetch_inputs(0, tokens_of(tiles));
  commit_copies();
  wait_for_copies();
  __syncthreads();  // bias
  convert(0, 0, tokens_of(tiles));
  fetch_inputs(1, tokens_of(tiles - 1));
  commit_copies();
  // A link waits with its first tile ready, and hands its state on before it has done with the last one.
  const View carried = view_of<Policy>(p, p.carried);
  if (!kFromZero && link > 0) {
    wait_for_turn(p.turns + index, link);
    load(carried, task.sequence, h);
  }
  int turn = 0, half = 0;
#pragma unroll 1
  for (int left = tiles; left >= 0; --left) {
    if (!kFromZero && left == 0 && link + 1 < p.links) {
      store(carried, task.sequence, h);
      end_turn(p.turns + index, link + 1);
    }
    wait_for_copies();
    __syncthreads();
    const int before = turn == 0 ? 2 : turn - 1, after = turn == 2 ? 0 : turn + 1;
    if (kOutput && left < tiles) finish_tile(before, half ^ 1, tokens_of(left + 1));
    if (left == 0) break;
    if (left > 1) convert(after, half ^ 1, tokens_of(left - 1));
    fetch_inputs(before, tokens_of(left - 2));
    fetch_gate(tokens_of(left));
    commit_copies();
    if (has_adjoint) scan_tile.template operator()<kFromZero>(turn, half, tokens_of(left));
    else scan_tile.template operator()<false>(turn, half, tokens_of(left));
    turn = after, half ^= 1;
  }

  if constexpr (kFromZero) {
    const auto store_end = [&](const Ends& ends, std::int64_t segment, const float (&values)[kOwn][kStates]) {
      const std::int64_t index = task.sequence * (p.segments - 1) + segment;
      store(view_of<Policy>(p, ends.states), index, values);
#pragma unroll
      for (int c = 0; c < kOwn; ++c)
        if (own + c < task.channels && part == 0) ends.steps[index * p.dim + channel + c] = total_dt[c];
    };
    if (task.segment + 1 < p.segments) store_end(p.ends, task.segment, h);
    if (task.segment > 0) store_end(p.adjoint_ends, task.segment - 1, adjoint);
    return;
  }
  if (kOutput && link + 1 == p.links) store(p.final_state, task.sequence, h);
}

}  // namespace statescan::selective_scan
