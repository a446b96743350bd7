// ssd_scan, states without y: what segments of a sequence add to them (plan.h)
// Math     states:  u = sum_j B[j] exp(s[last] - s[j]) dt[j] x[j] over the tokens of a segment, and s[last] itself
//          combine: h[0] = initial state, h[k+1] = exp(s_k[last]) h[k] + u[k]; h[k] takes u[k]'s place where a segment starts
// Shapes   u, h [num_sequences, pieces of segments, h, p, n] float32
// Traffic  states: x, dt once, B once for each tile of heads, write u; combine: read u, write h
// Launch   states: a block for each (sequence, segment, tile of heads); combine: a thread for each element of h
// Numerics as the main pass
#pragma once

#include "../common/early.cuh"
#include "state.cuh"

namespace statescan::ssd_scan {

template <class Policy>
struct SegmentLayout {
  using Rows = TileOfRows<Policy>;
  using Group = TileOfGroup<Policy>;
  using ChunkSteps = Steps<Policy::kChunk>;

  static constexpr int kStageBytes = Group::kBytes + Rows::kBytes;

  // Chunks whose steps are found at once, each by a warp: by a warp or two for every chunk, they held up all the others.
  static __host__ __device__ constexpr int ahead(int heads) { return heads > Policy::kWarps / 4 ? 2 : 4; }
  static_assert(2 * Policy::kMaxHeads <= Policy::kWarps);

  static constexpr int bytes(int stages, int heads) {
    return stages * kStageBytes + heads * 2 * ahead(heads) * sizeof(ChunkSteps);
  }

  char* base;
  int stages, heads;

  __device__ Group B(int i) const { return {reinterpret_cast<std::uint16_t*>(base + i * kStageBytes)}; }
  __device__ Rows x(int i) const { return {reinterpret_cast<std::uint16_t*>(base + i * kStageBytes + Group::kBytes)}; }
  // Of a chunk: of those found last or of those in use.
  __device__ ChunkSteps& steps(int chunk, int head) const {
    return reinterpret_cast<ChunkSteps*>(base + stages * kStageBytes)[(chunk & (2 * ahead(heads) - 1)) * heads + head];
  }
};

// What a segment adds to the state, to its place in the workspace, with its decay.
template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, 1) ssd_scan_states_kernel(const __grid_constant__ Params p, int stages) {
  constexpr int kChunk = Policy::kChunk;
  extern __shared__ __align__(16) char memory[];
  cuda::let_next_kernel_in();
  const SegmentLayout<Policy> shared{memory, stages, static_cast<int>(p.tasks.heads)};
  const Task task = task_of(p.tasks);
  const Walk walk = walk_of(p.sequences, task.sequence, task.segment);
  const int warp = threadIdx.x / 32;
  const auto [head, first_row, has_rows] = Slot(p.tasks, task, warp);

  State<Policy> state{};
  const auto load_B = group_loader<Policy>(p.B, p, task, walk);
  const auto load_x = head_loader<Policy>(p.x, p, task, walk);
  const auto count_at = [&](std::int64_t start) {
    return static_cast<int>(max(0l, min(std::int64_t(kChunk), walk.length - start)));
  };
  const auto load = [&](int stage, std::int64_t start) {
    load_B.load(shared.B(stage), start, count_at(start));
    load_x.load(shared.x(stage), start, count_at(start));
    cute::cp_async_fence();
  };
  // A warp finds the steps of one head, in every so many chunks.
  const int ahead = shared.ahead(shared.heads), steps_head = warp % task.heads, steps_chunk = warp / task.heads;
  const bool has_steps = steps_chunk < ahead;
  StepLoader<kChunk> step_loader(p, walk, task.first_head + steps_head);
  const auto load_steps = [&](std::int64_t start) {
    step_loader.load(start + steps_chunk * kChunk, count_at(start + steps_chunk * kChunk));
  };
  double log2_decay = 0;  // of the warp's chunks
  if (has_steps && walk.length > 0) {
    load_steps(0);
    log2_decay = step_loader.finish(shared.steps(steps_chunk, steps_head));
    load_steps(ahead * kChunk);
  }
  if (walk.length > 0) load(0, 0);

  int stage = 0, chunk = 0;
#pragma unroll 1
  for (std::int64_t start = 0; start < walk.length; start += kChunk, ++chunk) {
    const bool is_last = start + kChunk >= walk.length;
    cute::cp_async_wait<0>();
    __syncthreads();
    if (stages > 1 && !is_last) load(1 - stage, start + kChunk);
    if (has_steps && (chunk & (ahead - 1)) == 0 && start + ahead * kChunk < walk.length) {
      log2_decay += step_loader.finish(shared.steps(chunk + ahead + steps_chunk, steps_head));
      load_steps(start + 2 * ahead * kChunk);
    }
    if (has_rows) {
      Columns<Policy> x;
      load_columns<Policy>(x, shared.x(stage), warp);
      update_state<Policy>(state, x, shared.B(stage), shared.steps(chunk, head));
    }
    if (stages == 1 && !is_last) {
      __syncthreads();
      load(0, start + kChunk);
    }
    if (stages > 1) stage = 1 - stage;
  }

  const std::int64_t at = task.sequence * p.places + task.segment;
  if (has_rows)
    store_state<Policy, true>(state, p.between, StatePlace(p.between, p, at, task.first_head + head, first_row), p.dstate);
  __shared__ double decays[Policy::kWarps];
  if (lane_id() == 0) decays[warp] = log2_decay;
  __syncthreads();
  if (warp < task.heads && (warp > 0 || task.first_slot == 0) && lane_id() == 0) {  // the tile with a head's first rows
    for (int i = 1; i < ahead; ++i) log2_decay += decays[i * task.heads + warp];
    p.log2_decay[at * p.nheads + task.first_head + warp] = static_cast<float>(log2_decay);
  }
  // What comes after this kernel comes after the one before it, too.
  cuda::wait_for_earlier_kernels();
}

