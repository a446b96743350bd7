// causal_conv1d_update: causal_conv1d on one or a few new tokens, the states of a cache updated in place.
#pragma once

#include <statescan/causal_conv1d.h>

namespace statescan::causal_conv1d_update {

struct Args {
  Tensor x;              // [b,d] or [b,t,d]  float32, float16, bfloat16 (float64 on the CPU)
  Tensor state;          // [slots,d,w-1]     dtype of x or float32; the last w-1 inputs, oldest first; updated in place
  Tensor weight;         // [d,w]             dtype of x or float32, w from 2 to 8
  Tensor bias;           // [d]               dtype of weight, optional
  Tensor state_indices;  // [b]               int32 or int64: the slot of each row, -1 for padding; optional: row i in slot i
  causal_conv1d::Activation activation = causal_conv1d::Activation::none;
  Tensor y;              // as x; zero in padding rows
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, ntokens, dim, width, slots;
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);
// The same for arguments, y among them, that validate() has accepted with these Dims: a decode loop need not ask again.
STATESCAN_API void run_validated(const Args& args, const Dims& dims, Stream stream = nullptr);

}  // namespace statescan::causal_conv1d_update
