// A call as the kernels take it: plain C++. Strides are in bytes; data is null where a tensor is absent.
#pragma once

#include "../common/access.h"
#include "plan.h"

namespace statescan::ssd_scan {

// x, B, C, z or y: [b,l,h,p], or [b,l,g,n] with a group as its "head".
struct TokenView {
  char* data;
  std::int64_t batch, token, head, column;
  bool vector;  // 8 columns at a time, in accesses of up to 16 bytes
};

struct StepView {
  const char* data;
  DType dtype;
  std::int64_t batch, token, head;
};

// A, dt_bias [h], D [h,p].
struct HeadView {
  const char* data;
  std::int64_t head, column;
};

struct StateView {
  char* data;
  DType dtype;
  std::int64_t sequence, head, row, column;
  bool pairs;  // float32, two columns an access
  bool words;  // of 16 bits, two columns an access
};

struct Sequences {
  const void* cu_seqlens;  // null: rows of a batch
  bool is_int64;
  std::int64_t stride;
  std::int64_t count, seqlen;
  bool reverse;
  std::int64_t segments;            // of each sequence
  std::int64_t pieces;              // of a segment
  std::int64_t chunk;               // tokens; segments and pieces begin on multiples of it
  std::int64_t first_share, share;  // of a sequence's chunks, that its first segment and each other takes; 0: as many
};

// state_positions [num_sequences, count], and where the walks leave states for them (positions.cuh).
struct Positions {
  const void* data;  // null: none
  bool is_int64;
  std::int64_t sequence, position, count;  // strides in elements
  StateView entries;                       // float32, of the first position
  std::int64_t entry;                      // from one to the next, in bytes
};

// The state that enters each stretch of a sequence, kept for the backward.
struct KeptStates {
  StateView states;   // the first of each sequence's; packed ones lie one after the other
  std::int64_t step;  // from one to the next, in bytes
};

// Blocks of threads, tile fastest, then sequences, then segments. A slot is what a warp takes, 16 rows of a head; the
// slots of a group are those of its heads, one after the other, and a tile is some of them: parts of a head, or of several.
struct Tasks {
  std::uint32_t tiles, tiles_of_group;
  std::uint32_t slots, slots_of_head, slots_of_group;  // slots: of a tile
  std::uint32_t heads, heads_of_group;                 // heads: that a tile has slots of, at most
  std::uint32_t sequences, first_segment, end_segment;
};

struct Params {
  Tasks tasks;
  Sequences sequences;
  std::int64_t nheads, headdim, dstate;
  TokenView x, B, C, z, y;
  StepView dt;
  HeadView A, D, dt_bias;
  bool dt_softplus;
  float dt_min, dt_max;
  StateView start, final_state;
  StateView between;    // in the workspace (plan.h)
  std::int64_t places;  // of a sequence there; 0: it is not cut, or this is its first segment
  unsigned* done;       // segments that have handed theirs on, of each (sequence, tile); null: they do not
  float* log2_decay;    // of what segments add; null: their states are combined
  Positions positions;
  KeptStates kept;
};

// Of segments from the first on, to the one before the end.
template <class Policy>
Tasks tasks_of(const Dims& dims, std::int64_t sequences, std::int64_t first_segment, std::int64_t end_segment,
               std::int64_t max_heads) {
  const std::int64_t slots_of_head = divide_up(dims.headdim, kRowsOfWarp), heads_of_group = dims.nheads / dims.ngroups;
  const std::int64_t slots_of_group = heads_of_group * slots_of_head;
  const auto heads_of = [&](std::int64_t slots) {
    if (slots % slots_of_head == 0) return slots / slots_of_head;
    return slots_of_head % slots == 0 ? 1 : std::min(divide_up(slots - 1, slots_of_head) + 1, heads_of_group);
  };
  std::int64_t slots = std::min<std::int64_t>(Policy::kWarps, slots_of_group);
  while (slots > 1 && heads_of(slots) > max_heads) --slots;
  const std::int64_t tiles_of_group = divide_up(slots_of_group, slots);
  const auto u32 = [](std::int64_t v) { return static_cast<std::uint32_t>(v); };
  return {u32(tiles_of_group * dims.ngroups),
          u32(tiles_of_group),
          u32(slots),
          u32(slots_of_head),
          u32(slots_of_group),
          u32(heads_of(slots)),
          u32(heads_of_group),
          u32(sequences),
          u32(first_segment),
          u32(end_segment)};
}

inline TokenView token_view(const Tensor& t) {
  if (!t) return {};
  const std::int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.stride[0] * size, t.stride[1] * size,
          t.stride[2] * size,         t.stride[3] * size, cuda::why_not_runs("", t, 3, 8).empty()};
}

