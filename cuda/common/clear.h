// Zeros in the workspace, for kernels that count in it.
#pragma once

#include <cstddef>

#include <statescan/dispatch.h>

namespace statescan::cuda {

// On the caller's stream; a graph can capture it.
void clear(void* memory, std::size_t bytes, Stream stream);

}  // namespace statescan::cuda
