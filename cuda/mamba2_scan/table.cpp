// CUDA kernels of mamba2_scan: those of the ops that it is made of.
#include "../common/table.h"
#include "compose.h"

namespace statescan::mamba2_scan {

namespace {

template <class A>
std::string never(const A&, const Dims&) {
  return "";
}

constexpr cuda::Row<Args, Dims> kForwardRows[] = {
    {"composed", kReal, cuda::kSm80AndNewer, never<Args>, composed_bytes, launch_composed},
};
constexpr cuda::Row<BackwardArgs, Dims> kBackwardRows[] = {
    {"composed", kReal, cuda::kSm80AndNewer, never<BackwardArgs>, composed_bytes, launch_composed},
};
constexpr cuda::Table<Args, Dims> kForward{"mamba2_scan", &Args::zxbcdt, kForwardRows};
constexpr cuda::Table<BackwardArgs, Dims> kBackward{"mamba2_scan_backward", &BackwardArgs::zxbcdt, kBackwardRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::mamba2_scan
