// What the causal_conv1d kernels share: which sequence a token belongs to, and what stands before its first token.
#pragma once

#include "../common/early.cuh"
#include "../common/element.cuh"
#include "params.h"

namespace statescan::causal_conv1d {

// Tokens [first, last) of a sequence; sequence -1: of none, past the last packed one.
struct Span {
  std::int64_t sequence, first, last;
};

// cu_seqlens on a device cannot be checked without waiting for it: wrong values give wrong results, but no wild access.
inline __device__ std::int64_t boundary(const Sequences& s, std::int64_t i) {
  const std::int64_t at = s.is_int64 ? static_cast<const std::int64_t*>(s.cu_seqlens)[i * s.stride]
                                     : static_cast<const std::int32_t*>(s.cu_seqlens)[i * s.stride];
  return at < 0 ? 0 : (at > s.seqlen ? s.seqlen : at);
}

// The tokens of a sequence.
inline __device__ Span span_of(const Sequences& s, std::int64_t sequence) {
  if (!s.cu_seqlens) return {sequence, 0, s.seqlen};
  const std::int64_t begin = boundary(s, sequence), end = boundary(s, sequence + 1);
  return {sequence, s.mirrored ? s.seqlen - end : begin, s.mirrored ? s.seqlen - begin : end};
}

// The span around token t of a row of the batch.
inline __device__ Span span_at(const Sequences& s, std::int64_t row, std::int64_t t) {
  if (!s.cu_seqlens) return {row, 0, s.seqlen};
  const std::int64_t at = s.mirrored ? s.seqlen - 1 - t : t;
  std::int64_t low = -1, high = s.count + 1;  // boundary(low) <= at < boundary(high), as if one stood before the first
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (boundary(s, middle) <= at ? low : high) = middle;
  }
  const std::int64_t begin = low < 0 ? 0 : boundary(s, low), end = low == s.count ? s.seqlen : boundary(s, high);
  const std::int64_t first = s.mirrored ? s.seqlen - end : begin, last = s.mirrored ? s.seqlen - begin : end;
  return {low == s.count ? -1 : low, first < t ? first : t, last > t ? last : t + 1};
}

inline __device__ float token_at(const TokenView& t, std::int64_t row, std::int64_t token, std::int64_t channel) {
  return cuda::load_element(t.data + (row * t.batch + token * t.token + channel * t.channel), t.dtype);
}

// The value of a channel `after` tokens from the start of its sequence; before it, of the initial state.
inline __device__ float input_at(const TokenView& x, const StateView& state, int width, std::int64_t row, const Span& span,
                                 std::int64_t channel, std::int64_t after) {
  if (after >= 0) return token_at(x, row, span.first + after, channel);
  const std::int64_t tap = after + width - 1;
  if (!state.data || tap < 0) return 0.0f;
  return cuda::load_element(state.data + (span.sequence * state.sequence + channel * state.channel + tap * state.tap),
                            state.dtype);
}

// What dfinal_state adds to the gradient of a channel's input `after` tokens from the start of its sequence.
inline __device__ float from_final_state(const BackwardParams& p, const Span& span, std::int64_t channel, std::int64_t after) {
  const StateView& t = p.dfinal_state;
  const std::int64_t tap = after - (span.last - span.first) + p.shape.width - 1;
  if (!t.data || tap < 0) return 0.0f;
  return cuda::load_element(t.data + (span.sequence * t.sequence + channel * t.channel + tap * t.tap), t.dtype);
}

}  // namespace statescan::causal_conv1d
