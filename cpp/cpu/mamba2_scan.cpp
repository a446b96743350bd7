// mamba2_scan on the CPU: causal_conv1d, ssd_scan and gated_rms_norm one after the other
// Math     see mamba2_scan.h
// Shapes   zxbcdt [b,l,d_inner+conv_dim+h], y [b,l,d_inner]; in scratch, as T: xBC [b,l,conv_dim] and, where y is narrower
//          than T, its values before the norm [b,l,d_inner]
// Traffic  zxbcdt and y once, the scratch written once and read once (B and C once for each block of heads)
// Tasks    those of the three kernels
// Numerics what lies between the kernels is T, so y is rounded to its own dtype once
#include "isa.h"
#include "mamba2_parts.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using mamba2_scan::Args;
using mamba2_scan::Dims;

// The calls that the block is made of, on views of its tensors and of the scratch memory.
struct Stages {
  Stages(const Args& block, const Dims& d, void* memory) : args(block), dims(d), of_norm(packed_norm_dims(block, d)) {
    Arena arena(memory);
    const Tensor xBC = scratch_of(arena, args, d, d.conv_dim);
    // The norm works in place on a y of the working dtype.
    const Tensor y = args.norm_weight && args.y.dtype != xBC.dtype ? scratch_of(arena, args, d, d.d_inner) : args.y;
    scratch_bytes = arena.used();

    static_cast<causal_conv1d::Inputs&>(conv) = conv_inputs(args, d);
    conv.y = xBC;
    conv.final_state = args.final_conv_state;

    static_cast<ssd_scan::Inputs&>(ssd) = ssd_inputs(args, d, xBC);
    ssd.y = channels_of(y, 0, d.nheads, d.headdim);
    ssd.final_state = args.final_state;

    static_cast<gated_rms_norm::Inputs&>(norm) = packed_norm_inputs(args, d, y);
    norm.y = tokens_of(args.y, 0, packed_tokens(args, d));
  }

  // The kernels share what lies behind the scratch tensors, since they run one after the other.
  std::size_t bytes() const {
    std::size_t kernels = workspace_bytes(conv, conv_dims(dims));
    for (const std::size_t needed : {workspace_bytes(ssd, ssd_dims(dims)), workspace_bytes(norm, of_norm)})
      if (needed > kernels) kernels = needed;
    return scratch_bytes + kernels;
  }

  void run() {
    const Workspace& memory = args.workspace;
    conv.workspace = ssd.workspace =
        norm.workspace = {static_cast<char*>(memory.data) + scratch_bytes, memory.bytes - scratch_bytes};
    cpu::STATESCAN_ISA_NAMESPACE::run(conv, conv_dims(dims));
    cpu::STATESCAN_ISA_NAMESPACE::run(ssd, ssd_dims(dims));
    if (!args.norm_weight) return;
    cpu::STATESCAN_ISA_NAMESPACE::run(norm, of_norm);
    clear_tail(args.y, args, dims);
  }

  const Args& args;
  const Dims& dims;
  gated_rms_norm::Dims of_norm;
  causal_conv1d::Args conv;
  ssd_scan::Args ssd;
  gated_rms_norm::Args norm;
  std::size_t scratch_bytes;
};

}  // namespace

std::size_t workspace_bytes(const Args& args, const Dims& d) { return Stages(args, d, nullptr).bytes(); }

void run(const Args& args, const Dims& d) { Stages(args, d, args.workspace.data).run(); }

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
