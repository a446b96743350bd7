// What the backward kernels of ssd_scan are compiled for, and how a call is cut up: plain C++, for the table, the launcher and
// the kernels.
//
// A first kernel walks each sequence twice: forward for the states that enter the chunks, backward for the adjoints of the
// states that leave them, and keeps both in the workspace. The main kernel then takes all chunks at the same time, a block for
// the heads of a group, so that what B and C share (their product, the sums over heads in dB and dC) stays in registers. Kept
// states of all heads would be several times as large as x, so the heads go through both kernels in parts.
#pragma once

#include <algorithm>
#include <cmath>

#include "plan.h"

namespace statescan::ssd_scan {

// States of one term are kept as bfloat16 and reach shared memory past the registers, a head ahead. That is one rounding in
// every product with a state, and besides it that of the result: within the accuracy gate where sums are of any length.
enum class States { full, one_term };

template <DType dtype, int dstate, States states>
struct BackwardPolicy {
  static constexpr DType kDType = dtype;
  static constexpr int kDstate = dstate;
  static constexpr bool kAhead = states == States::one_term;  // tiles come by cp.async alone, but for a gate
  static constexpr int kTermsOfInput = Policy<dtype, dstate>::kTermsOfInput;
  static constexpr int kTerms = Policy<dtype, dstate>::kTerms;  // of all that is computed: scores, weighted x, gated dy
  static constexpr int kTermsOfState = kAhead ? 1 : kTerms;
  static constexpr DType kKept = kAhead ? DType::bfloat16 : DType::float32;
  static constexpr std::int64_t kBytesOfKept = size_of(kKept);
  static_assert(!kAhead || dtype == DType::bfloat16);
  static constexpr int kChunk = dtype != DType::float32 && dstate <= 128 ? 64 : 32;
  static constexpr int kSlice = 64;  // columns of headdim in shared memory at a time, at most
  // Warps stand in a grid: kBlocks strips of 16 tokens by kParts parts of dstate.
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kChunk / 16;
  static constexpr int kParts = kWarps / kBlocks;
  static constexpr int kColumns = kDstate / kParts;                       // of dB and dC, of a warp
  static constexpr int kPairs = kBlocks > kParts ? kBlocks / kParts : 1;  // blocks [16,16] of pairs of tokens, of a warp
  // Of a block that walks states: strips of 16 rows by parts of dstate, and a warp that finds the steps ahead of the others.
  static constexpr int kWalkStrips = kSlice / kRowsOfWarp;
  static constexpr int kWalkParts = 2;
  static constexpr int kWalkColumns = kDstate / kWalkParts;
  static constexpr int kWalkers = 32 * kWalkStrips * kWalkParts;
  static constexpr int kWalkThreads = kWalkers + 32;
  static_assert(kBlocks <= kParts * kPairs && kColumns % 16 == 0);
};

// Heads that go through the kernels together: whole groups, or a piece of one.
struct Part {
  std::int64_t first_group, groups;
  std::int64_t first_head, heads;  // of each of these groups
};

struct BackwardPlan {
  std::int64_t chunk;           // tokens
  std::int64_t slots;           // of chunks: a packed sequence i begins with slot first_token / chunk + i
  std::int64_t columns;         // of a kept state: dstate as whole vectors
  std::int64_t bytes_of_kept;   // of an element
  std::int64_t groups_of_part;  // 1 if a part is less than a group
  std::int64_t heads_of_piece;  // of a group, in a part
  std::int64_t pieces;          // of a group
  std::int64_t splits;          // blocks that share the heads of a piece
  std::int64_t segments;        // of a sequence, that are walked at the same time
  bool sums_in_memory;          // dB and dC of all parts and splits meet in the workspace

  std::int64_t parts(const Dims& d) const { return divide_up(d.ngroups, groups_of_part) * pieces; }

