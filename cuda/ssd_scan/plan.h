// Whether and where a sequence is split, from the shape alone: plain C++, for the tables and the launchers.
//
// A block of threads walks the chunks of its sequence one after the other. With few sequences and heads that leaves most of the
// device idle, so a sequence is cut into segments that are walked at the same time: a first pass finds what each segment adds
// to the state (no C, no y: under half the work), the segments are combined, and the main pass starts each from its own state.
// The last segment needs no first pass, which would leave multiprocessors idle: the others go through it in pieces.
//
// Where blocks are a few rounds of what the device holds, the last round leaves part of it idle. Segments that are walked one
// after the other, in blocks of their own, make rounds shorter and that part smaller. All first ones come before all second
// ones, so that a block hardly waits for the state that the one before it hands on; no bit depends on this.
#pragma once

#include <algorithm>

#include <statescan/ssd_scan.h>

#include "policy.h"

namespace statescan::ssd_scan {

struct Segments {
  std::int64_t count = 1;               // of each sequence
  std::int64_t chunks_per_segment = 0;  // of the longest possible sequence; a packed one is cut by its own length
  std::int64_t chunk = 1;               // tokens of a chunk; segments begin on its multiples
  bool handed_on = false;               // each starts from the state that the one before it leaves, as if not cut
  std::int64_t pieces = 1;              // of a segment, for the first pass

  constexpr bool computed() const { return count > 1 && !handed_on; }
  // Of a sequence, in the workspace: one for each piece, the last segment being one.
  constexpr std::int64_t states() const { return handed_on ? 1 : (count - 1) * pieces + 1; }
};

// Multiprocessors of an H100. A constant, so that where a sequence is split, and with it the bits, depends on the shape alone.
inline constexpr std::int64_t kMultiprocessors = 132;

// Segments that make the estimated time least. A work item is what one block walks: `rows_per_work_item` of the nheads *
// headdim rows of states of a sequence; `slots` of them run at the same time.
inline Segments segments_for(const Dims& dims, std::int64_t rows_per_work_item, std::int64_t slots, std::int64_t chunk,
                             bool batch_invariant) {
  // Times in units of a chunk of the main pass.
  constexpr double kStatePass = 0.5;  // a chunk of the first pass
  constexpr double kStart = 1.0;      // until a block of either pass is at work
  constexpr double kSplit = 2;        // two more launches
  constexpr double kStates = 2;       // all slots' states through memory and back, twice
  constexpr double kHandOver = 0.5;   // a state to the next block
  constexpr std::int64_t kMost = 32, kMostHandedOn = 4, kMostPieces = 4;
  // Packed sequences are taken to be of equal length: their real ones are on the device.
  const std::int64_t sequences = std::max<std::int64_t>(dims.num_sequences, 1);
  const std::int64_t chunks = std::max<std::int64_t>(divide_up(dims.batch * dims.seqlen, sequences * chunk), 1);
  const std::int64_t items = sequences * std::max<std::int64_t>(divide_up(dims.nheads * dims.headdim, rows_per_work_item), 1);
  const auto waves = [&](std::int64_t blocks) { return static_cast<double>(divide_up(blocks, slots)); };
  const auto walk = [&](std::int64_t count) { return static_cast<double>(divide_up(chunks, count)); };
  std::int64_t best = 1, best_pieces = 1;
  bool handed_on = false;
  double least = waves(items) * (walk(1) + kStart);
  if (items >= slots)
    for (std::int64_t count = 2; count <= std::min(kMostHandedOn, chunks / 4); ++count) {
      const double time = waves(items * count) * (walk(count) + kStart + kHandOver);
      if (time < least) least = time, best = count, handed_on = true;
    }
  if (!batch_invariant && items < 2 * slots)
    for (std::int64_t count = 2; count <= std::min(kMost, chunks / 2); ++count)
      for (std::int64_t pieces = 1; pieces <= std::min(kMostPieces, chunks / count); ++pieces) {
        const double of_piece = walk(count * pieces);
        const double time = waves(items * count) * (of_piece * static_cast<double>(pieces) + kStart) +
                            waves(items * (count - 1) * pieces) * (kStatePass * of_piece + kStart) + kSplit +
                            kStates * static_cast<double>(items * count * pieces) / static_cast<double>(slots);
        if (time < least) least = time, best = count, best_pieces = pieces, handed_on = false;
      }
  const std::int64_t chunks_per_piece = divide_up(divide_up(dims.seqlen, chunk), best * best_pieces);
  return {best, chunks_per_piece * best_pieces, chunk, handed_on, best_pieces};
}

// Workspace of a split call. Computed segments, float32 throughout: the states [num_sequences, pieces, h, p, n], then the
// logarithms to base 2 of the pieces' decays [num_sequences, pieces, h], where the last segment is one piece; the first pass
// writes what each piece adds to the state, combining leaves the state before each segment in the place of its first piece.
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
    if (segments.handed_on) return states + done_bytes(dims);
    return states + sizeof(float) * dims.num_sequences * segments.states() * dims.nheads;
  }
};

}  // namespace statescan::ssd_scan
