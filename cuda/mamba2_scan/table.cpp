// CUDA kernels of mamba2_scan: none yet.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"

namespace statescan::mamba2_scan {

static constexpr cuda::Table<Args, Dims> kForward{"mamba2_scan", &Args::zxbcdt};
static constexpr cuda::Table<BackwardArgs, Dims> kBackward{"mamba2_scan_backward", &BackwardArgs::zxbcdt};

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::mamba2_scan
