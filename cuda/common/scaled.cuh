// bfloat16 results on their way from one kernel to the next: halves, which keep 11 significant bits instead of 8. Where the
// largest of some lies outside of what halves hold well, they share an exponent that brings it there; what is smaller than
// 2^-28 of it loses its bits one by one.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include "scaled.h"

namespace statescan::cuda {

// The larger magnitudes of two words' halves. A NaN counts as nothing beside a number.
inline __device__ std::uint32_t larger_halves(std::uint32_t magnitudes, std::uint32_t word) {
  const __half2 larger =
      __hmax2(*reinterpret_cast<const __half2*>(&magnitudes), __habs2(*reinterpret_cast<const __half2*>(&word)));
  return *reinterpret_cast<const std::uint32_t*>(&larger);
}

// Whether halves, of these largest magnitudes, lose nothing that counts: the rest of 2^-12 is rounded to 2^-25.
inline __device__ bool fit_halves(std::uint32_t magnitudes) {
  constexpr std::uint32_t kSmallest = 0x0c00, kInfinity = 0x7c00;
  const std::uint32_t largest = max(magnitudes & 0xffff, magnitudes >> 16);
  return largest >= kSmallest && largest < kInfinity;
}

// A power of two by its biased exponent.
inline __device__ float power_of_2(std::uint32_t exponent) { return __uint_as_float(exponent << 23); }

// The larger magnitude; NaN if one is.
inline __device__ float larger_magnitude(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(a)), "f"(fabsf(b)));
  return result;
}

// Of a magnitude, biased; 255 where it is not finite.
inline __device__ std::uint32_t exponent_of(float magnitude) { return __float_as_uint(magnitude) >> 23; }

// The exponent that some share, by that of the largest. 255: all of them are NaN.
inline __device__ std::uint32_t shared_exponent(std::uint32_t largest) { return max(largest, 15u); }

// In memory zero stands for halves as they are.
inline constexpr std::uint32_t kNoScale = 141;
inline __device__ std::uint8_t stored_exponent(std::uint32_t exponent) {
  return static_cast<std::uint8_t>(exponent ^ kNoScale);
}

// Brings the largest between 2^14 and 2^15, and back.
inline __device__ float scale_down(std::uint32_t exponent) { return power_of_2(127 + kNoScale - exponent); }
inline __device__ float scale_up(std::uint8_t stored) {
  const std::uint32_t exponent = stored ^ kNoScale;
  return exponent == 255 ? __uint_as_float(0x7fffffffu) : power_of_2(exponent - (kNoScale - 127));
}

}  // namespace statescan::cuda
