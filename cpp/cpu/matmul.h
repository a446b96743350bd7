// Small matrix products of tiles that lie in cache, and the tiles themselves: how strided memory of any dtype becomes padded
// contiguous T and how it is transposed. Right-hand and result tiles have rows padded to whole vectors, so that no product has
// a ragged edge; left-hand tiles are read element by element and need no padding.
#pragma once

#include <cstdint>

#include "simd.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// The register block: kTileRows x kTileVectors accumulators stay in registers for a whole sum. An FMA reads its left factor
// from memory as a broadcast, so what is left of the registers only has to hold kTileVectors right-hand vectors.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers
#else
inline constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16 registers
#endif

template <class T>
STATESCAN_INLINE constexpr std::int64_t whole_vectors(std::int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// sum[r][v] += sum_k a[r][k] b[k][v], the sum over k in order.
template <class T, int R, int V>
STATESCAN_INLINE void multiply_add(Vec<T> (&sum)[R][V], const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride,
                                   std::int64_t depth) {
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec<T> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load<T>(b + k * b_stride + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * a_stride + k] * row[v];
  }
}

template <class T, int R, int V>
STATESCAN_INLINE void load_block(Vec<T> (&block)[R][V], const T* from, std::int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) block[r][v] = load<T>(from + r * stride + v * kLanes<T>);
}

template <class T, int R, int V>
STATESCAN_INLINE void store_block(T* to, std::int64_t stride, const Vec<T> (&block)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store<T>(to + r * stride + v * kLanes<T>, block[r][v]);
}

// block *= scale, and block[r] *= scale[r].
template <class T, int R, int V>
STATESCAN_INLINE void scale_block(Vec<T> (&block)[R][V], T scale) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) block[r][v] *= scale;
}

template <class T, int R, int V>
STATESCAN_INLINE void scale_rows(Vec<T> (&block)[R][V], const T* scale) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) block[r][v] *= scale[r];
}

// A size known to the compiler, as an argument.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// Cuts `rows` into register blocks and calls body(Constant<R>, first row) for each: kTileRows, then what is left in one.
template <int R = kTileRows - 1, class Body>
STATESCAN_INLINE void for_last_rows(std::int64_t first, std::int64_t count, Body&& body) {
  if (count == R) body(Constant<R>{}, first);
  else if constexpr (R > 1) for_last_rows<R - 1>(first, count, body);
}

template <class Body>
STATESCAN_INLINE void for_row_blocks(std::int64_t rows, Body&& body) {
  std::int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) body(Constant<kTileRows>{}, r);
  for_last_rows(r, rows - r, body);
}

// The same for columns, a multiple of kLanes<T>: kTileVectors at a time, then one by one.
template <class T, class Body>
STATESCAN_INLINE void for_column_blocks(std::int64_t columns, Body&& body) {
  std::int64_t c = 0;
  for (; c + kTileVectors * kLanes<T> <= columns; c += kTileVectors * kLanes<T>) body(Constant<kTileVectors>{}, c);
  for (; c < columns; c += kLanes<T>) body(Constant<1>{}, c);
}

// to = a b, or to = scale * to + a b, for a [rows, depth], b [depth, columns] and to [rows, columns].
template <bool kAdd = false, class T>
void matmul(T* to, std::int64_t to_stride, const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride,
            std::int64_t rows, std::int64_t columns, std::int64_t depth, T scale = T(0)) {
  for_column_blocks<T>(columns, [&]<int V>(Constant<V>, std::int64_t c) {
    for_row_blocks(rows, [&]<int R>(Constant<R>, std::int64_t r) {
      Vec<T> sum[R][V] = {};
      if constexpr (kAdd) {
        load_block<T>(sum, to + r * to_stride + c, to_stride);
        scale_block<T>(sum, scale);
      }
      multiply_add<T>(sum, a + r * a_stride, a_stride, b + c, b_stride, depth);
      store_block<T>(to + r * to_stride + c, to_stride, sum);
    });
  });
}

// to [columns, rows] = transpose of from [rows, columns]; squares of 16-byte vectors, which every instruction set shuffles well.
template <class T>
void transpose(T* to, std::int64_t to_stride, const T* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns) {
  constexpr int kSide = 16 / sizeof(T);
  typedef T Quad __attribute__((vector_size(16)));
  std::int64_t r = 0;
  for (; r + kSide <= rows; r += kSide) {
    std::int64_t c = 0;
    for (; c + kSide <= columns; c += kSide) {
      Quad in[kSide], out[kSide];
      for (int i = 0; i < kSide; ++i) std::memcpy(&in[i], from + (r + i) * from_stride + c, sizeof(Quad));
      if constexpr (kSide == 4) {
        const Quad low02 = __builtin_shufflevector(in[0], in[2], 0, 4, 1, 5), low13 = __builtin_shufflevector(in[1], in[3], 0, 4, 1, 5);
        const Quad high02 = __builtin_shufflevector(in[0], in[2], 2, 6, 3, 7), high13 = __builtin_shufflevector(in[1], in[3], 2, 6, 3, 7);
        out[0] = __builtin_shufflevector(low02, low13, 0, 4, 1, 5), out[1] = __builtin_shufflevector(low02, low13, 2, 6, 3, 7);
        out[2] = __builtin_shufflevector(high02, high13, 0, 4, 1, 5), out[3] = __builtin_shufflevector(high02, high13, 2, 6, 3, 7);
      } else {
        out[0] = __builtin_shufflevector(in[0], in[1], 0, 2), out[1] = __builtin_shufflevector(in[0], in[1], 1, 3);
      }
      for (int i = 0; i < kSide; ++i) std::memcpy(to + (c + i) * to_stride + r, &out[i], sizeof(Quad));
    }
    for (; c < columns; ++c)
      for (int i = 0; i < kSide; ++i) to[c * to_stride + r + i] = from[(r + i) * from_stride + c];
  }
  for (; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

// Rows of a strided tensor as a tile: `first` is the offset of element [0][0], row_step and column_step are strides in
// elements. What a row of the tile holds past `columns` becomes zero.
template <class T>
void load_tile(T* to, std::int64_t to_stride, const Tensor& t, std::int64_t first, std::int64_t row_step,
               std::int64_t column_step, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t r = 0; r < rows; ++r) {
    load_row<T>(to + r * to_stride, t.data, t.dtype, first + r * row_step, column_step, columns);
    for (std::int64_t c = columns; c < to_stride; ++c) to[r * to_stride + c] = T(0);
  }
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
