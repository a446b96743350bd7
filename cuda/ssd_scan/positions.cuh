// States at chosen tokens (state_positions). Those inside of a sequence leave a walk of the states as it goes by; a kernel of its
// own writes the initial state where that is asked for, and zeros for positions outside of the sequence.
#pragma once

#include "state.cuh"

namespace statescan::ssd_scan {

// The positions of a warp's sequence, and its rows of the states there.
class PositionsOfWarp {
 public:
  static constexpr bool kPossible = true;

  __device__ PositionsOfWarp(const Params& p, const Task& task, const Walk& walk, std::int64_t head, std::int64_t first_row)
      : p_(p),
        from_(task.sequence * p.positions.sequence),
        before_(walk.before),
        place_(p.positions.states, p, task.sequence, head, first_row) {}

  // Goes to the next position among the first `count` tokens of the chunk at `start`, and returns how many tokens lie before
  // it; once there is no more, `all`, and begins anew with the next call.
  __device__ int next(std::int64_t start, int count, int all) {
    const Positions& t = p_.positions;
    if (!t.data) return all;
    while (found_ == 0) {
      block_ += 32;
      if (block_ >= t.count) {
        block_ = -32;
        index_ = -1;
        return all;
      }
      const std::int64_t i = block_ + lane_id();
      tokens_ = i < t.count ? index_at(t.data, t.is_int64, from_ + i * t.position) - before_ - start : 0;
      found_ = __ballot_sync(~0u, tokens_ > 0 && tokens_ <= count);
    }
    const int lane = __ffs(found_) - 1;
    found_ &= found_ - 1;
    index_ = block_ + lane;
    return static_cast<int>(__shfl_sync(~0u, tokens_, lane));
  }

  __device__ bool wanted() const { return index_ >= 0; }

  __device__ void store(int q, const float (&columns)[4]) const {
    StatePlace place = place_;
    place.row += index_ * p_.positions.state;
    store_columns(columns, p_.positions.states, place, q, p_.dstate);
  }

 private:
  const Params& p_;
  std::int64_t from_, before_;
  StatePlace place_;
  std::int64_t block_ = -32, index_ = -1;
  std::int64_t tokens_ = 0;
  unsigned found_ = 0;
};

struct OutsideParams {
  Positions positions;
  Sequences sequences;
  StateView initial_state;
  std::int64_t nheads, headdim, dstate;
};

inline constexpr int kOutsideThreads = 128;

// A block for each (sequence, position, head).
inline __global__ void __launch_bounds__(kOutsideThreads) ssd_scan_outside_positions_kernel(const OutsideParams p) {
  const Positions& t = p.positions;
  const std::int64_t head = blockIdx.x % p.nheads, rest = blockIdx.x / p.nheads, k = rest % t.count, sequence = rest / t.count;
  const std::int64_t at = index_at(t.data, t.is_int64, sequence * t.sequence + k * t.position);
  const StateView &from = p.initial_state, &to = t.states;
  if (at > 0 && at <= length_of(p.sequences, sequence)) return;
  for (std::int64_t i = threadIdx.x; i < p.headdim * p.dstate; i += kOutsideThreads) {
    const std::int64_t row = i / p.dstate, column = i % p.dstate;
    const auto offset = [&](const StateView& v) {
      return sequence * v.sequence + head * v.head + row * v.row + column * v.column;
    };
    const float value = at == 0 && from.data ? cuda::load_element(from.data + offset(from), from.dtype) : 0.0f;
    cuda::store_element(to.data + offset(to) + k * t.state, to.dtype, value);
  }
}

}  // namespace statescan::ssd_scan
