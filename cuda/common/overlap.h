// Launching a kernel that starts before the one ahead of it in the stream ends (sm_90): what comes before its wait runs beside
// the end of that one.
#pragma once

#include "launch.h"

namespace statescan::cuda {

void launch_overlapping_kernel(const char* name, const void* kernel, const LaunchShape& shape, Stream stream,
                               void** parameters);

// The kernel calls wait_for_kernel_ahead() before it touches what that one writes.
template <class... Parameters>
void launch_overlapping(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
                        const std::type_identity_t<Parameters>&... parameters) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  launch_overlapping_kernel(name, reinterpret_cast<const void*>(kernel), shape, stream, pointers);
}

#ifdef __CUDACC__
// Until the kernel ahead is complete and its writes are visible. Returns at once where there is none to wait for.
inline __device__ void wait_for_kernel_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel start once every block has said so or ended.
inline __device__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif

}  // namespace statescan::cuda
