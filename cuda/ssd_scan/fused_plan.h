// How the fused kernel cuts a call into blocks: a plain function of the shape, and of the multiprocessors where bits do not
// depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>

#include "fused_params.h"
#include "fused_policy.h"
#include "plan.h"

namespace statescan::ssd_scan {

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

struct FusedPlan {
  std::int64_t slices, pairs_per_group, pairs;  // see FusedParams
  std::int64_t first_chunks;                    // whose output is found beside the state pass; the segments are of the rest
  std::int64_t segments, chunks_per_segment;    // the short one included; of the others
  std::int64_t short_chunks;                    // of the short segment, which comes before the others; or 0
  std::int64_t pieces, pieces_per_segment, chunks_per_piece;  // of a sequence: those of the state pass, and one for its first
                                                              // chunks or, combined, for the state before its last segment
  bool walks;                              // blocks find the states that enter their segments themselves, without pieces
  int cuts[kMostWalks + 1];                // of these segments, in chunks: the earlier, the longer
  bool combines;                           // the pieces, by a kernel of its own; a few the output pass combines itself
  std::size_t decays_bytes, states_bytes;  // of the workspace

  constexpr std::int64_t long_segments() const { return segments - (short_chunks > 0); }
  // Whether the two heads of every pair of slices are an even one and the next, or the same.
  constexpr bool pairs_begin_even(const Dims& d) const {
    return slices % 2 == 0 || (slices == 1 && (d.ngroups == 1 || d.nheads / d.ngroups % 2 == 0));
  }
  constexpr bool has_pieces() const { return segments > 1 && !walks; }
  constexpr std::size_t workspace_bytes() const { return has_pieces() ? decays_bytes + states_bytes : 0; }
};

// A sequence in segments whose blocks walk to them: each as long as takes the same time with its walk.
struct Walks {
  int segments = 0;
  double time = 0.0;  // in units of a chunk of output
  int cuts[kMostWalks + 1] = {};

  constexpr Walks(int chunks, int most_segments) {
    constexpr int kParts = 16;  // of a unit
    int too_short = 0, enough = chunks * kParts;
    while (enough - too_short > 1) {
      const int middle = (too_short + enough) / 2;
      (cut(chunks, most_segments, static_cast<double>(middle) / kParts) ? enough : too_short) = middle;
    }
    time = static_cast<double>(enough) / kParts;
    cut(chunks, most_segments, time);
  }

