// Vectors of the widest kind that this translation unit may use, on the compiler's vector extensions: the same source serves
// AVX-512, AVX2, SSE2 and NEON. T is float or double.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <statescan/tensor.h>

#if !defined(STATESCAN_ISA_NAMESPACE)
#error "compile kernel files with -DSTATESCAN_ISA_NAMESPACE=..., see isa.h"
#endif
#define STATESCAN_INLINE [[gnu::always_inline]] inline

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef std::uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VecTypes<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef std::uint64_t U __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VecTypes<T>::V;
template <class T>
using IntVec = typename VecTypes<T>::I;

template <class T>
STATESCAN_INLINE Vec<T> splat(T v) {
  return v - Vec<T>{};  // v - 0 keeps every value, -0 and NaN included
}

template <class T>
STATESCAN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
STATESCAN_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n lanes (0 <= n < kLanes); the others are zero.
template <class T>
STATESCAN_INLINE Vec<T> load_first(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  else return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
#else
  alignas(kVectorBytes) T lanes[kLanes<T>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load<T>(lanes);
#endif
}

template <class T>
STATESCAN_INLINE void store_first(T* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  else _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
#else
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// a b + c in one rounding where the machine can; written out where bits must not depend on which product of a sum the
// compiler fuses.
STATESCAN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

STATESCAN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

template <class T>
STATESCAN_INLINE T sum_lanes(Vec<T> v) {
  // Halves added pairwise: a fixed order, whatever the width.
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class To, class From>
STATESCAN_INLINE To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

// v limited to [low, high]; NaN stays NaN, since the x86 instructions return their second operand when one is NaN. In this form
// it is two instructions where compares and selects are four.
template <class T>
STATESCAN_INLINE Vec<T> clamp(Vec<T> v, T low_limit, T high_limit) {
  const Vec<T> low = splat(low_limit), high = splat(high_limit);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return bits_as<Vec<T>>(_mm512_min_ps(bits_as<__m512>(high), _mm512_max_ps(bits_as<__m512>(low), bits_as<__m512>(v))));
  else
    return bits_as<Vec<T>>(_mm512_min_pd(bits_as<__m512d>(high), _mm512_max_pd(bits_as<__m512d>(low), bits_as<__m512d>(v))));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return bits_as<Vec<T>>(_mm256_min_ps(bits_as<__m256>(high), _mm256_max_ps(bits_as<__m256>(low), bits_as<__m256>(v))));
  else
    return bits_as<Vec<T>>(_mm256_min_pd(bits_as<__m256d>(high), _mm256_max_pd(bits_as<__m256d>(low), bits_as<__m256d>(v))));
#else
  return v < low ? low : (v > high ? high : v);
#endif
}

// v * 2^n, n integers in a range that one normal factor may not cover. `shifted` is n + 1.5 * 2^(mantissa bits), which holds n
// in its low bits: AVX-512 scales by it in one instruction, others in two factors, so that neither under- nor overflows alone.
template <class T>
STATESCAN_INLINE Vec<T> scale_by_power(Vec<T> v, [[maybe_unused]] Vec<T> n, [[maybe_unused]] Vec<T> shifted) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return bits_as<Vec<T>>(_mm512_scalef_ps(bits_as<__m512>(v), bits_as<__m512>(n)));
  else return bits_as<Vec<T>>(_mm512_scalef_pd(bits_as<__m512d>(v), bits_as<__m512d>(n)));
#else
  using I = IntVec<T>;
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  const I integer = bits_as<I>(shifted) - bits_as<I>(splat(sizeof(T) == 4 ? T(12582912) : T(6755399441055744)));
  const I half = integer >> 1;
  return v * bits_as<Vec<T>>((half + kBias) << kMantissa) * bits_as<Vec<T>>((integer - half + kBias) << kMantissa);
#endif
}

// exp(v) to about 1 ulp: v = k ln2 + r with |r| <= ln2/2, exp(r) = 1 + r + r^2 q(r), q a minimax polynomial (float) or the
// Taylor series (double). Underflows gradually, overflows to infinity, keeps NaN.
STATESCAN_INLINE Vec<float> exp(Vec<float> v) {
  using V = Vec<float>;
  const V x = clamp<float>(v, -105.0f, 89.0f);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const V shifted = x * 1.44269504f + kRound;
  const V k = shifted - kRound;
  V r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  V q = r * 1.3814608100801706e-3f + 8.3687109872698784e-3f;
  q = q * r + 4.166838899254799e-2f;
  q = q * r + 1.6666521131992340e-1f;
  q = q * r + 4.9999994039535522e-1f;
  return scale_by_power<float>((q * r) * r + r + 1.0f, k, shifted);
}

STATESCAN_INLINE Vec<double> exp(Vec<double> v) {
  using V = Vec<double>;
  const V x = clamp<double>(v, -746.0, 710.0);
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const V shifted = x * 1.4426950408889634 + kRound;
  const V k = shifted - kRound;
  V r = x - k * 6.93147180369123816490e-1;
  r = r - k * 1.90821492927058770002e-10;
  V q = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  return scale_by_power<double>((q * r) * r + r + 1.0, k, shifted);
}

// log(1 + u) for 0 <= u <= 1 as 2 atanh(s), s = u / (2 + u): accurate however small u is.
STATESCAN_INLINE Vec<float> log1p_unit(Vec<float> u) {
  const Vec<float> s = u / (u + 2.0f), t = s * s;
  Vec<float> g = t * 1.2150469422340393e-1f + 1.0713828355073929e-1f;
  g = g * t + 1.4308442175388336e-1f;
  g = g * t + 1.9999438524246216e-1f;
  g = g * t + 3.3333337306976318e-1f;
  return 2.0f * (s * (t * g) + s);
}

STATESCAN_INLINE Vec<double> log1p_unit(Vec<double> u) {
  const Vec<double> s = u / (u + 2.0), t = s * s;
  Vec<double> g = splat(1.0 / 35.0);
  for (int k = 33; k >= 3; k -= 2) g = g * t + 1.0 / k;
  return 2.0 * (s * (t * g) + s);
}

// The vector forms of statescan/math.h.
template <class T>
STATESCAN_INLINE Vec<T> softplus(Vec<T> v) {
  const Vec<T> zero{}, magnitude = v < zero ? -v : v;
  return (v > zero ? v : zero) + log1p_unit(exp(-magnitude));
}

template <class T>
STATESCAN_INLINE Vec<T> sigmoid(Vec<T> v) {
  return T(1) / (exp(-v) + T(1));
}

template <class T>
STATESCAN_INLINE Vec<T> silu(Vec<T> v) {
  return v / (exp(-v) + T(1));
}

template <class T>
STATESCAN_INLINE Vec<T> discretise(Vec<T> dt, Vec<T> dt_bias, bool dt_softplus, T dt_min, T dt_max) {
  dt = dt + dt_bias;
  if (dt_softplus) dt = softplus<T>(dt);
  return clamp<T>(dt, dt_min, dt_max);
}

// Bit conversions of the 16-bit types; half by bits because a compiler's _Float16 would need a newer C library.
STATESCAN_INLINE float bfloat16_to_float(std::uint16_t h) { return bits_as<float>(std::uint32_t(h) << 16); }

STATESCAN_INLINE std::uint16_t float_to_bfloat16(float f) {
  const std::uint32_t u = bits_as<std::uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

STATESCAN_INLINE float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  const float scaled = bits_as<float>(magnitude << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent bias
  return bits_as<float>(sign | bits_as<std::uint32_t>(scaled));
}

STATESCAN_INLINE std::uint16_t float_to_half(float f) {
  const std::uint32_t u = bits_as<std::uint32_t>(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds past the largest half
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_as<std::uint32_t>(shifted) - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// One element of memory of any real dtype, as T and back.
template <class T>
STATESCAN_INLINE T load_element(const void* p, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::float32: return static_cast<T>(static_cast<const float*>(p)[index]);
    case DType::float64: return static_cast<T>(static_cast<const double*>(p)[index]);
    case DType::float16: return static_cast<T>(half_to_float(static_cast<const std::uint16_t*>(p)[index]));
    case DType::bfloat16: return static_cast<T>(bfloat16_to_float(static_cast<const std::uint16_t*>(p)[index]));
    default: return T(0);
  }
}

template <class T>
STATESCAN_INLINE void store_element(void* p, DType dtype, std::int64_t index, T v) {
  switch (dtype) {
    case DType::float32: static_cast<float*>(p)[index] = static_cast<float>(v); break;
    case DType::float64: static_cast<double*>(p)[index] = static_cast<double>(v); break;
    case DType::float16: static_cast<std::uint16_t*>(p)[index] = float_to_half(static_cast<float>(v)); break;
    case DType::bfloat16: static_cast<std::uint16_t*>(p)[index] = float_to_bfloat16(static_cast<float>(v)); break;
    default: break;
  }
}

// How a dtype lies in memory.
template <DType kDType>
struct MemoryOf {
  using Type = std::uint16_t;  // the 16-bit floats
};
template <>
struct MemoryOf<DType::float32> {
  using Type = float;
};
template <>
struct MemoryOf<DType::float64> {
  using Type = double;
};
template <DType kDType>
using Memory = typename MemoryOf<kDType>::Type;

template <class T>
inline constexpr DType kDTypeOf = sizeof(T) == 4 ? DType::float32 : DType::float64;

// One vector of consecutive elements of a known dtype, as T and back: T's own dtype, or a 16-bit float with T = float.
template <class T, DType kDType>
STATESCAN_INLINE Vec<T> load_as(const Memory<kDType>* p) {
  if constexpr (kDType == kDTypeOf<T>) {
    return load<T>(p);
  } else {
    static_assert(sizeof(T) == 4 && (kDType == DType::bfloat16 || kDType == DType::float16));
    using U = VecTypes<float>::U;
#if defined(__AVX512F__)
    if constexpr (kDType == DType::float16)
      return bits_as<Vec<T>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    if constexpr (kDType == DType::float16)
      return bits_as<Vec<T>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
    VecTypes<float>::Half h;
    std::memcpy(&h, p, sizeof h);
    const U u = __builtin_convertvector(h, U);
    if constexpr (kDType == DType::bfloat16) return bits_as<Vec<T>>(u << 16);
    const U sign = (u & 0x8000u) << 16, magnitude = u & 0x7fffu;
    const Vec<T> scaled = bits_as<Vec<T>>(magnitude << 13) * 5.192296858534828e33f;
    const U finite = bits_as<U>(scaled), special = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    return bits_as<Vec<T>>(sign | (magnitude >= 0x7c00u ? special : finite));
  }
}

template <class T, DType kDType>
STATESCAN_INLINE void store_as(Memory<kDType>* p, Vec<T> v) {
  if constexpr (kDType == kDTypeOf<T>) {
    store<T>(p, v);
  } else if constexpr (kDType == DType::bfloat16) {
    using Half = VecTypes<float>::Half;
    using U = VecTypes<float>::U;
    const U u = bits_as<U>(v);
    const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
    const Half h = __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Half);
    std::memcpy(p, &h, sizeof h);
  } else {
    static_assert(sizeof(T) == 4 && kDType == DType::float16);
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    alignas(kVectorBytes) float lanes[kLanes<T>];
    store<T>(lanes, v);
    for (int i = 0; i < kLanes<T>; ++i) p[i] = float_to_half(lanes[i]);
#endif
  }
}

// The whole vectors of a contiguous run; both return how many elements they moved. Of T's own dtype as well: the memcpy of some
// C libraries takes twice as long for 32 KB, with the instruction that moves strings.
template <class T, DType kDType>
STATESCAN_INLINE std::int64_t load_vectors(T* to, const void* from, std::int64_t first, std::int64_t count) {
  const auto* p = static_cast<const Memory<kDType>*>(from) + first;
  std::int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, load_as<T, kDType>(p + i));
  return i;
}

template <class T, DType kDType>
STATESCAN_INLINE std::int64_t store_vectors(void* to, std::int64_t first, std::int64_t count, const T* from) {
  auto* p = static_cast<Memory<kDType>*>(to) + first;
  std::int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_as<T, kDType>(p + i, load<T>(from + i));
  return i;
}

// A run of elements, one stride apart, converted to T and back. `p` is the tensor's data, `first` the index of the run's first
// element. These are where a kernel meets dtypes and strides: beyond them it sees contiguous T alone.
template <class T>
inline void load_row(T* to, const void* p, DType dtype, std::int64_t first, std::int64_t stride, std::int64_t count) {
  std::int64_t i = 0;
  if (stride == 1 && dtype == kDTypeOf<T>) i = load_vectors<T, kDTypeOf<T>>(to, p, first, count);
  if constexpr (sizeof(T) == 4) {
    if (stride == 1 && dtype == DType::bfloat16) i = load_vectors<T, DType::bfloat16>(to, p, first, count);
    if (stride == 1 && dtype == DType::float16) i = load_vectors<T, DType::float16>(to, p, first, count);
  }
  for (; i < count; ++i) to[i] = load_element<T>(p, dtype, first + i * stride);
}

template <class T>
inline void store_row(void* p, DType dtype, std::int64_t first, std::int64_t stride, std::int64_t count, const T* from) {
  std::int64_t i = 0;
  if (stride == 1 && dtype == kDTypeOf<T>) i = store_vectors<T, kDTypeOf<T>>(p, first, count, from);
  if constexpr (sizeof(T) == 4) {
    if (stride == 1 && dtype == DType::bfloat16) i = store_vectors<T, DType::bfloat16>(p, first, count, from);
    if (stride == 1 && dtype == DType::float16) i = store_vectors<T, DType::float16>(p, first, count, from);
  }
  for (; i < count; ++i) store_element<T>(p, dtype, first + i * stride, from[i]);
}

// The element offset of t at its first axes; the rest of the axes are at 0. Sums in int64.
template <class... Index>
STATESCAN_INLINE std::int64_t offset_of(const Tensor& t, Index... index) {
  const std::int64_t at[] = {static_cast<std::int64_t>(index)...};
  std::int64_t offset = 0;
  for (int i = 0; i < static_cast<int>(sizeof...(Index)); ++i) offset += at[i] * t.stride[i];
  return offset;
}

// The scratch memory of one call, handed out in pieces aligned to 64 bytes. With null memory it only counts, so that the same
// code that lays out the pieces tells workspace_bytes.
class Arena {
 public:
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}

  template <class T>
  STATESCAN_INLINE T* take(std::int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
