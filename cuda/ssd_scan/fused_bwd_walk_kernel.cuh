// ssd_scan backward on sm_90a, the walks: states that enter the chunks, and adjoints of the states that leave them
// Math     with s the sums of dt A in a chunk, end its last token, h the state before the chunk, G the adjoint after it:
//          forward  h = exp(s[end]) h + sum_j dt[j] exp(s[end] - s[j]) x[j] B[j]^T, kept before each pair of chunks
//          backward G = exp(s[end]) G + sum_i exp(s[i]) dy[i] C[i]^T, kept after each pair
//          Where the forward kept h, the walk backward alone
// Shapes   h, G [p,n] of each head in float32 registers, kept in 16 bits (fused_bwd_kept.cuh); p in slices of 64
// Traffic  read x, dy, dt once, B, C once per pair of slices; write h and G of every other chunk
//          Floor of B8 L2048 H80 P64 N128 bf16: 0.67 GB, 0.23 ms. With z, which is read with dy, 0.84 GB, 0.29 ms
// Launch   a block per multiprocessor, which takes directions and pairs of slices of sequences in turns, or single slices where
//          these leave multiprocessors without work. A warpgroup for each tile of the states; one, or two with z, weights x or
//          dy where it lies, one loads and prepares the steps: what a chunk waits for in the one before it is to decay the state
//          and add a product to it
// Numerics float32 sums; weighted x and dy rounded to the element type as matrix operands, and what that takes from them as others
//          where states hardly decay; fixed order
#pragma once

#include "fused_bwd_kept.cuh"
#include "fused_bwd_steps.cuh"

namespace statescan::ssd_scan {

namespace fused {

// Where more than this of a state outlives a chunk, what rounding takes from the weighted rows of many chunks adds up in it, and
// goes into a product of its own. Such a chunk takes 1.4 times as long. Infinity leaves that product out; with 0.35 gradients of
// long sequences are within 1.5 roundings at any decay, but one such head makes a batch of one as slow as all of them.
inline constexpr float kSlowDecay = 0.7f;

// With z they are multiplied at any decay where the state is kept after the chunk, which most of it is of: without, dB and dC
// were up to 1.50 roundings off.
inline __device__ bool comes_before_kept(int i) { return i % 2 == 1; }

template <class Policy>
struct WalkStorage {
  // z comes with dy, to where the rests will be.
  static constexpr int kStages = Policy::kGated ? 3 : 4, kRests = Policy::kGated ? 3 : 2;
  static constexpr int kTiles = Policy::kState / kTile, kAhead = 4;
  static_assert(kStages % kRests == 0, "or the walkers would count chunks for them");
  static constexpr int kWalkers = 2 * kTiles;                       // warpgroups that have a tile of the state of a slice each
  static constexpr int kWeighers = Policy::kGated ? 2 : 1;          // that weight rows
  static constexpr int kWarpgroups = kWalkers + kWeighers + 1, kPreparing = 3;  // warps that prepare steps
  using Tile = char[kTileBytes];
  alignas(1024) Tile projection[kStages][kTiles];  // B, or C
  alignas(1024) Tile rows[kStages][2];             // x, or dy, of each slice
  alignas(1024) Tile rests[kRests][2];             // what rounding takes from them once weighted
  alignas(1024) Tile kept[kWalkers];
  WalkSteps steps[kStages][2];
  uint2 raw[kPreparing][kAhead][32];  // what each warp that prepares has loaded ahead
  alignas(8) Barrier full[kStages], weighted[kStages], empty[kStages];
};

struct WalkTask {
  bool backward;
  Span span;
  int group, first_item;  // item: within the part's items of the group
  int group_of_part;
  int chunks, begin;  // so many from `begin` on, or from there back

  __device__ WalkTask(const FusedBackwardParams& p, unsigned index) {
    const auto of_sequence = static_cast<unsigned>(p.walks_per_group * p.part.groups);
    const unsigned sequences = p.walks / of_sequence, sequence = index / of_sequence;  // over and over again
    const int tile = static_cast<int>(index % of_sequence);
    if (p.ends) {
      backward = p.from_forward || sequence % 2 == 0;
      span = Span::packed(p, static_cast<int>(p.packed_order[p.from_forward ? sequence : sequence / 2]), p.sequences.reverse);
    } else {
      backward = sequence < sequences;
      span = Span::row(p, p.part.first_batch + static_cast<int>(sequence % sequences), p.sequences.reverse);
    }
    // Backward, the second of a pair comes even where the sequence has ended: nothing is in it. What lies past the last that is
    // kept, only dinitial_state asks for.
    const int all = (span.length + 2 * kTile - 1) / (2 * kTile) * 2;
    begin = backward ? all - 1 : 0;
    chunks = backward && p.dinitial_state.data ? all : all - 1;
    group_of_part = tile / p.walks_per_group;
    group = p.part.first_group + group_of_part;
    first_item = tile % p.walks_per_group * p.items_of_walk;
  }

