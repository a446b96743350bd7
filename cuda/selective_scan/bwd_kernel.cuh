// selective_scan backward
// Math     g[t] = C[t] dr[t] + a[t+1] g[t+1], dr = dy silu(z), a = exp(dt A);  dC += dr h, dB += g dt x, du = B.g,
//          q = g a h[t-1]: dA += dt q, ddt = x du + A.q, through limit, softplus and bias;  dx = dt du + D dr, dz from y
// Shapes   as the forward; complex gradients are dL/dRe + i dL/dIm, so factors are conjugated
// Traffic  read x, dt, z, dy, write dx, ddt, dz: 7*b*l*d elements; checkpoints, a state every 8 tokens, written and read:
//          b*l*d*n bytes; sums of dB and dC over 64 channels, written and read: b*l*d*n/4 bytes
// Launch   one axis of links x sequences x segments x blocks; a block: 64 channels, 128 threads, a warp for 4 states of them.
//          It walks its tiles from the last to the first, from a checkpoint 8 tokens (2 of a complex A) forward into registers
//          and back. Calls whose tensors are known have a kernel of their own, bwd_known_kernel.cuh
// Numerics float32, fixed order. dB and dC: over the lanes of a warp (beside bfloat16 x by the tensor cores, cut to 11 bits),
//          then over the blocks in order, by another launch; dA, dD and ddt_bias: over a segment, then over segments and
//          sequences in order
#pragma once

#include "bwd_step.cuh"

namespace statescan::selective_scan {

// dy silu(z) of the thread's elements, [token][channel] as sums lie.
template <bool kAlongTokens>
__device__ void put_gradient(float* gradients, const Place& place, const float (&values)[kRun]) {
  if constexpr (kAlongTokens) {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      gradients[(place.token + i * place.token_step) * kChannels + place_in_sums(place.channel)] = values[i];
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 4)
      *reinterpret_cast<float4*>(gradients + place.token * kChannels + place_in_sums(place.channel + i)) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  }
}

// Pairs of sums that lie as steps do.
template <bool kAlongTokens>
__device__ void get_pairs(const float4* pairs, const Place& place, float (&first)[kRun], float (&second)[kRun]) {
  if constexpr (kAlongTokens) {
    const float* const at = reinterpret_cast<const float*>(pairs + slot_of_pair(place.channel / 2)) + place.channel % 2;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float* const from = at + (place.token + i * place.token_step) * (2 * kChannels);
      first[i] = from[0], second[i] = from[2];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 2) {
      const float4 v = pairs[place.token * (kChannels / 2) + slot_of_pair(place.channel / 2 + i / 2)];
      first[i] = v.x, first[i + 1] = v.y, second[i] = v.z, second[i + 1] = v.w;
    }
  }
}
template <bool kAlongTokens>
__device__ void add_pairs(const float4* pairs, const Place& place, float (&first)[kRun], float (&second)[kRun]) {
  float more_first[kRun], more_second[kRun];
  get_pairs<kAlongTokens>(pairs, place, more_first, more_second);
#pragma unroll
  for (int i = 0; i < kRun; ++i) first[i] += more_first[i], second[i] += more_second[i];
}

// Shared memory, in words of 16 bytes.
template <class Policy>
struct BackwardStorage {
  static constexpr int kSub = Policy::kParts == 2 ? 2 : kCheckpoint;  // tokens whose states a thread holds at once
  static constexpr int kSummed = kWarp / (2 * Policy::kValues);       // tokens whose dB and dC a warp adds up at once
  static constexpr int kWarps = backward_warps(Policy::kParts == 2, Policy::kTimeInvariant);
  static constexpr int kFetched = kRuns * (3 * Policy::kWords + 2);
  static constexpr int kTotals = kRuns * 2 * kRun / 4;
  static constexpr bool kHasCursors = Policy::kWords == 1;  // there is no room for them beside float32
  static constexpr int kCursors = kHasCursors ? kRuns * 7 * sizeof(char*) / 16 : 0;
  static constexpr int kShared =
      kTile * kChannels / 2 + kTile * kChannels / 4 + 2 * kChannels / 4 + kFetched + kTotals + kCursors;
  static constexpr int kSums = kTile * kChannels / 4, kPairs = kTile * kChannels / 2;
  static constexpr int kStarts = (kTile / kCheckpoint + kCheckpoint / kSub - 1) * LaneStates<Policy>::kWords * kWarp;
  static constexpr int kOwn = 2 * Storage<Policy>::kProjection + Storage<Policy>::kRaw + 2 * Storage<Policy>::kFixed;
  static constexpr int kBytes = 16 * (kShared + kWarps * (kSums + kPairs + kStarts + kOwn));
  static constexpr int kBytesOfEnds = 16 * (kShared + kWarps * kOwn);
  static_assert(kBytes <= 99 * 1024);
};

