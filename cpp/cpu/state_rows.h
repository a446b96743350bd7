// Rows of states as contiguous T: used where they lie in memory if they are that already, else through scratch. What
// selective_state_update reads and writes its caches with.
#pragma once

#include "decay.h"
#include "tile.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

template <class T>
constexpr std::int64_t padded(std::int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Rows of n contiguous T, `step` apart: in the tensor's own memory, or in scratch with a step of padded(n).
template <class T, int kParts>
struct Rows {
  const T* part[kParts];
  std::int64_t step;
};

template <class T, int kParts>
STATESCAN_INLINE Parts<T, kParts> load_vector(const Rows<T, kParts>& rows, std::int64_t row, std::int64_t n, int lanes) {
  Parts<T, kParts> v;
  for (int part = 0; part < kParts; ++part) {
    const T* p = rows.part[part] + row * rows.step + n;
    v.part[part] = lanes == kLanes<T> ? load<T>(p) : load_first<T>(p, lanes);
  }
  return v;
}

// Whether rows of t can be used where they lie.
template <class T, int kParts>
STATESCAN_INLINE bool lies_ready(const Tensor& t) {
  return kParts == 1 && t.dtype == kDTypeOf<T> && t.stride[t.ndim - 1] == 1;
}

template <class T, int kParts>
inline Rows<T, kParts> copy_rows(const Tensor& t, std::int64_t first, std::int64_t row_stride, std::int64_t rows,
                                 T* const (&scratch)[kParts]) {
  const std::int64_t n = t.shape[t.ndim - 1];
  Rows<T, kParts> copy;
  copy.step = padded<T>(n);
  load_parts<T, kParts>(scratch, copy.step, t, first, row_stride, rows, t.stride[t.ndim - 1], n);
  for (int part = 0; part < kParts; ++part) copy.part[part] = scratch[part];
  return copy;
}

template <class T, int kParts>
inline Rows<T, kParts> rows_of(const Tensor& t, std::int64_t first, std::int64_t row_stride, std::int64_t rows,
                               T* const (&scratch)[kParts]) {
  if (lies_ready<T, kParts>(t)) return {{static_cast<const T*>(t.data) + first}, row_stride};
  return copy_rows<T, kParts>(t, first, row_stride, rows, scratch);
}

// Up to kLanes rows of state on their way from one slot to another, to the same one, or to nowhere.
template <class T, int kParts>
struct StateBlock {
  Rows<T, kParts> from;
  T* to[kParts];
  std::int64_t to_step, n;
  int rows;
  bool in_place;  // in the memory of the state tensor from the first token on

  void next_token() {
    for (int part = 0; part < kParts; ++part) from.part[part] = to[part];
    from.step = to_step;
  }
};

// Where a row of the batch finds its state and leaves it.
struct Slots {
  std::int64_t from, to;  // -1: padding; not written
};

// `within`: the offset of the block's first row in its slot.
template <class T, int kParts>
inline StateBlock<T, kParts> open_block(const Tensor& state, Slots slots, std::int64_t within, std::int64_t row_stride,
                                        int rows, bool any_token, T* const (&scratch)[kParts]) {
  const std::int64_t first = slots.from * state.stride[0] + within;
  StateBlock<T, kParts> block;
  block.n = state.shape[state.ndim - 1], block.rows = rows;
  block.in_place = lies_ready<T, kParts>(state) && slots.to >= 0 && any_token;
  // Without a token nothing moves a state to its new slot but the copy.
  block.from = any_token ? rows_of<T, kParts>(state, first, row_stride, rows, scratch)
                         : copy_rows<T, kParts>(state, first, row_stride, rows, scratch);
  for (int part = 0; part < kParts; ++part) block.to[part] = scratch[part];
  block.to_step = padded<T>(block.n);
  if (block.in_place) {
    block.to[0] = static_cast<T*>(state.data) + slots.to * state.stride[0] + within;
    block.to_step = row_stride;
  }
  return block;
}

template <class T, int kParts>
inline void close_block(const StateBlock<T, kParts>& block, const Tensor& state, Slots slots, std::int64_t within,
                        std::int64_t row_stride) {
  if (block.in_place || slots.to < 0) return;
  store_parts<T, kParts>(state, slots.to * state.stride[0] + within, row_stride, block.rows, state.stride[state.ndim - 1],
                         block.n, block.to, block.to_step);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
