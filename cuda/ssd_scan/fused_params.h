// A call as the fused kernel takes it: tensor maps for what the bulk copy engine moves, views for the rest.
#pragma once

#include <cuda.h>

#include "params.h"

namespace statescan::ssd_scan {

inline constexpr int kFusedTile = 64;  // tokens of a chunk, channels of a slice of headdim, and rows of a wgmma

// y [b,l,h,p], contiguous along p.
struct OutputView {
  char* data;
  std::int64_t token, head;
};

// A task is one pair of slices of a group in one segment of one sequence. Pairs vary fastest: neighbouring blocks share B and C
// in L2.
struct FusedParams {
  CUtensorMap x, B, C, z, y;
  StepView dt;
  HeadView A, dt_bias, D;
  StateView initial_state, final_state;
  Positions positions;
  OutputView packed_y;  // where boxes would write into the next sequence
  const void* cu_seqlens;      // null: sequence i is row i of the batch
  bool cu_is_int64, dt_softplus, reverse, has_z;
  std::int64_t cu_stride, seqlen;
  float dt_min, dt_max;
  int nheads, headdim, dstate;
  int heads_per_group, slices, pairs_per_group, pairs;  // slices of a head; pairs of slices of a group, of all groups
  int segments, chunks_per_segment;
  unsigned tasks;  // sequences x segments x pairs: blocks take them in turns
  // [s x segments, h, p, n], and float32 [s, segments, h]; null with one segment. The state pass writes what each segment adds
  // and its decay; the output pass reads these, or, once they are combined, the state before each segment.
  StateView segment_states;
  float* segment_decays;
  bool segments_combined;
};

}  // namespace statescan::ssd_scan
