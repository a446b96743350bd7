// Which tokens, heads and rows of states a block of threads works on.
#pragma once

#include "params.h"

namespace statescan::ssd_scan {

// Tokens of a segment in the order of the scan: step i is token `origin + i * sign` of a row of the batch.
struct Walk {
  std::int64_t batch, origin, length;
  int sign;
  std::int64_t before;  // tokens of the sequence in earlier segments
};

inline __device__ std::int64_t index_at(const void* data, bool is_int64, std::int64_t i) {
  return is_int64 ? static_cast<const std::int64_t*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
}

// cu_seqlens on a device cannot be checked without waiting for it: wrong values give wrong results, but no wild access.
inline __device__ std::int64_t boundary(const Sequences& s, std::int64_t i) {
  const std::int64_t at = index_at(s.cu_seqlens, s.is_int64, i * s.stride);
  return at < 0 ? 0 : (at > s.seqlen ? s.seqlen : at);
}

inline __device__ std::int64_t length_of(const Sequences& s, std::int64_t sequence) {
  return s.cu_seqlens ? max(boundary(s, sequence + 1) - boundary(s, sequence), std::int64_t(0)) : s.seqlen;
}

// Segments begin on multiples of a chunk. Sequence s.count is what lies past the last packed token.
inline __device__ Walk walk_of(const Sequences& s, std::int64_t sequence, std::int64_t segment) {
  std::int64_t batch = sequence, first = 0, last = s.seqlen;
  if (s.cu_seqlens) {
    batch = 0;
    first = boundary(s, sequence);
    last = sequence == s.count ? s.seqlen : boundary(s, sequence + 1);
  }
  const std::int64_t length = last > first ? last - first : 0;
  const std::int64_t chunks = (length + s.chunk - 1) / s.chunk, others = s.segments - 1;
  // So many chunks of a sequence, of which each segment after the first has `share` and all have `of`, rounded up.
  const auto part = [&](std::int64_t share, std::int64_t of) { return (chunks * share + of - 1) / of; };
  const std::int64_t each =
      s.first_share > 0 ? part(s.share, s.first_share + others * s.share) : part(1, s.segments * s.pieces) * s.pieces;
  const std::int64_t of_first = s.first_share > 0 ? max(chunks - others * each, 0l) : each;
  const auto end_of = [&](std::int64_t i) { return i < 0 ? 0l : min((of_first + i * each) * s.chunk, length); };
  const std::int64_t begin = end_of(segment - 1), end = end_of(segment);
  return {batch, s.reverse ? last - 1 - begin : first + begin, end - begin, s.reverse ? -1 : 1, begin};
}

// Which of the kept states enters the stretch that begins after so many tokens of a sequence.
inline __device__ std::int64_t kept_index(const Sequences& s, std::int64_t sequence, std::int64_t before) {
  return (s.cu_seqlens ? boundary(s, sequence) / kStretch + sequence : 0) + before / kStretch;
}

// The block's part of the call.
struct Task {
  std::int64_t sequence, segment;
  std::int64_t group, first_head;
  int heads, slots;  // fewer than those of Tasks at the end of a group
  int first_slot;    // of the first head
};

inline __device__ Task task_of(const Tasks& t) {
  const std::uint32_t tile = blockIdx.x % t.tiles, rest = blockIdx.x / t.tiles;
  const std::uint32_t group = tile / t.tiles_of_group, first = tile % t.tiles_of_group * t.slots;
  const std::uint32_t slots = min(t.slots, t.slots_of_group - first), head = first / t.slots_of_head;
  return {rest % t.sequences,
          rest / t.sequences + t.first_segment,
          group,
          std::int64_t(group) * t.heads_of_group + head,
          static_cast<int>((first + slots - 1) / t.slots_of_head - head + 1),
          static_cast<int>(slots),
          static_cast<int>(first % t.slots_of_head)};
}

// The rows of a warp.
struct Slot {
  int head;                // of the tile
  std::int64_t first_row;  // of headdim
  bool inside;

  __device__ Slot(const Tasks& t, const Task& task, int warp)
      : head((task.first_slot + warp) / static_cast<int>(t.slots_of_head)),
        first_row((task.first_slot + warp) % static_cast<int>(t.slots_of_head) * kRowsOfWarp),
        inside(warp < task.slots) {}
};

}  // namespace statescan::ssd_scan
