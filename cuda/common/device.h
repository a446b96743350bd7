// The CUDA devices of this machine, as the dispatch tables see them.
#pragma once

#include <statescan/dispatch.h>
#include <statescan/error.h>

namespace statescan::cuda {

// 10 * major + minor: 90 for an H100. Asked once per device.
int compute_capability(int device);

// Streaming multiprocessors: 132 of an H100. Asked once per device.
int multiprocessors(int device);

// The lowest compute capability that the generic kernels of this build run on; newer ones run its PTX.
int lowest_compute_capability();

// Whether the generic kernels of this build have, on such a device, what came with sm_90: clusters and early launches.
bool has_sm90_code(int capability);

// "NVIDIA H100 80GB HBM3 (sm_90)".
std::string describe(int device);

// Makes a device the current one of this thread, and puts the former one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = -1;  // -1: nothing to put back
};

}  // namespace statescan::cuda