// A float for each of the thread's elements, in shared memory of its own: registers are dear here.
struct OwnFloats {
  float4* at;  // two words, kRuns apart

  __device__ void put(const float (&v)[kRun]) const {
    at[0] = make_float4(v[0], v[1], v[2], v[3]);
    at[kRuns] = make_float4(v[4], v[5], v[6], v[7]);
  }
  __device__ void get(float (&v)[kRun]) const {
    const float4 first = at[0], second = at[kRuns];
    v[0] = first.x, v[1] = first.y, v[2] = first.z, v[3] = first.w;
    v[4] = second.x, v[5] = second.y, v[6] = second.z, v[7] = second.w;
  }
  __device__ void add(const float (&v)[kRun]) const {
    float sum[kRun];
    get(sum);
#pragma unroll
    for (int i = 0; i < kRun; ++i) sum[i] += v[i];
    put(sum);
  }
};

// Where the thread's elements of a tile lie in some tensors, in shared memory too: cheaper than to work it out for every tile.
template <int kCount>
struct Cursors {
  char** at;  // kRuns apart

  // Of this tile; they move to the one before it. All are read before the first is written, which would hold up the others.
  __device__ void step_back(const View* const (&views)[kCount], char* (&here)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      here[i] = at[i * kRuns];
      __builtin_assume(__isGlobal(here[i]));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i * kRuns] = here[i] - kTile * views[i]->step;
  }
};

// What the gradients of a thread's elements take from before the scan.
template <class Policy>
struct Prepared {
  float x[kRun], dt[kRun], slope[kRun];       // slope: of dt
  float gradient[kRun], gate_gradient[kRun];  // dy silu(z), and dy silu'(z)

  // The tile is ready for the scan.
  template <bool kAlongTokens, bool kEndsOnly>
  static __device__ void put(const BackwardParams& p, const Place& place, const Slot<kRun>& slot_dt, const Slot<kRun>& slot_x,
                             const Slot<kRun>& slot_z, const Slot<kRun>& slot_dy, const float* bias, int tokens, int channels,
                             float4* steps, float* gradients, const OwnFloats& slopes, const OwnFloats& gate_gradients) {
    float dr[kRun], z[kRun];
    slot_dy.widen(dtype_of<Policy>(p.dy), dr);
    if (p.z.data) {
      slot_z.widen(dtype_of<Policy>(p.z), z);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float gate = cuda::fast_reciprocal(1.0f + cuda::fast_exp2(-1.44269504f * z[i])), gated = dr[i] * gate;
        dr[i] = gated * z[i];
        z[i] = fmaf(dr[i], 1.0f - gate, gated);
      }
      if constexpr (!kEndsOnly) gate_gradients.put(z);
    }
    if constexpr (!Policy::kKnown) {  // what comes in vectors is zero there
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (!place.holds(i, tokens, channels)) dr[i] = 0.0f;
    }
    put_gradient<kAlongTokens>(gradients, place, dr);
    if constexpr (kEndsOnly) {
      put_steps_of<Policy, kAlongTokens>(p, place, slot_dt, slot_x, bias, tokens, channels, steps);
    } else {
      float slope[kRun];
      put_steps_of<Policy, kAlongTokens>(p, place, slot_dt, slot_x, bias, tokens, channels, steps, slope);
      slopes.put(slope);
    }
  }
  template <bool kAlongTokens>
  __device__ void get(const BackwardParams& p, const Place& place, const Slot<kRun>& slot_x, const float4* steps,
                      const float* gradients, const OwnFloats& slopes, const OwnFloats& gate_gradients) {
    float u[kRun];
    slot_x.widen(dtype_of<Policy>(p.x), x);
    slopes.get(slope);
    if (p.z.data) gate_gradients.get(gate_gradient);
    get_pairs<kAlongTokens>(steps, place, dt, u);
    get_sums<kAlongTokens>(gradients, place, gradient);
  }
};

