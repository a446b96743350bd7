// How selective_scan and its backward read a block of channels: what belongs to a state as [n][width], B and C of a tile of
// tokens as [tokens][n], with real and imaginary parts apart.
#pragma once

#include "decay.h"
#include "tile.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// Tokens first..first+count-1 of batch row `batch`.
struct Tokens {
  std::int64_t batch, first, count;
};

// A [d,n] tensor (or one sequence's states) as [n][width].
template <class T, int kParts>
inline void load_per_state(T* const (&to)[kParts], std::int64_t width, const Tensor& t, std::int64_t first,
                           std::int64_t channels, std::int64_t dstate) {
  load_parts<T, kParts>(to, width, t, first, t.stride[t.ndim - 1], dstate, t.stride[t.ndim - 2], channels);
}

// An optional [d] tensor; zeros when it is absent.
template <class T>
inline void load_per_channel(T* to, std::int64_t width, const Tensor& t, std::int64_t channel, std::int64_t channels) {
  for (std::int64_t i = 0; i < width; ++i) to[i] = T(0);
  if (t) load_row<T>(to, t.data, t.dtype, channel * t.stride[0], t.stride[0], channels);
}

// B or C of a tile as [tokens][n].
template <class T, int kParts>
inline void load_projection(T* const (&to)[kParts], const Tensor& t, const Tokens& tokens, std::int64_t group) {
  const std::int64_t first = offset_of(t, tokens.batch, tokens.first, group), dstate = t.shape[3];
  load_parts<T, kParts>(to, dstate, t, first, t.stride[1], tokens.count, t.stride[3], dstate);
}

inline TileView token_tile(const Tensor& t, const Tokens& tokens, std::int64_t channel) {
  return {t.data, t.dtype, offset_of(t, tokens.batch, tokens.first, channel), t.stride[1], t.stride[2]};
}

// B or C at a state: the same for all channels, or one for each.
template <class T, bool kVarying>
STATESCAN_INLINE Vec<T> projection(const T* p, std::int64_t varying, std::int64_t fixed) {
  return kVarying ? splat(p[varying]) : load<T>(p + fixed);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
