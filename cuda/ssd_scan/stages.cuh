// How many chunks a block keeps in shared memory: this one, and the next on its way.
#pragma once

#include "../common/launch.h"
#include "policy.h"

namespace statescan::ssd_scan {

// Of a block, at most, on the current device.
inline int shared_memory() {
  int device, bytes;
  cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  cuda::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Two stages where they fit. Only bfloat16 is loaded beside the products.
template <class Policy, class Layout>
int stages_of(int heads) {
  return Policy::kDType == DType::bfloat16 && Layout::bytes(2, heads) <= shared_memory() ? 2 : 1;
}

// Heads of a block, at most.
template <class Policy, class Layout>
int most_heads() {
  int heads = Policy::kMaxHeads;
  while (heads > 1 && Layout::bytes(1, heads) > shared_memory()) --heads;
  return heads;
}

}  // namespace statescan::ssd_scan
