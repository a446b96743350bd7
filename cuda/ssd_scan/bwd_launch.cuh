#pragma once

#include "bwd_kernel.cuh"
#include "bwd_sums_launch.cuh"
#include "bwd_walk_kernel.cuh"
#include "segment_kernel.cuh"
#include "stages.cuh"

namespace statescan::ssd_scan {

// What the segments of a walk add to the state becomes the state that they start from.
inline void launch_combine(const BackwardParams& p, StateView initial, int walk, Stream stream) {
  const std::int64_t size = p.headdim * p.dstate, tiles = divide_up(size, kCombineThreads);
  if (tiles == 0) return;
  if (initial.data) initial.data += p.first_head() * initial.head;
  const CombineParams combine{initial,
                              p.ends + walk * p.ends_of_walk() * size,
                              p.decays + walk * p.ends_of_walk(),
                              p.heads_of_part(),
                              p.headdim,
                              p.dstate,
                              static_cast<std::uint32_t>(p.sequences.segments),
                              1,
                              static_cast<std::uint32_t>(tiles)};
  cuda::launch("ssd_scan_segment_combine_kernel", ssd_scan_segment_combine_kernel,
               {p.sequences.count * p.heads_of_part() * tiles, kCombineThreads}, stream, combine);
}

template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& d, Stream stream) {
  using Layout = BackwardLayout<Policy>;
  const BackwardPlan plan = backward_plan<Policy>(args, d);
  BackwardParams params = backward_params(args, d, plan);
  // As many columns of headdim at a time as fit beside the rest.
  int slice = Policy::kSlice, stages = Policy::kAhead ? 2 : 1;
  if (Layout::bytes(stages, slice) > shared_memory()) stages = 1;
  while (slice > 16 && Layout::bytes(stages, slice) > shared_memory()) slice -= 16;
  const int bytes = Layout::bytes(stages, slice);
  if (bytes > shared_memory())
    fail<NotImplementedError>("ssd_scan_backward: ", name_of(args.x.dtype), " with dstate=", d.dstate, " needs ", bytes,
                              " bytes of shared memory a block; this device has ", shared_memory());
  params.stages = static_cast<std::uint32_t>(stages);
  params.slice = static_cast<std::uint32_t>(slice);
  params.slices = static_cast<std::uint32_t>(std::max<std::int64_t>(divide_up(d.headdim, slice), 1));
  const std::int64_t row_tiles = divide_up(d.headdim, Policy::kSlice);
  for (std::int64_t i = 0; i < plan.parts(d); ++i) {
    params.part = plan.part(d, i);
    params.is_first = i % plan.pieces == 0, params.is_last = (i + 1) % plan.pieces == 0;
    const std::int64_t tiles = params.heads_of_part() * row_tiles;
    const auto walk = [&](std::int64_t adjoints, std::int64_t states, bool ends) {
      cuda::launch("ssd_scan_backward_walk_kernel", ssd_scan_backward_walk_kernel<Policy>,
                   {(adjoints + states) * tiles, Policy::kWalkThreads, WalkLayout<Policy>::kBytes}, stream, params, ends);
    };
    if (d.num_sequences * tiles > 0) {
      const std::int64_t of_ends = d.num_sequences * (plan.segments - 1), whole = d.num_sequences * plan.segments;
      if (plan.segments > 1) {
        walk(of_ends, args.chunk_states ? 0 : of_ends, true);
        if (!args.chunk_states) launch_combine(params, params.start, 0, stream);
        launch_combine(params, params.dfinal_state, 1, stream);
      }
      walk(whole, args.chunk_states ? d.batch * d.nstretches : whole, false);
    }
    const std::int64_t blocks = plan.slots * params.part.groups * plan.splits;
    if (blocks > 0)
      cuda::launch("ssd_scan_backward_kernel", ssd_scan_backward_kernel<Policy>, {blocks, Policy::kThreads, bytes}, stream,
                   params);
  }
  if (plan.splits > 1) {
    launch_split_sum<false>(params.dB_sums, plan.splits, args.dB, d, stream);
    launch_split_sum<false>(params.dC_sums, plan.splits, args.dC, d, stream);
  }
  launch_chunk_sums<false>({params.sequences,
                            {chunk_sum(params.dA_shares, args.dA, 1), chunk_sum(params.ddt_bias_shares, args.ddt_bias, 1),
                             chunk_sum(params.dD_shares, args.dD, args.dD.ndim == 2 ? 1 : d.headdim)}},
                           stream);
  if (args.cu_seqlens) launch_clear(params.sequences, args, d, stream);
}

}  // namespace statescan::ssd_scan
