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

// A vector of consecutive elements; the first `count` of them, the others zero.
template <class T>
STATESCAN_INLINE Vec<T> load_run(const void* data, DType dtype, std::int64_t first, int count) {
  if (count == kLanes<T>) {
    if (dtype == kDTypeOf<T>) return load<T>(static_cast<const T*>(data) + first);
    if constexpr (sizeof(T) == 4) {
      const auto* bits = static_cast<const std::uint16_t*>(data) + first;
      return dtype == DType::bfloat16 ? load_as<T, DType::bfloat16>(bits) : load_as<T, DType::float16>(bits);
    }
  }
  alignas(kVectorBytes) T lanes[kLanes<T>] = {};
  load_row<T>(lanes, data, dtype, first, 1, count);
  return load<T>(lanes);
}

template <class T>
STATESCAN_INLINE void store_run(void* data, DType dtype, std::int64_t first, int count, Vec<T> v) {
  if (count == kLanes<T>) {
    if (dtype == kDTypeOf<T>) return store<T>(static_cast<T*>(data) + first, v);
    if constexpr (sizeof(T) == 4) {
      auto* bits = static_cast<std::uint16_t*>(data) + first;
      return dtype == DType::bfloat16 ? store_as<T, DType::bfloat16>(bits, v) : store_as<T, DType::float16>(bits, v);
    }
  }
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store<T>(lanes, v);
  store_row<T>(data, dtype, first, 1, count, lanes);
}

STATESCAN_INLINE int at_most(std::int64_t left, int lanes) { return left < lanes ? static_cast<int>(left) : lanes; }

// Whether to go through registers: rows (not columns) lie side by side, and fill enough of a vector to be worth it.
template <class T>
STATESCAN_INLINE bool runs_down(const TileView& t, std::int64_t rows) {
  return t.row_stride == 1 && t.column_stride != 1 && rows >= kLanes<T> / 2;
}

// Rows of a few whole vectors of T itself, as those of most heads, are copied without a look at each: more of them are on their
// way from memory at a time.
template <class T>
inline constexpr std::int64_t kCopied = 4 * kLanes<T>;

template <class T>
STATESCAN_INLINE bool copies_rows(const TileView& t, std::int64_t columns) {
  return t.dtype == kDTypeOf<T> && t.column_stride == 1 && columns % kCopied<T> == 0;
}

template <class T>
inline void copy_rows(T* to, std::int64_t to_stride, const T* from, std::int64_t from_stride, std::int64_t rows,
                      std::int64_t columns) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; c += kCopied<T>) {
      Vec<T> v[4];
      for (int i = 0; i < 4; ++i) v[i] = load<T>(from + r * from_stride + c + i * kLanes<T>);
      for (int i = 0; i < 4; ++i) store<T>(to + r * to_stride + c + i * kLanes<T>, v[i]);
    }
}

// Reads a tile and fills columns..pitch with zeros, so that the last vector of a row is whole.
template <class T>
inline void load_tile(T* to, std::int64_t pitch, const TileView& from, std::int64_t rows, std::int64_t columns) {
  constexpr int kL = kLanes<T>;
  if (runs_down<T>(from, rows)) {
    for (std::int64_t c = 0; c < pitch; c += kL)
      for (std::int64_t r = 0; r < rows; r += kL) {  // along memory
        const int height = at_most(rows - r, kL), room = at_most(pitch - c, kL);
        const std::int64_t first = from.first + r + c * from.column_stride;
        Vec<T> block[kL];
        for (int i = 0; i < kL; ++i)
          block[i] = c + i < columns ? load_run<T>(from.data, from.dtype, first + i * from.column_stride, height) : Vec<T>{};
        transpose<T>(block);
        T* const corner = to + r * pitch + c;
        for (int i = 0; i < height; ++i)
          room == kL ? store<T>(corner + i * pitch, block[i]) : store_first<T>(corner + i * pitch, block[i], room);
      }
    return;
  }
  if (pitch == columns && copies_rows<T>(from, columns))
    return copy_rows<T>(to, pitch, static_cast<const T*>(from.data) + from.first, from.row_stride, rows, columns);
  if (pitch == columns && from.column_stride == 1 && from.row_stride == columns) {
    load_row<T>(to, from.data, from.dtype, from.first, 1, rows * columns);
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    load_row<T>(to + r * pitch, from.data, from.dtype, from.first + r * from.row_stride, from.column_stride, columns);
    for (std::int64_t c = columns; c < pitch; ++c) to[r * pitch + c] = T(0);
  }
}

// Writes the first `columns` of each row; the pitch of `from` is a multiple of the vector.
template <class T>
inline void store_tile(const TileView& to, std::int64_t rows, std::int64_t columns, const T* from, std::int64_t pitch) {
  constexpr int kL = kLanes<T>;
  if (runs_down<T>(to, rows)) {
    for (std::int64_t c = 0; c < columns; c += kL)
      for (std::int64_t r = 0; r < rows; r += kL) {
        const int height = at_most(rows - r, kL), width = at_most(columns - c, kL);
        Vec<T> block[kL];
        for (int i = 0; i < kL; ++i) block[i] = i < height ? load<T>(from + (r + i) * pitch + c) : Vec<T>{};
        transpose<T>(block);
        const std::int64_t first = to.first + r + c * to.column_stride;
        for (int i = 0; i < width; ++i) store_run<T>(to.data, to.dtype, first + i * to.column_stride, height, block[i]);
      }
    return;
  }
  if (copies_rows<T>(to, columns))
    return copy_rows<T>(static_cast<T*>(to.data) + to.first, to.row_stride, from, pitch, rows, columns);
  for (std::int64_t r = 0; r < rows; ++r)
    store_row<T>(to.data, to.dtype, to.first + r * to.row_stride, to.column_stride, columns, from + r * pitch);
}

