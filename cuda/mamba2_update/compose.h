// A block's step from the ops that it is made of, for the calls that the one-launch kernel does not take: convolution, state
// update, norm, each a launch on views of zxbcdt and of scratch memory.
#pragma once

#include "../../cpp/ops/backend.h"

namespace statescan::mamba2_update {

// Scratch memory of such a call, in bytes.
std::size_t composed_bytes(const Args& args, const Dims& dims);

void launch_composed(const Args& args, const Dims& dims, Stream stream);

}  // namespace statescan::mamba2_update
