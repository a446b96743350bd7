// ssd_scan backward on sm_90a, the main kernel: every gradient of a chunk of 64 tokens, from kept states and adjoints
// Math     with s the sums of dt A in the chunk, end its last token, h the state before, G the adjoint after, g = dy
//          or, with z, dy silu(z), L[i][j] = exp(s[i] - s[j]) for j <= i, S[i][j] = C[i].B[j], T[i][j] = g[i].x[j], W = S L T:
//          r[j]  = L[end][j] G B[j] + sum_{i>=j} S[i][j] L[i][j] g[i],         dx[j] = dt[j] r[j] + D g[j]
//          dB[j] = sum over heads of dt[j] L[end][j] G^T x[j] + sum_{i>=j} T[i][j] L[i][j] dt[j] C[i]
//          dC[i] = sum over heads of exp(s[i]) h^T g[i]       + sum_{j<=i} T[i][j] L[i][j] dt[j] B[j]
//          ddtA[i] = exp(s[end]) <G,h> + sum_{j<i} dt[j] L[end][j] B[j].(G^T x[j]) + sum_{k>=i} exp(s[k]) C[k].(h^T g[k])
//                    + sum_{k>=i} (sum_{j<k} W[k][j] dt[j] - sum_{m>k} W[m][k] dt[k])
//          ddt[j] = x[j].r[j] + A ddtA[j], through limit, softplus and bias;  dA = sum dt[i] ddtA[i];  dD = sum g x
//          Of a pair of chunks, h of the first and G of the second are kept, h by a walk or by the forward; h of the second is
//          made from that of the first, and G of the first from that of the second, as the walks do
// Shapes   x, dy, dx [b,l,h,p], dt [b,l,h], B, C [b,l,g,n]; h, G [p,n] of each head and pair; p in slices of 64: an item
// Traffic  read x, dy, dt, h and G of pairs, write dx and ddt: once (the other chunk of a pair finds them in L2); B, C, dB, dC
//          once a block. Floor of B8 L2048 H80 P64 G1 N128 bf16: 0.84 GB, 0.28 ms; matmuls 107 GFLOP, 0.14 ms
//          More than 128 states are two calls, of which the second reads dx as well, where it adds its own to that of the first
//          With z, g = dy silu(z), and z is read with dy: 1.01 GB, 0.34 ms. No element is g, and rounded to one it would cost
//          dC a third rounding beside its own and that of h (1.73 of one for 1.41), so that it is the sum of two, in the places
//          of dy and z, and each product with it is two: matmuls 150 GFLOP, 0.20 ms
// Launch   a block per multiprocessor, which takes tasks in turns: a chunk, a group and a split of the group's heads, through
//          whose items it goes. Where dx holds the adjoints, of which both blocks of a pair read both tiles and each writes
//          over one, they are a cluster and tell each other what has come. One warpgroup has dC, one dB, one what lies inside
//          the chunk and dx; a fourth loads, prepares the steps, weights the rows of the pair's other chunk and finishes ddt,
//          and is at the next task while the others end one. The first two make the states of an item between the halves of the
//          item before it. With z they weight those rows as well, and the third makes g of an item at the end of the one before
// Numerics float32 sums; S L, and the sum over heads of T L dt, rounded to the element type as matrix operands; fixed order
#pragma once

#include "../common/cluster.cuh"
#include "fused_bwd_kept.cuh"
#include "fused_bwd_steps.cuh"

namespace statescan::ssd_scan {

namespace fused {

inline constexpr int kGradientWarpgroups = 4;

// Packed sequences, reverse and a D for each channel have a kernel of their own: that this one asks for them makes the others
// 5% slower. So have states that the forward kept, which would make them 1 to 2% slower.
template <class Base, bool rare, bool from_forward>
struct GradientPolicy : Base {
  static constexpr bool kRare = rare, kFromForward = from_forward;
  static constexpr int kStages = Base::kGated ? 2 : Base::kState == 128 ? 3 : 4;  // items on their way: what fits
};

template <class Policy>
__device__ bool goes_in_reverse(const FusedBackwardParams& p) {
  return Policy::kRare && p.sequences.reverse;
}

// Of one item, prepared by a warp.
struct alignas(16) GradientSteps {
  float log_decay[kTile], dt[kTile];
  float enter[kTile];  // exp(s[i])
  float leave[kTile];  // dt[j] exp(s[end] - s[j]); where that is rare, and there is no room beside it, D of the item's channels
  float to_end[kTile];  // exp(s[end] - s[j])
  float slope[kTile];   // of the step with respect to dt before bias, softplus and limit
  float total, D, unused[2];
};

// What the warpgroups find of an item, for ddt.
struct GradientSums {
  float dot_B[kTile], dot_C[kTile];  // B[j].(G^T x[j]), C[i].(h^T g[i])
  float below[kTile];                // sum_{i>=j} W[i][j]
  float strictly_below[kTile];       // sum_{i>j} W[i][j]
  float before[kTile / 16][kTile];   // sum_{j<i} W[i][j] dt[j], j of each warp of `combine`
  float diagonal[kTile];             // T[j][j]
  float whole[kWarpgroup / 32];      // <G,h>, of each warp of `combine`
};

template <class Policy, bool = Policy::kGated>
struct GateStorage {};
template <class Policy>
struct GateStorage<Policy, true> {
  using Tile = char[kTileBytes];
  alignas(1024) Tile z[Policy::kStages], other_z[2];  // of g, or weighted g of the second; then what rounding takes from these
};

template <class Policy>
struct GradientStorage : GateStorage<Policy> {
  static constexpr int kTiles = Policy::kState / kTile, kStages = Policy::kStages;
  using Tile = char[kTileBytes];
  alignas(1024) Tile B[kTiles], C[kTiles];
  alignas(1024) Tile other_projection[kTiles];  // of the pair's other chunk: C of the second, or B of the first
  alignas(1024) Tile x[kStages], g[kStages];
  alignas(1024) Tile other_rows[2];                                       // weighted g of the second, or x of the first
  alignas(1024) Tile states[kStages][kTiles], adjoints[kStages][kTiles];  // as kept, then this chunk's
  alignas(1024) Tile dx;  // and at the end of a task the sum over heads of T L dt
  alignas(16) std::uint8_t state_exponents[kStages][kTiles][kTile], adjoint_exponents[kStages][kTiles][kTile];
  GradientSteps steps[kStages];
  WalkSteps other_steps[2];
  GradientSums sums[2];
  alignas(8) Barrier projections_full, projections_empty, weights_full, weights_empty;
  Barrier other_loaded[2], other_full[2], other_empty[2];
  // passed: states are this chunk's, and g what it is
  Barrier full[kStages], passed[kStages], empty[kStages], sums_full[2], sums_empty[2];
  // The item has come to both blocks of a pair: dx may take the adjoint's place. Who waits for it does so before the stage is
  // empty, so that neither block gets a whole round of stages ahead of what the other has seen.
  Barrier both_full[kStages];
};

// What g is the sum of with its tiles; where that is g alone, nothing.
template <class Policy>
__device__ auto& rests_of_g(GradientStorage<Policy>& shared) {
  if constexpr (Policy::kGated) return shared.z;
  else return shared.g;
}

template <class Policy>
__device__ auto& rests_of_others(GradientStorage<Policy>& shared) {
  if constexpr (Policy::kGated) return shared.other_z;
  else return shared.other_rows;
}

// A chunk, a group, and some of its items of the part.
struct GradientTask {
  Span span;
  int chunk, slot, group, group_of_part, split, begin, end;  // chunk: of the sequence; slot: of the part
  int pair;                                                  // of the part's

  __device__ GradientTask(const FusedBackwardParams& p, unsigned index, bool may_be_packed, bool reverse) {
    int of_pair = 0;
    if (p.adjoints_in_dx) of_pair = static_cast<int>(index % 2), index /= 2;  // the blocks of a cluster share a pair
    split = static_cast<int>(index % static_cast<unsigned>(p.splits));
    index /= static_cast<unsigned>(p.splits);
    group_of_part = static_cast<int>(index % static_cast<unsigned>(p.part.groups));
    slot = static_cast<int>(index / static_cast<unsigned>(p.part.groups));
    if (p.adjoints_in_dx) slot = 2 * slot + of_pair;
    group = p.part.first_group + group_of_part;
    if (may_be_packed && p.ends) {
      const PackedChunk place = p.packed_chunks[slot];
      span = {place.sequence, 0, place.first, place.length, reverse}, chunk = place.chunk;
    } else {
      span = Span::row(p, p.part.first_batch + slot / p.chunks, reverse), chunk = slot % p.chunks;
    }
    pair = span.pair_of(p, may_be_packed, chunk);
    const int heads = p.part.items / p.slices, each = (heads + p.splits - 1) / p.splits;
    begin = min(split * each, heads) * p.slices;
    end = min((split + 1) * each, heads) * p.slices;
  }

