// ssd_scan, fused: the states that segments start from, of many pieces
// Math     S[0] = initial state or 0, S[k + 1] = exp(log_decay[k]) S[k] + U[k], over the pieces k of a sequence
// Shapes   piece_states [s,pieces,slices], each 64 x padded dstate: U comes in, S of the pieces that begin a segment takes its
//          place; piece_decays [s,pieces,h]; initial state [s,h,p,n]
// Traffic  read U of all pieces but the last, write S of every segment
// Launch   a thread for each value of a slice, many pieces on their way at once: the state pass has just left them in L2
// Numerics float32, the pieces in order
#pragma once

#include "../common/early.cuh"
#include "../common/element.cuh"
#include "fused_params.h"

namespace statescan::ssd_scan {

inline constexpr int kCombineThreads = 256;

// `tiles`: blocks for the state of a slice.
inline __global__ void __launch_bounds__(kCombineThreads)
    ssd_scan_fused_combine_kernel(const __grid_constant__ FusedParams p, unsigned tiles) {
  constexpr int kAhead = 16;
  cuda::let_next_kernel_in();
  const unsigned values = tiles * kCombineThreads, i = blockIdx.x % tiles * kCombineThreads + threadIdx.x;
  const unsigned slices = static_cast<unsigned>(p.nheads) * p.slices.value, task = blockIdx.x / tiles;
  const unsigned sequence = task / slices, slice = task % slices;
  const int head = p.slices.quotient(static_cast<int>(slice));
  const StateView& t = p.initial_state;
  float state = 0.0f;
  if (t.data) {
    // Value i % 4 of the i / 4-th four: by threads, then by columns, of one side and the other.
    const int lane = i / 4 % 32, warp = i / 128 % 4, of_thread = static_cast<int>(i % 4);
    const int row = p.slices.remainder(static_cast<int>(slice)) * kFusedTile + 16 * warp + lane / 4 + of_thread / 2 * 8;
    const int column = static_cast<int>(i / 512) * 8 + lane % 4 * 2 + of_thread % 2;
    if (row < p.headdim && column < p.dstate)
      state = cuda::load_element(t.data + sequence * t.sequence + head * t.head + row * t.row + column * t.column, t.dtype);
  }
  const float* log_decay = p.piece_decays + std::int64_t{sequence} * p.pieces * p.nheads + head;
  float* states = p.piece_states + (std::int64_t{sequence} * p.pieces * slices + slice) * values + i;
  const std::int64_t step = std::int64_t{slices} * values;
  int of_segment = 0;
  cuda::wait_for_earlier_kernels();
#pragma unroll 1
  for (int first = 0; first < p.pieces; first += kAhead, log_decay += kAhead * p.nheads, states += kAhead * step) {
    float added[kAhead], decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool wanted = first + k + 1 < p.pieces;
      added[k] = wanted ? states[k * step] : 0.0f;
      decay[k] = wanted ? log_decay[k * p.nheads] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= p.pieces) return;
      if (of_segment == 0) states[k * step] = state;
      if (++of_segment == p.pieces_per_segment || (first + k == 0 && p.short_chunks > 0)) of_segment = 0;
      state = fmaf(expf(decay[k]), state, added[k]);
    }
  }
}

}  // namespace statescan::ssd_scan