  __device__ bool has_item(const FusedBackwardParams& p, int which) const {
    return which < p.items_of_walk && first_item + which < p.part.items;
  }
  __device__ int head_of(const FusedBackwardParams& p, int which) const {
    return group * p.heads_per_group + (p.part.first_item + first_item + which) / p.slices;
  }
  __device__ int channel_of(const FusedBackwardParams& p, int which) const {
    return (p.part.first_item + first_item + which) % p.slices * kTile;
  }
  __device__ int chunk_of(int i) const { return backward ? begin - i : begin + i; }
  // Where the part keeps it.
  __device__ int pair_of(const FusedBackwardParams& p, int i) const { return span.pair_of(p, true, chunk_of(i)); }
  __device__ int kept_of(const FusedBackwardParams& p, int which) const {
    return group_of_part * p.part.items + first_item + which;
  }
};

// Calls `visit` with each task of the block, those backward first. Of packed sequences the longest come first, and blocks take
// turns from the first to the last and back.
template <class Visit>
__device__ void for_each_walk(const FusedBackwardParams& p, Visit visit) {
  unsigned step = p.ends ? 2 * (gridDim.x - blockIdx.x) - 1 : gridDim.x;
  const unsigned walks = p.from_forward ? p.walks : 2 * p.walks;
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < walks; index += step, step = 2 * gridDim.x - step) visit(WalkTask(p, index));
}

template <class Policy>
__device__ void load_walk(const FusedBackwardParams& p, const WalkTask& task, WalkStorage<Policy>& shared,
                          Ring<WalkStorage<Policy>::kStages>& ring) {
  using Storage = WalkStorage<Policy>;
  constexpr int kTiles = Storage::kTiles;
  CUtensorMap TokenMaps::* const rows = task.backward ? &TokenMaps::dy : &TokenMaps::x;
  CUtensorMap TokenMaps::* const projection = task.backward ? &TokenMaps::C : &TokenMaps::B;
  const int slices = task.has_item(p, 1) ? 2 : 1;
  for (int i = 0; i < task.chunks; ++i, ring.advance()) {
    const int stage = ring.stage, token = task.span.token_of(task.chunk_of(i));
    const TokenMaps& maps = task.span.template maps_of<true>(p, task.chunk_of(i), rows, projection);
    shared.empty[stage].wait(ring.parity ^ 1);
    Barrier& full = shared.full[stage];
    const bool gated = Policy::kGated && task.backward;
    full.arrive_and_expect_tx(kTileBytes * (kTiles + (gated ? 2 : 1) * slices));
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      load_tile(maps.*projection, full, shared.projection[stage][k], k * kTile, task.group, token, task.span.batch);
    for (int which = 0; which < slices; ++which)
      load_tile(maps.*rows, full, shared.rows[stage][which], task.channel_of(p, which), task.head_of(p, which), token,
                task.span.batch);
    if (!gated) continue;
    task.span.template maps_of<true>(p, task.chunk_of(i), &TokenMaps::z);
    for (int which = 0; which < slices; ++which)
      load_tile(maps.z, full, shared.rests[stage % Storage::kRests][which], task.channel_of(p, which), task.head_of(p, which),
                token, task.span.batch);
  }
}

// Warps that take the chunks of one slice and of the other in turns: one warp takes longer to prepare a chunk than walking it
// takes.
template <class Policy>
__device__ void prepare_walk(const FusedBackwardParams& p, const WalkTask& task, WalkStorage<Policy>& shared,
                             unsigned& position, int warp) {
  using Storage = WalkStorage<Policy>;
  constexpr int kAhead = Storage::kAhead, kStages = Storage::kStages;
  const int lane = threadIdx.x % 32, two = p.items_of_walk - 1;  // two: 1, or 0 of single slices
  // Where no walk goes forward, the steps of the first chunk of each pair are prepared here too, be it walked or not.
  const int all = (p.from_forward ? task.begin + 1 : task.chunks) << two;
  const StepReader first(p, task.span, task.head_of(p, 0)), second(p, task.span, task.head_of(p, task.has_item(p, 1)));
  const auto reader_of = [&](int which) {
    StepReader reader = first;
    if (which == 1) reader.A = second.A, reader.bias = second.bias, reader.from = second.from;
    return reader;
  };
  // Raw steps of the chunks to come, four of them at a time: a load from memory takes longer than a chunk, and registers that
  // move up wait for every load that is on its way.
  uint2* const raw = shared.raw[warp][0] + lane;
  std::uint32_t next[kAhead][2] = {};
  const auto fetch = [&](int from) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (const int own = from + k * Storage::kPreparing; own < all)
        reader_of(own & two).fetch(p, task.span, task.chunk_of(own >> two), next[k]);
  };
  fetch(warp);
  int turn = 0;
#pragma unroll 1
  for (int own = warp; own < all; own += Storage::kPreparing, ++turn) {
    if (turn % kAhead == 0) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) raw[32 * k] = make_uint2(next[k][0], next[k][1]);
      fetch(own + kAhead * Storage::kPreparing);
    }
    const int which = own & two, i = own >> two;
    const unsigned at = position + i;
    const uint2 loaded = raw[turn % kAhead * 32];
    const std::uint32_t bits[2] = {loaded.x, loaded.y};
    const StepReader reader = reader_of(which);
    const LaneSteps s = scan_steps(p, task.span, task.chunk_of(i), reader.A, reader.bias, bits);
    if (i < task.chunks) {
      shared.empty[at % kStages].wait(at / kStages % 2 ^ 1);
      store_walk_steps(shared.steps[at % kStages][which], s, task.backward, task.span.reverse);
      shared.full[at % kStages].arrive();
    }
    const bool ends_pair = i % 2 == 0 && task.backward;  // as the second chunk, of which the main kernel asks what is backward
    if ((i % 2 == 0 || p.from_forward) && task.has_item(p, which))
      store_walk_steps((ends_pair ? p.second_steps : p.first_steps)[std::int64_t{task.pair_of(p, i)} * p.kept_items +
                                                                    task.kept_of(p, which)],
                       s, ends_pair, task.span.reverse);
  }
  position += max(task.chunks, 0);
}

