// Elements of a dtype that is known at run time (where it is a constant, the branches fold away). Loads and conversions are
// apart: a load gives bits and waits for nothing, so that a kernel has all its loads on the way before it widens the first.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <statescan/tensor.h>

#include "access.h"

namespace statescan::cuda {

// Of a real dtype that kernels take.
inline constexpr __device__ int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline __device__ std::uint32_t load_bits(const char* from, DType dtype) {
  return dtype == DType::float32 ? *reinterpret_cast<const std::uint32_t*>(from)
                                 : *reinterpret_cast<const std::uint16_t*>(from);
}

inline __device__ float widen_bits(std::uint32_t bits, DType dtype) {
  if (dtype == DType::float32) return __uint_as_float(bits);
  if (dtype == DType::bfloat16) return __uint_as_float(bits << 16);  // the upper half of a float
  return __half2float(__ushort_as_half(static_cast<std::uint16_t>(bits)));
}

// With one branch for all of them.
template <int kCount>
__device__ void widen_bits(const std::uint32_t (&bits)[kCount], DType dtype, float (&values)[kCount]) {
  const auto widen_as = [&](DType of) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = widen_bits(bits[k], of);
  };
  if (dtype == DType::float32) widen_as(DType::float32);
  else if (dtype == DType::bfloat16) widen_as(DType::bfloat16);
  else widen_as(DType::float16);
}

inline __device__ std::uint32_t narrow_bits(float value, DType dtype) {
  if (dtype == DType::float32) return __float_as_uint(value);
  if (dtype == DType::bfloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

inline __device__ float load_element(const char* from, DType dtype) { return widen_bits(load_bits(from, dtype), dtype); }

inline __device__ void store_element(char* to, DType dtype, float value) {
  const std::uint32_t bits = narrow_bits(value, dtype);
  if (dtype == DType::float32) *reinterpret_cast<std::uint32_t*>(to) = bits;
  else *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(bits);
}

// kCount consecutive elements of a tensor as they came from memory; kParts = 2 for complex64, real and imaginary part by turns.
// 16-bit elements lie two a word with Access::vector, else one a word.
template <Access access, int kCount, int kParts = 1>
class Run {
 public:
  static constexpr int kValues = kCount * kParts;

  // `count` elements, `step` bytes from one to the next; zeros after that.
  __device__ void load(const char* from, DType dtype, std::int64_t step, int count) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) word_[i] = 0;
    if constexpr (access == Access::vector) {
      if (count <= 0) return;
      if (kParts == 2 || dtype == DType::float32) load_words<kValues>(from);
      else load_words<kValues / 2>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          word_[i * kParts + part] = load_bits(from + i * step + 4 * part, part_of(dtype));
      }
    }
  }

  __device__ void widen(DType dtype, float (&values)[kValues]) const {
    if (kParts == 2 || dtype == DType::float32) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = __uint_as_float(word_[i]);
    } else if (dtype == DType::bfloat16) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = widen_bits(half_word(i), DType::bfloat16);
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = widen_bits(half_word(i), DType::float16);
    }
  }

  __device__ static void store(char* to, DType dtype, std::int64_t step, int count, const float (&values)[kValues]) {
    if constexpr (access == Access::vector) {
      if (count <= 0) return;
      std::uint32_t words[kValues];
      if (kParts == 2 || dtype == DType::float32) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) words[i] = __float_as_uint(values[i]);
        store_words<kValues>(to, words);
      } else {
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i)
          words[i] = narrow_bits(values[2 * i], dtype) | narrow_bits(values[2 * i + 1], dtype) << 16;
        store_words<kValues / 2>(to, words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          store_element(to + i * step + 4 * part, part_of(dtype), values[i * kParts + part]);
      }
    }
  }

 private:
  static_assert(access == Access::strided || (kCount % 2 == 0 && kValues % 4 == 0));
  std::uint32_t word_[kValues];

  static constexpr __device__ DType part_of(DType dtype) { return kParts == 2 ? DType::float32 : dtype; }

  __device__ std::uint32_t half_word(int i) const {
    return access == Access::vector ? word_[i / 2] >> i % 2 * 16 & 0xffffu : word_[i];
  }

  template <int kWords>
  __device__ void load_words(const char* from) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + 4 * i);
        word_[i] = v.x, word_[i + 1] = v.y, word_[i + 2] = v.z, word_[i + 3] = v.w;
      }
    } else if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      word_[0] = v.x, word_[1] = v.y;
    }
  }

  template <int kWords>
  __device__ static void store_words(char* to, const std::uint32_t (&words)[kValues]) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        *reinterpret_cast<uint4*>(to + 4 * i) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    }
  }
};

// 2^v within 2 ulp; subnormal results are zero.
inline __device__ float fast_exp2(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// 1 / v within 1 ulp; subnormal results are zero.
inline __device__ float fast_reciprocal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// v / (1 + exp(-v)): within 2e-6 of silu(v) relative to itself for |v| below 20, where it is of any size.
inline __device__ float fast_silu(float v) { return v * fast_reciprocal(1.0f + fast_exp2(-1.44269504f * v)); }

// log(1 + exp(v)) within 4e-7 of itself: max(v, 0) + log1p(exp(-|v|)), and log1p(e) = 2 atanh(e / (2 + e)) as a polynomial.
inline __device__ float fast_softplus(float v) {
  constexpr float kLog2e = 1.44269504f, kLog2eTail = 1.92596299e-8f, kLn2 = 0.693147181f;
  const float size = fabsf(v), scaled = size * kLog2e;
  float e = fast_exp2(-scaled);
  e = fmaf(-kLn2 * fmaf(size, kLog2eTail, fmaf(size, kLog2e, -scaled)), e, e);  // what rounding product and constant took off
  const float s = e * fast_reciprocal(2.0f + e), s2 = s * s;
  float q = fmaf(0.1401382f, s2, 0.13999087f);
  q = fmaf(q, s2, 0.20010895f);
  q = fmaf(q, s2, 0.33333205f);
  return fmaxf(v, 0.0f) + 2.0f * fmaf(q * s2, s, s);
}

inline __device__ float fast_sigmoid(float v) { return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * v)); }

// d silu(v) / dv
inline __device__ float fast_dsilu(float v) {
  const float s = fast_sigmoid(v);
  return s * fmaf(v, 1.0f - s, 1.0f);
}

}  // namespace statescan::cuda
