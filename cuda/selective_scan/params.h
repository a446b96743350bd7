// A call as the kernels take it: plain numbers, worked out on the host.
#pragma once

#include <array>
#include <limits>
#include <string>

#include "policy.h"

namespace statescan::selective_scan {

// A tensor; strides in bytes. data is null where it is absent.
struct View {
  char* data;
  DType dtype;
  std::int64_t row, token, channel, state;  // a row: of the batch, or a sequence's; a varying B or C has groups as channels
  std::int64_t step = 0;                    // from one token to the next in scan order
};

inline View tokens_view(const Tensor& t, bool reverse) {  // [b,l,d]
  if (!t) return {};
  const std::int64_t e = size_of(t.dtype), token = t.stride[1] * e;
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * e, token, t.stride[2] * e, 0, reverse ? -token : token};
}
inline View channels_view(const Tensor& t) {  // [d]
  return t ? View{static_cast<char*>(t.data), t.dtype, 0, 0, t.stride[0] * size_of(t.dtype), 0} : View{};
}
inline View states_view(const Tensor& t) {  // [d,n], or [b or s,d,n]
  if (!t) return {};
  const std::int64_t e = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.dtype, t.ndim == 3 ? t.stride[0] * e : 0, 0, t.stride[t.ndim - 2] * e,
          t.stride[t.ndim - 1] * e};
}
inline View position_states_view(const Tensor& t) {  // [s,k,d,n]
  const std::int64_t e = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * e, t.stride[1] * e, t.stride[2] * e, t.stride[3] * e};
}
inline View projection_view(const Tensor& t, bool reverse) {  // [b,l,g,n], or [d,n]
  if (t.ndim == 2) return states_view(t);
  const std::int64_t e = size_of(t.dtype), token = t.stride[1] * e;
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * e, token, t.stride[2] * e, t.stride[3] * e,
          reverse ? -token : token};
}

// What segments that start from zero leave: their states [sequence, segment, d, n], and the sums of their dt [.., d].
struct Ends {
  float *states, *steps;
};

struct Params {
  std::int64_t sequences, segments, seqlen;
  int first_share = kShare;  // how long the segment is that begins a sequence
  std::uint32_t groups, blocks_of_group, blocks, group_channels;
  std::int64_t dim, dstate, piece;  // states of a piece
  const void* cu_seqlens;           // null: sequence i is row i of the batch, whole
  bool cu_is_int64;
  std::int64_t cu_stride;
  Reach reach;
  bool reverse, dt_softplus, dt_limited, varying_B, varying_C;
  bool vectors_B, vectors_C;  // a warp's states of B or C at a token are one access
  float dt_min, dt_max;
  View x, dt, A, B, C, D, z, dt_bias, initial_state, y, final_state;
  std::uint32_t links;      // of a segment
  std::uint32_t* turns;     // links of a block's segment that are done, [sequence, segment, block]
  float* carried;           // from one link of a segment to the next: the state, or its adjoint [sequence, segment, d, n]
  Ends ends;                // of all segments but the last
  float* partial;           // y [b,l,d] when there are several pieces
  float* checkpoints;       // of the backward: states before every kCheckpoint-th token
  float* checkpoint_steps;  // the sums of dt up to there, where these are as if their segment started from zero; or null
  View dy;                  // of the backward
  Ends adjoint_ends;        // of all segments but the first, seen from the right
  const void* positions;    // [sequence, position]: after how many tokens the state is wanted
  bool positions_are_int64;
  std::int64_t npositions, positions_row, positions_step;
  View position_states;  // [sequence, position, d, n]; a position is a token
};

// The gradients of a B and C that change with the token, as what the blocks of a group add up to.
struct ProjectionSums {
  View dB, dC;
  float scale;                 // of the sums
  std::int64_t values;         // that a block leaves of a token
  std::int64_t early_blocks;   // that add up tokens while the gradients' kernel runs, or 0
  std::int64_t tokens_of_row;  // where there are such blocks: of the longest of the segments' last links
  std::int64_t tokens;         // of all rows that the other blocks add up; of these links so many each
};

struct BackwardParams : Params {
  View dfinal_state, dx, ddt, dz, dinitial_state;
  float* starts;         // of segments whose checkpoints are as if they started from zero: the states
  float* partial_steps;  // sums for dx and ddt [2,b,l,d] when there are several pieces
  ProjectionSums sums;
  float* projections;    // what a block's channels add to dB and dC: [b,l,block, four states of B, then of C]; or null
  float *dA, *dB, *dC;   // of a sequence's segment, [.., d, n]; dB and dC where B and C do not change with the token
  float *dD, *ddt_bias;  // the same, [.., d]
};

