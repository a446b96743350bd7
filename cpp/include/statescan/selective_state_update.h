// selective_state_update: selective_scan (Mamba-1) or ssd_scan (Mamba-2) on one or a few new tokens, the states of a cache
// updated in place. The state's rank tells which: [slots,d,n] is Mamba-1, [slots,h,p,n] is Mamba-2.
#pragma once

#include <limits>

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::selective_state_update {

// Mamba-1 is the case h = d, p = 1 with an A of its own for every state; Dims says it so, and kernels see only that form.
struct Args {
  Tensor state;              // [slots,d,n] or [slots,h,p,n]  float32, float16, bfloat16 (complex64 with a complex A; float64)
  Tensor x;                  // [b,d], [b,t,d]     or [b,h,p], [b,t,h,p]   float32, float16, bfloat16 (float64 on the CPU)
  Tensor dt;                 // [b,d], [b,t,d]     or [b,h], [b,t,h]       any of these dtypes
  Tensor A;                  // [d,n] float32 or complex64    or [h] float32
  Tensor B;                  // [b,g,n] or [b,t,g,n]  dtype of x (complex64 with a complex A); or [d,n] dtype of A (Mamba-1)
  Tensor C;                  // as B
  Tensor D;                  // [d]                or [h], [h,p]  float32, optional
  Tensor z;                  // as x, optional
  Tensor dt_bias;            // [d]                or [h]         float32, optional
  Tensor state_indices;      // [b] int32 or int64: the slot to read, -1 for padding; optional: row i in slot i
  // [b] int32 or int64: the slot to write; -1: not written; optional: where it was read. No slot may be written twice, nor
  // written by one row and read by another.
  Tensor out_state_indices;
  bool dt_softplus = false;
  double dt_min = -std::numeric_limits<double>::infinity();
  double dt_max = std::numeric_limits<double>::infinity();
  Tensor y;                  // as x; zero in padding rows
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, ntokens, nheads, headdim, ngroups, dstate, slots;
  bool mamba1;                // state [slots,d,n]: nheads = d, headdim = 1
  bool has_token_axis;        // x is [b,t,...]
  bool complex_A;
  bool varying_B, varying_C;  // B, C change with the token; else [d,n]
  bool D_per_channel;         // D is [h,p]
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);
// The same for arguments, y among them, that validate() has accepted with these Dims: a decode loop need not ask again.
STATESCAN_API void run_validated(const Args& args, const Dims& dims, Stream stream = nullptr);

}  // namespace statescan::selective_state_update
