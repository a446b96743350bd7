// Where the sequences of the fused backward lie: rows of the batch, or one after the other on one row.
//
// A chunk of a packed sequence must not see the tokens of the next, whatever these hold. Boxes of whole chunks can't: only
// those of the last, and past it, would, and these go by maps of the sequence's own, which end where it does. The kernels then
// find zeros there and write nothing, as past the end of a row, and know of packing only here.
//
// Chunks are counted as the scan meets them. In reverse they are those from the sequence's first token on all the same, the
// last of them first, and so are a chunk's tokens. A token then has three numbers within its chunk: the i-th of the scan lies
// at i ^ 63 in memory, and in row i ^ 7 of the main kernel's tiles: boxes of eight tokens come in the order of the scan, and
// what is in one of them stays as it is. Forward the three are the same.
#pragma once

#include "../common/early.cuh"
#include "bwd_tile.cuh"
#include "fused_bwd_params.h"
#include "fused_kernel.cuh"

namespace statescan::ssd_scan {

namespace fused {

// From the i-th token of the scan to the other two.
inline __device__ int to_memory(bool reverse, int i) { return reverse ? i ^ 63 : i; }
inline __device__ int to_row(bool reverse, int i) { return reverse ? i ^ 7 : i; }
// From the eight with a row to that in memory.
inline __device__ int memory_of_row(bool reverse, int row) { return reverse ? row ^ 56 : row; }

struct Span {
  int sequence, batch, first, length;  // first: token
  bool reverse;

  // A row of the batch.
  static __device__ Span row(const FusedBackwardParams& p, int batch, bool reverse) {
    return {batch, batch, 0, static_cast<int>(p.sequences.seqlen), reverse};
  }
  static __device__ Span packed(const FusedBackwardParams& p, int sequence, bool reverse) {
    return {sequence, 0, static_cast<int>(boundary(p.sequences, sequence)), static_cast<int>(length_of(p.sequences, sequence)),
            reverse};
  }

  // In memory, from the first token on. A chunk past the last, the second of a pair, lies past the end.
  __device__ int place_of(int chunk) const {
    const int chunks = (length + kTile - 1) / kTile;
    return reverse && chunk < chunks ? chunks - 1 - chunk : chunk;
  }
  __device__ int token_of(int chunk) const { return first + place_of(chunk) * kTile; }
  // The first in memory of a chunk's pair, of whole chunks.
  __device__ int first_token_of_pair(int chunk) const { return token_of(reverse ? chunk | 1 : chunk & ~1); }
  // Where the part keeps a chunk's pair. Those of packed sequences never meet.
  __device__ int pair_of(const FusedBackwardParams& p, bool may_be_packed, int chunk) const {
    return (may_be_packed && p.ends ? first / (2 * kTile) + sequence : (batch - p.part.first_batch) * p.pairs) + chunk / 2;
  }

  // The maps for boxes of a chunk, for the threads that use those which are named.
  template <bool may_be_packed, class... Named>
  __device__ const TokenMaps& maps_of(const FusedBackwardParams& p, int chunk, Named... named) const {
    if (!may_be_packed || !p.ends || (place_of(chunk) + 1) * kTile <= length) return p.maps;
    const TokenMaps& maps = p.ends[sequence];
    (cute::tma_descriptor_fence_acquire(reinterpret_cast<const cute::TmaDescriptor*>(&(maps.*named))), ...);
    return maps;
  }
};

// ---- what packed sequences need before the other kernels -------------------------------------------------------------------

inline constexpr int kPackedWarps = 4;

// Math     of each sequence: its chunks, after those of the sequences before it; its place from the longest to the shortest;
//          maps for TMA that end where it does
// Shapes   cu_seqlens [s+1]; chunks [slots], order [s], maps [s]
// Traffic  every warp reads cu_seqlens; writes 16 bytes a chunk and 128 a map
// Launch   a warp for each sequence, ahead of the walks
// Numerics integers
inline __global__ void __launch_bounds__(32 * kPackedWarps)
    ssd_scan_fused_packed_kernel(const __grid_constant__ FusedBackwardParams p) {
  constexpr int kMaps = sizeof(TokenMaps) / sizeof(CUtensorMap);
  __shared__ alignas(128) CUtensorMap maps[kPackedWarps][kMaps];
  cuda::let_next_kernel_in();
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, sequence = blockIdx.x * kPackedWarps + warp;
  if (sequence >= p.sequences.count) return;
  const Span span = Span::packed(p, static_cast<int>(sequence), p.sequences.reverse);
  const unsigned chunks = (span.length + kTile - 1) / kTile;
  unsigned before = 0, longer = 0;  // chunks of the sequences before; sequences that come first by length
  for (unsigned i = lane; i < p.sequences.count; i += 32) {
    const auto others = static_cast<unsigned>(chunks_of(p.sequences, i));
    before += i < sequence ? others : 0;
    longer += others > chunks || (others == chunks && i < sequence);
  }
  before = __reduce_add_sync(~0u, before), longer = __reduce_add_sync(~0u, longer);
  if (lane == 0) p.packed_order[longer] = sequence;
  // Bounds that do not ascend could ask for more slots than there are.
  for (unsigned chunk = lane; chunk < chunks && before + chunk < p.slots; chunk += 32)
    p.packed_chunks[before + chunk] = {span.sequence, span.first, span.length, static_cast<int>(chunk)};
  if (sequence + 1 == p.sequences.count && lane == 0) *p.packed_count = min(before + chunks, p.slots);
  const auto* const from = reinterpret_cast<const uint4*>(&p.maps);
  for (unsigned i = lane; i < sizeof(TokenMaps) / sizeof(uint4); i += 32) reinterpret_cast<uint4*>(maps[warp])[i] = from[i];
  __syncwarp();
  if (lane < kMaps) {
    const int end = max(span.first + span.length, 1);
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 2, %1;" ::"r"(
                     cute::cast_smem_ptr_to_uint(&maps[warp][lane])),
                 "r"(end));
  }
  __syncwarp();
  auto* const to = reinterpret_cast<cute::TmaDescriptor*>(p.ends + sequence);
  for (int k = 0; k < kMaps; ++k)
    cute::tma_descriptor_cp_fence_release(to + k, reinterpret_cast<cute::TmaDescriptor&>(maps[warp][k]));
}

}  // namespace fused

}  // namespace statescan::ssd_scan
