// ssd_scan forward as masked attention, the whole sequence one chunk (ssd_mode "quadratic"): sizes and dtypes of the general
// path Math     s[i] = sum_{k<=i} dt[k] A from the start of the sequence, h the initial state:
//          y[i] = exp(s[i]) C[i].h + sum_{j<=i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j] + D x[i], then y[i] *= silu(z[i])
// Shapes   x, z, y [b,l,h,p], dt [b,l,h], B, C [b,l,g,n], h [p,n] of each head
// Traffic  C, z and y once; dt, B and x of all tokens before it for each block of rows, from the second cache
// Launch   a block of 8 warps for each (sequence, rows of a chunk of tokens, tile of heads), which walks back over the tokens
// Numerics as the general path; between chunks the decay is a product of three, of which none is more than the whole where A <
// 0
#pragma once

#include "general_kernel.cuh"

namespace statescan::ssd_scan {

// scores[i][j] = C[i].B[j] exp(s[i] - s[j]) dt[j] of every head, i in the chunk of steps(0), j in an earlier one, of steps(1);
// between[head]: the decay from the end of that to the start of the other.
template <class Policy>
__device__ void compute_scores_between(const GeneralLayout<Policy>& shared, const float* between, int heads) {
  ScoresOfWarp<Policy, false> part;
  if (!part.inside) return;
  part.multiply(shared.B(0), shared.C(0));
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
    const auto &of_rows = shared.steps(0, head), &of_columns = shared.steps(1, head);
    part.store(shared.scores(head), [&](int i) {
      return [&of_columns, decay = of_rows.from_start[i] * between[head]](int j) {
        const float2 to_end = of_columns.pair(of_columns.to_end, j);
        return make_float2(decay * to_end.x, decay * to_end.y);
      };
    });
  }
}

template <class Policy>
__device__ void add(Outputs<Policy>& y, const Outputs<Policy>& other, float factor) {
#pragma unroll
  for (int m = 0; m < Policy::kChunk / 16; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[m][half][e] = fmaf(factor, other[m][half][e], y[m][half][e]);
}

// A segment of a task is the rows of one chunk.
template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, 1) ssd_scan_quadratic_kernel(const __grid_constant__ Params p) {
  constexpr int kChunk = Policy::kChunk;
  extern __shared__ __align__(16) char memory[];
  __shared__ float between[Policy::kMaxHeads];
  const GeneralLayout<Policy> shared{memory, 1, static_cast<int>(p.tasks.heads)};
  const Task task = task_of(p.tasks);
  const Walk walk = walk_of(p.sequences, task.sequence, 0);
  if (task.sequence == p.sequences.count) {
    if (task.segment == 0) clear_outputs<Policy>(p, task, walk);
    return;
  }
  const std::int64_t rows = (p.tasks.end_segment - 1 - task.segment) * kChunk;  // the longest first
  if (rows >= walk.length) return;

  const int warp = threadIdx.x / 32;
  const auto [head, first_row, has_rows] = Slot(p.tasks, task, warp);
  const bool has_steps = warp < task.heads;
  const auto load_B = group_loader<Policy>(p.B, p, task, walk), load_C = group_loader<Policy>(p.C, p, task, walk);
  const auto load_x = head_loader<Policy>(p.x, p, task, walk);
  const int count = static_cast<int>(min(std::int64_t(kChunk), walk.length - rows));
  load_C.load(shared.C(0), rows, count);
  StepLoader<kChunk> step_loader(p, walk, task.first_head + min(warp, task.heads - 1));
  if (has_steps) {
    step_loader.load(rows, count);
    step_loader.finish(shared.steps(0, warp));
  }

  Outputs<Policy> y{};
  double log2_between = 0;  // of the head whose steps the warp finds
#pragma unroll 1
  for (std::int64_t start = rows - kChunk; start >= 0; start -= kChunk) {
    load_B.load(shared.B(0), start, kChunk);
    load_x.load(shared.x(0), start, kChunk);
    cute::cp_async_fence();
    if (has_steps) {
      if (lane_id() == 0) between[warp] = exp2f(static_cast<float>(log2_between));
      step_loader.load(start, kChunk);
      log2_between += step_loader.finish(shared.steps(1, warp));
    }
    cute::cp_async_wait<0>();
    __syncthreads();
    compute_scores_between<Policy>(shared, between, task.heads);
    __syncthreads();
    if (has_rows) {
      Columns<Policy> x;
      load_columns<Policy>(x, shared.x(0), warp);
      Outputs<Policy> of_chunk{};
      multiply_scores<Policy, false>(of_chunk, shared.scores(head), x);
      add<Policy>(y, of_chunk, 1.0f);
    }
    __syncthreads();  // tiles and scores are read by all before they are written again
  }

  load_B.load(shared.B(0), rows, count);
  load_x.load(shared.x(0), rows, count);
  cute::cp_async_fence();
  if (has_steps && lane_id() == 0) between[warp] = exp2f(static_cast<float>(log2_between));
  cute::cp_async_wait<0>();
  __syncthreads();
  compute_scores<Policy>(shared, 0, 0, task.heads);
  __syncthreads();
  if (!has_rows) return;
  if (p.start.data) {
    State<Policy> state;
    load_state<Policy>(state, p.start, StatePlace(p.start, p, task.sequence, task.first_head + head, first_row), p.dstate);
    Outputs<Policy> of_state{};
    multiply_state<Policy>(of_state, state, shared.C(0), shared.steps(0, head));
    add<Policy>(y, of_state, between[head]);
  }
  Columns<Policy> x;
  load_columns<Policy>(x, shared.x(0), warp);
  Outputs<Policy> of_chunk{};
  multiply_diagonal<Policy>(of_chunk, shared.scores(head), x, shared.x(0), warp);
  add<Policy>(y, of_chunk, 1.0f);
  const LaneOfOutputs<Policy> lane(p, task, walk, warp);
  typename LaneOfOutputs<Policy>::Pairs z;
  if (p.z.data) lane.load(z, p.z, rows, count);
  float D[2][2];
  load_D<Policy>(D, p, task.first_head + head, first_row);
  finish_outputs<Policy>(y, p, lane, z, D, shared.x(0), warp, rows, count);
}

}  // namespace statescan::ssd_scan
