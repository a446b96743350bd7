// Element types, and vectors of them that move as single 8- or 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <statescan/tensor.h>

namespace statescan::cuda {

template <DType dtype> struct ElementOf;
template <> struct ElementOf<DType::float32> { using type = float; };
template <> struct ElementOf<DType::float16> { using type = __half; };
template <> struct ElementOf<DType::bfloat16> { using type = __nv_bfloat16; };

template <class Element, int kCount>
struct alignas(kCount * sizeof(Element) < 16 ? kCount * sizeof(Element) : 16) Vector {
  Element at[kCount];
};

inline __device__ float widen(float v) { return v; }
inline __device__ float widen(__half v) { return __half2float(v); }
inline __device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class Element> __device__ Element narrow(float v);
template <> inline __device__ float narrow<float>(float v) { return v; }
template <> inline __device__ __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> inline __device__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <class Element, int kCount>
__device__ Vector<Element, kCount> narrow(const float (&values)[kCount]) {
  Vector<Element, kCount> packed;
#pragma unroll
  for (int i = 0; i < kCount; ++i) packed.at[i] = narrow<Element>(values[i]);
  return packed;
}

// For data that is read once: it leaves the caches first.
template <class Element, int kCount>
__device__ Vector<Element, kCount> load_streaming(const Element* from) {
  static_assert(kCount * sizeof(Element) == 16);
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
  return __builtin_bit_cast(Vector<Element, kCount>, raw);
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
