// selective_scan backward
// Math     g[t] = C[t] dr[t] + a[t+1] g[t+1], dr = dy silu(z), a = exp(dt A);  dC += dr h, dB += g dt x, du = B.g,
//          q = g a h[t-1]: dA += dt q, ddt = x du + A.q, through limit, softplus and bias;  dx = dt du + D dr, dz from y
// Shapes   as the forward; complex gradients are dL/dRe + i dL/dIm, so factors are conjugated
// Traffic  read x, dt, z, dy, write dx, ddt, dz: 7*b*l*d elements; checkpoints, a state every 16 tokens, written and read:
//          b*l*d*n/2 bytes; sums of dB and dC over 64 channels, written and read: b*l*d*n/4 bytes
//          b8 l2048 d5120 n16 bf16: 2.2 GB, 0.72 ms at 3.0 TB/s, and 2.75 exp2 a state: 1.2 ms of the special-function units of
//          an H100; about 28 instructions a state: 1.3 ms of issue
// Launch   one axis of sequences x segments x blocks; a block: 64 channels, 128 threads, a warp for 4 states of them. It walks
//          its tiles from the last to the first: from the checkpoint forward to every fourth token, then four tokens at a time
//          forward into registers and back
// Numerics float32, fixed order. dB and dC: over the lanes as a tree, then over the blocks in order, by another launch; dA, dD
//          and ddt_bias: over a segment in order, then over segments and sequences in order
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

// Adds pairs of sums that lie as steps do.
template <bool kAlongTokens>
__device__ void add_pairs(const float4* pairs, const Place& place, float (&first)[kRun], float (&second)[kRun]) {
  if constexpr (kAlongTokens) {
    const float* const at = reinterpret_cast<const float*>(pairs + slot_of_pair(place.channel / 2)) + place.channel % 2;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float* const from = at + (place.token + i * place.token_step) * (2 * kChannels);
      first[i] += from[0], second[i] += from[2];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 2) {
      const float4 v = pairs[place.token * (kChannels / 2) + slot_of_pair(place.channel / 2 + i / 2)];
      first[i] += v.x, first[i + 1] += v.y, second[i] += v.z, second[i + 1] += v.w;
    }
  }
}

// Shared memory, in words of 16 bytes.
template <class Policy>
struct BackwardStorage {
  static constexpr int kSub = kWarp / (2 * Policy::kValues);  // tokens whose states a thread holds at once
  static constexpr int kWarps = backward_warps(Policy::kParts == 2, Policy::kTimeInvariant);
  static constexpr int kFetched = kRuns * (3 * Policy::kWords + 2);
  static constexpr int kShared = kTile * kChannels / 2 + kTile * kChannels / 4 + 2 * kChannels / 4 + kFetched;
  static constexpr int kSums = kTile * kChannels / 4, kPairs = kTile * kChannels / 2;
  static constexpr int kStarts = kTile / kSub * kWarp * 2 * Policy::kValues / 4;
  static constexpr int kOwn = 2 * Storage<Policy>::kProjection + Storage<Policy>::kRaw + 2 * Storage<Policy>::kFixed;
  static constexpr int kBytes = 16 * (kShared + kWarps * (kSums + kPairs + kStarts + kOwn));
  static_assert(kBytes <= 99 * 1024);
};

