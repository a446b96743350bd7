// ssd_scan backward on sm_90a, the main kernel: every gradient of a chunk of 64 tokens, from kept states and adjoints
// Math     with s the sums of dt A in the chunk, end its last token, h the state before, G the adjoint after, g = dy,
//          L[i][j] = exp(s[i] - s[j]) for j <= i, S[i][j] = C[i].B[j], T[i][j] = g[i].x[j], W = S L T:
//          r[j]  = L[end][j] G B[j] + sum_{i>=j} S[i][j] L[i][j] g[i],         dx[j] = dt[j] r[j] + D g[j]
//          dB[j] = sum over heads of dt[j] L[end][j] G^T x[j] + sum_{i>=j} T[i][j] L[i][j] dt[j] C[i]
//          dC[i] = sum over heads of exp(s[i]) h^T g[i]       + sum_{j<=i} T[i][j] L[i][j] dt[j] B[j]
//          ddtA[i] = exp(s[end]) <G,h> + sum_{j<i} dt[j] L[end][j] B[j].(G^T x[j]) + sum_{k>=i} exp(s[k]) C[k].(h^T g[k])
//                    + sum_{k>=i} (sum_{j<k} W[k][j] dt[j] - sum_{m>k} W[m][k] dt[k])
//          ddt[j] = x[j].r[j] + A ddtA[j], through limit, softplus and bias;  dA = sum dt[i] ddtA[i];  dD = sum g x
// Shapes   x, dy, dx [b,l,h,p], dt [b,l,h], B, C [b,l,g,n]; h, G [p,n] of each head and chunk; p in slices of 64: an item
// Traffic  read x, dy, dt, h and G, write dx and ddt: once; B, C, dB, dC once a block
//          Floor of B8 L2048 H80 P64 G1 N128 bf16: 1.18 GB, 0.39 ms; matmuls 86 GFLOP, 0.11 ms
// Launch   a block for each chunk, group and split of the group's heads, which goes through its items. One warpgroup has dC,
// one
//          dB, one what lies inside the chunk and dx; a fourth loads, prepares the steps and finishes ddt
// Numerics float32 sums; S L, and the sum over heads of T L dt, rounded to the element type as matrix operands; fixed order
#pragma once

#include "fused_bwd_steps.cuh"

namespace statescan::ssd_scan {

namespace fused {

inline constexpr int kGradientWarpgroups = 4;

// Of one item, prepared by a warp.
struct alignas(16) GradientSteps {
  float log_decay[kTile], dt[kTile];
  float enter[kTile];   // exp(s[i])
  float leave[kTile];   // dt[j] exp(s[end] - s[j])
  float to_end[kTile];  // exp(s[end] - s[j])
  float slope[kTile];   // of the step with respect to dt before bias, softplus and limit
  float total, unused[3];
};

// What the warpgroups find of an item, for ddt.
struct GradientSums {
  float dot_B[kTile], dot_C[kTile];  // B[j].(G^T x[j]), C[i].(h^T g[i])
  float below[kTile];                // sum_{i>=j} W[i][j]
  float strictly_below[kTile];       // sum_{i>j} W[i][j]
  float before[kTile / 16][kTile];   // sum_{j<i} W[i][j] dt[j], j of each warp
  float diagonal[kTile];             // T[j][j]
  float whole[2 * kWarpgroup / 32];  // <G,h>, of each warp that has dB or dC
};

template <class Policy>
struct GradientStorage {
  static constexpr int kTiles = Policy::kState / kTile, kStages = kTiles == 2 ? 3 : 4;
  using Tile = char[kTileBytes];
  alignas(1024) Tile B[kTiles], C[kTiles];
  alignas(1024) Tile x[kStages], g[kStages];
  alignas(1024) Tile states[kStages][kTiles], adjoints[kStages][kTiles];
  alignas(1024) Tile dx[2];  // by turns; the first then holds the sum over heads of T L dt
  GradientSteps steps[kStages];
  GradientSums sums[2];
  alignas(8) Barrier projections, weights, full[kStages], empty[kStages], sums_full[2], sums_empty[2];
};

// A chunk, a group, and some of its items of the part.
struct GradientTask {
  int batch, chunk, slot, group, group_of_part, split, begin, end;

