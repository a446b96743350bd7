#pragma once

#include "../common/launch.h"
#include "kernel.cuh"

namespace statescan::mamba2_update {

template <class Policy>
void launch(const Args& args, const Dims& dims, Stream stream) {
  const auto step = [](const Tensor& t, int axis) { return t.stride[axis] * size_of(t.dtype); };
  const auto columns = [&](const Tensor& t, std::int64_t first) {  // of [b,m] or [b,1,m], from a column on
    return View{static_cast<char*>(t.data) + first * step(t, t.ndim - 1), t.dtype, step(t, 0), step(t, t.ndim - 1), 0};
  };
  const auto parameter = [&](const Tensor& t) {  // [a] or [a,b]
    return t ? View{static_cast<char*>(t.data), t.dtype, 0, step(t, 0), t.ndim == 2 ? step(t, 1) : 0} : View{};
  };
  const auto slots = [&](const Tensor& t) {
    return View{static_cast<char*>(t.data), t.dtype, step(t, 0), step(t, 1), step(t, 2)};
  };
  const Blocks blocks = blocks_of(dims, Policy::kBlocksOfMultiprocessor);
  Params params{};
  params.blocks_of_row = static_cast<std::uint32_t>(blocks.of_row);
  params.units = static_cast<std::uint32_t>(dims.d_inner / kUnit);
  params.units_of_block = static_cast<std::uint32_t>(blocks.units);
  params.headdim = static_cast<std::uint32_t>(dims.headdim);
  params.heads_of_group = static_cast<std::uint32_t>(dims.nheads / dims.ngroups);
  params.ngroups = static_cast<std::uint32_t>(dims.ngroups);
  params.units_of_norm = static_cast<std::uint32_t>(dims.norm_group_size / kUnit);
  params.slots = dims.slots;
  params.width = static_cast<int>(dims.width);
  params.has_norm = static_cast<bool>(args.norm_weight);
  params.norm_before_gate = args.norm_before_gate;
  params.dt_softplus = args.dt_softplus;
  params.dt_min = static_cast<float>(args.dt_min);
  params.dt_max = static_cast<float>(args.dt_max);
  params.eps = static_cast<float>(args.eps);
  params.mean_scale = static_cast<float>(1.0 / static_cast<double>(dims.norm_group_size));
  if (args.state_indices) {
    params.indices = args.state_indices.data;
    params.indices_are_int64 = args.state_indices.dtype == DType::int64;
    params.index_stride = args.state_indices.stride[0];
  }
  params.z = columns(args.zxbcdt, 0);
  params.xBC = columns(args.zxbcdt, dims.d_inner);
  params.dt = columns(args.zxbcdt, dims.d_inner + dims.conv_dim);
  params.y = columns(args.y, 0);
  params.conv_state = slots(args.conv_state);
  params.state = slots(args.state);
  params.conv_weight = parameter(args.conv_weight);
  params.conv_bias = parameter(args.conv_bias);
  params.A = parameter(args.A);
  params.D = parameter(args.D);
  params.dt_bias = parameter(args.dt_bias);
  params.norm_weight = parameter(args.norm_weight);
  params.squares = static_cast<float*>(args.workspace.data);
  cuda::LaunchShape shape{.blocks = dims.batch * blocks.of_row, .threads = Policy::kThreads};
  shape.shared_bytes = static_cast<int>(blocks.units * (kPerChannel * kUnit + kPerUnit) * sizeof(float));
  shape.cooperative = true;
  cuda::launch("mamba2_update_kernel", mamba2_update_kernel<Policy>, shape, stream, params);
}

}  // namespace statescan::mamba2_update
