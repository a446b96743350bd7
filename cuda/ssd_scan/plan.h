// Whether and where a sequence is split, from the shape alone: plain C++, for the tables and the launchers.
//
// A block of threads walks the chunks of its sequence one after the other. With few sequences and heads that leaves most of the
// device idle, so a sequence is cut into segments that are walked at the same time: a first pass finds what each segment adds
// to the state (no C, no y: under half the work), the segments are combined, and the main pass starts each from its own state.
// The first segment needs none before its output, and the last none at all. So where blocks of both fit at once, the output of
// a first segment of fewer chunks is found beside what those in between add to the state, and every block of the others adds up
// what lies before it. Elsewhere all segments but the last go through the first pass, in pieces, and a small kernel combines
// them.
//
// Where blocks are a few rounds of what the device holds, the last round leaves part of it idle. Segments that are walked one
// after the other, in blocks of their own, make rounds shorter and that part smaller. All first ones come before all second
// ones, so that a block hardly waits for the state that the one before it hands on; no bit depends on this.
#pragma once

#include <algorithm>

#include <statescan/ssd_scan.h>

#include "policy.h"

namespace statescan::ssd_scan {

inline constexpr std::int64_t kStretch = stretch_of(DeviceType::cuda);

// How segments come by the states that they start from.
enum class Passing {
  none,       // there is one segment
  handed_on,  // from the one before, which is done: as if not cut
  combined,   // what all but the last add is found first, then combined
  beside,     // what those between add is found beside the first one's output
};

struct Segments {
  std::int64_t count = 1;               // of each sequence
  std::int64_t chunks_per_segment = 0;  // of the longest possible sequence; a packed one is cut by its own length
  std::int64_t chunk = 1;               // tokens of a chunk; segments begin on its multiples
  Passing passing = Passing::none;
  std::int64_t pieces = 1;        // of a segment, for the first pass
  std::int64_t first_chunks = 0;  // of the first segment, where that has a length of its own