// kEndsOnly: the adjoint at the start of each segment but the first, as its own tokens give it.
template <class Policy, bool kEndsOnly>
__global__ void __launch_bounds__(kRuns, kEndsOnly ? 4 : 2)
    selective_scan_backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kStates = Policy::kStates, kValues = Policy::kValues, kParts = Policy::kParts;
  using Memory = BackwardStorage<Policy>;
  constexpr int kSub = Memory::kSub, kSubTiles = kTile / kSub, kSummed = Memory::kSummed, kReduced = 2 * kValues;
  constexpr int kSubsOfCheckpoint = kCheckpoint / kSub, kStart = LaneStates<Policy>::kWords * kWarp;
  extern __shared__ uint4 memory[];

  const int thread = threadIdx.x, warp = thread / kWarp;
  int lane = thread % kWarp;
  asm("" : "+r"(lane));  // in a register: the loops would wait for reading it anew
  const std::int64_t ends = p.segments - 1;
  const std::uint32_t tasks = gridDim.x / p.links;
  const bool is_linked = !kEndsOnly && p.links > 1;
  const std::uint32_t link = is_linked ? blockIdx.x / tasks : 0;
  const std::int64_t index = is_linked ? blockIdx.x % tasks : blockIdx.x;
  Task task = task_of(p, index, kEndsOnly ? ends : p.segments);
  if constexpr (kEndsOnly) ++task.segment;
  Span span = span_of(p, task.sequence, task.segment);
  if (is_linked) {
    span = backward_link_of(p, span, link);
    if (link > 0) wait_for_turn(p.turns + index, link);
  }
  if (p.cu_seqlens && task.sequence == p.sequences) {
    if (task.segment == 0) clear_rows(p.dx, span, task), clear_rows(p.ddt, span, task), clear_rows(p.dz, span, task);
    return;
  }

  uint4* free_memory = memory;
  const auto take = [&](int words) {
    uint4* const at = free_memory;
    free_memory += words;
    return at;
  };
  float4* const steps = reinterpret_cast<float4*>(take(Memory::kPairs));
  float* const gradients = reinterpret_cast<float*>(take(Memory::kSums));
  float* const bias = reinterpret_cast<float*>(take(2 * kChannels / 4));
  float* const skip = bias + kChannels;
  const Slot<kRun> slot_dt{take(2 * kRuns) + thread, kRuns}, slot_x{take(Policy::kWords * kRuns) + thread, kRuns};
  const Slot<kRun> slot_z{take(Policy::kWords * kRuns) + thread, kRuns}, slot_dy{take(Policy::kWords * kRuns) + thread, kRuns};
  const OwnFloats slopes{reinterpret_cast<float4*>(slot_dt.at)}, gate_gradients{reinterpret_cast<float4*>(slot_z.at)};
  const auto take_floats = [&] { return OwnFloats{reinterpret_cast<float4*>(take(2 * kRuns)) + thread}; };
  const OwnFloats total_D = take_floats(), total_bias = take_floats();
  constexpr float kZeros[kRun] = {};
  total_D.put(kZeros), total_bias.put(kZeros);
  const View* const inputs[] = {&p.dt, &p.x, &p.dy, &p.z};
  const View* const outputs[] = {&p.dx, &p.ddt, &p.dz};
  const Cursors<4> at_inputs{reinterpret_cast<char**>(take(Memory::kCursors)) + thread};
  const Cursors<3> at_outputs{at_inputs.at + 4 * kRuns};
  float* const sums =
      reinterpret_cast<float*>(take(kEndsOnly ? 0 : Memory::kWarps * Memory::kSums));  // of y, [warp][token][channel]
  float4* const pairs =
      reinterpret_cast<float4*>(take(kEndsOnly ? 0 : Memory::kWarps * Memory::kPairs));  // of du and A.q, [warp] as steps
  const int scanner = min(warp, Memory::kWarps - 1);
  float4* const starts =
      reinterpret_cast<float4*>(take(kEndsOnly ? 0 : Memory::kWarps * Memory::kStarts)) + scanner * Memory::kStarts + lane;
  uint4* const own = take(Memory::kWarps * Memory::kOwn) + scanner * Memory::kOwn;
  float* const tile_B = reinterpret_cast<float*>(own);
  float* const tile_C = reinterpret_cast<float*>(own + Storage<Policy>::kProjection);
  uint4* const raw = own + 2 * Storage<Policy>::kProjection + lane;
  float* const fixed_B =
      reinterpret_cast<float*>(own + 2 * Storage<Policy>::kProjection + Storage<Policy>::kRaw) + lane * kValues;
  float* const fixed_C = fixed_B + 4 * Storage<Policy>::kFixed;
  const TileInputs in{steps + slot_of_pair(lane), tile_B, tile_C, p.varying_B ? nullptr : fixed_B,
                      p.varying_C ? nullptr : fixed_C};
  const float* const lane_gradients = gradients + place_in_sums(2 * lane);

  load_channels(p.dt_bias, task, bias);
  load_channels(p.D, task, skip);
  __syncthreads();

  const Place place = place_of<Policy>(p.reach, p.reverse, thread);
  const auto for_layout = [&](auto visit) {
    if (place.along_tokens) visit.template operator()<true>();
    else visit.template operator()<false>();
  };
  const std::int64_t row = task.sequence * p.segments + task.segment;
  const std::int64_t place_of_channel = row * p.dim + task.channel + thread;

