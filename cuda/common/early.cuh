// Programmatic dependent launch (sm_90 and newer): the blocks of a kernel take their places on the multiprocessors while the
// kernel before it on the stream still runs, which hides the launch. Elsewhere nothing happens.
#pragma once

namespace statescan::cuda {

// Before the first access to memory, by every thread of a kernel launched `early`: returns when all that earlier kernels of the
// stream wrote can be read. A kernel that skipped it could end before them, and the order of the stream with it.
// Where the kernel ahead is of the same call and waited itself, all that came before it is there: then those threads wait that
// read what it writes, or that keep this kernel from ending before it.
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

// Has addresses worked out here: before a wait, where that costs nothing. The compiler likes to put it off until after it.
template <class T>
__device__ void work_out(T*& address) {
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));  // which the compiler knew before
}
template <class... T>
__device__ void work_out(T*&... addresses) {
  (work_out(addresses), ...);
}

// Asks for the 128 bytes around an address to be brought to L2. Allowed before a wait: what an earlier kernel still writes
// there, it writes to L2 as well.
inline __device__ void prefetch(const char* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

}  // namespace statescan::cuda
