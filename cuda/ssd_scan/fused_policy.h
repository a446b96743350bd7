// The fused kernel's choices, in plain C++.
#pragma once

#include "fused_params.h"

namespace statescan::ssd_scan {

// Two consumer warpgroups, each with a slice of a head: they share B and C. A third warpgroup feeds them.
template <DType dtype, int padded_dstate>
struct FusedPolicy {
  static constexpr DType kDType = dtype;
  static constexpr int kState = padded_dstate;  // 64 or 128
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Registers of a thread: the state takes kState / 2, scores and output 32 each, matrix operands 32.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  // Chunks on their way: what fits beside the state and the output.
  static constexpr int kStages = kState == 128 ? 3 : 4;
  static constexpr bool kLeavesStates = kState == 128;  // at positions or between stretches: rare, for all dstate
  static constexpr bool kScalesOutput = kDType == DType::bfloat16 && kState == 128;  // y with shared exponents, as well
};

}  // namespace statescan::ssd_scan