  __device__ GradientTask(const FusedBackwardParams& p, unsigned index) {
    split = static_cast<int>(index % static_cast<unsigned>(p.splits));
    index /= static_cast<unsigned>(p.splits);
    group_of_part = static_cast<int>(index % static_cast<unsigned>(p.part.groups));
    slot = static_cast<int>(index / static_cast<unsigned>(p.part.groups));
    group = p.part.first_group + group_of_part;
    batch = slot / p.chunks, chunk = slot % p.chunks;
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
  __device__ std::int64_t first_token() const { return std::int64_t{chunk} * kTile; }
};

// ---- the warps that load and finish ----------------------------------------------------------------------------------------

template <class Policy>
__device__ void load_items(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared) {
  using Storage = GradientStorage<Policy>;
  const int token = static_cast<int>(task.first_token());
  shared.projections.arrive_and_expect_tx(2 * Storage::kTiles * kTileBytes);
#pragma unroll
  for (int k = 0; k < Storage::kTiles; ++k) {
    load_tile(p.B, shared.projections, shared.B[k], k * kTile, task.group, token, task.batch);
    load_tile(p.C, shared.projections, shared.C[k], k * kTile, task.group, token, task.batch);
  }
  Ring<Storage::kStages> ring;
  for (int item = task.begin; item < task.end; ++item, ring.advance()) {
    const int stage = ring.stage, head = task.head_of(p, item), channel = task.channel_of(p, item),
              kept = task.kept_of(p, item);
    shared.empty[stage].wait(ring.parity ^ 1);
    Barrier& full = shared.full[stage];
    full.arrive_and_expect_tx((2 + 2 * Storage::kTiles) * kTileBytes);
    load_tile(p.x, full, shared.x[stage], channel, head, token, task.batch);
    load_tile(p.dy, full, shared.g[stage], channel, head, token, task.batch);
#pragma unroll
    for (int k = 0; k < Storage::kTiles; ++k) {
      load_tile(p.states, full, shared.states[stage][k], k * kTile, kept, 0, task.slot);
      load_tile(p.adjoints, full, shared.adjoints[stage][k], k * kTile, kept, 0, task.slot);
    }
  }
}

template <class Policy>
__device__ void prepare_items(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared) {
  const int lane = threadIdx.x % 32;
  // Raw steps of the items to come: a load from memory takes about as long as an item.
  struct Raw {
    float A, bias;
    std::uint32_t bits[2];
  };
  constexpr int kAhead = 3;
  Raw next[kAhead] = {};
  const auto fetch = [&](int item, Raw& raw) {
    if (item >= task.end) return;
    const StepReader reader(p, task.batch, task.head_of(p, item));
    raw.A = reader.A, raw.bias = reader.bias;
    reader.fetch(p, task.chunk, raw.bits);
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) fetch(task.begin + k, next[k]);
  Ring<GradientStorage<Policy>::kStages> ring;
  for (int item = task.begin; item < task.end; ++item, ring.advance()) {
    const LaneSteps s = scan_steps(p, task.chunk, next[0].A, next[0].bias, next[0].bits);
#pragma unroll
    for (int k = 0; k < kAhead - 1; ++k) next[k] = next[k + 1];
    fetch(item + kAhead, next[kAhead - 1]);
    float to_end[2], slope[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      to_end[k] = fast_exp2(s.total - s.log_decay[k]);
      const float step = p.dt_softplus ? softplus(s.raw[k]) : s.raw[k];
      slope[k] = step < p.dt_min || step > p.dt_max ? 0.0f : p.dt_softplus ? sigmoid(s.raw[k]) : 1.0f;
    }
    shared.empty[ring.stage].wait(ring.parity ^ 1);
    GradientSteps& steps = shared.steps[ring.stage];
    store2(steps.log_decay, lane, s.log_decay[0], s.log_decay[1]);
    store2(steps.dt, lane, s.dt[0], s.dt[1]);
    store2(steps.enter, lane, fast_exp2(s.log_decay[0]), fast_exp2(s.log_decay[1]));
    store2(steps.leave, lane, s.dt[0] * to_end[0], s.dt[1] * to_end[1]);
    store2(steps.to_end, lane, to_end[0], to_end[1]);
    store2(steps.slope, lane, slope[0], slope[1]);
    if (lane == 0) steps.total = fast_exp2(s.total);
    shared.full[ring.stage].arrive();
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

// One warp: ddt, and the chunk's shares of dA, ddt_bias and dD. The slices of a head add up.
template <class Policy>
__device__ void finish_steps(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared) {
  const int lane = threadIdx.x % 32;
  Ring<GradientStorage<Policy>::kStages> ring;
  Ring<2> slots;
  float direct[2] = {}, earlier[2] = {}, later[2] = {}, diagonal = 0, whole = 0;
  for (int item = task.begin; item < task.end; ++item, ring.advance(), slots.advance()) {
    shared.full[ring.stage].wait(ring.parity);
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
      for (int w = 0; w < kTile / 16; ++w)
        if (w <= i / 16) before += sums.before[w][i];
      later[k] += steps.enter[i] * sums.dot_C[i] + (before - dt[k] * sums.strictly_below[i]);
      diagonal += sums.diagonal[i];
    }
#pragma unroll
    for (int w = 0; w < 2 * kWarpgroup / 32; ++w) whole = fmaf(steps.total, sums.whole[w], whole);
    shared.empty[ring.stage].arrive();
    shared.sums_empty[slots.stage].arrive();
    if ((p.part.first_item + item) % p.slices + 1 < p.slices) continue;

    const int head = task.head_of(p, item);
    const float A = *reinterpret_cast<const float*>(p.A.data + head * p.A.head);
    float before[2], from[2], dA = 0, ddt_bias = 0;
    sum_before(earlier, before);
    sum_from(later, from);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float ddtA = whole + before[k] + from[k], ddt = fmaf(A, ddtA, direct[k]) * slope[k];
      const std::int64_t token = task.first_token() + 2 * lane + k;
      dA = fmaf(dt[k], ddtA, dA);
      if (token >= p.seqlen) continue;
      ddt_bias += ddt;
      if (p.ddt)
        cuda::store_element(p.ddt + task.batch * p.ddt_batch + token * p.ddt_token + head * p.ddt_head, p.ddt_dtype, ddt);
    }
    dA = sum_of_warp(dA), ddt_bias = sum_of_warp(ddt_bias), diagonal = sum_of_warp(diagonal);
    if (lane == 0) {
      const std::int64_t share = std::int64_t{task.slot} * p.nheads + head;
      p.dA_shares[share] = dA, p.ddt_bias_shares[share] = ddt_bias, p.dD_shares[share] = diagonal;
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

// A thread's part of <G,h>, of which either warpgroup takes a half.
template <class NativeElement, int kTiles>
__device__ float multiply_states(const void* states, const void* adjoints, int half, int thread) {
  constexpr int kUnits = kTiles * kTileBytes / 16 / 2;  // of 8 elements, in a half
  const auto* h = static_cast<const uint4*>(states) + half * kUnits;
  const auto* G = static_cast<const uint4*>(adjoints) + half * kUnits;
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < kUnits; i += kWarpgroup) {
    const uint4 a = h[i + thread], b = G[i + thread];
    const std::uint32_t words[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float u[2], v[2];
      cuda::widen_word<NativeElement>(words[0][w], u);
      cuda::widen_word<NativeElement>(words[1][w], v);
      sum[0] = fmaf(u[0], v[0], sum[0]), sum[1] = fmaf(u[1], v[1], sum[1]);
    }
  }
  return sum[0] + sum[1];
}

// dC or dB: the sum over items of scaled rows of g h, or x G; and for ddt the products of those rows with C, or B.
template <class Policy>
__device__ void project(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared, bool is_C) {
  using M = GradientMatmuls<Policy>;
  using Storage = GradientStorage<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kTiles = Storage::kTiles, kStages = Storage::kStages, kValues = kTile / 2;
  constexpr auto _ = cute::_;
  const int thread = threadIdx.x % kWarpgroup;
  const Fragment at(thread);
  typename M::RowsColumns mma;
  const auto mine = mma.get_thread_slice(thread);
  const auto rows =
      mine.partition_fragment_A(M::tensor(is_C ? shared.g : shared.x, typename M::template Rows<kTile, kStages>{}));
  const auto states = mine.partition_fragment_B(
      M::tensor(is_C ? shared.states : shared.adjoints, typename M::template Columns<kTile, kStages * kTiles>{}));
  auto product = cute::partition_fragment_C(mma, cute::Shape<_64, _64>{});
  auto sum0 = cute::partition_fragment_C(mma, cute::Shape<_64, _64>{});
  auto sum1 = cute::partition_fragment_C(mma, cute::Shape<_64, _64>{});
  const auto& tiles = is_C ? shared.C : shared.B;

  // [b,l,g,n] sums of the pieces before this one.
  const OutputView& gradient = is_C ? p.dC : p.dB;
  float* const sums = is_C ? p.dC_sums : p.dB_sums;
  const auto for_each_pair = [&](auto visit) {  // of values of a tile
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::int64_t token = task.first_token() + at.row + 8 * r;
      if (token >= p.seqlen) continue;
#pragma unroll
      for (int k = 0; k < kTile / 8; ++k) visit(4 * k + 2 * r, token, 8 * k + at.column);
    }
  };
  const auto sums_at = [&](std::int64_t token, int n) {
    return sums + (((std::int64_t{task.split} * p.batch + task.batch) * p.seqlen + token) * p.ngroups + task.group) * p.dstate +
           n;
  };
  const auto load_sums = [&](auto& sum, int first) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) sum(v) = 0.0f;
    if (p.part.is_first || !gradient.data) return;
    for_each_pair([&](int v, std::int64_t token, int n) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (first + n + c < p.dstate) sum(v + c) = *(sums_at(token, first + n) + c);
    });
  };
  load_sums(sum0, 0);
  if constexpr (kTiles == 2) load_sums(sum1, kTile);

