#pragma once

#include "../common/launch.h"
#include "bwd_sums_kernel.cuh"

namespace statescan::ssd_scan {

template <bool kEarly>
void launch_split_sum(const float* sums, std::int64_t splits, const Tensor& gradient, const Dims& d, Stream stream) {
  if (!gradient || gradient.numel() == 0) return;
  const SplitSumParams params{sums,      splits,   gradient.numel(),     d.seqlen,
                              d.ngroups, d.dstate, token_view(gradient), gradient.dtype};
  cuda::LaunchShape shape{divide_up(params.count, kSumThreads), kSumThreads};
  shape.early = kEarly;
  cuda::launch("ssd_scan_backward_split_sum_kernel", ssd_scan_backward_split_sum_kernel<kEarly>, shape, stream, params);
}

// `inner` shares of each chunk and head, or head and channel. An absent gradient has no columns.
inline ChunkSum chunk_sum(const float* shares, const Tensor& gradient, std::int64_t inner) {
  if (!gradient) return {};
  const bool per_channel = gradient.ndim == 2;
  return {shares,
          gradient.numel(),
          inner,
          per_channel ? gradient.shape[1] : 1,
          static_cast<char*>(gradient.data),
          gradient.stride[0] * 4,
          per_channel ? gradient.stride[1] * 4 : 0};
}

template <bool kEarly>
void launch_chunk_sums(const ChunkSumParams& params, Stream stream) {
  std::int64_t tiles = 0;
  for (const ChunkSum& sum : params.sums) tiles += sum.tiles();
  cuda::LaunchShape shape{tiles, kChunkSumThreads};
  shape.early = kEarly;
  if (tiles > 0)
    cuda::launch("ssd_scan_backward_chunk_sums_kernel", ssd_scan_backward_chunk_sums_kernel<kEarly>, shape, stream, params);
}

inline void launch_clear(const Sequences& sequences, const BackwardArgs& args, const Dims& d, Stream stream) {
  const ClearParams params{sequences,
                           {token_view(args.dx), token_view(args.dz), token_view(args.dB), token_view(args.dC)},
                           {d.nheads, d.nheads, d.ngroups, d.ngroups},
                           {d.headdim, d.headdim, d.dstate, d.dstate},
                           mutable_step_view(args.ddt),
                           d.nheads,
                           args.x.dtype};
  constexpr std::int64_t kMostBlocks = 1024;
  if (d.seqlen > 0)
    cuda::launch("ssd_scan_backward_clear_kernel", ssd_scan_backward_clear_kernel,
                 {std::min(d.seqlen, kMostBlocks), kSumThreads}, stream, params);
}

}  // namespace statescan::ssd_scan
