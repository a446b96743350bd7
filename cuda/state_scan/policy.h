// What the state_scan kernels are compiled for, as plain C++: the table, the launchers and the kernels read the same numbers.
#pragma once

#include <statescan/state_scan.h>

namespace statescan::state_scan {

enum class Access {
  vector,   // 16-byte loads and stores along dstate
  strided,  // element by element, any strides and sizes
};

// Where the warps of a slice leave their shares of dlog_decay.
enum class Sums {
  workspace,  // in memory, for a second kernel
  cluster,    // in the shared memory of a cluster of blocks that holds the whole slice
};

inline constexpr int kSmallThreads = 64, kClusterThreads = 128;
inline constexpr std::int64_t kMostClusterBlocks = 8;  // that every device with clusters takes

template <DType dtype, Access access, Sums sums = Sums::workspace>
struct Policy {
  static constexpr DType kDType = dtype;
  static constexpr Access kAccess = access;
  static constexpr Sums kSums = sums;
  // Consecutive elements of a [p,n] slice that a thread carries: one 16-byte access. The same for both ways of access, so that
  // both sum in the same order and give the same bits.
  static constexpr int kVector = 16 / size_of(dtype);
  // Small blocks spread the few thousand warps of a batch of one evenly over the multiprocessors. In clusters they are larger,
  // to be fewer (b1 c32 h24 p64 n128 in bfloat16: 18.9 us with 8 blocks of 128, 19.4 with 16 of 64; H100, 2026-11-22).
  static constexpr int kThreads = sums == Sums::cluster ? kClusterThreads : kSmallThreads;
  // Chunks in flight. An H100 needs about 2.3 MB on the way to reach its bandwidth; b1 h24 p64 n128 in bfloat16 has 24,576
  // threads of 16 bytes, so 8 chunks of one stream, or 4 of two. In clusters, which the small calls take, fifth chunks of the
  // 16-bit types save 4%; in larger calls they spread over too many pages of memory (b1 c128 h80: 187 us with two to four,
  // 203 with five; H100, 2026-11-22).
  static constexpr int kForwardStages = access == Access::vector ? 8 : 2;
  static constexpr int kBackwardStages = access == Access::strided ? 2 : (sums == Sums::cluster && size_of(dtype) == 2 ? 5 : 4);
};

inline constexpr int kWarp = 32;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Warps that share a slice; each leaves one partial sum of dlog_decay a chunk.
inline std::int64_t warps_per_slice(const Dims& dims, DType dtype) {
  return divide_up(dims.headdim * dims.dstate, kWarp * (16 / size_of(dtype)));
}

// Shared memory of a block whose warps leave their sums there.
inline std::int64_t cluster_sums_bytes(const Dims& dims) {
  return dims.nchunks * (kClusterThreads / kWarp) * static_cast<std::int64_t>(sizeof(float));
}

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream);

template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& dims, Stream stream);

}  // namespace statescan::state_scan
