// A backward call as its kernels take it: plain C++. Strides are in bytes; data is null where a tensor is absent.
#pragma once

#include "bwd_policy.h"
#include "params.h"

namespace statescan::ssd_scan {

struct MutableStepView {
  char* data;
  DType dtype;
  std::int64_t batch, token, head;
};

struct BackwardParams : Params {
  std::int64_t batch, ngroups, heads_of_group;
  Part part;
  std::uint32_t splits, slots;
  std::uint32_t slices, slice;  // of headdim: slice columns at a time
  std::uint32_t stages;         // of tiles in shared memory
  bool is_first, is_last;       // of the pieces of a group
  std::int64_t columns;         // of a kept state, dstate as whole vectors
  TokenView dy, dx, dB, dC, dz;
  MutableStepView ddt;
  StateView dfinal_state, dinitial_state;
  char *states, *adjoints;  // [slots, heads of the part, p, columns]
  float *ends, *decays;  // [2, sequences, segments, heads of the part, ...] of both walks; ends then are what they start from
  float *dB_sums, *dC_sums;                        // [splits, b, l, g, n], or null
  float *dA_shares, *ddt_bias_shares, *dD_shares;  // of each slot; dD null: not wanted

  STATESCAN_HOST_DEVICE std::int64_t heads_of_part() const { return part.groups * part.heads; }
  STATESCAN_HOST_DEVICE std::int64_t first_head() const { return part.first_group * heads_of_group + part.first_head; }
  // Of a walk of one direction.
  STATESCAN_HOST_DEVICE std::int64_t ends_of_walk() const { return sequences.count * sequences.segments * heads_of_part(); }
};

inline MutableStepView mutable_step_view(const Tensor& t) {
  if (!t) return {};
  const std::int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
}

inline BackwardParams backward_params(const BackwardArgs& args, const Dims& d, const BackwardPlan& plan) {
  BackwardParams p{};
  static_cast<Params&>(p) =
      params_of(args, d, {plan.segments, divide_up(divide_up(d.seqlen, plan.chunk), plan.segments), plan.chunk});
  p.start = state_view(args.initial_state);
  p.kept = kept_states(args.chunk_states, static_cast<bool>(args.cu_seqlens));
  p.batch = d.batch, p.ngroups = d.ngroups, p.heads_of_group = d.nheads / d.ngroups;
  p.splits = static_cast<std::uint32_t>(plan.splits), p.slots = static_cast<std::uint32_t>(plan.slots);
  p.columns = plan.columns;
  p.dy = token_view(args.dy), p.dx = token_view(args.dx), p.dz = token_view(args.dz);
  p.dB = token_view(args.dB), p.dC = token_view(args.dC);
  p.ddt = mutable_step_view(args.ddt);
  p.dfinal_state = state_view(args.dfinal_state), p.dinitial_state = state_view(args.dinitial_state);
  const BackwardScratch scratch(args, d, plan);
  float* const memory = static_cast<float*>(args.workspace.data);
  p.states = reinterpret_cast<char*>(memory + scratch.states), p.adjoints = reinterpret_cast<char*>(memory + scratch.adjoints);
  p.ends = memory + scratch.ends, p.decays = memory + scratch.decays;
  if (plan.sums_in_memory) p.dB_sums = memory + scratch.dB, p.dC_sums = memory + scratch.dC;
  p.dA_shares = memory + scratch.dA, p.ddt_bias_shares = memory + scratch.ddt_bias;
  p.dD_shares = args.dD ? memory + scratch.dD : nullptr;
  return p;
}

}  // namespace statescan::ssd_scan
