// CUDA kernels of gated_rms_norm: forward; no backward yet.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "policy.h"

namespace statescan::gated_rms_norm {

namespace {

std::string why_not_vector(const Args& args, const Dims& dims) {
  const std::int64_t run = 16 / size_of(args.x.dtype);
  if (dims.group_size % run != 0)
    return "needs groups of a multiple of " + std::to_string(run) + " elements, got " + std::to_string(dims.group_size);
  std::string reason = cuda::why_not_runs("x", args.x, args.x.ndim - 1, run);
  if (reason.empty()) reason = cuda::why_not_runs("z", args.z, args.x.ndim - 1, run);
  if (reason.empty()) reason = cuda::why_not_runs("weight", args.weight, 0, run);
  if (reason.empty()) reason = cuda::why_not_runs("y", args.y, args.x.ndim - 1, run);
  return reason;
}

std::string never(const Args&, const Dims&) { return ""; }

std::size_t no_workspace(const Args&, const Dims&) { return 0; }

template <Access access>
void forward(const Args& args, const Dims& dims, Stream stream) {
  if (args.x.dtype == DType::float32) launch_forward<Policy<DType::float32, access>>(args, dims, stream);
  else if (args.x.dtype == DType::float16) launch_forward<Policy<DType::float16, access>>(args, dims, stream);
  else launch_forward<Policy<DType::bfloat16, access>>(args, dims, stream);
}

constexpr cuda::Row<Args, Dims> kForwardRows[] = {
    {"vector", kReal, cuda::kSm80AndNewer, why_not_vector, no_workspace, forward<Access::vector>},
    {"strided", kReal, cuda::kSm80AndNewer, never, no_workspace, forward<Access::strided>},
};

constexpr cuda::Table<Args, Dims> kForward{"gated_rms_norm", &Args::x, kForwardRows};
constexpr cuda::Table<BackwardArgs, Dims> kBackward{"gated_rms_norm_backward", &BackwardArgs::x};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::gated_rms_norm
