// ssd_scan forward on sm_90a, sequences of at most 128 tokens that begin with zeros: no state at all
// Math     a = cumulative sum of dt A: y = (C B^T * exp(a_i - a_j) dt_j [j <= i]) x
// Shapes   x, z, y [b,l,h,p], p in slices of 64; dt [b,l,h]; B, C [b,l,g,n]
// Traffic  read x, dt, z, write y: once; read B, C: once for each packet of slices
//          Floor of B256 L128 H24 P64 N128 bf16: 218 MB, 0.073 ms; matmuls 22 GFLOP, 0.03 ms
// Launch   a block per multiprocessor, which takes packets in turns. Two consumer warpgroups of half the tokens each, which
//          hold C B^T in registers for all slices of a packet; one that loads: tiles by TMA, steps by two warps
// Numerics float32 sums; scores rounded to the element type as matrix operands; fixed order
#pragma once

#include "fused_kernel.cuh"
#include "short_params.h"

namespace statescan::ssd_scan {

namespace short_rows {

using cuda::fast_exp2;
using cute::_128;
using fused::Barrier, fused::Fragment, fused::issue, fused::kTile, fused::kTileBytes, fused::kWarpgroup, fused::load2,
    fused::Ring;

inline constexpr int kTokens = kShortTokens, kBlocks = kTokens / 16;
inline constexpr int kStages = 5;  // slices on their way

// The steps of a sequence for a slice. Logarithms are to base 2. A block is 16 tokens, what a warp has of the rows; between
// blocks the decay is that to the later one's first token times that from there on.
struct alignas(16) Steps {
  float4 pair[kTokens / 2];              // of tokens 2 k and 2 k + 1: log decay from the start through it, twice; dt, twice
  float to_block[kBlocks - 1][kTokens];  // dt_j, decayed from token j to the first token of block 1 and on; before that block
  float from_block[kTokens];             // decay from the first token of i's block to token i
  float D[kTile];                        // of the slice's channels
};

template <class Policy>
struct SharedStorage {
  using Tile = char[2 * kTileBytes];  // 128 tokens of 64 columns
  alignas(1024) Tile B[2];
  alignas(1024) Tile C[2];
  alignas(1024) Tile x[kStages];
  alignas(1024) char y[2][2][kTileBytes];  // of each consumer two, by turns: z comes in where y goes out
  Steps steps[kStages];
  alignas(8) Barrier full[kStages], empty[kStages], packet_full, packet_empty;
  Barrier z_full[2][2], z_empty[2][2];
};

// The slices of a block's packets, one after the other.
class Slices {
 public:
  __device__ explicit Slices(const ShortParams& p)
      : p_(p), packet_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  // Past the last one it stays there.
  __device__ bool next() {
    first_ = slice_ + 1 >= end_;
    if (!first_) {
      ++slice_;
      return true;
    }
    if (packet_ + static_cast<int>(gridDim.x) >= p_.packets) return false;
    packet_ += gridDim.x;
    const int of_group = packet_ % p_.packets_of_group, group = packet_ / p_.packets_of_group;
    group_ = group % p_.groups, sequence_ = group / p_.groups;
    const auto begin = [&](int i) {
      return static_cast<int>(static_cast<std::int64_t>(i) * p_.slices_of_group / p_.packets_of_group);
    };
    slice_ = begin(of_group), end_ = begin(of_group + 1);
    return true;
  }

  __device__ bool first_of_packet() const { return first_; }
  __device__ int sequence() const { return sequence_; }
  __device__ int group() const { return group_; }
  __device__ int head() const { return (group_ * p_.slices_of_group + slice_) / p_.slices; }
  __device__ int channel() const { return slice_ % p_.slices * kTile; }

 private:
  const ShortParams& p_;
  int packet_, slice_ = 0, end_ = 0, sequence_ = 0, group_ = 0;
  bool first_ = false;
};

// The raw steps of a sequence, four tokens a lane, as they come from memory: of 32 or of 16 bits, each with registers of its
// own, since a second load to a register would wait for the first, be it taken or not.
struct RawSteps {
  std::uint32_t wide[4], narrow[4];
  float A, bias;

  __device__ void load(const ShortParams& p, int sequence, int head) {
    const char* from = p.dt.data + sequence * p.dt.batch + head * p.dt.head;
    const int first = threadIdx.x % 32 * 4;
    const bool is_wide = p.dt.dtype == DType::float32;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const char* at = from + min(first + k, p.seqlen - 1) * p.dt.token;
      wide[k] = is_wide ? *reinterpret_cast<const std::uint32_t*>(at) : 0;
      narrow[k] = is_wide ? 0 : *reinterpret_cast<const std::uint16_t*>(at);
    }
    A = *reinterpret_cast<const float*>(p.A.data + head * p.A.head);
    bias = p.dt_bias.data ? *reinterpret_cast<const float*>(p.dt_bias.data + head * p.dt_bias.head) : 0.0f;
  }