// The gradients of the thread's elements from the sums of the warps; what they add to dD and ddt_bias goes to `sums`.
template <bool kAlongTokens>
__device__ void finish_gradients(const BackwardParams& p, const Place& place, const float4* steps, const Slot<kRun>& slot_dt,
                                 const Slot<kRun>& slot_x, const Slot<kRun>& slot_z, const Slot<kRun>& slot_dy,
                                 const float* bias, const float* skip, int tokens, int channels, const float (&y)[kRun],
                                 const float (&du)[kRun], const float (&dlog)[kRun], float (&dx)[kRun], float (&ddt)[kRun],
                                 float (&dz)[kRun], float (&dD)[kRun]) {
  float x[kRun], z[kRun], dy[kRun], raw[kRun], dt[kRun] = {}, u[kRun] = {};
  add_pairs<kAlongTokens>(steps, place, dt, u);
  slot_x.widen(p.x.dtype, x);
  slot_dy.widen(p.x.dtype, dy);
  slot_dt.widen(p.dt.dtype, raw);
  if (p.z.data) slot_z.widen(p.x.dtype, z);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const float D = of_channel<kAlongTokens>(skip, place, i);
    float gradient = dy[i];
    if (p.z.data) {
      const float gate = cuda::fast_reciprocal(1.0f + cuda::fast_exp2(-1.44269504f * z[i]));
      dz[i] = dy[i] * fmaf(D, x[i], y[i]) * gate * fmaf(z[i], 1.0f - gate, 1.0f);
      gradient *= z[i] * gate;
    }
    raw[i] += of_channel<kAlongTokens>(bias, place, i);
    float slope = p.dt_softplus ? cuda::fast_reciprocal(1.0f + cuda::fast_exp2(-1.44269504f * raw[i])) : 1.0f;
    if (p.dt_limited) {
      const float free = p.dt_softplus ? cuda::fast_softplus(raw[i]) : raw[i];
      if (free < p.dt_min || free > p.dt_max) slope = 0.0f;
    }
    dx[i] = fmaf(D, gradient, dt[i] * du[i]);
    ddt[i] = slope * fmaf(x[i], du[i], dlog[i]);
    dD[i] = gradient * x[i];
    if (!place.holds(i, tokens, channels)) ddt[i] = 0.0f, dD[i] = 0.0f;
  }
}

// kEndsOnly: the adjoint at the start of each segment but the first, as its own tokens give it.
template <class Policy, bool kEndsOnly>
__global__ void __launch_bounds__(kRuns, 2) selective_scan_backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kStates = Policy::kStates, kValues = Policy::kValues, kParts = Policy::kParts;
  using Memory = BackwardStorage<Policy>;
  constexpr int kSub = Memory::kSub, kSubTiles = kTile / kSub, kReduced = 2 * kValues;
  extern __shared__ uint4 memory[];

  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const std::int64_t ends = p.segments - 1;
  Task task = task_of(p, kEndsOnly ? ends : p.segments);
  if constexpr (kEndsOnly) ++task.segment;
  const Span span = span_of(p, task.sequence, task.segment);
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
  const Slot<kRun> slot_dt{take(2 * kRuns) + thread, kRuns};
  const Slot<kRun> slot_x{take(Policy::kWords * kRuns) + thread, kRuns}, slot_z{take(Policy::kWords * kRuns) + thread, kRuns};
  const Slot<kRun> slot_dy{take(Policy::kWords * kRuns) + thread, kRuns};
  float* const sums = reinterpret_cast<float*>(take(Memory::kWarps * Memory::kSums));      // of y, [warp][token][channel]
  float4* const pairs = reinterpret_cast<float4*>(take(Memory::kWarps * Memory::kPairs));  // of du and A.q, [warp] as steps
  const int scanner = min(warp, Memory::kWarps - 1);
  float4* const starts = reinterpret_cast<float4*>(take(Memory::kWarps * Memory::kStarts)) + scanner * Memory::kStarts + lane;
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

  const Place place = place_of(p.reach, p.reverse, thread);
  const std::int64_t row = task.sequence * p.segments + task.segment;
  float total_D = 0.0f, total_bias = 0.0f;  // of channel `thread`

