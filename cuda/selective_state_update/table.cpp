// CUDA kernels of selective_state_update: none yet.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"

namespace statescan::selective_state_update {

static constexpr cuda::Table<Args, Dims> kTable{"selective_state_update", &Args::x};

Plan plan_cuda(const Args& args, const Dims& dims) { return kTable.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kTable.run(args, dims, stream); }

}  // namespace statescan::selective_state_update