  shared.projections.wait(0);
  Ring<kStages> ring;
  Ring<2> slots;
  for (int item = task.begin; item < task.end; ++item, ring.advance(), slots.advance()) {
    const int stage = ring.stage;
    shared.full[stage].wait(ring.parity);
    const GradientSteps& steps = shared.steps[stage];
    float dot[2] = {}, scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[r] = (is_C ? steps.enter : steps.leave)[at.row + 8 * r];
    const auto add_tile = [&](int tile, auto& sum) {
      cute::warpgroup_fence_operand(product);
      cute::warpgroup_arrive();
      issue<true>(mma, rows(_, _, _, stage), states(_, _, _, stage * kTiles + tile), product);
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
    if constexpr (kTiles == 2) add_tile(1, sum1);
    const float whole =
        sum_of_warp(multiply_states<NativeElement, kTiles>(shared.states[stage], shared.adjoints[stage], is_C, thread));
    shared.empty[stage].arrive();
#pragma unroll
    for (int r = 0; r < 2; ++r) dot[r] = sum_of_row(dot[r]);
    shared.sums_empty[slots.stage].wait(slots.parity ^ 1);
    GradientSums& found = shared.sums[slots.stage];
    if (at.lane == 0) found.whole[(is_C ? kWarpgroup / 32 : 0) + at.warp] = whole;
    if (at.lane % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r) (is_C ? found.dot_C : found.dot_B)[at.row + 8 * r] = dot[r];
    shared.sums_full[slots.stage].arrive();
  }

  // What the heads have in common is multiplied once.
  shared.weights.wait(0);
  const auto add_common = [&](auto& sum, int tile) {
    cute::warpgroup_fence_operand(sum);
    if (is_C) {
      typename M::ColumnsColumns common;
      const auto slice = common.get_thread_slice(thread);
      const auto weights = slice.partition_fragment_A(M::tensor(shared.dx, typename M::template Columns<kTile, 2>{}));
      const auto others = slice.partition_fragment_B(M::tensor(shared.B, typename M::template Columns<kTile, kTiles>{}));
      cute::warpgroup_arrive();
      issue<false>(common, weights(_, _, _, 0), others(_, _, _, tile), sum);
    } else {
      const auto weights = mine.partition_fragment_A(M::tensor(shared.dx, typename M::template Rows<kTile, 2>{}));
      const auto others = mine.partition_fragment_B(M::tensor(shared.C, typename M::template Columns<kTile, kTiles>{}));
      cute::warpgroup_arrive();
      issue<false>(mma, weights(_, _, _, 0), others(_, _, _, tile), sum);
    }
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(sum);
  };
  const bool keeps_sums = sums && !(p.part.is_last && p.splits == 1);
  char* const to = gradient.data + task.batch * (is_C ? p.dC_batch : p.dB_batch) + task.group * gradient.head;
  const auto store = [&](const auto& sum, int first) {
    if (!gradient.data) return;
    for_each_pair([&](int v, std::int64_t token, int n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (first + n + c >= p.dstate) continue;
        if (keeps_sums) *(sums_at(token, first + n) + c) = sum(v + c);
        else reinterpret_cast<NativeElement*>(to + token * gradient.token)[first + n + c] = NativeElement(sum(v + c));
      }
    });
  };
  add_common(sum0, 0);
  store(sum0, 0);
  if constexpr (kTiles == 2) {
    add_common(sum1, 1);
    store(sum1, kTile);
  }
}

// What lies inside the chunk: dx, the sums of W for ddt, and the sum over items of T L dt. Values are [j][i].
template <class Policy>
__device__ void combine(const FusedBackwardParams& p, const GradientTask& task, GradientStorage<Policy>& shared) {
  using M = GradientMatmuls<Policy>;
  using Storage = GradientStorage<Policy>;
  using NativeElement = typename cuda::ElementOf<Policy::kDType>::type;
  constexpr int kState = Policy::kState, kStages = Storage::kStages, kValues = kTile / 2;
  constexpr auto _ = cute::_;
  const int thread = threadIdx.x % kWarpgroup;
  const Fragment at(thread);
  const auto sync = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, 1); };

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
  auto scores = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});   // S
  auto weights = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});  // sum over items of T L dt
  auto pairs = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});    // T
  auto dx = cute::partition_fragment_C(rows_mma, cute::Shape<_64, _64>{});       // [j][p]
  auto masked = cute::make_tensor<typename M::Element>(cute::partition_shape_A(output_mma, cute::Shape<_64, _64>{}));
  auto masked_words = cute::recast<std::uint32_t>(masked);

  shared.projections.wait(0);
  cute::warpgroup_fence_operand(scores);
  cute::warpgroup_arrive();
  issue<true>(rows_mma, B_rows(_, _, _, 0), C_rows(_, _, _, 0), scores);
