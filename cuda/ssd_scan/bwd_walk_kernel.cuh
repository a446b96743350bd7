// ssd_scan backward, first kernel: the states that enter the chunks and the adjoints of the states that leave them
// Math     h = exp(s[end]) h + sum_j exp(s[end] - s[j]) dt[j] x[j] B[j]^T, kept before each chunk, from the first chunk on
//          G = exp(s[end]) G + sum_i exp(s[i]) g[i] C[i]^T, kept before each chunk, from the last chunk on; g = dy silu(z)
// Shapes   h, G [p,n] of each head; kept [slots, heads of the part, p, n*], float32 or bfloat16
// Traffic  x, dy, z and dt once, B and C once for each head (from the second cache, mostly); write the states and the adjoints
// Launch   a block for each direction, sequence, segment, head of the part and 64 rows of p: a warp takes 16 rows and half of
// n,
//          and one more warp finds the steps. Where that leaves multiprocessors idle a sequence is cut into segments, and the
//          kernel runs twice: first for what each segment adds to the state, then, with those combined, from the right starts.
//          From states that the forward kept, at each 128 tokens, every stretch between two of them is a walk of its own
// Numerics as the forward: weighted x and g as sums of bfloat16 terms, chunks added up in float
#pragma once

#include "bwd_tile.cuh"
#include "state.cuh"

namespace statescan::ssd_scan {

template <class Policy>
struct WalkLayout {
  using Group = Tile<Policy::kChunk, Policy::kDstate, Policy::kTermsOfInput>;
  using Rows = Tile<Policy::kChunk, Policy::kSlice, Policy::kTerms>;
  using ChunkSteps = Steps<Policy::kChunk>;
  static constexpr int kStages = Policy::kAhead ? 2 : 1;  // only what goes past the registers is loaded beside the products
  static constexpr int kStageBytes = Group::kBytes + Rows::kBytes;
  static constexpr int kBytes = kStages * kStageBytes + 2 * sizeof(ChunkSteps);

  char* base;
  __device__ char* stage(std::int64_t i) const { return base + i % kStages * kStageBytes; }
  __device__ Group group(std::int64_t i) const { return {reinterpret_cast<std::uint16_t*>(stage(i))}; }
  __device__ Rows rows(std::int64_t i) const { return {reinterpret_cast<std::uint16_t*>(stage(i) + Group::kBytes)}; }
  __device__ ChunkSteps& steps(std::int64_t i) const {
    return reinterpret_cast<ChunkSteps*>(base + kStages * kStageBytes)[i % 2];
  }
};

// The columns of a warp, as a policy for State.
template <class Policy>
struct WalkColumns {
  static constexpr DType kDType = Policy::kDType;
  static constexpr int kDstate = Policy::kWalkColumns;
};

template <class Policy>
using WalkState = State<WalkColumns<Policy>>;

// state = decay state + sum_j weight[j] row[j] group[j]^T for 16 columns of the tile of rows, `row`.., and those of the warp
// from `column` on. The products of a chunk are summed apart: the tensor core's sums truncate, which would add up over many
// chunks.
template <class Policy, class Rows, class Group>
__device__ void add_chunk(WalkState<Policy>& state, const Rows& rows, const Group& group, int row, int column, int terms,
                          const float (&weights)[Policy::kChunk], float decay) {
  constexpr int kTerms = Policy::kTerms, kBlocks = Policy::kBlocks;
  Bits weighted[kBlocks][kTerms][4];
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    Bits raw[kTerms][4] = {};
#pragma unroll
    for (int i = 0; i < kTerms; ++i)
      if (i < terms) load_A<Read::columns>(rows.at(i, 16 * k, row), Rows::kStride, raw[i]);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Bits of[kTerms], products[kTerms];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) of[i] = raw[i][r];
      const float2 v = join(of), w = *reinterpret_cast<const float2*>(&weights[16 * k + r / 2 * 8 + lane_id() % 4 * 2]);
      split(v.x * w.x, v.y * w.y, products);
#pragma unroll
      for (int i = 0; i < kTerms; ++i) weighted[k][i][r] = products[i];
    }
  }
#pragma unroll
  for (int n = 0; n < Policy::kWalkColumns; n += 16) {
    Sum16 sum{};
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
#pragma unroll
      for (int j = 0; j < Policy::kTermsOfInput; ++j) {
        Bits b[4];
        load_B<Read::rows>(group.at(j, 16 * k, column + n), Group::kStride, b);
#pragma unroll
        for (int i = 0; i < kTerms; ++i)
          if (counts<kTerms, Policy::kTermsOfInput>(i, j)) multiply_add(sum, weighted[k][i], b);
      }
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[n / 8 + q][e] = fmaf(decay, state[n / 8 + q][e], sum[q][e]);
  }
}

