// Gate and RMSNorm of one row of contiguous T: shared by gated_rms_norm and the Mamba-2 block ops.
#pragma once

#include "simd.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

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

// Sum of squares, in four running vectors: one alone would wait for its own additions.
template <class T>
inline T sum_of_squares(const T* x, std::int64_t count) {
  constexpr std::int64_t kStep = kLanes<T>;
  Vec<T> sum[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kStep <= count; i += 4 * kStep)
    for (int j = 0; j < 4; ++j) {
      const Vec<T> v = load<T>(x + i + j * kStep);
      sum[j] = sum[j] + v * v;
    }
  for_vectors<T>(
      count - i,
      [&](std::int64_t k) {
        const Vec<T> v = load<T>(x + i + k);
        sum[0] = sum[0] + v * v;
      },
      [&](std::int64_t k, int n) {
        const Vec<T> v = load_first<T>(x + i + k, n);
        sum[1] = sum[1] + v * v;
      });
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// y = rms(x) weight silu(z) with norm_before_gate, else rms(x silu(z)) weight, the mean square taken over each group_size of
// `count` channels. z may be null (no gate); y may be x or z; without norm_before_gate y is also scratch.
template <class T>
inline void gated_norm_row(T* y, const T* x, const T* z, const T* weight, std::int64_t count, std::int64_t group_size, double eps,
                           bool norm_before_gate) {
  for (std::int64_t g = 0; g < count; g += group_size) {
    if (z && !norm_before_gate) gate_row<T>(y + g, x + g, z + g, group_size);
    const T* v = z && !norm_before_gate ? y + g : x + g;
    const double mean = static_cast<double>(sum_of_squares<T>(v, group_size)) / static_cast<double>(group_size);
    const T scale = static_cast<T>(1.0 / __builtin_sqrt(mean + eps));
    if (z && norm_before_gate) {
      for_vectors<T>(
          group_size,
          [&](std::int64_t i) {
            store<T>(y + g + i, load<T>(v + i) * scale * load<T>(weight + g + i) * silu<T>(load<T>(z + g + i)));
          },
          [&](std::int64_t i, int n) {
            const Vec<T> normed = load_first<T>(v + i, n) * scale * load_first<T>(weight + g + i, n);
            store_first<T>(y + g + i, normed * silu<T>(load_first<T>(z + g + i, n)), n);
          });
    } else {
      for_vectors<T>(
          group_size, [&](std::int64_t i) { store<T>(y + g + i, load<T>(v + i) * scale * load<T>(weight + g + i)); },
          [&](std::int64_t i, int n) {
            store_first<T>(y + g + i, load_first<T>(v + i, n) * scale * load_first<T>(weight + g + i, n), n);
          });
    }
  }
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
