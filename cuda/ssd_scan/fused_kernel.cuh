// ssd_scan forward on sm_90a, fused
// Math     per chunk of 64 tokens, a = cumulative sum of dt A in the chunk:
//          y = (C B^T * exp(a_i - a_j) dt_j [j <= i]) x + exp(a_i) C h;   h = exp(a_last) h + (dt_j exp(a_last - a_j) x_j)^T B
// Shapes   x, z, y [b,l,h,p]; dt [b,l,h]; B, C [b,l,g,n]; h [p,n] of each head in float32 registers, p in slices of 64
// Traffic  read x, dt, z, write y: once; read B, C: once per pair of slices, from L2 after the first. With more than 128 states
//          x and dt a second time, from L2, and 16 KB a slice and chunk from one block of a cluster to the other
//          Floor of B8 L2048 H80 P64 G1 N128 bf16: 348 MB, 0.116 ms; matmuls 75 GFLOP, 0.10 ms. States that are kept for a
//          backward, one for 128 tokens, are 168 MB more, 0.056 ms
// Launch   a block per multiprocessor, which takes tasks in turns (FusedParams): a pair of slices in a segment of a sequence,
//          or in a part of that. Two consumer warpgroups of a slice each, and one that loads: tiles by TMA, and step sizes, which
//          one warp makes ready for each consumer, two chunks at a time. Of a token's steps these want those of two heads, a
//          sector of its own for each token: as loads of a warp's 32 lanes they held up the consumers' shared memory, so TMA
//          brings them too, where they lie as it wants them. With more than 128 states two blocks, a cluster, take a task, each
//          for a side of them: as states do not mix, each finds y from its own, hands that of one slice to the other block and
//          adds up that of the other
//          A segment's state comes from memory, where launches before this one left it, or its block walks over all chunks
//          before it, which take a bit more than a third of what their output does: at B1 L2048 H80 0.62 us a chunk, 0.55 where L2
//          has them, 0.46 where nothing is loaded
// Numerics float32 sums; scores, state and weighted x rounded to the element type as matrix operands; fixed order. y as the
//          element type or, for the norm of a Mamba-2 block, as halves with shared exponents
// Gate     in the backward of a call with z the same pass leaves dz = dy y silu'(z), y as it is before the gate: it reads dy
//          beside z
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include <statescan/math.h>

#include "../common/cluster.cuh"
#include "../common/early.cuh"
#include "../common/element.cuh"
#include "../common/scaled.cuh"
#include "../common/vector.cuh"
#include "fused_policy.h"
#include "positions.cuh"
#include "state_access.cuh"

namespace statescan::ssd_scan {

namespace fused {

using cuda::fast_exp2;
using cute::_64;
using Barrier = cutlass::arch::ClusterTransactionBarrier;

inline constexpr int kTile = kFusedTile;
inline constexpr int kWarpgroup = 128;
inline constexpr int kTileBytes = 2 * kTile * kTile;

// The step sizes of a chunk, as one warp prepares them for a consumer. Logarithms are to base 2. A block is 16 tokens, what a
// warp has of a chunk's rows; first and last are meant in the order of the scan. Between blocks, the decay from token j to token
// i is that from j to the last token of its block, times that from there to the first token of i's, times that from there to i:
// none is more than one, and 2 x 64 exponentials replace 64 x 64.
struct alignas(16) Steps {
  static constexpr int kBlocks = kTile / 16;

  float2 token[kTile];      // log decay from the chunk's start through the token, dt
  float weight[kTile];      // dt_j, decayed from token j to its block's end; to the segment's where the state alone is wanted
  float from_block[kTile];  // decay from the first token of i's block to token i
  float enter[kTile];       // decay from the chunk's start through token i
  // Decay from the end of a block, its column, to the first token of a later one, its row. The last row: to the chunk's end.
  float after_block[kBlocks + 1][kBlocks];
  float total, unused[3];  // decay through the chunk; where the state alone is wanted, from its start to the segment's end
};

// Chunks whose steps one warp finds at once, half of its lanes each. Two such groups are on their way to each consumer.
inline constexpr int kStepsAtOnce = 2;
// Groups of raw steps on their way by TMA, 16 bytes of each token: those that hold the slices' heads.
inline constexpr int kRawGroups = 3, kRawBytes = 16 * kTile * kStepsAtOnce;

// Chunks on their way. Where the state alone is wanted there is room for more.
template <class Policy, bool kStateOnly>
inline constexpr int stages_of = kStateOnly ? 4 : Policy::kStages;

// Shared memory of a block. A tile is 64 rows of 64 elements, 128 bytes each, swizzled as TMA writes and wgmma reads them.
template <class Policy, bool kStateOnly>
struct SharedStorage {
  static constexpr int kStages = stages_of<Policy, kStateOnly>, kTilesOfBC = Policy::kState / kTile;
  using Tile = char[kTileBytes];
  alignas(1024) Tile B[kStages][kTilesOfBC];
  alignas(1024) Tile C[kStateOnly ? 1 : kStages][kTilesOfBC];
  alignas(1024) Tile x[kStages][2];
  alignas(1024) Tile state[kStateOnly ? 1 : 2][kTilesOfBC];
  // Of each consumer two, by turns: z comes in where y goes out. For dz the second is for dy, and the next z and dy wait until
  // it has gone out.
  alignas(1024) Tile y[kStateOnly ? 1 : 2][2];
  alignas(128) char raw[kRawGroups][kRawBytes];
  Steps steps[2][2][kStepsAtOnce];  // of each consumer, of a group by turns
  alignas(16) float D[2][kTile];
  int next_kept[2][4];  // of each consumer, where in chunk_states the next state goes out to: state, head, channel, stretch
  alignas(8) Barrier full[kStages], empty[kStages];
  Barrier raw_full[kRawGroups], raw_empty[kRawGroups];
  Barrier steps_full[2][2], steps_empty[2][2];
  Barrier z_full[2][2], z_empty[2][2];
  Barrier sums_full, sums_empty;  // what the other block of a cluster adds to this one's output; its place for that of this one
};

inline constexpr int kMostSharedBytes = 227 * 1024;

// The place in a ring of buffers, and the parity of its barriers.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Blocks that share a task.
template <class Policy, bool kStateOnly>
__device__ int sides_of_task(const FusedParams& p) {
  return kStateOnly && Policy::kState == 128 ? p.sides : Policy::kSides;
}

// The tasks of a block, one after the other. Of two blocks with the same tasks each has a side of the states.
class TasksOfBlock {
 public:
  __device__ TasksOfBlock(const FusedParams& p, int sides)
      : turns_(p.turns),
        sides_(sides),
        left_(p.left.remainder(block())),
        part_(p.turns.left > 0 ? p.left.quotient(block()) : parts_of_all()),
        turn_of_part_(has_part() && parts_of_all() > 1 ? p.gaps.quotient(part_ * whole() + (parts_of_all() - 1) / 2)
                                                       : whole_of_block()) {}

  __device__ bool next() { return ++turn_ < (has_part() ? whole() + 1 : turn_of_part_); }

  // Of all, and of those that are left over.
  __device__ int index() const {
    const int blocks = static_cast<int>(gridDim.x >> (sides_ - 1));
    if (is_part()) return whole() * blocks + left_;
    return block() + (turn_ - (has_part() && turn_ > turn_of_part_)) * (blocks - static_cast<int>(turns_.singles));
  }
  __device__ int sides() const { return sides_; }
  __device__ int side() const { return static_cast<int>(blockIdx.x & (sides_ - 1)); }
  // A slice of a task that is left over, with a side of its states.
  __device__ int slice_left(int which) const { return (left_ * 2 + which) * sides_ + side(); }
  __device__ int part() const { return is_part() ? part_ : 0; }
  __device__ int parts() const { return is_part() ? parts_of_all() : 1; }

 private:
  const Turns& turns_;
  int sides_, left_, part_, turn_of_part_, turn_ = -1;  // without a part, the turn after the last

  __device__ int block() const { return static_cast<int>(blockIdx.x >> (sides_ - 1)); }
  __device__ int whole_of_block() const {
    const int singles = static_cast<int>(turns_.singles), others = static_cast<int>(gridDim.x >> (sides_ - 1)) - singles;
    if (block() < singles) return 1;
    return whole() - (singles > 0 && block() + (whole() - 1) * others >= static_cast<int>(turns_.tasks));
  }
  __device__ int whole() const { return static_cast<int>(turns_.whole); }
  __device__ int parts_of_all() const { return static_cast<int>(turns_.parts); }
  __device__ bool has_part() const { return part_ < parts_of_all(); }
  __device__ bool is_part() const { return has_part() && turn_ == turn_of_part_; }
};

// Which tokens a task takes, and for which slices. A short segment is -1.
struct Task {
  static constexpr int kChunksOfStretch = kStretch / kTile;

  int sequence, first_token, length, segment, batch, chunks, chunk_begin, chunk_count, group, first_slice, sides, side;

