// ssd_scan backward on sm_90a, the walks: states that enter the chunks, and adjoints of the states that leave them
// Math     with s the sums of dt A in a chunk, end its last token, h the state before the chunk, G the adjoint after it:
//          forward  keep h, then h = exp(s[end]) h + sum_j dt[j] exp(s[end] - s[j]) x[j] B[j]^T
//          backward keep G, then G = exp(s[end]) G + sum_i exp(s[i]) dy[i] C[i]^T
// Shapes   h, G [p,n] of each head in float32 registers, kept as 16-bit elements; p in slices of 64
// Traffic  read x, dy, dt once, B, C once per pair of slices; write h and G of every chunk
//          Floor of B8 L2048 H80 P64 N128 bf16: 1.01 GB, 0.34 ms
// Launch   a block for each direction and pair of slices of a sequence: two warpgroups of a slice each, and one that loads
// Numerics float32 sums; weighted x and dy rounded to the element type as matrix operands; fixed order
#pragma once

#include "fused_bwd_steps.cuh"

namespace statescan::ssd_scan {

namespace fused {

template <class Policy>
struct WalkStorage {
  static constexpr int kStages = 4, kTiles = Policy::kState / kTile;
  using Tile = char[kTileBytes];
  alignas(1024) Tile projection[kStages][kTiles];  // B, or C
  alignas(1024) Tile rows[kStages][2];             // x, or dy, of each slice
  alignas(1024) Tile kept[2][2][kTiles];           // of each consumer two, by turns
  Steps steps[kStages][2];                         // weight and total
  alignas(8) Barrier full[kStages], empty[kStages];
};

struct WalkTask {
  bool backward;
  int batch, group, first_item;  // item: within the part's items of the group
  int group_of_part;

  __device__ WalkTask(const FusedBackwardParams& p, unsigned index) {
    backward = index >= p.walks;
    const unsigned walk = backward ? index - p.walks : index;
    const int pair = static_cast<int>(walk % static_cast<unsigned>(p.pairs_per_group * p.part.groups));
    batch = static_cast<int>(walk / static_cast<unsigned>(p.pairs_per_group * p.part.groups));
    group_of_part = pair / p.pairs_per_group;
    group = p.part.first_group + group_of_part;
    first_item = pair % p.pairs_per_group * 2;
  }

  __device__ bool has_item(const FusedBackwardParams& p, int which) const { return first_item + which < p.part.items; }
  __device__ int head_of(const FusedBackwardParams& p, int which) const {
    return group * p.heads_per_group + (p.part.first_item + first_item + which) / p.slices;
  }
  __device__ int channel_of(const FusedBackwardParams& p, int which) const {
    return (p.part.first_item + first_item + which) % p.slices * kTile;
  }
  __device__ int chunk_of(const FusedBackwardParams& p, int i) const { return backward ? p.chunks - 1 - i : i; }
};

template <class Policy>
__device__ void load_walk(const FusedBackwardParams& p, const WalkTask& task, WalkStorage<Policy>& shared) {
  constexpr int kTiles = WalkStorage<Policy>::kTiles;
  const CUtensorMap& rows = task.backward ? p.dy : p.x;
  const CUtensorMap& projection = task.backward ? p.C : p.B;
  const int slices = task.has_item(p, 1) ? 2 : 1;
  Ring<WalkStorage<Policy>::kStages> ring;
  for (int i = 0; i < p.chunks; ++i, ring.advance()) {
    const int stage = ring.stage, token = task.chunk_of(p, i) * kTile;
    shared.empty[stage].wait(ring.parity ^ 1);
    Barrier& full = shared.full[stage];
    full.arrive_and_expect_tx(kTileBytes * (kTiles + slices));
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      load_tile(projection, full, shared.projection[stage][k], k * kTile, task.group, token, task.batch);
    for (int which = 0; which < slices; ++which)
      load_tile(rows, full, shared.rows[stage][which], task.channel_of(p, which), task.head_of(p, which), token, task.batch);
  }
}

// One warp per slice.
template <class Policy>
__device__ void prepare_walk(const FusedBackwardParams& p, const WalkTask& task, WalkStorage<Policy>& shared, int which) {
  const int lane = threadIdx.x % 32;
  const StepReader reader(p, task.batch, task.head_of(p, task.has_item(p, which) ? which : 0));
  // Raw steps of the chunks to come: a load from memory takes longer than a chunk.
  constexpr int kAhead = 4;
  std::uint32_t next[kAhead][2] = {};
#pragma unroll
  for (int k = 0; k < kAhead; ++k)
    if (k < p.chunks) reader.fetch(p, task.chunk_of(p, k), next[k]);
  Ring<WalkStorage<Policy>::kStages> ring;
  for (int i = 0; i < p.chunks; ++i, ring.advance()) {
    const LaneSteps s = scan_steps(p, task.chunk_of(p, i), reader.A, reader.bias, next[0]);
#pragma unroll
    for (int k = 0; k < kAhead - 1; ++k) next[k][0] = next[k + 1][0], next[k][1] = next[k + 1][1];
    if (i + kAhead < p.chunks) reader.fetch(p, task.chunk_of(p, i + kAhead), next[kAhead - 1]);
    shared.empty[ring.stage].wait(ring.parity ^ 1);
    Steps& steps = shared.steps[ring.stage][which];
    float weight[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      weight[k] = task.backward ? fast_exp2(s.log_decay[k]) : s.dt[k] * fast_exp2(s.total - s.log_decay[k]);
    store2(steps.weight, lane, weight[0], weight[1]);
    if (lane == 0) steps.total = fast_exp2(s.total);
    shared.full[ring.stage].arrive();
  }
}

// Keeps the state of a slice before each chunk, or its adjoint after.
template <class Policy>
__device__ void walk(const FusedBackwardParams& p, const WalkTask& task, WalkStorage<Policy>& shared, int which) {
  using M = Matmuls<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kState = Policy::kState, kStages = WalkStorage<Policy>::kStages, kStateValues = kState / 2;
  const int thread = threadIdx.x % kWarpgroup;
  const Fragment at(thread);
  const auto sync = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + which); };
  Ring<kStages> ring;
  if (!task.has_item(p, which)) {
    for (int i = 0; i < p.chunks; ++i, ring.advance()) {
      shared.full[ring.stage].wait(ring.parity);
      shared.empty[ring.stage].arrive();
    }
    return;
  }
  typename M::Update update_mma;
  auto state = cute::partition_fragment_C(update_mma, cute::Shape<_64, cute::Int<kState>>{});
  auto weighted = cute::make_tensor<typename M::Element>(cute::partition_shape_A(update_mma, cute::Shape<_64, _64>{}));
  auto weighted_words = cute::recast<std::uint32_t>(weighted);
  const auto projection_columns = update_mma.get_thread_slice(thread).partition_fragment_B(
      M::tensor(shared.projection, typename M::template Columns<kState, kStages>{}));
  constexpr auto _ = cute::_;

