// CUDA kernels of causal_conv1d_update.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "policy.h"

namespace statescan::causal_conv1d_update {

namespace {

std::string wider_than_4(const Args&, const Dims& dims) {
  return dims.width <= kShortTaps ? "" : "takes a width of at most 4, got " + std::to_string(dims.width);
}

std::string never(const Args&, const Dims&) { return ""; }

std::size_t no_workspace(const Args&, const Dims&) { return 0; }

template <int taps>
void update(const Args& args, const Dims& dims, Stream stream) {
  if (args.x.dtype == DType::float32) launch<Policy<DType::float32, taps>>(args, dims, stream);
  else if (args.x.dtype == DType::float16) launch<Policy<DType::float16, taps>>(args, dims, stream);
  else launch<Policy<DType::bfloat16, taps>>(args, dims, stream);
}

constexpr cuda::Row<Args, Dims> kRows[] = {
    {"width_to_4", kReal, cuda::kSm80AndNewer, wider_than_4, no_workspace, update<kShortTaps>},
    {"width_to_8", kReal, cuda::kSm80AndNewer, never, no_workspace, update<kLongTaps>},
};
constexpr cuda::Table<Args, Dims> kTable{"causal_conv1d_update", &Args::x, kRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kTable.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kTable.run(args, dims, stream); }

}  // namespace statescan::causal_conv1d_update
