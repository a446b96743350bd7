// The depthwise causal convolution on contiguous T: shared by causal_conv1d, its update, and the Mamba-2 block ops. Every
// form adds bias, then the taps from the oldest input to the newest, so that all of them give the same bits.
#pragma once

#include <type_traits>

#include "simd.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// Channels worked on at once: a window of them, their weights and their outputs stay in the nearest cache.
inline constexpr std::int64_t kConvBlock = 256;
inline constexpr int kMaxConvWidth = 8;

template <class T>
STATESCAN_INLINE Vec<T> activate(Vec<T> v, bool with_silu) {
  return with_silu ? silu<T>(v) : v;
}

// y[c] = act(bias[c] + sum_k weight[k * weight_stride + c] * rows[k][c]). Works in whole vectors: every row must be readable,
// and y writable, up to the next multiple of kLanes<T>.
template <class T>
inline void conv_token(T* y, const T* const* rows, const T* weight, std::int64_t weight_stride, const T* bias, int width,
                       bool with_silu, std::int64_t channels) {
  for (std::int64_t c = 0; c < channels; c += kLanes<T>) {
    Vec<T> sum = load<T>(bias + c);
    for (int k = 0; k < width; ++k) sum = sum + load<T>(weight + k * weight_stride + c) * load<T>(rows[k] + c);
    store<T>(y + c, activate<T>(sum, with_silu));
  }
}

// run [count, kTaps] to rows, one per tap, and back. Unrolled over taps, so that the compiler shuffles whole vectors.
template <int kTaps, class T>
inline void spread_taps(T* __restrict to, std::int64_t to_stride, const T* __restrict run, std::int64_t count) {
  for (std::int64_t c = 0; c < count; ++c)
    for (int k = 0; k < kTaps; ++k) to[k * to_stride + c] = run[c * kTaps + k];
}

template <int kTaps, class T>
inline void gather_taps(T* __restrict run, const T* const* rows, std::int64_t count) {
  const T* row[kTaps];
  for (int k = 0; k < kTaps; ++k) row[k] = rows[k];
  for (std::int64_t c = 0; c < count; ++c)
    for (int k = 0; k < kTaps; ++k) run[c * kTaps + k] = row[k][c];
}

// body(integral constant) for a number of taps known at compile time, 1 to kMaxConvWidth.
template <class Body>
STATESCAN_INLINE void with_taps(std::int64_t taps, Body&& body) {
  switch (taps) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, 8>{});
  }
}

// Reads a [channels, taps] piece of t, its last two axes, as one row of channels per tap: to[k * to_stride + c]. Weights and
// states mostly lie with their few taps innermost: these are read as one run and transposed in cache.
template <class T>
inline void load_taps(T* to, std::int64_t to_stride, const Tensor& t, std::int64_t offset, std::int64_t channels, int taps) {
  const std::int64_t channel_stride = t.stride[t.ndim - 2], tap_stride = t.stride[t.ndim - 1];
  if (tap_stride != 1 || channel_stride != taps) {
    for (int k = 0; k < taps; ++k)
      load_row<T>(to + k * to_stride, t.data, t.dtype, offset + k * tap_stride, channel_stride, channels);
    return;
  }
  alignas(kVectorBytes) T run[kConvBlock * kMaxConvWidth];
  for (std::int64_t first = 0; first < channels; first += kConvBlock) {
    const std::int64_t count = channels - first < kConvBlock ? channels - first : kConvBlock;
    load_row<T>(run, t.data, t.dtype, offset + first * taps, 1, count * taps);
    with_taps(taps, [&](auto known) { spread_taps<known()>(to + first, to_stride, run, count); });
  }
}

// The inverse, from one pointer per tap; at most kConvBlock channels.
template <class T>
inline void store_taps(const Tensor& t, std::int64_t offset, std::int64_t channels, int taps, const T* const* rows) {
  const std::int64_t channel_stride = t.stride[t.ndim - 2], tap_stride = t.stride[t.ndim - 1];
  if (tap_stride != 1 || channel_stride != taps) {
    for (int k = 0; k < taps; ++k)
      store_row<T>(t.data, t.dtype, offset + k * tap_stride, channel_stride, channels, rows[k]);
    return;
  }
  alignas(kVectorBytes) T run[kConvBlock * kMaxConvWidth];
  with_taps(taps, [&](auto known) { gather_taps<known()>(run, rows, channels); });
  store_row<T>(t.data, t.dtype, offset, 1, channels * taps, run);
}

// The inputs that one output needs, for a block of channels: `width` rows, oldest first.
template <class T>
class ConvWindow {
 public:
  explicit ConvWindow(int width) : width_(width) {
    for (int k = 0; k < width; ++k) rows_[k] = memory_[k];
  }

  // All rows but the newest, from a state tensor or, when it is absent, zeros.
  void load_state(const Tensor& state, std::int64_t offset, std::int64_t channels) {
    if (state) {
      load_taps<T>(memory_[0], kConvBlock, state, offset, channels, width_ - 1);
      return;
    }
    for (int k = 0; k + 1 < width_; ++k)
      for (std::int64_t c = 0; c < kConvBlock; ++c) memory_[k][c] = T(0);
  }

  T* row(int k) { return rows_[k]; }
  T* newest() { return rows_[width_ - 1]; }
  const T* const* rows() const { return rows_; }

  // Forgets the oldest row; its memory takes the next token.
  void shift() {
    T* oldest = rows_[0];
    for (int k = 0; k + 1 < width_; ++k) rows_[k] = rows_[k + 1];
    rows_[width_ - 1] = oldest;
  }

 private:
  alignas(kVectorBytes) T memory_[kMaxConvWidth][kConvBlock];
  T* rows_[kMaxConvWidth];
  int width_;
};

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
