// What the mamba2_update kernels are compiled for, as plain C++: the table, the launcher and the kernel read the same numbers.
#pragma once

#include <statescan/mamba2_update.h>

namespace statescan::mamba2_update {

inline constexpr int kWarp = 32;

// Channels that a block takes at a time.
inline constexpr int kUnit = 32;

// The one-launch kernel: a block takes 32 channels (rows of states) of a row of the batch at a time, its threads 16 bytes of
// kRows of them each, so that dstate is 8 kRows kRun.
template <DType state, int rows>
struct Policy {
  static constexpr DType kState = state;
  static constexpr int kRows = rows;
  static constexpr int kRun = 16 / size_of(state);
  static constexpr int kThreads = 256;
  static constexpr int kUnit = mamba2_update::kUnit;
  static constexpr int kLanes = kThreads * rows / kUnit;  // of a team, which shares kRows channels
  static constexpr int kDState = kLanes * kRun;
  static constexpr int kBlocksOfMultiprocessor = 2;  // that its registers allow
};

// How the units of a row are dealt out.
struct Blocks {
  std::int64_t of_row, units;  // units: of a block
};

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// More rows take the launches that this one stands for. H100, H80 P64 N128, float32 state, microseconds in one launch and
// composed: B1 9.6 and 10.1, B8 24.8 and 26.3, B16 54.6 (in clusters) and 41.4, B64 170 and 130.
inline constexpr std::int64_t kMostRows = 15;

// All blocks of a call must run at the same time: as many as surely do on an H100 (a device with fewer multiprocessors takes
// the row of the table below).
inline constexpr std::int64_t kMultiprocessors = 132;
inline Blocks blocks_of(const Dims& dims, std::int64_t blocks_of_multiprocessor) {
  const std::int64_t units = dims.d_inner / kUnit;
  std::int64_t each = 1;
  while (divide_up(units, each) * dims.batch > kMultiprocessors * blocks_of_multiprocessor) ++each;
  return {divide_up(units, each), each};
}

template <class Policy>
void launch(const Args& args, const Dims& dims, Stream stream);

}  // namespace statescan::mamba2_update
