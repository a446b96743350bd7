#include "launch.h"

#include <limits>

#include "device.h"

namespace statescan::cuda {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  fail<CudaError>(call, " failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

// Whether the current device has early launches.
static bool on_sm90() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return has_sm90_code(compute_capability(device));
}

void launch_kernel(const char* name, const void* kernel, const LaunchShape& shape, Stream stream, void** parameters) {
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
  cudaLaunchAttribute attributes[3];
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  if (shape.early && on_sm90()) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t status = cudaLaunchKernelExC(&config, kernel, parameters);
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  fail<CudaError>("launching ", name, " (", shape.blocks, " blocks of ", shape.threads, " threads, ", shape.shared_bytes,
                  " bytes of shared memory) failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

}  // namespace statescan::cuda