  // Steps, and inclusive sums of their log decays. Past the end of the sequence steps are 0.
  __device__ void finish(const ShortParams& p, float (&step)[4], float (&log_decay)[4]) const {
    constexpr float kLog2e = 1.4426950408889634f;
    const int lane = threadIdx.x % 32;
    const float rate = A * kLog2e;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      step[k] = lane * 4 + k < p.seqlen
                    ? discretise(cuda::widen_bits(wide[k] | narrow[k], p.dt.dtype), bias, p.dt_softplus, p.dt_min, p.dt_max)
                    : 0.0f;
      log_decay[k] = sum += step[k] * rate;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    float before = __shfl_up_sync(~0u, sum, 1);
    if (lane == 0) before = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) log_decay[k] += before;
  }
};

// ---- the warps that load -------------------------------------------------------------------------------------------------

// One thread. B and C come once for a packet.
template <class Policy>
__device__ void load_slices(const ShortParams& p, SharedStorage<Policy>& shared) {
  Ring<kStages> ring;
  int packet_parity = 0;
  for (Slices slice(p); slice.next(); ring.advance()) {
    if (slice.first_of_packet()) {
      shared.packet_empty.wait(packet_parity ^ 1);
      packet_parity ^= 1;
      shared.packet_full.arrive_and_expect_tx(8 * kTileBytes);
      for (int k = 0; k < 2; ++k) {
        fused::load_tile(p.B, shared.packet_full, shared.B[k], k * kTile, slice.group(), 0, slice.sequence());
        fused::load_tile(p.C, shared.packet_full, shared.C[k], k * kTile, slice.group(), 0, slice.sequence());
      }
    }
    Barrier& full = shared.full[ring.stage];
    shared.empty[ring.stage].wait(ring.parity ^ 1);
    full.arrive_and_expect_tx(2 * kTileBytes);
    fused::load_tile(p.x, full, shared.x[ring.stage], slice.channel(), slice.head(), 0, slice.sequence());
  }
}

// One thread: z into the tiles of y.
template <class Policy>
__device__ void load_gates(const ShortParams& p, SharedStorage<Policy>& shared) {
  Ring<2> ring;
  for (Slices slice(p); slice.next(); ring.advance())
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = ring.stage;
      shared.z_empty[half][slot].wait(ring.parity ^ 1);
      shared.z_full[half][slot].arrive_and_expect_tx(kTileBytes);
      fused::load_tile(p.z, shared.z_full[half][slot], shared.y[half][slot], slice.channel(), slice.head(), half * kTile,
                       slice.sequence());
    }
}

// Two warps by turns.
template <class Policy>
__device__ void prepare_steps(const ShortParams& p, SharedStorage<Policy>& shared, int turn) {
  const int lane = threadIdx.x % 32;
  Ring<kStages> ring;
  RawSteps raw;
  float D[2] = {};
  Slices ahead(p), slice(p);
  const auto fetch = [&](int slices) {  // of the one after so many
    for (int i = 0; i < slices; ++i) ahead.next();
    raw.load(p, ahead.sequence(), ahead.head());
    if (!p.D.data) return;
#pragma unroll
    for (int k = 0; k < 2; ++k)
      D[k] = *reinterpret_cast<const float*>(p.D.data + ahead.head() * p.D.head +
                                             min(ahead.channel() + 2 * lane + k, p.headdim - 1) * p.D.column);
  };
  fetch(turn + 1);
  for (int i = 0; slice.next(); ++i, ring.advance()) {
    if (i % 2 != turn) continue;
    float step[4], log_decay[4];
    raw.finish(p, step, log_decay);
    const float2 own_D = make_float2(D[0], D[1]);
    fetch(2);
    shared.empty[ring.stage].wait(ring.parity ^ 1);
    Steps& steps = shared.steps[ring.stage];
    const auto put = [&](float* to, auto value) {
      reinterpret_cast<float4*>(to)[lane] = make_float4(value(0), value(1), value(2), value(3));
    };
    steps.pair[2 * lane] = make_float4(log_decay[0], log_decay[1], step[0], step[1]);
    steps.pair[2 * lane + 1] = make_float4(log_decay[2], log_decay[3], step[2], step[3]);
    reinterpret_cast<float2*>(steps.D)[lane] = own_D;
    const float own_first = __shfl_sync(~0u, log_decay[0], lane & ~3);
    put(steps.from_block, [&](int k) { return fast_exp2(log_decay[k] - own_first); });
#pragma unroll
    for (int block = 1; block < kBlocks; ++block) {
      const float first = __shfl_sync(~0u, log_decay[0], 4 * block);
      if (lane < 4 * block) put(steps.to_block[block - 1], [&](int k) { return step[k] * fast_exp2(first - log_decay[k]); });
    }
    shared.full[ring.stage].arrive();
  }
}