// Columns `column`.. of a state from or to a tensor, at row `place`.
inline __device__ StateView from_column(StateView t, int column) {
  if (t.data) t.data += column * t.column;
  return t;
}

// Keeps a state in the workspace. For bfloat16 neighbours exchange a half, so that each has 4 columns in a row and 4 lanes fill
// a sector of 32 bytes: even lanes take columns 16q.. to 16q+7, odd lanes the 8 after them.
template <class Policy>
__device__ void keep_state(const WalkState<Policy>& state, char* to, const BackwardParams& p, std::int64_t first_row,
                           int column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t row = first_row + lane_id() / 4 + 8 * r;
    const bool exists = row < p.headdim;
    if constexpr (Policy::kKept == DType::bfloat16) {
      const bool odd = lane_id() % 2;
      const int first = column + (odd ? 8 : 0) + lane_id() % 4 / 2 * 4;
      char* const from_first = to + (row * p.columns + first) * 2;
#pragma unroll
      for (int q = 0; q < Policy::kWalkColumns / 16; ++q) {
        const float low[2] = {state[2 * q][2 * r], state[2 * q][2 * r + 1]};
        const float high[2] = {state[2 * q + 1][2 * r], state[2 * q + 1][2 * r + 1]};
        const Bits of_low = cuda::narrow_word<__nv_bfloat16>(low), of_high = cuda::narrow_word<__nv_bfloat16>(high);
        const Bits other = __shfl_xor_sync(~0u, odd ? of_low : of_high, 1);
        if (exists && first + 16 * q < p.columns)
          *reinterpret_cast<uint2*>(from_first + 32 * q) = odd ? make_uint2(other, of_high) : make_uint2(of_low, other);
      }
    } else {
      const int first = column + lane_id() % 4 * 2;
      char* const from_first = to + (row * p.columns + first) * 4;
#pragma unroll
      for (int q = 0; q < Policy::kWalkColumns / 8; ++q)
        if (exists && column + 8 * q < p.columns)
          *reinterpret_cast<float2*>(from_first + 32 * q) = make_float2(state[q][2 * r], state[q][2 * r + 1]);
    }
  }
}

// Where the loader of the steps and the walkers wait for each other: two places in the code, while __syncthreads() has to be one
// that all threads of the block reach.
inline __device__ void meet() { asm volatile("barrier.sync 0;" ::: "memory"); }

