#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "../common/launch.h"
#include "kernel.cuh"

namespace statescan::selective_state_update {

template <class Policy, int kRunsOfRow, bool kOneToken, Elements kElements>
void launch_rows(Params params, const Dims& dims, std::int64_t bands, Stream stream) {
  constexpr std::int64_t kRows = Policy::kRuns / kRunsOfRow;
  const std::int64_t runs = std::min<std::int64_t>(divide_up(dims.dstate, Policy::kRun * kRunsOfRow), kWarp);
  params.lanes = std::bit_ceil(static_cast<std::uint32_t>(std::max(runs, kRows)));
  const std::int64_t units_of_band = divide_up(params.band_rows, kRows), units = units_of_band * bands;
  params.units = static_cast<std::uint32_t>(units);
  params.units_of_band = static_cast<std::uint32_t>(units_of_band);
  constexpr std::int64_t kLeastWarps = Policy::kLeastThreads / kWarp, kMostWarps = most_threads<Policy>(kRunsOfRow) / kWarp;
  const std::int64_t warps = divide_up(dims.batch * units * params.lanes, kWarp);
  const int threads = static_cast<int>(std::clamp(divide_up(warps, kMultiprocessors), kLeastWarps, kMostWarps)) * kWarp;
  params.tiles = static_cast<std::uint32_t>(divide_up(units, threads / params.lanes));
  cuda::launch("selective_state_update_kernel", selective_state_update_kernel<Policy, kRunsOfRow, kOneToken, kElements>,
               {.blocks = dims.batch * params.tiles, .threads = threads, .early = true}, stream, params);
}

template <class Policy>
void launch(const Args& args, const Dims& dims, Stream stream) {
  const Axes axes(dims);
  if (dims.batch == 0 || axes.bands() == 0 || axes.rows() == 0) return;
  if (dims.nheads * dims.headdim > std::numeric_limits<std::int32_t>::max())
    fail<NotImplementedError>("selective_state_update: the CUDA kernels take at most 2^31 - 1 rows of states a slot, got ",
                              dims.nheads * dims.headdim);
  Params params{};
  params.band_rows = static_cast<std::uint32_t>(axes.rows());
  params.bands_of_group = static_cast<std::uint32_t>(dims.mamba1 ? 1 : dims.nheads / dims.ngroups);
  params.dstate = dims.dstate;
  params.ntokens = dims.ntokens;
  params.slots = dims.slots;
  params.pieces = std::max<std::int64_t>(divide_up(dims.dstate, held_states<Policy>(dims)), 1);
  params.from = indices_of(args.state_indices);
  params.to = indices_of(args.out_state_indices);
  params.dt_softplus = args.dt_softplus;
  params.dt_min = static_cast<float>(args.dt_min);
  params.dt_max = static_cast<float>(args.dt_max);
  params.state = axes.state(args.state);
  params.x = axes.channels(args.x);
  params.dt = axes.steps(args.dt);
  params.A = axes.rates(args.A);
  params.B = axes.projection(args.B, dims.varying_B);
  params.C = axes.projection(args.C, dims.varying_C);
  params.D = axes.of_channels(args.D);
  params.z = axes.channels(args.z);
  params.dt_bias = axes.of_heads(args.dt_bias);
  params.y = axes.channels(args.y);
  params.partial = static_cast<float*>(args.workspace.data);
  const auto run = [&]<int runs_of_row, bool one_token, Elements elements> {
    launch_rows<Policy, runs_of_row, one_token, elements>(params, dims, axes.bands(), stream);
  };
  constexpr bool kVector = Policy::kAccess == Access::vector;
  if (dims.dstate > kWarp * Policy::kRun) return run.template operator()<Policy::kLongRuns, false, Elements::any>();
  if (!kVector || dims.ntokens != 1) return run.template operator()<1, false, Elements::any>();
  if constexpr (kVector && (Policy::kState == DType::float32 || Policy::kState == DType::bfloat16)) {
    bool is_bfloat16 = true;
    for (const Tensor* t : {&args.x, &args.dt, &args.B, &args.C, &args.z, &args.y})
      if (*t && t->dtype != DType::bfloat16) is_bfloat16 = false;
    if (is_bfloat16) return run.template operator()<1, true, Elements::bfloat16>();
  }
  run.template operator()<1, kVector, Elements::any>();
}

}  // namespace statescan::selective_state_update
