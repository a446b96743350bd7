#pragma once

#include "../common/launch.h"
#include "fwd_kernel.cuh"

namespace statescan::gated_rms_norm {

// The rows of a call, and where its tensors lie along them. The leading axes are neighbours merged where every tensor steps
// over them as over one; without any there is one row.
class Layout {
 public:
  Layout(const Inputs& inputs, const Dims& dims, std::initializer_list<const Tensor*> tensors) : ndim_(inputs.x.ndim) {
    rows_.count = dims.rows;
    rows_.groups = static_cast<std::uint32_t>(dims.dim / dims.group_size);
    rows_.group_size = dims.group_size;
    rows_.chunks = 1;
    for (int axis = 0; axis + 1 < ndim_; ++axis) {
      bool merges = rows_.leading_axes > 0;
      for (const Tensor* t : tensors)
        if (*t) merges = merges && t->stride[axis - 1] == t->stride[axis] * t->shape[axis];
      if (merges) {
        rows_.leading_size[rows_.leading_axes - 1] *= inputs.x.shape[axis];
        axes_[rows_.leading_axes - 1] = axis;
      } else {
        rows_.leading_size[rows_.leading_axes] = inputs.x.shape[axis];
        axes_[rows_.leading_axes++] = axis;
      }
    }
    rows_.eps = static_cast<float>(inputs.eps);
    rows_.mean_scale = static_cast<float>(1.0 / static_cast<double>(dims.group_size));
    rows_.norm_before_gate = inputs.norm_before_gate;
  }

  const Rows& rows() const { return rows_; }

  View view(const Tensor& t) const {
    View v{};
    if (!t) return v;
    v.data = static_cast<char*>(t.data);
    v.dtype = t.dtype;
    v.column = t.stride[t.ndim - 1] * size_of(t.dtype);
    if (t.ndim == ndim_)
      for (int i = 0; i < rows_.leading_axes; ++i) v.leading[i] = t.stride[axes_[i]] * size_of(t.dtype);
    return v;
  }

 private:
  int ndim_;
  Rows rows_{};
  int axes_[kMaxLeading];
};

// Threads of the block that takes a group, each with kHeld elements.
template <class Policy>
int threads_of_block(std::int64_t group_size) {
  const std::int64_t wanted = divide_up(group_size, kWarp * Policy::kHeld) * kWarp;
  return static_cast<int>(wanted < Policy::kMaxThreads ? wanted : Policy::kMaxThreads);
}

template <class Policy>
void launch_forward(const ForwardArgs& args, const Dims& dims, Stream stream) {
  if (dims.rows == 0 || dims.dim == 0) return;
  const Layout layout(args, dims, {&args.x, &args.z, &args.y});
  ForwardParams params{layout.rows(),
                       dims.rows * layout.rows().groups,
                       layout.view(args.x),
                       layout.view(args.z),
                       layout.view(args.weight),
                       layout.view(args.y),
                       args.padding,
                       args.end,
                       args.x_exponents};
  if (dims.group_size <= kWarp * Policy::kHeld) {
    cuda::launch(
        "gated_rms_norm_forward_kernel", gated_rms_norm_forward_kernel<Policy, false>,
        {.blocks = divide_up(params.teams, Policy::kSmallThreads / kWarp), .threads = Policy::kSmallThreads, .early = true},
        stream, params);
    return;
  }
  const int threads = threads_of_block<Policy>(dims.group_size);
  params.rows.chunks = divide_up(dims.group_size, threads * Policy::kHeld);
  cuda::launch("gated_rms_norm_forward_kernel", gated_rms_norm_forward_kernel<Policy, true>,
               {.blocks = params.teams, .threads = threads, .early = true}, stream, params);
}

}  // namespace statescan::gated_rms_norm
