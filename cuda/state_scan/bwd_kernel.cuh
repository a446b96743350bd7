// state_scan backward
// Math     G[last] = dfinal_state, G[c-1] = dstates[c] + exp(log_decay[c]) G[c]; dupdate[c] = G[c],
//          dlog_decay[c] = exp(log_decay[c]) <G[c], states[c]>, dinitial_state = G[-1]
// Shapes   states, dstates, dupdate [b,c,h,p,n]; log_decay, dlog_decay [b,c,h]
// Traffic  read states and dstates, write dupdate: 3*b*c*h*p*n*sizeof(Element); read dfinal_state, write dinitial_state:
//          b*h*p*n elements each; floor: that over 3.0 TB/s. The partial sums add 8*b*c*h*p*n / (32 * kVector) bytes, under 2%
// Launch   one axis of tiles x heads x sequences blocks of 64 threads; then a warp for each dlog_decay. With Sums::cluster the
//          tiles of a slice are a cluster of blocks, whose warps add up dlog_decay at the end: no second kernel
// Numerics float32 adjoint in registers; dlog_decay: a thread's products in order, the lanes of a warp as a tree, the warps of
//          a slice in order. No atomics: the bits depend on the slice alone
#pragma once

#include "../common/cluster.cuh"
#include "../common/early.cuh"
#include "slice.cuh"