  __device__ Task(const auto& p, const TasksOfBlock& tasks) : sides(tasks.sides()), side(tasks.side()) {
    const int task = tasks.index(), rest = p.pairs.quotient(task), pair = p.pairs.remainder(task);
    const bool is_short = rest >= p.long_segments;
    sequence = is_short ? rest - p.long_segments : p.segments.quotient(rest);
    segment = is_short ? -1 : p.segments.remainder(rest);
    group = p.pairs_per_group.quotient(pair), first_slice = p.pairs_per_group.remainder(pair) * 2;
    first_token = 0, length = static_cast<int>(p.seqlen), batch = sequence;
    if (p.cu_seqlens) {
      first_token = static_cast<int>(bound(p, sequence)), batch = 0;
      length = max(static_cast<int>(bound(p, sequence + 1)) - first_token, 0);
    }
    chunks = length / kTile + (length % kTile > 0);
    const int last = min(chunks, p.chunk_limit);
    chunk_begin = min(p.first_chunk + (is_short ? 0 : p.short_chunks + segment * p.chunks_per_segment), last);
    chunk_count = min(is_short ? p.short_chunks : p.chunks_per_segment, last - chunk_begin);
    if constexpr (does_walk<decltype(p)>)
      chunk_begin = min(p.cuts[segment], chunks), chunk_count = min(p.cuts[segment + 1], chunks) - chunk_begin;
    if (tasks.parts() > 1) {
      const int of_part = (chunk_count + tasks.parts() - 1) / tasks.parts(), before = min(tasks.part() * of_part, chunk_count);
      chunk_begin += before;
      chunk_count = min(of_part, chunk_count - before);
    }
  }

  // Bounds outside the tensor are cut to it: whatever they hold, nothing is accessed past its end.
  static __device__ std::int64_t bound(const FusedParams& p, std::int64_t i) {
    const std::int64_t v = p.cu_is_int64 ? static_cast<const std::int64_t*>(p.cu_seqlens)[i * p.cu_stride]
                                         : static_cast<const std::int32_t*>(p.cu_seqlens)[i * p.cu_stride];
    return v < 0 ? 0 : (v > p.seqlen ? p.seqlen : v);
  }

  // First token, within the sequence, of the i-th chunk that is taken: in the order of the scan, or against it.
  template <bool kBackwards>
  __device__ int start_of(const auto& p, int i) const {
    const int chunk = chunk_begin + (kBackwards ? chunk_count - 1 - i : i);
    return (p.reverse ? chunks - 1 - chunk : chunk) * kTile;
  }

  // All chunks of the sequence before these.
  __device__ Task before() const {
    Task other = *this;
    other.chunk_begin = 0, other.chunk_count = chunk_begin;
    return other;
  }

  __device__ bool begins_stretch(int i) const { return (chunk_begin + i) % kChunksOfStretch == 0; }

  // The row of chunk_states of the first stretch that begins in the task.
  __device__ int first_stretch(const auto& p) const {
    const int before = p.cu_seqlens ? first_token / static_cast<int>(kStretch) + sequence : sequence * p.stretches;
    return before + (chunk_begin + kChunksOfStretch - 1) / kChunksOfStretch;
  }

  // Tokens of the sequence that the scan meets before the i-th chunk.
  __device__ std::int64_t tokens_before(const auto& p, int i) const {
    const std::int64_t chunk = chunk_begin + i;
    return p.reverse ? max(length - (chunks - chunk) * kTile, std::int64_t{0}) : min(chunk * kTile, std::int64_t{length});
  }

  // The one that the scan takes up after so many tokens of the sequence.
  __device__ int chunk_of(const auto& p, int tokens) const {
    const std::int64_t skipped = p.reverse ? static_cast<std::int64_t>(chunks) * kTile - length : 0;  // of the first chunk
    return static_cast<int>((tokens + skipped) / kTile) - chunk_begin;
  }

  __device__ bool has_slice(const FusedParams& p, int which) const { return first_slice + which < p.slices_of_group; }
  __device__ int head_of(const FusedParams& p, int which) const {
    return group * p.heads_per_group + p.slices.quotient(first_slice + which);
  }
  __device__ int channel_of(const FusedParams& p, int which) const { return p.slices.remainder(first_slice + which) * kTile; }
};

// Whether a block leaves the output of a slice. Of a cluster's two, each does so for one: to what its states give it adds what
// the other's do.
template <class Policy>
__device__ bool leaves_output(const Task& task, int which) {
  return Policy::kSides == 1 || task.side == which;
}

// The piece that a segment of the state pass leaves.
inline __device__ int piece_of(const FusedParams& p, const Task& task) {
  return task.segment + p.beside + (p.short_chunks > 0);
}

// The place of a piece's state, and of its decay.
inline __device__ float4* piece_state(const FusedParams& p, const Task& task, int piece, int which, int values, int thread) {
  const std::int64_t slices = static_cast<std::int64_t>(p.nheads) * p.slices.value;
  const std::int64_t at =
      (std::int64_t{task.sequence} * p.pieces + piece) * slices + task.group * p.slices_of_group + task.first_slice;
  return reinterpret_cast<float4*>(p.piece_states) + ((at + which) * task.sides + task.side) * (values / 4) * kWarpgroup +
         thread;
}
inline __device__ float& piece_decay(const FusedParams& p, const Task& task, int piece, int head) {
  return p.piece_decays[(std::int64_t{task.sequence} * p.pieces + piece) * p.nheads + head];
}

// Byte offset of the 16-byte unit `unit` of a row of a swizzled tile.
inline __device__ int unit_offset(int row, int unit) { return row * 128 + ((unit ^ (row & 7)) << 4); }

// ---- the warps that load -------------------------------------------------------------------------------------------------

inline __device__ void load_tile(const CUtensorMap& map, Barrier& barrier, void* tile, int column, int slab, int token,
                                 int batch) {
  constexpr auto kHint = static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<std::uint64_t*>(&barrier), kHint, tile, column, slab, token, batch);
}

// TMA takes 16 bytes of a token's raw steps, from where 16 bytes begin. The heads of a pair of slices are in one such unit.
__device__ int first_raw_head(const auto& p, const Task& task) {
  return task.head_of(p, 0) & (p.dt.dtype == DType::float32 ? -4 : -8);
}

// One thread: B, C and x into the ring, and the raw steps. An absent slice is counted as loaded and left alone.
template <class Storage>
struct Loader {
  Storage& shared;
  Ring<Storage::kStages> ring;
  Ring<kRawGroups> raw_ring;

  // kStateOnly: without C, against the order of the scan.
  template <bool kStateOnly>
  __device__ void load(const auto& p, const Task& task) {
    constexpr int kTilesOfBC = Storage::kTilesOfBC;
    const int slices = task.has_slice(p, 1) ? 2 : 1;
    const auto load_steps = [&](int i) {  // of the group that begins with the i-th chunk
      if (i >= task.chunk_count) return;
      shared.raw_empty[raw_ring.stage].wait(raw_ring.parity ^ 1);
      Barrier& full = shared.raw_full[raw_ring.stage];
      full.arrive_and_expect_tx(kRawBytes);
      cute::SM90_TMA_LOAD_3D::copy(&p.raw_steps, reinterpret_cast<std::uint64_t*>(&full),
                                   static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   shared.raw[raw_ring.stage], first_raw_head(p, task),
                                   task.template start_of<kStateOnly>(p, kStateOnly ? i + kStepsAtOnce - 1 : i), task.batch);
      raw_ring.advance();
    };
    if constexpr (is_ordered<decltype(p)>)
      for (int i = 0; i < (kRawGroups - 1) * kStepsAtOnce; i += kStepsAtOnce) load_steps(i);
    for (int i = 0; i < task.chunk_count; ++i, ring.advance()) {
      if (is_ordered<decltype(p)> && i % kStepsAtOnce == 0) load_steps(i + (kRawGroups - 1) * kStepsAtOnce);
      const int stage = ring.stage, token = task.first_token + task.template start_of<kStateOnly>(p, i);
      shared.empty[stage].wait(ring.parity ^ 1);
      Barrier& full = shared.full[stage];
      full.arrive_and_expect_tx(kTileBytes * ((kStateOnly ? 1 : 2) * kTilesOfBC + slices));
#pragma unroll
      for (int k = 0; k < kTilesOfBC; ++k) {
        const int first_state = (task.side * kTilesOfBC + k) * kTile;
        load_tile(p.B, full, shared.B[stage][k], first_state, task.group, token, task.batch);
        if constexpr (!kStateOnly) load_tile(p.C, full, shared.C[stage][k], first_state, task.group, token, task.batch);
      }
      for (int which = 0; which < slices; ++which)
        load_tile(p.x, full, shared.x[stage][which], task.channel_of(p, which), task.head_of(p, which), token, task.batch);
    }
  }
};

template <class Policy, bool kStateOnly>
__device__ void load_chunks(const auto& p, SharedStorage<Policy, kStateOnly>& shared) {
  Loader<SharedStorage<Policy, kStateOnly>> loader{shared};
  for (TasksOfBlock tasks(p, sides_of_task<Policy, kStateOnly>(p)); tasks.next();) {
    const Task task(p, tasks);
    if constexpr (does_walk<decltype(p)>) loader.template load<true>(p, task.before());
    loader.template load<kStateOnly>(p, task);
  }
}

// One thread: z into the tiles of y, and dy with it.
template <class Policy, bool kStateOnly>
__device__ void load_gates(const auto& p, SharedStorage<Policy, kStateOnly>& shared) {
  Ring<Policy::kGated ? 1 : 2> ring[2];  // of each consumer
  for (TasksOfBlock tasks(p, sides_of_task<Policy, kStateOnly>(p)); tasks.next();) {
    const Task task(p, tasks);
    for (int i = 0; i < task.chunk_count; ++i) {
      const int token = task.first_token + task.template start_of<kStateOnly>(p, i);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        if (!task.has_slice(p, which) || !leaves_output<Policy>(task, which)) continue;
        const int slot = ring[which].stage;
        shared.z_empty[which][slot].wait(ring[which].parity ^ 1);
        const int channel = task.channel_of(p, which), head = task.head_of(p, which);
        Barrier& full = shared.z_full[which][slot];
        full.arrive_and_expect_tx((Policy::kGated ? 2 : 1) * kTileBytes);
        load_tile(p.z, full, shared.y[which][slot], channel, head, token, task.batch);
        if constexpr (Policy::kGated) load_tile(p.dy, full, shared.y[which][1], channel, head, token, task.batch);
        ring[which].advance();
      }
    }
  }
}

