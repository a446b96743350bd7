// CUDA kernels of mamba2_update: none yet.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"

namespace statescan::mamba2_update {

static constexpr cuda::Table<Args, Dims> kTable{"mamba2_update", &Args::zxbcdt};

Plan plan_cuda(const Args& args, const Dims& dims) { return kTable.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kTable.run(args, dims, stream); }

}  // namespace statescan::mamba2_update
