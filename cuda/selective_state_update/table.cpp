// CUDA kernels of selective_state_update.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "policy.h"

namespace statescan::selective_state_update {

namespace {

// Calls `visit` with the dtype of the state as a template argument.
template <class Visit>
auto with_state(DType dtype, Visit visit) {
  if (dtype == DType::float32) return visit.template operator()<DType::float32>();
  if (dtype == DType::float16) return visit.template operator()<DType::float16>();
  if (dtype == DType::bfloat16) return visit.template operator()<DType::bfloat16>();
  return visit.template operator()<DType::complex64>();
}

std::string why_not_vector(const Args& args, const Dims& dims) {
  const std::int64_t run = 16 / size_of(args.state.dtype);
  std::string reason = cuda::why_not_runs("state", args.state, args.state.ndim - 1, run);
  if (reason.empty() && dims.mamba1) reason = cuda::why_not_runs("A", args.A, 1, run);
  if (reason.empty()) reason = cuda::why_not_runs("B", args.B, args.B.ndim - 1, run);
  if (reason.empty()) reason = cuda::why_not_runs("C", args.C, args.C.ndim - 1, run);
  return reason;
}

std::string never(const Args&, const Dims&) { return ""; }

// A partial sum for each output, when a row of states is too long to be held at once.
std::size_t partial_sums(const Args& args, const Dims& dims) {
  return with_state(args.state.dtype, [&]<DType dtype>() -> std::size_t {
    const bool held = dims.dstate <= held_states<Policy<dtype, Form::mamba1, Access::strided>>(dims);
    return held ? 0 : sizeof(float) * dims.batch * dims.ntokens * dims.nheads * dims.headdim;
  });
}

template <Access access>
void update(const Args& args, const Dims& dims, Stream stream) {
  with_state(args.state.dtype, [&]<DType dtype> {
    if (dims.mamba1) launch<Policy<dtype, Form::mamba1, access>>(args, dims, stream);
    else if constexpr (!is_complex(dtype)) launch<Policy<dtype, Form::mamba2, access>>(args, dims, stream);
  });
}

constexpr cuda::Row<Args, Dims> kRows[] = {
    {"vector", kReal, cuda::kSm80AndNewer, why_not_vector, partial_sums, update<Access::vector>},
    {"strided", kReal, cuda::kSm80AndNewer, never, partial_sums, update<Access::strided>},
};
constexpr cuda::Table<Args, Dims> kTable{"selective_state_update", &Args::x, kRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kTable.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kTable.run(args, dims, stream); }

}  // namespace statescan::selective_state_update
