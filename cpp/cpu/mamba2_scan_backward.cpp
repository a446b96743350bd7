// mamba2_scan backward on the CPU: the forwards up to the norm once more, then the three backwards, last op first
// Math     see mamba2_scan.h
// Shapes   zxbcdt, dzxbcdt [b,l,d_inner+conv_dim+h], dy [b,l,d_inner]; in scratch, as T: xBC [b,l,conv_dim], then its gradient,
//          and with a norm y before it [b,l,d_inner], then its gradient
// Traffic  zxbcdt three times, dy and dzxbcdt once, the scratch three times
// Tasks    those of the kernels
// Numerics what lies between the kernels is T, so a gradient is rounded to its own dtype once
#include "isa.h"
#include "mamba2_parts.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using mamba2_scan::BackwardArgs;
using mamba2_scan::Dims;

// The calls that the gradient is made of, on views of its tensors and of the scratch memory. The kernels allow a gradient of T
// to lie where what it differentiates lies.
struct Stages {
  Stages(const BackwardArgs& block, const Dims& d, void* memory) : args(block), dims(d), of_norm(packed_norm_dims(block, d)) {
    Arena arena(memory);
    const Tensor xBC = scratch_of(arena, args, d, d.conv_dim);
    const Tensor y = args.norm_weight ? scratch_of(arena, args, d, d.d_inner) : Tensor{};
    scratch_bytes = arena.used();
    const Split gradient(args.dzxbcdt, d);

    static_cast<causal_conv1d::Inputs&>(conv) = conv_inputs(args, d);
    conv.y = xBC;

    static_cast<ssd_scan::Inputs&>(ssd) = ssd_inputs(args, d, xBC);
    ssd.y = channels_of(y, 0, d.nheads, d.headdim);

    const std::int64_t tokens = packed_tokens(args, d);
    static_cast<gated_rms_norm::Inputs&>(dnorm) = packed_norm_inputs(args, d, y);
    dnorm.dy = tokens_of(args.dy, 0, tokens);
    dnorm.dx = tokens_of(y, 0, tokens);
    dnorm.dz = tokens_of(gradient.z, 0, tokens);
    dnorm.dweight = args.dnorm_weight;

    static_cast<ssd_scan::Inputs&>(dssd) = ssd;
    dssd.dy = channels_of(args.norm_weight ? y : args.dy, 0, d.nheads, d.headdim);
    dssd.dfinal_state = args.dfinal_state;
    dssd.dx = ssd.x;
    dssd.dB = ssd.B;
    dssd.dC = ssd.C;
    dssd.ddt = gradient.dt;
    dssd.dA = args.dA;
    dssd.dD = args.dD;
    if (!args.norm_weight) dssd.dz = gradient.z_of_heads;
    dssd.ddt_bias = args.ddt_bias;
    dssd.dinitial_state = args.dinitial_state;

    static_cast<causal_conv1d::Inputs&>(dconv) = conv;
    dconv.dy = xBC;
    dconv.dfinal_state = args.dfinal_conv_state;
    dconv.dx = gradient.xBC;
    dconv.dweight = args.dconv_weight;
    dconv.dbias = args.dconv_bias;
    dconv.dinitial_state = args.dinitial_conv_state;
  }

  // The kernels share what lies behind the scratch tensors, since they run one after the other.
  std::size_t bytes() const {
    std::size_t kernels = workspace_bytes(conv, conv_dims(dims));
    for (const std::size_t needed :
         {workspace_bytes(dssd, ssd_dims(dims)), workspace_bytes(dconv, conv_dims(dims)),
          args.norm_weight ? workspace_bytes(ssd, ssd_dims(dims)) : 0, args.norm_weight ? workspace_bytes(dnorm, of_norm) : 0})
      if (needed > kernels) kernels = needed;
    return scratch_bytes + kernels;
  }

  void run() {
    const Workspace& memory = args.workspace;
    conv.workspace = ssd.workspace = dnorm.workspace = dssd.workspace =
        dconv.workspace = {static_cast<char*>(memory.data) + scratch_bytes, memory.bytes - scratch_bytes};
    cpu::STATESCAN_ISA_NAMESPACE::run(conv, conv_dims(dims));
    if (args.norm_weight) {
      cpu::STATESCAN_ISA_NAMESPACE::run(ssd, ssd_dims(dims));
      cpu::STATESCAN_ISA_NAMESPACE::run(dnorm, of_norm);
      clear_tail(Split(args.dzxbcdt, dims).z, args, dims);
    }
    cpu::STATESCAN_ISA_NAMESPACE::run(dssd, ssd_dims(dims));
    cpu::STATESCAN_ISA_NAMESPACE::run(dconv, conv_dims(dims));
  }

  const BackwardArgs& args;
  const Dims& dims;
  gated_rms_norm::Dims of_norm;
  causal_conv1d::Args conv;
  ssd_scan::Args ssd;
  gated_rms_norm::BackwardArgs dnorm;
  ssd_scan::BackwardArgs dssd;
  causal_conv1d::BackwardArgs dconv;
  std::size_t scratch_bytes;
};

}  // namespace

std::size_t workspace_bytes(const BackwardArgs& args, const Dims& d) { return Stages(args, d, nullptr).bytes(); }

void run(const BackwardArgs& args, const Dims& d) { Stages(args, d, args.workspace.data).run(); }

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