// One warp per slice: discretises the steps of a group of chunks and sums them up in the order of the scan. Of each block of its
// chunk a lane has one token, as the scan meets them.
template <class Storage>
struct StepsMaker {
  Storage& shared;
  int which;
  Ring<2> ring;
  Ring<kRawGroups> raw_ring;

  // Returns the log decay through the task's chunks, to base 2, where the state alone is wanted.
  template <bool kStateOnly>
  __device__ float make(const auto& p, const Task& task) {
    constexpr float kLog2e = 1.4426950408889634f;
    constexpr bool kByTma = is_ordered<decltype(p)>;
    constexpr int kLanes = 32 / kStepsAtOnce, kBlocks = Steps::kBlocks;
    static_assert(kLanes * kBlocks == kTile);
    const int lane = threadIdx.x % 32, of_chunk = lane / kLanes, of_block = lane % kLanes;
    const auto place_of = [&](int k) { return p.reverse ? kTile - 1 - kLanes * k - of_block : kLanes * k + of_block; };
    const auto give_back_raw = [&] {
      __syncwarp();
      if (lane == 0) shared.raw_empty[raw_ring.stage].arrive();
      raw_ring.advance();
    };
    if (!task.has_slice(p, which)) {
      for (int i = 0; kByTma && i < task.chunk_count; i += kStepsAtOnce) {
        shared.raw_full[raw_ring.stage].wait(raw_ring.parity);
        give_back_raw();
      }
      return 0.0f;
    }
    const int head = task.head_of(p, which);
    const float A = *reinterpret_cast<const float*>(p.A.data + head * p.A.head);
    const float bias = p.dt_bias.data ? *reinterpret_cast<const float*>(p.dt_bias.data + head * p.dt_bias.head) : 0.0f;
    const char* dt = p.dt.data + task.batch * p.dt.batch + head * p.dt.head + std::int64_t{task.first_token} * p.dt.token;
    const int of_row = (head - first_raw_head(p, task)) * (p.dt.dtype == DType::float32 ? 4 : 2);

    // Without TMA the steps of a group are loaded while those of the one before are worked on. The loop begins before the first
    // group, so that the code that loads is there once: a start waits for code as for data.
    std::uint32_t narrow[kBlocks] = {}, wide[kBlocks] = {};  // a second load to one register would wait for the first
    float after = 0.0f;  // log decay from the group's end to the segment's, where the state alone is wanted
    for (int first = kByTma ? 0 : -kStepsAtOnce; first < task.chunk_count; first += kStepsAtOnce) {
      std::uint32_t bits[kBlocks];
      if constexpr (kByTma) {
        shared.raw_full[raw_ring.stage].wait(raw_ring.parity);
        const int tile = kStateOnly ? kStepsAtOnce - 1 - of_chunk : of_chunk;
        const char* rows = shared.raw[raw_ring.stage] + 16 * kTile * tile + of_row;
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) bits[k] = cuda::load_bits(rows + 16 * place_of(k), p.dt.dtype);
      } else {
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) {
          bits[k] = narrow[k] | wide[k];
          const int coming = first + kStepsAtOnce + of_chunk;
          const int token = task.template start_of<kStateOnly>(p, coming) + place_of(k);
          const char* from = dt + token * p.dt.token;
          const bool there = coming < task.chunk_count && token < task.length, is_wide = p.dt.dtype == DType::float32;
          if (there && is_wide) wide[k] = *reinterpret_cast<const std::uint32_t*>(from);
          if (there && !is_wide) narrow[k] = *reinterpret_cast<const std::uint16_t*>(from);
        }
        if (first < 0) continue;
      }

      // Inclusive sums, of each block, then with those before it. Past the end of the sequence steps are 0 and change nothing.
      float rate = A;
      asm volatile("" : "+f"(rate));  // multiplied here: before the loop, the first steps' loads would wait for this one
      rate *= kLog2e;
      float step[kBlocks], log_decay[kBlocks], block_end[kBlocks];
      cuda::widen_bits(bits, p.dt.dtype, step);
#pragma unroll
      for (float& v : step) v += bias;
      if (p.dt_softplus)
#pragma unroll
        for (float& v : step) v = softplus(v);
      const int valid = task.length - task.template start_of<kStateOnly>(p, first + of_chunk);
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
        step[k] = place_of(k) < valid ? clamp(step[k], p.dt_min, p.dt_max) : 0.0f;
        log_decay[k] = step[k] * rate;
      }
      if constexpr (kByTma) give_back_raw();  // what was loaded has been used
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2)
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) {
          const float other = __shfl_up_sync(~0u, log_decay[k], distance, kLanes);
          if (of_block >= distance) log_decay[k] += other;
        }
      float total = 0.0f;
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
        const float of_all = __shfl_sync(~0u, log_decay[k], kLanes - 1, kLanes);
        log_decay[k] += total, total += of_all;
        block_end[k] = total;
      }

      Steps& steps = shared.steps[which][ring.stage][of_chunk];
      shared.steps_empty[which][ring.stage].wait(ring.parity ^ 1);
      if constexpr (kStateOnly) {
        const float end = __shfl_sync(~0u, total, 0) + after, next_end = __shfl_sync(~0u, total, kLanes) + end;
        const float own_end = of_chunk == 0 ? end : next_end;
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) steps.weight[place_of(k)] = step[k] * fast_exp2(own_end - log_decay[k]);
        if (of_block == 0) steps.total = fast_exp2(own_end);
        after = first + 1 < task.chunk_count ? next_end : end;
      } else {
        float block_begin[kBlocks];
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) {
          const int at = place_of(k);
          block_begin[k] = __shfl_sync(~0u, log_decay[k], 0, kLanes);
          steps.token[at] = make_float2(log_decay[k], step[k]);
          steps.weight[at] = step[k] * fast_exp2(block_end[k] - log_decay[k]);
          steps.from_block[at] = fast_exp2(log_decay[k] - block_begin[k]);
          steps.enter[at] = fast_exp2(log_decay[k]);
        }
        // A lane for each two blocks; nothing goes from one to those before it.
        const int to = of_block / kBlocks, from = of_block % kBlocks, column = p.reverse ? kBlocks - 1 - from : from;
        const auto pick = [](const float (&v)[kBlocks], int i) { return i < 2 ? i == 0 ? v[0] : v[1] : i == 2 ? v[2] : v[3]; };
        const float end = pick(block_end, from), decay = fast_exp2(pick(block_begin, to) - end);
        steps.after_block[p.reverse ? kBlocks - 1 - to : to][column] = from < to ? decay : 0.0f;
        if (of_block < kBlocks) steps.after_block[kBlocks][column] = fast_exp2(total - end);
        if (of_block == 0) steps.total = fast_exp2(total);
      }
      shared.steps_full[which][ring.stage].arrive();
      ring.advance();
    }
    return after;
  }
};

template <class Policy, bool kStateOnly>
__device__ void prepare_steps(const auto& p, SharedStorage<Policy, kStateOnly>& shared, int which) {
  constexpr float kLog2e = 1.4426950408889634f;
  StepsMaker<SharedStorage<Policy, kStateOnly>> maker{shared, which};
  for (TasksOfBlock tasks(p, sides_of_task<Policy, kStateOnly>(p)); tasks.next();) {
    const Task task(p, tasks);
    if constexpr (does_walk<decltype(p)>) maker.template make<true>(p, task.before());
    const float log_decay = maker.template make<kStateOnly>(p, task);
    if (kStateOnly && threadIdx.x % 32 == 0 && task.has_slice(p, which) && task.channel_of(p, which) == 0)
      piece_decay(p, task, piece_of(p, task), task.head_of(p, which)) = log_decay / kLog2e;
  }
}

// ---- the warps that compute ----------------------------------------------------------------------------------------------

template <class Policy>
struct Matmuls {
  using Element = cute::conditional_t<Policy::kDType == DType::float16, cutlass::half_t, cutlass::bfloat16_t>;
  static constexpr int kState = Policy::kState, kStages = Policy::kStages;
  static constexpr auto kK = cute::GMMA::Major::K, kMN = cute::GMMA::Major::MN;

  // C B^T and C h^T; scores x; weighted x^T B.
  using Scores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, _64, cute::Int<kState>>, kK, kK>()));
  using Output = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<_64, _64, _64>, kK, kMN>()));
  using Update = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<_64, cute::Int<kState>, _64>, kK, kMN>()));

  // kCount row-major arrays of 64 rows, one after the other in shared memory.
  template <int kColumns, int kCount>
  using Rows = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                            cute::Shape<_64, cute::Int<kColumns>, cute::Int<kCount>>{}));
  // The same memory with the roles of rows and columns exchanged.
  template <int kColumns, int kCount>
  using Columns = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                               cute::Shape<cute::Int<kColumns>, _64, cute::Int<kCount>>{},
                                               cute::Step<cute::_2, cute::_1, cute::_3>{}));

  template <class Layout>
  static __device__ auto tensor(void* tiles, Layout layout) {
    return cute::make_tensor(cute::make_smem_ptr(static_cast<Element*>(tiles)), layout);
  }
};

