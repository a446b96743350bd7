// The tokens at which the states are wanted (state_positions), as a walk of the chunks meets them. It leaves the state that
// enters the chunk of a position, or at the end of the sequence the state there; position_states.cu goes on from that.
#pragma once

#include "walk.cuh"

namespace statescan::ssd_scan {

class PositionsOfSequence {
 public:
  __device__ PositionsOfSequence(const Positions& t, std::int64_t sequence) : t_(t), sequence_(sequence) {}

  // Calls leave(bytes to its entry) for each position in [begin, end); by whole warps.
  template <class Leave>
  __device__ void take(std::int64_t begin, std::int64_t end, Leave leave) const {
#pragma unroll 1
    for (std::int64_t block = 0; block < t_.count; block += 32) {
      const std::int64_t i = block + threadIdx.x % 32;
      const std::int64_t at = i < t_.count ? index_at(t_.data, t_.is_int64, sequence_ * t_.sequence + i * t_.position) : -1;
#pragma unroll 1
      for (unsigned found = __ballot_sync(~0u, at >= begin && at < end); found; found &= found - 1)
        leave((block + __ffs(found) - 1) * t_.entry);
    }
  }

 private:
  const Positions& t_;
  std::int64_t sequence_;
};

}  // namespace statescan::ssd_scan
