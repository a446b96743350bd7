// Programmatic dependent launch (sm_90 and newer): the blocks of a kernel take their places on the multiprocessors while the
// kernel before it on the stream still runs, which hides the launch. Elsewhere nothing happens.
#pragma once

namespace statescan::cuda {

// Before the first access to memory, by every thread of a kernel launched `early`: returns when all that earlier kernels of the
// stream wrote can be read. A kernel that skipped it could end before them, and the order of the stream with it.
inline __device__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel, if launched `early`, may take the places that this one leaves, once every block has come here or ended.
inline __device__ void let_next_kernel_in() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace statescan::cuda