// acc (+)= a b of the given stages, issued and not waited for.
template <bool kFromZero, class Mma, class A, class B, class Accumulators>
__device__ void issue(Mma& mma, const A& a, const B& b, Accumulators& acc) {
  mma.accumulate_ = kFromZero ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), acc);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

inline __device__ float2 load2(const float* from) { return *reinterpret_cast<const float2*>(from); }
inline __device__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Where a thread's values of a 64-row accumulator lie: value 4 k + 2 r + c is in row `row + 8 r`, column 8 k + `column` + c.
// Tiles are aligned to their swizzle, so that units of a row are an exclusive or away from the first.
struct Fragment {
  int warp, lane, row, column;
  int row_unit;     // bytes to this lane's unit of a warp's 16 rows x 16 columns
  int column_unit;  // the same of the transposed tile: 16 columns x 16 rows

  __device__ explicit Fragment(int thread)
      : warp(thread / 32),
        lane(thread % 32),
        row(16 * warp + lane / 4),
        column(lane % 4 * 2),
        row_unit(unit_offset(16 * warp + lane % 16, lane / 16)),
        column_unit(unit_offset(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)) {}

  // Stores columns 16 j to 16 j + 15 of a warp's rows: a thread's words of them, or its values, rounded.
  __device__ void store(char* tiles, int j, const std::uint32_t* word) const {
    char* at = tiles + j / 4 * kTileBytes + (row_unit ^ j % 4 * 32);
    cute::SM90_U32x4_STSM_N::copy(word[0], word[1], word[2], word[3], *reinterpret_cast<cute::uint128_t*>(at));
  }

  template <class Element, class Values>
  __device__ void store(char* tiles, int j, const Values& values) const {
    std::uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float pair[2] = {values(8 * j + 2 * i), values(8 * j + 2 * i + 1)};
      word[i] = cuda::narrow_word<Element>(pair);
    }
    store(tiles, j, word);
  }

  // The words of columns 16 j to 16 j + 15 of a warp's rows, as a thread's values of an accumulator.
  __device__ void load(const char* tile, int j, std::uint32_t (&word)[4]) const {
    const char* at = tile + (row_unit ^ j * 32);
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(at), word[0], word[1], word[2], word[3]);
  }

  // Calls visit(v, column, pair) for values v and v + 1 of an accumulator, with what the tile holds in their places.
  template <class Element, class Visit>
  __device__ void each_pair(const char* tile, const Visit& visit) const {
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) {
      std::uint32_t word[4];
      load(tile, j, word);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float pair[2];
        cuda::widen_word<Element>(word[w], pair);
        visit(8 * j + 2 * w, 16 * j + w / 2 * 8 + column, pair);
      }
    }
  }

  // Rows 16 k to 16 k + 15 of columns 16 j to 16 j + 15, as the B of one warp's products: words 0 and 1, and 2 and 3.
  __device__ void load_columns(const char* tile, int k, int j, std::uint32_t (&word)[4]) const {
    const char* from = tile + unit_offset(16 * k + lane % 16, 2 * j + lane / 16);
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(from), word[0], word[1], word[2], word[3]);
  }

  // The same of the transposed tile: rows 16 j to 16 j + 15 of it are the columns.
  __device__ void load_transposed(const char* tile, int j, std::uint32_t* word) const {
    const char* at = tile + column_unit + j * 16 * 128;
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(at), word[0], word[1], word[2], word[3]);
  }
};

// sum += A B by one warp: [16,16] by [16,8], laid out as in a warpgroup's matmuls.
template <class Element>
__device__ void multiply_add(float* sum, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1) {
  using Mma = std::conditional_t<std::is_same_v<Element, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                 cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  Mma::fma(sum[0], sum[1], sum[2], sum[3], a[0], a[1], a[2], a[3], b0, b1, sum[0], sum[1], sum[2], sum[3]);
}

// What a thread needs of a chunk's steps for its rows and columns.
struct Decays {
  float enter[2], from_block[2];
  float2 own_block[4];       // of each word of the block on the diagonal: dt_j exp(a_i - a_j)
  float2 weight[kTile / 8];  // of the columns: dt_j, decayed to the end of j's block
  float to_rows[Steps::kBlocks], to_end[Steps::kBlocks];  // decay from a block's end to the rows' block, to the chunk's end

  __device__ void load(const Steps& steps, const Fragment& at) {
#pragma unroll
    for (int k = 0; k < kTile / 8; ++k) weight[k] = load2(steps.weight + 8 * k + at.column);
    const float4 ends = load4(steps.after_block[Steps::kBlocks]), rows = load4(steps.after_block[at.warp]);
    to_end[0] = ends.x, to_end[1] = ends.y, to_end[2] = ends.z, to_end[3] = ends.w;
    to_rows[0] = rows.x, to_rows[1] = rows.y, to_rows[2] = rows.z, to_rows[3] = rows.w;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      enter[r] = steps.enter[at.row + 8 * r];
      from_block[r] = steps.from_block[at.row + 8 * r];
      const float log_i = steps.token[at.row + 8 * r].x;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 two = load4(&steps.token[16 * at.warp + 8 * h + at.column].x);
        own_block[2 * h + r] = make_float2(two.y * fast_exp2(log_i - two.x), two.w * fast_exp2(log_i - two.z));
      }
    }
  }
};

// x^T of a chunk, as a thread's values of an accumulator.
template <class Element>
struct TransposedTile {
  std::uint32_t word[kTile / 4];

  __device__ void load(const char* tile, const Fragment& at) {
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) at.load_transposed(tile, j, word + 4 * j);
  }

  // The k-th word of the matrix operand, with the weights of its two tokens.
  __device__ std::uint32_t weighted(int k, float2 weight) const {
    float pair[2];
    cuda::widen_word<Element>(word[k], pair);
    pair[0] *= weight.x, pair[1] *= weight.y;
    return cuda::narrow_word<Element>(pair);
  }
};

// The matrix operand of a state after the first tokens of a chunk, up to token `last`. Later ones weigh nothing.
template <class Element>
__device__ void weigh_first(std::uint32_t (&words)[kTile / 4], const char* tile, const Steps& steps, const Fragment& at,
                            bool reverse, int last) {
  const float log_last = steps.token[last].x;
#pragma unroll
  for (int j = 0; j < kTile / 16; ++j) {
    std::uint32_t word[4];
    at.load_transposed(tile, j, word);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int token = 16 * j + w / 2 * 8 + at.column;
      const float4 two = load4(&steps.token[token].x);
      float pair[2];
      cuda::widen_word<Element>(word[w], pair);
      pair[0] = (reverse ? token >= last : token <= last) ? pair[0] * (two.y * fast_exp2(log_last - two.x)) : 0.0f;
      pair[1] = (reverse ? token + 1 >= last : token + 1 <= last) ? pair[1] * (two.w * fast_exp2(log_last - two.z)) : 0.0f;
      words[4 * j + w] = cuda::narrow_word<Element>(pair);
    }
  }
}

// Which of a word's two columns the scan reaches from its row, in the 16 x 16 block on the diagonal.
inline __device__ std::uint32_t diagonal_mask(const Fragment& at, bool reverse, int word) {
  const int row = at.lane / 4 + word % 2 * 8, column = at.column + word / 2 * 8;
  std::uint32_t mask = 0;
#pragma unroll
  for (int c = 0; c < 2; ++c)
    if (reverse ? column + c >= row : column + c <= row) mask |= 0xffffu << 16 * c;
  return mask;
}

// Zeros from row `first` on: what a box holds past the end of its sequence. Rare: code that others would have to jump over.
inline __device__ void clear_rows(char* tile, int first, int thread) {
#pragma unroll 1
  for (int i = first * 8 + thread; i < kTile * 8; i += kWarpgroup) reinterpret_cast<uint4*>(tile)[i] = uint4{};
}

// A box that reaches past the end of a packed sequence holds tokens of the next. Their weight is 0, but 0 times NaN is not.
// Both consumers clear B: each must have it before it goes on.
template <class Policy, bool kStateOnly>
__device__ void clear_foreign_rows(SharedStorage<Policy, kStateOnly>& shared, int stage, int which, int valid, int thread) {
  clear_rows(shared.x[stage][which], valid, thread);
#pragma unroll 1
  for (int k = 0; k < Policy::kState / kTile; ++k) clear_rows(shared.B[stage][k], valid, thread);
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + which);
}

// A consumer without a slice leaves the ring to the other.
template <class Policy, bool kStateOnly>
__device__ void keep_up(SharedStorage<Policy, kStateOnly>& shared, Ring<stages_of<Policy, kStateOnly>>& ring, int chunks) {
  for (int i = 0; i < chunks; ++i, ring.advance()) {
    shared.full[ring.stage].wait(ring.parity);
    shared.empty[ring.stage].arrive();
  }
}

