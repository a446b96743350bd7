// mamba2_scan backward on CUDA: the forwards up to the norm once more, then the three backwards, last op first
// Math     see mamba2_scan.h
// Shapes   zxbcdt, dzxbcdt [b,l,d_inner+conv_dim+h], dy [b,l,d_inner]; in scratch the gradient of xBC after the convolution
//          [b,l,conv_dim], and with a norm y before it [b,l,d_inner], then its gradient. xBC after the convolution lies where
//          the gradient of its input will
// Traffic  zxbcdt three times, dy and dzxbcdt once, xBC written once and read twice, the scratch written and read, y twice
// Launch   those of the ops
// Numerics what lies between the ops has the dtype of zxbcdt, but for y where the scan can leave bfloat16's as in the forward:
//          dz is then 1.4 to 1.6 times as far off as rounding alone takes it, instead of 1.7 to 1.8
#include <algorithm>

#include "../../cpp/ops/mamba2_stages.h"
#include "../common/tma.h"
#include "compose.h"
#include "scratch.h"

namespace statescan::mamba2_scan {

namespace {

// Whether the scan's fastest kernels take x, B and C from here.
bool suits_scan(const Tensor& xBC, const Dims& d) {
  const SplitConv conv(xBC, d);
  for (const Tensor& part : {conv.x, conv.B, conv.C})
    if (!part || !cuda::why_not_tma("", part).empty()) return false;
  return true;
}

// The calls that the gradient is made of, on views of its tensors and of the scratch memory.
struct Stages {
  Stages(const BackwardArgs& args, const Dims& d) : has_norm(args.norm_weight) {
    const Split gradient(args.dzxbcdt, d);
    Scratch scratch(args.workspace);
    const Tensor xBC = suits_scan(gradient.xBC, d) ? gradient.xBC : scratch.tokens(args.zxbcdt, d, d.conv_dim);
    const Tensor dxBC = scratch.tokens(args.zxbcdt, d, d.conv_dim);
    const Tensor y = has_norm ? scratch.tokens(args.zxbcdt, d, d.d_inner) : Tensor{};

    static_cast<causal_conv1d::Inputs&>(conv) = conv_inputs(args, d);
    conv.y = xBC;

    static_cast<ssd_scan::Inputs&>(ssd) = ssd_inputs(args, d, xBC);
    ssd.y = channels_of(y, 0, d.nheads, d.headdim);
    if (has_norm) scan = {ssd, d, scratch};
    scratch_bytes = scratch.used();

    static_cast<gated_rms_norm::Inputs&>(dnorm) = norm_inputs(args, d, y);
    dnorm.dy = args.dy;
    dnorm.dx = y;
    dnorm.dz = gradient.z;
    dnorm.dweight = args.dnorm_weight;
    dnorm.end = end_of_packing(args, d);
    dnorm.x_exponents = scan.exponents();

    const SplitConv of_scan(dxBC, d);
    static_cast<ssd_scan::Inputs&>(dssd) = ssd;
    dssd.dy = channels_of(has_norm ? y : args.dy, 0, d.nheads, d.headdim);
    dssd.dfinal_state = args.dfinal_state;
    dssd.dx = of_scan.x;
    dssd.dB = of_scan.B;
    dssd.dC = of_scan.C;
    dssd.ddt = gradient.dt;
    dssd.dA = args.dA;
    dssd.dD = args.dD;
    if (!has_norm) dssd.dz = gradient.z_of_heads;
    dssd.ddt_bias = args.ddt_bias;
    dssd.dinitial_state = args.dinitial_state;

    static_cast<causal_conv1d::Inputs&>(dconv) = conv;
    dconv.dy = dxBC;
    dconv.dfinal_state = args.dfinal_conv_state;
    dconv.dx = gradient.xBC;
    dconv.dweight = args.dconv_weight;
    dconv.dbias = args.dconv_bias;
    dconv.dinitial_state = args.dinitial_conv_state;

    conv.workspace = ssd.workspace = dnorm.workspace = dssd.workspace = dconv.workspace = scratch.rest();
  }

  bool has_norm;
  causal_conv1d::Args conv;
  ssd_scan::Args ssd;
  gated_rms_norm::GradientArgs dnorm;
  ssd_scan::BackwardArgs dssd;
  causal_conv1d::BackwardArgs dconv;
  ScanBeforeNorm scan;
  std::size_t scratch_bytes;
};

}  // namespace

std::size_t composed_bytes(const BackwardArgs& args, const Dims& d) {
  const Stages stages(args, d);
  const auto bytes = [](const Plan& plan) { return plan.workspace_bytes; };
  return stages.scratch_bytes +
         std::max({bytes(plan_cuda(stages.conv, conv_dims(d))), bytes(plan_cuda(stages.dssd, ssd_dims(d))),
                   bytes(plan_cuda(stages.dconv, conv_dims(d))),
                   stages.has_norm ? bytes(plan_cuda(stages.ssd, ssd_dims(d))) : 0,
                   stages.has_norm ? bytes(plan_cuda(stages.dnorm, norm_dims(d))) : 0});
}

void launch_composed(const BackwardArgs& args, const Dims& d, Stream stream) {
  const Stages stages(args, d);
  run_cuda(stages.conv, conv_dims(d), stream);
  if (stages.has_norm) {
    stages.scan.run(stages.ssd, d, stream);
    run_padded(stages.dnorm, norm_dims(d), stream);
  }
  run_cuda(stages.dssd, ssd_dims(d), stream);
  run_cuda(stages.dconv, conv_dims(d), stream);
}

}  // namespace statescan::mamba2_scan