#pragma unroll 1
  for (std::int64_t piece = 0; piece < p.dstate || piece == 0; piece += p.piece) {
    const bool first_piece = piece == 0, last_piece = piece + p.piece >= p.dstate;
    const std::int64_t held = last_piece ? p.dstate - piece : p.piece;
    const int scanners = static_cast<int>((held + kStates - 1) / kStates);
    const std::int64_t state = piece + warp * kStates, states = held - warp * kStates;
    const bool scans = warp < scanners;

    float rate[2][kValues], g[2][kValues], total_dt[2] = {};
    load_rates<Policy>(p, task, state, states, rate);
    load_states<Policy>(kEndsOnly || link > 0 ? View{} : p.dfinal_state, task.sequence, task, state, states, g);
    if (!kEndsOnly && link == 0) {
      float conjugate[2][kValues];
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int v = 0; v < kValues; ++v) conjugate[c][v] = v % kParts ? -rate[c][v] : rate[c][v];
#pragma unroll 1
      for (std::int64_t after = ends; after > task.segment; --after)
        cross_segment<Policy>(p, p.adjoint_ends, task.sequence * ends + after - 1, task, state, states, conjugate, g);
    }
    if constexpr (Policy::kTimeInvariant) {
      if (scans && !p.varying_B) keep_fixed<Policy>(p.B, task, state, states, fixed_B);
      if (scans && !p.varying_C) keep_fixed<Policy>(p.C, task, state, states, fixed_C);
    }

    const std::int64_t tiles = (span.end - span.begin + kTile - 1) / kTile, last = span.begin + (tiles - 1) * kTile;
    const bool of_C = lane >= kTile;
    Projection<Policy> projection(p, of_C, scans, span, last, task.group, state, states, raw);
    const auto set = [&]<int kCount>(const Cursors<kCount>& cursors, const View* const(&views)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if constexpr (Memory::kHasCursors) cursors.at[i * kRuns] = place_at(p, *views[i], span, place, last, task.channel);
    };
    set(at_inputs, inputs), set(at_outputs, outputs);
    const auto places_of_tile = [&]<int kCount>(const Cursors<kCount>& cursors, const View* const(&views)[kCount],
                                                std::int64_t token, char*(&places)[kCount]) {
      if constexpr (Memory::kHasCursors) {
        cursors.step_back(views, places);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) places[i] = place_at(p, *views[i], span, place, token, task.channel);
      }
    };
    const std::int64_t fours = (p.dstate + kStates - 1) / kStates, checkpoint_step = std::int64_t{p.blocks} * fours * kStart;
    const float4* checkpoint = kEndsOnly ? nullptr : checkpoint_at<Policy>(p, span, task, last, state);
    const auto fetch_tile = [&](std::int64_t token) {
      if (token >= span.begin) {
        const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
        char* from[4];
        places_of_tile(at_inputs, inputs, token, from);
        fetch<Policy>(slot_dt, from[0], p, p.dt, place, tokens, task.channels);
        fetch<Policy>(slot_x, from[1], p, p.x, place, tokens, task.channels);
        fetch<Policy>(slot_dy, from[2], p, p.dy, place, tokens, task.channels);
        if (p.z.data) fetch<Policy>(slot_z, from[3], p, p.z, place, tokens, task.channels);
        projection.fetch(p, tokens, -1);
        if (!kEndsOnly && scans) {
#pragma unroll
          for (int i = 0; i < kTile / kCheckpoint; ++i)
            LaneStates<Policy>::fetch(starts + i * kStart, checkpoint + i * checkpoint_step);
          checkpoint -= kTile / kCheckpoint * checkpoint_step;
        }
      }
      commit_copies();
    };
    fetch_tile(last);
    // What this lane's sums add to dB or dC, at the first token.
    const bool is_coarse = Policy::kArithmetic == Arithmetic::fast && dtype_of<Policy>(p.x) == DType::bfloat16;
    const int summed_row = is_coarse ? CoarseSum::row_of_lane(lane) : lane;
    const std::int64_t projected_step = (p.reverse ? -1 : 1) * std::int64_t{p.blocks} * fours * kReduced;
    const std::int64_t first_token = span.row * p.seqlen + (p.reverse ? span.last - 1 - span.begin : span.first + span.begin);
    float* const projected = p.projections ? p.projections +
                                                 ((first_token * p.blocks + task.block) * fours + state / kStates) * kReduced +
                                                 summed_row % kReduced
                                           : nullptr;
    // Where the state before a group of kSub tokens lies. Going back, the first group of a checkpoint fills in those between.
    const auto start_of = [&](int sub) -> const float4* {
      const int of_checkpoint = sub % kSubsOfCheckpoint;
      float4* const checkpoint = starts + sub / kSubsOfCheckpoint * kStart;
      float4* const between = starts + (kTile / kCheckpoint - 1) * kStart;
      if (kSubsOfCheckpoint > 1 && of_checkpoint == kSubsOfCheckpoint - 1) {
        float h[2][kValues];
        LaneStates<Policy>::load(checkpoint, h);
#pragma unroll 1
        for (int s = 1; s < kSubsOfCheckpoint; ++s) {
#pragma unroll
          for (int i = 0; i < kSub; ++i) {
            TokenInputs<Policy, false> now;
            now.read(in, (sub - of_checkpoint + s - 1) * kSub + i);
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
              for (int v = 0; v < kValues; v += kParts)
                advance<Policy::kArithmetic>(&h[c][v], step_of<Policy::kArithmetic>(now.dt[c], &rate[c][v]), now.u[c],
                                             now.B_of(c) + v);
          }
          LaneStates<Policy>::store(between + s * kStart, h);
        }
      }
      return of_checkpoint == 0 ? checkpoint : between + of_checkpoint * kStart;
    };
    Totals<Policy> totals;
    if (link > 0) {
      load_states<Policy>(view_of<Policy>(p, p.carried), row, task, state, states, g);
      load_states<Policy>(view_of<Policy>(p, p.dA), row, task, state, states, totals.A);
      if constexpr (Policy::kTimeInvariant) {
        if (!p.varying_B) load_states<Policy>(view_of<Policy>(p, p.dB), row, task, state, states, totals.B);
        if (!p.varying_C) load_states<Policy>(view_of<Policy>(p, p.dC), row, task, state, states, totals.C);
      }
    }