// Of all segments but the last to be walked what they add to the state (`ends`), or the states themselves.
template <class Policy>
__global__ void __launch_bounds__(Policy::kWalkThreads, Policy::kAhead&& Policy::kDstate <= 128 ? 2 : 1)
    ssd_scan_backward_walk_kernel(const __grid_constant__ BackwardParams p, bool ends) {
  using Layout = WalkLayout<Policy>;
  constexpr int kChunk = Policy::kChunk, kStages = Layout::kStages;
  extern __shared__ __align__(16) char memory[];
  const Layout shared{memory};
  const std::int64_t slices = (p.headdim + Policy::kSlice - 1) / Policy::kSlice, heads = p.heads_of_part();
  const std::int64_t walked = p.sequences.segments - ends;
  std::int64_t task = blockIdx.x;
  const std::int64_t tile_row = task % slices * Policy::kSlice;
  task /= slices;
  const std::int64_t at = task % heads;  // of the part
  task /= heads;
  // Adjoints, then states, of every sequence and segment; or, from kept states, of every stretch.
  const std::int64_t states = task - p.sequences.count * walked;
  const bool adjoint = states < 0, from_kept = !adjoint && p.kept.states.data;
  Sequences cut = p.sequences;
  if (from_kept) cut.chunk = kStretch;
  const std::int64_t sequence = from_kept ? sequence_of_slot(cut, states) : (adjoint ? task : states) / walked;
  // Of the segment in the order of the walk, or of the stretch.
  const std::int64_t turn = from_kept ? states - first_slot(cut, sequence) : (adjoint ? task : states) % walked;
  const std::int64_t head = p.first_head() + at, group = head / p.heads_of_group;
  const std::int64_t of_walk = (sequence * p.sequences.segments + turn) * heads + at;

  const Walk walk = whole_walk(p.sequences, sequence);
  const std::int64_t chunks = chunks_of(p.sequences, sequence), slot = first_slot(p.sequences, sequence);
  const std::int64_t each =
      from_kept ? kStretch / kChunk : (chunks + p.sequences.segments - 1) / p.sequences.segments;
  const std::int64_t first = min(turn * each, chunks), last = min(first + each, chunks);
  const bool is_end = turn + 1 == p.sequences.segments;
  const bool goes_on = ends || (is_end && adjoint && p.dinitial_state.data);  // past the last chunk of the walk
  const std::int64_t updates = goes_on ? last : last - 1;
  const auto chunk_at = [&](std::int64_t i) { return adjoint ? chunks - 1 - i : i; };
  const auto count_at = [&](std::int64_t i) {
    return static_cast<int>(max(0l, min(std::int64_t(kChunk), walk.length - chunk_at(i) * kChunk)));
  };
  if (from_kept && first == last) return;  // no stretch falls on its row
  const int warp = threadIdx.x / 32;

  if (warp == Policy::kWalkers / 32) {
    StepLoader<kChunk> loader(p, walk, head);
    double log2_decay = 0;
    if (first < updates) {
      loader.load(chunk_at(first) * kChunk, count_at(first));
      log2_decay += loader.finish(shared.steps(first));
    }
    if (first + 1 < updates) loader.load(chunk_at(first + 1) * kChunk, count_at(first + 1));
#pragma unroll 1
    for (std::int64_t i = first; i < updates; ++i) {
      if (kStages == 1) meet();
      meet();
      if (i + 1 < updates) log2_decay += loader.finish(shared.steps(i + 1));
      if (i + 2 < updates) loader.load(chunk_at(i + 2) * kChunk, count_at(i + 2));
    }
    if (ends && tile_row == 0 && lane_id() == 0)
      p.decays[adjoint * p.ends_of_walk() + of_walk] = static_cast<float>(log2_decay);
    return;
  }

  const int strip = warp % Policy::kWalkStrips, column = warp / Policy::kWalkStrips * Policy::kWalkColumns;
  const std::int64_t row = tile_row + strip * kRowsOfWarp, dstate = p.dstate - column;
  WalkState<Policy> state{};
  const StateView of_ends{reinterpret_cast<char*>(p.ends + adjoint * p.ends_of_walk() * p.headdim * p.dstate),
                          DType::float32,
                          0,
                          p.headdim * p.dstate * 4,
                          p.dstate * 4,
                          4,
                          p.dstate % 2 == 0};
  if (!ends) {
    const bool from_ends = p.sequences.segments > 1 && !from_kept;
    const StateView from =
        from_column(from_ends ? of_ends : adjoint ? p.dfinal_state : from_kept ? p.kept.states : p.start, column);
    if (from.data) {
      StatePlace place(from, p, from_ends ? 0 : sequence, from_ends ? of_walk : head, row);
      if (from_kept) place.row += kept_index(p.sequences, sequence, turn * kStretch) * p.kept.step;
      load_state<WalkColumns<Policy>>(state, from, place, dstate);
    }
  }
  const int terms = adjoint ? terms_of_g<Policy>(p) : Policy::kTermsOfInput;
  const RowLoader<Policy, Policy::kWalkers, Policy::kDstate> load_group(adjoint ? p.C : p.B, walk, group, p.dstate);
  const RowLoader<Policy, Policy::kWalkers, Policy::kSlice> load_x(p.x, walk, head, p.headdim);
  const GateLoader<Policy, Policy::kWalkers, Policy::kSlice> load_g(p, walk, head);
  const auto load = [&](std::int64_t i) {
    const std::int64_t start = chunk_at(i) * kChunk;
    load_group.load(shared.group(i), start, count_at(i), 0, 0);
    if (adjoint) load_g.load(shared.rows(i), start, count_at(i), 0, static_cast<int>(tile_row));
    else load_x.load(shared.rows(i), start, count_at(i), 0, static_cast<int>(tile_row));
    cute::cp_async_fence();
  };
  if (kStages > 1 && first < updates) load(first);
#pragma unroll 1
  for (std::int64_t i = first; i < last; ++i) {
    if (!ends) {
      char* const kept = adjoint ? p.adjoints : p.states;
      keep_state<Policy>(state, kept + ((slot + chunk_at(i)) * heads + at) * p.headdim * p.columns * Policy::kBytesOfKept, p,
                         row, column);
    }
    if (i == updates) break;
    if constexpr (kStages == 1) {
      meet();  // the tiles of the last chunk are read
      load(i);
    }
    cute::cp_async_wait<0>();
    meet();  // this chunk's tiles and steps are there, and nobody reads the last chunk's any more
    if (kStages > 1 && i + 1 < updates) load(i + 1);
    const auto& steps = shared.steps(i);
    add_chunk<Policy>(state, shared.rows(i), shared.group(i), strip * kRowsOfWarp, column, terms,
                      adjoint ? steps.from_start : steps.to_end, steps.from_start[kChunk - 1]);
  }
  if (!goes_on) return;
  const StateView to = from_column(ends ? of_ends : p.dinitial_state, column);
  store_state<WalkColumns<Policy>>(state, to, StatePlace(to, p, ends ? 0 : sequence, ends ? of_walk : head, row), dstate);
}

}  // namespace statescan::ssd_scan
