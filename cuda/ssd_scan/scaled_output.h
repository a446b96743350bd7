// y of ssd_scan in bfloat16 as the next kernel of a Mamba-2 block reads it: halves with shared exponents
// (../common/scaled.cuh).
#pragma once

#include <cstddef>
#include <cstdint>

#include <statescan/ssd_scan.h>

namespace statescan::ssd_scan {

// Of the exponents, [b, l, h p / 64] of uint8. 0: the kernel that takes the call writes elements alone.
std::size_t exponent_bytes(const Args& args, const Dims& dims);

// The halves go to args.y.
void run_scaled(const Args& args, const Dims& dims, std::uint8_t* exponents, Stream stream);

}  // namespace statescan::ssd_scan
