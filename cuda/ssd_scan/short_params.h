// A call as the kernel for short sequences takes it.
#pragma once

#include <cuda.h>

#include "params.h"

namespace statescan::ssd_scan {

inline constexpr int kShortTokens = 128;  // at most, of a sequence

// Slices are 64 channels of a head. Blocks take packets of slices of a group, which share B, C and C B^T.
struct ShortParams {
  CUtensorMap x, B, C;  // boxes of a sequence
  CUtensorMap z, y;     // boxes of half of one
  StepView dt;
  HeadView A, dt_bias, D;
  bool dt_softplus, has_z;
  float dt_min, dt_max;
  int seqlen, headdim;
  int slices, slices_of_group;  // of a head, of a group
  int packets_of_group, groups, packets;
};

}  // namespace statescan::ssd_scan