  __device__ int head_of(const FusedBackwardParams& p, int item) const {
    return group * p.heads_per_group + (p.part.first_item + item) / p.slices;
  }
  __device__ int channel_of(const FusedBackwardParams& p, int item) const {
    return (p.part.first_item + item) % p.slices * kTile;
  }
  __device__ int kept_of(const FusedBackwardParams& p, int item) const { return group_of_part * p.part.items + item; }
  __device__ int first_token() const { return span.token_of(chunk); }
  // Of a pair: the first has h, and its G from the second; the second has G, and its h from the first.
  __device__ bool is_first() const { return chunk % 2 == 0; }
  __device__ int other_chunk() const { return chunk ^ 1; }
};

// Calls `visit` with each task of the block and the parity of the barriers that it passes once.
template <class Policy, class Visit>
__device__ void for_each_task(const FusedBackwardParams& p, Visit visit) {
  int parity = 0;
  const unsigned tasks = Policy::kRare && p.ends ? p.tasks / p.slots * *p.packed_count : p.tasks;
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < tasks; index += gridDim.x, parity ^= 1)
    visit(GradientTask(p, index, Policy::kRare, goes_in_reverse<Policy>(p)), parity);
}

// ---- the warps that load and finish ----------------------------------------------------------------------------------------

// Of 64 tokens j, those i >= j are many for the first and few for the last. Rows of x and B, and of what is computed for them,
// are dealt in eights so that each warp has as many pairs as the others: its first eight from the front, its second from the
// back.
inline __device__ int dealt_eight(int eight) { return eight % 2 == 0 ? eight / 2 : 7 - eight / 2; }

// The rows of a tile, dealt or in their order, from boxes of eight tokens.
inline __device__ void load_eights(const CUtensorMap& map, Barrier& barrier, char* tile, int column, int slab, int token,
                                   int batch, bool dealt, bool reverse) {
#pragma unroll 1
  for (int eight = 0; eight < kTile / 8; ++eight)
    load_tile(map, barrier, tile + eight * (kTileBytes / 8), column, slab,
              token + memory_of_row(reverse, 8 * (dealt ? dealt_eight(eight) : eight)), batch);
}

// The same in their order, in one box where that is memory's.
inline __device__ void load_rows(const CUtensorMap& map, const CUtensorMap& eights, Barrier& barrier, char* tile, int column,
                                 int slab, int token, int batch, bool reverse) {
  if (reverse) load_eights(eights, barrier, tile, column, slab, token, batch, false, true);
  else load_tile(map, barrier, tile, column, slab, token, batch);
}

template <class Policy>
__device__ void load_projections(const FusedBackwardParams& p, const GradientTask& task, int parity,
                                 GradientStorage<Policy>& shared) {
  constexpr int kTiles = GradientStorage<Policy>::kTiles;
  const int token = task.first_token(), batch = task.span.batch;
  const bool reverse = task.span.reverse;
  const TokenMaps& maps =
      task.span.template maps_of<Policy::kRare>(p, task.chunk, &TokenMaps::B_eights, &TokenMaps::C, &TokenMaps::C_eights);
  CUtensorMap TokenMaps::* const other = task.is_first() ? &TokenMaps::C : &TokenMaps::B;
  const TokenMaps& others = task.span.template maps_of<Policy::kRare>(p, task.other_chunk(), other);
  shared.projections_empty.wait(parity ^ 1);
  shared.projections_full.arrive_and_expect_tx(3 * kTiles * kTileBytes);
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
    load_eights(maps.B_eights, shared.projections_full, shared.B[k], k * kTile, task.group, token, batch, true, reverse);
    load_rows(maps.C, maps.C_eights, shared.projections_full, shared.C[k], k * kTile, task.group, token, batch, reverse);
    load_tile(others.*other, shared.projections_full, shared.other_projection[k], k * kTile, task.group,
              task.span.token_of(task.other_chunk()), batch);
  }
}

// One warp: of the pair's other chunk, the rows of each item, weighted as they are in what passes it.
template <class Policy>
__device__ void weight_others(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared,
                              Ring<2>& ring) {
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  const bool gated = Policy::kGated && task.is_first();
  CUtensorMap TokenMaps::* const rows = task.is_first() ? &TokenMaps::dy : &TokenMaps::x;
  const CUtensorMap& map = task.span.template maps_of<Policy::kRare>(p, task.other_chunk(), rows).*rows;
  const int token = task.span.token_of(task.other_chunk());
  const auto load = [&](int item, const Ring<2>& to) {
    if (item >= task.end) return;
    shared.other_empty[to.stage].wait(to.parity ^ 1);
    if (cute::elect_one_sync()) {
      Barrier& loaded = shared.other_loaded[to.stage];
      loaded.arrive_and_expect_tx((gated ? 2 : 1) * kTileBytes + sizeof(WalkSteps));
      load_tile(map, loaded, shared.other_rows[to.stage], task.channel_of(p, item), task.head_of(p, item), token,
                task.span.batch);
      if constexpr (Policy::kGated)
        if (gated)
          load_tile(task.span.template maps_of<Policy::kRare>(p, task.other_chunk(), &TokenMaps::z).z, loaded,
                    shared.other_z[to.stage], task.channel_of(p, item), task.head_of(p, item), token, task.span.batch);
      const WalkSteps* const steps = task.is_first() ? p.second_steps : p.first_steps;
      cute::SM90_BULK_COPY_G2S::copy(steps + std::int64_t{task.pair} * p.kept_items + task.kept_of(p, item),
                                     reinterpret_cast<std::uint64_t*>(&loaded), &shared.other_steps[to.stage],
                                     sizeof(WalkSteps));
    }
    __syncwarp();
  };
  // Gates are too much for a warp: the warpgroups of dB and dC weight the rows.
  if constexpr (Policy::kGated) {
    for (int item = task.begin; item < task.end; ++item, ring.advance()) load(item, ring);
    return;
  }
  // An item's rows are weighted before the next are asked for: their place is that of the item before, whose end would be
  // waited for.
  load(task.begin, ring);
  for (int item = task.begin; item < task.end; ++item) {
    const int slot = ring.stage;
    shared.other_loaded[slot].wait(ring.parity);
    weight_tile<NativeElement, 32, 2>(shared.other_rows[slot], shared.other_steps[slot], threadIdx.x % 32);
    cutlass::arch::fence_view_async_shared();
    shared.other_full[slot].arrive();
    ring.advance();
    load(item + 1, ring);
  }
}

template <class Policy>
using GradientRing = Ring<GradientStorage<Policy>::kStages>;

