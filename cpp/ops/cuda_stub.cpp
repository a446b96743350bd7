// The CUDA half of every op in a build without CUDA.
#include "backend.h"

namespace statescan {

[[noreturn]] static void no_cuda(const char* op) {
  fail<NotImplementedError>(op, ": the tensors are on a CUDA device, but this build of statescan has no CUDA kernels; install ",
                            "a CUDA wheel, or build where nvcc is found (statescan.info() says what this build holds)");
}

#define STATESCAN_STUB(op, A)                                               \
  namespace op {                                                            \
  Plan plan_cuda(const A&, const Dims&) { no_cuda(#op); }                   \
  void run_cuda(const A&, const Dims&, Stream) { no_cuda(#op); }            \
  }
STATESCAN_FOR_EACH_OP(STATESCAN_STUB)

const char* cuda_architectures() { return ""; }
std::string cuda_unavailable_reason() { return "this build has no CUDA kernels"; }
int cuda_device_count() { return 0; }
bool cuda_is_capturing(Stream) { return false; }

}  // namespace statescan