// Of a sequence of so many tiles, those of each segment but the first.
STATESCAN_HOST_DEVICE inline std::int64_t segment_tiles(const Params& p, std::int64_t tiles) {
  return kShare * tiles / (kShare * (p.segments - 1) + p.first_share);
}
// The tiles of the longest segment of whole rows.
inline std::int64_t longest_segment(const Params& p) {
  const std::int64_t tiles = divide_up(p.seqlen, kTile), each = segment_tiles(p, tiles);
  return std::max(tiles - (p.segments - 1) * each, each);
}

// The tensors that a thread moves in runs.
struct Moved {
  const char* name;
  const Tensor* tensor;
};
inline std::array<Moved, 4> moved(const Args& a) { return {{{"x", &a.x}, {"dt", &a.dt}, {"z", &a.z}, {"y", &a.y}}}; }
inline std::array<Moved, 7> moved(const BackwardArgs& a) {
  return {{{"x", &a.x}, {"dt", &a.dt}, {"z", &a.z}, {"dy", &a.dy}, {"dx", &a.dx}, {"ddt", &a.ddt}, {"dz", &a.dz}}};
}

// Why all of them cannot be reached by vectors along axis 1 (tokens) or 2 (channels), or "".
template <class A>
std::string why_not_vectors(const A& args, const Dims& dims, int along) {
  if (along == 1 && args.cu_seqlens) return "needs sequences that are not packed";
  if (along == 2 && dims.ngroups > 0 && dims.dim / dims.ngroups % kRun != 0)
    return "needs groups of a multiple of " + std::to_string(kRun) + " channels, got " +
           std::to_string(dims.dim / dims.ngroups);
  for (const Moved& m : moved(args))
    if (std::string reason = cuda::why_not_runs(m.name, *m.tensor, along, kRun); !reason.empty()) return reason;
  return "";
}

template <class A>
Reach reach_of(const A& args, const Dims& dims) {
  if (why_not_vectors(args, dims, 2).empty()) return Reach::channels;
  if (why_not_vectors(args, dims, 1).empty()) return Reach::tokens;
  return args.x.stride[2] <= args.x.stride[1] ? Reach::by_channel : Reach::by_token;
}

// Whether B or C changes with the token and is reached by vectors of a thread's states.
inline bool has_vectors(const Tensor& t, int states) { return t.ndim == 4 && cuda::why_not_runs("", t, 3, states).empty(); }

// What the kernels of four states a thread may take for granted.
template <class A>
Known known_of(const A& args, const Dims& dims) {
  if (args.x.dtype == DType::float32 || args.dt.dtype != args.x.dtype) return Known::nothing;
  if (!has_vectors(args.B, 4) || !has_vectors(args.C, 4)) return Known::nothing;
  const Reach reach = reach_of(args, dims);
  if (reach == Reach::channels) return args.x.dtype == DType::bfloat16 ? Known::bfloat16_channels : Known::float16_channels;
  if (reach == Reach::tokens) return args.x.dtype == DType::bfloat16 ? Known::bfloat16_tokens : Known::float16_tokens;
  return Known::nothing;
}

// What both directions share. `states`: of a thread.
template <class A>
void set_inputs(Params& p, const A& args, const Dims& d, int states) {
  p.sequences = d.num_sequences;
  p.segments = segments(d, args.batch_invariant);
  p.links = static_cast<std::uint32_t>(links(args, d));
  p.seqlen = d.seqlen;
  p.groups = static_cast<std::uint32_t>(d.ngroups);
  p.group_channels = static_cast<std::uint32_t>(d.dim / d.ngroups);
  p.blocks_of_group = static_cast<std::uint32_t>(blocks_per_group(d));
  p.blocks = static_cast<std::uint32_t>(p.blocks_of_group * d.ngroups);
  p.dim = d.dim, p.dstate = d.dstate;
  p.cu_seqlens = args.cu_seqlens ? args.cu_seqlens.data : nullptr;
  p.cu_is_int64 = args.cu_seqlens && args.cu_seqlens.dtype == DType::int64;
  p.cu_stride = args.cu_seqlens ? args.cu_seqlens.stride[0] : 0;
  p.reach = reach_of(args, d);
  p.reverse = args.reverse, p.dt_softplus = args.dt_softplus;
  p.varying_B = d.varying_B, p.varying_C = d.varying_C;
  p.vectors_B = has_vectors(args.B, states), p.vectors_C = has_vectors(args.C, states);
  p.dt_min = static_cast<float>(args.dt_min), p.dt_max = static_cast<float>(args.dt_max);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  p.dt_limited = p.dt_min > -kInfinity || p.dt_max < kInfinity;
  const auto tokens = [&](const Tensor& t) { return tokens_view(t, args.reverse); };
  p.x = tokens(args.x), p.dt = tokens(args.dt), p.z = tokens(args.z), p.A = states_view(args.A);
  p.B = projection_view(args.B, args.reverse), p.C = projection_view(args.C, args.reverse);
  p.D = channels_view(args.D), p.dt_bias = channels_view(args.dt_bias);
  p.initial_state = states_view(args.initial_state);
}

