// gated_rms_norm: RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) with Mamba-2's SiLU gate, in either order.
//
//   norm_before_gate:  y = rms(x) weight silu(z)        else:  y = rms(x silu(z)) weight
//   rms(v) = v / sqrt(mean(v^2) + eps), the mean over each group of group_size channels
#pragma once

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::gated_rms_norm {

struct Inputs {
  Tensor x;       // [..., d] float32, float16, bfloat16 (float64 on the CPU); at most 5 leading axes
  Tensor z;       // [..., d] dtype of x, optional: no gate
  Tensor weight;  // [d]      dtype of x or float32, optional: ones
  std::int64_t group_size = 0;  // divides d; 0: d
  double eps = 1e-5;
  bool norm_before_gate = false;
};

struct Args : Inputs {
  Tensor y;  // [..., d] dtype of x
  Workspace workspace;
};

struct BackwardArgs : Inputs {
  Tensor dy;               // [..., d] dtype of x
  Tensor dx, dz, dweight;  // shape of what each differentiates; any may be absent
  Workspace workspace;
};

struct Dims {
  std::int64_t rows, dim, group_size;  // rows: product of the leading axes
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);

STATESCAN_API Dims validate(const BackwardArgs& args);
STATESCAN_API Plan plan(const BackwardArgs& args, const Dims& dims);
STATESCAN_API void run(const BackwardArgs& args, Stream stream = nullptr);

}  // namespace statescan::gated_rms_norm