// A tile as halves. Rows that are too large or too small for them get exponents, which go to memory for the valid ones: `step`
// bytes from one to the next.
template <class Values>
__device__ void store_scaled(char* tile, const Values& values, const Fragment& at, std::uint8_t* exponents, int step,
                             int valid) {
  const auto store = [&](float first, float second, auto visit) {  // two rows, each times a factor
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) {
      std::uint32_t word[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float factor = w % 2 ? second : first;
        const float pair[2] = {factor * values(8 * j + 2 * w), factor * values(8 * j + 2 * w + 1)};
        word[w] = cuda::narrow_word<__half>(pair);
        visit(w % 2, word[w]);
      }
      at.store(tile, j, word);
    }
  };
  std::uint32_t halves[2] = {};
  store(1.0f, 1.0f, [&](int r, std::uint32_t word) { halves[r] = cuda::larger_halves(halves[r], word); });
  // Of rows whose lanes lie side by side.
  const std::uint32_t misfits[2] = {__ballot_sync(0xffffffffu, !cuda::fit_halves(halves[0])),
                                    __ballot_sync(0xffffffffu, !cuda::fit_halves(halves[1]))};
  if ((misfits[0] | misfits[1]) == 0) return;

  float largest[2] = {};
#pragma unroll
  for (int v = 0; v < kTile / 2; ++v) largest[v / 2 % 2] = cuda::larger_magnitude(largest[v / 2 % 2], values(v));
  std::uint32_t both = cuda::exponent_of(largest[0]) | cuda::exponent_of(largest[1]) << 16;
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) both = __vmaxu2(both, __shfl_xor_sync(0xffffffffu, both, lanes));
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool fits = (misfits[r] >> (at.lane & ~3) & 0xf) == 0;  // whatever the other rows hold
    const std::uint32_t exponent = fits ? cuda::kNoScale : cuda::shared_exponent(r == 0 ? both & 0xffff : both >> 16);
    factor[r] = cuda::scale_down(exponent);
    if (at.column == 0 && at.row + 8 * r < valid)
      exponents[static_cast<std::int64_t>(at.row + 8 * r) * step] = cuda::stored_exponent(exponent);
  }
  store(factor[0], factor[1], [](int, std::uint32_t) {});
}

// A slice's part of a state in memory, and what of it is a thread's: pairs of the values of a [channel, state] accumulator.
template <int kState>
struct SliceOfState {
  const StateView& view;
  char* first;
  int rows, columns;  // that exist from the thread's first row and column on

  template <class Params>
  __device__ SliceOfState(const Params& p, const StateView& t, std::int64_t sequence, int head, int channel, const Fragment& at,
                          std::int64_t offset = 0, int first_state = 0)
      : view(t),
        first(t.data + offset + sequence * t.sequence + head * t.head + (channel + at.row) * t.row +
              (first_state + at.column) * t.column),
        rows(p.headdim - channel - at.row),
        columns(p.dstate - first_state - at.column) {}

  __device__ char* pair(int k) const { return first + k % 2 * 8 * view.row + k / 2 * 8 * view.column; }
  __device__ int left(int k) const { return k % 2 * 8 < rows ? columns - k / 2 * 8 : 0; }

  // state += decay this
  template <bool kPairs, class State>
  __device__ void add_to(State& state, float decay) const {
#pragma unroll
    for (int k = 0; k < kState / 4; ++k) {
      const float2 v = load_pair<kPairs>(pair(k), view, left(k));
      state(2 * k) = fmaf(decay, v.x, state(2 * k));
      state(2 * k + 1) = fmaf(decay, v.y, state(2 * k + 1));
    }
  }

  template <bool kPairs, class State>
  __device__ void store(const State& state) const {
#pragma unroll
    for (int k = 0; k < kState / 4; ++k)
      store_pair<kPairs>(pair(k), view, left(k), make_float2(state(2 * k), state(2 * k + 1)));
  }

  // To float32 in pairs, or to 16 bits of Element in words.
  template <class Element>
  __device__ void leave_pair(int k, float v0, float v1) const {
    const float values[2] = {v0, v1};
    if (left(k) <= 0) return;
    if (view.words) *reinterpret_cast<std::uint32_t*>(pair(k)) = cuda::narrow_word<Element>(values);
    else *reinterpret_cast<float2*>(pair(k)) = make_float2(v0, v1);
  }

  template <class Element, class State>
  __device__ void leave(const State& state) const {
#pragma unroll
    for (int k = 0; k < kState / 4; ++k) leave_pair<Element>(k, state(2 * k), state(2 * k + 1));
  }
};

// The caller's states may lie anyhow.
template <int kState, class State>
__device__ void add_state(State& state, const SliceOfState<kState>& slice, float decay) {
  if (slice.view.pairs) slice.template add_to<true>(state, decay);
  else slice.template add_to<false>(state, decay);
}

template <int kState, class State>
__device__ void store_state(const State& state, const SliceOfState<kState>& slice) {
  if (slice.view.pairs) slice.template store<true>(state);
  else slice.template store<false>(state);
}

// A slice's state as the kernels hand it on among themselves: each value stays with its thread.
template <int kValues, class State>
__device__ void store_values(float4* to, const State& state) {
#pragma unroll
  for (int k = 0; k < kValues / 4; ++k)
    to[k * kWarpgroup] = make_float4(state(4 * k), state(4 * k + 1), state(4 * k + 2), state(4 * k + 3));
}

// state = decay state + that
template <int kValues, class State>
__device__ void add_values(State& state, const float4* from, float decay) {
#pragma unroll
  for (int k = 0; k < kValues / 4; ++k) {
    const float4 v = __ldcg(from + k * kWarpgroup);
    state(4 * k) = fmaf(decay, state(4 * k), v.x);
    state(4 * k + 1) = fmaf(decay, state(4 * k + 1), v.y);
    state(4 * k + 2) = fmaf(decay, state(4 * k + 2), v.z);
    state(4 * k + 3) = fmaf(decay, state(4 * k + 3), v.w);
  }
}

// The state of a slice from one part of a task to the next, in another block.
inline __device__ float4* part_state(const FusedParams& p, const TasksOfBlock& tasks, int which, int values, int thread) {
  return reinterpret_cast<float4*>(p.part_states) + tasks.slice_left(which) * (values / 4) * kWarpgroup + thread;
}

template <int kValues, class State>
__device__ void hand_over_state(const State& state, const FusedParams& p, const TasksOfBlock& tasks, int which, int thread) {
  store_values<kValues>(part_state(p, tasks, which, kValues, thread), state);
  __threadfence();
  cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + which);
  if (thread == 0)
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(p.parts_done + tasks.slice_left(which)), "r"(tasks.part() + 1)
                 : "memory");
}

template <int kValues, class State>
__device__ void receive_state(State& state, const FusedParams& p, const TasksOfBlock& tasks, int which, int thread) {
  if (thread == 0) {
    unsigned done;
    do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(done) : "l"(p.parts_done + tasks.slice_left(which)) : "memory");
    while (static_cast<int>(done) < tasks.part());
  }
  cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + which);
  const float4* from = part_state(p, tasks, which, kValues, thread);
#pragma unroll
  for (int k = 0; k < kValues / 4; ++k) {
    const float4 v = __ldcg(from + k * kWarpgroup);
    state(4 * k) = v.x, state(4 * k + 1) = v.y, state(4 * k + 2) = v.z, state(4 * k + 3) = v.w;
  }
}

// To the same thread of the other block of a cluster, whose barrier counts the bytes.
template <int kValues, class Values>
__device__ void send_values(const Values& values, const float4* place, const Barrier& full, int block) {
  const std::uint32_t to = cute::set_block_rank(cute::cast_smem_ptr_to_uint(place), block);
  const std::uint32_t barrier = cute::set_block_rank(cute::cast_smem_ptr_to_uint(&full), block);
#pragma unroll
  for (int k = 0; k < kValues / 4; ++k)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     to + 16 * k * kWarpgroup),
                 "f"(values(4 * k)), "f"(values(4 * k + 1)), "f"(values(4 * k + 2)), "f"(values(4 * k + 3)), "r"(barrier)
                 : "memory");
}

// The steps of a consumer's chunks, as they come.
template <class Storage>
class StepsOfConsumer {
 public:
  __device__ StepsOfConsumer(Storage& shared, int which) : shared_(shared), which_(which) {}

  // Those of a task's i-th chunk, once they are there.
  __device__ const Steps& await(int i) {
    if (i % kStepsAtOnce == 0) shared_.steps_full[which_][ring_.stage].wait(ring_.parity);
    return of(i);
  }
  // The same, of a chunk that was waited for.
  __device__ const Steps& of(int i) const { return shared_.steps[which_][ring_.stage][i % kStepsAtOnce]; }

  // All that the thread wanted of them has come.
  __device__ void release(int i, int chunk_count) {
    if (i % kStepsAtOnce + 1 < kStepsAtOnce && i + 1 < chunk_count) return;
    shared_.steps_empty[which_][ring_.stage].arrive();
    ring_.advance();
  }

 private:
  Storage& shared_;
  int which_;
  Ring<2> ring_;
};

