// CUDA kernels of gated_rms_norm: none yet.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"

namespace statescan::gated_rms_norm {

static constexpr cuda::Table<Args, Dims> kForward{"gated_rms_norm", &Args::x};
static constexpr cuda::Table<BackwardArgs, Dims> kBackward{"gated_rms_norm_backward", &BackwardArgs::x};

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::gated_rms_norm
