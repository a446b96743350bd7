// state_scan forward
// Math     S[c] = exp(log_decay[c]) S[c-1] + U[c]; states[c] = S[c-1]
// Shapes   U, states [b,c,h,p,n]; log_decay [b,c,h]
// Traffic  read U, write states: 2*b*c*h*p*n*sizeof(Element); read initial_state, write final_state: b*h*p*n elements each;
//          floor: that over 3.0 TB/s
// Launch   one axis of tiles x heads x sequences blocks of 64 threads; a thread carries 16 bytes of a slice
// Numerics float32 state in registers, chunks in order: the bits depend on the slice alone
#pragma once

#include "../common/early.cuh"
#include "slice.cuh"

namespace statescan::state_scan {

struct ForwardParams {
  Tasks tasks;
  Slice slice;
  Sequences sequences;
  bool reverse;
  DecayView log_decay;
  ChunkView update, states;
  StateView initial_state, final_state;
};

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads) state_scan_forward_kernel(const __grid_constant__ ForwardParams params) {
  using Element = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kVector = Policy::kVector, kStages = Policy::kForwardStages;
  const Task task = task_of(params.tasks);
  const Lane<Policy> lane(params.slice, (task.tile * Policy::kThreads + threadIdx.x) * kVector);
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (!lane.inside()) return;
  const Span span = span_of(params.sequences, task.sequence);
  if (params.sequences.cu_seqlens && task.sequence == params.sequences.count) {
    clear<Element>(lane, params.states, span, task.head);
    return;
  }

  const std::int64_t length = span.last - span.first;
  const std::int64_t start = params.reverse ? span.last - 1 : span.first, direction = params.reverse ? -1 : 1;
  const std::int64_t update_step = direction * params.update.chunk, states_step = direction * params.states.chunk;
  const std::int64_t decay_step = direction * params.log_decay.chunk;
  const Element* update = lane.at(slice_at<Element>(params.update, span.batch, start, task.head), params.update);
  const float* decay = decay_at(params.log_decay, span.batch, start, task.head);
  Element* states = lane.at(slice_at<Element>(params.states, span.batch, start, task.head), params.states);

  // A ring of kStages chunks on their way: a slot is filled again as soon as it is used. The loads do not depend on the
  // recurrence, only its few multiply-adds run in sequence. Plain loads: an evict-first hint costs 2 to 6% (H100).
  cuda::Vector<Element, kVector> next_update[kStages];
  float next_decay[kStages];
  auto fetch = [&](int slot) {
    next_update[slot] = lane.load(update, params.update);
    next_decay[slot] = *decay;
    update += update_step;
    decay += decay_step;
  };
#pragma unroll
  for (int slot = 0; slot < kStages; ++slot)
    if (slot < length) fetch(slot);

  float state[kVector];
  load_state(lane, params.initial_state, task, state);
  for (std::int64_t k = 0; k < length; k += kStages) {
#pragma unroll
    for (int slot = 0; slot < kStages; ++slot) {
      if (k + slot >= length) break;
      lane.store(states, params.states, cuda::narrow<Element>(state));
      states += states_step;
      const float scale = expf(next_decay[slot]);
      float added[kVector];
      cuda::widen(next_update[slot], added);
#pragma unroll
      for (int i = 0; i < kVector; ++i) state[i] = fmaf(scale, state[i], added[i]);
      if (k + slot + kStages < length) fetch(slot);
    }
  }
  store_state(lane, params.final_state, task, state);
}

}  // namespace statescan::state_scan