  Part part(const Dims& d, std::int64_t i) const {
    const std::int64_t group = i / pieces * groups_of_part, head = i % pieces * heads_of_piece;
    return {group, std::min(groups_of_part, d.ngroups - group), head, std::min(heads_of_piece, d.nheads / d.ngroups - head)};
  }
};

// Floats of the workspace, one piece after the other. States may be of less.
struct BackwardScratch {
  std::int64_t states, adjoints;  // [slots, heads of a part, p, n*]
  std::int64_t ends;    // [2, sequences, segments, heads of a part, p, n]: what segments of both walks add to the state
  std::int64_t decays;  // [2, sequences, segments, heads of a part]: the logarithms to base 2 of their decays
  std::int64_t dB, dC;  // [splits, b, l, g, n]
  std::int64_t dA, ddt_bias, dD;  // of each slot: [slots, h], [slots, h], [slots, h, p]
  std::int64_t total = 0;

  BackwardScratch(const BackwardArgs& args, const Dims& d, const BackwardPlan& plan) {
    const std::int64_t kept =
        divide_up(plan.slots * plan.groups_of_part * plan.heads_of_piece * d.headdim * plan.columns * plan.bytes_of_kept, 4);
    const std::int64_t sums = plan.sums_in_memory ? plan.splits * d.batch * d.seqlen * d.ngroups * d.dstate : 0;
    states = take(kept), adjoints = take(kept);
    const std::int64_t walked =
        plan.segments > 1 ? 2 * d.num_sequences * plan.segments * plan.groups_of_part * plan.heads_of_piece : 0;
    ends = take(walked * d.headdim * d.dstate), decays = take(walked);
    dB = take(sums), dC = take(sums);
    dA = take(plan.slots * d.nheads), ddt_bias = take(plan.slots * d.nheads);
    dD = take(args.dD ? plan.slots * d.nheads * d.headdim : 0);
  }

