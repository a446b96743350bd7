// Products of tiles that lie in cache (tile.h loads them). Right-hand and result tiles have rows padded to whole vectors, so
// that no product has a ragged edge; left-hand tiles are read element by element and need no padding.
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

// sum[r][v] += sum_k a[r][k] b[k][v], the sum over k in order. a[r][k] lies at r * a_stride + k * a_step: a step other than one
// reads a transposed tile in place.
template <class T, int R, int V>
STATESCAN_INLINE void multiply_add(Vec<T> (&sum)[R][V], const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride,
                                   std::int64_t depth, std::int64_t a_step = 1) {
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec<T> row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load<T>(b + k * b_stride + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * a_stride + k * a_step] * row[v];
  }
}

// The rows i.. of L b, for a lower triangle L: sum[r] += sum_{k<=i+r} L[i+r][k] b[k]. The square of the block's own rows is
// summed as a triangle: zeros above the diagonal would not do, since zero times NaN is NaN.
template <class T, int R, int V>
STATESCAN_INLINE void multiply_lower(Vec<T> (&sum)[R][V], const T* L, std::int64_t L_stride, const T* b, std::int64_t b_stride,
                                     std::int64_t i) {
  multiply_add<T>(sum, L + i * L_stride, L_stride, b, b_stride, i);
#pragma GCC unroll 16
  for (int k = 0; k < R; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<T> row = load<T>(b + (i + k) * b_stride + v * kLanes<T>);
#pragma GCC unroll 16
      for (int r = k; r < R; ++r) sum[r][v] += L[(i + r) * L_stride + i + k] * row;
    }
}

// The same of L's transpose: sum[r] += sum_{k>=i+r} L[k][i+r] b[k], k < depth.
template <class T, int R, int V>
STATESCAN_INLINE void multiply_lower_transposed(Vec<T> (&sum)[R][V], const T* L, std::int64_t L_stride, const T* b,
                                                std::int64_t b_stride, std::int64_t i, std::int64_t depth) {
#pragma GCC unroll 16
  for (int k = 0; k < R; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<T> row = load<T>(b + (i + k) * b_stride + v * kLanes<T>);
#pragma GCC unroll 16
      for (int r = 0; r <= k; ++r) sum[r][v] += L[(i + k) * L_stride + i + r] * row;
    }
  const std::int64_t next = i + R;
  multiply_add<T>(sum, L + next * L_stride + i, 1, b + next * b_stride, b_stride, depth - next, L_stride);
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

// What a block is added to when its sum is done, on its way into the first cache while it is summed.
template <class T, int R, int V>
STATESCAN_INLINE void prefetch_block(const T* from, std::int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) __builtin_prefetch(from + r * stride + v * kLanes<T>);
}

// block += scale * what lies at `from`.
template <class T, int R, int V>
STATESCAN_INLINE void add_scaled(Vec<T> (&block)[R][V], T scale, const T* from, std::int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) block[r][v] += scale * load<T>(from + r * stride + v * kLanes<T>);
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

// The same blocks from the last to the first.
template <class Body>
STATESCAN_INLINE void for_row_blocks_upwards(std::int64_t rows, Body&& body) {
  std::int64_t r = rows / kTileRows * kTileRows;
  for_last_rows(r, rows - r, body);
  while ((r -= kTileRows) >= 0) body(Constant<kTileRows>{}, r);
}

// The same for columns, a multiple of kLanes<T>: kTileVectors at a time, then one by one.
template <class T, class Body>
STATESCAN_INLINE void for_column_blocks(std::int64_t columns, Body&& body) {
  std::int64_t c = 0;
  for (; c + kTileVectors * kLanes<T> <= columns; c += kTileVectors * kLanes<T>) body(Constant<kTileVectors>{}, c);
  for (; c < columns; c += kLanes<T>) body(Constant<1>{}, c);
}

// The blocks of a product of these sizes.
template <class T>
STATESCAN_INLINE std::int64_t count_blocks(std::int64_t rows, std::int64_t columns) {
  const std::int64_t vectors = columns / kLanes<T>;
  return (rows + kTileRows - 1) / kTileRows * (vectors / kTileVectors + vectors % kTileVectors);
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

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
