// Gate and RMSNorm of one row: shared by gated_rms_norm, the scans' gates and the Mamba-2 block ops.
#pragma once

#include "simd.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// Offset of row `row`, counted over all leading axes of t.
inline std::int64_t row_offset(const Tensor& t, std::int64_t row) {
  std::int64_t offset = 0;
  for (int axis = t.ndim - 2; axis >= 0; --axis) {
    offset += row % t.shape[axis] * t.stride[axis];
    row /= t.shape[axis];
  }
  return offset;
}

inline bool has_contiguous_rows(const Tensor& t) { return t.stride[t.ndim - 1] == 1; }

// Whole vectors of [0, count) through whole(i), what is left through part(i, lanes).
template <class T, class Whole, class Part>
STATESCAN_INLINE void for_vectors(std::int64_t count, Whole&& whole, Part&& part) {
  std::int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) whole(i);
  if (i < count) part(i, static_cast<int>(count - i));
}

// y = x silu(z).
template <class T>
inline void gate_row(T* y, const T* x, const T* z, std::int64_t count) {
  for_vectors<T>(
      count, [&](std::int64_t i) { store<T>(y + i, load<T>(x + i) * silu<T>(load<T>(z + i))); },
      [&](std::int64_t i, int n) { store_first<T>(y + i, load_first<T>(x + i, n) * silu<T>(load_first<T>(z + i, n)), n); });
}

// The first n lanes of load_as and store_as.
template <class T, DType kDType>
STATESCAN_INLINE Vec<T> load_first_as(const Memory<kDType>* p, int n) {
  alignas(kVectorBytes) Memory<kDType> lanes[kLanes<T>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load_as<T, kDType>(lanes);
}

template <class T, DType kDType>
STATESCAN_INLINE void store_first_as(Memory<kDType>* p, Vec<T> v, int n) {
  alignas(kVectorBytes) Memory<kDType> lanes[kLanes<T>];
  store_as<T, kDType>(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// The two passes over a group of channels: squares are added in the first, the second scales. Each reads its inputs from
// memory as they lie; what the gate made in the first is kept in `gated`.
template <class T, DType kX, DType kZ, DType kY>
struct NormGroup {
  Memory<kY>* y;
  const Memory<kX>* x;
  const Memory<kZ>* z;  // null: no gate
  const T* weight;
  T* gated;
  std::int64_t count;
  bool norm_before_gate;

  // Adds the squares in four running vectors: one alone would wait for its own additions. The lines of y are fetched
  // meanwhile, since the second pass has too little arithmetic to hide their way from memory.
  STATESCAN_INLINE T sum_of_squares() const {
    const bool gate = z && !norm_before_gate;
    Vec<T> sum[4] = {};
    auto add = [&](int j, Vec<T> v) { sum[j] = sum[j] + v * v; };
    auto whole = [&](std::int64_t i) {
      __builtin_prefetch(y + i, 1);
      const Vec<T> v = load_as<T, kX>(x + i);
      if (!gate) return v;
      const Vec<T> product = v * silu<T>(load_as<T, kZ>(z + i));
      store<T>(gated + i, product);
      return product;
    };
    std::int64_t i = 0;
    for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>)
      for (int j = 0; j < 4; ++j) add(j, whole(i + j * kLanes<T>));
    for_vectors<T>(
        count - i, [&](std::int64_t k) { add(0, whole(i + k)); },
        [&](std::int64_t k, int n) {
          Vec<T> v = load_first_as<T, kX>(x + i + k, n);
          if (gate) {
            v = v * silu<T>(load_first_as<T, kZ>(z + i + k, n));
            store_first<T>(gated + i + k, v, n);
          }
          add(1, v);
        });
    return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // y = v scale weight, v being x or what the gate made of it; kGateLast multiplies by silu(z).
  template <bool kGated, bool kGateLast>
  STATESCAN_INLINE void scale_by(T scale) const {
    for_vectors<T>(
        count,
        [&](std::int64_t i) {
          Vec<T> v = (kGated ? load<T>(gated + i) : load_as<T, kX>(x + i)) * scale * load<T>(weight + i);
          if (kGateLast) v = v * silu<T>(load_as<T, kZ>(z + i));
          store_as<T, kY>(y + i, v);
        },
        [&](std::int64_t i, int n) {
          Vec<T> v = (kGated ? load_first<T>(gated + i, n) : load_first_as<T, kX>(x + i, n)) * scale;
          v = v * load_first<T>(weight + i, n);
          if (kGateLast) v = v * silu<T>(load_first_as<T, kZ>(z + i, n));
          store_first_as<T, kY>(y + i, v, n);
        });
  }

  void run(double eps) const {
    const double mean = static_cast<double>(sum_of_squares()) / static_cast<double>(count);
    const T scale = static_cast<T>(1.0 / __builtin_sqrt(mean + eps));
    if (!z) return scale_by<false, false>(scale);
    norm_before_gate ? scale_by<false, true>(scale) : scale_by<true, false>(scale);
  }
};

// y = rms(x) weight silu(z) with norm_before_gate, else rms(x silu(z)) weight, the mean square taken over each group_size of
// `count` channels. z may be null (no gate); y may be x or z; `gated`, scratch of `count`, may be y where y is T.
template <class T, DType kX, DType kZ, DType kY>
inline void gated_norm_row(Memory<kY>* y, const Memory<kX>* x, const Memory<kZ>* z, const T* weight, T* gated,
                           std::int64_t count, std::int64_t group_size, double eps, bool norm_before_gate) {
  for (std::int64_t g = 0; g < count; g += group_size)
    NormGroup<T, kX, kZ, kY>{y + g, x + g, z ? z + g : nullptr, weight + g, gated + g, group_size, norm_before_gate}.run(eps);
}

// The same on rows of T.
template <class T>
inline void gated_norm_row(T* y, const T* x, const T* z, const T* weight, std::int64_t count, std::int64_t group_size,
                           double eps, bool norm_before_gate) {
  gated_norm_row<T, kDTypeOf<T>, kDTypeOf<T>, kDTypeOf<T>>(y, x, z, weight, y, count, group_size, eps, norm_before_gate);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
