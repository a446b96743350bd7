// Scratch memory for the CPU kernels.
#pragma once

#include <cstddef>

namespace statescan::python {

// Kept from call to call by each thread; it only grows. Aligned to 256 bytes.
void* thread_workspace(std::size_t bytes);

}  // namespace statescan::python
