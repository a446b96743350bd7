// A block from the ops that it is made of, each on views of its tensors and of scratch memory.
#pragma once

#include "../../cpp/ops/backend.h"

namespace statescan::mamba2_scan {

// Scratch memory of a call, in bytes. Raises where one of the ops has no kernel for it, and says why.
std::size_t composed_bytes(const Args& args, const Dims& dims);
std::size_t composed_bytes(const BackwardArgs& args, const Dims& dims);

void launch_composed(const Args& args, const Dims& dims, Stream stream);
void launch_composed(const BackwardArgs& args, const Dims& dims, Stream stream);

}  // namespace statescan::mamba2_scan