struct CombineParams {
  StateView initial_state;
  float* states;
  const float* log2_decay;
  std::int64_t nheads, headdim, dstate;
  std::uint32_t pieces, pieces_of_segment, tiles;  // pieces: of a sequence; tiles: blocks for a head
};

inline constexpr int kCombineThreads = 256;

// Math     S[0] = initial state or 0, S[k + 1] = exp(log_decay[k]) S[k] + U[k], over the pieces k of a sequence
// Shapes   states [s,pieces,h,p,n]: U comes in, S of the pieces that begin a segment goes out; log2_decay [s,pieces,h]
// Traffic  read U of all pieces but the last, write S of every segment
// Launch   a thread for each element of a head's state, eight pieces loaded ahead
// Numerics float32, the pieces in order
inline __global__ void __launch_bounds__(kCombineThreads) ssd_scan_segment_combine_kernel(const CombineParams p) {
  cuda::let_next_kernel_in();
  cuda::wait_for_earlier_kernels();
  const std::int64_t task = blockIdx.x / p.tiles, sequence = task / p.nheads, head = task % p.nheads;
  const std::int64_t size = p.headdim * p.dstate, i = std::int64_t(blockIdx.x % p.tiles) * kCombineThreads + threadIdx.x;
  if (i >= size) return;
  const StateView& t = p.initial_state;
  float state = 0.0f;
  if (t.data)
    state = cuda::load_element(t.data + sequence * t.sequence + head * t.head + i / p.dstate * t.row + i % p.dstate * t.column,
                               t.dtype);
  const std::int64_t step = p.nheads * size;
  float* states = p.states + (sequence * p.pieces * p.nheads + head) * size + i;
  const float* log2_decay = p.log2_decay + sequence * p.pieces * p.nheads + head;
  // The loads of several pieces are on their way together.
  constexpr int kAhead = 8;
  std::uint32_t of_segment = 0;
#pragma unroll 1
  for (std::uint32_t first = 0; first < p.pieces; first += kAhead) {
    float update[kAhead], decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool inside = first + k + 1 < p.pieces;
      update[k] = inside ? states[(first + k) * step] : 0.0f;
      decay[k] = inside ? log2_decay[(first + k) * p.nheads] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= p.pieces) break;
      if (of_segment == 0) states[(first + k) * step] = state;  // only segments start from a state
      if (++of_segment == p.pieces_of_segment) of_segment = 0;
      state = fmaf(exp2_fast(decay[k]), state, update[k]);
    }
  }
}

}  // namespace statescan::ssd_scan