inline StepView step_view(const Tensor& t) {
  const std::int64_t size = size_of(t.dtype);
  return {static_cast<const char*>(t.data), t.dtype, t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
}

inline HeadView head_view(const Tensor& t) {
  if (!t) return {};
  return {static_cast<const char*>(t.data), t.stride[0] * 4, t.ndim == 2 ? t.stride[1] * 4 : 0};
}

inline StateView state_view(const Tensor& t) {
  if (!t) return {};
  const std::int64_t size = size_of(t.dtype);
  const bool in_pairs = cuda::why_not_runs("", t, 3, 2).empty();
  return {static_cast<char*>(t.data), t.dtype,
          t.stride[0] * size,         t.stride[1] * size,
          t.stride[2] * size,         t.stride[3] * size,
          in_pairs && size == 4,      in_pairs && size == 2};
}

// States [num_sequences, count, h, p, n] as the first of each sequence.
inline StateView first_of_each(const Tensor& states) {
  Tensor one = states;
  one.ndim = 4;
  for (int i = 1; i < 4; ++i) one.shape[i] = states.shape[i + 1], one.stride[i] = states.stride[i + 1];
  StateView view = state_view(one);
  const bool in_pairs = states.shape[1] == 1 || states.stride[1] % 2 == 0;
  view.pairs = view.pairs && in_pairs, view.words = view.words && in_pairs;
  return view;
}

// Whether the walks may leave states where the caller wants those at positions; narrow ones only if nothing is added to them.
inline bool entries_in_place(const Args& args, bool complete) {
  const StateView first = first_of_each(args.position_states);
  return first.pairs || (complete && first.words && first.dtype == args.x.dtype);
}

// Else they go to so much of the workspace.
inline std::size_t entry_bytes(const Args& args, const Dims& dims, bool complete = false) {
  if (!args.state_positions || entries_in_place(args, complete)) return 0;
  return sizeof(float) * dims.num_sequences * dims.npositions * dims.nheads * dims.headdim * dims.dstate;
}

// state_positions, and states [num_sequences, count, h, p, n] of any dtype to be left there.
inline Positions positions_in(const Tensor& at, const Tensor& states) {
  return {at.data,
          at.dtype == DType::int64,
          at.stride[0],
          at.stride[1],
          at.shape[1],
          first_of_each(states),
          states.stride[1] * size_of(states.dtype)};
}

inline Positions positions_of(const Args& args, const Dims& dims, void* workspace, bool complete = false) {
  if (!args.state_positions || dims.npositions == 0) return {};
  if (entries_in_place(args, complete)) return positions_in(args.state_positions, args.position_states);
  return positions_in(args.state_positions,
                      Tensor::contiguous(workspace, DType::float32,
                                         {dims.num_sequences, dims.npositions, dims.nheads, dims.headdim, dims.dstate}));
}

inline KeptStates kept_states(const Tensor& states, bool packed) {
  if (!states) return {};
  StateView first = first_of_each(states);
  if (packed) first.sequence = 0;
  return {first, states.stride[1] * size_of(states.dtype)};
}

// States in the workspace.
inline StateView segment_states(const SegmentWorkspace& workspace, const Dims& dims, const Segments& segments) {
  return state_view(Tensor::contiguous(workspace.states, DType::float32,
                                       {dims.num_sequences * segments.states(), dims.nheads, dims.headdim, dims.dstate}));
}

inline Sequences sequences_of(const Inputs& in, const Dims& dims, const Segments& segments) {
  const Tensor& cu = in.cu_seqlens;
  return {cu ? cu.data : nullptr,
          cu.dtype == DType::int64,
          cu ? cu.stride[0] : 0,
          dims.num_sequences,
          dims.seqlen,
          in.reverse,
          segments.count,
          segments.pieces,
          segments.chunk,
          segments.first_chunks,
          segments.chunks_per_segment};
}

// What the first pass and the main pass share.
inline Params params_of(const Inputs& in, const Dims& dims, const Segments& segments) {
  Params p{};
  p.sequences = sequences_of(in, dims, segments);
  p.nheads = dims.nheads, p.headdim = dims.headdim, p.dstate = dims.dstate;
  p.x = token_view(in.x), p.B = token_view(in.B), p.C = token_view(in.C), p.z = token_view(in.z);
  p.dt = step_view(in.dt);
  p.A = head_view(in.A), p.D = head_view(in.D), p.dt_bias = head_view(in.dt_bias);
  p.dt_softplus = in.dt_softplus;
  p.dt_min = static_cast<float>(in.dt_min), p.dt_max = static_cast<float>(in.dt_max);
  return p;
}

}  // namespace statescan::ssd_scan