template <class Policy>
__device__ void load_items(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared,
                           GradientRing<Policy>& ring) {
  using Storage = GradientStorage<Policy>;
  const int token = task.first_token(), batch = task.span.batch, pair_token = task.span.first_token_of_pair(task.chunk);
  const bool reverse = task.span.reverse;
  const TokenMaps& maps =
      task.span.template maps_of<Policy::kRare>(p, task.chunk, &TokenMaps::x_eights, &TokenMaps::dy, &TokenMaps::dy_eights);
  if constexpr (Policy::kGated) task.span.template maps_of<Policy::kRare>(p, task.chunk, &TokenMaps::z, &TokenMaps::z_eights);
  for (int item = task.begin; item < task.end; ++item, ring.advance()) {
    const int stage = ring.stage, head = task.head_of(p, item), channel = task.channel_of(p, item),
              kept = task.kept_of(p, item);
    shared.empty[stage].wait(ring.parity ^ 1);
    Barrier& full = shared.full[stage];
    full.arrive_and_expect_tx((2 + Policy::kGated + 2 * Storage::kTiles) * kTileBytes +
                              (Policy::kFromForward ? 1 : 2) * Storage::kTiles * kTile);
    load_eights(maps.x_eights, full, shared.x[stage], channel, head, token, batch, true, reverse);
    load_rows(maps.dy, maps.dy_eights, full, shared.g[stage], channel, head, token, batch, reverse);
    if constexpr (Policy::kGated) load_rows(maps.z, maps.z_eights, full, shared.z[stage], channel, head, token, batch, reverse);
#pragma unroll
    for (int k = 0; k < Storage::kTiles; ++k) {
      if constexpr (Policy::kFromForward)
        load_tile(p.states, full, shared.states[stage][k], k * kTile, head, channel, p.first_pair + task.pair);
      else load_tile(p.states, full, shared.states[stage][k], k * kTile, kept, 0, task.pair);
      if (p.adjoints_in_dx)
        load_tile(p.adjoints, full, shared.adjoints[stage][k], channel, head, pair_token + k * kTile, batch);
      else load_tile(p.adjoints, full, shared.adjoints[stage][k], k * kTile, kept, 0, task.pair);
    }
    const auto load_exponents = [&](const std::uint8_t* from, void* to) {
      constexpr int kBytes = Storage::kTiles * kTile;
      cute::SM90_BULK_COPY_G2S::copy(from + (std::int64_t{task.pair} * p.kept_items + kept) * kBytes,
                                     reinterpret_cast<std::uint64_t*>(&full), to, kBytes);
    };
    if constexpr (!Policy::kFromForward) load_exponents(p.state_exponents, shared.state_exponents[stage]);
    load_exponents(p.adjoint_exponents, shared.adjoint_exponents[stage]);
  }
}

template <class Policy>
__device__ void prepare_items(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared,
                              GradientRing<Policy>& ring) {
  const int lane = threadIdx.x % 32;
  // Raw steps of the items to come: a load from memory takes about as long as an item.
  struct Raw {
    float A, bias, D;
    std::uint32_t bits[2];
  };
  constexpr int kAhead = 3;
  Raw next[kAhead] = {};
  const auto fetch = [&](int item, Raw& raw) {
    if (item >= task.end) return;
    const int head = task.head_of(p, item);
    const StepReader reader(p, task.span, head);
    raw.A = reader.A, raw.bias = reader.bias;
    if constexpr (!Policy::kRare) raw.D = p.D.data ? *reinterpret_cast<const float*>(p.D.data + head * p.D.head) : 0.0f;
    reader.fetch(p, task.span, task.chunk, raw.bits);
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) fetch(task.begin + k, next[k]);
  for (int item = task.begin; item < task.end; ++item, ring.advance()) {
    const LaneSteps s = scan_steps(p, task.span, task.chunk, next[0].A, next[0].bias, next[0].bits);
    const float D_of_head = next[0].D;
#pragma unroll
    for (int k = 0; k < kAhead - 1; ++k) next[k] = next[k + 1];
    fetch(item + kAhead, next[kAhead - 1]);
    const bool reverse = task.span.reverse;
    float to_end[2], slope[2];
    [[maybe_unused]] float D[2] = {};
    if constexpr (Policy::kRare) {
      const int channel = task.channel_of(p, item) + 2 * lane;
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (p.D.data && channel + k < p.headdim)
          D[k] = *reinterpret_cast<const float*>(p.D.data + task.head_of(p, item) * p.D.head + (channel + k) * p.D.column);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      to_end[k] = fast_exp2(s.total - s.log_decay[k]);
      slope[k] = s.free[k] < p.dt_min || s.free[k] > p.dt_max ? 0.0f : p.dt_softplus ? cuda::fast_sigmoid(s.raw[k]) : 1.0f;
    }
    shared.empty[ring.stage].wait(ring.parity ^ 1);
    GradientSteps& steps = shared.steps[ring.stage];
    const auto store = [&](float* to, float a, float b) { store_steps(to, to_row(reverse, 2 * lane), a, b, reverse); };
    store(steps.log_decay, s.log_decay[0], s.log_decay[1]);
    store(steps.dt, s.dt[0], s.dt[1]);
    store(steps.enter, fast_exp2(s.log_decay[0]), fast_exp2(s.log_decay[1]));
    if constexpr (Policy::kRare) store2(steps.leave, lane, D[0], D[1]);
    else store(steps.leave, s.dt[0] * to_end[0], s.dt[1] * to_end[1]);
    store(steps.to_end, to_end[0], to_end[1]);
    store(steps.slope, slope[0], slope[1]);
    if (lane == 0) steps.total = fast_exp2(s.total), steps.D = D_of_head;
    shared.full[ring.stage].arrive();
    if (p.adjoints_in_dx) {
      shared.full[ring.stage].wait(ring.parity);
      if (lane < 2) shared.both_full[ring.stage].arrive(lane, 1u);
    }
  }
}

inline __device__ float sum_of_warp(float v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(~0u, v, distance);
  return v;
}

// Of two values a lane, in the order of tokens: the sum of those before, and of those from the token on.
inline __device__ void sum_before(const float (&v)[2], float (&sum)[2]) {
  float before = v[0] + v[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_up_sync(~0u, before, distance);
    if (threadIdx.x % 32 >= distance) before += other;
  }
  before = __shfl_up_sync(~0u, before, 1);
  sum[0] = threadIdx.x % 32 == 0 ? 0.0f : before;
  sum[1] = sum[0] + v[0];
}

inline __device__ void sum_from(const float (&v)[2], float (&sum)[2]) {
  float after = v[0] + v[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_down_sync(~0u, after, distance);
    if (threadIdx.x % 32 + distance < 32) after += other;
  }
  after = __shfl_down_sync(~0u, after, 1);
  sum[1] = v[1] + (threadIdx.x % 32 == 31 ? 0.0f : after);
  sum[0] = v[0] + sum[1];
}

// Over the chunk's tokens, x g of a lane's two channels. Rows of x are dealt. g_rest: null, or what g is the sum of with it.
template <class NativeElement>
__device__ float2 sum_of_products(const char* x, const char* g, [[maybe_unused]] const char* g_rest, int lane) {
  float2 sum = {};
#pragma unroll 1
  for (int eight = 0; eight < kTile / 8; ++eight)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = unit_offset(i, lane / 4) + lane % 4 * 4;
      float a[2], b[2];
      cuda::widen_word<NativeElement>(*reinterpret_cast<const std::uint32_t*>(x + eight * (kTileBytes / 8) + column), a);
      cuda::widen_word<NativeElement>(
          *reinterpret_cast<const std::uint32_t*>(g + dealt_eight(eight) * (kTileBytes / 8) + column), b);
      if (g_rest) {
        float rest[2];
        cuda::widen_word<NativeElement>(
            *reinterpret_cast<const std::uint32_t*>(g_rest + dealt_eight(eight) * (kTileBytes / 8) + column), rest);
        b[0] += rest[0], b[1] += rest[1];
      }
      sum.x = fmaf(a[0], b[0], sum.x), sum.y = fmaf(a[1], b[1], sum.y);
    }
  return sum;
}

// Arrives where what these values come of has been read. An arrival overtakes loads on their way, and who it tells may write
// where they read. `count`: a number that is not negative, which the compiler doesn't know.
template <class... Values>
__device__ void arrive_after(const Barrier& barrier, int count, Values... values) {
  const std::uint32_t nothing = (__float_as_uint(values) ^ ...) & (static_cast<std::uint32_t>(count) >> 31);
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cute::cast_smem_ptr_to_uint(&barrier) + nothing) : "memory");
}

