// A call as the fused kernel takes it: tensor maps for what the bulk copy engine moves, views for the rest.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda.h>

#include "params.h"

namespace statescan::ssd_scan {

inline constexpr int kFusedTile = 64;  // tokens of a chunk, channels of a slice of headdim, and rows of a wgmma

// y [b,l,h,p], contiguous along p.
struct OutputView {
  char* data;
  std::int64_t token, head;
};

// Division of numbers from 0 to 2^31 - 1 by one that the host knows: three instructions in place of thirty. A kernel starts
// with many, and it is for instructions, which come from memory, that a start waits. (cutlass::FastDivmod asks whether the
// divisor is 1 at every division: 64 to 144 instructions more in a kernel that is 2,000 to 7,000 long.)
struct Divisor {
  unsigned value, multiplier, shift;

  constexpr Divisor() : Divisor(1) {}
  explicit constexpr Divisor(unsigned v) : value(v), multiplier(0), shift(0) {
    while (std::uint64_t{1} << shift < v) ++shift;
    multiplier = static_cast<unsigned>(((std::uint64_t{1} << (31 + shift)) + v - 1) / v);
  }
  STATESCAN_HOST_DEVICE constexpr int quotient(int n) const {
    const std::uint64_t product = std::uint64_t{2 * static_cast<unsigned>(n)} * multiplier;
    return static_cast<int>(static_cast<unsigned>(product >> 32) >> shift);
  }
  STATESCAN_HOST_DEVICE constexpr int remainder(int n) const { return n - quotient(n) * static_cast<int>(value); }
};
static_assert(Divisor(1).quotient(2147483647) == 2147483647 && Divisor(7).quotient(2147483645) == 306783377 &&
              Divisor(2147483647).quotient(2147483646) == 0 && Divisor(3).remainder(2147483647) == 1);

// Which tasks a block takes, in turns: `whole` of its own, and one of the `left` that are left over or, where these come in
// parts, a part of one. A part waits for the one before it, which another block does: the first parts come in the first turn,
// the last ones in the last, so that it need not wait long. Parts go to blocks in order, so that a block that waits is not the
// one that keeps another from starting. Bits do not depend on any of this: the state goes from part to part as it is.
// Where there are `singles`, so many blocks take one task each, a long one. The others take short ones, up to `tasks` in all.
struct Turns {
  unsigned whole = 0, left = 0, parts = 1, singles = 0, tasks = 0;
};

// Segments of a sequence whose blocks walk to them.
inline constexpr int kMostWalks = 8;

// A task is one pair of slices of a group in one segment of one sequence. Pairs vary fastest: neighbouring blocks share B and C
// in L2. Short segments come after the others.
struct FusedParams {
  CUtensorMap x, B, C, z, y;
  CUtensorMap chunk_states;  // [rows, headdim, nheads, dstate]
  CUtensorMap dy;            // where y is dz
  CUtensorMap raw_steps;     // dt, of ordered calls
  StepView dt;
  HeadView A, dt_bias, D;
  StateView initial_state, final_state;
  Positions positions;
  OutputView packed_y;        // where boxes would write into the next sequence
  std::uint8_t* y_exponents;  // [b,l,h,slices]: y goes out as halves with shared exponents (scaled.cuh); null: as elements
  const void* cu_seqlens;     // null: sequence i is row i of the batch
  bool cu_is_int64, dt_softplus, reverse, has_z;
  std::int64_t cu_stride, seqlen;
  int stretches;  // rows of chunk_states of a sequence of the batch
  float dt_min, dt_max;
  int nheads, headdim, dstate;
  int sides;  // of the states, each the work of a block of its own
  int heads_per_group, slices_of_group;
  Divisor slices, pairs_per_group, pairs;            // slices of a head; pairs of slices of a group, of all groups
  Divisor segments;                                  // of a sequence, but for a short one before them
  int first_chunk, chunks_per_segment, chunk_limit;  // chunks before the first or past the limit are in no segment
  int short_chunks;                                  // the short segment of each sequence, or 0
  int long_segments;                                 // of all sequences
  bool beside;                                       // the first chunks' outputs and the state pass, at the same time
  Turns turns;
  Divisor left, gaps;  // turns.left; between parts: turns.parts - 1
  // Of [s, pieces]: what each piece of a sequence adds to the state of each slice, and its decay [h], float32; null where
  // sequences are whole. The state pass writes them, with pieces for its segments; the output pass reads them or, once they are
  // combined, the state before each piece. Where first chunks go ahead, piece 0 is the state after them. A slice lies as the
  // threads have it: each value stays with its thread.
  float* piece_states;
  float* piece_decays;
  int pieces, pieces_per_segment;
  bool pieces_combined;
  // Of tasks in parts, for each slice: the state that one part leaves to the next, and how many have left theirs.
  float* part_states;
  unsigned* parts_done;
};

// Those of a call whose sequences are rows of a batch, in order, with z or without, as most are, and whose dt the bulk copy
// engine can move. Kernels that take it for granted have a fifth less code.
template <bool kHasZ>
struct OrderedParams : FusedParams {
  static constexpr bool kOrdered = true;
  static constexpr const void* cu_seqlens = nullptr;
  static constexpr bool reverse = false, has_z = kHasZ;
};

template <class Params>
inline constexpr bool is_ordered = requires { std::remove_cvref_t<Params>::kOrdered; };

// Those of a launch where each block walks over the chunks before its segment itself, for the state that enters it.
template <class Params>
struct WalkingParams : Params {
  static constexpr bool kWalks = true;
  int cuts[kMostWalks + 1];  // where the segments begin and, at last, end, in chunks
};

template <class Params>
inline constexpr bool does_walk = requires { std::remove_cvref_t<Params>::kWalks; };

}  // namespace statescan::ssd_scan
