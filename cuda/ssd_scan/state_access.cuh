// States in memory, two columns at a time.
#pragma once

#include "../common/element.cuh"
#include "params.h"

namespace statescan::ssd_scan {

// Two columns of a state; `left`: how many there are from the first on. Zeros for what is not there. kPairs: what t.pairs says.
template <bool kPairs>
__device__ float2 load_pair(const char* from, const StateView& t, std::int64_t left) {
  float2 v = {0.0f, 0.0f};
  if constexpr (kPairs) {
    if (left > 0) v = *reinterpret_cast<const float2*>(from);
  } else {
    if (left > 0) v.x = cuda::load_element(from, t.dtype);
    if (left > 1) v.y = cuda::load_element(from + t.column, t.dtype);
  }
  return v;
}

template <bool kPairs>
__device__ void store_pair(char* to, const StateView& t, std::int64_t left, float2 v) {
  if constexpr (kPairs) {
    if (left > 0) *reinterpret_cast<float2*>(to) = v;
  } else {
    if (left > 0) cuda::store_element(to, t.dtype, v.x);
    if (left > 1) cuda::store_element(to + t.column, t.dtype, v.y);
  }
}

}  // namespace statescan::ssd_scan
