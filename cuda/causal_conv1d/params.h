// A call as its kernels take it: plain numbers, worked out on the host. With `reverse` the tensors are mirrored in time here,
// and the kernels always go from token 0 on.
#pragma once

#include "policy.h"

namespace statescan::causal_conv1d {

// Tensors; strides in bytes. data is null where the tensor is absent.
struct TokenView {  // [b,l,d]
  char* data;
  DType dtype;
  std::int64_t batch, token, channel;
};
struct StateView {  // [b or s,d,w-1]
  char* data;
  DType dtype;
  std::int64_t sequence, channel, tap;
};
struct WeightView {  // [d,w], or [d]
  char* data;
  DType dtype;
  std::int64_t channel, tap;
};

// Where the sequences lie; cu_seqlens null: sequence i is row i of the batch, whole.
struct Sequences {
  const void* cu_seqlens;
  bool is_int64, mirrored;
  std::int64_t stride, count, seqlen;
};

struct Shape {
  std::int64_t batch, seqlen, dim;
  int width;
  std::int64_t tokens, segments;  // tokens of a segment; segments of a row
};

struct ForwardParams {
  Shape shape;
  Sequences sequences;
  bool silu;
  TokenView x, y;
  WeightView weight, bias;
  StateView initial_state, final_state;
};

struct BackwardParams {
  Shape shape;
  Sequences sequences;
  bool silu;
  TokenView x, dy, dx;
  WeightView weight, bias;
  StateView initial_state, dfinal_state, dinitial_state;
  float* partial;  // [b*segments, w+1, d]: each segment's share of dweight and, last, of dbias; null: not wanted
};

inline TokenView tokens_of(const Tensor& t, bool reverse) {
  if (!t) return {};
  const std::int64_t size = size_of(t.dtype), token = t.stride[1] * size;
  char* const data = static_cast<char*>(t.data);
  return {reverse ? data + (t.shape[1] - 1) * token : data, t.dtype, t.stride[0] * size, reverse ? -token : token,
          t.stride[2] * size};
}

inline StateView state_of(const Tensor& t) {
  if (!t) return {};
  const std::int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
}

inline WeightView weight_of(const Tensor& t) {
  if (!t) return {};
  const std::int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.dtype, t.stride[0] * size, t.ndim == 2 ? t.stride[1] * size : 0};
}

inline Sequences sequences_of(const Inputs& inputs, const Dims& dims) {
  const Tensor& cu = inputs.cu_seqlens;
  return {cu ? cu.data : nullptr, cu.dtype == DType::int64, inputs.reverse,
          cu ? cu.stride[0] : 0,  dims.num_sequences,       dims.seqlen};
}

inline Shape shape_of_call(const Dims& dims, std::int64_t tokens) {
  return {dims.batch, dims.seqlen, dims.dim, static_cast<int>(dims.width), tokens, divide_up(dims.seqlen, tokens)};
}

}  // namespace statescan::causal_conv1d
