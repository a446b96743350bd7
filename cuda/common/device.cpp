#include "device.h"

#include <atomic>

#include <cuda_runtime_api.h>

#include "launch.h"

namespace statescan::cuda {

int compute_capability(int device) {
  constexpr int kRemembered = 64;
  static std::atomic<int> known[kRemembered];  // 0: not asked yet
  const bool remembered = device >= 0 && device < kRemembered;
  if (remembered)
    if (const int found = known[device].load(std::memory_order_relaxed)) return found;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    (void)cudaGetLastError();
    const std::string reason = cuda_unavailable_reason();
    fail<CudaError>("CUDA device ", device, " cannot be used: ", reason.empty() ? "there is no such device" : reason);
  }
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (remembered) known[device].store(10 * major + minor, std::memory_order_relaxed);
  return 10 * major + minor;
}

int multiprocessors(int device) {
  constexpr int kRemembered = 64;
  static std::atomic<int> known[kRemembered];  // 0: not asked yet
  const bool remembered = device >= 0 && device < kRemembered;
  if (remembered)
    if (const int found = known[device].load(std::memory_order_relaxed)) return found;
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (remembered) known[device].store(count, std::memory_order_relaxed);
  return count;
}

int lowest_compute_capability() { return STATESCAN_CUDA_LOWEST; }

bool has_sm90_code(int capability) { return capability >= STATESCAN_CUDA_LOWEST_FROM_90; }

std::string describe(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return std::string(properties.name) + " (sm_" + std::to_string(compute_capability(device)) + ")";
}

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  former_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (former_ >= 0) (void)cudaSetDevice(former_);
}

// "13.0" from 13000.
static std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace statescan::cuda

namespace statescan {

const char* cuda_architectures() { return STATESCAN_CUDA_ARCHITECTURES; }

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();  // no driver or no device: an answer, not an error to leave behind
  return 0;
}

bool cuda_is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  (void)cudaGetLastError();  // the legacy stream, while others are captured
  return true;
}

// Nothing here raises: a machine without a driver imports the package and runs the CPU kernels.
std::string cuda_unavailable_reason() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) (void)cudaGetLastError();
  int driver = 0;
  if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
    return "no CUDA driver is installed";
  if (status == cudaErrorInsufficientDriver)
    return "the CUDA driver supports CUDA " + cuda::version_text(driver) + "; this build needs " +
           cuda::version_text(CUDART_VERSION);
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) return "no CUDA device is visible";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  std::string devices;
  for (int device = 0; device < count; ++device) {
    if (cuda::compute_capability(device) >= cuda::lowest_compute_capability()) return "";
    devices += (device ? ", " : "") + cuda::describe(device);
  }
  return std::string("this build is for ") + cuda_architectures() + "; found " + devices;
}

}  // namespace statescan