// What the chunks of a task add to the state of a slice, and their decay. They come against the order of the scan, so that each
// token's weight reaches to the last one's end and the sums need no decay in between: nothing waits for a matmul but its own
// registers.
template <class Policy, class Storage, class Columns, class State>
__device__ float add_up_chunks(const auto& p, Storage& shared, const Task& task, int which, const Fragment& at,
                               Ring<Storage::kStages>& ring, StepsOfConsumer<Storage>& groups, const Columns& B_columns,
                               State& state) {
  using M = Matmuls<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  typename M::Update update_mma;
  auto weighted = cute::make_tensor<typename M::Element>(cute::partition_shape_A(update_mma, cute::Shape<_64, _64>{}));
  auto weighted_words = cute::recast<std::uint32_t>(weighted);
  constexpr auto _ = cute::_;
  float decay = 1.0f;
#pragma unroll
  for (int v = 0; v < Policy::kState / 2; ++v) state(v) = 0.0f;
  for (int i = 0; i < task.chunk_count; ++i) {
    const int stage = ring.stage;
    const int valid = min(task.length - task.template start_of<true>(p, i), kTile);
    const Steps& steps = groups.await(i);
    shared.full[stage].wait(ring.parity);
    if (p.cu_seqlens && valid < kTile) clear_foreign_rows<Policy>(shared, stage, which, valid, threadIdx.x % kWarpgroup);
    // For the chunk before: its operands are free. Before anything is loaded, since ptxas gives the registers of an operand
    // to what comes after its matmul, waited for or not.
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(state);
    if (i > 0) shared.empty[stage == 0 ? Storage::kStages - 1 : stage - 1].arrive();
    TransposedTile<NativeElement> x;
    x.load(shared.x[stage][which], at);
    float2 weight[kTile / 8];
#pragma unroll
    for (int k = 0; k < kTile / 8; ++k) weight[k] = load2(steps.weight + 8 * k + at.column);
    decay = steps.total;
#pragma unroll
    for (int k = 0; k < kTile / 4; ++k) weighted_words(k) = x.weighted(k, weight[k / 2]);
    cute::warpgroup_fence_operand(weighted);
    cute::warpgroup_fence_operand(state);
    cute::warpgroup_arrive();
    issue<false>(update_mma, weighted, B_columns(_, _, _, stage), state);
    groups.release(i, task.chunk_count);
    ring.advance();
  }
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(state);
  if (task.chunk_count > 0) shared.empty[ring.stage == 0 ? Storage::kStages - 1 : ring.stage - 1].arrive();
  return decay;
}

// The state pass: what each segment adds to the state of a slice.
template <class Policy>
__device__ void add_up_segments(const auto& p, SharedStorage<Policy, true>& shared, int which) {
  using M = Matmuls<Policy>;
  constexpr int kState = Policy::kState, kStages = stages_of<Policy, true>, kStateValues = kState / 2;
  const int thread = threadIdx.x % kWarpgroup;
  const Fragment at(thread);
  typename M::Update update_mma;
  auto state = cute::partition_fragment_C(update_mma, cute::Shape<_64, cute::Int<kState>>{});
  const auto B_columns = update_mma.get_thread_slice(thread).partition_fragment_B(
      M::tensor(shared.B, typename M::template Columns<kState, kStages>{}));
  Ring<kStages> ring;
  StepsOfConsumer groups(shared, which);
  for (TasksOfBlock tasks(p, sides_of_task<Policy, true>(p)); tasks.next();) {
    const Task task(p, tasks);
    if (!task.has_slice(p, which)) {
      keep_up(shared, ring, task.chunk_count);
      continue;
    }
    add_up_chunks<Policy>(p, shared, task, which, at, ring, groups, B_columns, state);
    store_values<kStateValues>(piece_state(p, task, piece_of(p, task), which, kStateValues, thread), state);
  }
}

// What the output kernel leaves beside y. Each has a kernel of its own: the loop has no registers for more, and a mere branch
// to what a call does not want made it 6% slower.
enum class Extra {
  nothing,
  kept_states,  // the state that enters each stretch
  positions,    // the states there
  scaled_y,     // beside y as halves, the exponents that some of them share
};