// One warp: ddt, and the chunk's shares of dA, ddt_bias and dD. The slices of a head add up.
template <class Policy>
__device__ void finish_steps(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared,
                             GradientRing<Policy>& ring, Ring<2>& slots) {
  const int lane = threadIdx.x % 32;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  float direct[2] = {}, earlier[2] = {}, later[2] = {}, diagonal = 0, whole = 0;
  // Of shares. Packed sequences make one row.
  const auto place_of = [&](int head) { return (std::int64_t{p.part.first_batch} * p.chunks + task.slot) * p.nheads + head; };
  for (int item = task.begin; item < task.end; ++item, ring.advance(), slots.advance()) {
    shared.full[ring.stage].wait(ring.parity);
    if (Policy::kRare && p.D_per_channel) {
      const char* g_rest = nullptr;
      if constexpr (Policy::kGated) shared.passed[ring.stage].wait(ring.parity), g_rest = shared.z[ring.stage];
      const float2 dD = sum_of_products<NativeElement>(shared.x[ring.stage], shared.g[ring.stage], g_rest, lane);
      const int channel = task.channel_of(p, item) + 2 * lane;
      float* const to = p.dD_shares + place_of(task.head_of(p, item)) * p.headdim + channel;
      if (channel < p.headdim) to[0] = dD.x;
      if (channel + 1 < p.headdim) to[1] = dD.y;
    }
    shared.sums_full[slots.stage].wait(slots.parity);
    const GradientSteps& steps = shared.steps[ring.stage];
    const GradientSums& sums = shared.sums[slots.stage];
    float dt[2], slope[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = 2 * lane + k;
      dt[k] = steps.dt[i], slope[k] = steps.slope[i];
      const float from_adjoint = steps.to_end[i] * sums.dot_B[i];
      direct[k] += sums.below[i] + from_adjoint;
      earlier[k] += dt[k] * from_adjoint;
      float before = 0;
#pragma unroll
      for (int w = 0; w < kTile / 16; ++w) before += sums.before[w][i];
      later[k] += steps.enter[i] * sums.dot_C[i] + (before - dt[k] * sums.strictly_below[i]);
      diagonal += sums.diagonal[i];
    }
#pragma unroll
    for (int w = 0; w < kWarpgroup / 32; ++w) whole = fmaf(steps.total, sums.whole[w], whole);
    const auto read = [&](Barrier& barrier) {
      arrive_after(barrier, p.nheads, slope[0], slope[1], direct[0], direct[1], earlier[0], earlier[1], later[0], later[1],
                   diagonal, whole);
    };
    read(shared.empty[ring.stage]);
    read(shared.sums_empty[slots.stage]);
    if ((p.part.first_item + item) % p.slices + 1 < p.slices) continue;

    const int head = task.head_of(p, item);
    const float A = *reinterpret_cast<const float*>(p.A.data + head * p.A.head);
    if (task.span.reverse) {  // from rows to the order of the scan
      const auto turn = [&](float (&v)[2]) {
        const float first = __shfl_xor_sync(~0u, v[1], 3);
        v[1] = __shfl_xor_sync(~0u, v[0], 3), v[0] = first;
      };
      turn(dt), turn(slope), turn(direct), turn(earlier), turn(later);
    }
    float before[2], from[2], dA = 0, ddt_bias = 0;
    sum_before(earlier, before);
    sum_from(later, from);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float ddtA = whole + before[k] + from[k], ddt = fmaf(A, ddtA, direct[k]) * slope[k];
      const int token = token_of_lane(task.span, task.chunk, k);
      dA = fmaf(dt[k], ddtA, dA);
      if (token >= task.span.length) continue;
      ddt_bias += ddt;
      if (p.ddt)
        cuda::store_element(p.ddt + task.span.batch * p.ddt_batch + (task.span.first + token) * p.ddt_token + head * p.ddt_head,
                            p.ddt_dtype, ddt);
    }
    dA = sum_of_warp(dA), ddt_bias = sum_of_warp(ddt_bias), diagonal = sum_of_warp(diagonal);
    if (lane == 0) {
      const std::int64_t share = place_of(head);
      p.dA_shares[share] = dA, p.ddt_bias_shares[share] = ddt_bias;
      if (!Policy::kRare || !p.D_per_channel) p.dD_shares[share] = diagonal;
    }
    direct[0] = direct[1] = earlier[0] = earlier[1] = later[0] = later[1] = diagonal = whole = 0;
  }
}

// ---- the warps that compute ------------------------------------------------------------------------------------------------

template <class Policy>
struct GradientMatmuls : Matmuls<Policy> {
  using Base = Matmuls<Policy>;
  using Element = typename Base::Element;
  // Operands of 64 x 64: rows of both; rows by columns; columns of both.
  using RowsRows = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, _64, _64>, Base::kK, Base::kK>()));
  using RowsColumns = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, _64, _64>, Base::kK, Base::kMN>()));
  using ColumnsColumns = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, _64, _64>, Base::kMN, Base::kMN>()));
};

// The tokens of a thread's two rows, in their order or dealt, and the places of a tile that has them in their order.
struct Tokens {
  int row[2];
  Fragment in_order;

  __device__ Tokens(const Fragment& at, bool dealt) : in_order(at) {
    const auto first_of = [&](int r) { return dealt ? 8 * (r == 0 ? at.warp : 7 - at.warp) : 16 * at.warp + 8 * r; };
    row[0] = first_of(0) + at.lane / 4, row[1] = first_of(1) + at.lane / 4;
    in_order.row_unit = unit_offset(first_of(at.lane / 8 % 2) + at.lane % 8, at.lane / 16);
  }
};

inline __device__ float sum_of_row(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// Sums over the rows of a warp of 16 columns' values; a lane keeps two columns, v[0] and v[1], whose pair it returns.
inline __device__ int sum_of_columns(float (&v)[16]) {
  const int lane = threadIdx.x % 32;
  const auto halve = [&]<int kCount>(std::integral_constant<int, kCount>) {  // each of two lanes keeps kCount of the values
    const bool upper = lane & 2 * kCount;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float given = upper ? v[k] : v[k + kCount], kept = upper ? v[k + kCount] : v[k];
      v[k] = kept + __shfl_xor_sync(~0u, given, 2 * kCount);
    }
  };
  halve(std::integral_constant<int, 8>());
  halve(std::integral_constant<int, 4>());
  halve(std::integral_constant<int, 2>());
  return lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
}

// A warp's part of <G,h>: what its 16 rows of both have on the diagonal of h G^T, on the lanes that `has_diagonal`. Products of
// tensor cores whose other sums are left, an eighth of the instructions that multiplying takes.
template <class NativeElement, int kTiles>
__device__ float multiply_states(const char (*states)[kTileBytes], const char (*adjoints)[kTileBytes], const Fragment& at) {
  using Multiply = std::conditional_t<std::is_same_v<NativeElement, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                      cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  float sum[2][2][4] = {};  // of odd and even steps, so that one needn't wait for the other; rows 0 to 7 and 8 to 15 of G
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) {
      std::uint32_t h[4], G[4];
      at.load(states[tile], j, h);
      at.load(adjoints[tile], j, G);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float (&c)[4] = sum[j % 2][r];
        Multiply::fma(c[0], c[1], c[2], c[3], h[0], h[1], h[2], h[3], G[r], G[r + 2], c[0], c[1], c[2], c[3]);
      }
    }
  const bool odd = at.lane / 4 % 2;
  const auto own = [&](const float (&c)[2][4]) { return odd ? c[0][1] + c[1][3] : c[0][0] + c[1][2]; };
  return own(sum[0]) + own(sum[1]);
}

// Where float4 k of a thread of the warpgroup that has dB or dC of a chunk lies: k * kWarpgroup + thread from here. Sums of
// pieces and splits are kept in the order of accumulators, float4 k of columns 8 k to 8 k + 7, so that each access is as wide
// as can be.
template <int kState>
__device__ std::int64_t kept_sums(const FusedBackwardParams& p, int split, int slot, int group) {
  const std::int64_t block = (std::int64_t{split} * p.slots + slot) * p.ngroups + group;
  return block * (kState / 8 * kWarpgroup);
}

// A tile as kept becomes a matrix operand.
template <class NativeElement>
__device__ void round_kept(char* tile, const std::uint8_t* exponents, const Fragment& at) {
  const float unit[2] = {unit_of(exponents[at.row]), unit_of(exponents[at.row + 8])};
#pragma unroll 1  // as in the loop below: what all roles do for an item has to fit the instruction cache, or all of them wait
  for (int j = 0; j < kTile / 16; ++j) {
    std::uint32_t word[4];
    at.load(tile, j, word);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float pair[2];
      from_fixed_point(word[w], pair);
      pair[0] *= unit[w % 2], pair[1] *= unit[w % 2];
      word[w] = cuda::narrow_word<NativeElement>(pair);
    }
    at.store(tile, j, word);
  }
}

