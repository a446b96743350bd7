// selective_scan: the Mamba-1 scan (S6, Gu & Dao 2023, arXiv:2312.00752).
//
//   h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]        state h [dstate] of each channel
//   y[t] = C[t] . h[t] + D x[t],   then y *= silu(z)    (2 Re C[t].h[t] with a complex A)
//
// dt is the discretised step: dt_bias added, softplus if asked, then limited to [dt_min, dt_max].
#pragma once

#include <limits>

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::selective_scan {

struct Inputs {
  Tensor x;              // [b,l,d]   float32, float16, bfloat16 (float64 on the CPU)
  Tensor dt;             // [b,l,d]   any of these dtypes
  Tensor A;              // [d,n]     float32 or complex64
  Tensor B;              // [b,l,g,n] dtype of x (complex64 with a complex A), or [d,n] dtype of A: time-invariant
  Tensor C;              // as B, each on its own
  Tensor D;              // [d]       float32, optional
  Tensor z;              // [b,l,d]   dtype of x, optional
  Tensor dt_bias;        // [d]       float32, optional
  Tensor initial_state;  // [b,d,n]   float32 or narrower (complex64 with a complex A), optional; [s,d,n] with cu_seqlens
  Tensor cu_seqlens;     // [s+1]     int32 or int64: sequence i is tokens [cu[i], cu[i+1]) of a batch of one; optional
  bool dt_softplus = false;
  double dt_min = -std::numeric_limits<double>::infinity();
  double dt_max = std::numeric_limits<double>::infinity();
  bool reverse = false;          // scan from the last token to the first
  bool batch_invariant = false;  // same bits for a row at any batch size and packing
};

struct Args : Inputs {
  Tensor y;                // [b,l,d] dtype of x
  Tensor final_state;      // [b,d,n] or [s,d,n] as initial_state, optional
  Tensor state_positions;  // [b,k] or [s,k] int32 or int64, optional: after how many tokens of the sequence, counted as the scan
                           // meets them, the state is wanted. Ascending; 0 asks for the initial state, what lies outside of
                           // 0..its length (-1, say) for zeros, and may stand anywhere.
  Tensor position_states;  // [b,k,d,n] or [s,k,d,n] as initial_state, given with state_positions
  Workspace workspace;
};

struct BackwardArgs : Inputs {
  Tensor dy;            // [b,l,d] dtype of x
  Tensor dfinal_state;  // as final_state, optional
  Tensor dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state;  // shape of what each differentiates; any may be absent
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, seqlen, dim, ngroups, dstate;
  std::int64_t num_sequences;  // s with cu_seqlens, else batch
  bool complex_A;
  bool varying_B, varying_C;  // B, C change with the token; else [d,n]
  std::int64_t npositions = 0;  // k of state_positions
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);

STATESCAN_API Dims validate(const BackwardArgs& args);
STATESCAN_API Plan plan(const BackwardArgs& args, const Dims& dims);
STATESCAN_API void run(const BackwardArgs& args, Stream stream = nullptr);

}  // namespace statescan::selective_scan
