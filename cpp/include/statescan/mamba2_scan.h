// mamba2_scan: a whole Mamba-2 block between its two projections (arXiv:2405.21060, section 7).
//
//   z, xBC, dt = split(zxbcdt)                [d_inner], [d_inner + 2 g n], [h] along the last axis
//   x, B, C    = split(silu(causal_conv1d(xBC, conv_weight, conv_bias)))
//   y          = ssd_scan(x, dt, A, B, C, D, dt_bias, dt_softplus=True, ...)
//   y          = gated_rms_norm(y, z, norm_weight)        without norm_weight: y silu(z)
//
// d_inner = h p is found from the sizes: width of zxbcdt = d_inner + conv_dim + h.
#pragma once

#include <limits>

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::mamba2_scan {

struct Inputs {
  Tensor zxbcdt;              // [b,l,d_inner+conv_dim+h] float32, float16, bfloat16 (float64 on the CPU)
  Tensor conv_weight;         // [conv_dim,w] dtype of zxbcdt or float32; conv_dim = d_inner + 2 g n
  Tensor conv_bias;           // [conv_dim]   dtype of conv_weight, optional
  Tensor dt_bias;             // [h]          float32, optional
  Tensor A;                   // [h]          float32
  Tensor D;                   // [h] or [h,p] float32, optional
  Tensor norm_weight;         // [d_inner]    dtype of zxbcdt or float32, optional: gate without norm
  Tensor initial_conv_state;  // [b,conv_dim,w-1] dtype of zxbcdt or float32, optional; s for b with cu_seqlens
  Tensor initial_state;       // [b,h,p,n]    float32 or narrower, optional; s for b with cu_seqlens
  Tensor cu_seqlens;          // [s+1]        int32 or int64, optional
  std::int64_t ngroups = 1;
  std::int64_t norm_group_size = 0;  // divides d_inner; 0: d_inner / ngroups
  double eps = 1e-5;
  bool norm_before_gate = false;
  bool dt_softplus = true;
  double dt_min = -std::numeric_limits<double>::infinity();
  double dt_max = std::numeric_limits<double>::infinity();
  bool reverse = false;
  std::int64_t chunk_size = 0;
  bool batch_invariant = false;
};

struct Args : Inputs {
  Tensor y;                 // [b,l,d_inner] dtype of zxbcdt
  Tensor final_conv_state;  // as initial_conv_state, optional
  Tensor final_state;       // as initial_state, optional
  Workspace workspace;
};

struct BackwardArgs : Inputs {
  Tensor dy;                                  // [b,l,d_inner] dtype of zxbcdt
  Tensor dfinal_conv_state, dfinal_state;     // optional
  Tensor dzxbcdt, dconv_weight, dconv_bias, ddt_bias, dA, dD, dnorm_weight, dinitial_conv_state, dinitial_state;
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, seqlen, nheads, headdim, ngroups, dstate, width;
  std::int64_t d_inner, conv_dim, norm_group_size;
  std::int64_t num_sequences;  // s with cu_seqlens, else batch
  bool D_per_channel;
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);

STATESCAN_API Dims validate(const BackwardArgs& args);
STATESCAN_API Plan plan(const BackwardArgs& args, const Dims& dims);
STATESCAN_API void run(const BackwardArgs& args, Stream stream = nullptr);

}  // namespace statescan::mamba2_scan
