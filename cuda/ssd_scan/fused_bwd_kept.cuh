// States and adjoints as the walks keep them for the main kernel: 16 bits a value, in fixed point.
//
// Of a row of a tile of 64 x 64, values are multiples of 2^-15 of a power of two above them all, which a byte keeps: the biased
// exponent of a float. That loses 5e-5 of a row, a thirtieth of what rounding to bfloat16 does, so that a state which the main
// kernel goes on from is as good as one that was never kept. A row that holds an infinity or NaN comes back as NaN. States that
// the forward kept are elements, whose rounding is that of a matrix operand.
#pragma once

#include <type_traits>

#include "fused_kernel.cuh"

namespace statescan::ssd_scan::fused {

// 2^23 + 2^15: from here on floats count in ones, and the lower half of their bits with them.
inline constexpr float kFixedZero = 8421376.0f;

inline __device__ float max_or_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// The byte of a row of these sizes: NaN makes it 255. A little is added since what rounds up to the power would not fit.
inline __device__ std::uint32_t exponent_above(float most) { return max(__float_as_uint(most * 1.00002f) >> 23, 15u); }

inline __device__ std::uint32_t to_fixed_point(float a, float b, std::uint32_t exponent) {
  const float scale = __uint_as_float((268 - exponent) << 23);
  return __byte_perm(__float_as_uint(fmaf(a, scale, kFixedZero)), __float_as_uint(fmaf(b, scale, kFixedZero)), 0x5410);
}

// What one is worth.
inline __device__ float unit_of(std::uint32_t exponent) {
  return __uint_as_float(exponent == 255 ? 0x7fffffffu : (exponent - 14) << 23);
}

inline __device__ void from_fixed_point(std::uint32_t word, float (&count)[2]) {
  count[0] = __uint_as_float(__byte_perm(word, 0x4b00, 0x5410)) - kFixedZero;
  count[1] = __uint_as_float(__byte_perm(word, 0x4b00, 0x5432)) - kFixedZero;
}

// An element is worth itself.
inline constexpr std::uint8_t kExponentOfElements = 127 + 14;

// Of words of either kind, by the same instructions where elements are bfloat16, the upper half of a float.
template <class NativeElement>
__device__ void read_kept(std::uint32_t word, bool are_elements, float (&count)[2]) {
  if constexpr (std::is_same_v<NativeElement, __nv_bfloat16>) {
    const float zero = are_elements ? 0.0f : kFixedZero;
    count[0] = __uint_as_float(__byte_perm(word, 0x4b00, are_elements ? 0x1044 : 0x5410)) - zero;
    count[1] = __uint_as_float(__byte_perm(word, 0x4b00, are_elements ? 0x3244 : 0x5432)) - zero;
  } else {
    float element[2];
    cuda::widen_word<NativeElement>(word, element);
    from_fixed_point(word, count);
    if (are_elements) count[0] = element[0], count[1] = element[1];
  }
}

}  // namespace statescan::ssd_scan::fused
