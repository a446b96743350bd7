#include "launch.h"

#include <limits>

#include "overlap.h"

namespace statescan::cuda {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  fail<CudaError>(call, " failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

static void launch_kernel(const char* name, const void* kernel, const LaunchShape& shape, Stream stream, void** parameters,
                          bool overlapping) {
  constexpr int kDefaultSharedBytes = 48 * 1024;  // more needs the attribute
  if (shape.blocks > std::numeric_limits<std::int32_t>::max())
    fail<NotImplementedError>(name, " would need ", shape.blocks, " thread blocks; CUDA launches at most 2^31 - 1");
  if (shape.shared_bytes > kDefaultSharedBytes)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
          "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  if (overlapping) config.attrs = &overlap, config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelExC(&config, kernel, parameters);
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  fail<CudaError>("launching ", name, " (", shape.blocks, " blocks of ", shape.threads, " threads, ", shape.shared_bytes,
                  " bytes of shared memory) failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

void launch_kernel(const char* name, const void* kernel, const LaunchShape& shape, Stream stream, void** parameters) {
  launch_kernel(name, kernel, shape, stream, parameters, false);
}

void launch_overlapping_kernel(const char* name, const void* kernel, const LaunchShape& shape, Stream stream,
                               void** parameters) {
  launch_kernel(name, kernel, shape, stream, parameters, true);
}

}  // namespace statescan::cuda
