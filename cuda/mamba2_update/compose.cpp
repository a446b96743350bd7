#include "compose.h"

#include "../gated_rms_norm/policy.h"

namespace statescan::mamba2_update {

namespace {

// Columns first, first+1, ... of zxbcdt or y as [b,t,outer,inner].
Tensor columns(const Tensor& of, const Dims& d, std::int64_t first, std::int64_t outer, std::int64_t inner) {
  const std::int64_t step = of.stride[of.ndim - 1];
  return Tensor::strided(static_cast<char*>(of.data) + first * step * size_of(of.dtype), of.dtype,
                         {d.batch, d.ntokens, outer, inner},
                         {of.stride[0], d.has_token_axis ? of.stride[1] : 0, inner * step, step}, of.device);
}

// [b,t,outer,inner] float32 scratch whose tokens are `pitch` apart.
Tensor scratch(float* data, const Args& args, const Dims& d, std::int64_t pitch, std::int64_t outer, std::int64_t inner) {
  return Tensor::strided(data, DType::float32, {d.batch, d.ntokens, outer, inner}, {d.ntokens * pitch, pitch, inner, 1},
                         args.zxbcdt.device);
}

// [b,t,outer*inner]
Tensor flat(Tensor t) {
  t.shape[2] *= t.shape[3];
  t.stride[2] = t.stride[3];
  t.ndim = 3;
  return t;
}

// What the steps hand to one another: xBC [b*t, conv_dim], y [b*t, d_inner]; after them the state update's own scratch.
struct Between {
  float *xBC, *y;
  Workspace rest;
};

constexpr std::int64_t kAlign = 64;  // floats

std::int64_t rounded(std::int64_t floats) { return (floats + kAlign - 1) / kAlign * kAlign; }

Between between(const Args& args, const Dims& d) {
  float* const xBC = static_cast<float*>(args.workspace.data);
  const std::int64_t tokens = d.batch * d.ntokens, own = rounded(tokens * d.conv_dim) + rounded(tokens * d.d_inner);
  return {xBC, xBC + rounded(tokens * d.conv_dim), {xBC + own, args.workspace.bytes - own * sizeof(float)}};
}

void convolve(const Args& args, const Dims& d, const Between& between, Stream stream) {
  causal_conv1d_update::Args conv;
  conv.x = flat(columns(args.zxbcdt, d, d.d_inner, 1, d.conv_dim));
  conv.state = args.conv_state, conv.weight = args.conv_weight, conv.bias = args.conv_bias;
  conv.state_indices = args.state_indices;
  conv.activation = causal_conv1d::Activation::silu;
  conv.y = flat(scratch(between.xBC, args, d, d.conv_dim, 1, d.conv_dim));
  run_cuda(conv, {d.batch, d.ntokens, d.conv_dim, d.width, d.slots}, stream);
}

selective_state_update::Args state_args(const Args& args, const Dims& d, const Between& between) {
  float* const B = between.xBC + d.d_inner;
  selective_state_update::Args update;
  update.state = args.state;
  update.x = scratch(between.xBC, args, d, d.conv_dim, d.nheads, d.headdim);
  update.B = scratch(B, args, d, d.conv_dim, d.ngroups, d.dstate);
  update.C = scratch(B + d.ngroups * d.dstate, args, d, d.conv_dim, d.ngroups, d.dstate);
  update.dt = flat(columns(args.zxbcdt, d, d.d_inner + d.conv_dim, 1, d.nheads));
  update.A = args.A, update.D = args.D, update.dt_bias = args.dt_bias;
  update.state_indices = args.state_indices;
  update.dt_softplus = args.dt_softplus, update.dt_min = args.dt_min, update.dt_max = args.dt_max;
  if (args.norm_weight) {
    update.y = scratch(between.y, args, d, d.d_inner, d.nheads, d.headdim);
  } else {
    update.z = columns(args.zxbcdt, d, 0, d.nheads, d.headdim);
    update.y = columns(args.y, d, 0, d.nheads, d.headdim);
  }
  update.workspace = between.rest;
  return update;
}

selective_state_update::Dims state_dims(const Dims& d) {
  selective_state_update::Dims s{};
  s.batch = d.batch, s.ntokens = d.ntokens, s.nheads = d.nheads, s.headdim = d.headdim, s.ngroups = d.ngroups;
  s.dstate = d.dstate, s.slots = d.slots, s.has_token_axis = true, s.varying_B = s.varying_C = true;
  s.D_per_channel = d.D_per_channel;
  return s;
}

void norm(const Args& args, const Dims& d, const Between& between, Stream stream) {
  using gated_rms_norm::Access, gated_rms_norm::launch_forward, gated_rms_norm::Policy;
  gated_rms_norm::ForwardArgs norm;
  norm.x = flat(scratch(between.y, args, d, d.d_inner, 1, d.d_inner));
  norm.z = flat(columns(args.zxbcdt, d, 0, 1, d.d_inner));
  norm.weight = args.norm_weight;
  norm.group_size = d.norm_group_size, norm.eps = args.eps, norm.norm_before_gate = args.norm_before_gate;
  norm.y = flat(columns(args.y, d, 0, 1, d.d_inner));
  const gated_rms_norm::Dims dims{d.batch * d.ntokens, d.d_inner, d.norm_group_size};
  if (const Tensor& indices = args.state_indices)
    norm.padding = {indices.data, indices.dtype == DType::int64, indices.stride[0], d.ntokens, d.slots};
  if (norm.z.dtype == DType::float32) launch_forward<Policy<DType::float32, Access::strided>>(norm, dims, stream);
  else if (norm.z.dtype == DType::float16)
    launch_forward<Policy<DType::float32, Access::strided, DType::float16>>(norm, dims, stream);
  else launch_forward<Policy<DType::float32, Access::strided, DType::bfloat16>>(norm, dims, stream);
}

}  // namespace

std::size_t composed_bytes(const Args& args, const Dims& d) {
  const std::int64_t tokens = d.batch * d.ntokens;
  return sizeof(float) * (rounded(tokens * d.conv_dim) + rounded(tokens * d.d_inner)) +
         plan_cuda(state_args(args, d, between(args, d)), state_dims(d)).workspace_bytes;
}

void launch_composed(const Args& args, const Dims& d, Stream stream) {
  const Between steps = between(args, d);
  convolve(args, d, steps, stream);
  run_cuda(state_args(args, d, steps), state_dims(d), stream);
  if (args.norm_weight) norm(args, d, steps, stream);
}

}  // namespace statescan::mamba2_update