#pragma unroll 1
  for (std::int64_t piece = 0; piece < p.dstate || piece == 0; piece += p.piece) {
    const bool first_piece = piece == 0, last_piece = piece + p.piece >= p.dstate;
    const std::int64_t held = last_piece ? p.dstate - piece : p.piece;
    const int scanners = static_cast<int>((held + kStates - 1) / kStates);
    const std::int64_t state = piece + warp * kStates, states = held - warp * kStates;
    const bool scans = warp < scanners;

    float rate[2][kValues], g[2][kValues], total_dt[2] = {};
    load_rates<Policy>(p, task, state, states, rate);
    load_states<Policy>(kEndsOnly ? View{} : p.dfinal_state, task.sequence, task, state, states, g);
    if constexpr (!kEndsOnly) {
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
    const auto fetch_tile = [&](std::int64_t token) {
      if (token >= span.begin) {
        const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
        const auto fetch_to = [&](const Slot<kRun>& slot, const View& t) {
          fetch(slot, place_at(p, t, span, place, token, task.channel), p, t, place, tokens, task.channels);
        };
        fetch_to(slot_dt, p.dt), fetch_to(slot_x, p.x), fetch_to(slot_dy, p.dy);
        if (p.z.data) fetch_to(slot_z, p.z);
        projection.fetch(p, tokens, -1);
      }
      commit_copies();
    };
    fetch_tile(last);
    float h[2][kValues];  // the state at the start of a tile
    const auto fetch_checkpoint = [&](std::int64_t token) {
      if (kEndsOnly || !scans || token < span.begin) return;
      const float4* const checkpoint = checkpoint_at<Policy>(p, span, task, token, state);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int v = 0; v < kValues; v += 4) {
          const float4 four = checkpoint[(c * kValues + v) / 4 * kWarp];
          h[c][v] = four.x, h[c][v + 1] = four.y, h[c][v + 2] = four.z, h[c][v + 3] = four.w;
        }
    };
    fetch_checkpoint(last);
    Totals<Policy> totals;

#pragma unroll 1
    for (std::int64_t token = last; token >= span.begin; token -= kTile) {
      const int tokens = static_cast<int>(span.end - token < kTile ? span.end - token : kTile);
      wait_for_copies();
      float dr[kRun], z[kRun];
      slot_dy.widen(p.x.dtype, dr);
      if (p.z.data) {
        slot_z.widen(p.x.dtype, z);
#pragma unroll
        for (int i = 0; i < kRun; ++i) dr[i] *= cuda::fast_silu(z[i]);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (!place.holds(i, tokens, task.channels)) dr[i] = 0.0f;
      if (place.along_tokens) {
        put_steps_of<true>(p, place, slot_dt, slot_x, bias, tokens, task.channels, steps);
        put_gradient<true>(gradients, place, dr);
      } else {
        put_steps_of<false>(p, place, slot_dt, slot_x, bias, tokens, task.channels, steps);
        put_gradient<false>(gradients, place, dr);
      }
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
        // Forward to the start of each group of kSub tokens.
#pragma unroll 1
        for (int sub = 0; sub < kSubTiles; ++sub) {
#pragma unroll
          for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int v = 0; v < kValues; v += 4)
              starts[(sub * 2 * kValues + c * kValues + v) / 4 * kWarp] =
                  make_float4(h[c][v], h[c][v + 1], h[c][v + 2], h[c][v + 3]);
          if (sub + 1 == kSubTiles) break;
#pragma unroll
          for (int i = 0; i < kSub; ++i) {
            const int t = sub * kSub + i;
            const float4 at = in.steps[t * (kChannels / 2)];
            const float dt[2] = {at.x, at.y}, u[2] = {at.z, at.w};
            float B[kValues];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (c == 0 || Policy::kTimeInvariant) read_projection<Policy>(B, tile_B, in.fixed_B, t, c);
#pragma unroll
              for (int v = 0; v < kValues; v += kParts)
                advance<Policy::kArithmetic>(&h[c][v], step_of<Policy::kArithmetic>(dt[c], &rate[c][v]), u[c], &B[v]);
            }
          }
        }
        // Back, group by group.
#pragma unroll 1
        for (int sub = kSubTiles - 1; sub >= 0; --sub) {
          Trail<Policy, kSub> trail;
#pragma unroll
          for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int v = 0; v < kValues; v += 4) {
              const float4 four = starts[(sub * 2 * kValues + c * kValues + v) / 4 * kWarp];
              trail.h[0][c][v] = four.x, trail.h[0][c][v + 1] = four.y, trail.h[0][c][v + 2] = four.z,
              trail.h[0][c][v + 3] = four.w;
            }
          trail.walk(in, sub * kSub, rate, sums + warp * 4 * Memory::kSums + place_in_sums(2 * lane));
          float terms[kWarp];  // [token][state of B, then of C]
          float4 back[kSub];
#pragma unroll
          for (int i = kSub - 1; i >= 0; --i) {
            Step<Policy::kArithmetic> decays[2][kStates];
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
              for (int k = 0; k < kStates; ++k) decays[c][k] = trail.step(i, c, k * kParts);
            back[i] = step_back<Policy>(in, lane_gradients, sub * kSub + i, rate, trail.h[i], trail.h[i + 1], decays, g, totals,
                                        terms + i * kReduced);
          }
#pragma unroll
          for (int i = 0; i < kSub; ++i)
            pairs[warp * Memory::kPairs + (sub * kSub + i) * (kChannels / 2) + slot_of_pair(lane)] = back[i];
          if (p.projections) {
            const float sum = sum_over_warp(terms);
            const std::int64_t t = token + sub * kSub + lane / kReduced;
            if (t < span.end) {
              const std::int64_t fours = (p.dstate + kStates - 1) / kStates;
              const std::int64_t at = span.row * p.seqlen + (p.reverse ? span.last - 1 - t : span.first + t);
              p.projections[((at * p.blocks + task.block) * fours + state / kStates) * kReduced + lane % kReduced] = sum;
            }
          }
        }
      }
      fetch_checkpoint(token - kTile);
      __syncthreads();

      if constexpr (!kEndsOnly) {
        float y[kRun] = {}, du[kRun] = {}, dlog[kRun] = {}, dx[kRun], ddt[kRun], dz[kRun], dD[kRun];
        for (int w = 0; w < scanners; ++w) {
          if (place.along_tokens) {
            add_sums<true>(sums + w * 4 * Memory::kSums, place, y);
            add_pairs<true>(pairs + w * Memory::kPairs, place, du, dlog);
          } else {
            add_sums<false>(sums + w * 4 * Memory::kSums, place, y);
            add_pairs<false>(pairs + w * Memory::kPairs, place, du, dlog);
          }
        }
        if (!first_piece || !last_piece) {
          const std::int64_t size = p.cu_seqlens ? p.seqlen * p.dim : p.sequences * p.seqlen * p.dim;
          pass_on(p.partial, p, span, token, place, tokens, task, first_piece, last_piece, y);
          pass_on(p.partial_steps, p, span, token, place, tokens, task, first_piece, last_piece, du);
          pass_on(p.partial_steps + size, p, span, token, place, tokens, task, first_piece, last_piece, dlog);
        }
        if (last_piece) {
          if (place.along_tokens)
            finish_gradients<true>(p, place, steps, slot_dt, slot_x, slot_z, slot_dy, bias, skip, tokens, task.channels, y, du,
                                   dlog, dx, ddt, dz, dD);
          else
            finish_gradients<false>(p, place, steps, slot_dt, slot_x, slot_z, slot_dy, bias, skip, tokens, task.channels, y, du,
                                    dlog, dx, ddt, dz, dD);
          const auto store_to = [&](const View& t, const float (&values)[kRun]) {
            if (t.data) store(place_at(p, t, span, place, token, task.channel), p, t, place, tokens, task.channels, values);
          };
          store_to(p.dx, dx), store_to(p.ddt, ddt);
          if (p.z.data) store_to(p.dz, dz);
          // The thread's own elements of the first warp's sums are read: their places take what goes to dD and ddt_bias.
          if (place.along_tokens) put_steps<true>(pairs, place, dD, ddt);
          else put_steps<false>(pairs, place, dD, ddt);
        }
        fetch_tile(token - kTile);
        __syncthreads();
        if (last_piece && thread < kChannels) {
          const float* const at = reinterpret_cast<const float*>(pairs + slot_of_pair(thread / 2)) + thread % 2;
#pragma unroll
          for (int t = kTile - 1; t >= 0; --t) total_D += at[t * 2 * kChannels], total_bias += at[t * 2 * kChannels + 2];
        }
      } else {
        fetch_tile(token - kTile);
      }
    }

    if (!scans) continue;
    if constexpr (kEndsOnly) {
      store_end<Policy>(p, p.adjoint_ends, task.sequence * ends + task.segment - 1, task, state, states, g, total_dt);
    } else {
      if (task.segment == 0 && p.dinitial_state.data)
        store_states<Policy>(p.dinitial_state, task.sequence, task, state, states, g);
      store_states<Policy>(view_of<Policy>(p, p.dA), row, task, state, states, totals.A);
      if constexpr (Policy::kTimeInvariant) {
        if (!p.varying_B) store_states<Policy>(view_of<Policy>(p, p.dB), row, task, state, states, totals.B);
        if (!p.varying_C) store_states<Policy>(view_of<Policy>(p, p.dC), row, task, state, states, totals.C);
      }
    }
  }
  if (!kEndsOnly && thread < task.channels)
    p.dD[row * p.dim + task.channel + thread] = total_D, p.ddt_bias[row * p.dim + task.channel + thread] = total_bias;
}

}  // namespace statescan::selective_scan
