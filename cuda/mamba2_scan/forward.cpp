// mamba2_scan forward on CUDA: causal_conv1d, ssd_scan and gated_rms_norm one after the other
// Math     see mamba2_scan.h
// Shapes   zxbcdt [b,l,d_inner+conv_dim+h], y [b,l,d_inner]; in scratch xBC [b,l,conv_dim]
// Traffic  zxbcdt once, xBC written and read, y written, read and written again, as the norm works in place; B and C and the
//          states as in ssd_scan
// Launch   those of the three ops
// Numerics xBC has the dtype of zxbcdt, and so has y before the norm, but where the scan can leave bfloat16's as halves with
//          shared exponents. y is then 1.44 times as far off as rounding alone takes it, where rounding y before the norm as
//          well makes that 1.70 (h4 p64 n128, steps of about 0.02)
#include <algorithm>

#include "../../cpp/ops/mamba2_stages.h"
#include "compose.h"
#include "scratch.h"

namespace statescan::mamba2_scan {

namespace {

// The calls that the block is made of, on views of its tensors and of the scratch memory.
struct Stages {
  Stages(const Args& args, const Dims& d) {
    Scratch scratch(args.workspace);
    const Tensor xBC = scratch.tokens(args.zxbcdt, d, d.conv_dim);

    static_cast<causal_conv1d::Inputs&>(conv) = conv_inputs(args, d);
    conv.y = xBC;
    conv.final_state = args.final_conv_state;

    static_cast<ssd_scan::Inputs&>(ssd) = ssd_inputs(args, d, xBC);
    ssd.y = channels_of(args.y, 0, d.nheads, d.headdim);
    ssd.final_state = args.final_state;

    static_cast<gated_rms_norm::Inputs&>(norm) = norm_inputs(args, d, args.y);
    norm.y = args.y;
    norm.end = end_of_packing(args, d);

    if (args.norm_weight) scan = {ssd, d, scratch};
    norm.x_exponents = scan.exponents();
    scratch_bytes = scratch.used();
    conv.workspace = ssd.workspace = norm.workspace = scratch.rest();
  }

  causal_conv1d::Args conv;
  ssd_scan::Args ssd;
  gated_rms_norm::ForwardArgs norm;
  ScanBeforeNorm scan;
  std::size_t scratch_bytes;
};

}  // namespace

std::size_t composed_bytes(const Args& args, const Dims& d) {
  const Stages stages(args, d);
  return stages.scratch_bytes +
         std::max(plan_cuda(stages.conv, conv_dims(d)).workspace_bytes, plan_cuda(stages.ssd, ssd_dims(d)).workspace_bytes);
}

void launch_composed(const Args& args, const Dims& d, Stream stream) {
  const Stages stages(args, d);
  run_cuda(stages.conv, conv_dims(d), stream);
  stages.scan.run(stages.ssd, d, stream);
  if (args.norm_weight) run_padded(stages.norm, norm_dims(d), stream);
}

}  // namespace statescan::mamba2_scan