// ---- the warps that compute ----------------------------------------------------------------------------------------------

template <class Policy>
struct Matmuls {
  using Element = typename fused::Matmuls<Policy>::Element;
  static constexpr auto kK = cute::GMMA::Major::K, kMN = cute::GMMA::Major::MN;

  // C B^T; scores x.
  template <int kColumns, cute::GMMA::Major kMajor>
  using WithRegisters = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<kColumns>, _128>, kK, kMajor>()));
  using Scores = WithRegisters<kTokens, kK>;
  using Output = WithRegisters<kTile, kMN>;

  // B, tokens by states; the stages of x, with the roles of rows and columns exchanged.
  using Rows = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{}, cute::Shape<_128, _128>{}));
  using Columns = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                               cute::Shape<cute::_64, _128, cute::Int<kStages>>{},
                                               cute::Step<cute::_2, cute::_1, cute::_3>{}));

  template <class Layout>
  static __device__ auto tensor(void* tiles, Layout layout) {
    return cute::make_tensor(cute::make_smem_ptr(static_cast<Element*>(tiles)), layout);
  }
};

// What a thread needs of the steps for its rows.
struct RowDecays {
  float from_block[2];
  float2 own_block[4];           // of each word of the block on the diagonal: dt_j exp(a_i - a_j)
  float2 to_block[kTokens / 8];  // past the blocks before its own they are of no use

  __device__ void load(const Steps& steps, const Fragment& at) {
#pragma unroll
    for (int k = 0; k < kTokens / 8; ++k) to_block[k] = load2(steps.to_block[max(at.warp - 1, 0)] + 8 * k + at.column);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at.row + 8 * r;
      from_block[r] = steps.from_block[row];
      const float log_i = reinterpret_cast<const float*>(steps.pair)[row / 2 * 4 + row % 2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 step = steps.pair[8 * at.warp + 4 * h + at.column / 2];
        own_block[2 * h + r] = make_float2(step.z * fast_exp2(log_i - step.x), step.w * fast_exp2(log_i - step.y));
      }
    }
  }
};

