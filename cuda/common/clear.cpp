#include "clear.h"

#include "launch.h"

namespace statescan::cuda {

void clear(void* memory, std::size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace statescan::cuda
