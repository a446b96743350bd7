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

// Slices whose states a block of the walks takes together, `items` being those of a part: two share B or C, one where that
// leaves multiprocessors without work.
constexpr int items_of_walk(const Dims& d, std::int64_t items) { return 2 * d.batch * items <= kMultiprocessors ? 1 : 2; }

// The part sizes and splits that make the estimated time least, of those whose memory is in bounds. Times in us, of an H100.
constexpr FusedBackwardPlan fused_backward_plan(const Dims& d, bool batch_invariant) {
  constexpr double kMostMemory = 1.45;  // what is kept between the kernels, in units of x
  constexpr std::int64_t kMostSplits = 8, kMoreParts = 3;
  constexpr double kLaunch = 2.0, kSplitSum = 4.0;
  constexpr double kWalkStart = 1.5, kWalkStep = 0.3;  // a task; a chunk and slice, where nothing waits for memory
  constexpr double kTaskEnds = 6.0, kItem = 2.2;       // the same of the main kernel: a chunk's start and end; an item
  constexpr double kBytes = 2.9e6 / kMultiprocessors;  // that a multiprocessor has of the memory in one us, when all are busy
  FusedBackwardPlan plan{};
  plan.slices = divide_up(d.headdim, kFusedTile);
  plan.chunks = divide_up(d.seqlen, kFusedTile), plan.slots = d.batch * plan.chunks;
  plan.group_items = d.nheads / d.ngroups * plan.slices;
  const std::int64_t columns = divide_up(d.dstate, kFusedTile) * kFusedTile, state = 2 * kFusedTile * columns;
  const std::int64_t tile = 2 * kFusedTile * kFusedTile;
  const double x = 2.0 * static_cast<double>(d.batch * d.seqlen * d.nheads * d.headdim);
  const double sums = 8.0 * static_cast<double>(plan.slots * kFusedTile * d.ngroups * columns);  // of a split
  const double kept = 2.0 * static_cast<double>(plan.slots * state);                             // of an item

  const auto kernel = [](std::int64_t tasks, double start, double steps, double step, std::int64_t bytes) {
    const double busy = static_cast<double>(std::min(tasks, kMultiprocessors)) / kMultiprocessors;
    const double least = busy * static_cast<double>(bytes) / kBytes;
    return static_cast<double>(divide_up(tasks, kMultiprocessors)) * (start + steps * std::max(step, least));
  };
  double best = -1;
  const auto consider = [&](std::int64_t groups, std::int64_t items, std::int64_t splits) {
    const std::int64_t pieces = divide_up(plan.group_items, items), parts = divide_up(d.ngroups, groups) * pieces;
    const bool in_memory = splits > 1 || pieces > 1;
    const double memory = kept * static_cast<double>(groups * items) + (in_memory ? sums * static_cast<double>(splits) : 0.0);
    if (best >= 0 && memory > kMostMemory * x) return false;
    const std::int64_t of_split = divide_up(items / plan.slices, splits) * plan.slices;
    const int together = items_of_walk(d, groups * items);
    const double walks = kernel(2 * d.batch * groups * divide_up(items, together), kWalkStart, static_cast<double>(plan.chunks),
                                kWalkStep * together, together * (tile + state));
    const double gradients =
        kernel(plan.slots * groups * splits, kTaskEnds, static_cast<double>(of_split), kItem, 3 * tile + 2 * state);
    const double time = static_cast<double>(parts) * (walks + gradients + 2 * kLaunch) +
                        (splits > 1 ? kSplitSum + static_cast<double>(splits) * sums / 2.9e6 : 0.0);
    if (best >= 0 && time >= best) return true;
    best = time;
    plan.groups_of_part = groups, plan.items_of_piece = items, plan.pieces = pieces, plan.parts = parts, plan.splits = splits;
    return true;
  };
  // Whole groups need no sums in memory, pieces of groups do.
  const double items_in_memory = kMostMemory * x / std::max(kept, 1.0);
  const std::int64_t most_groups = static_cast<std::int64_t>(items_in_memory / static_cast<double>(plan.group_items));
  const std::int64_t heads = d.nheads / d.ngroups;
  const auto consider_splits = [&](std::int64_t groups, std::int64_t items) {
    bool fits = consider(groups, items, 1);
    for (std::int64_t splits = 2; fits && !batch_invariant && splits <= std::min(items / plan.slices, kMostSplits); ++splits)
      fits = consider(groups, items, splits);
  };
  if (most_groups > 0) {
    const std::int64_t least_parts = divide_up(d.ngroups, std::min(most_groups, d.ngroups));
    for (std::int64_t parts = least_parts; parts <= std::min(least_parts + (batch_invariant ? 0 : kMoreParts), d.ngroups);
         ++parts)
      consider_splits(divide_up(d.ngroups, parts), plan.group_items);
  } else {
    const double room = std::max(items_in_memory - sums / kept, 1.0);
    const std::int64_t most = std::max<std::int64_t>(static_cast<std::int64_t>(room) / plan.slices, 1);  // heads
    const std::int64_t least_pieces = divide_up(heads, most);
    for (std::int64_t pieces = least_pieces; pieces <= std::min(least_pieces + (batch_invariant ? 0 : kMoreParts), heads);
         ++pieces)
      consider_splits(1, divide_up(heads, pieces) * plan.slices);
  }
  plan.sums_in_memory = plan.splits > 1 || plan.pieces > 1;
  plan.states_bytes = static_cast<std::size_t>(plan.slots * plan.groups_of_part * plan.items_of_piece * state);
  if (plan.sums_in_memory)
    plan.sums_bytes = sizeof(float) * static_cast<std::size_t>(plan.splits * plan.slots * kFusedTile * d.ngroups * columns);
  plan.shares_bytes = sizeof(float) * static_cast<std::size_t>(plan.slots * d.nheads);
  for (std::size_t* bytes : {&plan.sums_bytes, &plan.shares_bytes}) *bytes = (*bytes + 255) / 256 * 256;
  return plan;
}

}  // namespace statescan::ssd_scan
