// What the gated_rms_norm kernels are compiled for, as plain C++: the table, the launcher and the kernel read the same numbers.
#pragma once

#include <statescan/gated_rms_norm.h>

#include "../common/access.h"

namespace statescan::gated_rms_norm {

using cuda::Access;

// Both ways of access give a thread the same elements, so they sum in the same order and give the same bits.
template <DType dtype, Access access>
struct Policy {
  static constexpr DType kDType = dtype;
  static constexpr Access kAccess = access;
  static constexpr int kRun = 16 / size_of(dtype);  // consecutive elements of a thread: one 16-byte access
  static constexpr int kRuns = 16 / kRun;           // runs of a thread in flight; with z twice as many
  static constexpr int kMaxThreads = 512;
  static constexpr int kSmallThreads = 128;         // of a block whose warps take a group each
};

inline constexpr int kWarp = 32;

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream);

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace statescan::gated_rms_norm