// Calls the lines of a tile into the second cache, for one whose turn comes soon. The rows of one head lie kilobytes apart, each
// on another page, where the hardware foresees little: copying them would wait for most of their lines, one after the other.
// A row need not start with a line, so its last byte is asked for beside them. Inline always, since GCC takes a function that
// only prefetches for one without effect and drops its calls.
STATESCAN_INLINE void prefetch_tile(const TileView& t, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kLine = 64;
  if (t.column_stride != 1) return;
  const std::int64_t size = size_of(t.dtype);
  for (std::int64_t r = 0; r < rows; ++r) {
    const char* const row = static_cast<const char*>(t.data) + (t.first + r * t.row_stride) * size;
    for (std::int64_t at = 0; at < columns * size; at += kLine) __builtin_prefetch(row + at, 0, 2);
    __builtin_prefetch(row + columns * size - 1, 0, 2);
  }
}

// The same a few rows at a time, beside the blocks of a product: hundreds of lines at once would wait for each other, and the
// processor drops some.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const TileView& tile, std::int64_t rows, std::int64_t columns, std::int64_t steps)
      : tile_(tile), left_(rows), columns_(columns), rows_of_step_(steps > 0 ? (rows + steps - 1) / steps : 0) {}

  STATESCAN_INLINE void step() {
    const std::int64_t rows = left_ < rows_of_step_ ? left_ : rows_of_step_;
    prefetch_tile(tile_, rows, columns_);
    tile_.first += rows * tile_.row_stride;
    left_ -= rows;
  }

 private:
  TileView tile_{};
  std::int64_t left_ = 0, columns_ = 0, rows_of_step_ = 0;
};

// Even lanes of the pair (a, b), then odd lanes; and the way back.
template <class T, int... kLane>
STATESCAN_INLINE void split_pairs(Vec<T> a, Vec<T> b, Vec<T>& even, Vec<T>& odd, std::integer_sequence<int, kLane...>) {
  even = __builtin_shufflevector(a, b, (2 * kLane)...);
  odd = __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

template <class T, int... kLane>
STATESCAN_INLINE void join_pairs(Vec<T> even, Vec<T> odd, Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kL = kLanes<T>;
  a = __builtin_shufflevector(even, odd, (kLane / 2 + (kLane % 2) * kL)...);
  b = __builtin_shufflevector(even, odd, (kLane / 2 + (kLane % 2) * kL + kL / 2)...);
}

// Tiles of tensors that may be complex: real and imaginary parts lie apart in scratch. First and strides count elements of t.
template <class T, int kParts>
inline void load_parts(T* const (&to)[kParts], std::int64_t pitch, const Tensor& t, std::int64_t first, std::int64_t row_stride,
                       std::int64_t rows, std::int64_t column_stride, std::int64_t columns) {
  if constexpr (kParts == 1) {
    load_tile<T>(to[0], pitch, {t.data, t.dtype, first, row_stride, column_stride}, rows, columns);
  } else if (column_stride != 1) {
    for (int part = 0; part < 2; ++part)
      load_tile<T>(to[part], pitch, {t.data, kDTypeOf<T>, 2 * first + part, 2 * row_stride, 2 * column_stride}, rows, columns);
  } else {
    constexpr int kL = kLanes<T>;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < pitch; c += kL) {
        const T* p = static_cast<const T*>(t.data) + 2 * (first + r * row_stride + c);
        const int width = columns > c ? at_most(columns - c, kL) : 0, room = at_most(pitch - c, kL);
        const int low = at_most(2 * width, kL), high = 2 * width - low;
        Vec<T> parts[2];
        split_pairs<T>(low == kL ? load<T>(p) : load_first<T>(p, low),
                       high == kL ? load<T>(p + kL) : load_first<T>(p + kL, high), parts[0], parts[1],
                       std::make_integer_sequence<int, kL>());
        for (int part = 0; part < 2; ++part) {
          T* const at = to[part] + r * pitch + c;
          room == kL ? store<T>(at, parts[part]) : store_first<T>(at, parts[part], room);
        }
      }
  }
}

// The pitch of `from` is a multiple of the vector.
template <class T, int kParts>
inline void store_parts(const Tensor& t, std::int64_t first, std::int64_t row_stride, std::int64_t rows,
                        std::int64_t column_stride, std::int64_t columns, T* const (&from)[kParts], std::int64_t pitch) {
  if constexpr (kParts == 1) {
    store_tile<T>({t.data, t.dtype, first, row_stride, column_stride}, rows, columns, from[0], pitch);
  } else if (column_stride != 1) {
    for (int part = 0; part < 2; ++part)
      store_tile<T>({t.data, kDTypeOf<T>, 2 * first + part, 2 * row_stride, 2 * column_stride}, rows, columns, from[part],
                    pitch);
  } else {
    constexpr int kL = kLanes<T>;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < columns; c += kL) {
        T* const p = static_cast<T*>(t.data) + 2 * (first + r * row_stride + c);
        const int width = at_most(columns - c, kL), low = at_most(2 * width, kL), high = 2 * width - low;
        Vec<T> a, b;
        join_pairs<T>(load<T>(from[0] + r * pitch + c), load<T>(from[1] + r * pitch + c), a, b,
                      std::make_integer_sequence<int, kL>());
        low == kL ? store<T>(p, a) : store_first<T>(p, a, low);
        high == kL ? store<T>(p + kL, b) : store_first<T>(p + kL, b, high);
      }
  }
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