// The output of half the tokens. Warps of one half take its blocks of 16 tokens upwards, those of the other downwards, so that
// the two that share a scheduler have as much to mask as any other two.
template <class Policy>
__device__ void compute_output(const ShortParams& p, SharedStorage<Policy>& shared, int half) {
  using M = Matmuls<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32;
  const Fragment at((half == 0 ? warp : kBlocks - 1 - warp) * 32 + thread % 32);
  const auto sync = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + half); };

  typename M::Scores scores_mma;
  typename M::Output output_mma;
  auto scores = cute::partition_fragment_C(scores_mma, cute::Shape<cute::_64, _128>{});  // (tokens i, tokens j)
  auto y = cute::partition_fragment_C(output_mma, cute::Shape<cute::_64, cute::_64>{});  // (tokens, channels)
  auto C = cute::make_tensor<typename M::Element>(cute::partition_shape_A(scores_mma, cute::Shape<cute::_64, _128>{}));
  auto masked = cute::make_tensor<typename M::Element>(cute::partition_shape_A(output_mma, cute::Shape<cute::_64, _128>{}));
  auto C_words = cute::recast<std::uint32_t>(C);
  auto masked_words = cute::recast<std::uint32_t>(masked);
  const auto B_rows = scores_mma.get_thread_slice(thread).partition_fragment_B(M::tensor(shared.B, typename M::Rows{}));
  const auto x_columns = output_mma.get_thread_slice(thread).partition_fragment_B(M::tensor(shared.x, typename M::Columns{}));
  constexpr auto _ = cute::_;

  std::uint32_t diagonal[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    diagonal[w] = fused::diagonal_mask(at, false, w);
    asm volatile("" : "+r"(diagonal[w]));  // kept, not worked out again for every slice
  }
  Ring<kStages> ring;
  Ring<2> slots;
  int packet_parity = 0;
  bool stored = false;  // a slice before this one, in the other slot
  for (Slices slice(p); slice.next(); ring.advance(), slots.advance()) {
    if (slice.first_of_packet()) {
      shared.packet_full.wait(packet_parity);
      packet_parity ^= 1;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        std::uint32_t word[4];
        at.load(shared.C[j / 4], j % 4, word);
#pragma unroll
        for (int w = 0; w < 4; ++w) C_words(4 * j + w) = word[w];
      }
      cute::warpgroup_fence_operand(C);
      cute::warpgroup_fence_operand(scores);
      cute::warpgroup_arrive();
      issue<true>(scores_mma, C, B_rows, scores);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(scores);
      shared.packet_empty.arrive();
    }
    const int stage = ring.stage, head = slice.head(), channel = slice.channel();
    shared.full[stage].wait(ring.parity);
    const Steps& steps = shared.steps[stage];

    // Scores, decayed and masked, become a matrix operand.
    RowDecays decays;
    decays.load(steps, at);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (j > at.warp) {
#pragma unroll
        for (int w = 0; w < 4; ++w) masked_words(4 * j + w) = 0;
      } else if (j == at.warp) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float pair[2] = {scores(8 * j + 2 * w) * decays.own_block[w].x,
                                 scores(8 * j + 2 * w + 1) * decays.own_block[w].y};
          masked_words(4 * j + w) = cuda::narrow_word<NativeElement>(pair) & diagonal[w];
        }
      } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 to_block = decays.to_block[2 * j + w / 2];
          const float from_block = decays.from_block[w % 2];
          const float pair[2] = {scores(8 * j + 2 * w) * from_block * to_block.x,
                                 scores(8 * j + 2 * w + 1) * from_block * to_block.y};
          masked_words(4 * j + w) = cuda::narrow_word<NativeElement>(pair);
        }
      }
    }
    cute::warpgroup_fence_operand(y);
    cute::warpgroup_fence_operand(masked);
    cute::warpgroup_arrive();
    issue<true>(output_mma, masked, x_columns(_, _, _, stage), y);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(y);

    if (p.D.data) {
      at.template each_pair<NativeElement>(shared.x[stage], [&](int v, int column, const float* x_pair) {
        const float2 D = load2(steps.D + column);
        y(v) += D.x * x_pair[0], y(v + 1) += D.y * x_pair[1];
      });
    }
    shared.empty[stage].arrive();
    char* tile_y = shared.y[half][slots.stage];
    char* rows_y = tile_y - half * kTileBytes;  // as if it began with the sequence
    if (p.has_z) {
      shared.z_full[half][slots.stage].wait(slots.parity);
      at.template each_pair<NativeElement>(rows_y, [&](int v, int, const float* z) {
        y(v) *= cuda::fast_silu(z[0]), y(v + 1) *= cuda::fast_silu(z[1]);
      });
    }
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) at.store<NativeElement>(rows_y, j, y);
    cutlass::arch::fence_view_async_shared();
    if (thread == 0) {  // the other slot is free once its y has been read
      cute::tma_store_wait<0>();
      if (p.has_z && stored) shared.z_empty[half][slots.stage ^ 1].arrive();
    }
    sync();
    if (thread == 0) {
      cute::SM90_TMA_STORE_4D::copy(&p.y, tile_y, channel, head, half * kTile, slice.sequence());
      cute::tma_store_arrive();
    }
    stored = true;
  }
  if (thread == 0) cute::tma_store_wait<0>();
}

}  // namespace short_rows

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, 1) ssd_scan_short_kernel(const __grid_constant__ ShortParams p) {
  using namespace short_rows;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  static_assert(sizeof(SharedStorage<Policy>) <= fused::kMostSharedBytes);
  auto& shared = *reinterpret_cast<SharedStorage<Policy>*>(shared_bytes);
  const int warpgroup = cutlass::canonical_warp_group_idx();

  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&p.x, &p.B, &p.C, &p.y})
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    for (int stage = 0; stage < kStages; ++stage) {
      shared.full[stage].init(1 + 32);  // the tiles and the steps
      shared.empty[stage].init(2 * kWarpgroup);
    }
    shared.packet_full.init(1), shared.packet_empty.init(2 * kWarpgroup);
    for (int half = 0; half < 2; ++half)
      for (int slot = 0; slot < 2; ++slot) shared.z_full[half][slot].init(1), shared.z_empty[half][slot].init(1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (warpgroup == Policy::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Policy::kProducerRegisters>();
    const int role = cutlass::canonical_warp_idx_sync() % 4;
    if (role == 0) {
      if (cute::elect_one_sync()) load_slices<Policy>(p, shared);
    } else if (role < 3) {
      prepare_steps<Policy>(p, shared, role - 1);
    } else if (p.has_z) {
      if (cute::elect_one_sync()) load_gates<Policy>(p, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Policy::kConsumerRegisters>();
    compute_output<Policy>(p, shared, warpgroup);
  }
}

}  // namespace statescan::ssd_scan