#pragma unroll
  for (int v = 0; v < kValues; ++v) weights(v) = 0.0f;
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(scores);

  Ring<kStages> ring;
  Ring<2> slots;
  for (int item = task.begin; item < task.end; ++item, ring.advance(), slots.advance()) {
    const int stage = ring.stage;
    shared.full[stage].wait(ring.parity);
    cute::warpgroup_fence_operand(pairs);
    cute::warpgroup_fence_operand(dx);
    cute::warpgroup_arrive();
    issue<true>(rows_mma, x_rows(_, _, _, stage), g_rows(_, _, _, stage), pairs);
    issue<true>(rows_mma, B_rows(_, _, _, 0), adjoint_rows(_, _, _, stage), dx);

    const GradientSteps& steps = shared.steps[stage];
    float log_j[2], dt_j[2], to_end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = at.row + 8 * r;
      log_j[r] = steps.log_decay[j], dt_j[r] = steps.dt[j], to_end[r] = steps.to_end[j];
    }
    shared.sums_empty[slots.stage].wait(slots.parity ^ 1);
    GradientSums& sums = shared.sums[slots.stage];
    float own[2] = {}, strictly_below[2] = {};  // W[j][j], and the sum over i > j
    float before[kTile / 4] = {};               // value 2 k + c: column 8 k + `column` + c
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(pairs);
#pragma unroll
    for (int b = 0; b < kTile / 16; ++b) {  // tokens i of a block
      if (b < at.warp) {
#pragma unroll
        for (int w = 0; w < 4; ++w) masked_words(4 * b + w) = 0;
        continue;
      }
      const auto each =
          [&](auto visit) {  // of the block's values: value, its row of two, its word, its column of two, L before exp
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const int r = w % 2;
              const float2 log_i = load2(steps.log_decay + 16 * b + w / 2 * 8 + at.column);
              const float pair[2] = {visit(8 * b + 2 * w, r, w, 0, log_i.x - log_j[r]),
                                     visit(8 * b + 2 * w + 1, r, w, 1, log_i.y - log_j[r])};
              masked_words(4 * b + w) = cuda::narrow_word<NativeElement>(pair);
            }
          };
      const auto add = [&](int v, int r, int w, int c, float L, float score, float W) {
        weights(v) = fmaf(pairs(v) * L, dt_j[r], weights(v));
        strictly_below[r] += W;
        before[4 * b + 2 * (w / 2) + c] = fmaf(dt_j[r], W, before[4 * b + 2 * (w / 2) + c]);
        return score;
      };
      if (b > at.warp) {
        each([&](int v, int r, int w, int c, float log) {
          const float L = fast_exp2(log), score = scores(v) * L;
          return add(v, r, w, c, L, score, score * pairs(v));
        });
      } else {  // the block on the diagonal
        each([&](int v, int r, int w, int c, float log) {
          const int later = w / 2 * 8 + at.column + c - (at.lane / 4 + 8 * r);  // i - j
          if (later < 0) return 0.0f;
          if (later == 0) {  // L is 1
            sums.diagonal[at.row + 8 * r] = pairs(v);
            own[r] = scores(v) * pairs(v);
            weights(v) = fmaf(pairs(v), dt_j[r], weights(v));
            return scores(v);
          }
          const float L = fast_exp2(log), score = scores(v) * L;
          return add(v, r, w, c, L, score, score * pairs(v));
        });
      }
    }
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

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own[r] = sum_of_row(own[r]);
      strictly_below[r] = sum_of_row(strictly_below[r]);
      if (at.lane % 4 == 0) {
        sums.below[at.row + 8 * r] = own[r] + strictly_below[r];
        sums.strictly_below[at.row + 8 * r] = strictly_below[r];
      }
    }
    shared.sums_full[slots.stage].arrive();
    const int head = task.head_of(p, item), channel = task.channel_of(p, item);
    const float D = p.D.data ? *reinterpret_cast<const float*>(p.D.data + head * p.D.head) : 0.0f;
    char* const tile = shared.dx[slots.stage];
    if (thread == 0) cute::tma_store_wait<1>();  // the one before the last has left its tile
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(dx);
    cute::warpgroup_fence_operand(masked);
    sync();
