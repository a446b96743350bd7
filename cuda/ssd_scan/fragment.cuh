// Operands of mma.sync.m16n8k16, from shared memory and from floats. Lane (g, t) = (lane / 4, lane % 4) holds
//   A [16,16]  a0 (g, 2t..)  a1 (g+8, 2t..)  a2 (g, 2t+8..)  a3 (g+8, 2t+8..)     two bfloat16 each
//   B [16,8]   b0 (2t.., g)  b1 (2t+8.., g)
//   sum [16,8] c0 c1 (g, 2t..)  c2 c3 (g+8, 2t..)
// So what two sums [16,8] side by side hold is, once rounded, an A [16,16], or the B of two products.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "../common/vector.cuh"

namespace statescan::ssd_scan {

using Bits = std::uint32_t;  // two bfloat16

inline __device__ int lane_id() { return threadIdx.x % 32; }

// A matrix of bfloat16 in shared memory, one plane for each term. Rows are padded by 16 bytes, which puts any 8 rows of a
// column block into different banks.
template <int kRows, int kColumns, int kTerms>
struct Tile {
  static constexpr int kStride = kColumns + 8;
  static constexpr int kPlane = kRows * kStride;
  static constexpr int kBytes = kTerms * kPlane * 2;

  std::uint16_t* data;

  __device__ std::uint16_t* at(int term, int row, int column) const { return data + term * kPlane + row * kStride + column; }
};

// [16,16] at (row, column): r0 (0..7, 0..7), r1 (8..15, 0..7), r2 (0..7, 8..15), r3 (8..15, 8..15). As an A operand, or with
// rows and columns swapped (r1 for r2) as the B of products with the transpose.
inline __device__ void load_matrix(const std::uint16_t* tile, int stride, Bits (&r)[4]) {
  const std::uint16_t* from = tile + lane_id() % 16 * stride + lane_id() / 16 * 8;
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(from), r[0], r[1], r[2], r[3]);
}

// The same, each 8x8 block transposed: lane (g, t) holds rows 2t.. of column g.
inline __device__ void load_transposed(const std::uint16_t* tile, int stride, Bits (&r)[4]) {
  const std::uint16_t* from = tile + lane_id() % 16 * stride + lane_id() / 16 * 8;
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(from), r[0], r[1], r[2], r[3]);
}

inline __device__ void multiply_add(float (&sum)[4], const Bits (&a)[4], Bits b0, Bits b1) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(sum[0], sum[1], sum[2], sum[3], a[0], a[1], a[2], a[3], b0, b1, sum[0], sum[1],
                                            sum[2], sum[3]);
}

// Of factors with so many terms, whether the product of term i of one and term j of the other counts.
template <int kTermsOfA, int kTermsOfB>
inline constexpr __device__ bool counts(int i, int j) {
  return i + j < (kTermsOfA > kTermsOfB ? kTermsOfA : kTermsOfB);
}

// Two floats as sums of terms.
template <int kTerms>
__device__ void split(float v0, float v1, Bits (&terms)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const float pair[2] = {v0, v1};
    terms[i] = cuda::narrow_word<__nv_bfloat16>(pair);
    if (i + 1 == kTerms) break;
    v0 -= __uint_as_float(terms[i] << 16);
    v1 -= __uint_as_float(terms[i] & 0xffff0000u);
  }
}

template <int kTerms>
__device__ float2 join(const Bits (&terms)[kTerms]) {
  float2 v = {0.0f, 0.0f};
#pragma unroll
  for (int i = kTerms; i-- > 0;) {  // the small ones first
    v.x += __uint_as_float(terms[i] << 16);
    v.y += __uint_as_float(terms[i] & 0xffff0000u);
  }
  return v;
}

}  // namespace statescan::ssd_scan
