// What both directions of mamba2_scan on the CPU share: scratch memory, and where the packed tokens end.
#pragma once

#include "simd.h"
#include "../ops/contract.h"
#include "../ops/mamba2_stages.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// Tokens [first, first + count) of t [b,l,channels].
inline Tensor tokens_of(const Tensor& t, std::int64_t first, std::int64_t count) {
  Tensor view = t;
  if (count > 0 && t) view.data = static_cast<char*>(t.data) + first * t.stride[1] * size_of(t.dtype);
  view.shape[1] = count;
  return view;
}

inline DType working_dtype(const mamba2_scan::Inputs& in) {
  return in.zxbcdt.dtype == DType::float64 ? DType::float64 : DType::float32;
}

// A contiguous [b,l,channels] of the working dtype in scratch memory.
inline Tensor scratch_of(Arena& arena, const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d, std::int64_t channels) {
  const std::int64_t count = d.batch * d.seqlen * channels;
  Tensor t;
  t.dtype = working_dtype(in);
  if (t.dtype == DType::float64) t.data = arena.take<double>(count);
  else t.data = arena.take<float>(count);
  t.ndim = 3;
  t.shape[0] = d.batch, t.shape[1] = d.seqlen, t.shape[2] = channels;
  t.stride[0] = d.seqlen * channels, t.stride[1] = channels, t.stride[2] = 1;
  return t;
}

// The tokens of a batch row that belong to a sequence. Past them y is zero whatever z holds there: the norm stops before them.
inline std::int64_t packed_tokens(const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d) {
  return in.cu_seqlens ? index_at(in.cu_seqlens, d.num_sequences) : d.seqlen;
}

// The norm of the packed tokens; y: what the scan made.
inline gated_rms_norm::Inputs packed_norm_inputs(const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d, const Tensor& y) {
  const std::int64_t tokens = packed_tokens(in, d);
  gated_rms_norm::Inputs norm = norm_inputs(in, d, y);
  norm.x = tokens_of(norm.x, 0, tokens);
  norm.z = tokens_of(norm.z, 0, tokens);
  return norm;
}

inline gated_rms_norm::Dims packed_norm_dims(const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d) {
  return {d.batch * packed_tokens(in, d), d.d_inner, d.norm_group_size};
}

// A tensor [b,l,channels] past the last packed token: zero.
inline void clear_tail(const Tensor& t, const mamba2_scan::Inputs& in, const mamba2_scan::Dims& d) {
  if (!t) return;
  for (std::int64_t l = packed_tokens(in, d); l < d.seqlen; ++l)
    for (std::int64_t c = 0; c < t.shape[2]; ++c) store_element<float>(t.data, t.dtype, offset_of(t, 0, l, c), 0.0f);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
