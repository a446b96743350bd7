// CUDA kernels of causal_conv1d_update: none yet.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"

namespace statescan::causal_conv1d_update {

static constexpr cuda::Table<Args, Dims> kTable{"causal_conv1d_update", &Args::x};

Plan plan_cuda(const Args& args, const Dims& dims) { return kTable.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kTable.run(args, dims, stream); }

}  // namespace statescan::causal_conv1d_update
