// A call as the kernels take it: plain numbers, worked out on the host.
#pragma once

#include <string>

#include "policy.h"

namespace statescan::selective_scan {

// How x, dt, z and y are reached: all alike, so that a thread has the same elements of each.
enum class Reach {
  channels,        // 16-byte accesses along the channels
  tokens,          // 16-byte accesses along the tokens
  by_channel,      // element by element, neighbouring lanes on neighbouring channels
  by_token,        // element by element, neighbouring lanes on neighbouring tokens
};

// A tensor; strides in bytes. data is null where it is absent.
struct View {
  char* data;
  DType dtype;
  std::int64_t row, token, channel, state;  // a row: of the batch, or a sequence's states; a varying B or C has groups as channels
};

inline View tokens_view(const Tensor& t) {  // [b,l,d]
  if (!t) return {};
  const std::int64_t e = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * e, t.stride[1] * e, t.stride[2] * e, 0};
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
inline View projection_view(const Tensor& t) {  // [b,l,g,n], or [d,n]
  if (t.ndim == 2) return states_view(t);
  const std::int64_t e = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * e, t.stride[1] * e, t.stride[2] * e, t.stride[3] * e};
}

struct Params {
  std::int64_t sequences, segments, seqlen;
  std::uint32_t blocks_of_group, blocks, group_channels;
  std::int64_t dim, dstate, piece;  // states of a piece
  const void* cu_seqlens;           // null: sequence i is row i of the batch, whole
  bool cu_is_int64;
  std::int64_t cu_stride;
  Reach reach;
  bool reverse, dt_softplus, varying_B, varying_C;
  float dt_min, dt_max;
  View x, dt, A, B, C, D, z, dt_bias, initial_state, y, final_state;
  float *partial;         // [b,l,d] when there are several pieces
  float *end_state;       // [sequence, segment but the last, d, n]: the state of a segment that starts from zero
  float *end_step;        // [sequence, segment but the last, d]: the sum of dt over it
};

// Why all of the tensors that a thread moves in runs cannot be reached by vectors along axis 1 (tokens) or 2 (channels), or "".
inline std::string why_not_vectors(const Args& args, const Dims& dims, int along) {
  if (along == 1 && args.cu_seqlens) return "needs sequences that are not packed";
  if (along == 2 && dims.ngroups > 0 && dims.dim / dims.ngroups % kRun != 0)
    return "needs groups of a multiple of " + std::to_string(kRun) + " channels, got " + std::to_string(dims.dim / dims.ngroups);
  std::string reason = cuda::why_not_runs("x", args.x, along, kRun);
  if (reason.empty()) reason = cuda::why_not_runs("dt", args.dt, along, kRun);
  if (reason.empty()) reason = cuda::why_not_runs("z", args.z, along, kRun);
  if (reason.empty()) reason = cuda::why_not_runs("y", args.y, along, kRun);
  return reason;
}

inline Reach reach_of(const Args& args, const Dims& dims) {
  if (why_not_vectors(args, dims, 2).empty()) return Reach::channels;
  if (why_not_vectors(args, dims, 1).empty()) return Reach::tokens;
  return args.x.stride[2] <= args.x.stride[1] ? Reach::by_channel : Reach::by_token;
}

inline Params params_of(const Args& args, const Dims& d) {
  Params p{};
  p.sequences = d.num_sequences;
  p.segments = segments(d, args.batch_invariant);
  p.seqlen = d.seqlen;
  p.group_channels = static_cast<std::uint32_t>(d.dim / d.ngroups);
  p.blocks_of_group = static_cast<std::uint32_t>(blocks_per_group(d));
  p.blocks = static_cast<std::uint32_t>(p.blocks_of_group * d.ngroups);
  p.dim = d.dim, p.dstate = d.dstate, p.piece = states_per_piece(d);
  p.cu_seqlens = args.cu_seqlens ? args.cu_seqlens.data : nullptr;
  p.cu_is_int64 = args.cu_seqlens && args.cu_seqlens.dtype == DType::int64;
  p.cu_stride = args.cu_seqlens ? args.cu_seqlens.stride[0] : 0;
  p.reach = reach_of(args, d);
  p.reverse = args.reverse, p.dt_softplus = args.dt_softplus;
  p.varying_B = d.varying_B, p.varying_C = d.varying_C;
  p.dt_min = static_cast<float>(args.dt_min), p.dt_max = static_cast<float>(args.dt_max);
  p.x = tokens_view(args.x), p.dt = tokens_view(args.dt), p.z = tokens_view(args.z), p.y = tokens_view(args.y);
  p.A = states_view(args.A), p.B = projection_view(args.B), p.C = projection_view(args.C);
  p.D = channels_view(args.D), p.dt_bias = channels_view(args.dt_bias);
  p.initial_state = states_view(args.initial_state), p.final_state = states_view(args.final_state);
  const Scratch scratch = forward_scratch(d, args.batch_invariant);
  p.partial = static_cast<float*>(args.workspace.data);
  p.end_state = p.partial + scratch.partial;
  p.end_step = p.end_state + scratch.states;
  return p;
}

}  // namespace statescan::selective_scan