// dy and z become dy silu(z), rounded, and what that takes from it: every kThreads-th run of eight elements.
template <class NativeElement, int kThreads, int kUnroll>
__device__ void gate_tile(char* rows, char* gates, int thread) {
#pragma unroll kUnroll
  for (int unit = thread; unit < kTileBytes / 16; unit += kThreads) {
    const uint4 dy = reinterpret_cast<const uint4*>(rows)[unit], z = reinterpret_cast<const uint4*>(gates)[unit];
    std::uint32_t words[4] = {dy.x, dy.y, dy.z, dy.w}, rests[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float pair[2], gate[2], rounded[2];
      cuda::widen_word<NativeElement>(words[w], pair);
      cuda::widen_word<NativeElement>(rests[w], gate);
      pair[0] *= cuda::fast_silu(gate[0]), pair[1] *= cuda::fast_silu(gate[1]);
      words[w] = cuda::narrow_word<NativeElement>(pair);
      cuda::widen_word<NativeElement>(words[w], rounded);
      const float lost[2] = {pair[0] - rounded[0], pair[1] - rounded[1]};
      rests[w] = cuda::narrow_word<NativeElement>(lost);
    }
    reinterpret_cast<uint4*>(rows)[unit] = make_uint4(words[0], words[1], words[2], words[3]);
    reinterpret_cast<uint4*>(gates)[unit] = make_uint4(rests[0], rests[1], rests[2], rests[3]);
  }
}

// dC or dB: the sum over items of scaled rows of g h, or x G; and for ddt the products of those rows with C, or B.
template <class Policy>
__device__ void project(const FusedBackwardParams& p, GradientStorage<Policy>& shared, bool is_C) {
  using M = GradientMatmuls<Policy>;
  using Storage = GradientStorage<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kTiles = Storage::kTiles, kStages = Storage::kStages;
  constexpr auto _ = cute::_;
  const int thread = threadIdx.x % kWarpgroup;
  const Fragment at(thread);
  const Tokens tokens(at, !is_C);
  typename M::RowsColumns mma;
  const auto mine = mma.get_thread_slice(thread);
  const auto rows =
      mine.partition_fragment_A(M::tensor(is_C ? shared.g : shared.x, typename M::template Rows<kTile, kStages>{}));
  [[maybe_unused]] const auto rest_rows =
      mine.partition_fragment_A(M::tensor(rests_of_g(shared), typename M::template Rows<kTile, kStages>{}));
  const auto states = mine.partition_fragment_B(
      M::tensor(is_C ? shared.states : shared.adjoints, typename M::template Columns<kTile, kStages * kTiles>{}));
  auto product = cute::partition_fragment_C(mma, cute::Shape<_64, _64>{});
  auto sum0 = cute::partition_fragment_C(mma, cute::Shape<_64, _64>{});
  auto sum1 = cute::partition_fragment_C(mma, cute::Shape<_64, _64>{});
  auto& tiles = is_C ? shared.C : shared.B;
  typename M::ColumnsColumns pass_mma;
  const auto passing_of = pass_mma.get_thread_slice(thread);
  const auto other_rows =
      passing_of.partition_fragment_A(M::tensor(shared.other_rows, typename M::template Columns<kTile, 2>{}));
  [[maybe_unused]] const auto other_rests =
      passing_of.partition_fragment_A(M::tensor(rests_of_others(shared), typename M::template Columns<kTile, 2>{}));
  const auto other_projection =
      passing_of.partition_fragment_B(M::tensor(shared.other_projection, typename M::template Columns<kTile, kTiles>{}));

  Ring<kStages> ring, ahead;  // ahead: of the item whose states are made this chunk's
  Ring<2> slots, other;
  // Each warpgroup has a tile of both states; where there is one, the second has what passes a chunk.
  const int own_tile = kTiles == 2 && !is_C;
  const auto round_state = [&](bool is_first) {
    const int stage = ahead.stage;
    shared.full[stage].wait(ahead.parity);
    if ((kTiles == 2 || is_C) && !(is_first && Policy::kFromForward))
      round_kept<NativeElement>((is_first ? shared.states : shared.adjoints)[stage][own_tile],
                                (is_first ? shared.state_exponents : shared.adjoint_exponents)[stage][own_tile], at);
    if constexpr (Policy::kGated) {
      const int of_both = thread + is_C * kWarpgroup;
      char *const rows = shared.other_rows[other.stage], *const rests = shared.other_z[other.stage];
      const WalkSteps& steps = shared.other_steps[other.stage];
      shared.other_loaded[other.stage].wait(other.parity);
      if (is_first) weight_tile<NativeElement, 2 * kWarpgroup, 1, true, true>(rows, steps, of_both, rests, rests);
      else weight_tile<NativeElement, 2 * kWarpgroup, 1, true>(rows, steps, of_both, rests);
      cutlass::arch::fence_view_async_shared();
      shared.other_full[other.stage].arrive();
    }
  };
  const auto pass_state = [&](bool is_first) {
    const int stage = ahead.stage;
    auto& passing = is_first ? shared.adjoints : shared.states;
    auto& passing_exponents = is_first ? shared.adjoint_exponents : shared.state_exponents;
    if (kTiles == 2 || !is_C) {
      shared.other_full[other.stage].wait(other.parity);
      float unit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        unit[r] = shared.other_steps[other.stage].total * unit_of(passing_exponents[stage][own_tile][at.row + 8 * r]);
#pragma unroll
      for (int j = 0; j < kTile / 16; ++j) {
        std::uint32_t word[4];
        at.load(passing[stage][own_tile], j, word);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float count[2];
          if constexpr (Policy::kFromForward) read_kept<NativeElement>(word[w], !is_first, count);
          else from_fixed_point(word[w], count);
          product(8 * j + 2 * w) = count[0] * unit[w % 2], product(8 * j + 2 * w + 1) = count[1] * unit[w % 2];
        }
      }
      cute::warpgroup_fence_operand(product);
      cute::warpgroup_arrive();
      issue<false>(pass_mma, other_rows(_, _, _, other.stage), other_projection(_, _, _, own_tile), product);
      if constexpr (Policy::kGated)
        issue<false>(pass_mma, other_rests(_, _, _, other.stage), other_projection(_, _, _, own_tile), product);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(product);
      shared.other_empty[other.stage].arrive();
#pragma unroll
      for (int j = 0; j < kTile / 16; ++j) at.store<NativeElement>(passing[stage][own_tile], j, product);
    }
    cutlass::arch::fence_view_async_shared();
    shared.passed[stage].arrive();
    ahead.advance(), other.advance();
  };
  for_each_task<Policy>(p, [&](const GradientTask& task, int parity) {
#pragma unroll
    for (int v = 0; v < kTile / 2; ++v) sum0(v) = sum1(v) = 0.0f;
    shared.projections_full.wait(parity);
    if (task.begin < task.end) round_state(task.is_first()), pass_state(task.is_first());
    for (int item = task.begin; item < task.end; ++item, ring.advance(), slots.advance()) {
      const int stage = ring.stage;
      shared.passed[stage].wait(ring.parity);
      const GradientSteps& steps = shared.steps[stage];
      float dot[2] = {}, scale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = tokens.row[r];
        if constexpr (Policy::kRare) scale[r] = is_C ? steps.enter[row] : steps.dt[row] * steps.to_end[row];
        else scale[r] = (is_C ? steps.enter : steps.leave)[row];
      }
      const auto add_tile = [&](int tile, auto& sum) {
        cute::warpgroup_fence_operand(product);
        cute::warpgroup_arrive();
        issue<true>(mma, rows(_, _, _, stage), states(_, _, _, stage * kTiles + tile), product);
        if constexpr (Policy::kGated)
          if (is_C) {
            cute::warpgroup_arrive();
            issue<false>(mma, rest_rows(_, _, _, stage), states(_, _, _, stage * kTiles + tile), product);
          }
        if (tile == 0 && item + 1 < task.end) round_state(task.is_first());  // waits for no matmul
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(product);
#pragma unroll
        for (int j = 0; j < kTile / 16; ++j) {
          std::uint32_t word[4];
          at.load(tiles[tile], j, word);
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            float pair[2];
            cuda::widen_word<NativeElement>(word[w], pair);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int v = 8 * j + 2 * w + c;
              dot[w % 2] = fmaf(pair[c], product(v), dot[w % 2]);
              sum(v) = fmaf(scale[w % 2], product(v), sum(v));
            }
          }
        }
      };
      add_tile(0, sum0);
      if (item + 1 < task.end) pass_state(task.is_first());
      if constexpr (kTiles == 2) add_tile(1, sum1);
      shared.empty[stage].arrive();