// Half of the warps per slice, or all where there is one: a row of its tile times the weight of that token.
template <class Policy>
__device__ void weight_rows(const FusedBackwardParams& p, const WalkTask& task, WalkStorage<Policy>& shared,
                            unsigned& position) {
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kAll = WalkStorage<Policy>::kWeighers * kWarpgroup, kThreads = kAll / 2;
  constexpr int kStages = WalkStorage<Policy>::kStages, kRests = WalkStorage<Policy>::kRests;
  static_assert(WalkStorage<Policy>::kWalkers * kWarpgroup % kAll == 0);
  const bool single = p.items_of_walk == 1;
  const int which = single ? 0 : threadIdx.x % kAll / kThreads;
  const bool present = task.has_item(p, which);
  for (int i = 0; i < task.chunks; ++i, ++position) {
    const unsigned stage = position % kStages, before = position - kRests;  // before: whose rests lay where these will
    shared.full[stage].wait(position / kStages % 2);
    if (present) {
      char* const rows = shared.rows[stage][which];
      char* const rests = shared.rests[position % kRests][which];
      const WalkSteps& steps = shared.steps[stage][which];
      if (Policy::kGated && task.backward) {
        const bool keeps_rest = steps.total > kSlowDecay || comes_before_kept(i);
        const auto weight = [&]<int kOf>(std::integral_constant<int, kOf>) {
          const int thread = threadIdx.x % kOf;
          if (keeps_rest) weight_tile<NativeElement, kOf, 2, true, true>(rows, steps, thread, rests, rests);
          else weight_tile<NativeElement, kOf, 2, false, true>(rows, steps, thread, nullptr, rests);
        };
        if (single) weight(std::integral_constant<int, kAll>());
        else weight(std::integral_constant<int, kThreads>());
      } else if (steps.total > kSlowDecay || (Policy::kGated && comes_before_kept(i))) {
        if (kRests < kStages) shared.empty[before % kStages].wait(before / kStages % 2);
        if (single) weight_tile<NativeElement, kAll, 4, true>(rows, steps, threadIdx.x % kAll, rests);
        else weight_tile<NativeElement, kThreads, 4, true>(rows, steps, threadIdx.x % kThreads, rests);
      } else if (single) {
        weight_tile<NativeElement, kAll, 4>(rows, steps, threadIdx.x % kAll);
      } else {
        weight_tile<NativeElement, kThreads, 8>(rows, steps, threadIdx.x % kThreads);
      }
      cutlass::arch::fence_view_async_shared();
    }
    shared.weighted[stage].arrive();
  }
}

