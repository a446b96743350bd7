// mamba2_update in one launch
// Math     [z | xBC | dt] = zxbcdt; xBC = silu(conv(xBC)); state = exp(dt A) state + dt B x; y = norm(C . state + D x, z);
//          both states move on
// Shapes   zxbcdt [b, d_inner + conv_dim + h]; conv_state [slots,conv_dim,w-1]; state [slots,h,p,n]; y [b,d_inner]
// Traffic  read and write the states once: 2*b*h*p*n + 2*b*conv_dim*(w-1) elements; floor: that over 3.0 TB/s. Every block
//          makes B and C of its group for itself, from the caches
// Launch   blocks of 256 threads, each with some of a row's units of 32 channels: first the convolutions and gates of all of
//          them, then unit by unit the states, the next unit's on their way while one is worked on. The norm needs all of a
//          row: the whole grid waits for all
// Numerics float32; a lane adds up its states in order, a team as a tree, the squares of a unit as a tree, units of a
//          norm group as a tree: the bits of a row depend on the row alone
#pragma once

#include <cooperative_groups.h>

#include <statescan/math.h>

#include "../common/early.cuh"
#include "../common/element.cuh"
#include "params.h"

namespace statescan::mamba2_update {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// -1 for padding; so is what lies outside the slots, which cannot be checked on the host without waiting.
inline __device__ std::int64_t slot_of(const Params& p, std::int64_t row) {
  if (!p.indices) return row;
  const std::int64_t slot = p.indices_are_int64 ? static_cast<const std::int64_t*>(p.indices)[row * p.index_stride]
                                                : static_cast<const std::int32_t*>(p.indices)[row * p.index_stride];
  return slot < p.slots ? slot : -1;
}

inline __device__ float load_at(const View& t, std::int64_t row, std::int64_t column, std::int64_t inner = 0) {
  return cuda::load_element(t.data + (row * t.row + column * t.column + inner * t.inner), t.dtype);
}
inline __device__ void store_at(const View& t, std::int64_t row, std::int64_t column, std::int64_t inner, float value) {
  cuda::store_element(t.data + (row * t.row + column * t.column + inner * t.inner), t.dtype, value);
}

// The inputs that a channel of xBC convolves, the new token last; those before `unused` do not count. All loads are on their
// way before the first is used.
struct Window {
  static constexpr int kTaps = 8;
  float inputs[kTaps];
  int unused;

  __device__ Window(const Params& p, std::int64_t row, std::int64_t slot, std::int64_t channel) : unused(kTaps - p.width) {
    std::uint32_t bits[kTaps] = {};
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k)
      if (k >= unused) bits[k] = cuda::load_bits(at(p, slot, channel, k), p.conv_state.dtype);
    inputs[kTaps - 1] = load_at(p.xBC, row, channel);
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k) inputs[k] = cuda::widen_bits(bits[k], p.conv_state.dtype);
  }

  // silu of the convolution.
  __device__ float convolve(const Params& p, std::int64_t channel) const {
    const char* const from = p.conv_weight.data + (channel * p.conv_weight.column - unused * p.conv_weight.inner);
    std::uint32_t weight[kTaps] = {};
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      if (k >= unused) weight[k] = cuda::load_bits(from + k * p.conv_weight.inner, p.conv_weight.dtype);
    float sum = p.conv_bias.data ? load_at(p.conv_bias, 0, channel) : 0.0f;
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      if (k >= unused) sum = fmaf(cuda::widen_bits(weight[k], p.conv_weight.dtype), inputs[k], sum);
    return cuda::fast_silu(sum);
  }

  // Lets the state move on by the new token.
  __device__ void shift(const Params& p, std::int64_t slot, std::int64_t channel) const {
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k)
      if (k >= unused) cuda::store_element(at(p, slot, channel, k), p.conv_state.dtype, inputs[k + 1]);
  }

 private:
  __device__ char* at(const Params& p, std::int64_t slot, std::int64_t channel, int k) const {
    return p.conv_state.data + (slot * p.conv_state.row + channel * p.conv_state.column + (k - unused) * p.conv_state.inner);
  }
};

inline __device__ float sum_over_warp(float v) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}

