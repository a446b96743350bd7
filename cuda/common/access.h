// How kernels reach their tensors, and whether the faster way fits: plain C++, for the dispatch tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include <statescan/tensor.h>

namespace statescan::cuda {

enum class Access {
  vector,   // accesses of up to 16 bytes along a run, which is contiguous, aligned, and whole or absent
  strided,  // element by element, any stride and any count
};

// Why runs of `count` elements along axis `along` of a tensor cannot be accessed as vectors of up to 16 bytes, or "".
inline std::string why_not_runs(const char* name, const Tensor& t, int along, std::int64_t count) {
  if (!t || t.numel() == 0) return "";
  if (t.shape[along] % count != 0)
    return std::string("needs ") + name + " to have a multiple of " + std::to_string(count) + " elements along its axis " +
           std::to_string(along) + ", got " + std::to_string(t.shape[along]);
  if (t.stride[along] != 1) return std::string("needs ") + name + " to be contiguous along its axis " + std::to_string(along);
  const std::int64_t bytes = std::min<std::int64_t>(count * size_of(t.dtype), 16);
  bool aligned = reinterpret_cast<std::uintptr_t>(t.data) % bytes == 0;
  for (int i = 0; i < t.ndim; ++i)
    aligned = aligned && (i == along || t.shape[i] == 1 || t.stride[i] * size_of(t.dtype) % bytes == 0);
  return aligned ? "" : std::string("needs ") + name + " and its strides aligned to " + std::to_string(bytes) + " bytes";
}

}  // namespace statescan::cuda
