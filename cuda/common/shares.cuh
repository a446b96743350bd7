// Sums over many teams without atomics: each team leaves its share in memory, then a kernel adds the shares up.
#pragma once

#include "early.cuh"
#include "element.cuh"
#include "launch.h"

namespace statescan::cuda {

// Where a sum goes; strides in bytes. data null: not wanted.
struct SumView {
  char* data;
  DType dtype;
  std::int64_t column, value;
};

// Sums over `shares` of [shares, values, columns]: the last value goes to `last`, those before it to `others`.
struct SharesParams {
  const float* shares;
  std::int64_t count, columns;
  int values;
  SumView others, last;
};

inline constexpr int kShareColumns = 32, kShareWarps = 32;

// shares
// Math     sums[v,c] = sum_i shares[i,v,c]
// Traffic  read the shares once: 4*count*values*columns bytes
// Launch   one axis of values x tiles of 32 columns; each warp of a block takes every 32nd share, eight at once:
//          there are thousands of shares and few tiles, so that the time is that of loads waiting for one another
// Numerics float32; the shares of a warp in order, then the warps in order
inline __global__ void __launch_bounds__(kShareColumns* kShareWarps) sum_shares_kernel(const __grid_constant__ SharesParams p) {
  __shared__ float sums[kShareWarps][kShareColumns];
  wait_for_earlier_kernels();
  let_next_kernel_in();
  const int lane = threadIdx.x % kShareColumns, warp = threadIdx.x / kShareColumns, value = blockIdx.x % p.values;
  const std::int64_t column = std::int64_t{blockIdx.x / p.values} * kShareColumns + lane;
  float sum = 0.0f;
  if (column < p.columns) {
    const float* from = p.shares + value * p.columns + column;
#pragma unroll 8
    for (std::int64_t i = warp; i < p.count; i += kShareWarps) sum += from[i * p.values * p.columns];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.columns) return;
#pragma unroll
  for (int w = 1; w < kShareWarps; ++w) sum += sums[w][lane];
  const SumView& to = value + 1 == p.values ? p.last : p.others;
  const std::int64_t place = value + 1 == p.values ? 0 : value;
  if (to.data) store_element(to.data + (column * to.column + place * to.value), to.dtype, sum);
}

inline void launch_sum_shares(const SharesParams& params, Stream stream) {
  const std::int64_t blocks = (params.columns + kShareColumns - 1) / kShareColumns * params.values;
  if (blocks == 0) return;
  launch("sum_shares_kernel", sum_shares_kernel, {.blocks = blocks, .threads = kShareColumns * kShareWarps, .early = true},
         stream, params);
}

}  // namespace statescan::cuda
