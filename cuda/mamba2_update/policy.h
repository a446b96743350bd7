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
  bool is_cluster;             // else all blocks of the call must run at the same time
};

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Clusters of 8 blocks where 16 rows or more fill the chip with them; fewer rows are spread over as many blocks as surely run
// at once on an H100 (a device with fewer multiprocessors takes the row of the table below).
inline constexpr std::int64_t kMultiprocessors = 132;
inline Blocks blocks_of(const Dims& dims, std::int64_t blocks_of_multiprocessor) {
  constexpr std::int64_t kCluster = 8, kRowsForClusters = 16;
  const std::int64_t units = dims.d_inner / kUnit;
  if (dims.batch >= kRowsForClusters) return {kCluster, divide_up(units, kCluster), true};
  std::int64_t each = 1;
  while (divide_up(units, each) * dims.batch > kMultiprocessors * blocks_of_multiprocessor) ++each;
  return {divide_up(units, each), each, false};
}

template <class Policy>
void launch(const Args& args, const Dims& dims, Stream stream);

}  // namespace statescan::mamba2_update
