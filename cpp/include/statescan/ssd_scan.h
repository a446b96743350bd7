// ssd_scan: the Mamba-2 scan (state space duality, Dao & Gu 2024, arXiv:2405.21060).
//
//   h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]        state h [headdim, dstate] of each head
//   y[t] = C[t] . h[t] + D x[t],   then y *= silu(z)
//
// dt is the discretised step: dt_bias added, softplus if asked, then limited to [dt_min, dt_max].
#pragma once

#include <limits>

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

namespace statescan::ssd_scan {

// The states that a training step keeps are those that enter each stretch of so many tokens of a sequence.
constexpr std::int64_t stretch_of(DeviceType device) { return device == DeviceType::cpu ? 256 : 128; }

struct Inputs {
  Tensor x;              // [b,l,h,p] float32, float16, bfloat16 (float64 on the CPU)
  Tensor dt;             // [b,l,h]   any of these dtypes
  Tensor A;              // [h]       float32
  Tensor B;              // [b,l,g,n] dtype of x
  Tensor C;              // [b,l,g,n] dtype of x
  Tensor D;              // [h] or [h,p] float32, optional
  Tensor z;              // [b,l,h,p] dtype of x, optional
  Tensor dt_bias;        // [h]       float32, optional
  Tensor initial_state;  // [b,h,p,n] float32 or narrower, optional; [s,h,p,n] with cu_seqlens
  Tensor cu_seqlens;     // [s+1]     int32 or int64: sequence i is tokens [cu[i], cu[i+1]) of a batch of one; optional
  bool dt_softplus = false;
  double dt_min = -std::numeric_limits<double>::infinity();
  double dt_max = std::numeric_limits<double>::infinity();
  bool reverse = false;          // scan from the last token to the first
  std::int64_t chunk_size = 0;   // 0: the library picks
  bool batch_invariant = false;  // same bits for a row at any batch size and packing
};

// How the recurrence is computed; results agree to rounding.
enum class SsdMode : std::uint8_t {
  automatic,  // the library picks what is fastest
  chunked,    // matrix products inside chunks, a state between them
  recurrent,  // token by token
  quadratic,  // one chunk: the masked attention form, whose work grows with the square of the sequence
};

struct Args : Inputs {
  Tensor y;                // [b,l,h,p] dtype of x
  Tensor final_state;      // [b,h,p,n] or [s,h,p,n] float32 or narrower, optional
  Tensor state_positions;  // [b,k] or [s,k] int32 or int64, optional: after how many tokens of the sequence, counted as the scan
                           // meets them, the state is wanted. Ascending; 0 asks for the initial state, what lies outside of
                           // 0..its length (-1, say) for zeros, and may stand anywhere.
  Tensor position_states;  // [b,k,h,p,n] or [s,k,h,p,n] float32 or narrower, given with state_positions
  Tensor chunk_states;     // dtype of x, or float32 (float64 where x is), optional: the state that enters each stretch, in the
                           // order in which the scan meets them, the first of them the initial state.
                           // [b,ceil(l/t),h,p,n], t = stretch_of(device); with cu_seqlens [1,l/t+s,h,p,n], where sequence i has
                           // its stretch k in row cu[i]/t + i + k, and rows on which none falls are left alone.
  SsdMode mode = SsdMode::automatic;
  Workspace workspace;
};

struct BackwardArgs : Inputs {
  Tensor dy;            // [b,l,h,p] dtype of x
  Tensor dfinal_state;  // as final_state, optional
  Tensor chunk_states;  // what the forward of the same call kept, optional: it need not be made again then
  Tensor dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state;  // shape of what each differentiates; any may be absent
  Workspace workspace;
};

struct Dims {
  std::int64_t batch, seqlen, nheads, headdim, ngroups, dstate;
  std::int64_t num_sequences;  // s with cu_seqlens, else batch
  bool D_per_channel;          // D is [h,p]
  std::int64_t npositions = 0;  // k of state_positions
  std::int64_t nstretches = 0;  // the second axis of chunk_states
};

STATESCAN_API Dims validate(const Args& args);
STATESCAN_API Plan plan(const Args& args, const Dims& dims);
STATESCAN_API void run(const Args& args, Stream stream = nullptr);

STATESCAN_API Dims validate(const BackwardArgs& args);
STATESCAN_API Plan plan(const BackwardArgs& args, const Dims& dims);
STATESCAN_API void run(const BackwardArgs& args, Stream stream = nullptr);

}  // namespace statescan::ssd_scan
