#pragma once

namespace statescan::cuda {

inline constexpr int kScaledTogether = 64;  // halves with one exponent in memory (scaled.cuh)

}  // namespace statescan::cuda
