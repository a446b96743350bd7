// The gradients that many blocks add to: sums of what each of them left, in a fixed order.
#pragma once

#include "../common/early.cuh"
#include "../common/element.cuh"
#include "params.h"

namespace statescan::selective_scan {

// Makes up for what numbers lose when they are cut to 11 bits: of a number in [1, 2), 2^-11 on average. A sum loses that in
// proportion to its terms' sizes: 2^-11 by the mean size over the mean square, 2/3 where the logarithms are spread evenly.
inline constexpr float kCutOff = 1.0f + 0x1p-11f * 2.0f / 3.0f;

struct ProjectionSumParams {
  const float* projections;
  const void* cu_seqlens;
  bool cu_is_int64;
  std::int64_t cu_last, seqlen, tokens, groups, blocks_of_group, dstate, values;  // values: of a block at a token
  float scale;                                                                    // of the sums
  View dB, dC;
};

// A thread: one state of B or C at one token, of one group.
template <class Policy>
__device__ void sum_projections(const ProjectionSumParams& p, std::int64_t index) {
  constexpr int kReduced = 2 * Policy::kValues;
  if (index >= p.tokens * p.groups * p.values) return;
  const std::int64_t value = index % p.values, group = index / p.values % p.groups, token = index / p.values / p.groups;
  const int within = static_cast<int>(value % kReduced);
  const std::int64_t state = value / kReduced * Policy::kStates + within % Policy::kValues / Policy::kParts;
  const View& to = within < Policy::kValues ? p.dB : p.dC;
  if (!to.data || state >= p.dstate) return;
  float sum = 0.0f;
  const bool inside = !p.cu_seqlens || token < (p.cu_is_int64 ? static_cast<const std::int64_t*>(p.cu_seqlens)[p.cu_last]
                                                              : static_cast<const std::int32_t*>(p.cu_seqlens)[p.cu_last]);
  if (inside) {
    const float* const from = p.projections + (token * p.groups + group) * p.blocks_of_group * p.values + value;
#pragma unroll 8
    for (std::int64_t block = 0; block < p.blocks_of_group; ++block) sum += from[block * p.values];
  }
  char* const at = to.data + token / p.seqlen * to.row + token % p.seqlen * to.token + group * to.channel + state * to.state;
  cuda::store_element(at + within % Policy::kParts * 4, Policy::kParts == 2 ? DType::float32 : to.dtype, sum * p.scale);
}

struct RowSumParams {
  const float* rows;  // [rows, channels, states, parts]
  std::int64_t count, channels, states, parts;
  View to;
  std::int64_t blocks;
};

// A thread: one number.
inline __device__ void sum_rows(const RowSumParams& p, std::int64_t index) {
  const std::int64_t each = p.channels * p.states * p.parts;
  if (index >= each) return;
  float sum = 0.0f;
#pragma unroll 8
  for (std::int64_t row = 0; row < p.count; ++row) sum += p.rows[row * each + index];
  const std::int64_t part = index % p.parts, state = index / p.parts % p.states, channel = index / p.parts / p.states;
  *reinterpret_cast<float*>(p.to.data + channel * p.to.channel + state * p.to.state + part * 4) = sum;
}

struct SumParams {
  RowSumParams rows[5];  // dA, dB, dC, dD and ddt_bias, where they are wanted
  ProjectionSumParams projections;
};

template <class Policy>
__global__ void __launch_bounds__(kRuns) selective_scan_sums_kernel(const __grid_constant__ SumParams p) {
  cuda::wait_for_earlier_kernels();
  std::int64_t block = blockIdx.x;
#pragma unroll 1
  for (const RowSumParams& rows : p.rows) {
    if (block < rows.blocks) return sum_rows(rows, block * kRuns + threadIdx.x);
    block -= rows.blocks;
  }
  sum_projections<Policy>(p.projections, block * kRuns + threadIdx.x);
}

}  // namespace statescan::selective_scan