  constexpr bool computed() const { return passing == Passing::combined || passing == Passing::beside; }
  // Of a sequence, in the workspace: one for each piece, the last segment being one.
  constexpr std::int64_t states() const { return computed() ? (count - 1) * pieces + 1 : 1; }
};

// Multiprocessors of an H100. A constant, so that where a sequence is split, and with it the bits, depends on the shape alone.
inline constexpr std::int64_t kMultiprocessors = 132;

// Segments that make the estimated time least. A work item is what one block walks: one of `tiles` in a sequence. `slots` of
// them run at the same time, and `beside` says that a kernel can run beside the one ahead.
inline Segments segments_for(const Dims& dims, std::int64_t tiles, std::int64_t slots, std::int64_t chunk, bool batch_invariant,
                             bool beside) {
  // Times in units of a chunk of the main pass.
  constexpr double kStatePass = 0.5;  // a chunk of the first pass
  constexpr double kStart = 1.0;      // until a block of either pass is at work
  constexpr double kSplit = 2;        // two more launches
  constexpr double kMoved = 2;        // all slots' states through memory and back, twice
  constexpr double kHandOver = 0.5;   // a state to the next block
  // From the start to the end of blocks without a chunk, in the first launch: its code comes from memory.
  constexpr double kFirst = 2.8, kStates = 1.3;
  const double of_states = dims.dstate > 128 ? 0.37 : 0.31;  // a chunk of the states beside it
  constexpr std::int64_t kMost = 32, kMostHandedOn = 4, kMostPieces = 4, kMostBeside = 8;
  // Packed sequences are taken to be of equal length: their real ones are on the device.
  const std::int64_t sequences = std::max<std::int64_t>(dims.num_sequences, 1);
  const std::int64_t chunks = std::max<std::int64_t>(divide_up(dims.batch * dims.seqlen, sequences * chunk), 1);
  const std::int64_t items = sequences * std::max<std::int64_t>(tiles, 1);
  const auto waves = [&](std::int64_t blocks) { return static_cast<double>(divide_up(blocks, slots)); };
  const auto walk = [&](std::int64_t count) { return static_cast<double>(divide_up(chunks, count)); };
  std::int64_t best = 1, best_pieces = 1, best_first = 0, best_others = 0;
  Passing passing = Passing::none;
  double least = waves(items) * (walk(1) + kStart);
  if (items >= slots)
    for (std::int64_t count = 2; count <= std::min(kMostHandedOn, chunks / 4); ++count) {
      const double time = waves(items * count) * (walk(count) + kStart + kHandOver);
      if (time < least) least = time, best = count, passing = Passing::handed_on;
    }
  if (!batch_invariant && items < 2 * slots)
    for (std::int64_t count = 2; count <= std::min(kMost, chunks / 2); ++count)
      for (std::int64_t pieces = 1; pieces <= std::min(kMostPieces, chunks / count); ++pieces) {
        const double of_piece = walk(count * pieces);
        const double time = waves(items * count) * (of_piece * static_cast<double>(pieces) + kStart) +
                            waves(items * (count - 1) * pieces) * (kStatePass * of_piece + kStart) + kSplit +
                            kMoved * static_cast<double>(items * count * pieces) / static_cast<double>(slots);
        if (time < least) least = time, best = count, best_pieces = pieces, passing = Passing::combined;
      }
  if (beside && !batch_invariant && dims.dstate % 2 == 0)  // states are added in pairs
    for (std::int64_t count = 3; count <= std::min(kMostBeside, chunks / 2) && items * (count - 1) <= slots; ++count) {
      const auto rest = static_cast<double>(count - 1);
      const double balanced = (kStates - kFirst + of_states * static_cast<double>(chunks) / rest) / (1 + of_states / rest);
      const auto least_first = std::max<std::int64_t>(static_cast<std::int64_t>(balanced), 1);
      for (std::int64_t first = least_first; first <= least_first + 1; ++first) {
        const auto others = static_cast<double>(divide_up(chunks - first, count - 1));
        const double time = std::max(kFirst + static_cast<double>(first), kStates + of_states * others) + others + kStart;
        if (time < least)
          least = time, best = count, best_first = first, best_others = divide_up(chunks - first, count - 1),
          passing = Passing::beside;
      }
    }
  if (passing == Passing::beside) return {best, best_others, chunk, passing, 1, best_first};
  const std::int64_t chunks_per_piece = divide_up(divide_up(dims.seqlen, chunk), best * best_pieces);
  return {best, chunks_per_piece * best_pieces, chunk, passing, best_pieces};
}

// Workspace of a split call. Computed segments, float32 throughout: the states [num_sequences, states, h, p, n], then the
// logarithms to base 2 of the pieces' decays [num_sequences, states, h], where the last segment is one piece. The first pass
// writes what each piece adds to the state, combining leaves the state before each segment in the place of its first piece.
// Beside: the state after the first segment takes the first place, and nothing is combined.
// Handed on: the states [num_sequences, h, p, n], then for each tile of rows in every sequence how many segments are done.
struct SegmentWorkspace {
  float* states;
  float* log2_decay;
  unsigned* done;

  SegmentWorkspace(void* workspace, const Dims& dims, const Segments& segments)
      : states(static_cast<float*>(workspace)),
        log2_decay(states + state_count(dims, segments)),
        done(reinterpret_cast<unsigned*>(log2_decay)) {}

  static std::int64_t state_count(const Dims& dims, const Segments& segments) {
    return dims.num_sequences * segments.states() * dims.nheads * dims.headdim * dims.dstate;
  }
  static std::size_t done_bytes(const Dims& dims) {  // a tile has 16 rows of a head or more
    return sizeof(unsigned) * dims.num_sequences * dims.nheads * divide_up(dims.headdim, kRowsOfWarp);
  }
  static std::size_t bytes(const Dims& dims, const Segments& segments) {
    if (segments.count == 1) return 0;
    const std::size_t states = sizeof(float) * state_count(dims, segments);
    if (segments.passing == Passing::handed_on) return states + done_bytes(dims);
    return states + sizeof(float) * dims.num_sequences * segments.states() * dims.nheads;
  }
};

}  // namespace statescan::ssd_scan
