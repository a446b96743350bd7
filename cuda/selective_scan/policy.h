// What the selective_scan kernels are compiled for, as plain C++: the table, the launchers and the kernels read the same
// numbers.
#pragma once

#include <algorithm>
#include <limits>

#include <statescan/selective_scan.h>

#include "../common/access.h"

namespace statescan::selective_scan {

enum class Arithmetic {
  fast,          // 16-bit x: the decay is one instruction of the special-function unit, 2 ulp; softplus is within 2e-5
  precise,       // float32 x, and 16-bit x with a time-invariant B or C: near one the decay is kept as decay - 1
  complex_rate,  // A complex, any x; precise as well
};

// How x, dt, z and y are reached: all alike, so that a thread has the same elements of each.
enum class Reach {
  channels,    // 16-byte accesses along the channels
  tokens,      // 16-byte accesses along the tokens
  by_channel,  // element by element, neighbouring lanes on neighbouring channels
  by_token,    // element by element, neighbouring lanes on neighbouring tokens
};

// What a kernel takes for granted: the type of x, dt, z, y, B and C, that B and C change with the token and lie in vectors, and
// how the others are reached. Asked at run time, all this is half of the instructions outside of the recurrence itself.
enum class Known { nothing, bfloat16_channels, bfloat16_tokens, float16_channels, float16_tokens };

inline constexpr int kWarp = 32;
inline constexpr int kTile = 16;      // tokens that a block stages at a time
inline constexpr int kChannels = 64;  // of a block; every lane carries two
inline constexpr int kRun = 8;        // elements of x, dt, z and y that a thread moves at a time
inline constexpr int kRuns = kTile * kChannels / kRun;
inline constexpr int kMostWarps = 16;  // that share the states of a channel; what they stage fits 99 KB

// Bits depend on kStates through the order in which y is summed, and dstate alone decides it.
template <Arithmetic arithmetic, int states, bool time_invariant, Known known = Known::nothing>
struct Policy {
  static constexpr Arithmetic kArithmetic = arithmetic;
  static constexpr int kParts = arithmetic == Arithmetic::complex_rate ? 2 : 1;
  static constexpr int kStates = states;  // of each of its channels that a thread carries
  static constexpr int kValues = kStates * kParts;
  static constexpr bool kTimeInvariant = time_invariant;  // B or C is [d,n]
  static constexpr bool kKnown = known != Known::nothing;
  static constexpr DType kElement =
      known == Known::bfloat16_channels || known == Known::bfloat16_tokens ? DType::bfloat16 : DType::float16;
  static constexpr Reach kReach =
      known == Known::bfloat16_channels || known == Known::float16_channels ? Reach::channels : Reach::tokens;
  static constexpr int kWords = arithmetic == Arithmetic::fast ? 1 : 2;  // of 16 bytes, that kRun elements of x may take
  // Four states of a channel make four warps of the usual 16, so that blocks of 64 channels spread evenly over the
  // multiprocessors.
  static constexpr int kMostThreads = states == 4 && kParts == 1 ? kRuns : kMostWarps * kWarp;
  static constexpr int kLeastBlocks = kMostThreads != kRuns ? 1 : (kWords == 1 ? 5 : 4);
};

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline int states_per_thread(const Dims& d) { return d.complex_A || d.dstate <= 16 ? 4 : 8; }

// Longer rows of states go through in pieces, with a partial sum of y between them.
inline std::int64_t states_per_piece(const Dims& d) {
  return std::clamp<std::int64_t>(divide_up(d.dstate, states_per_thread(d)), 1, kMostWarps) * states_per_thread(d);
}
inline std::int64_t pieces(const Dims& d) { return d.dstate == 0 ? 1 : divide_up(d.dstate, states_per_piece(d)); }

inline std::int64_t blocks_per_group(const Dims& d) { return d.ngroups > 0 ? divide_up(d.dim / d.ngroups, kChannels) : 0; }

// Into how many segments each sequence is cut, so that a small batch fills the chip: a plain function of the shape. A segment's
// start costs a pass over the tokens before it, without C, z and y.
inline std::int64_t segments(const Dims& d, bool batch_invariant) {
  constexpr std::int64_t kWantedBlocks = 640, kEnoughBlocks = 264, kLeastTokens = 256;
  const std::int64_t tasks = d.num_sequences * d.ngroups * blocks_per_group(d);
  if (batch_invariant || tasks == 0 || tasks >= kEnoughBlocks) return 1;
  const std::int64_t tokens = d.batch * d.seqlen / d.num_sequences;  // of the average sequence
  return std::max<std::int64_t>(std::min(divide_up(kWantedBlocks, tasks), tokens / kLeastTokens), 1);
}

// How long the segment that begins a sequence is where lanes make its checkpoints, others being kShare: nobody asks for the
// adjoint at its start, without which its tokens take five eighths of the instructions.
inline constexpr int kShare = 16, kFirstShare = 24;

// Into how many links a segment is cut, which blocks work on one after the other, the state handed on. Blocks of whole
// segments, a few on each multiprocessor, are done at different times and leave it to ever fewer; links even that out. They
// change no bits.
inline std::int64_t links(const Inputs& args, const Dims& d) {
  constexpr std::int64_t kTokens = 512, kEnoughBlocks = 264;
  const std::int64_t cut = segments(d, args.batch_invariant);
  if (args.cu_seqlens || d.num_sequences * cut * d.ngroups * blocks_per_group(d) < kEnoughBlocks) return 1;
  return std::max<std::int64_t>(divide_up(divide_up(d.seqlen, cut), kTokens), 1);
}

// The backward's links: of a whole sequence each is half as long as the one before, of a segment there are two.
inline std::int64_t backward_links(const Inputs& args, const Dims& d) {
  constexpr std::int64_t kLeastTokens = 256;
  if (links(args, d) == 1) return 1;
  if (segments(d, args.batch_invariant) > 1) return 2;
  std::int64_t count = 1;
  while (((std::int64_t{2} << count) - 1) * kLeastTokens <= d.seqlen) ++count;
  return count;
}

// Of so many parts of a segment, those of the links after `link`; of all links it is -1. Shorter links end a launch: while
// these run places stay empty, and every link costs two tiles' time. H100, d5120, the backward with sums beside its end
// (bwd_sums.cuh), us, channels last and first: b8 l2048 in links as 4 to 2 to 1 2168 and 2236, 9 to 6 to 1 2215 and 2255, 3 to
// 1 2186 and 2264; b1 l16384 in eight segments 4 to 2 to 1 2429 and 2521, 13 to 3 2397 and 2489, 3 to 1 2445 and 2507.
STATESCAN_HOST_DEVICE constexpr std::int64_t parts_after(int link, std::int64_t links, bool is_cut) {
  constexpr std::int64_t kAll = 16, kSecond = 3;
  if (is_cut) return link < 0 ? kAll : (link == 0 ? kSecond : 0);
  return (std::int64_t{1} << (links - 1 - link)) - 1;
}

// Hands out places in the workspace, counted in floats.
class Scratch {
 public:
  std::int64_t total() const { return total_; }