#pragma unroll
      for (int r = 0; r < 2; ++r) dot[r] = sum_of_row(dot[r]);
      shared.sums_empty[slots.stage].wait(slots.parity ^ 1);
      GradientSums& found = shared.sums[slots.stage];
      if (at.lane % 4 == 0)
#pragma unroll
        for (int r = 0; r < 2; ++r) (is_C ? found.dot_C : found.dot_B)[tokens.row[r]] = dot[r];
      shared.sums_full[slots.stage].arrive();
    }

    // What the pieces before this one have come to.
    const bool is_wanted = is_C ? p.has_dC : p.has_dB;
    float4* const kept =
        (is_C ? p.dC_sums : p.dB_sums) + kept_sums<Policy::kState>(p, task.split, task.slot, task.group) + thread;
    const auto add_kept = [&](auto& sum, int tile) {
      float4 before[kTile / 8];
#pragma unroll
      for (int k = 0; k < kTile / 8; ++k) before[k] = kept[(tile * (kTile / 8) + k) * kWarpgroup];
#pragma unroll
      for (int k = 0; k < kTile / 8; ++k)
        sum(4 * k) += before[k].x, sum(4 * k + 1) += before[k].y, sum(4 * k + 2) += before[k].z, sum(4 * k + 3) += before[k].w;
    };
    if (is_wanted && !p.part.is_first) {
      add_kept(sum0, 0);
      if constexpr (kTiles == 2) add_kept(sum1, 1);
    }
    // What the heads have in common is multiplied once.
    shared.weights_full.wait(parity);
    const auto add_common = [&](auto& sum, int tile) {
      cute::warpgroup_fence_operand(sum);
      if (is_C) {
        typename M::ColumnsColumns common;
        const auto slice = common.get_thread_slice(thread);
        const auto weights = slice.partition_fragment_A(M::tensor(shared.dx, typename M::template Columns<kTile, 1>{}));
        const auto others = slice.partition_fragment_B(M::tensor(shared.B, typename M::template Columns<kTile, kTiles>{}));
        cute::warpgroup_arrive();
        issue<false>(common, weights(_, _, _, 0), others(_, _, _, tile), sum);
      } else {
        const auto weights = mine.partition_fragment_A(M::tensor(shared.dx, typename M::template Rows<kTile, 1>{}));
        const auto others = mine.partition_fragment_B(M::tensor(shared.C, typename M::template Columns<kTile, kTiles>{}));
        cute::warpgroup_arrive();
        issue<false>(mma, weights(_, _, _, 0), others(_, _, _, tile), sum);
      }
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(sum);
    };
    add_common(sum0, 0);
    if constexpr (kTiles == 2) add_common(sum1, 1);
    shared.weights_empty.arrive();
    if (is_wanted && p.keeps_sums) {
      const auto keep = [&](const auto& sum, int tile) {
#pragma unroll
        for (int k = 0; k < kTile / 8; ++k)
          kept[(tile * (kTile / 8) + k) * kWarpgroup] = make_float4(sum(4 * k), sum(4 * k + 1), sum(4 * k + 2), sum(4 * k + 3));
      };
      keep(sum0, 0);
      if constexpr (kTiles == 2) keep(sum1, 1);
    } else if (is_wanted) {
      // Out by way of the tiles of B and C, once both warpgroups are through with them, as they lie in memory.
      if (p.has_dB && p.has_dC) cutlass::arch::NamedBarrier::sync(2 * kWarpgroup, 2);
      else if (Policy::kRare) cutlass::arch::NamedBarrier::sync(kWarpgroup, 3 + is_C);
      Fragment in_memory = tokens.in_order;
      if (task.span.reverse) in_memory.row_unit ^= 56 * 128;
#pragma unroll
      for (int j = 0; j < kTile / 16; ++j) {
        in_memory.store<NativeElement>(tiles[0], j, sum0);
        if constexpr (kTiles == 2) in_memory.store<NativeElement>(tiles[1], j, sum1);
      }
      cutlass::arch::fence_view_async_shared();
      cutlass::arch::NamedBarrier::sync(kWarpgroup, 3 + is_C);
      if (thread == 0) {
        CUtensorMap TokenMaps::* const to = is_C ? &TokenMaps::dC : &TokenMaps::dB;
        const CUtensorMap& map = task.span.template maps_of<Policy::kRare>(p, task.chunk, to).*to;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          cute::SM90_TMA_STORE_4D::copy(&map, tiles[tile], tile * kTile, task.group, task.first_token(), task.span.batch);
        cute::tma_store_arrive();
        cute::tma_store_wait<0>();
      }
    }
    shared.projections_empty.arrive();
  });
}

// The words of a tile of dx as the call for other states left it, or of what changes no bit of a sum: -0. A warp stores the
// rows that it has loaded here.
inline __device__ void load_before(const FusedBackwardParams& p, const GradientTask& task, int head, int channel,
                                   const Tokens& tokens, std::uint32_t (&words)[kTile / 16][4]) {
  const GradientView& t = p.dx_before;
#pragma unroll
  for (auto& of_rows : words)
#pragma unroll
    for (std::uint32_t& word : of_rows) word = 0x80008000;
  if (!t.data) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = task.span.place_of(task.chunk) * kTile + memory_of_row(task.span.reverse, tokens.row[r]);
    const char* from = t.data + task.span.batch * t.batch + (task.span.first + token) * t.token + head * t.head;
    const int left = token < task.span.length ? p.headdim - channel - tokens.in_order.column : 0;
#pragma unroll
    for (int k = 0; k < kTile / 8; ++k) {
      const char* pair = from + 2 * (channel + tokens.in_order.column + 8 * k);
      std::uint32_t& word = words[k / 2][k % 2 * 2 + r];
      if (8 * k + 1 < left) word = *reinterpret_cast<const std::uint32_t*>(pair);
      else if (8 * k < left) word = *reinterpret_cast<const std::uint16_t*>(pair);
    }
  }
}

