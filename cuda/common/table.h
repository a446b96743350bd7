// The dispatch table of an op: data, read from the top, first match wins. Specialists above, a general row last.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include <statescan/dispatch.h>

#include "../../cpp/ops/contract.h"
#include "device.h"

namespace statescan::cuda {

// The devices that a row's kernels run on, as compute capabilities.
struct Architectures {
  int lowest, highest;
};
inline constexpr Architectures kSm80AndNewer{80, 10000}, kSm90AndNewer{90, 10000};
inline constexpr Architectures kSm90Only{90, 90};  // code for sm_90a runs on no other

template <class Args, class Dims>
struct Row {
  const char* name;
  DTypes dtypes;  // of the main tensor
  Architectures architectures;
  std::string (*declines)(const Args&, const Dims&);  // why the row does not fit, or ""
  std::size_t (*workspace_bytes)(const Args&, const Dims&);
  void (*launch)(const Args&, const Dims&, Stream);
  std::int64_t (*segment_tokens)(const Args&, const Dims&) = nullptr;  // see Plan
  bool (*reads_kept_states)(const Args&, const Dims&) = nullptr;       // see Plan
};

template <class Args, class Dims>
struct Table {
  const char* op;
  Tensor Args::*main;  // decides dtype and device
  std::span<const Row<Args, Dims>> rows = {};

  Plan plan(const Args& args, const Dims& dims) const {
    const Row<Args, Dims>& row = choose(args, dims);
    return {"cuda", row.name, row.workspace_bytes(args, dims), row.segment_tokens ? row.segment_tokens(args, dims) : 0,
            row.reads_kept_states && row.reads_kept_states(args, dims)};
  }

  void run(const Args& args, const Dims& dims, Stream stream) const {
    const Row<Args, Dims>& row = choose(args, dims);
    const DeviceGuard guard((args.*main).device.index);
    row.launch(args, dims, stream);
  }

 private:
  static std::string declines(const Row<Args, Dims>& row, const Args& args, const Dims& dims, const Tensor& main_tensor,
                              int capability) {
    if (!(just(main_tensor.dtype) & row.dtypes))
      return std::string("takes ") + names_of(row.dtypes) + ", not " + name_of(main_tensor.dtype);
    if (capability < row.architectures.lowest || capability > row.architectures.highest)
      return "does not run on sm_" + std::to_string(capability);
    return row.declines(args, dims);
  }

  const Row<Args, Dims>& choose(const Args& args, const Dims& dims) const {
    if (rows.empty()) fail<NotImplementedError>(op, ": no CUDA kernel yet; the op runs on the CPU");
    const Tensor& main_tensor = args.*main;
    const int capability = compute_capability(main_tensor.device.index);
    if (capability < lowest_compute_capability())
      fail<NotImplementedError>(op, ": this build of statescan is for ", cuda_architectures(), ", not for ",
                                describe(main_tensor.device.index));
    std::string reasons;
    for (const Row<Args, Dims>& row : rows) {
      const std::string reason = declines(row, args, dims, main_tensor, capability);
      if (reason.empty()) return row;
      reasons += std::string("; ") + row.name + ": " + reason;
    }
    fail<NotImplementedError>(op, ": no CUDA kernel serves this call", reasons);
  }
};

}  // namespace statescan::cuda
