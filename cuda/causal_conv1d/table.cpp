// CUDA kernels of causal_conv1d.
#include <array>
#include <limits>

#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "policy.h"

namespace statescan::causal_conv1d {

namespace {

// Calls `visit` with the dtype as a template argument.
template <class Visit>
auto with_dtype(DType dtype, Visit visit) {
  if (dtype == DType::float32) return visit.template operator()<DType::float32>();
  if (dtype == DType::float16) return visit.template operator()<DType::float16>();
  return visit.template operator()<DType::bfloat16>();
}

std::string why_not_width_4(const Dims& dims) {
  return dims.width == kFour ? "" : "takes a width of 4, got " + std::to_string(dims.width);
}

// The tensors with tokens.
struct NamedTensor {
  const char* name;
  const Tensor* tensor;
};
std::array<NamedTensor, 3> tensors_of(const Args& args) { return {{{"x", &args.x}, {"y", &args.y}, {}}}; }
std::array<NamedTensor, 3> tensors_of(const BackwardArgs& args) {
  return {{{"x", &args.x}, {"dy", &args.dy}, {"dx", &args.dx}}};
}

// Why runs of `count` elements along an axis of all of them cannot be accessed at once, or "".
template <class A>
std::string why_not_runs(const A& args, int along, std::int64_t count) {
  std::string reason;
  for (const NamedTensor& t : tensors_of(args))
    if (reason.empty() && t.tensor) reason = cuda::why_not_runs(t.name, *t.tensor, along, count);
  return reason;
}

template <class A>
std::string why_not_channels(const A& args, const Dims&) {
  return why_not_runs(args, 2, kVectorChannels);
}

template <class A>
std::string why_not_channels_of_4(const A& args, const Dims& dims) {
  std::string reason = why_not_width_4(dims);
  if (reason.empty()) reason = why_not_channels(args, dims);
  if (reason.empty()) reason = cuda::why_not_runs("weight", args.weight, 1, kFour);
  return reason;
}

template <class A>
std::string why_not_time(const A& args, const Dims& dims) {
  if (args.cu_seqlens) return "takes no cu_seqlens";
  if (dims.seqlen == 0) return "needs tokens";
  if (dims.seqlen > std::numeric_limits<std::int32_t>::max() / 2) return "counts tokens in 32 bits";
  return why_not_runs(args, 1, 16 / size_of(args.x.dtype));
}

template <class A>
std::string why_not_time_of_4(const A& args, const Dims& dims) {
  const std::string reason = why_not_width_4(dims);
  return reason.empty() ? why_not_time(args, dims) : reason;
}

template <class A>
std::string never(const A&, const Dims&) {
  return "";
}

std::size_t no_workspace(const Args&, const Dims&) { return 0; }

// Each segment's shares of dweight and dbias.
std::size_t shares(const BackwardArgs& args, const Dims& dims, std::int64_t tokens) {
  if (!args.dweight && !args.dbias) return 0;
  return sizeof(float) * dims.batch * divide_up(dims.seqlen, tokens) * (dims.width + 1) * dims.dim;
}
template <int channels>
std::size_t walk_shares(const BackwardArgs& args, const Dims& dims) {
  return shares(args, dims, backward_walk_tokens(dims, channels));
}
std::size_t time_shares(const BackwardArgs& args, const Dims& dims) {
  return shares(args, dims, backward_time_tokens(dims, kWarp * 16 / size_of(args.x.dtype)));
}

template <Way way, int taps>
void forward(const Args& args, const Dims& dims, Stream stream) {
  with_dtype(args.x.dtype, [&]<DType dtype> { launch_forward<Policy<dtype, way, taps>>(args, dims, stream); });
}
template <Way way, int taps>
void backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  with_dtype(args.x.dtype, [&]<DType dtype> { launch_backward<Policy<dtype, way, taps>>(args, dims, stream); });
}

using cuda::kSm80AndNewer;

constexpr cuda::Row<Args, Dims> kForwardRows[] = {
    {"channels_w4", kReal, kSm80AndNewer, why_not_channels_of_4<Args>, no_workspace, forward<Way::channels, kFour>},
    {"channels", kReal, kSm80AndNewer, why_not_channels<Args>, no_workspace, forward<Way::channels, kUpTo8>},
    {"time_w4", kReal, kSm80AndNewer, why_not_time_of_4<Args>, no_workspace, forward<Way::time, kFour>},
    {"time", kReal, kSm80AndNewer, why_not_time<Args>, no_workspace, forward<Way::time, kUpTo8>},
    {"strided", kReal, kSm80AndNewer, never<Args>, no_workspace, forward<Way::strided, kUpTo8>},
};
constexpr cuda::Row<BackwardArgs, Dims> kBackwardRows[] = {
    {"channels_w4", kReal, kSm80AndNewer, why_not_channels_of_4<BackwardArgs>, walk_shares<kVectorChannels>,
     backward<Way::channels, kFour>},
    {"channels", kReal, kSm80AndNewer, why_not_channels<BackwardArgs>, walk_shares<kVectorChannels>,
     backward<Way::channels, kUpTo8>},
    {"time_w4", kReal, kSm80AndNewer, why_not_time_of_4<BackwardArgs>, time_shares, backward<Way::time, kFour>},
    {"time", kReal, kSm80AndNewer, why_not_time<BackwardArgs>, time_shares, backward<Way::time, kUpTo8>},
    {"strided", kReal, kSm80AndNewer, never<BackwardArgs>, walk_shares<1>, backward<Way::strided, kUpTo8>},
};

constexpr cuda::Table<Args, Dims> kForward{"causal_conv1d", &Args::x, kForwardRows};
constexpr cuda::Table<BackwardArgs, Dims> kBackward{"causal_conv1d_backward", &BackwardArgs::x, kBackwardRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::causal_conv1d