// The rows of a tile that is to be kept, in fixed point, and their exponents.
template <class Tile>
__device__ void round_tile(const Tile& tile, std::uint32_t (&words)[kTile / 4], std::uint32_t (&exponents)[2]) {
  float most[2] = {};
#pragma unroll
  for (int v = 0; v < kTile / 2; ++v) most[v / 2 % 2] = max_or_nan(most[v / 2 % 2], fabsf(tile(v)));
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = max_or_nan(most[r], __shfl_xor_sync(~0u, most[r], 1));
    exponents[r] = exponent_above(max_or_nan(most[r], __shfl_xor_sync(~0u, most[r], 2)));
  }
#pragma unroll
  for (int k = 0; k < kTile / 4; ++k) words[k] = to_fixed_point(tile(2 * k), tile(2 * k + 1), exponents[k % 2]);
}

// Keeps a tile of the state of a slice before each pair of chunks, or of its adjoint after.
template <class Policy>
__device__ void walk(const FusedBackwardParams& p, WalkStorage<Policy>& shared, int walker) {
  using M = Matmuls<Policy>;
  using Element = typename M::Element;
  constexpr int kStages = WalkStorage<Policy>::kStages, kTiles = WalkStorage<Policy>::kTiles, kValues = kTile / 2;
  constexpr int kRests = WalkStorage<Policy>::kRests;
  const int thread = threadIdx.x % kWarpgroup, which = walker / kTiles, tile = walker % kTiles;
  const Fragment at(thread);
  Fragment at_tile = at;
  at_tile.column += tile * kTile;
  const auto sync = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + walker); };
  // Columns of both operands.
  decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, _64, _64>, M::kMN, M::kMN>())) mma;
  const auto mine = mma.get_thread_slice(thread);
  auto state = cute::partition_fragment_C(mma, cute::Shape<_64, _64>{});
  const auto rows = mine.partition_fragment_A(M::tensor(shared.rows, typename M::template Columns<kTile, 2 * kStages>{}));
  const auto rests = mine.partition_fragment_A(M::tensor(shared.rests, typename M::template Columns<kTile, 2 * kRests>{}));
  const auto projection =
      mine.partition_fragment_B(M::tensor(shared.projection, typename M::template Columns<kTile, kStages * kTiles>{}));
  constexpr auto _ = cute::_;

  Ring<kStages> ring;
  for_each_walk(p, [&](const WalkTask& task) {
    if (!task.has_item(p, which)) {
      for (int i = 0; i < task.chunks; ++i, ring.advance()) {
        shared.weighted[ring.stage].wait(ring.parity);
        shared.empty[ring.stage].arrive();
      }
      return;
    }
    const int head = task.head_of(p, which), channel = task.channel_of(p, which);
    const auto slice_of = [&](const StateView& t) {
      return SliceOfState<kTile>(p, t, task.span.sequence, head, channel, at_tile);
    };
#pragma unroll
    for (int v = 0; v < kValues; ++v) state(v) = 0.0f;
    if (const StateView& from = task.backward ? p.dfinal_state : p.initial_state; from.data) add_state(state, slice_of(from), 1.0f);

    const CUtensorMap& kept = task.backward ? p.adjoints : p.states;
    const bool in_dx = task.backward && p.adjoints_in_dx;
    std::uint8_t* const exponents = task.backward ? p.adjoint_exponents : p.state_exponents;
    const int item = task.kept_of(p, which);
    for (int i = 0; i < task.chunks; ++i, ring.advance()) {
      const bool keeps = i % 2 == 0;
      const int stage = ring.stage;
      std::uint32_t words[kTile / 4], exponent[2];
      if (keeps) round_tile(state, words, exponent);
      shared.full[stage].wait(ring.parity);
      const float total = shared.steps[stage][which].total;
#pragma unroll
      for (int v = 0; v < kValues; ++v) state(v) *= total;
      shared.weighted[stage].wait(ring.parity);
      cute::warpgroup_fence_operand(state);
      if (total > kSlowDecay || (Policy::kGated && comes_before_kept(i))) {
        cute::warpgroup_arrive();
        issue<false>(mma, rests(_, _, _, 2 * (stage % kRests) + which), projection(_, _, _, kTiles * stage + tile), state);
      }
      cute::warpgroup_arrive();
      issue<false>(mma, rows(_, _, _, 2 * stage + which), projection(_, _, _, kTiles * stage + tile), state);

      if (keeps) {  // while this runs, the state as it was leaves
        char* const own = shared.kept[walker];
        if (thread == 0) cute::tma_store_wait<0>();  // the one before has left
        sync();
#pragma unroll
        for (int j = 0; j < kTile / 16; ++j) at.store(own, j, words + 4 * j);
        cutlass::arch::fence_view_async_shared();
        sync();
        const int place = task.pair_of(p, i);
        if (thread == 0) {
          if (in_dx)
            cute::SM90_TMA_STORE_4D::copy(&kept, own, channel, head,
                                          task.span.first_token_of_pair(task.chunk_of(i)) + tile * kTile, task.span.batch);
          else cute::SM90_TMA_STORE_4D::copy(&kept, own, tile * kTile, item, 0, place);
          cute::tma_store_arrive();
        }
        if (at.lane % 4 == 0) {
          std::uint8_t* const to = exponents + ((std::int64_t{place} * p.kept_items + item) * kTiles + tile) * kTile + at.row;
#pragma unroll
          for (int r = 0; r < 2; ++r) to[8 * r] = static_cast<std::uint8_t>(exponent[r]);
        }
      }
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(state);
      shared.empty[stage].arrive();
    }
    const StateView& to = p.dinitial_state;
    if (task.backward && to.data) store_state(state, slice_of(to));
  });
  if (thread == 0) cute::tma_store_wait<0>();
}

}  // namespace fused

