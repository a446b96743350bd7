// How the fused backward cuts a call: plain C++, a function of the shape alone.
//
// Two walks keep, for each pair of chunks, the state that enters it and the adjoint of the state that leaves it; the main
// kernel then takes all chunks at the same time. Kept for all heads they are twice as large as x (headdim 64, dstate 128).
// States that the forward kept, for each pair as well, want no walk and no room. Where dx has room for whole tiles the adjoints
// lie there, until the main kernel puts dx in their place; else the work goes through both kernels in parts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fused_policy.h"
#include "plan.h"

namespace statescan::ssd_scan {

// What goes through the kernels together: all heads of some sequences, whole groups of all of them, or a piece of one group. An
// item is a slice of 64 channels of a head.
struct FusedPart {
  int first_batch, batches;
  int first_group, groups, first_item, items;  // items: of each of these groups
  bool is_first, is_last;                      // of the pieces of its groups
  bool ends_batches;                           // the last part of its sequences

  constexpr int total() const { return groups * items; }
};

struct FusedBackwardPlan {
  std::int64_t slices;         // of 64 channels, of a head
  std::int64_t chunks, slots;  // of a row of the batch; of all. Of a packed row, what its sequences need at most
  std::int64_t pairs;          // of chunks, of a row
  std::int64_t group_items;    // slices of all heads of a group
  std::int64_t batches_of_part, groups_of_part, items_of_piece, pieces, parts_of_batches, parts;
  std::int64_t splits;                // blocks that share the items of a piece
  bool sums_in_memory;                // dB and dC of all pieces and splits meet in the workspace
  bool adjoints_in_dx, from_forward;  // from_forward: states
  // Of the workspace: two each, and one each.
  std::size_t exponents_bytes, steps_bytes, sums_bytes, shares_bytes;
  std::size_t states_bytes, adjoints_bytes, D_shares_bytes, packed_chunks_bytes, packed_order_bytes, ends_bytes;

  constexpr std::size_t workspace_bytes() const {
    return 2 * (exponents_bytes + steps_bytes + sums_bytes + shares_bytes) + states_bytes + adjoints_bytes + D_shares_bytes +
           packed_chunks_bytes + packed_order_bytes + ends_bytes;
  }