// Shared memory of a block, in floats for each of its channels: x, the gate, y; then the step and decay of each of its units.
inline constexpr int kPerChannel = 3, kPerUnit = 2;

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksOfMultiprocessor)
    mamba2_update_kernel(const __grid_constant__ Params p) {
  constexpr int kRows = Policy::kRows, kRun = Policy::kRun, kUnit = Policy::kUnit, kLanes = Policy::kLanes;
  constexpr int kDState = Policy::kDState, kThreads = Policy::kThreads;
  using Run = cuda::Run<cuda::Access::vector, kRun>;
  __shared__ float B[kDState], C[kDState];
  extern __shared__ float of_block[];
  const int most = static_cast<int>(p.units_of_block) * kUnit;
  float *const x = of_block, *const gate = x + most, *const y = gate + most, *const step = y + most,
               *const decay = step + p.units_of_block;
  const std::int64_t row = blockIdx.x / p.blocks_of_row;
  const std::uint32_t begin = blockIdx.x % p.blocks_of_row * p.units_of_block;
  const std::uint32_t end = begin + p.units_of_block < p.units ? begin + p.units_of_block : p.units;
  const int thread = threadIdx.x, lane = thread % kLanes, team = thread / kLanes, warp = thread / kWarp, own = thread % kWarp;
  const std::int64_t d_inner = std::int64_t{p.units} * kUnit;
  cuda::let_next_kernel_in();
  const std::int64_t slot = slot_of(p, row);
  const bool is_padding = slot < 0;

  const auto state_of = [&](std::uint32_t unit, int r) {
    const std::uint32_t channel = unit * kUnit + team * kRows + r;
    return p.state.data + (slot * p.state.row + channel / p.headdim * p.state.column + channel % p.headdim * p.state.inner) +
           lane * 16;
  };
  const auto load_states = [&](std::uint32_t unit, Run(&packed)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) packed[r].load(state_of(unit, r), Policy::kState, 0, kRun);
  };
  // Channel of xBC that is B or C, by turns, of a group.
  const auto projection_of = [&](std::uint32_t group, int i) {
    return d_inner + (std::int64_t{i < kDState ? group : p.ngroups + group}) * kDState + i % kDState;
  };
  const auto load_projections = [&](std::uint32_t group) {
    for (int i = thread; i < 2 * kDState; i += kThreads) {
      const std::int64_t channel = projection_of(group, i);
      (i < kDState ? B : C)[i % kDState] = Window(p, row, slot, channel).convolve(p, channel);
    }
  };

  // What comes from farthest away first: the states of the first unit; then all that the block's channels need.
  Run next[kRows];
  std::uint32_t held_group = begin * kUnit / p.headdim / p.heads_of_group;
  if (!is_padding && begin < end) {
    load_states(begin, next);
    for (int i = thread; i < static_cast<int>(end - begin) * kUnit; i += kThreads) {
      const std::int64_t channel = std::int64_t{begin} * kUnit + i;
      const float z = load_at(p.z, row, channel);
      const Window window(p, row, slot, channel);
      x[i] = window.convolve(p, channel);
      window.shift(p, slot, channel);  // no other block reads these
      gate[i] = cuda::fast_silu(z);
    }
    load_projections(held_group);
    for (std::uint32_t i = thread; i < end - begin; i += kThreads) {
      const std::uint32_t head = (begin + i) * kUnit / p.headdim;
      step[i] = discretise(load_at(p.dt, row, head), p.dt_bias.data ? load_at(p.dt_bias, 0, head) : 0.0f, p.dt_softplus,
                           p.dt_min, p.dt_max);
      decay[i] = expf(step[i] * load_at(p.A, 0, head));
    }
  }
  __syncthreads();

#pragma unroll 1
  for (std::uint32_t unit = begin; unit < end && !is_padding; ++unit) {
    Run packed[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) packed[r] = next[r];
    if (unit + 1 < end) load_states(unit + 1, next);
    const std::uint32_t group = unit * kUnit / p.headdim / p.heads_of_group;
    if (group != held_group) {
      __syncthreads();
      load_projections(group);
      held_group = group;
      __syncthreads();
    }
    float own_B[kRun], own_C[kRun], sums[kRows];
#pragma unroll
    for (int i = 0; i < kRun; ++i) own_B[i] = B[lane * kRun + i], own_C[i] = C[lane * kRun + i];
    const float dt = step[unit - begin], scale = decay[unit - begin];
    const int first = static_cast<int>(unit - begin) * kUnit + team * kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float state[kRun];
      packed[r].widen(Policy::kState, state);
      const float u = dt * x[first + r];
      sums[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        state[i] = fmaf(scale, state[i], u * own_B[i]);
        sums[r] = fmaf(own_C[i], state[i], sums[r]);
      }
      Run::store(state_of(unit, r), Policy::kState, 0, kRun, state);
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] += __shfl_xor_sync(kAllLanes, sums[r], distance);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (lane == r) y[first + r] = sums[r];
  }
  __syncthreads();

  for (std::uint32_t unit = begin + warp; unit < end && !is_padding; unit += kThreads / kWarp) {
    const int i = static_cast<int>(unit - begin) * kUnit + own;
    const std::uint32_t channel = unit * kUnit + own;
    float v = y[i];
    if (p.D.data) v = fmaf(load_at(p.D, 0, channel / p.headdim, channel % p.headdim), x[i], v);
    if (!p.has_norm || !p.norm_before_gate) v *= gate[i];
    y[i] = v;
    const float squares = sum_over_warp(v * v);
    if (p.has_norm && own == 0) p.squares[row * p.units + unit] = squares;
  }

  // Now all of the row is known, and nobody reads the convolution's state any more.
  cooperative_groups::this_grid().sync();

  for (std::uint32_t unit = begin + warp; unit < end; unit += kThreads / kWarp) {
    const int i = static_cast<int>(unit - begin) * kUnit + own;
    const std::int64_t channel = std::int64_t{unit} * kUnit + own;
    float value = is_padding ? 0.0f : y[i];
    if (p.has_norm && !is_padding) {
      const float* squares = p.squares + row * p.units + unit / p.units_of_norm * p.units_of_norm;
      float sum = 0.0f;
      for (std::uint32_t other = own; other < p.units_of_norm; other += kWarp) sum += __ldcg(squares + other);
      value *= load_at(p.norm_weight, 0, channel) / sqrtf(fmaf(sum_over_warp(sum), p.mean_scale, p.eps));
      if (p.norm_before_gate) value *= gate[i];
    }
    store_at(p.y, row, channel, 0, value);
  }
  // The windows of B and C: of each group by the block that has its first unit.
  const std::uint32_t units_of_group = p.heads_of_group * p.headdim / kUnit;
  for (std::uint32_t group = (begin + units_of_group - 1) / units_of_group; group * units_of_group < end && !is_padding;
       ++group)
    for (int i = thread; i < 2 * kDState; i += kThreads)
      Window(p, row, slot, projection_of(group, i)).shift(p, slot, projection_of(group, i));
}

}  // namespace statescan::mamba2_update
