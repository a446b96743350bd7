// How the fused backward cuts a call: plain C++, a function of the shape alone.
//
// Two walks keep, for each chunk, the state that enters it and the adjoint of the state that leaves it; the main kernel then
// takes all chunks at the same time. Kept for all heads they would be four times as large as x (headdim 64, dstate 128), so the
// heads go through both kernels in parts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fused_policy.h"
#include "plan.h"

namespace statescan::ssd_scan {

// Heads that go through the kernels together: whole groups, or a piece of one. An item is a slice of 64 channels of a head.
struct FusedPart {
  int first_group, groups, first_item, items;  // items: of each of these groups
  bool is_first, is_last;                      // of the pieces of its groups

  constexpr int total() const { return groups * items; }
};

struct FusedBackwardPlan {
  std::int64_t slices;         // of 64 channels, of a head
  std::int64_t chunks, slots;  // of a sequence; of all
  std::int64_t group_items;    // slices of all heads of a group
  std::int64_t groups_of_part, items_of_piece, pieces, parts;
  std::int64_t splits;                                 // blocks that share the items of a piece
  bool sums_in_memory;                                 // dB and dC of all pieces and splits meet in the workspace
  std::size_t states_bytes, sums_bytes, shares_bytes;  // of the workspace: each of two; each of two; each of three

  constexpr std::size_t workspace_bytes() const { return 2 * states_bytes + 2 * sums_bytes + 3 * shares_bytes; }

  constexpr FusedPart part(const Dims& d, std::int64_t i) const {
    const std::int64_t group = i / pieces * groups_of_part, item = i % pieces * items_of_piece;
    return {static_cast<int>(group), static_cast<int>(std::min(groups_of_part, d.ngroups - group)),
            static_cast<int>(item),  static_cast<int>(std::min(items_of_piece, group_items - item)),
            i % pieces == 0,         (i + 1) % pieces == 0};
  }
};

constexpr FusedBackwardPlan fused_backward_plan(const Dims& d, bool batch_invariant) {
  constexpr double kMostMemory = 1.45;                // what is kept between the kernels, in units of x
  constexpr std::int64_t kEnds = 4, kMostSplits = 8;  // a block's start and end, in units of an item
  FusedBackwardPlan plan{};
  plan.slices = divide_up(d.headdim, kFusedTile);
  plan.chunks = divide_up(d.seqlen, kFusedTile), plan.slots = d.batch * plan.chunks;
  plan.group_items = d.nheads / d.ngroups * plan.slices;
  const std::int64_t columns = divide_up(d.dstate, kFusedTile) * kFusedTile, state = 2 * kFusedTile * columns;
  const double x = 2.0 * static_cast<double>(d.batch * d.seqlen * d.nheads * d.headdim);
  const double sums = 8.0 * static_cast<double>(d.batch * d.seqlen * d.ngroups * d.dstate);
  const double kept = 2.0 * static_cast<double>(plan.slots * d.ngroups * plan.group_items * state);
  // Whole groups need no sums in memory, pieces of groups do.
  const std::int64_t groups = static_cast<std::int64_t>(kMostMemory * x / std::max(kept, 1.0) * static_cast<double>(d.ngroups));
  plan.groups_of_part = std::clamp<std::int64_t>(groups, 1, d.ngroups);
  plan.items_of_piece = plan.group_items, plan.pieces = 1;
  if (groups == 0) {
    const double room = std::max(kMostMemory * x - sums, x / 8) * static_cast<double>(d.ngroups);
    const std::int64_t items = static_cast<std::int64_t>(room / kept * static_cast<double>(plan.group_items));
    plan.pieces = divide_up(plan.group_items, std::max(items / plan.slices, std::int64_t{1}) * plan.slices);
    plan.items_of_piece = divide_up(divide_up(plan.group_items, plan.pieces), plan.slices) * plan.slices;  // whole heads
    plan.pieces = divide_up(plan.group_items, plan.items_of_piece);
  }
  plan.parts = divide_up(d.ngroups, plan.groups_of_part) * plan.pieces;
  // Splits that make the estimated time least: waves of blocks, each as long as its items and a start and an end.
  plan.splits = 1;
  const std::int64_t heads = plan.items_of_piece / plan.slices;
  const auto time = [&](std::int64_t splits) {
    return divide_up(plan.slots * plan.groups_of_part * splits, kMultiprocessors) *
           (divide_up(heads, splits) * plan.slices + kEnds);
  };
  if (!batch_invariant)
    for (std::int64_t splits = 2; splits <= std::min(heads, kMostSplits); ++splits)
      if (time(splits) < time(plan.splits)) plan.splits = splits;
  plan.sums_in_memory = plan.splits > 1 || plan.pieces > 1;
  plan.states_bytes = static_cast<std::size_t>(plan.slots * plan.groups_of_part * plan.items_of_piece * state);
  if (plan.sums_in_memory)
    plan.sums_bytes = sizeof(float) * static_cast<std::size_t>(plan.splits * d.batch * d.seqlen * d.ngroups * d.dstate);
  plan.shares_bytes = sizeof(float) * static_cast<std::size_t>(plan.slots * d.nheads);
  for (std::size_t* bytes : {&plan.sums_bytes, &plan.shares_bytes}) *bytes = (*bytes + 255) / 256 * 256;
  return plan;
}

}  // namespace statescan::ssd_scan
