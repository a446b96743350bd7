// What the selective_scan kernels are compiled for, as plain C++: the table, the launchers and the kernels read the same numbers.
#pragma once

#include <algorithm>

#include <statescan/selective_scan.h>

#include "../common/access.h"

namespace statescan::selective_scan {

enum class Arithmetic {
  fast,          // 16-bit x: the decay is one instruction of the special-function unit, 2 ulp
  precise,       // float32 x: near one the decay is kept as decay - 1
  complex_rate,  // A complex, any x; precise as well
};

inline constexpr int kWarp = 32;
inline constexpr int kTile = 16;           // tokens that a block stages at a time
inline constexpr int kChannels = 64;       // of a block; every lane carries two
inline constexpr int kRun = 8;             // elements of x, dt, z and y that a thread moves at a time
inline constexpr int kRuns = kTile * kChannels / kRun;
inline constexpr int kMostWarps = 16;      // that share the states of a channel; what they stage fits 99 KB

// Bits depend on kStates through the order in which y is summed, and dstate alone decides it.
template <Arithmetic arithmetic, int states, bool time_invariant>
struct Policy {
  static constexpr Arithmetic kArithmetic = arithmetic;
  static constexpr int kParts = arithmetic == Arithmetic::complex_rate ? 2 : 1;
  static constexpr int kStates = states;                  // of each of its channels that a thread carries
  static constexpr int kValues = kStates * kParts;
  static constexpr bool kTimeInvariant = time_invariant;  // B or C is [d,n]
  static constexpr int kXBytes = arithmetic == Arithmetic::fast ? 2 : 4;  // the widest element of x
  // Four states of a channel make four warps of the usual 16, so that blocks of 64 channels spread evenly over the multiprocessors.
  static constexpr int kMostThreads = states == 4 && kParts == 1 ? kRuns : kMostWarps * kWarp;
  static constexpr int kLeastBlocks = kMostThreads == kRuns ? 5 : 1;
};

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline int states_per_thread(const Dims& d) { return d.complex_A || d.dstate <= 16 ? 4 : 8; }

// Longer rows of states go through in pieces, with a partial sum of y between them.
inline std::int64_t states_per_piece(const Dims& d) {
  return std::clamp<std::int64_t>(divide_up(d.dstate, states_per_thread(d)), 1, kMostWarps) * states_per_thread(d);
}
inline std::int64_t pieces(const Dims& d) { return d.dstate == 0 ? 1 : divide_up(d.dstate, states_per_piece(d)); }

inline std::int64_t blocks_per_group(const Dims& d) { return d.ngroups > 0 ? divide_up(d.dim / d.ngroups, kChannels) : 0; }

// Into how many segments each sequence is cut, so that a small batch fills the chip: a plain function of the shape. A segment's
// start costs a pass over the tokens before it, without C, z and y.
inline std::int64_t segments(const Dims& d, bool batch_invariant) {
  constexpr std::int64_t kWantedBlocks = 640, kEnoughBlocks = 264, kLeastTokens = 256;
  const std::int64_t tasks = d.num_sequences * d.ngroups * blocks_per_group(d);
  if (batch_invariant || tasks == 0 || tasks >= kEnoughBlocks) return 1;
  const std::int64_t tokens = d.batch * d.seqlen / d.num_sequences;  // of the average sequence
  return std::max<std::int64_t>(std::min(divide_up(kWantedBlocks, tasks), tokens / kLeastTokens), 1);
}

// Scratch memory of the forward, in floats.
struct Scratch {
  std::int64_t partial, states, steps;
  std::int64_t total() const { return partial + states + steps; }
};
inline Scratch forward_scratch(const Dims& d, bool batch_invariant) {
  const std::int64_t ends = d.num_sequences * (segments(d, batch_invariant) - 1) * d.dim;
  return {pieces(d) > 1 ? d.batch * d.seqlen * d.dim : 0, ends * d.dstate * (d.complex_A ? 2 : 1), ends};
}

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream);

}  // namespace statescan::selective_scan
