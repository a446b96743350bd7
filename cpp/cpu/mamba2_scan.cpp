// mamba2_scan on the CPU: causal_conv1d, ssd_scan and gated_rms_norm one after the other
// Math     see mamba2_scan.h
// Shapes   zxbcdt [b,l,d_inner+conv_dim+h], y [b,l,d_inner]; in scratch, as T: xBC [b,l,conv_dim] and, where y is narrower
//          than T, its values before the norm [b,l,d_inner]
// Traffic  zxbcdt and y once, the scratch written once and read once (B and C once for each block of heads)
// Tasks    those of the three kernels
// Numerics what lies between the kernels is T, so y is rounded to its own dtype once
#include "isa.h"
#include "simd.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using mamba2_scan::Args;
using mamba2_scan::Dims;

// Channels [first, first + count) of t [b,l,channels].
Tensor channels_of(const Tensor& t, std::int64_t first, std::int64_t count) {
  Tensor view = t;
  if (count > 0) view.data = static_cast<char*>(t.data) + first * t.stride[2] * size_of(t.dtype);
  view.shape[2] = count;
  return view;
}

// The same as [b,l,count,size], channels first .. first + count * size.
Tensor channels_of(const Tensor& t, std::int64_t first, std::int64_t count, std::int64_t size) {
  Tensor view = channels_of(t, first, count * size);
  view.ndim = 4;
  view.shape[2] = count, view.stride[2] = size * t.stride[2];
  view.shape[3] = size, view.stride[3] = t.stride[2];
  return view;
}

// Tokens [first, first + count) of t [b,l,channels].
Tensor tokens_of(const Tensor& t, std::int64_t first, std::int64_t count) {
  Tensor view = t;
  if (count > 0) view.data = static_cast<char*>(t.data) + first * t.stride[1] * size_of(t.dtype);
  view.shape[1] = count;
  return view;
}

// A contiguous [b,l,channels] in scratch memory.
Tensor scratch_of(Arena& arena, DType dtype, const Dims& d, std::int64_t channels) {
  const std::int64_t count = d.batch * d.seqlen * channels;
  Tensor t;
  if (dtype == DType::float64) t.data = arena.take<double>(count);
  else t.data = arena.take<float>(count);
  t.dtype = dtype;
  t.ndim = 3;
  t.shape[0] = d.batch, t.shape[1] = d.seqlen, t.shape[2] = channels;
  t.stride[0] = d.seqlen * channels, t.stride[1] = channels, t.stride[2] = 1;
  return t;
}

// The calls that the block is made of, on views of its tensors and of the scratch memory.
struct Stages {
  Stages(const Args& args, const Dims& d, void* memory) {
    const DType working = args.zxbcdt.dtype == DType::float64 ? DType::float64 : DType::float32;
    Arena arena(memory);
    const Tensor xBC = scratch_of(arena, working, d, d.conv_dim);
    // The norm works in place on a y of the working dtype.
    const Tensor y = args.norm_weight && args.y.dtype != working ? scratch_of(arena, working, d, d.d_inner) : args.y;

    conv.x = channels_of(args.zxbcdt, d.d_inner, d.conv_dim);
    conv.weight = args.conv_weight;
    conv.bias = args.conv_bias;
    conv.initial_state = args.initial_conv_state;
    conv.cu_seqlens = args.cu_seqlens;
    conv.activation = causal_conv1d::Activation::silu;
    conv.reverse = args.reverse;
    conv.y = xBC;
    conv.final_state = args.final_conv_state;
    conv_dims = {d.batch, d.seqlen, d.conv_dim, d.width, d.num_sequences};

    ssd.x = channels_of(xBC, 0, d.nheads, d.headdim);
    ssd.dt = channels_of(args.zxbcdt, d.d_inner + d.conv_dim, d.nheads);
    ssd.A = args.A;
    ssd.B = channels_of(xBC, d.d_inner, d.ngroups, d.dstate);
    ssd.C = channels_of(xBC, d.d_inner + d.ngroups * d.dstate, d.ngroups, d.dstate);
    ssd.D = args.D;
    if (!args.norm_weight) ssd.z = channels_of(args.zxbcdt, 0, d.nheads, d.headdim);
    ssd.dt_bias = args.dt_bias;
    ssd.initial_state = args.initial_state;
    ssd.cu_seqlens = args.cu_seqlens;
    ssd.dt_softplus = args.dt_softplus;
    ssd.dt_min = args.dt_min;
    ssd.dt_max = args.dt_max;
    ssd.reverse = args.reverse;
    ssd.chunk_size = args.chunk_size;
    ssd.y = channels_of(y, 0, d.nheads, d.headdim);
    ssd.final_state = args.final_state;
    ssd_dims = {d.batch, d.seqlen, d.nheads, d.headdim, d.ngroups, d.dstate, d.num_sequences, d.D_per_channel};

    // Past the last packed token y is zero, whatever z holds there: the norm stops before it.
    tokens = args.cu_seqlens ? index_at(args.cu_seqlens, d.num_sequences) : d.seqlen;
    norm.x = tokens_of(y, 0, tokens);
    norm.z = tokens_of(channels_of(args.zxbcdt, 0, d.d_inner), 0, tokens);
    norm.weight = args.norm_weight;
    norm.eps = args.eps;
    norm.norm_before_gate = args.norm_before_gate;
    norm.y = tokens_of(args.y, 0, tokens);
    norm_dims = {d.batch * tokens, d.d_inner, d.norm_group_size};

    scratch_bytes = arena.used();
  }

  // The kernels share what lies behind the scratch tensors, since they run one after the other.
  std::size_t bytes() const {
    std::size_t kernels = workspace_bytes(conv, conv_dims);
    for (const std::size_t needed : {workspace_bytes(ssd, ssd_dims), workspace_bytes(norm, norm_dims)})
      if (needed > kernels) kernels = needed;
    return scratch_bytes + kernels;
  }

  void run(const Workspace& memory) {
    const Workspace rest = {static_cast<char*>(memory.data) + scratch_bytes, memory.bytes - scratch_bytes};
    conv.workspace = ssd.workspace = norm.workspace = rest;
    cpu::STATESCAN_ISA_NAMESPACE::run(conv, conv_dims);
    cpu::STATESCAN_ISA_NAMESPACE::run(ssd, ssd_dims);
    if (!norm.weight) return;
    cpu::STATESCAN_ISA_NAMESPACE::run(norm, norm_dims);
    clear_tail();
  }

  // y of the tokens past the last packed one.
  void clear_tail() const {
    for (std::int64_t l = tokens; l < conv_dims.seqlen; ++l)
      for (std::int64_t c = 0; c < norm_dims.dim; ++c)
        store_element<float>(norm.y.data, norm.y.dtype, offset_of(norm.y, 0, l, c), 0.0f);
  }

  causal_conv1d::Args conv;
  causal_conv1d::Dims conv_dims;
  ssd_scan::Args ssd;
  ssd_scan::Dims ssd_dims;
  gated_rms_norm::Args norm;
  gated_rms_norm::Dims norm_dims;
  std::int64_t tokens;
  std::size_t scratch_bytes;
};

}  // namespace

std::size_t workspace_bytes(const Args& args, const Dims& d) { return Stages(args, d, nullptr).bytes(); }

void run(const Args& args, const Dims& d) { Stages(args, d, args.workspace.data).run(args.workspace); }

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