  constexpr FusedPart part(const Dims& d, std::int64_t i) const {
    const std::int64_t batch = i / parts_of_batches * batches_of_part, of_batches = i % parts_of_batches;
    const std::int64_t group = of_batches / pieces * groups_of_part, piece = of_batches % pieces, item = piece * items_of_piece;
    const auto count = [](std::int64_t most, std::int64_t left) { return static_cast<int>(std::min(most, left)); };
    return {static_cast<int>(batch),
            count(batches_of_part, d.batch - batch),
            static_cast<int>(group),
            count(groups_of_part, d.ngroups - group),
            static_cast<int>(item),
            count(items_of_piece, group_items - item),
            piece == 0,
            piece + 1 == pieces,
            of_batches + 1 == parts_of_batches};
  }
};

// Of the kernels' PackedChunk and TokenMaps.
inline constexpr std::size_t kPackedChunkBytes = 16, kTokenMapsBytes = 13 * 128;

// Slices whose states a block of the walks takes together, of so many in all sequences and both directions: two share B or C,
// one where that leaves multiprocessors without work.
constexpr int items_of_walk(std::int64_t items) { return items <= kMultiprocessors ? 1 : 2; }

// Stretches are pairs of chunks.
static_assert(kStretch == 2 * kFusedTile);

// Whether dx, where it is wanted, takes the adjoints of a call: two tiles for each pair of whole chunks. Sequences of other
// lengths and packed ones cut heads into pieces, and with batch_invariant all have to do as they do.
constexpr bool adjoints_fit_dx(const Dims& d, bool packed, bool batch_invariant) {
  return !packed && !batch_invariant && d.seqlen % (2 * kFusedTile) == 0 && d.headdim % kFusedTile == 0;
}

// Whether each sequence is one pair of chunks that zeros enter: states that nobody need make or keep. With batch_invariant the
// work is cut as that of longer ones and packed ones is.
inline bool begins_with_zeros(const BackwardArgs& args, const Dims& d) {
  return !args.initial_state && !args.cu_seqlens && !args.batch_invariant && d.seqlen <= kStretch;
}

// What may be kept between the kernels, in units of x.
inline constexpr double kMostMemory = 1.45, kMostMemoryOfSide = 1.37;

// The parts and splits that make the estimated time least, of those whose memory is in bounds. Times in us, of an H100.
// from_forward: states are there.
constexpr FusedBackwardPlan fused_backward_plan(const Dims& d, int padded_dstate, bool packed, bool batch_invariant,
                                                bool wants_dx, bool from_forward, double most_memory = kMostMemory) {
  constexpr std::int64_t kMostSplits = 8, kMoreParts = 3;
  constexpr double kLaunch = 2.0, kSplitSum = 4.0;
  constexpr double kWalkStart = 1.5, kWalkStep = 0.3;  // a task; a chunk and slice, where nothing waits for memory
  constexpr double kTaskEnds = 4.0, kItem = 2.3;       // the same of the main kernel: a chunk's start and end; an item
  constexpr double kBytes = 2.9e6 / kMultiprocessors;  // that a multiprocessor has of the memory in one us, when all are busy
  FusedBackwardPlan plan{};
  plan.adjoints_in_dx = wants_dx && adjoints_fit_dx(d, packed, batch_invariant);
  plan.from_forward = from_forward;
  const std::int64_t directions = from_forward ? 1 : 2, kinds = directions - plan.adjoints_in_dx;  // kinds: with room here
  plan.slices = divide_up(d.headdim, kFusedTile);
  const std::int64_t sequences = packed ? std::max<std::int64_t>(d.num_sequences, 1) : 1;  // of a row
  plan.chunks = packed ? d.seqlen / kFusedTile + sequences : divide_up(d.seqlen, kFusedTile);
  plan.pairs = packed ? d.seqlen / (2 * kFusedTile) + sequences : divide_up(plan.chunks, std::int64_t{2});
  plan.slots = d.batch * plan.chunks;
  const std::int64_t expected = packed ? d.seqlen / kFusedTile + sequences / 2 : plan.chunks;  // chunks of a row
  const std::int64_t heads = d.nheads / d.ngroups;
  plan.group_items = heads * plan.slices;
  const std::int64_t columns = padded_dstate, state = 2 * kFusedTile * columns;
  const std::int64_t steps = kFusedTile * sizeof(float) + 16;
  const std::int64_t tile = 2 * kFusedTile * kFusedTile, sums_of_task = 8 * kFusedTile * columns;
  // Of a row: what bounds the memory, what an item keeps, the sums of dB and dC of a split.
  // With batch_invariant that of a pair of whole chunks: how heads are cut must not depend on what is packed together.
  const std::int64_t tokens = batch_invariant ? 2 * kFusedTile : d.seqlen;
  const double bound = most_memory * 2.0 * static_cast<double>(tokens * d.nheads * d.headdim);
  const double kept = static_cast<double>((batch_invariant ? 1 : plan.pairs) * (kinds * state + 2 * (columns + steps)));
  const double sums = static_cast<double>((batch_invariant ? 2 : plan.chunks) * d.ngroups * sums_of_task);

  // Of blocks that take tasks of so many steps in turns.
  const auto kernel = [](std::int64_t tasks, double start, std::int64_t steps, double step, std::int64_t bytes) {
    const auto round = [&](std::int64_t count) {
      const double share = static_cast<double>(count) / kMultiprocessors * static_cast<double>(bytes) / kBytes;
      return count > 0 ? start + static_cast<double>(steps) * std::max(step, share) : 0.0;
    };
    return static_cast<double>(tasks / kMultiprocessors) * round(kMultiprocessors) + round(tasks % kMultiprocessors);
  };
  double least = -1;
  const auto consider = [&](std::int64_t batches, std::int64_t groups, std::int64_t items, std::int64_t splits) {
    const std::int64_t pieces = divide_up(plan.group_items, items), ranges = divide_up(d.batch, batches);
    const std::int64_t parts_of_batches = divide_up(d.ngroups, groups) * pieces;
    const bool in_memory = splits > 1 || pieces > 1;
    const double memory = kept * static_cast<double>(groups * items) + (in_memory ? sums * static_cast<double>(splits) : 0.0);
    if (least >= 0 && memory * static_cast<double>(batches) > bound * static_cast<double>(d.batch)) return;
    const int together = items_of_walk(directions * batches * sequences * groups * items);
    const double walks = kernel(directions * batches * sequences * groups * divide_up(items, together), kWalkStart,
                                divide_up(expected, sequences), kWalkStep * together, together * (tile + state / 2));
    // A task's sums go to the workspace, and come back but for those of the first piece.
    const double passes = in_memory ? 2.0 * static_cast<double>(pieces - 1) / static_cast<double>(pieces) + (splits > 1) : 0.0;
    const double gradients =
        kernel(batches * expected * groups * splits, kTaskEnds + passes * static_cast<double>(sums_of_task) / kBytes,
               divide_up(items / plan.slices, splits) * plan.slices, kItem, 3 * tile + state);
    const double split_sum = kSplitSum + static_cast<double>(splits * batches) * sums / (kBytes * kMultiprocessors);
    const double time =
        static_cast<double>(ranges) *
        (static_cast<double>(parts_of_batches) * (walks + gradients + 2 * kLaunch) + (splits > 1 ? split_sum : 0.0));
    if (least >= 0 && time >= least) return;
    least = time;
    plan.batches_of_part = batches, plan.groups_of_part = groups, plan.items_of_piece = items, plan.pieces = pieces;
    plan.parts_of_batches = parts_of_batches, plan.parts = ranges * parts_of_batches, plan.splits = splits;
  };
  const auto consider_splits = [&](std::int64_t batches, std::int64_t groups, std::int64_t items) {
    for (std::int64_t splits = 1; splits <= (batch_invariant ? 1 : std::min(items / plan.slices, kMostSplits)); ++splits)
      consider(batches, groups, items, splits);
  };
  // Cuts an axis into as few parts as fit, `most` of it in each, and a few more.
  const auto cut = [&](std::int64_t size, double most, auto visit) {
    const std::int64_t fewest = divide_up(size, std::clamp<std::int64_t>(static_cast<std::int64_t>(most), 1, size));
    for (std::int64_t parts = fewest; parts <= std::min(fewest + (batch_invariant ? 0 : kMoreParts), size); ++parts)
      visit(divide_up(size, parts));
  };
  const double items = bound / kept;  // that fit, of every sequence
  const auto all = static_cast<double>(plan.group_items);
  if (items >= all)
    cut(d.ngroups, items / all, [&](std::int64_t groups) { consider_splits(d.batch, groups, plan.group_items); });
  else
    cut(heads, (items - sums / kept) / static_cast<double>(plan.slices),
        [&](std::int64_t piece) { consider_splits(d.batch, 1, piece * plan.slices); });
  // Sequences apart need no sums in memory. Where a sequence is cut would then depend on how many there are.
  if (!batch_invariant && items * static_cast<double>(d.batch) >= all * static_cast<double>(d.ngroups))
    cut(d.batch, items * static_cast<double>(d.batch) / (all * static_cast<double>(d.ngroups)),
        [&](std::int64_t batches) { consider_splits(batches, d.ngroups, plan.group_items); });
  const std::int64_t slots_of_part = plan.batches_of_part * plan.chunks;
  const std::int64_t kept_of_part = plan.batches_of_part * plan.pairs * plan.groups_of_part * plan.items_of_piece;
  plan.sums_in_memory = plan.splits > 1 || plan.pieces > 1;
  plan.states_bytes = from_forward ? 0 : static_cast<std::size_t>(kept_of_part * state);
  plan.adjoints_bytes = plan.adjoints_in_dx ? 0 : static_cast<std::size_t>(kept_of_part * state);
  plan.exponents_bytes = static_cast<std::size_t>(kept_of_part * columns);
  plan.steps_bytes = static_cast<std::size_t>(kept_of_part * steps);
  if (plan.sums_in_memory)
    plan.sums_bytes = static_cast<std::size_t>(plan.splits * slots_of_part * d.ngroups * sums_of_task / 2);
  plan.shares_bytes = sizeof(float) * static_cast<std::size_t>(plan.slots * d.nheads);
  plan.D_shares_bytes = plan.shares_bytes * static_cast<std::size_t>(d.D_per_channel ? d.headdim : 1);
  if (packed) {
    plan.packed_chunks_bytes = kPackedChunkBytes * static_cast<std::size_t>(plan.slots);
    plan.packed_order_bytes = sizeof(unsigned) * static_cast<std::size_t>(1 + sequences);  // after the count of chunks
    plan.ends_bytes = kTokenMapsBytes * static_cast<std::size_t>(sequences);
  }
  for (std::size_t* bytes : {&plan.exponents_bytes, &plan.steps_bytes, &plan.sums_bytes, &plan.shares_bytes,
                             &plan.D_shares_bytes, &plan.packed_chunks_bytes, &plan.packed_order_bytes, &plan.ends_bytes})
    *bytes = (*bytes + 255) / 256 * 256;
  return plan;
}

// More states than a block holds are the work of two calls, a side of them each: states do not mix. dB, dC and dinitial_state
// are each call's own, the rest is the sum of what both find. The second adds its dx to that of the first, where it lies: no
// adjoints do.
struct FusedBackwardSides {
  FusedBackwardPlan calls[2];
  std::size_t steps, heads;  // numbers of ddt; of dA or ddt_bias

  constexpr FusedBackwardSides(const Dims& d, bool packed, bool batch_invariant, bool wants_dx, bool from_forward)
      : calls{plan_of(d, packed, batch_invariant, wants_dx, from_forward),
              plan_of(d, packed, batch_invariant, false, from_forward)},
        steps(static_cast<std::size_t>(d.batch * d.seqlen * d.nheads)),
        heads(static_cast<std::size_t>(d.nheads)) {}

  // What both keep, one after the other; then in float32 what each finds of ddt, dA and ddt_bias.
  constexpr std::size_t kept_bytes() const { return std::max(calls[0].workspace_bytes(), calls[1].workspace_bytes()); }
  constexpr std::size_t workspace_bytes() const { return kept_bytes() + 2 * sizeof(float) * (steps + 2 * heads); }

 private:
  static constexpr FusedBackwardPlan plan_of(const Dims& d, bool packed, bool batch_invariant, bool wants_dx,
                                             bool from_forward) {
    Dims of_side = d;
    of_side.dstate = kMostStatesOfBlock;
    return fused_backward_plan(of_side, kMostStatesOfBlock, packed, batch_invariant, wants_dx, from_forward, kMostMemoryOfSide);
  }
};

}  // namespace statescan::ssd_scan
