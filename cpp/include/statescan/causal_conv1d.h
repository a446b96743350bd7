// causal_conv1d: the depthwise causal convolution before a Mamba scan.
//
//   y[t,d] = act(bias[d] + sum_k weight[d,k] x[t-w+1+k, d])        x before the sequence is initial_state, or zero
//
// final_state [d,w-1] holds the last w-1 inputs, oldest first, initial_state included when the sequence is shorter. With
// reverse the time axis is mirrored: y[t] = act(bias + sum_k weight[k] x[t+w-1-k]), and states hold the first inputs,
// the farthest first.
#pragma once

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::causal_conv1d {

inline constexpr std::int64_t kMinWidth = 2, kMaxWidth = 8;

enum class Activation : std::uint8_t { none, silu };

struct Inputs {
  Tensor x;              // [b,l,d]   float32, float16, bfloat16 (float64 on the CPU)
  Tensor weight;         // [d,w]     dtype of x or float32, w from 2 to 8
  Tensor bias;           // [d]       dtype of weight, optional
  Tensor initial_state;  // [b,d,w-1] dtype of x or float32, optional; [s,d,w-1] with cu_seqlens
  Tensor cu_seqlens;     // [s+1]     int32 or int64: sequence i is tokens [cu[i], cu[i+1]) of a batch of one; optional
  Activation activation = Activation::none;
  bool reverse = false;
};

struct Args : Inputs {
  Tensor y;            // [b,l,d]   dtype of x
  Tensor final_state;  // [b,d,w-1] or [s,d,w-1] dtype of x or float32, optional
  Workspace workspace;
};

struct BackwardArgs : Inputs {
  Tensor dy;            // [b,l,d] dtype of x
  Tensor dfinal_state;  // as final_state, optional
  Tensor dx, dweight, dbias, dinitial_state;  // shape of what each differentiates; any may be absent
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, seqlen, dim, width;
  std::int64_t num_sequences;  // s with cu_seqlens, else batch
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);

STATESCAN_API Dims validate(const BackwardArgs& args);
STATESCAN_API Plan plan(const BackwardArgs& args, const Dims& dims);
STATESCAN_API void run(const BackwardArgs& args, Stream stream = nullptr);

}  // namespace statescan::causal_conv1d