// The output of a slice, chunk by chunk.
template <class Policy, Extra kExtra>
__device__ void compute_output(const auto& p, SharedStorage<Policy, false>& shared, int which) {
  using M = Matmuls<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kState = Policy::kState, kStages = Policy::kStages, kStateValues = kState / 2;
  constexpr bool kPositions = kExtra == Extra::positions, kKeepsDiagonal = Policy::kKeepsDiagonal;
  const int thread = threadIdx.x % kWarpgroup;
  const Fragment at(thread);
  auto sync = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + which); };

  typename M::Scores scores_mma;
  typename M::Output output_mma;
  typename M::Update update_mma;
  const auto scores_of = scores_mma.get_thread_slice(thread);
  const auto output_of = output_mma.get_thread_slice(thread);
  const auto update_of = update_mma.get_thread_slice(thread);
  auto scores = cute::partition_fragment_C(scores_mma, cute::Shape<_64, _64>{});               // (tokens i, tokens j)
  auto y = cute::partition_fragment_C(scores_mma, cute::Shape<_64, _64>{});                    // (tokens, channels)
  auto state = cute::partition_fragment_C(update_mma, cute::Shape<_64, cute::Int<kState>>{});  // (channels, states)
  auto weighted = cute::make_tensor<typename M::Element>(cute::partition_shape_A(update_mma, cute::Shape<_64, _64>{}));
  auto masked = cute::make_tensor<typename M::Element>(cute::partition_shape_A(output_mma, cute::Shape<_64, _64>{}));
  auto weighted_words = cute::recast<std::uint32_t>(weighted);
  auto masked_words = cute::recast<std::uint32_t>(masked);
  // Descriptors of the operands in shared memory, for every stage.
  const auto B_rows = scores_of.partition_fragment_B(M::tensor(shared.B, typename M::template Rows<kState, kStages>{}));
  const auto C_rows = scores_of.partition_fragment_A(M::tensor(shared.C, typename M::template Rows<kState, kStages>{}));
  const auto state_rows = scores_of.partition_fragment_B(M::tensor(shared.state, typename M::template Rows<kState, 2>{}));
  const auto B_columns = update_of.partition_fragment_B(M::tensor(shared.B, typename M::template Columns<kState, kStages>{}));
  const auto x_columns =
      output_of.partition_fragment_B(M::tensor(shared.x, typename M::template Columns<kTile, 2 * kStages>{}));
  constexpr auto _ = cute::_;

  std::uint32_t diagonal[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    diagonal[w] = diagonal_mask(at, p.reverse, w);
    asm volatile("" : "+r"(diagonal[w]));  // kept, not worked out again in every chunk
  }

  Ring<kStages> ring;
  StepsOfConsumer groups(shared, which);
  Ring<Policy::kGated ? 1 : 2> slots;
  Ring<1> sums;         // that one block of a cluster hands to the other
  bool stored = false;  // a chunk before this one, in the other slot
  if constexpr (does_walk<decltype(p)>) {  // of its one task; ahead of the loop, whose registers it leaves alone
    TasksOfBlock tasks(p, Policy::kSides);
    tasks.next();
    const Task task(p, tasks);
    if (task.has_slice(p, which)) {
      const float decay = add_up_chunks<Policy>(p, shared, task.before(), which, at, ring, groups, B_columns, state);
      if (p.initial_state.data)
        add_state(state,
                  SliceOfState<kState>(p, p.initial_state, task.sequence, task.head_of(p, which), task.channel_of(p, which), at,
                                       0, task.side * kState),
                  decay);
    } else {
      keep_up(shared, ring, task.chunk_begin);
    }
  }
  for (TasksOfBlock tasks(p, Policy::kSides); tasks.next();) {
    const Task task(p, tasks);
    if (!task.has_slice(p, which)) {
      keep_up(shared, ring, task.chunk_count);
      continue;
    }
    const int head = task.head_of(p, which), channel = task.channel_of(p, which), first_state = task.side * kState;
    const bool leaves_y = leaves_output<Policy>(task, which);

    // ---- start
    // Combined pieces are the states before them; else what each before this task adds, with its decay. Piece 0 stands for all
    // that came before where first chunks went ahead.
    const bool all_before = p.pieces_combined || p.first_chunk > 0;
    const int of_segments = task.segment < 0 ? 0 : task.segment * p.pieces_per_segment + (p.short_chunks > 0);
    const int pieces_end = p.piece_states && !p.beside ? of_segments + all_before : 0;
    if (pieces_end > 0) cuda::wait_for_earlier_kernels();
    if constexpr (!does_walk<decltype(p)>) {
#pragma unroll
      for (int v = 0; v < kStateValues; ++v) state(v) = 0.0f;
      if (tasks.part() > 0) {
        receive_state<kStateValues>(state, p, tasks, which, thread);
      } else if (p.initial_state.data && !all_before) {
        add_state(state, SliceOfState<kState>(p, p.initial_state, task.sequence, head, channel, at, 0, first_state), 1.0f);
      }
    }
    for (int piece = p.pieces_combined ? pieces_end - 1 : 0; piece < pieces_end; ++piece) {
      const float decay = p.pieces_combined || (all_before && piece == 0) ? 0.0f : expf(piece_decay(p, task, piece, head));
      add_values<kStateValues>(state, piece_state(p, task, piece, which, kStateValues, thread), decay);
    }
    if ((p.D.data || kKeepsDiagonal) && thread < kTile)
      shared.D[which][thread] =
          p.D.data && leaves_y && channel + thread < p.headdim
              ? *reinterpret_cast<const float*>(p.D.data + head * p.D.head + (channel + thread) * p.D.column)
              : 0.0f;
#pragma unroll
    for (int j = 0; j < kState / 16; ++j) at.store<NativeElement>(shared.state[which][0], j, state);
    cutlass::arch::fence_view_async_shared();
    sync();
    // One thread: what the state is as a matrix operand goes out where a stretch begins with the i-th chunk. Where to lies in
    // shared memory, and takes no registers from the loop.
    volatile int (&next_kept)[4] = shared.next_kept[which];
    const auto keep_state = [&](int i) {
      if (!task.begins_stretch(i) || i == task.chunk_count) return;
      const int to_state = next_kept[0], to_head = next_kept[1], to_channel = next_kept[2], stretch = next_kept[3];
#pragma unroll
      for (int k = 0; k < kState / kTile; ++k)
        cute::SM90_TMA_STORE_4D::copy(&p.chunk_states, shared.state[which][k], to_state + k * kTile, to_head, to_channel,
                                      stretch);
      next_kept[3] = stretch + 1;
    };
    if (kExtra == Extra::kept_states && thread == 0) {
      next_kept[0] = first_state, next_kept[1] = head, next_kept[2] = channel, next_kept[3] = task.first_stretch(p);
      keep_state(0);
      cute::tma_store_arrive();
    }

    auto valid_tokens = [&](int i) { return min(task.length - task.template start_of<false>(p, i), kTile); };
    // The walk halts before each chunk that a position lies in: the loop has no registers to spare for what is done there.
    int walk_end = task.chunk_count;
    // Waits for the i-th chunk; its decay. Past the last one there is nothing to wait for.
    auto await_chunk = [&](int i) {
      if (i >= walk_end) return 1.0f;
      const int stage = ring.stage, valid = valid_tokens(i);
      const float total = groups.await(i).total;
      shared.full[stage].wait(ring.parity);
      if (p.cu_seqlens && valid < kTile) clear_foreign_rows<Policy>(shared, stage, which, valid, thread);
      return total;
    };
    // Takes the chunk in: the state is decayed to its end, and the scores are on their way. After the last chunk these are of no
    // use: behind a condition, ptxas would let no matmul overlap with anything.
    auto enter_chunk = [&](float total) {
      const int stage = ring.stage;
      // Here, since a use of accumulators between matmuls in flight makes ptxas wait for all of them.
#pragma unroll
      for (int v = 0; v < kStateValues; ++v) state(v) *= total;
      cute::warpgroup_fence_operand(scores);
      cute::warpgroup_arrive();
      issue<true>(scores_mma, C_rows(_, _, _, stage), B_rows(_, _, _, stage), scores);
    };
    // What comes of steps and x. For positions x comes later, so that the loop spills nothing.
    Decays decays;
    TransposedTile<NativeElement> x;
    auto load_chunk = [&](int i) {
      if (i >= walk_end) return;
      if constexpr (!kPositions) x.load(shared.x[ring.stage][which], at);
      decays.load(groups.of(i), at);
    };

    const auto entry_at = [&](std::int64_t entry) {
      int row = channel;
      asm volatile("" : "+r"(row));  // addresses are worked out here, and take no registers from the loop
      return SliceOfState<kState>(p, p.positions.entries, task.sequence, head, row, at, entry);
    };
    [[maybe_unused]] int next_position = 0;  // of those inside of the task's chunks
    if constexpr (kPositions) next_position = PositionsOfSequence(p.positions, task.sequence).next(task.tokens_before(p, 0));
    // States at the positions inside of the i-th chunk, which has come and which the state enters: by warps of their own, 16
    // columns at a time, since a warpgroup's matmul would want a place for all of them.
    [[maybe_unused]] const auto leave_states = [&](int i) {
      const Steps& steps = groups.of(i);
      const std::int64_t begin = task.tokens_before(p, i), end = task.tokens_before(p, i + 1);
      if (next_position >= end) return;
      const auto inside = [&](std::int64_t position) { return position >= begin && position < end; };
      PositionsOfSequence(p.positions, task.sequence).take_if(inside, [&](std::int64_t position, std::int64_t entry) {
        const auto slice = entry_at(entry);
        if (position == begin) {
          slice.template leave<NativeElement>(state);
          return;
        }
        const int count = static_cast<int>(position - begin), last = p.reverse ? valid_tokens(i) - count : count - 1;
        const float decay = steps.enter[last];
        std::uint32_t first_tokens[kTile / 4];
        weigh_first<NativeElement>(first_tokens, shared.x[ring.stage][which], steps, at, p.reverse, last);
#pragma unroll
        for (int j = 0; j < kState / 16; ++j) {
          float sum[8] = {};
#pragma unroll
          for (int k = 0; k < kTile / 16; ++k) {
            std::uint32_t B[4];
            at.load_columns(shared.B[ring.stage][j / 4], k, j % 4, B);
            multiply_add<NativeElement>(sum, first_tokens + 4 * k, B[0], B[1]);
            multiply_add<NativeElement>(sum + 4, first_tokens + 4 * k, B[2], B[3]);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k)
            slice.template leave_pair<NativeElement>(4 * j + k, fmaf(decay, state(8 * j + 2 * k), sum[2 * k]),
                                                     fmaf(decay, state(8 * j + 2 * k + 1), sum[2 * k + 1]));
        }
      });
      next_position = PositionsOfSequence(p.positions, task.sequence).next(end);
    };

    int i = 0;
    do {
      walk_end = task.chunk_count;
      const float first_total = await_chunk(i);
      if (kPositions && i < task.chunk_count) {
        leave_states(i);
        walk_end = min(walk_end, max(task.chunk_of(p, next_position), i + 1));
      }
      enter_chunk(first_total);
      load_chunk(i);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(scores);
      for (; i < walk_end; ++i) {
        const int stage = ring.stage;
        const char* tile_x = shared.x[stage][which];
        cute::warpgroup_fence_operand(y);
        cute::warpgroup_arrive();
        issue<true>(scores_mma, C_rows(_, _, _, stage), state_rows(_, _, _, which), y);

        // x^T with the weights of its tokens, as a matrix operand, while these run.
        if constexpr (kPositions) x.load(tile_x, at);
#pragma unroll
        for (int k = 0; k < kTile / 4; ++k) {
          const float2 weight = decays.weight[k / 2];
          const float to_end = decays.to_end[k / 4];
          weighted_words(k) = x.weighted(k, make_float2(weight.x * to_end, weight.y * to_end));
        }
        cute::warpgroup_fence_operand(state);
        cute::warpgroup_fence_operand(weighted);
        cute::warpgroup_arrive();
        issue<false>(update_mma, weighted, B_columns(_, _, _, stage), state);
        if (Policy::kGated && thread == 0 && leaves_y && stored) {  // dz before this one makes room
          cute::tma_store_wait<0>();
          shared.z_empty[which][0].arrive();
        }

        // Scores, decayed and masked, become a matrix operand.
        [[maybe_unused]] float lost[2] = {};  // what rounding takes from a row's score on the diagonal
#pragma unroll
        for (int j = 0; j < kTile / 16; ++j) {
          const int later = p.reverse ? at.warp - j : j - at.warp;  // blocks of 16 x 16: 0 holds the diagonal, above it nothing
          if (later > 0) {
#pragma unroll
            for (int w = 0; w < 4; ++w) masked_words(4 * j + w) = 0;
          } else if (later == 0) {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const float pair[2] = {scores(8 * j + 2 * w) * decays.own_block[w].x,
                                     scores(8 * j + 2 * w + 1) * decays.own_block[w].y};
              masked_words(4 * j + w) = cuda::narrow_word<NativeElement>(pair) & diagonal[w];
              if (kKeepsDiagonal && w % 3 == 0) {
                float rounded[2];
                cuda::widen_word<NativeElement>(masked_words(4 * j + w), rounded);
                lost[w / 3] = at.lane / 4 % 2 ? pair[1] - rounded[1] : pair[0] - rounded[0];
              }
            }
          } else {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const float2 weight = decays.weight[2 * j + w / 2];
              const float to_row = decays.to_rows[j] * decays.from_block[w % 2];
              const float pair[2] = {scores(8 * j + 2 * w) * to_row * weight.x,
                                     scores(8 * j + 2 * w + 1) * to_row * weight.y};
              masked_words(4 * j + w) = cuda::narrow_word<NativeElement>(pair);
            }
          }
        }
        if constexpr (kKeepsDiagonal)  // of a row's four lanes one has it
          for (float& v : lost) v = __shfl_sync(~0u, v, at.lane / 4 * 4 + at.lane / 8);
        cute::warpgroup_wait<1>();
        cute::warpgroup_fence_operand(y);
#pragma unroll
        for (int v = 0; v < kTile / 2; ++v) y(v) *= decays.enter[v / 2 % 2];
        cute::warpgroup_fence_operand(y);
        cute::warpgroup_fence_operand(masked);
        cute::warpgroup_arrive();
        issue<false>(output_mma, masked, x_columns(_, _, _, 2 * stage + which), y);

        // The new state goes out once all warps are done with the old one.
        const int token = task.first_token + task.template start_of<false>(p, i);
        const int valid = valid_tokens(i);
        ring.advance();
        cute::warpgroup_wait<1>();
        cute::warpgroup_fence_operand(state);
        groups.release(i, task.chunk_count);
        const float total = await_chunk(i + 1);
        if (kExtra == Extra::kept_states && thread == 0 && task.begins_stretch(i))
          cute::tma_store_wait<0>();  // the old one has gone out; the latest y as well, for which no other chunk waits
        load_chunk(i + 1);
        sync();
#pragma unroll
        for (int j = 0; j < kState / 16; ++j) at.store<NativeElement>(shared.state[which][0], j, state);

        // The next chunk's scores run beside the end of this one.
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(y);
        const bool adds_x = p.D.data || kKeepsDiagonal;
        if (!adds_x) shared.empty[stage].arrive();  // matmuls alone took from the stage, and have ended
        enter_chunk(total);
        if (adds_x) {
          at.template each_pair<NativeElement>(tile_x, [&](int v, int column, const float* x_pair) {
            float2 D = load2(shared.D[which] + column);
            if constexpr (kKeepsDiagonal) D.x += lost[v / 2 % 2], D.y += lost[v / 2 % 2];
            y(v) += D.x * x_pair[0], y(v + 1) += D.y * x_pair[1];
          });
        }
        char* tile_y = shared.y[which][slots.stage];
        // What another block adds comes to where the other consumer, which hands its own values over, would have y.
        if constexpr (Policy::kSides > 1) {
          const float4* place = reinterpret_cast<const float4*>(shared.y[which ^ 1]) + thread;
          if (leaves_y) {
            if (thread == 0) shared.sums_full.arrive_and_expect_tx(2 * kTileBytes);
            shared.sums_full.wait(sums.parity);
#pragma unroll
            for (int k = 0; k < kTile / 8; ++k) {
              const float4 v = place[k * kWarpgroup];
              y(4 * k) += v.x, y(4 * k + 1) += v.y, y(4 * k + 2) += v.z, y(4 * k + 3) += v.w;
            }
          } else {
            shared.sums_empty.wait(sums.parity ^ 1);
            send_values<kTile / 2>(y, place, shared.sums_full, which);
          }
          sums.advance();
        }
        if constexpr (Policy::kGated) {
          if (leaves_y) {
            shared.z_full[which][0].wait(slots.parity);
            at.template each_pair<NativeElement>(tile_y, [&](int v, int, const float* z) {
              y(v) *= cuda::fast_dsilu(z[0]), y(v + 1) *= cuda::fast_dsilu(z[1]);
            });
            at.template each_pair<NativeElement>(shared.y[which][1],
                                                 [&](int v, int, const float* dy) { y(v) *= dy[0], y(v + 1) *= dy[1]; });
          }
        } else if (leaves_y && p.has_z) {
          shared.z_full[which][slots.stage].wait(slots.parity);
          at.template each_pair<NativeElement>(
              tile_y, [&](int v, int, const float* z) { y(v) *= cuda::fast_silu(z[0]), y(v + 1) *= cuda::fast_silu(z[1]); });
        }
        if constexpr (kExtra == Extra::scaled_y) {
          int slice = head * static_cast<int>(p.slices.value) + channel / kTile;
          asm volatile("" : "+r"(slice));  // addresses are worked out here, and take no registers from the loop
          const int step = p.nheads * static_cast<int>(p.slices.value);
          const std::int64_t first = (static_cast<std::int64_t>(task.batch) * p.seqlen + token) * step;
          store_scaled(tile_y, y, at, p.y_exponents + first + slice, step, valid);
        } else if (leaves_y) {
#pragma unroll
          for (int j = 0; j < kTile / 16; ++j) at.store<NativeElement>(tile_y, j, y);
        }
        // Not as soon as x was asked for: an arrival overtakes loads, which may wait behind the stores of a whole state by the
        // other consumer. What has gone into y has come.
        if (adds_x) shared.empty[stage].arrive();
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(scores);
        cutlass::arch::fence_view_async_shared();
        sync();
        if (leaves_y && p.cu_seqlens && valid < kTile) {
          const int row = thread / 2;
          char* to = p.packed_y.data + (token + row) * p.packed_y.token + head * p.packed_y.head;
#pragma unroll 1
          for (int unit = thread % 2 * 4; row < valid && unit < thread % 2 * 4 + 4; ++unit) {
            const auto* elements = reinterpret_cast<const NativeElement*>(tile_y + unit_offset(row, unit));
#pragma unroll 1
            for (int e = 0; e < 8; ++e) {
              const int c = channel + 8 * unit + e;
              if (c < p.headdim) reinterpret_cast<NativeElement*>(to)[c] = elements[e];
            }
          }
          if constexpr (Policy::kGated) sync();  // the next z comes before the next sync
        } else if (leaves_y && thread == 0) {
          cute::SM90_TMA_STORE_4D::copy(&p.y, tile_y, channel, head, token, task.batch);
        }
        if (Policy::kSides > 1 && leaves_y && thread == 0) shared.sums_empty.arrive(which ^ 1, 1u);  // all have read
        if (thread == 0) {  // a store a chunk, be it empty: all but the latest are done reading
          if (kExtra == Extra::kept_states) keep_state(i + 1);
          cute::tma_store_arrive();
          if constexpr (!Policy::kGated) {
            cute::tma_store_wait<1>();
            if (leaves_y && p.has_z && stored) shared.z_empty[which][slots.stage ^ 1].arrive();
          }
        }
        stored = true;
        slots.advance();
      }
    } while (kPositions && i < task.chunk_count);

    // ---- end
    if (tasks.part() + 1 < tasks.parts()) {
      hand_over_state<kStateValues>(state, p, tasks, which, thread);
      continue;
    }
    if (p.beside) store_values<kStateValues>(piece_state(p, task, 0, which, kStateValues, thread), state);
    if (task.segment + 1 != static_cast<int>(p.segments.value)) continue;
    if (p.final_state.data)
      store_state(state, SliceOfState<kState>(p, p.final_state, task.sequence, head, channel, at, 0, first_state));
    if constexpr (kPositions) {
      if (task.chunk_begin + task.chunk_count < task.chunks) continue;
#pragma unroll 1
      for (int outside = 0; outside < 2; ++outside) {  // the state at the end; zeros for positions outside of the sequence
        const auto wanted = [&](std::int64_t position) {
          return outside ? position < 0 || position > task.length : position == task.length;
        };
        PositionsOfSequence(p.positions, task.sequence).take_if(wanted, [&](std::int64_t, std::int64_t entry) {
          entry_at(entry).template leave<NativeElement>(state);
        });
#pragma unroll
        for (int v = 0; v < kStateValues; ++v) state(v) = 0.0f;
      }
    }
  }
  if (thread == 0) cute::tma_store_wait<0>();
}

}  // namespace fused

