// What the selective_state_update kernels are compiled for, as plain C++: the table, the launcher and the kernel read the same
// numbers.
#pragma once

#include <statescan/selective_state_update.h>

#include "../common/access.h"

namespace statescan::selective_state_update {

enum class Form {
  mamba1,  // A, and with it the decay, differs along dstate; dt from row to row
  mamba2,  // one decay for a head
};

using cuda::Access;

// What a call's x, dt, z, B, C and y are. One token of bfloat16, beside states of that or of float32, has a kernel that takes
// it for granted: asked at run time, it is much of a batch of one. H100, h80 p64 n128, b1, and in L2, us: float32 state 3.22
// to 3.08 and 2.61 to 2.27, bfloat16 2.65 to 2.33 and 2.21 to 1.86.
enum class Elements { any, bfloat16 };

// Both ways of access give a lane the same states, so they sum in the same order and give the same bits.
template <DType state, Form form, Access access>
struct Policy {
  static constexpr DType kState = state;
  static constexpr Form kForm = form;
  static constexpr Access kAccess = access;
  static constexpr int kParts = is_complex(state) ? 2 : 1;
  static constexpr int kRun = 16 / size_of(state);  // consecutive states of a lane: one 16-byte access
  static constexpr int kRuns = 4;                   // runs of a lane, all on their way at once
  // Threads of a block, from small blocks, which spread a small batch evenly, to such as are one for each multiprocessor of an
  // H100 in a batch of one of Mamba-2. H100, h80 p64 n128, from 64 to 320 threads, us: float32 b1 3.57 to 3.20 (in L2 3.06 to
  // 2.61), b64 117.1 to 114.1; bfloat16 b1 2.64 to 2.58 (in L2 2.19 to 2.28), b64 59.9 to 64.8.
  static constexpr int kLeastThreads = 64, kMostThreads = state == DType::float32 ? 320 : kLeastThreads;
  // The runs of a lane belong to 4 rows, or, when a row is longer than a warp's 32 runs, to 1 row (2 of 16-bit states, whose
  // runs widen to twice as many registers).
  static constexpr int kLongRuns = size_of(state) == 2 ? 2 : 4;
};

template <class Policy>
void launch(const Args& args, const Dims& dims, Stream stream);

inline constexpr int kWarp = 32, kMultiprocessors = 132;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Of rows of several runs the registers leave room for small blocks alone.
template <class Policy>
constexpr int most_threads(int runs_of_row) {
  return runs_of_row == 1 ? Policy::kMostThreads : Policy::kLeastThreads;
}

// States of a row that are held at once. Longer rows go through in pieces, with a partial sum for each output between them.
template <class Policy>
constexpr std::int64_t held_states(const Dims& dims) {
  const std::int64_t one_run_a_lane = kWarp * Policy::kRun;
  return dims.dstate <= one_run_a_lane ? one_run_a_lane : Policy::kLongRuns * one_run_a_lane;
}

}  // namespace statescan::selective_state_update
