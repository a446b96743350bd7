// causal_conv1d backward, for tensors whose tokens lie side by side (channels first)
// Math     as in bwd_walk_kernel.cuh
// Shapes   x, dy, dx [b,l,d] with strides of 1 along l; weight [d,w]; states [b,d,w-1]
// Traffic  read x and dy, write dx: 3*b*l*d*sizeof(Element); floor: that over 3.0 TB/s. The shares of dweight and dbias are
//          8*(w+1) bytes a segment and channel
// Launch   one axis of blocks of 4 warps over segments of tokens (fastest), channels and rows; a lane takes 16 bytes of tokens
//          at a time, from the end to the start. Few blocks at once, so that rows which are asked for as a whole come as a
//          whole: H100, b8 l2048 d5376 bfloat16, 189 us with 4 on a multiprocessor, 201 with 6. Then the shares are added up
// Numerics float32; a lane adds up its tokens in order, the lanes of a warp as a tree. No atomics
#pragma once

#include "time.cuh"

namespace statescan::causal_conv1d {

template <class Policy, bool kMirrored>
__global__ void __launch_bounds__(kThreads, Policy::kTaps == kFour ? 4 : 1)
    causal_conv1d_backward_time_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kTaps = Policy::kTaps, kRun = Policy::kRun, kStep = Policy::kStep;
  using Lanes = Track<Policy, kMirrored>;
  const Lanes track(p.shape);
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (!track.has_work(p.shape)) return;  // a whole warp
  const char *const x = track.at(p.x), *const dy = track.at(p.dy);
  char* const dx = p.dx.data ? track.at(p.dx) : nullptr;
  // Eight steps at a time are asked for, a line of 128 bytes by each lane: memory gives 4 KB of a row sooner than eight pieces
  // between those of other rows.
  constexpr int kPiece = 8 * kStep;
  const auto fetch_piece = [&](int begin) {
    const int t = begin + track.lane * (kPiece / kWarp);
    if (t < track.last) track.prefetch(x, t), track.prefetch(dy, t);
  };
  fetch_piece(track.first + (track.last - 1 - track.first) / kPiece * kPiece);
  float weight[kTaps], dweight[kTaps] = {}, dbias = 0.0f;
  track.load_weights(p.weight, weight);
  const float bias = p.bias.data ? cuda::load_element(p.bias.data + track.channel * p.bias.channel, p.bias.dtype) : 0.0f;
  const Span span{track.row, 0, track.seqlen};
  float initial[kRun];
  track.load_state(p.initial_state, p.shape.width, initial);

  // The lane's run of x and dy in a step. The last lanes' x of the step before stands before the first lanes' of this one.
  struct Step {
    typename Lanes::Run x, dy;
  };
  const auto load = [&](Step& step, int first, bool wants_x, bool wants_dy) {
    const int t = first + track.lane * kRun;
    const bool is_inside = t >= 0 && t < track.seqlen;
    track.load(step.x, x, t, wants_x && is_inside);
    track.load(step.dy, dy, t, wants_dy && is_inside);
  };
  // The gradients of the sums of the lane's run; a step of the segment adds to dweight and dbias.
  const auto gradients_of = [&](const Step& step, const Step& step_before, int first, bool counted, float (&gradient)[kRun]) {
    float before[kRun], current[kRun], around[kTaps - 1 + kRun];
    track.widen(step.x, current), track.widen(step_before.x, before), track.widen(step.dy, gradient);
#pragma unroll
    for (int i = 0; i < kRun; ++i) before[i] = first == 0 ? initial[i] : before[i];
    track.gather(before, current, around);
    if (p.silu) {  // no branch inside: what the tokens wait for goes on side by side
#pragma unroll
      for (int i = 0; i < kRun; ++i) gradient[i] *= cuda::fast_dsilu(track.convolve(weight, bias, around, i));
      // Past the end 0 meets what the last tokens make of act', which may not be finite.
      if (first + kStep > track.seqlen) {  // for the whole warp
#pragma unroll
        for (int i = 0; i < kRun; ++i) gradient[i] = first + track.lane * kRun >= track.seqlen ? 0.0f : gradient[i];
      }
    }
    if (!counted) return;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      dbias += gradient[i];
#pragma unroll
      for (int k = 0; k < kTaps; ++k)
        if (track.counts(k)) dweight[k] = fmaf(gradient[i], around[i + k], dweight[k]);
    }
  };

  // Three steps are held: the one worked on, the one before it, which is there by now, and the next, which is on its way. The
  // first of all comes after the segment; of it only the first tokens matter, as of the last of all, before it, the last.
  float gradient[kRun], after[kRun] = {};
  int first = track.first + (track.last - 1 - track.first) / kStep * kStep;
  Step step, before, next;
  load(step, first, true, true);
  load(before, first - kStep, first > track.first || track.is_late(), first > track.first);
  if (track.last < track.seqlen) {
    load(next, track.last, track.is_early(), track.is_early());
    gradients_of(next, step, track.last, false, after);
  }
  const auto work_on = [&](Step& step, Step& before, Step& next) {
    if (first > track.first && (first - track.first) % kPiece == 0) fetch_piece(first - kPiece);
    if (first > track.first)
      load(next, first - 2 * kStep, first - kStep > track.first || track.is_late(), first - kStep > track.first);
    gradients_of(step, before, first, true, gradient);
    // The gradients after the lane's run; past the segment they stand in `after`, past the last token they are zero.
    const int t = first + track.lane * kRun;
    float values[kRun], ahead[kTaps - 1 + kRun];
    track.gather_after(gradient, after, ahead);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      values[i] = 0.0f;
#pragma unroll
      for (int k = kTaps - 1; k >= 0; --k)
        if (track.counts(k)) values[i] = fmaf(weight[k], ahead[i + kTaps - 1 - k], values[i]);
    }
    if (p.dfinal_state.data && t + kRun > track.seqlen - (p.shape.width - 1) && t < track.last) {
#pragma unroll 1
      for (int back = 1; back < p.shape.width; ++back) {  // one at a time, for fewer registers
        const int at = track.seqlen - back - t;
        if (at < 0 || at >= kRun) continue;
        const float given = from_final_state(p, span, track.channel, t + at);
#pragma unroll
        for (int i = 0; i < kRun; ++i)
          if (i == at) values[i] += given;
      }
    }
    if (dx) track.store(dx, t, values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) after[i] = gradient[i];
    first -= kStep;
    return first >= track.first;
  };
  // From step to step the three change places, by code of its own for each.
  while (work_on(step, before, next) && work_on(before, next, step) && work_on(next, step, before)) {
  }

  if (!p.partial) return;
  float* share = p.partial + track.segment * (p.shape.width + 1) * p.shape.dim + track.channel;
#pragma unroll
  for (int k = 0; k < kTaps + 1; ++k) {
    if (k < kTaps && !track.counts(k)) continue;
    float sum = k < kTaps ? dweight[k] : dbias;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (track.lane == 0) *share = sum;
    share += p.shape.dim;
  }
}

}  // namespace statescan::causal_conv1d
