// What the general kernels of ssd_scan are compiled for, as plain C++: the table, the launchers and the kernels read the same
// numbers.
#pragma once

#include <statescan/ssd_scan.h>

namespace statescan::ssd_scan {

inline constexpr int kRowsOfWarp = 16;  // of headdim: their states stay in a warp's registers

// Every product runs as mma.sync of bfloat16 with float sums. A number that needs more digits is a sum of bfloat16 terms, which
// have the range of a float: 2 terms hold 16 bits, 3 hold the 24 of a float. Of two such sums the products with i + j < terms
// are added up, the others lie below the last digit that counts.
template <DType dtype, int dstate>
struct Policy {
  static constexpr DType kDType = dtype;
  static constexpr int kDstate = dstate;  // columns of B, C and the state, zeros past the call's own
  static constexpr int kTermsOfInput = dtype == DType::float32 ? 3 : (dtype == DType::float16 ? 2 : 1);
  // Terms of what the kernel computes and multiplies again: scores, weighted x, state. One term would round to bfloat16, and
  // two roundings besides that of y reach the accuracy gate in short sequences.
  static constexpr int kTerms = dtype == DType::float32 ? 3 : 2;
  // Tokens of a chunk. B, C and x of one, as terms, stay below 86 KiB: devices with 99 KiB a block (sm_86, sm_120) run all.
  static constexpr int kChunk = 64 / (dtype == DType::bfloat16 ? 1 : 2) / (dstate > 128 && dtype != DType::float16 ? 2 : 1);
  // Two heads of 64 rows share a block, and so B, C and C B^T. Three blocks of one head each on a multiprocessor, in fewer
  // registers, took 16 percent longer, two 10 percent (H100, b8 l2048 h80 n128).
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kRowsOfWarp * kWarps;
  static constexpr int kMaxHeads = 4;  // of a block: each has scores of its own in shared memory
};

inline constexpr int kMaxDstate = 256;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace statescan::ssd_scan
