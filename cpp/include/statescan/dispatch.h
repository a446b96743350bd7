// How a call finds its kernel: streams, workspace, and the plan that names the choice.
#pragma once

#include <cstddef>
#include <string>

#include <statescan/tensor.h>

namespace statescan {

// A cudaStream_t (null: the legacy default stream). Ignored on the CPU. Typed as void* so that no CUDA header is needed.
using Stream = void*;

// Scratch memory that the caller owns, on the device of the tensors, aligned to 256 bytes; at least plan(...).workspace_bytes.
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// Which kernel a call takes: a row of the op's table, and the scratch memory it wants.
struct Plan {
  const char* backend = "";  // "cpu" or "cuda"
  const char* kernel = "";   // the row's name, e.g. "avx512" or "tma_bf16"
  std::size_t workspace_bytes = 0;
  // Sequences are cut into segments of so many tokens but for the first and the last, or of fewer the later they are, and the
  // segments computed side by side, which few sequences and heads need to fill a device, and which batch_invariant forbids; 0:
  // not cut.
  std::int64_t segment_tokens = 0;
  // Of a backward: it reads what the forward can keep for it (ssd_scan's chunk_states), which is worth keeping then.
  bool reads_kept_states = false;
};

STATESCAN_API const char* version();

// The instruction set that the CPU kernels use here: "avx512", "avx2", "neon" or "baseline". The environment variable
// STATESCAN_ISA lowers the choice (for tests).
STATESCAN_API const char* cpu_isa();

// Threads that the CPU kernels use: by default the cores this process may run on, or STATESCAN_NUM_THREADS. Results never
// depend on it. A workspace is measured by it: raise it before plan(), not between plan() and run().
STATESCAN_API int num_threads();
STATESCAN_API void set_num_threads(int count);

// The CUDA side of the build. architectures: "sm_90a,..." or "" in a CPU-only build; unavailable_reason: "" when CUDA
// tensors can be served now, else why not (no CUDA in the build, no driver, no device).
STATESCAN_API const char* cuda_architectures();
STATESCAN_API std::string cuda_unavailable_reason();
STATESCAN_API int cuda_device_count();
// Whether a graph is being captured on a stream: memory that a captured call uses is used again whenever the graph runs.
STATESCAN_API bool cuda_is_capturing(Stream stream);

}  // namespace statescan
