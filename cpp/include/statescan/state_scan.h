// state_scan: the scan over chunk states that links the chunks of an SSD (arXiv:2405.21060, section 6).
//
//   S[c] = exp(log_decay[c]) S[c-1] + update[c]         S[-1] = initial_state, or zero
//
// states[c] is the state before chunk c, S[c-1]; final_state is the state after the last chunk.
#pragma once

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::state_scan {

struct Inputs {
  Tensor log_decay;      // [b,c,h]     float32 (float64 with a float64 update)
  Tensor initial_state;  // [b,h,p,n]   float32 or narrower, optional; [s,h,p,n] with cu_seqlens
  Tensor cu_seqlens;     // [s+1]       int32 or int64: sequence i is chunks [cu[i], cu[i+1]) of a batch of one; optional
  bool reverse = false;  // scan from the last chunk to the first
};

struct Args : Inputs {
  Tensor update;       // [b,c,h,p,n] float32, float16, bfloat16 (float64 on the CPU)
  Tensor states;       // [b,c,h,p,n] dtype of update
  Tensor final_state;  // [b,h,p,n] or [s,h,p,n] float32 or narrower, optional
  Workspace workspace;
};

// With G[c] the adjoint of S[c]: G[last] = dfinal_state, G[c-1] = dstates[c] + exp(log_decay[c]) G[c];
// dupdate[c] = G[c], dlog_decay[c] = exp(log_decay[c]) <G[c], states[c]>, dinitial_state = G[-1].
struct BackwardArgs : Inputs {
  Tensor states;          // [b,c,h,p,n] what the forward returned
  Tensor dstates;         // [b,c,h,p,n] dtype of states
  Tensor dfinal_state;    // as final_state, optional
  Tensor dlog_decay;      // [b,c,h]     dtype of log_decay; absent: not wanted
  Tensor dupdate;         // [b,c,h,p,n] dtype of states; absent: not wanted
  Tensor dinitial_state;  // [b,h,p,n] or [s,h,p,n] float32 or narrower; absent: not wanted
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, nchunks, nheads, headdim, dstate;
  std::int64_t num_sequences;  // s with cu_seqlens, else batch
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);

STATESCAN_API Dims validate(const BackwardArgs& args);
STATESCAN_API Plan plan(const BackwardArgs& args, const Dims& dims);
STATESCAN_API void run(const BackwardArgs& args, Stream stream = nullptr);

}  // namespace statescan::state_scan