// What lies inside the chunk: dx, the sums of W for ddt, and the sum over items of T L dt. Values are [j][i], j as dealt.
template <class Policy>
__device__ void combine(const FusedBackwardParams& p, GradientStorage<Policy>& shared) {
  using M = GradientMatmuls<Policy>;
  using Storage = GradientStorage<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kState = Policy::kState, kStages = Storage::kStages, kValues = kTile / 2;
  constexpr auto _ = cute::_;
  const int thread = threadIdx.x % kWarpgroup;
  const Fragment at(thread);
  const Tokens tokens(at, true);
  const int (&token)[2] = tokens.row;
  // Value 4 k + 2 r + c is of tokens of which the scan meets i so many after j: 8 k - limit[r][c]. What is i < j of all warps
  // is left out: r = 1, k < 4.
  const bool reverse = goes_in_reverse<Policy>(p);
  const auto limit_of = [&](int r, int c) { return to_row(reverse, token[r]) - to_row(reverse, at.column + c); };
  const int limit[2][2] = {{limit_of(0, 0), limit_of(0, 1)}, {limit_of(1, 0), limit_of(1, 1)}};
  constexpr auto is_none = [](int k, int r) { return r == 1 && k < 4; };
  constexpr auto is_all = [](int k, int r) { return r == 0 && k >= 4; };
  // A row's value on the diagonal, for the thread of its four that has it.
  const bool has_diagonal = at.lane % 4 == at.lane / 8;
  const auto on_diagonal = [&](const auto& values, int r) {
    float found = 0.0f;
#pragma unroll
    for (int k = 4 * r; k < 4 * r + 4; ++k) {
      const float value = at.lane / 4 % 2 == 0 ? values(4 * k + 2 * r) : values(4 * k + 2 * r + 1);
      found = k == (r == 0 ? at.warp : 7 - at.warp) ? value : found;
    }
    return found;
  };

  typename M::RowsRows rows_mma;
  typename M::Output output_mma;
  const auto rows_of = rows_mma.get_thread_slice(thread);
  const auto x_rows = rows_of.partition_fragment_A(M::tensor(shared.x, typename M::template Rows<kTile, kStages>{}));
  const auto g_rows = rows_of.partition_fragment_B(M::tensor(shared.g, typename M::template Rows<kTile, kStages>{}));
  const auto B_rows = rows_of.partition_fragment_A(M::tensor(shared.B, typename M::template Rows<kState, 1>{}));
  const auto C_rows = rows_of.partition_fragment_B(M::tensor(shared.C, typename M::template Rows<kState, 1>{}));
  const auto adjoint_rows =
      rows_of.partition_fragment_B(M::tensor(shared.adjoints, typename M::template Rows<kState, kStages>{}));
  const auto g_columns = output_mma.get_thread_slice(thread).partition_fragment_B(
      M::tensor(shared.g, typename M::template Columns<kTile, kStages>{}));
  [[maybe_unused]] const auto rest_rows =
      rows_of.partition_fragment_B(M::tensor(rests_of_g(shared), typename M::template Rows<kTile, kStages>{}));
  [[maybe_unused]] const auto rest_columns = output_mma.get_thread_slice(thread).partition_fragment_B(
      M::tensor(rests_of_g(shared), typename M::template Columns<kTile, kStages>{}));
  auto scores = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});   // S
  auto weights = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});  // sum over items of T L dt
  auto pairs = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});    // T
  auto dx = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});       // [j][p]
  auto masked = cute::make_tensor<typename M::Element>(cute::partition_shape_A(output_mma, cute::Shape<_64, _64>{}));
  auto masked_words = cute::recast<std::uint32_t>(masked);

  Ring<kStages> ring;
  Ring<2> slots;
  [[maybe_unused]] const auto gate = [&](const Ring<kStages>& of) {
    if constexpr (Policy::kGated) {
      shared.full[of.stage].wait(of.parity);
      gate_tile<NativeElement, kWarpgroup, Policy::kRare ? 1 : 2>(shared.g[of.stage], shared.z[of.stage], thread);
      cutlass::arch::fence_view_async_shared();
      shared.passed[of.stage].arrive();
    }
  };
  for_each_task<Policy>(p, [&](const GradientTask& task, int parity) __attribute__((always_inline)) {
    if (task.begin < task.end) gate(ring);
    shared.projections_full.wait(parity);
    const int first_token = task.first_token();
    const CUtensorMap& dx_map = task.span.template maps_of<Policy::kRare>(p, task.chunk, &TokenMaps::dx_eights).dx_eights;
    cute::warpgroup_fence_operand(scores);
    cute::warpgroup_arrive();
    issue<true>(rows_mma, B_rows(_, _, _, 0), C_rows(_, _, _, 0), scores);
#pragma unroll
    for (int v = 0; v < kValues; ++v) weights(v) = 0.0f;
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    const float own_score[2] = {on_diagonal(scores, 0), on_diagonal(scores, 1)};
    // What rounding takes from these: most of what dx is off by but for its own rounding, of which there are two then.
    [[maybe_unused]] float lost[2];
    if constexpr (Policy::kRare) {
      float rounded[2];
      cuda::widen_word<NativeElement>(cuda::narrow_word<NativeElement>(own_score), rounded);
#pragma unroll
      for (int r = 0; r < 2; ++r) lost[r] = __shfl_sync(~0u, own_score[r] - rounded[r], at.lane / 4 * 4 + at.lane / 8);
    }

    for (int item = task.begin; item < task.end; ++item, ring.advance(), slots.advance()) {
      const int stage = ring.stage;
      shared.full[stage].wait(ring.parity);
      shared.passed[stage].wait(ring.parity);
      cute::warpgroup_fence_operand(pairs);
      cute::warpgroup_fence_operand(dx);
      cute::warpgroup_arrive();
      issue<true>(rows_mma, x_rows(_, _, _, stage), g_rows(_, _, _, stage), pairs);
      if constexpr (Policy::kGated) issue<false>(rows_mma, x_rows(_, _, _, stage), rest_rows(_, _, _, stage), pairs);
      issue<true>(rows_mma, B_rows(_, _, _, 0), adjoint_rows(_, _, _, stage), dx);

      const GradientSteps& steps = shared.steps[stage];
      float log_j[2], dt_j[2], to_end[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        log_j[r] = steps.log_decay[token[r]], dt_j[r] = steps.dt[token[r]], to_end[r] = steps.to_end[token[r]];
      const float product = multiply_states<NativeElement, Storage::kTiles>(shared.states[stage], shared.adjoints[stage], at);
      const float whole = sum_of_warp(has_diagonal ? product : 0.0f);
      shared.sums_empty[slots.stage].wait(slots.parity ^ 1);
      GradientSums& sums = shared.sums[slots.stage];
      if (at.lane == 0) sums.whole[at.warp] = whole;
      float strictly_below[2] = {};  // the sum of W over i > j
      float before[kTile / 4] = {};  // value 2 k + c: column 8 k + `column` + c
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(pairs);
#pragma unroll
      for (int k = 0; k < kTile / 8; ++k) {
        const float2 log_i = load2(steps.log_decay + 8 * k + at.column);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          std::uint32_t& word = masked_words(k / 2 * 4 + k % 2 * 2 + r);
          if (is_none(k, r)) {
            word = 0;
            continue;
          }
          float masked_scores[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int v = 4 * k + 2 * r + c;
            const float L = fast_exp2((c == 0 ? log_i.x : log_i.y) - log_j[r]);
            const int place = Policy::kRare ? 8 * k : 8 * k + c, &least = limit[r][Policy::kRare ? c : 0];
            const bool reaches = is_all(k, r) || place >= least, is_later = is_all(k, r) || place > least;
            const float weight = reaches ? pairs(v) * L : 0.0f;  // what lies before j may be anything
            masked_scores[c] = reaches ? scores(v) * L : 0.0f;
            const float W = is_later ? scores(v) * weight : 0.0f;
            weights(v) = fmaf(weight, dt_j[r], weights(v));
            strictly_below[r] += W;
            before[2 * k + c] = fmaf(dt_j[r], W, before[2 * k + c]);
          }
          word = cuda::narrow_word<NativeElement>(masked_scores);
        }
      }
      const float own[2] = {on_diagonal(pairs, 0), on_diagonal(pairs, 1)};
      const int head = task.head_of(p, item), channel = task.channel_of(p, item);
      [[maybe_unused]] std::uint32_t before_words[kTile / 16][4];
      if constexpr (Policy::kRare) load_before(p, task, head, channel, tokens, before_words);
      const int columns = sum_of_columns(before);
      store2(sums.before[at.warp] + 8 * columns, at.column / 2, before[0], before[1]);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(dx);
#pragma unroll
      for (int v = 0; v < kValues; ++v) dx(v) *= to_end[v / 2 % 2];
      cute::warpgroup_fence_operand(dx);
      cute::warpgroup_fence_operand(masked);
      cute::warpgroup_arrive();
      issue<false>(output_mma, masked, g_columns(_, _, _, stage), dx);
      if constexpr (Policy::kGated) issue<false>(output_mma, masked, rest_columns(_, _, _, stage), dx);

#pragma unroll
      for (int r = 0; r < 2; ++r) {
        strictly_below[r] = sum_of_row(strictly_below[r]);
        if (!has_diagonal) continue;
        sums.diagonal[token[r]] = own[r];
        sums.below[token[r]] = fmaf(own_score[r], own[r], strictly_below[r]);
        sums.strictly_below[token[r]] = strictly_below[r];
      }
      shared.sums_full[slots.stage].arrive();
      std::uint32_t g_words[kTile / 16][4];
      [[maybe_unused]] std::uint32_t rest_words[kTile / 16][4];
#pragma unroll
      for (int b = 0; b < kTile / 16; ++b) {
        tokens.in_order.load(shared.g[stage], b, g_words[b]);
        if constexpr (Policy::kGated && !Policy::kRare) tokens.in_order.load(shared.z[stage], b, rest_words[b]);
      }
      const float D_of_head = steps.D;
      char* const tile = shared.dx;
      if (item == task.begin) shared.weights_empty.wait(parity ^ 1);
      else if (at.lane == 0) cute::tma_store_wait<0>();  // the one before has left it
      if (p.adjoints_in_dx && at.lane == 0) shared.both_full[stage].wait(ring.parity);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(dx);
      cute::warpgroup_fence_operand(masked);
      if constexpr (!Policy::kRare) shared.empty[stage].arrive();
      __syncwarp();
#pragma unroll
      for (int b = 0; b < kTile / 16; ++b) {
        if constexpr (Policy::kGated && Policy::kRare) tokens.in_order.load(shared.z[stage], b, rest_words[b]);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float pair[2];
          cuda::widen_word<NativeElement>(g_words[b][w], pair);
          if constexpr (Policy::kGated) {
            float rest[2];
            cuda::widen_word<NativeElement>(rest_words[b][w], rest);
            pair[0] += rest[0], pair[1] += rest[1];
          }
          [[maybe_unused]] float before_pair[2];
          if constexpr (Policy::kRare) cuda::widen_word<NativeElement>(before_words[b][w], before_pair);
          float2 D = {D_of_head, D_of_head};
          if constexpr (Policy::kRare) D = load2(steps.leave + 16 * b + w / 2 * 8 + at.column);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int v = 8 * b + 2 * w + c;
            if constexpr (Policy::kRare) {
              if (p.of_side) dx(v) = fmaf(lost[w % 2], pair[c], dx(v));
              dx(v) = fmaf(dx(v), dt_j[w % 2], before_pair[c]);
            } else {
              dx(v) *= dt_j[w % 2];
            }
            if (p.D.data) dx(v) = fmaf(c == 0 ? D.x : D.y, pair[c], dx(v));
          }
        }
        at.store<NativeElement>(tile, b, dx);
      }
      if constexpr (Policy::kRare) shared.empty[stage].arrive();  // D is in the steps
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (p.has_dx && at.lane == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
          cute::SM90_TMA_STORE_4D::copy(&dx_map, tile + (2 * at.warp + r) * (kTileBytes / 8), channel, head,
                                        first_token + memory_of_row(reverse, token[r]), task.span.batch);
        cute::tma_store_arrive();
      }
      if constexpr (Policy::kGated) {
        __syncwarp();
        Ring<kStages> next = ring;
        next.advance();
        if (item + 1 < task.end) gate(next);
      }
    }
    if (at.lane == 0) cute::tma_store_wait<0>();
    __syncwarp();
    if (task.begin == task.end) shared.weights_empty.wait(parity ^ 1);
