#pragma once

#include "../common/launch.h"
#include "fwd_kernel.cuh"

namespace statescan::gated_rms_norm {

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream) {
  if (dims.rows == 0 || dims.dim == 0) return;
  ForwardParams params{};
  params.groups = static_cast<std::uint32_t>(dims.dim / dims.group_size);
  params.teams = dims.rows * params.groups;
  params.group_size = dims.group_size;
  // The leading axes, neighbours merged where every tensor steps over them as over one. Without any there is one row.
  const Tensor* const tensors[] = {&args.x, &args.z, &args.y};
  int axes[kMaxLeading];
  for (int axis = 0; axis + 1 < args.x.ndim; ++axis) {
    bool merges = params.leading_axes > 0;
    for (const Tensor* t : tensors)
      if (*t) merges = merges && t->stride[axis - 1] == t->stride[axis] * t->shape[axis];
    if (merges) {
      params.leading_size[params.leading_axes - 1] *= args.x.shape[axis];
      axes[params.leading_axes - 1] = axis;
    } else {
      params.leading_size[params.leading_axes] = args.x.shape[axis];
      axes[params.leading_axes++] = axis;
    }
  }
  const auto view = [&](const Tensor& t) {
    View v{};
    if (!t) return v;
    v.data = static_cast<char*>(t.data);
    v.dtype = t.dtype;
    v.column = t.stride[t.ndim - 1] * size_of(t.dtype);
    if (t.ndim == args.x.ndim)
      for (int i = 0; i < params.leading_axes; ++i) v.leading[i] = t.stride[axes[i]] * size_of(t.dtype);
    return v;
  };
  params.x = view(args.x);
  params.z = view(args.z);
  params.weight = view(args.weight);
  params.y = view(args.y);
  params.eps = static_cast<float>(args.eps);
  params.mean_scale = static_cast<float>(1.0 / static_cast<double>(dims.group_size));
  params.norm_before_gate = args.norm_before_gate;

  constexpr std::int64_t kHeld = Policy::kRuns * Policy::kRun;  // elements of a thread
  if (dims.group_size <= kWarp * kHeld) {
    params.chunks = 1;
    cuda::launch("gated_rms_norm_forward_kernel", gated_rms_norm_forward_kernel<Policy, false>,
                 {divide_up(params.teams, Policy::kSmallThreads / kWarp), Policy::kSmallThreads}, stream, params);
    return;
  }
  const std::int64_t wanted = divide_up(dims.group_size, kWarp * kHeld) * kWarp;
  const int threads = static_cast<int>(wanted < Policy::kMaxThreads ? wanted : Policy::kMaxThreads);
  params.chunks = divide_up(dims.group_size, threads * kHeld);
  cuda::launch("gated_rms_norm_forward_kernel", gated_rms_norm_forward_kernel<Policy, true>, {params.teams, threads}, stream,
               params);
}

}  // namespace statescan::gated_rms_norm
