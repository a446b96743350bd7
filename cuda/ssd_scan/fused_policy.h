// The fused kernel's choices, in plain C++.
#pragma once

#include "fused_params.h"

namespace statescan::ssd_scan {

// More states are the work of two blocks, a side of them each.
inline constexpr int kMostStatesOfBlock = 128;

constexpr int sides_of(int padded_dstate) { return padded_dstate > kMostStatesOfBlock ? 2 : 1; }

// Two consumer warpgroups, each with a slice of a head: they share B and C. A third warpgroup feeds them.
// gated: for the gradients of a call with z. The forward kernel leaves dz where others leave y.
template <DType dtype, int padded_dstate, bool gated = false>
struct FusedPolicy {
  static constexpr DType kDType = dtype;
  static constexpr bool kGated = gated;
  static constexpr int kSides = sides_of(padded_dstate);
  static constexpr int kState = padded_dstate / kSides;  // of a block: 64 or 128
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Registers of a thread: the state takes kState / 2, scores and output 32 each, matrix operands 32.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  // Chunks on their way: what fits beside the state and the output.
  static constexpr int kStages = kState == 128 ? 3 : 4;
  // What rounding takes from a token's own score goes the way of D, to its x. The more states, the less of y is D x itself, and
  // with 256 y was 1.42 roundings of the exact result off, 1.25 with this (emulated, headdim 40 to 64); the gate is 1.5.
  static constexpr bool kKeepsDiagonal = kSides > 1;
  static constexpr bool kCanWalk = kSides == 1 && !gated;  // blocks to their segments, in kernels of their own
  // Between stretches, and at positions: rare, for all dstate from 128 down.
  static constexpr bool kKeepsStates = padded_dstate >= kMostStatesOfBlock && !gated;
  static constexpr bool kLeavesStates = kKeepsStates && kSides == 1;
  static constexpr bool kScalesOutput = kDType == DType::bfloat16 && kLeavesStates;  // y with shared exponents, as well
};

}  // namespace statescan::ssd_scan