namespace statescan::state_scan {

struct BackwardParams {
  Tasks tasks;
  Slice slice;
  Sequences sequences;
  bool reverse;
  DecayView log_decay;
  ChunkView states, dstates, dupdate;   // dupdate.data null: not wanted
  StateView dfinal_state, dinitial_state;
  DecayView dlog_decay;                 // written here with Sums::cluster
  float* partial;                       // [b,c,h,warps] with Sums::workspace; null: dlog_decay is not wanted
  std::int64_t heads, warps;
};

struct DecayGradientParams {
  Sequences sequences;
  DecayView log_decay, dlog_decay;
  const float* partial;
  std::int64_t heads, warps, slices;    // slices = b*c*h
};

// The sum over a warp, in every lane.
inline __device__ float sum_over_warp(float v) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads) state_scan_backward_kernel(const __grid_constant__ BackwardParams params) {
  using Element = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kVector = Policy::kVector, kStages = Policy::kBackwardStages, kWarps = Policy::kThreads / kWarp;
  constexpr bool kCluster = Policy::kSums == Sums::cluster;
  extern __shared__ float of_block[];  // [c,kWarps] with Sums::cluster, chunks in the order of the scan
  const Task task = task_of(params.tasks);
  const std::int64_t thread = task.tile * Policy::kThreads + threadIdx.x, warp = thread / kWarp;
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (warp >= params.warps) return;  // a whole warp: those that stay meet in the sums
  const Lane<Policy> lane(params.slice, thread * kVector);
  const Span span = span_of(params.sequences, task.sequence);
  if (params.sequences.cu_seqlens && task.sequence == params.sequences.count) {
    if (params.dupdate.data) clear<Element>(lane, params.dupdate, span, task.head);
    if constexpr (kCluster)
      for (std::int64_t c = span.first + thread; c < span.last; c += params.warps * kWarp)
        *decay_at(params.dlog_decay, span.batch, c, task.head) = 0.0f;
    return;
  }

  const std::int64_t length = span.last - span.first;
  const std::int64_t start = params.reverse ? span.first : span.last - 1, direction = params.reverse ? 1 : -1;
  const std::int64_t states_step = direction * params.states.chunk, dstates_step = direction * params.dstates.chunk;
  const std::int64_t dupdate_step = direction * params.dupdate.chunk, decay_step = direction * params.log_decay.chunk;
  const Element* states = lane.at(slice_at<Element>(params.states, span.batch, start, task.head), params.states);
  const Element* dstates = lane.at(slice_at<Element>(params.dstates, span.batch, start, task.head), params.dstates);
  const float* decay = decay_at(params.log_decay, span.batch, start, task.head);
  Element* dupdate = lane.at(slice_at<Element>(params.dupdate, span.batch, start, task.head), params.dupdate);
  const bool wants_sums = kCluster || params.partial;
  const std::int64_t row = (span.batch * params.sequences.nchunks + start) * params.heads + task.head;
  float* partial = kCluster ? of_block + threadIdx.x / kWarp : params.partial + row * params.warps + warp;
  const std::int64_t partial_step = kCluster ? kWarps : direction * params.heads * params.warps;

  // A ring of kStages chunks on their way, as in the forward.
  cuda::Vector<Element, kVector> next_states[kStages] = {}, next_dstates[kStages] = {};
  float next_decay[kStages];
  auto fetch = [&](int slot) {
    if (lane.inside()) {
      if (wants_sums) next_states[slot] = lane.load(states, params.states);
      next_dstates[slot] = lane.load(dstates, params.dstates);
    }
    next_decay[slot] = *decay;
    states += states_step;
    dstates += dstates_step;
    decay += decay_step;
  };
#pragma unroll
  for (int slot = 0; slot < kStages; ++slot)
    if (slot < length) fetch(slot);

  float adjoint[kVector];
  load_state(lane, params.dfinal_state, task, adjoint);
  for (std::int64_t k = 0; k < length; k += kStages) {
    float products[kStages] = {};
#pragma unroll
    for (int slot = 0; slot < kStages; ++slot) {
      if (k + slot >= length) break;
      if (params.dupdate.data) {
        if (lane.inside()) lane.store(dupdate, params.dupdate, cuda::narrow<Element>(adjoint));
        dupdate += dupdate_step;
      }
      if (wants_sums) {
        float state[kVector];
        cuda::widen(next_states[slot], state);
#pragma unroll
        for (int i = 0; i < kVector; ++i) products[slot] = fmaf(adjoint[i], state[i], products[slot]);
      }
      const float scale = expf(next_decay[slot]);
      float added[kVector];
      cuda::widen(next_dstates[slot], added);
#pragma unroll
      for (int i = 0; i < kVector; ++i) adjoint[i] = fmaf(scale, adjoint[i], added[i]);
      if (k + slot + kStages < length) fetch(slot);
    }
    if (!wants_sums) continue;
    // The sums of a whole ring together: five shuffles in a row for each chunk would hold up the loads of the next.
#pragma unroll
    for (int slot = 0; slot < kStages; ++slot) products[slot] = sum_over_warp(products[slot]);
    const int own = threadIdx.x % kWarp;
    float product = products[0];
#pragma unroll
    for (int slot = 1; slot < kStages; ++slot) product = own == slot ? products[slot] : product;
    if (own < kStages && k + own < length) partial[own * partial_step] = product;
    partial += kStages * partial_step;
  }
  store_state(lane, params.dinitial_state, task, adjoint);

  if constexpr (kCluster) {
    cuda::sync_cluster();
    for (std::int64_t k = warp; k < length; k += params.warps) {
      float sum = 0.0f;
      for (std::uint32_t w = threadIdx.x % kWarp; w < params.warps; w += kWarp)
        sum += cuda::load_of_block(of_block + k * kWarps + w % kWarps, w / kWarps);
      sum = sum_over_warp(sum);
      if (threadIdx.x % kWarp != 0) continue;
      const std::int64_t chunk = start + k * direction;
      *decay_at(params.dlog_decay, span.batch, chunk, task.head) =
          expf(*decay_at(params.log_decay, span.batch, chunk, task.head)) * sum;
    }
    cuda::sync_cluster();  // a block's shared memory stays until every other has read it
  }
}

inline constexpr int kDecayGradientThreads = 128;

// dlog_decay[b,c,h] = exp(log_decay) times the sum of its partial sums; zero past the last packed sequence. A warp a result.
inline __global__ void __launch_bounds__(kDecayGradientThreads)
    state_scan_decay_gradient_kernel(const __grid_constant__ DecayGradientParams params) {
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  const std::int64_t slice = (std::int64_t{blockIdx.x} * kDecayGradientThreads + threadIdx.x) / kWarp;
  if (slice >= params.slices) return;
  const std::int64_t head = slice % params.heads, row = slice / params.heads;
  const std::int64_t batch = row / params.sequences.nchunks, chunk = row % params.sequences.nchunks;
  const bool used = !params.sequences.cu_seqlens || chunk < boundary(params.sequences, params.sequences.count);
  float sum = 0.0f;
  if (used)
    for (std::int64_t w = threadIdx.x % kWarp; w < params.warps; w += kWarp) sum += params.partial[slice * params.warps + w];
  sum = sum_over_warp(sum);
  if (threadIdx.x % kWarp != 0) return;
  *decay_at(params.dlog_decay, batch, chunk, head) = used ? expf(*decay_at(params.log_decay, batch, chunk, head)) * sum : 0.0f;
}

}  // namespace statescan::state_scan
