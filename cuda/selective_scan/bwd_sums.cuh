// selective_scan backward: the gradients that many blocks add to
// Math     dB[t] and dC[t], where B and C change with the token: sums over the blocks of a group's channels. dA, dD, ddt_bias, and
//          dB and dC else: sums over the segments of all sequences
// Shapes   projections [b,l,group,block,values] of B and C by turns; rows [s,segments,d,..]; float32
// Traffic  read what the blocks left, once: b8 l2048 d5120 n16 168 MB, 0.056 ms at 3.0 TB/s
// Launch   blocks of 128 threads. Of a known kernel in links those for dB and dC come first: each adds up a few tokens of a
//          segment as soon as the blocks of all its channels have come past them, in the places that the gradients' launch
//          leaves empty at its end. The last links' tokens, and what rows of channels left, wait for the whole launch
// Numerics float32, the blocks and the segments in order; what tensor cores cut off is made up for (kCutOff)
// H100, b1 l16384 d5120 n16: the backward took 2429 us instead of 2464 channels last, 2521 instead of 2571 first; b8 l2048 2168
// instead of 2205 and 2236 instead of 2275. In the gradients' own launch, as blocks behind the links, the code of the sums took
// them their uniform registers: 2501 and 2519, 2260 and 2244. With the last links' tokens early too: 2436 to 2442 and 2538 to
// 2554, since few blocks add them up then.
#pragma once

#include "../common/early.cuh"
#include "../common/element.cuh"
#include "sequence.cuh"

namespace statescan::selective_scan {

// Makes up for what numbers lose when they are cut to 11 bits: of a number in [1, 2), 2^-11 on average. A sum loses that in
// proportion to its terms' sizes: 2^-11 by the mean size over the mean square, 2/3 where the logarithms are spread evenly.
inline constexpr float kCutOff = 1.0f + 0x1p-11f * 2.0f / 3.0f;

inline constexpr int kSummedAtOnce = 8;  // blocks whose sums a thread has on their way

// A thread: four of a token's values of B or C, of one group. The blocks in order; `inside`: else zeros.
template <class Policy>
__device__ void sum_four(const BackwardParams& p, std::int64_t token, std::int64_t group, std::int64_t value, bool inside) {
  constexpr int kReduced = 2 * Policy::kValues, kParts = Policy::kParts;
  static_assert(Policy::kValues % 4 == 0);
  const ProjectionSums& sums = p.sums;
  const int within = static_cast<int>(value % kReduced);
  const std::int64_t state = value / kReduced * Policy::kStates + within % Policy::kValues / kParts;
  const View& to = within < Policy::kValues ? sums.dB : sums.dC;
  if (!to.data || state >= p.dstate) return;
  float sum[4] = {};
  const float* from = p.projections + (token * p.groups + group) * p.blocks_of_group * sums.values + value;
  const std::uint32_t blocks = inside ? p.blocks_of_group : 0;
#pragma unroll 1
  for (std::uint32_t block = 0; block < blocks; block += kSummedAtOnce, from += kSummedAtOnce * sums.values) {
    float4 added[kSummedAtOnce];
#pragma unroll
    for (int k = 0; k < kSummedAtOnce; ++k)
      added[k] = block + k < blocks ? __ldcg(reinterpret_cast<const float4*>(from + k * sums.values)) : float4{};
#pragma unroll
    for (int k = 0; k < kSummedAtOnce; ++k)
      sum[0] += added[k].x, sum[1] += added[k].y, sum[2] += added[k].z, sum[3] += added[k].w;
  }
  char* const at = to.data + token / p.seqlen * to.row + token % p.seqlen * to.token + group * to.channel + state * to.state;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (state + i / kParts < p.dstate)
      cuda::store_element(at + i / kParts * to.state + i % kParts * 4, kParts == 2 ? DType::float32 : to.dtype,
                          sum[i] * sums.scale);
}

// A token of a span, counted in scan order, among those of all rows in memory.
inline __device__ std::int64_t token_in_memory(const Params& p, const Span& s, std::int64_t token) {
  return s.row * p.seqlen + (p.reverse ? s.last - 1 - token : s.first + token);
}

// Threads in order: all tokens, or those of the last links.
template <class Policy>
__device__ void sum_tokens(const BackwardParams& p, std::int64_t index) {
  const ProjectionSums& sums = p.sums;
  const std::int64_t fours = sums.values / 4, value = index % fours * 4, group = index / fours % p.groups;
  const std::int64_t at = index / fours / p.groups;
  if (at >= sums.tokens) return;
  if (sums.early_blocks == 0) {
    sum_four<Policy>(p, at, group, value, !p.cu_seqlens || at < boundary(p, p.sequences));
    return;
  }
  const std::int64_t row = at / sums.tokens_of_row;
  const Span segment = span_of(p, row / p.segments, row % p.segments),
             span = backward_link_of(p, segment, static_cast<int>(p.links) - 1);
  if (const std::int64_t token = span.begin + at % sums.tokens_of_row; token < span.end)
    sum_four<Policy>(p, token_in_memory(p, span, token), group, value, true);
}

// A block: tokens of a segment that are not of its last link, once these are done. The last tokens of all segments come first,
// as they do in the gradients' launch.
template <class Policy>
__device__ void sum_done_tokens(const BackwardParams& p, std::int64_t index) {
  const std::int64_t rows = p.sequences * p.segments, group = index % p.groups, row = index / p.groups % rows,
                     piece = index / p.groups / rows;
  const Span segment = span_of(p, row / p.segments, row % p.segments);
  const auto link_of = [&](std::uint32_t link) { return backward_link_of(p, segment, static_cast<int>(link)); };
  const std::int64_t end = segment.end - piece * kTile, begin = max(end - kTile, link_of(p.links - 1).end);
  if (begin >= end) return;
  std::uint32_t links = 1;
  while (link_of(links - 1).begin > begin) ++links;
  const std::uint32_t* const done = p.turns + row * p.blocks + group * p.blocks_of_group;
  for (std::uint32_t block = threadIdx.x; block < p.blocks_of_group; block += kRuns) sleep_until_done(done + block, links);
  __syncthreads();
  const std::int64_t fours = p.sums.values / 4;
  for (std::int64_t i = threadIdx.x; i < (end - begin) * fours; i += kRuns)
    sum_four<Policy>(p, token_in_memory(p, segment, begin + i / fours), group, i % fours * 4, true);
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

struct RowSums {
  RowSumParams rows[5];  // dA, dB, dC, dD and ddt_bias, where they are wanted
};

template <class Policy>
__global__ void __launch_bounds__(kRuns)
    selective_scan_sums_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ RowSums sums) {
  std::int64_t block = blockIdx.x;
  if (block < p.sums.early_blocks) return sum_done_tokens<Policy>(p, block);
  block -= p.sums.early_blocks;
  cuda::wait_for_earlier_kernels();
#pragma unroll 1
  for (const RowSumParams& rows : sums.rows) {
    if (block < rows.blocks) return sum_rows(rows, block * kRuns + threadIdx.x);
    block -= rows.blocks;
  }
  sum_tokens<Policy>(p, block * kRuns + threadIdx.x);
}

}  // namespace statescan::selective_scan
