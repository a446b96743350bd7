// CUDA kernels of gated_rms_norm.
#include <utility>

#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "policy.h"

namespace statescan::gated_rms_norm {

namespace {

// Why runs of 16 bytes do not fit the tensors of a call, or "".
std::string why_not_runs(const Inputs& in, const Dims& dims, const Tensor& weight,
                         std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  const std::int64_t run = 16 / size_of(in.x.dtype);
  if (dims.group_size % run != 0)
    return "needs groups of a multiple of " + std::to_string(run) + " elements, got " + std::to_string(dims.group_size);
  std::string reason = cuda::why_not_runs("weight", weight, 0, run);
  for (const auto& [name, t] : tensors)
    if (reason.empty()) reason = cuda::why_not_runs(name, *t, in.x.ndim - 1, run);
  return reason;
}

std::string why_not_vector(const ForwardArgs& args, const Dims& dims) {
  return why_not_runs(args, dims, args.weight, {{"x", &args.x}, {"z", &args.z}, {"y", &args.y}});
}
std::string why_not_vector(const GradientArgs& args, const Dims& dims) {
  return why_not_runs(args, dims, args.weight,
                      {{"x", &args.x}, {"z", &args.z}, {"dy", &args.dy}, {"dx", &args.dx}, {"dz", &args.dz}});
}

template <class A>
std::string never(const A&, const Dims&) {
  return "";
}

std::size_t no_workspace(const ForwardArgs&, const Dims&) { return 0; }

std::size_t weight_shares(const GradientArgs& args, const Dims& dims) {
  return args.dweight && dims.dim > 0 ? sizeof(float) * shares_of_rows(dims) * dims.dim : 0;
}

// Calls `visit` with the dtype as a template argument.
template <class Visit>
void with_dtype(DType dtype, Visit visit) {
  if (dtype == DType::float32) visit.template operator()<DType::float32>();
  else if (dtype == DType::float16) visit.template operator()<DType::float16>();
  else visit.template operator()<DType::bfloat16>();
}

template <Access access>
void forward(const ForwardArgs& args, const Dims& dims, Stream stream) {
  with_dtype(args.x.dtype, [&]<DType dtype> { launch_forward<Policy<dtype, access>>(args, dims, stream); });
}

template <Access access>
void backward(const GradientArgs& args, const Dims& dims, Stream stream) {
  with_dtype(args.x.dtype, [&]<DType dtype> { launch_backward<Policy<dtype, access>>(args, dims, stream); });
}

using cuda::kSm80AndNewer;

constexpr cuda::Row<ForwardArgs, Dims> kForwardRows[] = {
    {"vector", kReal, kSm80AndNewer, why_not_vector, no_workspace, forward<Access::vector>},
    {"strided", kReal, kSm80AndNewer, never, no_workspace, forward<Access::strided>},
};
constexpr cuda::Row<GradientArgs, Dims> kBackwardRows[] = {
    {"vector", kReal, kSm80AndNewer, why_not_vector, weight_shares, backward<Access::vector>},
    {"strided", kReal, kSm80AndNewer, never, weight_shares, backward<Access::strided>},
};

constexpr cuda::Table<ForwardArgs, Dims> kForward{"gated_rms_norm", &ForwardArgs::x, kForwardRows};
constexpr cuda::Table<GradientArgs, Dims> kBackward{"gated_rms_norm_backward", &GradientArgs::x, kBackwardRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan({args}, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { run_padded(ForwardArgs{args}, dims, stream); }
void run_padded(const ForwardArgs& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan({args}, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { run_padded(GradientArgs{args}, dims, stream); }
void run_padded(const GradientArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::gated_rms_norm
