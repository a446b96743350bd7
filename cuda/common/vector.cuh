// Element types, and vectors of them that move as single 8- or 16-byte accesses.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <statescan/tensor.h>

namespace statescan::cuda {

template <DType dtype> struct ElementOf;
template <> struct ElementOf<DType::float32> { using type = float; };
template <> struct ElementOf<DType::float16> { using type = __half; };
template <> struct ElementOf<DType::bfloat16> { using type = __nv_bfloat16; };

// Words rather than elements: a vector on its way from memory stays in the registers that the load fills. As an array of 16-bit
// elements the compiler takes it apart right after the load, and so waits for it there.
template <class Element, int kCount>
struct alignas(kCount * sizeof(Element) < 16 ? kCount * sizeof(Element) : 16) Vector {
  static_assert(kCount * sizeof(Element) % 4 == 0);
  std::uint32_t word[kCount * sizeof(Element) / 4];
};

inline __device__ std::uint32_t bits_of(float v) { return __float_as_uint(v); }
inline __device__ std::uint32_t bits_of(__half v) { return __half_as_ushort(v); }
inline __device__ std::uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }

template <class Element, int kCount>
__device__ void set_element(Vector<Element, kCount>& v, int i, Element value) {
  if constexpr (sizeof(Element) == 4) {
    v.word[i] = bits_of(value);
  } else {
    const int shift = i % 2 * 16;
    v.word[i / 2] = (v.word[i / 2] & ~(0xffffu << shift)) | bits_of(value) << shift;
  }
}

template <class Element, int kCount>
__device__ Element element_of(const Vector<Element, kCount>& v, int i) {
  if constexpr (std::is_same_v<Element, float>) return __uint_as_float(v.word[i]);
  else if constexpr (std::is_same_v<Element, __half>) return __ushort_as_half(v.word[i / 2] >> (i % 2 * 16));
  else return __ushort_as_bfloat16(v.word[i / 2] >> (i % 2 * 16));
}

// The values of a word: one float, or two 16-bit elements.
template <class Element>
__device__ void widen_word(std::uint32_t word, float* values) {
  if constexpr (std::is_same_v<Element, float>) {
    values[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {  // the upper half of a float
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    values[0] = __half2float(__ushort_as_half(word & 0xffffu));
    values[1] = __half2float(__ushort_as_half(word >> 16));
  }
}

template <class Element>
__device__ std::uint32_t narrow_word(const float* values) {
  if constexpr (std::is_same_v<Element, float>) {
    return __float_as_uint(values[0]);
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
}

template <class Element, int kCount>
__device__ void widen(const Vector<Element, kCount>& v, float (&values)[kCount]) {
  constexpr int kPerWord = 4 / sizeof(Element);
#pragma unroll
  for (int i = 0; i < kCount; i += kPerWord) widen_word<Element>(v.word[i / kPerWord], values + i);
}

template <class Element, int kCount>
__device__ Vector<Element, kCount> narrow(const float (&values)[kCount]) {
  constexpr int kPerWord = 4 / sizeof(Element);
  Vector<Element, kCount> v;
#pragma unroll
  for (int i = 0; i < kCount; i += kPerWord) v.word[i / kPerWord] = narrow_word<Element>(values + i);
  return v;
}

template <class Element, int kCount>
__device__ Vector<Element, kCount> load_vector(const Element* from) {
  return *reinterpret_cast<const Vector<Element, kCount>*>(from);
}

template <class Element, int kCount>
__device__ void store_vector(Element* to, const Vector<Element, kCount>& v) {
  *reinterpret_cast<Vector<Element, kCount>*>(to) = v;
}

}  // namespace statescan::cuda
