// ssd_scan backward, the kernels after the main one: sums over splits, over chunks, and zeros past the last packed token
#pragma once

#include "../common/early.cuh"
#include "bwd_tile.cuh"

namespace statescan::ssd_scan {

inline constexpr int kSumThreads = 256, kChunkSumThreads = 1024;

struct SplitSumParams {
  const float* sums;                                    // [splits, b, l, g, n]
  std::int64_t splits, count, seqlen, ngroups, dstate;  // count: of one split
  TokenView gradient;
  DType dtype;
};

// Math     dB or dC = sum over the splits
// Shapes   sums [splits,b,l,g,n], dB, dC [b,l,g,n]
// Traffic  read the sums of every split, write the gradient
// Launch   a thread for each element. Early as the sums over chunks below are
// Numerics float, the splits in order
template <bool kEarly>
__global__ void __launch_bounds__(kSumThreads) ssd_scan_backward_split_sum_kernel(const __grid_constant__ SplitSumParams p) {
  if constexpr (kEarly) cuda::wait_for_earlier_kernels();
  const std::int64_t i = std::int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= p.count) return;
  float sum = 0;
  for (std::int64_t split = 0; split < p.splits; ++split) sum += p.sums[split * p.count + i];
  const std::int64_t n = i % p.dstate, group = i / p.dstate % p.ngroups, token = i / p.dstate / p.ngroups;
  const TokenView& t = p.gradient;
  cuda::store_element(t.data + token / p.seqlen * t.batch + token % p.seqlen * t.token + group * t.head + n * t.column, p.dtype,
                      sum);
}

// What the chunks' shares of one gradient become.
struct ChunkSum {
  const float* shares;          // [slots, columns, inner]
  std::int64_t columns, inner;  // inner: what is summed besides
  std::int64_t channels;        // a column is head * channels + channel
  char* to;
  std::int64_t head, channel;  // strides in bytes

  __host__ __device__ std::int64_t tiles() const { return (columns + 31) / 32; }
};

struct ChunkSumParams {
  Sequences sequences;
  ChunkSum sums[3];        // of dA, ddt_bias and dD; no columns: not wanted
  const unsigned* chunks;  // of packed sequences, where the shares of one lie behind those of another; null: by slots
};

// Math     to[column] = sum over sequences, their chunks and `inner`
// Shapes   shares [slots,columns,inner], columns: heads, or heads x channels
// Traffic  read the shares once
// Launch   a block of 32 warps for 32 columns of a gradient; each warp takes every 32nd share, several on their way together.
//          Early in sources for sm_90a alone: what else is compiled for the build's lowest architecture may not be able to
//          wait, and two kernels of one name would be one
// Numerics float; the order depends on sequences and chunks alone, so a batch and its packing give the same bits
template <bool kEarly>
__global__ void __launch_bounds__(kChunkSumThreads)
    ssd_scan_backward_chunk_sums_kernel(const __grid_constant__ ChunkSumParams p) {
  if constexpr (kEarly) cuda::wait_for_earlier_kernels();
  constexpr unsigned kWarps = kChunkSumThreads / 32;
  __shared__ float sums[kWarps][32];
  std::int64_t tile = blockIdx.x;
  int which = 0;
  for (; tile >= p.sums[which].tiles(); ++which) tile -= p.sums[which].tiles();
  const ChunkSum& s = p.sums[which];
  const unsigned warp = threadIdx.x / 32;
  const std::int64_t column = tile * 32 + lane_id();
  const bool inside = column < s.columns, by_slots = p.sequences.cu_seqlens && !p.chunks;
  const std::int64_t slot_step = s.columns * s.inner;
  const auto inner = static_cast<std::uint32_t>(s.inner);
  float sum = 0;
  std::uint32_t before = 0;  // shares of the sequences before this one; what lies without gaps counts as one
  for (std::int64_t i = 0; i < (by_slots ? p.sequences.count : 1); ++i) {
    const std::int64_t chunks = p.chunks ? *p.chunks : chunks_of(p.sequences, i) * (by_slots ? 1 : p.sequences.count);
    const auto count = static_cast<std::uint32_t>(chunks) * inner;
    const float* from = s.shares + (by_slots ? first_slot(p.sequences, i) : 0) * slot_step + column * inner;
    if (inside)
#pragma unroll 8
      for (std::uint32_t k = (warp - before) % kWarps; k < count; k += kWarps) sum += from[k / inner * slot_step + k % inner];
    before += count;
  }
  sums[warp][lane_id()] = sum;
  __syncthreads();
  if (warp > 0 || !inside) return;
#pragma unroll
  for (unsigned w = 1; w < kWarps; ++w) sum += sums[w][lane_id()];
  *reinterpret_cast<float*>(s.to + column / s.channels * s.head + column % s.channels * s.channel) = sum;
}

struct ClearParams {
  Sequences sequences;
  TokenView gradients[4];  // dx, dz, dB, dC; data null: not wanted
  std::int64_t heads[4], columns[4];
  MutableStepView ddt;
  std::int64_t nheads;
  DType dtype;
};

// Math     gradients past the last packed token are zero
// Shapes   dx, dz [b,l,h,p], dB, dC [b,l,g,n], ddt [b,l,h]
// Traffic  write what lies past that token
// Launch   blocks take tokens in turn
// Numerics exact
inline __global__ void __launch_bounds__(kSumThreads) ssd_scan_backward_clear_kernel(const __grid_constant__ ClearParams p) {
  for (std::int64_t token = boundary(p.sequences, p.sequences.count) + blockIdx.x; token < p.sequences.seqlen;
       token += gridDim.x) {
    for (int g = 0; g < 4; ++g) {
      const TokenView& t = p.gradients[g];
      if (!t.data) continue;
      for (std::int64_t i = threadIdx.x; i < p.heads[g] * p.columns[g]; i += kSumThreads)
        cuda::store_element(t.data + token * t.token + i / p.columns[g] * t.head + i % p.columns[g] * t.column, p.dtype, 0.0f);
    }
    if (p.ddt.data)
      for (std::int64_t h = threadIdx.x; h < p.nheads; h += kSumThreads)
        cuda::store_element(p.ddt.data + token * p.ddt.token + h * p.ddt.head, p.ddt.dtype, 0.0f);
  }
}

}  // namespace statescan::ssd_scan
