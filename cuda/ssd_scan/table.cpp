// CUDA kernels of ssd_scan.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "general_launch.h"

namespace statescan::ssd_scan {

namespace {

// Calls `visit` with the policy of the general kernels for a call: its dtype, and dstate padded.
template <class Visit>
auto with_policy(const Args& args, const Dims& dims, Visit visit) {
  const auto with_dstate = [&]<DType dtype> {
    if constexpr (dtype == DType::bfloat16)
      if (dims.dstate <= 64) return visit(Policy<dtype, 64>());
    if (dims.dstate <= 128) return visit(Policy<dtype, 128>());
    return visit(Policy<dtype, kMaxDstate>());
  };
  if (args.x.dtype == DType::float32) return with_dstate.template operator()<DType::float32>();
  if (args.x.dtype == DType::float16) return with_dstate.template operator()<DType::float16>();
  return with_dstate.template operator()<DType::bfloat16>();
}

std::string why_not_general(const Args& args, const Dims& dims) {
  if (args.mode != SsdMode::automatic && args.mode != SsdMode::chunked) return "computes in chunks";
  return dims.dstate <= kMaxDstate
             ? ""
             : "takes dstate up to " + std::to_string(kMaxDstate) + ", got " + std::to_string(dims.dstate);
}

std::size_t general_workspace(const Args& args, const Dims& dims) {
  return with_policy(args, dims, [&]<class P>(P) { return SegmentWorkspace::bytes(dims, general_segments<P>(args, dims)); });
}

void general(const Args& args, const Dims& dims, Stream stream) {
  with_policy(args, dims, [&]<class P>(P) { launch_general<P>(args, dims, stream); });
}

constexpr cuda::Row<Args, Dims> kForwardRows[] = {
    {"general", kReal, cuda::kSm80AndNewer, why_not_general, general_workspace, general},
};
constexpr cuda::Table<Args, Dims> kForward{"ssd_scan", &Args::x, kForwardRows};
constexpr cuda::Table<BackwardArgs, Dims> kBackward{"ssd_scan_backward", &BackwardArgs::x};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::ssd_scan
