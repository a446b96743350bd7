// What the causal_conv1d_update kernels are compiled for, as plain C++.
#pragma once

#include <statescan/causal_conv1d_update.h>

namespace statescan::causal_conv1d_update {

template <DType dtype, int taps>
struct Policy {
  static constexpr DType kDType = dtype;
  static constexpr int kTaps = taps;  // the widest filter that the kernel's registers hold; narrower ones lie at their end
  static constexpr int kRows = 4;     // of the batch, which share a thread's weights
  static constexpr int kThreads = 128;
};

inline constexpr int kShortTaps = 4, kLongTaps = causal_conv1d::kMaxWidth;

template <class Policy>
void launch(const Args& args, const Dims& dims, Stream stream);

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace statescan::causal_conv1d_update
