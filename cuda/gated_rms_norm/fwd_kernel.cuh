// gated_rms_norm forward
// Math     y = rms(x) weight silu(z), or rms(x silu(z)) weight; rms(v) = v / sqrt(mean(v^2) + eps), the mean over a group
// Shapes   x, z, y [..., d]; weight [d]; a block's x in bfloat16 may come as halves and exponents [..., d / 64] (scaled.cuh)
// Traffic  read x and z, write y: 3*rows*d*sizeof(Element); floor: that over 3.0 TB/s. A group of up to 8,192 elements stays
//          in registers between its sum and its output; a longer one is read twice
// Launch   one axis of groups x rows. Up to 512 elements a warp takes a group and a block four of them; else a block a group,
//          with a thread for every 16 elements
// Numerics float32; a thread adds its squares in order, a warp as a tree, the warps in order: the bits depend on the group
//          alone
#pragma once

#include <type_traits>

#include "../common/early.cuh"
#include "../common/element.cuh"
#include "../common/scaled.cuh"
#include "policy.h"

namespace statescan::gated_rms_norm {

inline constexpr int kMaxLeading = kMaxDims - 1;

// Strides in bytes. data is null where the tensor is absent.
struct View {
  char* data;
  DType dtype;
  std::int64_t leading[kMaxLeading], column;
};

// What both directions know of a call.
struct Rows {
  std::int64_t count;
  std::uint32_t groups;             // of a row
  std::int64_t group_size, chunks;  // chunks: of what a team of threads holds at once
  int leading_axes;
  std::int64_t leading_size[kMaxLeading];  // the last varies fastest
  float eps, mean_scale;
  bool norm_before_gate;
};

struct ForwardParams {
  Rows rows;
  std::int64_t teams;  // groups of all rows: each has a team
  View x, z, weight, y;
  Padding padding;
  End end;
  const std::uint8_t* x_exponents;  // null: x has its dtype
};

inline __device__ bool is_padding(const Padding& p, std::int64_t row) {
  if (!p.indices) return false;
  const std::int64_t at = row / p.tokens * p.index_stride;
  const std::int64_t slot =
      p.indices_are_int64 ? static_cast<const std::int64_t*>(p.indices)[at] : static_cast<const std::int32_t*>(p.indices)[at];
  return slot < 0 || slot >= p.slots;
}

// Of `count` rows, those before the end.
inline __device__ std::int64_t rows_before(const End& end, std::int64_t count) {
  if (!end.row) return count;
  const std::int64_t row =
      end.is_int64 ? *static_cast<const std::int64_t*>(end.row) : *static_cast<const std::int32_t*>(end.row);
  return row < count ? row : count;
}

inline __device__ char* row_of(const View& t, const Rows& rows, std::int64_t row) {
  std::int64_t offset = 0;
#pragma unroll 1
  for (int axis = rows.leading_axes - 1; axis > 0; --axis) {
    offset += row % rows.leading_size[axis] * t.leading[axis];
    row /= rows.leading_size[axis];
  }
  return t.data + (offset + row * t.leading[0]);
}

// The sum over a team: a warp, or all of the block.
inline __device__ float sum_over_team(float v, bool is_block) {
  __shared__ float of_warp[kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  if (!is_block) return v;
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += of_warp[w];
  return sum;
}

template <class Policy, bool kTeamIsBlock>
__global__ void __launch_bounds__(kTeamIsBlock ? Policy::kMaxThreads : Policy::kSmallThreads, kTeamIsBlock ? 2 : 6)
    gated_rms_norm_forward_kernel(const __grid_constant__ ForwardParams p) {
  constexpr int kRun = Policy::kRun, kRuns = Policy::kRuns;
  constexpr DType kDType = Policy::kDType, kGate = Policy::kGate;
  using Run = cuda::Run<Policy::kAccess, kRun>;
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  const int threads = kTeamIsBlock ? blockDim.x : kWarp, thread = threadIdx.x % threads;
  const std::int64_t team = kTeamIsBlock ? blockIdx.x : std::int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (team >= p.teams) return;  // a whole warp
  // A division of 64 bits takes as long as a load: rows of one group do without.
  const std::int64_t row = p.rows.groups == 1 ? team : team / p.rows.groups;
  const std::int64_t first = (team - row * p.rows.groups) * p.rows.group_size;
  const char* const x = row_of(p.x, p.rows, row) + first * p.x.column;
  const char* const z = p.z.data ? row_of(p.z, p.rows, row) + first * p.z.column : nullptr;
  char* const y = row_of(p.y, p.rows, row) + first * p.y.column;
  const std::uint8_t* exponents = nullptr;
  if (kDType == DType::bfloat16 && p.x_exponents)
    exponents = p.x_exponents + (row * p.rows.groups * p.rows.group_size + first) / cuda::kScaledTogether;
  const char* const weight = p.weight.data ? p.weight.data + first * p.weight.column : nullptr;

  // From one element to the next, in bytes; a constant where it can be.
  constexpr bool kVector = Policy::kAccess == Access::vector;
  const auto step_of = [](const View& t, DType dtype) -> std::int64_t { return kVector ? cuda::bytes_of(dtype) : t.column; };
  const std::int64_t x_step = step_of(p.x, kDType), z_step = step_of(p.z, kGate), y_step = step_of(p.y, kGate);
  const std::int64_t weight_step = kVector ? cuda::bytes_of(p.weight.dtype) : p.weight.column;
  const auto column_of = [&](std::int64_t chunk, int v) -> std::int64_t {
    return ((chunk * kRuns + v) * threads + thread) * kRun;
  };
  const auto count_of = [&](std::int64_t column) {
    const std::int64_t left = p.rows.group_size - column;
    return left < 0 ? 0 : (left < kRun ? static_cast<int>(left) : kRun);
  };
  if (is_padding(p.padding, row) || row >= rows_before(p.end, p.rows.count)) {
    const float zeros[kRun] = {};
    for (std::int64_t column = column_of(0, 0); column < p.rows.group_size; column += threads * kRun)
      Run::store(y + column * y_step, kGate, y_step, count_of(column), zeros);
    return;
  }

  // is_full: every thread has all of its elements. Asked at each access, that costs 6% of a large call.
  const auto norm = [&](auto is_full) {
    const auto held_of = [&](std::int64_t column) { return decltype(is_full)::value ? kRun : count_of(column); };
    // What is normed: x, or x gated. The gate of norm_before_gate waits as it came from memory.
    float held[kRuns][kRun];
    Run packed_z[kRuns];
    const auto load_chunk = [&](std::int64_t chunk) {
      Run packed_x[kRuns];
      std::uint32_t exponent[kRuns] = {};
#pragma unroll
      for (int v = 0; v < kRuns; ++v) {
        const std::int64_t column = column_of(chunk, v);
        const int count = held_of(column);
        packed_x[v].load(x + column * x_step, kDType, x_step, count);
        if (z) packed_z[v].load(z + column * z_step, kGate, z_step, count);
        if (exponents && count > 0) exponent[v] = exponents[column / cuda::kScaledTogether];
      }
#pragma unroll
      for (int v = 0; v < kRuns; ++v) {
        packed_x[v].widen(exponents ? DType::float16 : kDType, held[v]);
        if (exponent[v] != 0) {
          const float scale = cuda::scale_up(static_cast<std::uint8_t>(exponent[v]));
#pragma unroll
          for (int i = 0; i < kRun; ++i) held[v][i] *= scale;
        }
        if (!z || p.rows.norm_before_gate) continue;
        float gate[kRun];
        packed_z[v].widen(kGate, gate);
#pragma unroll
        for (int i = 0; i < kRun; ++i) held[v][i] *= cuda::fast_silu(gate[i]);
      }
    };

    float sum = 0.0f;
#pragma unroll 1
    for (std::int64_t chunk = 0; chunk < p.rows.chunks; ++chunk) {
      load_chunk(chunk);
#pragma unroll
      for (int v = 0; v < kRuns; ++v)
#pragma unroll
        for (int i = 0; i < kRun; ++i) sum = fmaf(held[v][i], held[v][i], sum);
    }
    sum = sum_over_team(sum, kTeamIsBlock);
    const float scale = 1.0f / sqrtf(fmaf(sum, p.rows.mean_scale, p.rows.eps));

#pragma unroll 1
    for (std::int64_t chunk = p.rows.chunks - 1; chunk >= 0; --chunk) {  // the last is still held
      if (chunk + 1 < p.rows.chunks) load_chunk(chunk);
#pragma unroll
      for (int v = 0; v < kRuns; ++v) {
        const std::int64_t column = column_of(chunk, v);
        const int count = held_of(column);
        float factor[kRun], values[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) values[i] = held[v][i] * scale;
        if (weight) {
          Run packed;
          packed.load(weight + column * weight_step, p.weight.dtype, weight_step, count);
          packed.widen(p.weight.dtype, factor);
#pragma unroll
          for (int i = 0; i < kRun; ++i) values[i] *= factor[i];
        }
        if (z && p.rows.norm_before_gate) {
          packed_z[v].widen(kGate, factor);
#pragma unroll
          for (int i = 0; i < kRun; ++i) values[i] *= cuda::fast_silu(factor[i]);
        }
        Run::store(y + column * y_step, kGate, y_step, count, values);
      }
    }
  };
  if (kVector && p.rows.group_size == p.rows.chunks * threads * Policy::kHeld) norm(std::true_type{});
  else norm(std::false_type{});
}

}  // namespace statescan::gated_rms_norm