// kStateOnly: what each segment adds to the state, and its decay; no C, no y. Params: FusedParams, or OrderedParams, or
// WalkingParams of these.
template <class Policy, bool kStateOnly, class Params, fused::Extra kExtra = fused::Extra::nothing>
__global__ void __launch_bounds__(Policy::kThreads, 1) ssd_scan_fused_kernel(const __grid_constant__ Params p) {
  using namespace fused;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  static_assert(sizeof(SharedStorage<Policy, kStateOnly>) <= kMostSharedBytes);
  auto& shared = *reinterpret_cast<SharedStorage<Policy, kStateOnly>*>(shared_bytes);
  // Where states leave from inside of the loop, each of the two consumers takes half of what the third warpgroup can spare.
  constexpr int kSpared = kExtra == Extra::kept_states || kExtra == Extra::positions ? 16 : 0;
  const int warpgroup = cutlass::canonical_warp_group_idx();

  if (kStateOnly || p.beside) cuda::let_next_kernel_in();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&p.B, &p.x, &p.C, &p.y})
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    for (int stage = 0; stage < stages_of<Policy, kStateOnly>; ++stage)
      shared.full[stage].init(1), shared.empty[stage].init(2 * kWarpgroup);
    for (int group = 0; group < kRawGroups; ++group) shared.raw_full[group].init(1), shared.raw_empty[group].init(2);
    for (int which = 0; which < 2; ++which)
      for (int turn = 0; turn < 2; ++turn)
        shared.steps_full[which][turn].init(32), shared.steps_empty[which][turn].init(kWarpgroup);
    for (int which = 0; which < 2; ++which)
      for (int slot = 0; slot < 2; ++slot) shared.z_full[which][slot].init(1), shared.z_empty[which][slot].init(1);
    shared.sums_full.init(1), shared.sums_empty.init(1);
    cutlass::arch::fence_barrier_init();
  }
  constexpr bool kCluster = !kStateOnly && Policy::kSides > 1;
  if constexpr (kCluster) cuda::sync_cluster();
  else __syncthreads();

  if (warpgroup == Policy::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Policy::kProducerRegisters - kSpared>();
    const int role = cutlass::canonical_warp_idx_sync() % 4;
    if (role == 0) {
      if (cute::elect_one_sync()) load_chunks<Policy, kStateOnly>(p, shared);
    } else if (role < 3) {
      prepare_steps<Policy, kStateOnly>(p, shared, role - 1);
    } else if constexpr (kStateOnly) {
      // The next kernel waits for this one alone: it must not end before the one beside it. One block that stays is enough, and
      // leaves the next kernel the places of the others.
      if (p.beside && blockIdx.x == 0) cuda::wait_for_earlier_kernels();
    } else if (p.has_z) {
      if (cute::elect_one_sync()) load_gates<Policy, kStateOnly>(p, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Policy::kConsumerRegisters + kSpared / 2>();
    if constexpr (kStateOnly) add_up_segments<Policy>(p, shared, warpgroup);
    else compute_output<Policy, kExtra>(p, shared, warpgroup);
  }
  if constexpr (kCluster) {  // the other block may still arrive here
    __syncwarp();
    cuda::sync_cluster();
  }
}

}  // namespace statescan::ssd_scan