#pragma unroll 1
    for (std::int64_t token = last; token >= span.begin; token -= kTile) {
      const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
      wait_for_copies();
      for_layout([&]<bool kAlongTokens> {
        Prepared<Policy>::template put<kAlongTokens, kEndsOnly>(p, place, slot_dt, slot_x, slot_z, slot_dy, bias, tokens,
                                                                task.channels, steps, gradients, slopes, gate_gradients);
      });
      projection.put(p, of_C ? tile_C : tile_B);
      __syncthreads();

      if (kEndsOnly && scans) {
#pragma unroll 4
        for (int t = kTile - 1; t >= 0; --t) {
          const float4 at = in.steps[t * (kChannels / 2)];
          const float2 gradient = *reinterpret_cast<const float2*>(lane_gradients + t * kChannels);
          const float dt[2] = {at.x, at.y}, scaled[2] = {kParts * gradient.x, kParts * gradient.y};
          float C[kValues];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (c == 0 || Policy::kTimeInvariant) read_projection<Policy>(C, tile_C, in.fixed_C, t, c);
            total_dt[c] += dt[c];
#pragma unroll
            for (int v = 0; v < kValues; v += kParts) {
#pragma unroll
              for (int part = 0; part < kParts; ++part)
                g[c][v + part] = fmaf(part == 0 ? C[v + part] : -C[v + part], scaled[c], g[c][v + part]);
              retreat<Policy::kArithmetic>(&g[c][v], step_of<Policy::kArithmetic>(dt[c], &rate[c][v]));
            }
          }
        }
      }
      if (!kEndsOnly && scans) {
        // Back, kSub tokens at a time.
#pragma unroll 1
        for (int sub = kSubTiles - 1; sub >= 0; --sub) {
          Trail<Policy, kSub> trail;
          LaneStates<Policy>::load(start_of(sub), trail.h[0]);
          trail.walk(in, sub * kSub, rate, sums + warp * 4 * Memory::kSums + place_in_sums(2 * lane));
          CoarseSum coarse[kSub / kSummed];
          float total[kSub / kSummed];
#pragma unroll
          for (int summed = kSub - kSummed; summed >= 0; summed -= kSummed) {
            float terms[kWarp];  // [token][state of B, then of C]
            float4 back[kSummed];
#pragma unroll
            for (int k = kSummed - 1; k >= 0; --k) {
              const int i = summed + k;
              Step<Policy::kArithmetic> decays[2][kStates];
#pragma unroll
              for (int c = 0; c < 2; ++c)
#pragma unroll
                for (int n = 0; n < kStates; ++n) decays[c][n] = trail.step(i, c, n * kParts);
              back[k] = step_back<Policy>(in, lane_gradients, sub * kSub + i, rate, trail.h[i], trail.h[i + 1], decays, g,
                                          totals, terms + k * kReduced);
            }
            const int first = sub * kSub + summed;
#pragma unroll
            for (int k = 0; k < kSummed; ++k)
              pairs[warp * Memory::kPairs + (first + k) * (kChannels / 2) + slot_of_pair(lane)] = back[k];
            if (is_coarse) coarse[summed / kSummed].add(terms, lane);
            else total[summed / kSummed] = sum_over_warp(terms);
          }
#pragma unroll
          for (int i = 0; i < kSub / kSummed; ++i) {
            if (is_coarse) total[i] = coarse[i].over_warp(lane);
            const int t = sub * kSub + i * kSummed + summed_row / kReduced;
            if (projected && t < tokens) projected[(token - span.begin + t) * projected_step] = total[i];
          }
        }
      }
      __syncthreads();

      if constexpr (kEndsOnly) {
        fetch_tile(token - kTile);
      } else {
        Prepared<Policy> of;
        for_layout([&]<bool kAlongTokens> {
          of.template get<kAlongTokens>(p, place, slot_x, steps, gradients, slopes, gate_gradients);
        });
        char* to[3];
        if (last_piece) places_of_tile(at_outputs, outputs, token, to);
        fetch_tile(token - kTile);
        float y[kRun] = {}, du[kRun] = {}, dlog[kRun] = {};
        for_layout([&]<bool kAlongTokens> {
#pragma unroll 1
          for (int w = 0; w < Memory::kWarps && w < scanners; ++w) {
            add_sums<kAlongTokens>(sums + w * 4 * Memory::kSums, place, y);
            add_pairs<kAlongTokens>(pairs + w * Memory::kPairs, place, du, dlog);
          }
        });
        if (!first_piece || !last_piece) {
          const std::int64_t size = p.cu_seqlens ? p.seqlen * p.dim : p.sequences * p.seqlen * p.dim;
          pass_on(p.partial, p, span, token, place, tokens, task, first_piece, last_piece, y);
          pass_on(p.partial_steps, p, span, token, place, tokens, task, first_piece, last_piece, du);
          pass_on(p.partial_steps + size, p, span, token, place, tokens, task, first_piece, last_piece, dlog);
        }
        if (last_piece) {
          constexpr float kUnscale = 1.0f / kRateScale;
          float dx[kRun], ddt[kRun], dz[kRun], dD[kRun];
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const float D = skip[place.channel_of(i)];
            dx[i] = fmaf(D, of.gradient[i], of.dt[i] * du[i]);
            ddt[i] = fmaf(of.x[i], du[i], dlog[i] * kUnscale) * of.slope[i];
            dz[i] = fmaf(D, of.x[i], y[i]) * of.gate_gradient[i];
            dD[i] = of.gradient[i] * of.x[i];
          }
          if (p.dx.data) store<Policy>(to[0], p, p.dx, place, tokens, task.channels, dx);
          if (p.ddt.data) store<Policy>(to[1], p, p.ddt, place, tokens, task.channels, ddt);
          if (p.dz.data) store<Policy>(to[2], p, p.dz, place, tokens, task.channels, dz);
          total_D.add(dD), total_bias.add(ddt);
        }
      }
    }

    if (!scans) continue;
    if constexpr (kEndsOnly) {
      store_end<Policy>(p, p.adjoint_ends, task.sequence * ends + task.segment - 1, task, state, states, g, total_dt);
    } else {
      if (link + 1 < p.links) store_states<Policy>(view_of<Policy>(p, p.carried), row, task, state, states, g);
      else if (task.segment == 0 && p.dinitial_state.data)
        store_states<Policy>(p.dinitial_state, task.sequence, task, state, states, g);
      store_states<Policy>(view_of<Policy>(p, p.dA), row, task, state, states, totals.A);
      if constexpr (Policy::kTimeInvariant) {
        if (!p.varying_B) store_states<Policy>(view_of<Policy>(p, p.dB), row, task, state, states, totals.B);
        if (!p.varying_C) store_states<Policy>(view_of<Policy>(p, p.dC), row, task, state, states, totals.C);
      }
    }
  }
  if constexpr (!kEndsOnly) {
    float dD[kRun], ddt[kRun];
    total_D.get(dD), total_bias.get(ddt);
    __syncthreads();  // the last tile's sums are read
    if (place.along_tokens) put_steps<true>(pairs, place, dD, ddt);
    else put_steps<false>(pairs, place, dD, ddt);
    __syncthreads();
    if (thread < task.channels) {
      float of_D = link > 0 ? p.dD[place_of_channel] : 0.0f, of_bias = link > 0 ? p.ddt_bias[place_of_channel] : 0.0f;
      const float* const at = reinterpret_cast<const float*>(pairs + slot_of_pair(thread / 2)) + thread % 2;
#pragma unroll
      for (int t = 0; t < kTile; ++t) of_D += at[t * 2 * kChannels], of_bias += at[t * 2 * kChannels + 2];
      p.dD[place_of_channel] = of_D, p.ddt_bias[place_of_channel] = of_bias;
    }
  }
  if (is_linked && link + 1 < p.links) end_turn(p.turns + index, link + 1);
}

}  // namespace statescan::selective_scan
