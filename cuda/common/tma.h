// Tensor maps of Hopper's bulk copy engine (TMA): how it finds boxes of a strided tensor. Plain C++.
#pragma once

#include <cstdint>
#include <string>

#include <cuda.h>

#include <statescan/tensor.h>

namespace statescan::cuda {

// Why the engine cannot address a tensor of 16-bit elements whose last axis is the row of a box, or "".
std::string why_not_tma(const char* name, const Tensor& t);

// The map of a [b,l,k,m] tensor for boxes of `tokens` tokens by 64 elements of one k; rows of 128 bytes, swizzled as wgmma reads
// them. What lies outside the tensor reads as zero and is not written. Coordinates: m, k, l, b.
CUtensorMap tma_map(const Tensor& t, int tokens = 64);

// The same of steps [b,l,h], of 16 or 32 bits: boxes of `tokens` tokens by 16 bytes of consecutive heads. Coordinates: h, l, b.
std::string why_not_tma_steps(const char* name, const Tensor& t);
CUtensorMap tma_map_steps(const Tensor& t, int tokens);

}  // namespace statescan::cuda