#pragma unroll
    for (int b = 0; b < kTile / 16; ++b) at.store<NativeElement>(shared.dx, b, weights);
    cutlass::arch::fence_view_async_shared();
    shared.weights_full.arrive();
  });
  if (at.lane == 0) cute::tma_store_wait<0>();
}

// Math     dB or dC of a chunk = sum over the splits
// Shapes   sums of each split as its warpgroup holds them, [slots,g] of [64,n]; dB, dC [b,l,g,n]
// Traffic  read the sums of every split, write the gradient
// Launch   four blocks for each chunk, group and gradient
// Numerics float32, the splits in order
template <class Policy>
__global__ void __launch_bounds__(kWarpgroup) ssd_scan_fused_split_sum_kernel(const __grid_constant__ FusedSplitSumParams p) {
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  cuda::let_next_kernel_in();
  cuda::wait_for_earlier_kernels();
  const int quarter = blockIdx.x % 4;
  const bool is_C = blockIdx.x / 4 % 2;
  const GradientView& gradient = is_C ? p.dC : p.dB;
  if (!gradient.data) return;
  const int group = static_cast<int>(blockIdx.x / 8 % p.ngroups), slot = static_cast<int>(blockIdx.x / 8 / p.ngroups);
  const Fragment at(threadIdx.x);
  constexpr int kCount = Policy::kState / 8;
  const std::int64_t step = std::int64_t{p.slots} * p.ngroups * kCount * kWarpgroup;  // from split to split
  const float4* const sums =
      (is_C ? p.dC_sums : p.dB_sums) + (std::int64_t{slot} * p.ngroups + group) * kCount * kWarpgroup + threadIdx.x;
  const Tokens tokens(at, !is_C);
  PackedChunk chunk{0, 0, static_cast<int>(p.seqlen), slot % p.chunks};
  char* to = gradient.data + group * gradient.head;
  if (p.packed_chunks) {
    if (static_cast<unsigned>(slot) >= *p.packed_count) return;
    chunk = p.packed_chunks[slot];
  } else {
    to += (p.first_batch + slot / p.chunks) * gradient.batch;
  }
  const int place = p.reverse ? (chunk.length - 1) / kTile - chunk.chunk : chunk.chunk;
  const std::int64_t first = chunk.first + place * kTile, end = chunk.first + chunk.length;
  float4 sum[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) sum[i] = sums[(quarter * (kCount / 4) + i) * kWarpgroup];
  for (int split = 1; split < p.splits; ++split)
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const float4 v = sums[split * step + (quarter * (kCount / 4) + i) * kWarpgroup];
      sum[i].x += v.x, sum[i].y += v.y, sum[i].z += v.z, sum[i].w += v.w;
    }
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const int column = 8 * (quarter * (kCount / 4) + i) + at.column;
    if (column >= p.dstate) break;
    const float pairs[2][2] = {{sum[i].x, sum[i].y}, {sum[i].z, sum[i].w}};
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (const std::int64_t token = first + memory_of_row(p.reverse, tokens.row[r]); token < end)
        *reinterpret_cast<std::uint32_t*>(to + token * gradient.token + column * sizeof(NativeElement)) =
            cuda::narrow_word<NativeElement>(pairs[r]);
  }
}

}  // namespace fused

template <class Policy>
__global__ void __launch_bounds__(128 * fused::kGradientWarpgroups, 1)
    ssd_scan_fused_gradient_kernel(const __grid_constant__ FusedBackwardParams p) {
  using namespace fused;
  using Storage = GradientStorage<Policy>;
  constexpr int kProducerRegisters = 40, kProjectRegisters = 136, kCombineRegisters = 200;  // 512 in all
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  static_assert(sizeof(Storage) <= kMostSharedBytes);
  auto& shared = *reinterpret_cast<Storage*>(shared_bytes);
  if (threadIdx.x == 0) {
    shared.projections_full.init(1);
    shared.projections_empty.init(2 * kWarpgroup);
    shared.weights_full.init(kWarpgroup);
    shared.weights_empty.init(2 * kWarpgroup);
    for (int stage = 0; stage < Storage::kStages; ++stage) {
      shared.full[stage].init(1 + 32);  // the tiles, and the steps
      shared.passed[stage].init((Policy::kGated ? 3 : 2) * kWarpgroup);
      shared.empty[stage].init(3 * kWarpgroup + 32);  // and the warp that finishes ddt
      shared.both_full[stage].init(2);
    }
    for (int slot = 0; slot < 2; ++slot) {
      shared.sums_full[slot].init(3 * kWarpgroup);
      shared.sums_empty[slot].init(32);
      shared.other_loaded[slot].init(1);
      shared.other_full[slot].init(Policy::kGated ? 2 * kWarpgroup : 32);
      shared.other_empty[slot].init(Storage::kTiles * kWarpgroup);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Policy::kFromForward) {  // whose exponents nobody loads
    auto* const exponents = reinterpret_cast<std::uint8_t*>(shared.state_exponents);
    for (unsigned i = threadIdx.x; i < sizeof(shared.state_exponents); i += blockDim.x) exponents[i] = kExponentOfElements;
  }
  cuda::sync_cluster();
  cuda::let_next_kernel_in();
  cuda::wait_for_earlier_kernels();
  switch (cutlass::canonical_warp_group_idx()) {
    case 0:
      cutlass::arch::warpgroup_reg_alloc<kCombineRegisters>();
      combine<Policy>(p, shared);
      break;
    case 1:
    case 2:
      cutlass::arch::warpgroup_reg_alloc<kProjectRegisters>();
      project<Policy>(p, shared, cutlass::canonical_warp_group_idx() == 1);
      break;
    default:
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
      GradientRing<Policy> ring;
      Ring<2> slots;
      switch (cutlass::canonical_warp_idx_sync() % 4) {
        case 0:
          if (cute::elect_one_sync())
            for_each_task<Policy>(p, [&](const GradientTask& task, int) { load_items<Policy>(p, task, shared, ring); });
          break;
        case 1:
          for_each_task<Policy>(p, [&](const GradientTask& task, int) { prepare_items<Policy>(p, task, shared, ring); });
          break;
        case 2:
          for_each_task<Policy>(p, [&](const GradientTask& task, int) { finish_steps<Policy>(p, task, shared, ring, slots); });
          break;
        case 3:
          for_each_task<Policy>(p, [&](const GradientTask& task, int parity) {
            if (cute::elect_one_sync()) load_projections<Policy>(p, task, parity, shared);
            __syncwarp();
            weight_others<Policy>(p, task, shared, slots);
          });
          break;
      }
  }
  __syncwarp();
  cuda::sync_cluster();  // the other block may still arrive here
}

}  // namespace statescan::ssd_scan