 private:
  // Whether so many segments have the time.
  constexpr bool cut(int chunks, int most_segments, double within) {
    constexpr double kChunk = 0.38, kStart = -0.6;  // of a walk; an output's first chunk comes later, for it wants C too
    int end = 0;
    segments = 0;
    for (double left = within; left >= 1.0 && segments < most_segments && end < chunks; left = within - kStart - end * kChunk)
      end = std::min(end + static_cast<int>(left), chunks), cuts[++segments] = end;
    return end == chunks;
  }
};

// Splitting a sequence pays when the pairs of slices leave multiprocessors without work. It costs a pass over x and B for the
// states, but for the last segment's, the states to and from memory, and two more launches. The state pass is cut finer than
// the output, into as many pieces as fill the multiprocessors. The first chunks want no pass for states: where the pairs leave
// multiprocessors free, their output is found beside it, by a kernel of its own that takes as long. Where segments of equal
// length would leave a few multiprocessors without work, these take a short one of every sequence and pair, several in turn.
// For short sequences all that takes too long to begin. Their segments are one launch, where each block walks over the chunks
// before its own itself: that takes two fifths of the time of their output, and no memory.
// can_walk: there are kernels for that, and no final state takes the place of an initial one, which all of them read.
// Costs are in units of one chunk through the whole kernel (H100: 1.8 us).
constexpr FusedPlan fused_plan(const Dims& d, int padded_dstate, bool packed, bool batch_invariant,
                               std::int64_t most_pieces = std::numeric_limits<std::int64_t>::max(), bool can_walk = false) {
  const std::int64_t at_once = kMultiprocessors / sides_of(padded_dstate);  // tasks
  constexpr std::int64_t kFewPieces = 8, kMostPiecesPerSegment = 8, kMostSegments = 64, kMostRounds = 2;
  // A chunk of the state pass where all multiprocessors are at it, and where the memory is not what it waits for. Output beside
  // it takes half as much of the memory.
  constexpr double kStateChunk = 0.58, kLeastStateChunk = 0.38;
  constexpr double kStateTask = 2.0, kOutputTask = 3.0, kLaunches = 6.0;
  // The kernel of the first chunks starts with cold caches, and the state pass after it.
  constexpr double kFirstTask = 5.0, kBeside = 2.0;
  // A state more to find and to start from; from the end of a short segment to the next of the same block.
  constexpr double kOneMore = 1.0, kNextTask = 1.5;
  FusedPlan plan{};
  plan.slices = divide_up(d.headdim, kFusedTile);
  plan.pairs_per_group = divide_up(d.nheads / d.ngroups * plan.slices, 2);
  plan.pairs = plan.pairs_per_group * d.ngroups;
  // Lengths of packed sequences are on the device: reckon with equal ones, and cover the longest.
  const std::int64_t longest = divide_up(d.seqlen, kFusedTile);
  const std::int64_t chunks = packed ? divide_up(d.seqlen, kFusedTile * std::max<std::int64_t>(d.num_sequences, 1)) : longest;
  const std::int64_t items = std::max<std::int64_t>(plan.pairs * d.num_sequences, 1);
  const auto rounds = [](std::int64_t count, std::int64_t places) { return static_cast<double>(divide_up(count, places)); };
  plan.segments = 1, plan.chunks_per_segment = longest, plan.pieces_per_segment = 1;
  double least = rounds(items, at_once) * static_cast<double>(chunks);
  const auto chunk_of_states = [&](std::int64_t tasks, std::int64_t places) {
    const double busy = static_cast<double>(std::min(tasks, places)) + static_cast<double>(at_once - places) / 2;
    return std::max(busy / at_once * kStateChunk, kLeastStateChunk);
  };
  // More blocks than this many rounds hold would only add tasks.
  const std::int64_t most_segments = std::min({chunks, kMostSegments, divide_up(kMostRounds * at_once, items)});
  if (!batch_invariant && items < 2 * at_once)
    for (std::int64_t count = 2; count <= most_segments; ++count)
      for (std::int64_t pieces = 1; pieces <= kMostPiecesPerSegment; ++pieces) {
        if (pieces > 1 && items * (count - 1) * pieces > kMostRounds * at_once) break;
        const auto consider = [&](std::int64_t first, std::int64_t of_piece) {
          const std::int64_t length = of_piece * pieces, segments = divide_up(chunks - first, length);
          if ((divide_up(longest - first, length) - 1) * pieces >= most_pieces) return;
          const std::int64_t tasks = items * (segments - 1) * pieces, places = at_once - (first > 0 ? items : 0);
          double states = rounds(tasks, places) * (static_cast<double>(of_piece) * chunk_of_states(tasks, places) + kStateTask);
          if (first > 0) states = std::max(states + kBeside, static_cast<double>(first) + kFirstTask);
          const double output = rounds(items * segments, at_once) * (static_cast<double>(length) + kOutputTask);
          if (states + output + kLaunches >= least) return;
          least = states + output + kLaunches;
          plan.first_chunks = first, plan.chunks_per_segment = length, plan.pieces_per_segment = pieces;
          plan.segments = divide_up(longest - first, length), plan.short_chunks = 0;
        };
        consider(0, divide_up(divide_up(chunks, count), pieces));
        const std::int64_t tasks = items * (count - 1) * pieces, places = at_once - items;
        if (packed || places <= 0 || (count - 1) * pieces >= kFewPieces) continue;
        // Both take as long where chunks - count pieces of_piece + kFirstTask is the time of the states.
        const auto of_piece = static_cast<std::int64_t>(
            (static_cast<double>(chunks) + kFirstTask - kBeside - rounds(tasks, places) * kStateTask) /
            (rounds(tasks, places) * chunk_of_states(tasks, places) + static_cast<double>(count * pieces)));
        for (std::int64_t length = of_piece; length <= of_piece + 1; ++length)
          if (const std::int64_t first = chunks - length * pieces * count; length > 0 && first > 0) consider(first, length);
      }
  // Segments and a short one.
  if (!batch_invariant && !packed)
    for (std::int64_t count = 1; count < std::min(kFewPieces, most_pieces) && items * count < at_once; ++count) {
      const std::int64_t turns = divide_up(items, at_once - items * count);
      const auto in_turn = [&](std::int64_t n, std::int64_t each) {
        return static_cast<double>(n * each) + static_cast<double>(n - 1) * kNextTask;
      };
      const auto consider = [&](std::int64_t length) {
        const std::int64_t others = chunks - count * length, brief = std::min(length / turns - 1, others),
                           first = others - brief;
        const std::int64_t tasks = items * (count - 1), places = at_once - (first > 0 ? items : 0);
        if (brief <= 0 || tasks >= places) return;
        const std::int64_t rest = std::min(places - tasks, items);
        const double walk = std::max(count > 1 ? static_cast<double>(length) : 0.0, in_turn(divide_up(items, rest), brief));
        double states = walk * chunk_of_states(tasks + rest, places) + kStateTask;
        if (first > 0) states = std::max(states + kBeside, static_cast<double>(first) + kFirstTask);
        const double output = std::max(static_cast<double>(length), in_turn(turns, brief)) + kOutputTask + kOneMore;
        if (states + output + kLaunches >= least) return;
        least = states + output + kLaunches;
        plan.first_chunks = first, plan.chunks_per_segment = length, plan.pieces_per_segment = 1;
        plan.segments = count + 1, plan.short_chunks = brief;
      };
      const double of_lengths = static_cast<double>(count) + 1.0 / static_cast<double>(turns);
      const double state_chunk = chunk_of_states(at_once, at_once - items);
      // Without first chunks, and where these and the states take as long.
      for (const double length :
           {(static_cast<double>(chunks) + 1) / of_lengths,
            (static_cast<double>(chunks) + 1 + kFirstTask - kBeside - kStateTask) / (of_lengths + state_chunk)})
        for (std::int64_t more = 0; more <= 2; ++more) consider(static_cast<std::int64_t>(length) + more);
    }
  // In a call this short, what comes before and after the chunks matters, which above is left out of a single launch; these are
  // fitted to calls of 128 to 2048 tokens. Packed sequences may be much longer than on average, and the last segment with them.
  constexpr std::int64_t kMostWalked = 40;
  constexpr double kUnitAlone = 1.17, kStartAlone = 0.8, kUnit = 1.1, kStart = 6.5;
  const std::int64_t most_walks = sides_of(padded_dstate) == 1 ? std::min<std::int64_t>(at_once / items, kMostWalks) : 1;
  if (can_walk && !batch_invariant && most_walks > 1 && chunks > 1 && chunks <= kMostWalked && !(packed && plan.segments > 1)) {
    const Walks walks(static_cast<int>(chunks), static_cast<int>(most_walks));
    const double time = plan.segments > 1 ? kUnit * walks.time + kStart : kUnitAlone * walks.time + kStartAlone;
    if (walks.segments > 1 && time < least) {
      plan.walks = true, plan.segments = walks.segments, plan.first_chunks = plan.short_chunks = 0;
      std::copy(std::begin(walks.cuts), std::end(walks.cuts), plan.cuts);
      plan.cuts[walks.segments] = static_cast<int>(longest);
      plan.chunks_per_segment = plan.cuts[1], plan.pieces_per_segment = 1;
    }
  }
  plan.chunks_per_piece = divide_up(plan.chunks_per_segment, plan.pieces_per_segment);
  plan.pieces = (plan.long_segments() - 1) * plan.pieces_per_segment + (plan.short_chunks > 0) + 1;
  plan.combines = plan.pieces > kFewPieces;
  const auto heads = static_cast<std::size_t>(d.num_sequences * plan.pieces * d.nheads);
  plan.decays_bytes = aligned(heads * sizeof(float));
  plan.states_bytes = heads * plan.slices * kFusedTile * padded_dstate * sizeof(float);
  return plan;
}

// chunk_states with batch and stretches as one axis, as boxes of channels and states find it.
inline Tensor chunk_states_of(const Tensor& t) {
  Tensor rows = t;
  rows.ndim = 4;
  const int axes[] = {1, 3, 2, 4};
  for (int i = 0; i < 4; ++i) rows.shape[i] = t.shape[axes[i]], rows.stride[i] = t.stride[axes[i]];
  if (t.shape[1] == 1) rows.stride[0] = t.stride[0];
  rows.shape[0] = t.shape[0] * t.shape[1];
  return rows;
}

// Whole tasks in turns, where so many run at the same time: a block each for the long ones where that leaves blocks for the
// short.
constexpr Turns turns_of(std::int64_t long_tasks, std::int64_t short_tasks, std::int64_t places) {
  const std::int64_t tasks = std::max<std::int64_t>(long_tasks + short_tasks, 1), blocks = std::min(tasks, places);
  if (short_tasks == 0 || long_tasks == 0 || long_tasks >= places)
    return {static_cast<unsigned>(tasks / blocks), static_cast<unsigned>(tasks % blocks)};
  return {static_cast<unsigned>(divide_up(short_tasks, blocks - long_tasks)), 0, 1, static_cast<unsigned>(long_tasks),
          static_cast<unsigned>(tasks)};
}

// The turns of the output pass, where so many tasks run at the same time. Whole tasks alone, 320 take 132 multiprocessors three
// rounds, of which the last leaves 76 without work; the 56 tasks of that round in two parts each take half of it.
constexpr Turns fused_turns(const Dims& d, const FusedPlan& plan, bool packed, std::int64_t places) {
  constexpr std::int64_t kLeastChunks = 8;  // that this saves: less is not worth handing over a state
  const std::int64_t items = plan.pairs * d.num_sequences;
  if (plan.short_chunks > 0) return turns_of(items * plan.long_segments(), items, places);
  const std::int64_t tasks = std::max<std::int64_t>(plan.pairs * plan.segments * d.num_sequences, 1);
  const std::int64_t blocks = std::min(tasks, places);
  const std::int64_t whole = tasks / blocks, left = tasks % blocks, chunks = plan.chunks_per_segment;
  std::int64_t parts = left > 0 && plan.segments == 1 && !packed ? std::min(blocks / left, whole + 1) : 1;
  if (parts > 1 && chunks - divide_up(chunks, parts) < kLeastChunks) parts = 1;
  return {static_cast<unsigned>(whole), static_cast<unsigned>(left), static_cast<unsigned>(parts)};
}

// Of the workspace: the states between parts, then the counts of those done.
struct PartBytes {
  std::size_t states, counts;

  constexpr PartBytes(const Turns& turns, int padded_dstate)
      : states(turns.parts > 1 ? std::size_t{turns.left} * 2 * kFusedTile * padded_dstate * sizeof(float) : 0),
        counts(turns.parts > 1 ? aligned(turns.left * 2 * sides_of(padded_dstate) * sizeof(unsigned)) : 0) {}

  constexpr std::size_t sum() const { return states + counts; }
};

}  // namespace statescan::ssd_scan
