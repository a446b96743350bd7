// What the gated_rms_norm kernels are compiled for, as plain C++: the table, the launcher and the kernel read the same numbers.
#pragma once

#include <algorithm>

#include <statescan/gated_rms_norm.h>

#include "../common/access.h"

namespace statescan::gated_rms_norm {

using cuda::Access;

// Both ways of access give a thread the same elements, so they sum in the same order and give the same bits. gate: the dtype of
// z and y, another than that of x inside mamba2_update.
template <DType dtype, Access access, DType gate = dtype>
struct Policy {
  static constexpr DType kDType = dtype, kGate = gate;
  static constexpr Access kAccess = access;
  static constexpr int kRun = 16 / size_of(dtype);  // consecutive elements of a thread: one 16-byte access
  static constexpr int kRuns = 16 / kRun;           // runs of a thread in flight; with z twice as many
  static constexpr int kHeld = kRuns * kRun;        // elements that a thread holds
  static constexpr int kMaxThreads = 512;
  static constexpr int kSmallThreads = 128;  // of a block whose warps take a group each
};

inline constexpr int kWarp = 32;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The backward. A thread holds 8 elements, five numbers of each, and the next row's; groups that would want more than 640 such
// threads take 16 a thread, and those of more than 512 threads go through in chunks.
inline constexpr int kFewHeld = 8, kManyHeld = 16;
constexpr int backward_threads(int held) { return held == kFewHeld ? 640 : 512; }

inline int backward_held(const Dims& dims) {
  return dims.group_size <= kFewHeld * backward_threads(kFewHeld) ? kFewHeld : kManyHeld;
}

// Shares of the rows: as many as an H100 runs at once. More would only mean more shares of dweight.
inline std::int64_t shares_of_rows(const Dims& dims) {
  constexpr std::int64_t kMultiprocessors = 132, kWarps = 20;
  const std::int64_t groups = dims.dim / dims.group_size, held = backward_held(dims);
  const std::int64_t warps = std::min<std::int64_t>(divide_up(dims.group_size, kWarp * held), backward_threads(held) / kWarp);
  const std::int64_t most = std::max<std::int64_t>(kMultiprocessors * std::max<std::int64_t>(kWarps / warps, 1) / groups, 1);
  return divide_up(dims.rows, std::max<std::int64_t>(divide_up(dims.rows, most), 1));
}

// Rows that are padding, and so zero whatever x and z hold: those whose entry in state_indices, one for every `tokens` rows, is
// negative or not below `slots`.
struct Padding {
  const void* indices = nullptr;  // null: there is none
  bool indices_are_int64 = false;
  std::int64_t index_stride = 0, tokens = 1, slots = 0;
};

// Those from a row on whose number is in the device's memory, as the end of the last packed sequence is.
struct End {
  const void* row = nullptr;  // null: there are none
  bool is_int64 = false;
};

// Calls with padding: as parts of a Mamba-2 block. There x in bfloat16 may come as halves with shared exponents (scaled.cuh),
// which lie as [..., d / kScaledTogether], contiguous; the size of groups is a multiple of kScaledTogether then.
struct ForwardArgs : Args {
  Padding padding;
  End end;
  const std::uint8_t* x_exponents = nullptr;
};
struct GradientArgs : BackwardArgs {
  End end;
  const std::uint8_t* x_exponents = nullptr;
};
void run_padded(const ForwardArgs& args, const Dims& dims, Stream stream);
void run_padded(const GradientArgs& args, const Dims& dims, Stream stream);

template <class Policy>
void launch_forward(const ForwardArgs& args, const Dims& dims, Stream stream);
template <class Policy>
void launch_backward(const GradientArgs& args, const Dims& dims, Stream stream);

}  // namespace statescan::gated_rms_norm
