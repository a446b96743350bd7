// How many chunks a block keeps in shared memory: this one, and the next on its way.
#pragma once

#include "../common/launch.h"
#include "policy.h"

namespace statescan::ssd_scan {

struct SharedMemory {
  int of_block, of_multiprocessor;
};

inline SharedMemory shared_memory() {
  int device;
  SharedMemory memory;
  cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  cuda::check(cudaDeviceGetAttribute(&memory.of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
              "cudaDeviceGetAttribute");
  cuda::check(cudaDeviceGetAttribute(&memory.of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
              "cudaDeviceGetAttribute");
  return memory;
}

// Two stages where they leave room for as many blocks; else the other blocks of a multiprocessor fill the wait. Only bfloat16
// is loaded beside the products.
template <class Policy, class Layout>
int stages_of(const SharedMemory& memory, int heads) {
  constexpr int kReservedBytes = 1024;  // of each block, by the system
  const int bytes = Layout::bytes(2, heads);
  const bool fits =
      bytes <= memory.of_block && Policy::kBlocksPerMultiprocessor * (bytes + kReservedBytes) <= memory.of_multiprocessor;
  return Policy::kDType == DType::bfloat16 && fits ? 2 : 1;
}

}  // namespace statescan::ssd_scan
