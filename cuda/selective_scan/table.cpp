// CUDA kernels of selective_scan: none yet.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"

namespace statescan::selective_scan {

static constexpr cuda::Table<Args, Dims> kForward{"selective_scan", &Args::x};
static constexpr cuda::Table<BackwardArgs, Dims> kBackward{"selective_scan_backward", &BackwardArgs::x};

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::selective_scan