 private:
  std::int64_t take(std::int64_t count) {
    const std::int64_t first = total;
    total += divide_up(count, 64) * 64;
    return first;
  }
};

template <class Policy>
BackwardPlan backward_plan(const BackwardArgs& args, const Dims& d) {
  constexpr double kMostMemory = 1.49;  // in units of x
  constexpr double kLittle = 4 << 20;   // bytes that are worth no launch
  constexpr std::int64_t kMostParts = 16, kMostSplits = 8;
  BackwardPlan plan{};
  plan.chunk = Policy::kChunk;
  plan.slots = args.cu_seqlens ? d.seqlen / plan.chunk + d.num_sequences : d.batch * divide_up(d.seqlen, plan.chunk);
  plan.columns = divide_up(d.dstate, 8) * 8;
  plan.bytes_of_kept = Policy::kBytesOfKept;
  const std::int64_t heads = d.nheads / d.ngroups;

  // Memory in bytes of a token. With batch_invariant the parts, and with them the order of the sums over heads, are those of
  // long sequences, whatever the call's own.
  const auto f64 = [](std::int64_t v) { return static_cast<double>(v); };
  const double tokens = f64(std::max<std::int64_t>(d.batch * d.seqlen, 1));
  const double x = f64(d.nheads * d.headdim * size_of(args.x.dtype)), sums = f64(8 * d.ngroups * d.dstate);
  const double shares = f64(8 * d.nheads + (args.dD ? 4 * d.nheads * d.headdim : 0)) / f64(plan.chunk);
  const double kept = f64(2 * plan.bytes_of_kept * d.nheads * d.headdim * plan.columns) *
                      (args.batch_invariant ? 1 / f64(plan.chunk) : f64(plan.slots) / tokens);
  const std::int64_t sequences = std::max<std::int64_t>(d.num_sequences, 1), row_tiles = divide_up(d.headdim, Policy::kSlice);
  const bool few_walks = !args.batch_invariant && sequences * d.nheads * row_tiles < 3 * kMultiprocessors;
  const double for_segments = few_walks ? 0.12 * x : 0;
  const double room = std::max(kMostMemory * x - shares, args.batch_invariant ? 1.0 : kLittle / tokens) - for_segments;
  // Parts as large as the sums of so many splits leave room for.
  const auto cut = [&](std::int64_t splits) {
    const auto of_room = [&](std::int64_t count, double others) {  // of so many groups or heads, those whose states fit
      const double share = std::max(room - others, room / 3) / std::max(kept, 1e-30);
      return std::clamp<std::int64_t>(static_cast<std::int64_t>(std::min(share, 1.0) * f64(count)),
                                      divide_up(count, kMostParts), count);
    };
    const auto even = [](std::int64_t count, std::int64_t most) { return divide_up(count, divide_up(count, most)); };
    BackwardPlan with = plan;
    with.splits = splits, with.groups_of_part = 1, with.heads_of_piece = heads, with.pieces = 1;
    if (const std::int64_t groups = of_room(d.ngroups, splits > 1 ? f64(splits) * sums : 0);
        groups > 1 || kept <= room * f64(d.ngroups)) {
      with.groups_of_part = even(d.ngroups, std::max<std::int64_t>(groups, 1));
    } else if (heads > 0) {  // pieces of a group meet in sums
      with.heads_of_piece = even(heads, std::max<std::int64_t>(of_room(d.nheads, f64(splits) * sums), 1));
      with.pieces = divide_up(heads, with.heads_of_piece);
    }
    with.sums_in_memory = splits > 1 || with.pieces > 1;
    return with;
  };
  // Splits that make the estimated time least: waves of blocks, each as long as its heads, a start and an end.
  const auto time = [&](const BackwardPlan& with) {
    constexpr std::int64_t kEnds = 3;
    return with.parts(d) * divide_up(plan.slots * with.groups_of_part * with.splits, kMultiprocessors) *
           (divide_up(with.heads_of_piece, with.splits) + kEnds);
  };
  plan = cut(1);
  if (!args.batch_invariant)
    for (std::int64_t splits = 2; splits <= std::min(heads, kMostSplits) && f64(splits) * sums <= room / 2; ++splits)
      if (const BackwardPlan other = cut(splits); time(other) < time(plan)) plan = other;

  // Segments that make the estimated time of the walks least, in units of a chunk of a walk; two walks fit a multiprocessor.
  // From kept states the walks of the adjoints alone are long.
  const std::int64_t chunks = std::max<std::int64_t>(divide_up(d.batch * d.seqlen, sequences * plan.chunk), 1);
  const std::int64_t walks = (args.chunk_states ? 1 : 2) * sequences * plan.groups_of_part * plan.heads_of_piece * row_tiles;
  const auto time_of_walks = [&](std::int64_t segments) {
    constexpr std::int64_t kStart = 3, kSplit = 6;  // of a block; two kernels more
    const auto waves = [](std::int64_t blocks) { return divide_up(blocks, 2 * kMultiprocessors); };
    const std::int64_t walk = divide_up(chunks, segments) + kStart;
    return segments == 1 ? waves(walks) * walk : (waves(walks * segments) + waves(walks * (segments - 1))) * walk + kSplit;
  };
  const double kept_of_part = kept * f64(plan.groups_of_part * plan.heads_of_piece) / f64(std::max<std::int64_t>(d.nheads, 1));
  const double left = room + for_segments - kept_of_part - (plan.sums_in_memory ? f64(plan.splits) * sums : 0);
  const double ends =
      f64(8 * sequences * plan.groups_of_part * plan.heads_of_piece * d.headdim * d.dstate) / tokens;  // of a segment
  plan.segments = 1;
  if (few_walks)
    for (std::int64_t segments = 2; segments <= std::min<std::int64_t>(16, chunks / 4) && f64(segments) * ends <= left;
         ++segments)
      if (time_of_walks(segments) < time_of_walks(plan.segments)) plan.segments = segments;
  return plan;
}

template <class Policy>
void launch_backward(const BackwardArgs& args, const Dims& dims, Stream stream);

}  // namespace statescan::ssd_scan
