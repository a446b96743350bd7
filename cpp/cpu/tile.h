// Tiles: a [rows][columns] piece of a strided tensor of any real dtype, as contiguous T in scratch memory and back. A kernel
// that loads its tiles here serves every layout: rows are copied when columns lie side by side in memory, blocks are
// transposed in registers when rows do.
#pragma once

#include <utility>

#include "simd.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// Exchanges the blocks of kStep x kStep across the diagonal of one pair of rows.
template <class T, int kStep, int... kLane>
STATESCAN_INLINE void exchange(Vec<T>& low, Vec<T>& high, std::integer_sequence<int, kLane...>) {
  const Vec<T> a = low, b = high;
  low = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes<T> + kLane - kStep : kLane)...);
  high = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes<T> + kLane : kLane + kStep)...);
}

template <class T, int kStep = kLanes<T> / 2>
STATESCAN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    if (!(i & kStep)) exchange<T, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes<T>>());
  if constexpr (kStep > 1) transpose<T, kStep / 2>(rows);
}

// Lane i of the result is the sum of the lanes of rows[i], in one order for all.
template <class T>
STATESCAN_INLINE Vec<T> sum_rows(Vec<T> (&rows)[kLanes<T>]) {
  transpose<T>(rows);
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = rows[i] + rows[i + width];
  return rows[0];
}

// Element (r, c) of a tile lies at data[first + r * row_stride + c * column_stride] and, in scratch, at [r * pitch + c].
struct TileView {
  void* data;
  DType dtype;
  std::int64_t first, row_stride, column_stride;
};

// Reads a tile and fills columns..pitch with zeros, so that the last vector of a row is whole.
template <class T>
inline void load_tile(T* to, std::int64_t pitch, const TileView& from, std::int64_t rows, std::int64_t columns) {
  constexpr int kL = kLanes<T>;
  if (from.row_stride == 1 && from.column_stride != 1 && rows >= kL / 2) {
    alignas(kVectorBytes) T block[kL * kL];
    for (std::int64_t c = 0; c < pitch; c += kL) {
      for (std::int64_t r = 0; r < rows; r += kL) {  // along memory
        const std::int64_t count = rows - r < kL ? rows - r : kL;
        Vec<T> lanes[kL];
        if (from.dtype == kDTypeOf<T> && count == kL && c + kL <= columns) {
          const T* corner = static_cast<const T*>(from.data) + from.first + r + c * from.column_stride;
#pragma GCC unroll 16
          for (int i = 0; i < kL; ++i) lanes[i] = load<T>(corner + i * from.column_stride);
        } else {
          for (int i = 0; i < kL; ++i) {
            if (count < kL || c + i >= columns) store<T>(block + i * kL, Vec<T>{});
            if (c + i < columns)
              load_row<T>(block + i * kL, from.data, from.dtype, from.first + r + (c + i) * from.column_stride, 1, count);
          }
#pragma GCC unroll 16
          for (int i = 0; i < kL; ++i) lanes[i] = load<T>(block + i * kL);
        }
        transpose<T>(lanes);
        const std::int64_t room = pitch - c;
        for (int i = 0; i < kL; ++i) {
          if (i >= count) break;
          room >= kL ? store<T>(to + (r + i) * pitch + c, lanes[i]) : store_first<T>(to + (r + i) * pitch + c, lanes[i], room);
        }
      }
    }
    return;
  }
  if (pitch == columns && from.column_stride == 1 && from.row_stride == columns) {
    load_row<T>(to, from.data, from.dtype, from.first, 1, rows * columns);
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    load_row<T>(to + r * pitch, from.data, from.dtype, from.first + r * from.row_stride, from.column_stride, columns);
    for (std::int64_t c = columns; c < pitch; ++c) to[r * pitch + c] = T(0);
  }
}

// Writes the first `columns` of each row; `from` has pitch a multiple of the vector.
template <class T>
inline void store_tile(const TileView& to, std::int64_t rows, std::int64_t columns, const T* from, std::int64_t pitch) {
  constexpr int kL = kLanes<T>;
  if (to.row_stride == 1 && to.column_stride != 1 && rows >= kL / 2) {
    alignas(kVectorBytes) T block[kL * kL];
    for (std::int64_t r = 0; r < rows; r += kL) {
      const std::int64_t count = rows - r < kL ? rows - r : kL;
      for (std::int64_t c = 0; c < columns; c += kL) {
        Vec<T> lanes[kL];
        for (int i = 0; i < kL; ++i) lanes[i] = load<T>(from + (r + (i < count ? i : 0)) * pitch + c);
        transpose<T>(lanes);
        for (int i = 0; i < kL; ++i) store<T>(block + i * kL, lanes[i]);
        const std::int64_t width = columns - c < kL ? columns - c : kL;
        for (std::int64_t i = 0; i < width; ++i)
          store_row<T>(to.data, to.dtype, to.first + r + (c + i) * to.column_stride, 1, count, block + i * kL);
      }
    }
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r)
    store_row<T>(to.data, to.dtype, to.first + r * to.row_stride, to.column_stride, columns, from + r * pitch);
}

// Part 0 (real) or 1 (imaginary) of a complex tensor, or part 0 of a real one, as a view of real elements.
inline TileView tile_view(const Tensor& t, int part, std::int64_t first, std::int64_t row_stride, std::int64_t column_stride) {
  if (!is_complex(t.dtype)) return {t.data, t.dtype, first, row_stride, column_stride};
  const DType real = t.dtype == DType::complex64 ? DType::float32 : DType::float64;
  return {t.data, real, 2 * first + part, 2 * row_stride, 2 * column_stride};
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
