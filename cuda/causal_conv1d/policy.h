// What the causal_conv1d kernels are compiled for, as plain C++: the table, the launchers and the kernels read the same
// numbers.
#pragma once

#include <algorithm>

#include <statescan/causal_conv1d.h>

#include "../common/access.h"

namespace statescan::causal_conv1d {

using cuda::Access;

// The widest filter that a kernel's registers hold. kFour kernels take a width of exactly 4, and have no branches for others.
inline constexpr int kFour = 4, kUpTo8 = static_cast<int>(kMaxWidth);

inline constexpr int kWarp = 32, kThreads = 128;
inline constexpr int kForwardWalkThreads = 64;

// Channels of a thread that walks. Of the 16-bit types 8 bytes: with 16 it would hold so much that an H100 has too few threads
// to reach its bandwidth (170 us instead of 126 for the forward of b8 l2048 d5376).
inline constexpr int kVectorChannels = 4;

// How a kernel goes through its tensors.
enum class Way {
  channels,  // a thread takes some channels, side by side in memory, through a segment of the tokens, the window in its
             // registers
  strided,   // a thread takes one channel, wherever it lies
  time,      // a warp takes a channel whose tokens lie side by side through a segment of them, each lane 16 bytes at a time
};

template <DType dtype, Way way, int taps>
struct Policy {
  static constexpr DType kDType = dtype;
  static constexpr Way kWay = way;
  static constexpr int kTaps = taps;
  // Walking over tokens.
  static constexpr Access kAccess = way == Way::strided ? Access::strided : Access::vector;
  static constexpr int kChannels = way == Way::strided ? 1 : kVectorChannels;
  static constexpr int kForwardAhead = taps == kFour ? 8 : 4;  // tokens on their way at once
  static constexpr int kBackwardAhead = 4;
  // Way::time.
  static constexpr int kRun = 16 / size_of(dtype);  // consecutive tokens of a lane
  static constexpr int kStep = kWarp * kRun;        // and of a warp
  static constexpr int kStepsAhead = 4;             // steps on their way at once, in the forward
};

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Tokens of a segment of the walk: as many segments as fill an H100 a whole number of times, each as long as that allows, since
// its window is loaded again (and in the backward the gradients of as many tokens after it worked out again).
inline std::int64_t walk_tokens(const Dims& dims, std::int64_t channels, std::int64_t threads, std::int64_t shortest,
                                std::int64_t longest) {
  const std::int64_t rows = std::max<std::int64_t>(dims.batch * divide_up(dims.dim, channels), 1);
  const std::int64_t segments = std::max<std::int64_t>(threads / rows, 1);
  return std::clamp(divide_up(divide_up(dims.seqlen, segments), 8) * 8, shortest, longest);
}
inline constexpr std::int64_t kMultiprocessors = 132;
// The forward of four taps gains more from many short-lived blocks, which never pause all at once, than a window of three
// tokens costs: H100, b8 l2048 d5376 bfloat16, 125 us with 24 tokens and blocks of 64 threads, 129 with 96 and 128.
inline std::int64_t forward_walk_tokens(const Dims& dims, std::int64_t channels) {
  const std::int64_t longest = dims.width == kFour && channels == kVectorChannels ? 24 : 128;
  return walk_tokens(dims, channels, 3 * kMultiprocessors * 5 * kThreads, 16, longest);
}
inline std::int64_t backward_walk_tokens(const Dims& dims, std::int64_t channels) {
  return walk_tokens(dims, channels, kMultiprocessors * 4 * kThreads, 32, 512);
}

// The same for the warps of the other kernels, in steps of kStep tokens.
inline std::int64_t time_tokens(const Dims& dims, std::int64_t step, std::int64_t shortest, std::int64_t longest) {
  constexpr std::int64_t kFill = 1 << 13;  // warps
  const std::int64_t rows = std::max<std::int64_t>(dims.batch * dims.dim, 1);
  const std::int64_t segments = std::max<std::int64_t>(divide_up(kFill, rows), 1);
  return std::clamp(divide_up(divide_up(dims.seqlen, segments), step), shortest, longest) * step;
}
inline std::int64_t forward_time_tokens(const Dims& dims, std::int64_t step) { return time_tokens(dims, step, 1, 16); }
inline std::int64_t backward_time_tokens(const Dims& dims, std::int64_t step) { return time_tokens(dims, step, 2, 16); }

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream);
template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& dims, Stream stream);

}  // namespace statescan::causal_conv1d
