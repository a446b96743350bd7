// Clusters (sm_90 and newer): blocks that run at the same time and read each other's shared memory. Kernels that use them are
// compiled for older devices too, as empty shells that no table row launches there.
#pragma once

#include <cstdint>

namespace statescan::cuda {

// Every thread of the cluster comes here; what each wrote before, the others may read after.
inline __device__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What block `rank` of the cluster holds at the place of `own` in its shared memory.
inline __device__ float load_of_block(const float* own, std::uint32_t rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  const std::uint32_t address = static_cast<std::uint32_t>(__cvta_generic_to_shared(own));
  asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
               : "=f"(value)
               : "r"(address), "r"(rank)
               : "memory");
#endif
  return value;
}

}  // namespace statescan::cuda
