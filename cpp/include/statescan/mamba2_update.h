// mamba2_update: mamba2_scan on one or a few new tokens, both states of a cache updated in place.
#pragma once

#include <limits>

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::mamba2_update {

struct Args {
  Tensor zxbcdt;              // [b,m] or [b,t,m], m = d_inner+conv_dim+h; float32, float16, bfloat16 (float64 on the CPU)
  Tensor conv_state;          // [slots,conv_dim,w-1]  dtype of zxbcdt or float32; updated in place
  Tensor state;               // [slots,h,p,n]  float32, float16, bfloat16 (float64); updated in place
  Tensor conv_weight;         // [conv_dim,w]   dtype of zxbcdt or float32; conv_dim = d_inner + 2 g n
  Tensor conv_bias;           // [conv_dim]     dtype of conv_weight, optional
  Tensor dt_bias;             // [h]            float32, optional
  Tensor A;                   // [h]            float32
  Tensor D;                   // [h] or [h,p]   float32, optional
  Tensor norm_weight;         // [d_inner]      dtype of zxbcdt or float32, optional: gate without norm
  Tensor state_indices;       // [b] int32 or int64: the slot of both states, -1 for padding; optional: row i in slot i
  std::int64_t ngroups = 1;
  std::int64_t norm_group_size = 0;  // divides d_inner; 0: d_inner / ngroups
  double eps = 1e-5;
  bool norm_before_gate = false;
  bool dt_softplus = true;
  double dt_min = -std::numeric_limits<double>::infinity();
  double dt_max = std::numeric_limits<double>::infinity();
  Tensor y;                   // [b,d_inner] or [b,t,d_inner] dtype of zxbcdt; zero in padding rows
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, ntokens, nheads, headdim, ngroups, dstate, width, slots;
  std::int64_t d_inner, conv_dim, norm_group_size;
  bool has_token_axis;
  bool D_per_channel;
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);
// The same for arguments, y among them, that validate() has accepted with these Dims: a decode loop need not ask again.
STATESCAN_API void run_validated(const Args& args, const Dims& dims, Stream stream = nullptr);

}  // namespace statescan::mamba2_update
