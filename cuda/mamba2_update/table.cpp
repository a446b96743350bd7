// CUDA kernels of mamba2_update.
#include "../../cpp/ops/backend.h"
#include "../common/access.h"
#include "../common/table.h"
#include "compose.h"
#include "policy.h"

namespace statescan::mamba2_update {

namespace {

// Calls `visit` with the policy for a dtype of the state and a dstate; false when there is none.
template <class Visit>
bool with_policy(DType state, std::int64_t dstate, Visit visit) {
  const auto with_rows = [&]<DType dtype> {
    if (dstate == Policy<dtype, 1>::kDState) visit.template operator()<Policy<dtype, 1>>();
    else if (dstate == Policy<dtype, 2>::kDState) visit.template operator()<Policy<dtype, 2>>();
    else if (dstate == Policy<dtype, 4>::kDState) visit.template operator()<Policy<dtype, 4>>();
    else return false;
    return true;
  };
  if (state == DType::float32) return with_rows.template operator()<DType::float32>();
  if (state == DType::float16) return with_rows.template operator()<DType::float16>();
  return with_rows.template operator()<DType::bfloat16>();
}

std::string why_not_one_launch(const Args& args, const Dims& dims) {
  const int device = args.zxbcdt.device.index;
  if (!cuda::has_sm90_code(cuda::compute_capability(device))) return "needs a build for sm_90 or newer";
  if (dims.batch == 0 || dims.batch > kMostRows)
    return "takes 1 to " + std::to_string(kMostRows) + " rows, got " + std::to_string(dims.batch);
  if (dims.ntokens != 1) return "takes one token, got " + std::to_string(dims.ntokens);
  if (dims.headdim % kUnit != 0) return "needs a headdim of a multiple of 32, got " + std::to_string(dims.headdim);
  if (args.norm_weight && dims.norm_group_size % kUnit != 0)
    return "needs norm groups of a multiple of 32 channels, got " + std::to_string(dims.norm_group_size);
  if (!with_policy(args.state.dtype, dims.dstate, []<class P> {}))
    return "takes a dstate of 32 to 256 that 16-byte runs of 8, 16 or 32 lanes hold, got " + std::to_string(dims.dstate);
  if (cuda::multiprocessors(device) < kMultiprocessors) return "needs " + std::to_string(kMultiprocessors) + " multiprocessors";
  return cuda::why_not_runs("state", args.state, 3, 16 / size_of(args.state.dtype));
}

std::size_t squares(const Args& args, const Dims& dims) {
  return args.norm_weight ? sizeof(float) * dims.batch * (dims.d_inner / kUnit) : 0;
}

void one_launch(const Args& args, const Dims& dims, Stream stream) {
  with_policy(args.state.dtype, dims.dstate, [&]<class P> { launch<P>(args, dims, stream); });
}

std::string never(const Args&, const Dims&) { return ""; }

constexpr cuda::Row<Args, Dims> kRows[] = {
    {"one_launch", kReal, cuda::kSm90AndNewer, why_not_one_launch, squares, one_launch},
    {"composed", kReal, cuda::kSm80AndNewer, never, composed_bytes, launch_composed},
};
constexpr cuda::Table<Args, Dims> kTable{"mamba2_update", &Args::zxbcdt, kRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kTable.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kTable.run(args, dims, stream); }

}  // namespace statescan::mamba2_update
