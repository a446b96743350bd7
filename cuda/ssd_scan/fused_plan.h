// How the fused kernel cuts a call into blocks: a plain function of the shape.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fused_policy.h"
#include "plan.h"

namespace statescan::ssd_scan {

struct FusedPlan {
  std::int64_t slices, pairs_per_group, pairs;  // see FusedParams
  std::int64_t segments, chunks_per_segment;
  bool combines;                           // state_scan combines the segments; a few the output pass combines itself
  std::size_t decays_bytes, states_bytes;  // of the workspace: decays, added states; combined, states before the segments

  constexpr std::size_t workspace_bytes() const { return segments > 1 ? decays_bytes + (combines ? 2 : 1) * states_bytes : 0; }
};

// Splitting a sequence costs a pass over x and B for the states, the states of each segment to and from memory, and two more
// launches; it pays when the pairs of slices leave multiprocessors without work. Costs are in units of one chunk through the
// whole kernel (H100: 1.5 us).
constexpr FusedPlan fused_plan(const Dims& d, bool packed, bool batch_invariant) {
  constexpr std::int64_t kFewSegments = 6;
  constexpr double kStatePass = 0.45, kSegment = 5.0, kLaunches = 6.0;
  FusedPlan plan{};
  plan.slices = divide_up(d.headdim, kFusedTile);
  plan.pairs_per_group = divide_up(d.nheads / d.ngroups * plan.slices, 2);
  plan.pairs = plan.pairs_per_group * d.ngroups;
  // Lengths of packed sequences are on the device: reckon with equal ones, and cover the longest.
  const std::int64_t longest = divide_up(d.seqlen, kFusedTile);
  const std::int64_t chunks =
      packed ? divide_up(d.seqlen, kFusedTile * std::max<std::int64_t>(d.num_sequences, 1)) : longest;
  const std::int64_t items = plan.pairs * d.num_sequences;
  std::int64_t best = chunks;  // chunks of a segment
  double least = static_cast<double>(divide_up(items, kMultiprocessors) * chunks);
  if (!batch_invariant && items < 2 * kMultiprocessors)
    for (std::int64_t length = 1; length < chunks; ++length) {
      const std::int64_t rounds = divide_up(items * divide_up(chunks, length), kMultiprocessors);
      const double cost = static_cast<double>(rounds) * (static_cast<double>(length) * (1 + kStatePass) + kSegment) + kLaunches;
      if (cost < least) least = cost, best = length;
    }
  plan.segments = best < chunks ? divide_up(longest, best) : 1;
  plan.chunks_per_segment = plan.segments > 1 ? best : longest;
  plan.combines = plan.segments > kFewSegments;
  const std::size_t count = static_cast<std::size_t>(d.num_sequences * plan.segments * d.nheads);
  plan.decays_bytes = (count * sizeof(float) + 255) / 256 * 256;
  plan.states_bytes = (count * d.headdim * d.dstate * sizeof(float) + 255) / 256 * 256;
  return plan;
}

}  // namespace statescan::ssd_scan
