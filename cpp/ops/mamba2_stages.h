// The ops that a Mamba-2 block is made of, on views of its tensors: shared by both directions of mamba2_scan and both backends.
// The namespace without a name keeps what is compiled for a wide instruction set out of the others' code.
#pragma once

#include <statescan/causal_conv1d.h>
#include <statescan/gated_rms_norm.h>
#include <statescan/mamba2_scan.h>
#include <statescan/ssd_scan.h>

namespace statescan {
namespace {

// Channels [first, first + count) of t [b,l,channels]; absent of an absent one.
inline Tensor channels_of(const Tensor& t, std::int64_t first, std::int64_t count) {
  Tensor view = t;
  if (count > 0 && t) view.data = static_cast<char*>(t.data) + first * t.stride[2] * size_of(t.dtype);
  view.shape[2] = count;
  return view;
}

// The same as [b,l,count,size], channels first .. first + count * size.
inline Tensor channels_of(const Tensor& t, std::int64_t first, std::int64_t count, std::int64_t size) {
  Tensor view = channels_of(t, first, count * size);
  if (!t) return view;
  view.ndim = 4;
  view.shape[2] = count, view.stride[2] = size * t.stride[2];
  view.shape[3] = size, view.stride[3] = t.stride[2];
  return view;
}

// Where the parts of zxbcdt, or of its gradient, lie.
struct Split {
  Split(const Tensor& zxbcdt, const mamba2_scan::Dims& d)
      : z(channels_of(zxbcdt, 0, d.d_inner)),
        z_of_heads(channels_of(zxbcdt, 0, d.nheads, d.headdim)),
        xBC(channels_of(zxbcdt, d.d_inner, d.conv_dim)),
        dt(channels_of(zxbcdt, d.d_inner + d.conv_dim, d.nheads)) {}

  Tensor z, z_of_heads;  // [b,l,d_inner], [b,l,h,p]
  Tensor xBC, dt;        // [b,l,conv_dim], [b,l,h]
};

// The same of xBC, or of its gradient, after the convolution.
struct SplitConv {
  SplitConv(const Tensor& xBC, const mamba2_scan::Dims& d)
      : x(channels_of(xBC, 0, d.nheads, d.headdim)),
        B(channels_of(xBC, d.d_inner, d.ngroups, d.dstate)),
        C(channels_of(xBC, d.d_inner + d.ngroups * d.dstate, d.ngroups, d.dstate)) {}

  Tensor x, B, C;  // [b,l,h,p], [b,l,g,n]
};

inline causal_conv1d::Inputs conv_inputs(const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d) {
  causal_conv1d::Inputs conv;
  conv.x = Split(in.zxbcdt, d).xBC;
  conv.weight = in.conv_weight;
  conv.bias = in.conv_bias;
  conv.initial_state = in.initial_conv_state;
  conv.cu_seqlens = in.cu_seqlens;
  conv.activation = causal_conv1d::Activation::silu;
  conv.reverse = in.reverse;
  return conv;
}

inline causal_conv1d::Dims conv_dims(const mamba2_scan::Dims& d) {
  return {d.batch, d.seqlen, d.conv_dim, d.width, d.num_sequences};
}

// xBC: what the convolution made. Without a norm the gate is the scan's own.
inline ssd_scan::Inputs ssd_inputs(const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d, const Tensor& xBC) {
  const Split split(in.zxbcdt, d);
  const SplitConv conv(xBC, d);
  ssd_scan::Inputs ssd;
  ssd.x = conv.x;
  ssd.dt = split.dt;
  ssd.A = in.A;
  ssd.B = conv.B;
  ssd.C = conv.C;
  ssd.D = in.D;
  if (!in.norm_weight) ssd.z = split.z_of_heads;
  ssd.dt_bias = in.dt_bias;
  ssd.initial_state = in.initial_state;
  ssd.cu_seqlens = in.cu_seqlens;
  ssd.dt_softplus = in.dt_softplus;
  ssd.dt_min = in.dt_min;
  ssd.dt_max = in.dt_max;
  ssd.reverse = in.reverse;
  ssd.chunk_size = in.chunk_size;
  ssd.batch_invariant = in.batch_invariant;
  return ssd;
}

inline ssd_scan::Dims ssd_dims(const mamba2_scan::Dims& d) {
  return {d.batch, d.seqlen, d.nheads, d.headdim, d.ngroups, d.dstate, d.num_sequences, d.D_per_channel};
}

// y: what the scan made.
inline gated_rms_norm::Inputs norm_inputs(const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d, const Tensor& y) {
  gated_rms_norm::Inputs norm;
  norm.x = y;
  norm.z = Split(in.zxbcdt, d).z;
  norm.weight = in.norm_weight;
  norm.group_size = d.norm_group_size;
  norm.eps = in.eps;
  norm.norm_before_gate = in.norm_before_gate;
  return norm;
}

inline gated_rms_norm::Dims norm_dims(const mamba2_scan::Dims& d) { return {d.batch * d.seqlen, d.d_inner, d.norm_group_size}; }

}  // namespace
}  // namespace statescan