#pragma unroll
    for (int b = 0; b < kTile / 16; ++b) {
      std::uint32_t word[4];
      at.load(shared.g[stage], b, word);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float pair[2];
        cuda::widen_word<NativeElement>(word[w], pair);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int v = 8 * b + 2 * w + c;
          dx(v) *= dt_j[w % 2];
          if (p.D.data) dx(v) = fmaf(D, pair[c], dx(v));
        }
      }
      at.store<NativeElement>(tile, b, dx);
    }
    shared.empty[stage].arrive();
    cutlass::arch::fence_view_async_shared();
    sync();
    if (p.has_dx && thread == 0) {
      cute::SM90_TMA_STORE_4D::copy(&p.dx, tile, channel, head, static_cast<int>(task.first_token()), task.batch);
      cute::tma_store_arrive();
    }
  }
  if (thread == 0) cute::tma_store_wait<0>();
  sync();
#pragma unroll
  for (int b = 0; b < kTile / 16; ++b) at.store<NativeElement>(shared.dx[0], b, weights);
  cutlass::arch::fence_view_async_shared();
  shared.weights.arrive();
}

}  // namespace fused

template <class Policy>
__global__ void __launch_bounds__(128 * fused::kGradientWarpgroups, 1)
    ssd_scan_fused_gradient_kernel(const __grid_constant__ FusedBackwardParams p) {
  using namespace fused;
  using Storage = GradientStorage<Policy>;
  constexpr int kProducerRegisters = 40, kProjectRegisters = 144, kCombineRegisters = 184;  // 512 in all
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  static_assert(sizeof(Storage) <= kMostSharedBytes);
  auto& shared = *reinterpret_cast<Storage*>(shared_bytes);
  const GradientTask task(p, blockIdx.x);
  if (threadIdx.x == 0) {
    shared.projections.init(1);
    shared.weights.init(kWarpgroup);
    for (int stage = 0; stage < Storage::kStages; ++stage) {
      shared.full[stage].init(1 + 32);                // the tiles, and the steps
      shared.empty[stage].init(3 * kWarpgroup + 32);  // and the warp that finishes ddt
    }
    for (int slot = 0; slot < 2; ++slot) {
      shared.sums_full[slot].init(3 * kWarpgroup);
      shared.sums_empty[slot].init(32);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  switch (cutlass::canonical_warp_group_idx()) {
    case 0:
      cutlass::arch::warpgroup_reg_alloc<kCombineRegisters>();
      combine<Policy>(p, task, shared);
      break;
    case 1:
    case 2:
      cutlass::arch::warpgroup_reg_alloc<kProjectRegisters>();
      project<Policy>(p, task, shared, cutlass::canonical_warp_group_idx() == 1);
      break;
    default:
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
      switch (cutlass::canonical_warp_idx_sync() % 4) {
        case 0:
          if (cute::elect_one_sync()) load_items<Policy>(p, task, shared);
          break;
        case 1:
          prepare_items<Policy>(p, task, shared);
          break;
        case 2:
          finish_steps<Policy>(p, task, shared);
          break;
      }
  }
}

}  // namespace statescan::ssd_scan
