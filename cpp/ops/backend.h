// The seam between an op's contract and its two backends. Each op has overloads of these in its own namespace:
//
//   Plan plan_cpu(const Args&, const Dims&);     void run_cpu(const Args&, const Dims&);
//   Plan plan_cuda(const Args&, const Dims&);    void run_cuda(const Args&, const Dims&, Stream);
//
// They trust Dims. A CPU-only build links cuda_stub.cpp, whose CUDA half raises.
#pragma once

#include <statescan/causal_conv1d.h>
#include <statescan/causal_conv1d_update.h>
#include <statescan/dispatch.h>
#include <statescan/gated_rms_norm.h>
#include <statescan/mamba2_scan.h>
#include <statescan/mamba2_update.h>
#include <statescan/selective_scan.h>
#include <statescan/selective_state_update.h>
#include <statescan/ssd_scan.h>
#include <statescan/state_scan.h>

#include "../cpu/parallel.h"

// Expands `apply(namespace, args type)` for every op.
#define STATESCAN_FOR_EACH_OP(apply)      \
  apply(state_scan, Args)                 \
  apply(state_scan, BackwardArgs)         \
  apply(ssd_scan, Args)                   \
  apply(ssd_scan, BackwardArgs)           \
  apply(selective_scan, Args)             \
  apply(selective_scan, BackwardArgs)     \
  apply(causal_conv1d, Args)              \
  apply(causal_conv1d, BackwardArgs)      \
  apply(gated_rms_norm, Args)             \
  apply(gated_rms_norm, BackwardArgs)     \
  apply(mamba2_scan, Args)                \
  apply(mamba2_scan, BackwardArgs)        \
  apply(causal_conv1d_update, Args)       \
  apply(selective_state_update, Args)     \
  apply(mamba2_update, Args)

#define STATESCAN_DECLARE_BACKENDS(op, A)               \
  namespace op {                                        \
  Plan plan_cpu(const A& args, const Dims& dims);       \
  void run_cpu(const A& args, const Dims& dims);        \
  Plan plan_cuda(const A& args, const Dims& dims);      \
  void run_cuda(const A& args, const Dims& dims, Stream stream); \
  }

namespace statescan {

STATESCAN_FOR_EACH_OP(STATESCAN_DECLARE_BACKENDS)

// Raises unless the caller gave the scratch memory that the plan wants.
inline void require_workspace(const char* op, const Workspace& workspace, const Plan& plan) {
  if (plan.workspace_bytes > 0 && (!workspace.data || workspace.bytes < plan.workspace_bytes))
    fail<ValueError>(op, ": workspace of ", plan.workspace_bytes, " bytes is required, got ",
                     workspace.data ? workspace.bytes : 0, "; plan() tells the size");
}

// plan() and run() of an op, once its backends are declared. `device` is any input that says where the call runs.
template <class Args, class Dims>
Plan plan_on(const Args& args, const Dims& dims, Device device) {
  return device.type == DeviceType::cuda ? plan_cuda(args, dims) : plan_cpu(args, dims);
}

template <class Args, class Dims>
void run_on(const char* op, const Args& args, const Dims& dims, Device device, Stream stream) {
  const cpu::FrozenThreads frozen;
  require_workspace(op, args.workspace, plan_on(args, dims, device));
  if (device.type == DeviceType::cuda) run_cuda(args, dims, stream);
  else run_cpu(args, dims);
}

}  // namespace statescan
