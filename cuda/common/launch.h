// Launching a kernel, with the error that a user can act on.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime_api.h>

#include <statescan/dispatch.h>
#include <statescan/error.h>

namespace statescan::cuda {

// Raises CudaError naming the call. The error is taken off the runtime's record, so that the next library does not find it.
void check(cudaError_t status, const char* call);

struct LaunchShape {
  std::int64_t blocks;  // one axis, which goes to 2^31 - 1; y and z would end at 65,535
  int threads;
  int shared_bytes = 0;
  int cluster = 1;           // blocks that meet in shared memory; from sm_90 on, at most 8
  bool cooperative = false;  // all blocks must run at the same time: the kernel waits for the whole grid
  // The kernel calls wait_for_earlier_kernels() (early.cuh): from sm_90 on its blocks may then take their places while the
  // kernel before it on the stream ends.
  bool early = false;
};

void launch_kernel(const char* name, const void* kernel, const LaunchShape& shape, Stream stream, void** parameters);

// Launches `kernel` on the caller's stream. Nothing is allocated and nothing waits, so a graph can capture the first call.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
            const std::type_identity_t<Parameters>&... parameters) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  launch_kernel(name, reinterpret_cast<const void*>(kernel), shape, stream, pointers);
}

}  // namespace statescan::cuda
