// The tokens at which the states are wanted (state_positions), as a walk of the chunks meets them. It leaves the state at a
// position, or the one that enters the position's chunk: position_states.cu goes on from that.
#pragma once

#include <climits>

#include "walk.cuh"

namespace statescan::ssd_scan {

class PositionsOfSequence {
 public:
  __device__ PositionsOfSequence(const Positions& t, std::int64_t sequence) : t_(t), sequence_(sequence) {}

  // Calls leave(bytes to its entry) for each position in [begin, end); by whole warps.
  template <class Leave>
  __device__ void take(std::int64_t begin, std::int64_t end, Leave leave) const {
    take_if([&](std::int64_t at) { return at >= begin && at < end; }, [&](std::int64_t, std::int64_t entry) { leave(entry); });
  }

  // The first position from `begin` on, of those that an int holds; by whole warps.
  __device__ int next(std::int64_t begin) const {
    int next = INT_MAX;
    for (std::int64_t i = threadIdx.x % 32; i < t_.count; i += 32) {
      const std::int64_t at = index_at(t_.data, t_.is_int64, sequence_ * t_.sequence + i * t_.position);
      if (at >= begin && at < next) next = static_cast<int>(at);
    }
    return __reduce_min_sync(~0u, next);
  }

  // Calls leave(position, bytes to its entry) for each that is wanted.
  template <class Wanted, class Leave>
  __device__ void take_if(Wanted wanted, Leave leave) const {
#pragma unroll 1
    for (std::int64_t block = 0; block < t_.count; block += 32) {
      const std::int64_t i = block + threadIdx.x % 32;
      const std::int64_t at = i < t_.count ? index_at(t_.data, t_.is_int64, sequence_ * t_.sequence + i * t_.position) : 0;
#pragma unroll 1
      for (unsigned found = __ballot_sync(~0u, i < t_.count && wanted(at)); found; found &= found - 1) {
        const int lane = __ffs(found) - 1;
        leave(__shfl_sync(~0u, at, lane), (block + lane) * t_.entry);
      }
    }
  }

 private:
  const Positions& t_;
  std::int64_t sequence_;
};

}  // namespace statescan::ssd_scan
