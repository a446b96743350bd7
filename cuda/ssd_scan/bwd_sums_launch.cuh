#pragma once

#include "../common/launch.h"
#include "bwd_sums_kernel.cuh"

namespace statescan::ssd_scan {

inline void launch_split_sum(const float* sums, std::int64_t splits, const Tensor& gradient, const Dims& d, Stream stream) {
  if (!gradient || gradient.numel() == 0) return;
  const SplitSumParams params{sums,      splits,   gradient.numel(),     d.seqlen,
                              d.ngroups, d.dstate, token_view(gradient), gradient.dtype};
  cuda::launch("ssd_scan_backward_split_sum_kernel", ssd_scan_backward_split_sum_kernel,
               {divide_up(params.count, kSumThreads), kSumThreads}, stream, params);
}

// `columns` sums of `inner` values of each chunk.
inline void launch_chunk_sum(const float* shares, const Sequences& sequences, const Tensor& gradient, std::int64_t inner,
                             Stream stream) {
  if (!gradient || gradient.numel() == 0) return;
  const std::int64_t channels = gradient.ndim == 2 ? gradient.shape[1] : 1;
  const ChunkSumParams params{sequences,
                              shares,
                              gradient.numel(),
                              inner,
                              channels,
                              static_cast<char*>(gradient.data),
                              gradient.stride[0] * 4,
                              gradient.ndim == 2 ? gradient.stride[1] * 4 : 0};
  cuda::launch("ssd_scan_backward_chunk_sum_kernel", ssd_scan_backward_chunk_sum_kernel,
               {divide_up(params.columns, 32), kSumThreads}, stream, params);
}

}  // namespace statescan::ssd_scan
