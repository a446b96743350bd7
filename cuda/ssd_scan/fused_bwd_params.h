// A backward call as the fused kernels take it.
#pragma once

#include "fused_bwd_plan.h"

namespace statescan::ssd_scan {

struct FusedBackwardParams {
  CUtensorMap x, dy, dx, B, C;
  CUtensorMap states, adjoints;  // [slots, items of the part, 64, padded dstate]: of the state that enters, that leaves a chunk
  StepView dt;
  HeadView A, dt_bias, D;
  StateView initial_state, dfinal_state, dinitial_state;
  char* ddt;  // null: not wanted
  DType ddt_dtype;
  std::int64_t ddt_batch, ddt_token, ddt_head;  // strides in bytes
  bool dt_softplus, has_dx;
  float dt_min, dt_max;
  std::int64_t seqlen;
  int batch, nheads, headdim, ngroups, dstate, chunks;
  int slices, heads_per_group;
  FusedPart part;
  int splits;
  unsigned walks;  // of one direction: pairs of items x sequences
  int pairs_per_group;
  OutputView dB, dC;  // [b,l,g,n], contiguous along n
  std::int64_t dB_batch, dC_batch;
  float *dB_sums, *dC_sums;                        // [splits,b,l,g,n], null: a block writes dB and dC itself
  float *dA_shares, *ddt_bias_shares, *dD_shares;  // [slots,h]
};

}  // namespace statescan::ssd_scan