 protected:
  std::int64_t take(std::int64_t floats) {
    const std::int64_t at = total_;
    total_ += divide_up(floats, 4) * 4;  // accesses of 16 bytes
    return at;
  }

 private:
  std::int64_t total_ = 0;
};

inline std::int64_t floats_of_states(const Dims& d) { return d.dim * d.dstate * (d.complex_A ? 2 : 1); }

// What has turns in a launch of all links: the blocks of a segment. A call has a few such launches.
inline constexpr int kForwardPasses = 2, kBackwardPasses = 3;
inline std::int64_t turns_of(const Inputs& args, const Dims& d) {
  return d.num_sequences * segments(d, args.batch_invariant) * blocks_per_group(d) * d.ngroups;
}

struct ForwardScratch : Scratch {
  std::int64_t partial, end_states, end_steps, carried, turns;
  ForwardScratch(const Inputs& args, const Dims& d) {
    const std::int64_t ends = d.num_sequences * (segments(d, args.batch_invariant) - 1);
    const bool is_linked = links(args, d) > 1;
    partial = take(pieces(d) > 1 ? d.batch * d.seqlen * d.dim : 0);
    end_states = take(ends * floats_of_states(d)), end_steps = take(ends * d.dim);
    carried = take(is_linked ? (ends + d.num_sequences) * floats_of_states(d) : 0);
    turns = take(is_linked ? kForwardPasses * turns_of(args, d) : 0);
  }
};

// ---- forward of the usual call: lanes ---------------------------------------------------------------------------------------
inline constexpr int kLaneStates = 16;  // of a channel, whose lanes share them

inline constexpr int kLaneThreads = 128;                                                 // of a block
constexpr int lanes_width(int states) { return kLaneThreads / (kLaneStates / states); }  // channels of a block

// How a call is dealt out: the states that a lane holds, and links as above. It changes no bits.
struct LanesPlan {
  int states;
  std::int64_t blocks_of_group, tasks, links, segments;
};

inline constexpr std::int64_t kEnoughLaneBlocks = 264;
inline LanesPlan lanes_plan(const Inputs& args, const Dims& d, int states) {
  LanesPlan plan{states, d.ngroups > 0 ? divide_up(d.dim / d.ngroups, lanes_width(states)) : 0, 0, 1, 1};
  plan.tasks = d.num_sequences * d.ngroups * plan.blocks_of_group;
  const std::int64_t tokens_of_link = states == 8 ? 384 : 768;
  if (!args.cu_seqlens && plan.tasks >= kEnoughLaneBlocks)
    plan.links = std::max<std::int64_t>(divide_up(d.seqlen, tokens_of_link), 1);
  if (plan.links > 3) ++plan.links;  // the last ones are shorter
  return plan;
}
// H100, d5120, us: b8 l2048 with 8 states a lane 531 to 587, with 2 more than 900; b1 l16384 with 2 907, in segments 1000 (with
// 2 it takes 680 since).
inline LanesPlan lanes_plan(const Inputs& args, const Dims& d) {
  const LanesPlan plan = lanes_plan(args, d, 8);
  return plan.tasks >= kEnoughLaneBlocks ? plan : lanes_plan(args, d, 2);
}
// For the backward's checkpoints. Where it cuts sequences into segments, they are worked on side by side.
inline LanesPlan checkpoints_plan(const BackwardArgs& args, const Dims& d) {
  LanesPlan plan = lanes_plan(args, d, 8);
  if (const std::int64_t cut = segments(d, args.batch_invariant); cut > 1)
    plan.tasks *= cut, plan.segments = cut, plan.links = 1;
  return plan;
}

struct LanesScratch : Scratch {
  std::int64_t carried, turns;
  LanesScratch(const Dims& d, const LanesPlan& plan) {
    carried = take(plan.links > 1 ? d.num_sequences * floats_of_states(d) : 0);
    turns = take(plan.links > 1 ? plan.tasks : 0);
  }
};

// ---- backward --------------------------------------------------------------------------------------------------------------
inline constexpr int kBackwardStates = 4;  // of a thread
inline constexpr int kCheckpoint = 8;      // tokens from one stored state to the next
// Warps that scan; the rest of a block's four only move tiles. What two stage of complex states, or four of others, fits 99 KB.
constexpr int backward_warps(bool complex_A, bool time_invariant) { return complex_A || time_invariant ? 2 : 4; }
inline int backward_warps(const Dims& d) { return backward_warps(d.complex_A, !d.varying_B || !d.varying_C); }

// Whether sums over channels are wanted for a B or C that changes with the token.
inline bool wants_projections(const BackwardArgs& args, const Dims& d) {
  return (args.dB && d.varying_B) || (args.dC && d.varying_C);
}

// Checkpoints of all sequences, tile by tile; a packed one starts with tile first / kTile + i.
inline std::int64_t checkpoints_of(const BackwardArgs& args, const Dims& d) {
  const std::int64_t tiles = args.cu_seqlens ? d.seqlen / kTile + d.num_sequences + 1 : d.batch * divide_up(d.seqlen, kTile);
  return tiles * (kTile / kCheckpoint);
}

struct BackwardScratch : Scratch {
  std::int64_t checkpoints, checkpoint_steps, starts, end_states, end_steps, adjoint_states, adjoint_steps, partial,
      partial_steps, projections, dA, dB, dC, dD, ddt_bias, carried, lanes_carried, turns, lanes_turns, all_turns;
  BackwardScratch(const BackwardArgs& args, const Dims& d) {
    const std::int64_t cut = segments(d, args.batch_invariant), ends = d.num_sequences * (cut - 1),
                       rows = d.num_sequences * cut;
    const std::int64_t parts = d.complex_A ? 2 : 1, blocks = blocks_per_group(d) * d.ngroups;
    const std::int64_t fours = divide_up(d.dstate, kBackwardStates), sums = d.batch * d.seqlen * d.dim;
    const bool one_piece = fours <= backward_warps(d);
    checkpoints = take(checkpoints_of(args, d) * blocks * fours * kChannels * kBackwardStates * parts);
    checkpoint_steps = take(cut > 1 ? checkpoints_of(args, d) * blocks * kChannels : 0);
    starts = take(cut > 1 ? rows * blocks * fours * kChannels * kBackwardStates * parts : 0);
    end_states = take(ends * floats_of_states(d)), end_steps = take(ends * d.dim);
    adjoint_states = take(ends * floats_of_states(d)), adjoint_steps = take(ends * d.dim);
    partial = take(one_piece ? 0 : sums), partial_steps = take(one_piece ? 0 : 2 * sums);
    projections = take(wants_projections(args, d) ? d.batch * d.seqlen * blocks * fours * 2 * kBackwardStates * parts : 0);
    dA = take(rows * floats_of_states(d));
    dB = take(d.varying_B ? 0 : rows * floats_of_states(d)), dC = take(d.varying_C ? 0 : rows * floats_of_states(d));
    dD = take(rows * d.dim), ddt_bias = take(rows * d.dim);
    const bool is_linked = backward_links(args, d) > 1;
    const LanesPlan plan = checkpoints_plan(args, d);
    carried = take(is_linked ? rows * floats_of_states(d) : 0);
    lanes_carried = take(plan.links > 1 ? d.num_sequences * floats_of_states(d) : 0);
    turns = take(is_linked ? kBackwardPasses * turns_of(args, d) : 0);
    lanes_turns = take(plan.links > 1 ? plan.tasks : 0);
    all_turns = total() - turns;
  }
};

template <class Policy>
void launch_forward(const Args& args, const Dims& dims, Stream stream);

template <class Policy>
void launch_lanes(const Args& args, const Dims& dims, Stream stream);

template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& dims, Stream stream);

}  // namespace statescan::selective_scan