// Whether the kernel of lanes takes a call: 16 states of what is known, in blocks enough for the chip without segments.
template <class A>
bool suits_lanes(const A& args, const Dims& d) {
  constexpr std::int64_t kFewTokens = 4096, kFewBlocks = 128;
  if (d.dim == 0 || d.complex_A || d.dstate != kLaneStates || !d.varying_B || !d.varying_C) return false;
  if (known_of(args, d) == Known::nothing || !has_vectors(args.B, 8) || !has_vectors(args.C, 8)) return false;
  return args.batch_invariant || d.seqlen <= kFewTokens || lanes_plan(args, d).tasks >= kFewBlocks;
}

// A call for the kernel of lanes, whose tensors `p` knows already.
inline void set_lanes(Params& p, const Dims& d, const LanesPlan& plan, float* carried, float* turns) {
  p.segments = plan.segments;
  p.links = static_cast<std::uint32_t>(plan.links);
  p.blocks_of_group = static_cast<std::uint32_t>(plan.blocks_of_group);
  p.blocks = static_cast<std::uint32_t>(plan.blocks_of_group * d.ngroups);
  p.carried = carried, p.turns = reinterpret_cast<std::uint32_t*>(turns);
}

inline bool takes_lanes(const Args& args, const Dims& d) { return !args.state_positions && suits_lanes(args, d); }

inline Params params_of(const Args& args, const Dims& d) {
  Params p{};
  set_inputs(p, args, d, states_per_thread(d));
  p.piece = states_per_piece(d);
  p.y = tokens_view(args.y, args.reverse), p.final_state = states_view(args.final_state);
  if (const Tensor& at = args.state_positions) {
    p.positions = at.data, p.positions_are_int64 = at.dtype == DType::int64;
    p.npositions = d.npositions, p.positions_row = at.stride[0], p.positions_step = at.stride[1];
    p.position_states = position_states_view(args.position_states);
  }
  float* const memory = static_cast<float*>(args.workspace.data);
  if (takes_lanes(args, d)) {
    const LanesPlan plan = lanes_plan(args, d);
    const LanesScratch scratch(d, plan);
    set_lanes(p, d, plan, memory + scratch.carried, memory + scratch.turns);
    return p;
  }
  const ForwardScratch scratch(args, d);
  p.partial = memory + scratch.partial;
  p.ends = {memory + scratch.end_states, memory + scratch.end_steps};
  p.carried = memory + scratch.carried, p.turns = reinterpret_cast<std::uint32_t*>(memory + scratch.turns);
  return p;
}

inline BackwardParams params_of(const BackwardArgs& args, const Dims& d) {
  BackwardParams p{};
  set_inputs(p, args, d, kBackwardStates);
  p.links = static_cast<std::uint32_t>(backward_links(args, d));
  p.piece = std::clamp<std::int64_t>(divide_up(d.dstate, kBackwardStates), 1, backward_warps(d)) * kBackwardStates;
  const auto tokens = [&](const Tensor& t) { return tokens_view(t, args.reverse); };
  p.dy = tokens(args.dy), p.dx = tokens(args.dx), p.ddt = tokens(args.ddt), p.dz = tokens(args.dz);
  p.dfinal_state = states_view(args.dfinal_state), p.dinitial_state = states_view(args.dinitial_state);
  const BackwardScratch scratch(args, d);
  float* const memory = static_cast<float*>(args.workspace.data);
  p.checkpoints = memory + scratch.checkpoints;
  if (p.segments > 1 && suits_lanes(args, d)) {
    p.checkpoint_steps = memory + scratch.checkpoint_steps;
    p.first_share = kFirstShare;
  }
  p.starts = memory + scratch.starts;
  p.ends = {memory + scratch.end_states, memory + scratch.end_steps};
  p.adjoint_ends = {memory + scratch.adjoint_states, memory + scratch.adjoint_steps};
  p.partial = memory + scratch.partial, p.partial_steps = memory + scratch.partial_steps;
  p.projections = wants_projections(args, d) ? memory + scratch.projections : nullptr;
  p.dA = memory + scratch.dA, p.dB = memory + scratch.dB, p.dC = memory + scratch.dC;
  p.dD = memory + scratch.dD, p.ddt_bias = memory + scratch.ddt_bias;
  p.carried = memory + scratch.carried, p.turns = reinterpret_cast<std::uint32_t*>(memory + scratch.turns);
  return p;
}

}  // namespace statescan::selective_scan