  const int head = task.head_of(p, which), channel = task.channel_of(p, which);
  const auto slice_of = [&](const StateView& t) { return SliceOfState<kState>(p, t, task.batch, head, channel, at); };
#pragma unroll
  for (int v = 0; v < kStateValues; ++v) state(v) = 0.0f;
  const StateView& from = task.backward ? p.dfinal_state : p.initial_state;
  if (from.data) load_state(state, slice_of(from));

  const CUtensorMap& kept = task.backward ? p.adjoints : p.states;
  const int item = task.group_of_part * p.part.items + task.first_item + which;
  // Weighted rows of a chunk, as a matrix operand, and its decay.
  float total = 1.0f;
  std::uint32_t words[kTile / 4];
  const auto enter_chunk = [&](int stage, int parity) {
    shared.full[stage].wait(parity);
    WeightedColumns<NativeElement> rows;
    rows.load(shared.rows[stage][which], shared.steps[stage][which], at);
    total = shared.steps[stage][which].total;
#pragma unroll
    for (int k = 0; k < kTile / 4; ++k) words[k] = rows.weighted(k);
  };
  enter_chunk(ring.stage, ring.parity);
  for (int i = 0; i < p.chunks; ++i) {
    const int stage = ring.stage, slot = i % 2;
    if (thread == 0) cute::tma_store_wait<1>();  // the one before the last has left its tiles
    sync();
#pragma unroll
    for (int j = 0; j < kState / 16; ++j) at.store<NativeElement>(shared.kept[which][slot][0], j, state);
    cutlass::arch::fence_view_async_shared();
    sync();
    if (thread == 0) {
      const int place = task.batch * p.chunks + task.chunk_of(p, i);
#pragma unroll
      for (int k = 0; k < kState / kTile; ++k)
        cute::SM90_TMA_STORE_4D::copy(&kept, shared.kept[which][slot][k], k * kTile, item, 0, place);
      cute::tma_store_arrive();
    }

#pragma unroll
    for (int v = 0; v < kStateValues; ++v) state(v) *= total;
#pragma unroll
    for (int k = 0; k < kTile / 4; ++k) weighted_words(k) = words[k];
    cute::warpgroup_fence_operand(weighted);
    cute::warpgroup_fence_operand(state);
    cute::warpgroup_arrive();
    issue<false>(update_mma, weighted, projection_columns(_, _, _, stage), state);
    ring.advance();
    // Nothing beside the matmul: ptxas gives the registers of its operand to whatever comes after it, waited for or not.
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(state);
    if (i + 1 < p.chunks) enter_chunk(ring.stage, ring.parity);
    shared.empty[stage].arrive();
  }
  const StateView& to = p.dinitial_state;
  if (task.backward && to.data) store_state(state, slice_of(to));
  if (thread == 0) cute::tma_store_wait<0>();
}

}  // namespace fused

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, 1)
    ssd_scan_fused_walk_kernel(const __grid_constant__ FusedBackwardParams p) {
  using namespace fused;
  using Storage = WalkStorage<Policy>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  static_assert(sizeof(Storage) <= kMostSharedBytes);
  auto& shared = *reinterpret_cast<Storage*>(shared_bytes);
  const WalkTask task(p, blockIdx.x);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Storage::kStages; ++stage) {
      shared.full[stage].init(1 + 2 * 32);
      shared.empty[stage].init(2 * kWarpgroup);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == Policy::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Policy::kProducerRegisters>();
    const int role = cutlass::canonical_warp_idx_sync() % 4;
    if (role == 0) {
      if (cute::elect_one_sync()) load_walk<Policy>(p, task, shared);
    } else if (role < 3) {
      prepare_walk<Policy>(p, task, shared, role - 1);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Policy::kConsumerRegisters>();
    walk<Policy>(p, task, shared, warpgroup);
  }
}

}  // namespace statescan::ssd_scan