template <class Policy>
__global__ void __launch_bounds__(128 * fused::WalkStorage<Policy>::kWarpgroups, 1)
    ssd_scan_fused_walk_kernel(const __grid_constant__ FusedBackwardParams p) {
  using namespace fused;
  using Storage = WalkStorage<Policy>;
  constexpr int kWalkers = Storage::kWalkers;
  constexpr bool kMovesRegisters = kWalkers == 4;  // of two and two warpgroups each has enough
  constexpr int kWalkRegisters = 96, kOtherRegisters = Policy::kGated ? 40 : 48;  // 480 in all, or 504
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  static_assert(sizeof(Storage) <= kMostSharedBytes);
  auto& shared = *reinterpret_cast<Storage*>(shared_bytes);
  const int walkers = p.items_of_walk * Storage::kTiles;  // of a single slice the others have nothing to do
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Storage::kStages; ++stage) {
      shared.full[stage].init(1 + p.items_of_walk * 32);  // the tiles, and the steps of each slice
      shared.weighted[stage].init(Storage::kWeighers * kWarpgroup);
      shared.empty[stage].init(walkers * kWarpgroup);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  cuda::let_next_kernel_in();
  cuda::wait_for_earlier_kernels();
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup < kWalkers) {
    if constexpr (kMovesRegisters) cutlass::arch::warpgroup_reg_alloc<kWalkRegisters>();
    if (warpgroup < walkers) walk<Policy>(p, shared, warpgroup);
    return;
  }
  if constexpr (kMovesRegisters) cutlass::arch::warpgroup_reg_dealloc<kOtherRegisters>();
  Ring<Storage::kStages> ring;
  if (warpgroup < kWalkers + Storage::kWeighers) {
    unsigned position = 0;  // in the ring
    for_each_walk(p, [&](const WalkTask& task) { weight_rows<Policy>(p, task, shared, position); });
    return;
  }
  const int role = cutlass::canonical_warp_idx_sync() % 4;
  if (role == 0) {
    if (cute::elect_one_sync()) for_each_walk(p, [&](const WalkTask& task) { load_walk<Policy>(p, task, shared, ring); });
  } else {
    unsigned position = 0;  // in the ring
    for_each_walk(p, [&](const WalkTask& task) { prepare_walk<Policy>(p, task, shared, position, role - 1); });
  }
}

}  // namespace statescan::ssd_scan
