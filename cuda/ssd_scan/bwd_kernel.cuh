// ssd_scan backward, the main kernel: every gradient, from kept states and adjoints
// Math     in a chunk of q tokens, with s, h, G and g as in bwd_walk_kernel.cuh, end = q-1, L[i][j] = exp(s[i] - s[j]) for j <=
// i:
//          r[j]  = L[end][j] G B[j] + sum_{i>=j} (C[i].B[j]) L[i][j] g[i],    dx[j] = dt[j] r[j] + D g[j]
//          dB[j] = sum over heads of dt[j] L[end][j] G^T x[j] + sum_{i>=j} (g[i].x[j]) L[i][j] dt[j] C[i]
//          dC[i] = sum over heads of exp(s[i]) h^T g[i] + sum_{j<=i} (g[i].x[j]) L[i][j] dt[j] B[j]
//          ddtA[i] = exp(s[end]) <G,h> + sum_{j<i} dt[j] L[end][j] B[j].(G^T x[j]) + sum_{k>=i} exp(s[k]) C[k].(h^T g[k])
//                    + sum_{k>=i>j} (C[k].B[j]) (g[k].x[j]) L[k][j] dt[j]
//          ddt[i] = x[i].r[i] + A ddtA[i], through limit, softplus and bias;  dA = sum dt[i] ddtA[i];  dD = sum g x
//          dz[i] = dy[i] silu'(z[i]) y[i], y made again as the forward makes it
// Shapes   x, z, dy [b,l,h,p], dt [b,l,h], B, C [b,l,g,n]; h, G [p,n] of each head and chunk
// Traffic  x, dy, z, dt, states and adjoints once, B and C once; write dx, dz, ddt, dB, dC; shares of dA, ddt_bias and dD of
//          each chunk
// Launch   a block of 16 warps for each (slot of a chunk, group, split of the heads), which goes through its heads. A warp has
// a
//          strip of 16 tokens, and a part of the columns
// Numerics ddtA has no difference in it, so that it keeps its digits where decays leave next to nothing. Scores, weights and
//          states go into the products as sums of bfloat16 terms. What lies above the diagonal is selected away, and a g that
//          is not finite is kept out of the products that reach later tokens, an x out of those that reach earlier ones
#pragma once

#include "bwd_tile.cuh"

namespace statescan::ssd_scan {

// A kept state in shared memory: `slice` rows, as many as fit.
template <class Policy>
struct StateTile {
  static constexpr int kStride = Policy::kDstate + 8;
  std::uint16_t* data;
  int plane;
  __device__ std::uint16_t* at(int term, int row, int column) const { return data + term * plane + row * kStride + column; }
};

// What the warps of a block tell each other about a head.
template <class Policy>
struct HeadSums {
  static constexpr int kChunk = Policy::kChunk, kBlocks = Policy::kBlocks, kParts = Policy::kParts;
  float dot_B[kParts][kChunk];        // B[j].(G^T x[j]), of the columns of a part
  float dot_C[kParts][kChunk];        // C[i].(h^T g[i])
  float of_rows[kBlocks][kChunk];     // sum over the 16 k of a block of (C[k].B[j]) (g[k].x[j]) L[k][j]
  float of_columns[kBlocks][kChunk];  // sum over the j < i of a block and the k >= i of the block of i, with dt[j]
  float whole[Policy::kWarps];        // <G,h>
  float dD[kBlocks][Policy::kSlice];
  float CB[Policy::kPairs][8][Policy::kThreads];  // C[i].B[j] as its warps hold it: for all heads, at no cost in registers
};

template <class Policy>
struct BackwardLayout {
  using Group = Tile<Policy::kChunk, Policy::kDstate, Policy::kTermsOfInput>;
  using X = Tile<Policy::kChunk, Policy::kSlice, Policy::kTermsOfInput>;
  using G = Tile<Policy::kChunk, Policy::kSlice, Policy::kTerms>;
  using Scores = Tile<Policy::kChunk, Policy::kChunk, Policy::kTerms>;
  using ChunkSteps = Steps<Policy::kChunk>;
  using State = StateTile<Policy>;

  // Of a stage x, g and rows of two states; there is a second stage where tiles are loaded ahead.
  static constexpr int kFixedBytes =
      2 * Group::kBytes + Scores::kBytes + 2 * sizeof(ChunkSteps) + sizeof(HeadSums<Policy>) + sizeof(ChunkPlace);
  static STATESCAN_HOST_DEVICE constexpr int stage_bytes(int slice) {
    return X::kBytes + G::kBytes + 2 * Policy::kTermsOfState * slice * State::kStride * 2;
  }
  static constexpr int bytes(int stages, int slice) { return kFixedBytes + stages * stage_bytes(slice); }

  char* base;
  int slice;

  __device__ std::uint16_t* tile(int bytes) const { return reinterpret_cast<std::uint16_t*>(base + bytes); }
  __device__ Group B() const { return {tile(0)}; }
  __device__ Group C() const { return {tile(Group::kBytes)}; }
  __device__ Scores scores() const { return {tile(2 * Group::kBytes)}; }
  __device__ ChunkSteps& steps(int head) const {
    return reinterpret_cast<ChunkSteps*>(base + 2 * Group::kBytes + Scores::kBytes)[head % 2];
  }
  __device__ HeadSums<Policy>& sums() const { return *reinterpret_cast<HeadSums<Policy>*>(&steps(0) + 2); }
  __device__ ChunkPlace& place() const { return *reinterpret_cast<ChunkPlace*>(&sums() + 1); }
  __device__ X x(int stage) const { return {tile(kFixedBytes + stage * stage_bytes(slice))}; }
  __device__ G g(int stage) const { return {tile(kFixedBytes + stage * stage_bytes(slice) + X::kBytes)}; }
  __device__ State state(int stage, int which) const {
    const int plane = slice * State::kStride;
    return {tile(kFixedBytes + stage * stage_bytes(slice) + X::kBytes + G::kBytes) + which * Policy::kTermsOfState * plane,
            plane};
  }
};

inline __device__ bool is_finite_bfloat16(Bits v) { return (v & 0x7f80u) != 0x7f80u; }
// Bits 15 and 31 are set where the exponent of a half is that of infinity and NaN.
inline __device__ Bits carry_of_exponents(Bits pair) { return (pair & 0x7f807f80u) + 0x00800080u; }
inline __device__ Bits finite_halves(Bits pair) {
  return (is_finite_bfloat16(pair) ? 0xffffu : 0u) | (is_finite_bfloat16(pair >> 16) ? 0xffff0000u : 0u);
}

// One block's work on its chunk.
template <class Policy>
struct BackwardBlock {
  static constexpr int kChunk = Policy::kChunk, kTerms = Policy::kTerms, kTermsOfInput = Policy::kTermsOfInput;
  static constexpr int kColumns = Policy::kColumns, kBlocks = Policy::kBlocks, kParts = Policy::kParts;
  static constexpr DType kDType = Policy::kDType;
  using Layout = BackwardLayout<Policy>;

  const BackwardParams& p;
  const Layout& shared;
  const ChunkPlace& place;  // in shared memory: it costs no registers
  int group;
  int warp, strip, part;                                       // the warp's 16 tokens and part of the columns
  RowLoader<Policy, Policy::kThreads, Policy::kSlice> load_x;  // of the first head of the part
  GateLoader<Policy, Policy::kThreads, Policy::kSlice> load_g;
  int stage = 0;  // of the tiles at hand
  int at = 0;     // head of the part at hand

  __device__ BackwardBlock(const BackwardParams& params, const Layout& layout, const ChunkPlace& chunk, int of_group)
      : p(params),
        shared(layout),
        place(chunk),
        group(of_group),
        warp(threadIdx.x / 32),
        strip(warp % kBlocks),
        part(warp / kBlocks),
        load_x(p.x, place.walk, head_at(0), p.headdim),
        load_g(p, place.walk, head_at(0)) {}

  __device__ int row(int r) const { return 16 * strip + lane_id() / 4 + 8 * r; }  // of the lane's two
  // Pairs of tokens: j in the warp's strip, i in the blocks part, part + kParts..; those above the diagonal are left out.
  __device__ int block_of(int pair) const { return part + pair * kParts; }
  __device__ bool has_pairs(int pair) const { return block_of(pair) < kBlocks && block_of(pair) >= strip; }

  __device__ const Steps<kChunk>& steps() const { return shared.steps(at); }
  __device__ typename Layout::X x() const { return shared.x(stage); }
  __device__ typename Layout::G g() const { return shared.g(stage); }

  // ---- tiles ---------------------------------------------------------------------------------------------------------------
  __device__ int width(std::int64_t first) const {
    return static_cast<int>(min(std::int64_t(p.slice), (p.headdim - first + 15) / 16 * 16));
  }

  // Begins to load the tiles of a slice of a head: x, g, and the rows of its states.
  __device__ void load_slice(int to, int k, const char* state, const char* adjoint, int first) const {
    load_x.load(shared.x(to), place.start, place.count, k, first);
    load_g.load(shared.g(to), place.start, place.count, k, first);
    load_state_rows(shared.state(to, 0), state, first);
    load_state_rows(shared.state(to, 1), adjoint, first);
    cute::cp_async_fence();
  }

  // Rows `first`.. of a kept state, as many as a stage holds.
  __device__ void load_state_rows(const StateTile<Policy>& tile, const char* kept, int first) const {
    constexpr int kUnits = Policy::kDstate / 8, kStep = Policy::kThreads / kUnits;
    const int row = threadIdx.x / kUnits, column = threadIdx.x % kUnits * 8;
    const int left = column < p.columns ? static_cast<int>(p.headdim) - first - row : 0;
    const std::int64_t step = p.columns * Policy::kBytesOfKept;
    const char* from = kept + (first + row) * step + column * Policy::kBytesOfKept;
#pragma unroll
    for (int k = 0; k < Policy::kSlice; k += kStep) {
      if (row + k >= static_cast<int>(p.slice)) break;
      const bool inside = k < left;
      if constexpr (Policy::kKept == DType::bfloat16) {
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(inside ? from + k * step : kept),
            *reinterpret_cast<cute::uint128_t*>(tile.at(0, row + k, column)), inside);
      } else {
        float v[8] = {};
        if (inside) {
          const float4 a = *reinterpret_cast<const float4*>(from + k * step),
                       b = *reinterpret_cast<const float4*>(from + k * step + 16);
          v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        }
        store_run<Policy::kTermsOfState>(tile.at(0, row + k, column), tile.plane, v);
      }
    }
  }

  // The thread's part of <G,h> of a slice.
  __device__ float dot_states(int stage, int rows) const {
    constexpr int kTermsOfState = Policy::kTermsOfState, kUnits = Policy::kDstate / 8;
    const auto sH = shared.state(stage, 0), sG = shared.state(stage, 1);
    float dot = 0;
    for (int unit = threadIdx.x; unit < rows * kUnits; unit += Policy::kThreads) {
      const int row = unit / kUnits, column = unit % kUnits * 8;
      uint4 h[kTermsOfState], G[kTermsOfState];
#pragma unroll
      for (int i = 0; i < kTermsOfState; ++i) {
        h[i] = *reinterpret_cast<const uint4*>(sH.at(i, row, column));
        G[i] = *reinterpret_cast<const uint4*>(sG.at(i, row, column));
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        Bits of_h[kTermsOfState], of_G[kTermsOfState];
#pragma unroll
        for (int i = 0; i < kTermsOfState; ++i) {
          of_h[i] = w == 0 ? h[i].x : w == 1 ? h[i].y : w == 2 ? h[i].z : h[i].w;
          of_G[i] = w == 0 ? G[i].x : w == 1 ? G[i].y : w == 2 ? G[i].z : G[i].w;
        }
        const float2 a = join(of_h), b = join(of_G);
        dot = fmaf(a.x, b.x, fmaf(a.y, b.y, dot));
      }
    }
    return dot;
  }

  // ---- products with states ------------------------------------------------------------------------------------------------
  // to[i] += scale[i] state^T of[i] in the warp's columns; dots[r] += state^T of[i] . with[i], without the scale.
  template <int kTermsOf, class Of, class With>
  __device__ void add_from_state(float (&to)[kColumns / 8][4], float (&dots)[2], const Of& of, int terms,
                                 const StateTile<Policy>& state, const With& with, const float (&scale)[kChunk],
                                 int columns) const {
    const float scales[2] = {scale[row(0)], scale[row(1)]};
    float sum[kColumns / 16][2][4] = {};
#pragma unroll
    for (int k = 0; k < Policy::kSlice; k += 16)
      if (k < columns)
        multiply_strip<kTermsOf, Policy::kTermsOfState, Read::rows, Read::rows>(sum, of, 16 * strip, k, state, k,
                                                                                part * kColumns, terms);
#pragma unroll
    for (int q = 0; q < kColumns / 8; ++q)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float (&v)[4] = sum[q / 2][q % 2];
        const float2 other = pair_at<kTermsOfInput>(with, row(r), part * kColumns + 8 * q + lane_id() % 4 * 2);
        dots[r] = fmaf(v[2 * r], other.x, fmaf(v[2 * r + 1], other.y, dots[r]));
#pragma unroll
        for (int e = 0; e < 2; ++e) to[q][2 * r + e] = fmaf(scales[r], v[2 * r + e], to[q][2 * r + e]);
      }
  }

  __device__ void store_dots(float (&to)[kParts][kChunk], const float (&dots)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_row(dots[r]);
      if (lane_id() % 4 == 0) to[part][row(r)] = sum;
    }
  }

  // ---- pairs of tokens -----------------------------------------------------------------------------------------------------
  // From C[i].B[j] and g[i].x[j] of a block [16 j, 16 i]: scores into shared memory, the head's part of the weights, and the
  // sums that ddt is made of.
  __device__ void combine_pairs(int pair, const Sum16& gx, Sum16& weights) const {
    const auto& steps = this->steps();
    auto& sums = shared.sums();
    const int t = lane_id() % 4, block = block_of(pair);
    float of_columns[2][2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = row(r);
      const float high = steps.high[j], low = steps.low[j], dt = steps.dt[j];
      float pairs[2][2], sum[2], after[2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int i = 16 * block + 8 * q + 2 * t;
        const float2 high_i = steps.pair(steps.high, i), low_i = steps.pair(steps.low, i);
        const float L[2] = {exp2_fast((high_i.x - high) + (low_i.x - low)), exp2_fast((high_i.y - high) + (low_i.y - low))};
        float score[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool below = i + e >= j;
          score[e] = below ? sums.CB[pair][4 * q + 2 * r + e][threadIdx.x] * L[e] : 0.0f;
          pairs[q][e] = below ? score[e] * gx[q][2 * r + e] : 0.0f;
          if (below) weights[q][2 * r + e] = fmaf(gx[q][2 * r + e] * L[e], dt, weights[q][2 * r + e]);
        }
        Bits terms[kTerms];
        split(score[0], score[1], terms);
#pragma unroll
        for (int k = 0; k < kTerms; ++k) *reinterpret_cast<Bits*>(shared.scores().at(k, j, i)) = terms[k];
        // after: what the lanes of later columns hold.
        sum[q] = pairs[q][0] + pairs[q][1];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float other = __shfl_down_sync(~0u, sum[q], step);
          if (t + step < 4) sum[q] += other;
        }
        after[q] = __shfl_down_sync(~0u, sum[q], 1);
        if (t == 3) after[q] = 0;
        sum[q] = __shfl_sync(~0u, sum[q], lane_id() & ~3);
      }
      after[0] += sum[1];
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int e = 2; e-- > 0;) {
          after[q] += pairs[q][e];  // sum over k >= i in the block
          if (j < 16 * block + 8 * q + 2 * t + e) of_columns[q][e] = fmaf(dt, after[q], of_columns[q][e]);
        }
      if (t == 0) sums.of_rows[block][j] = sum[0] + sum[1];
    }
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float sum = sum_of_column(of_columns[q][e]);
        if (lane_id() < 4) sums.of_columns[strip][16 * block + 8 * q + 2 * t + e] = sum;
      }
  }

  // sum[j] += sum_{i>=j} scores[j][i] g[i] for 16 columns of the slice.
  __device__ void multiply_scores_g(Sum16& sum, int column, int terms) const {
    const auto scores = shared.scores();
    const auto g = this->g();
    Bits leading[kBlocks][4], exponents = 0;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      if (k < strip) continue;
      load_B<Read::rows>(g.at(0, 16 * k, column), g.kStride, leading[k]);
#pragma unroll
      for (int r = 0; r < 4; ++r) exponents |= carry_of_exponents(leading[k][r]);
    }
    const bool finite = __all_sync(~0u, (exponents & 0x80008000u) == 0);
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      if (k < strip) continue;
      Bits a[kTerms][4], keep[4];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) load_A<Read::rows>(scores.at(i, 16 * strip, 16 * k), scores.kStride, a[i]);
      if (!finite)
#pragma unroll
        for (int r = 0; r < 4; ++r) keep[r] = finite_halves(leading[k][r]), leading[k][r] &= keep[r];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) multiply_add(sum, a[i], leading[k]);
#pragma unroll
      for (int j = 1; j < kTerms; ++j) {
        if (j >= terms) break;
        Bits b[4];
        load_B<Read::rows>(g.at(j, 16 * k, column), g.kStride, b);
        if (!finite)
#pragma unroll
          for (int r = 0; r < 4; ++r) b[r] &= keep[r];
#pragma unroll
        for (int i = 0; i < kTerms; ++i)
          if (counts<kTerms, kTerms>(i, j)) multiply_add(sum, a[i], b);
      }
    }
    if (finite) return;
    // What was left out belongs to its own token and those before it.
#pragma unroll 1
    for (int i = 16 * strip; i < kChunk; ++i)
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Bits v = *g.at(0, i, column + 8 * q + lane_id() % 4 * 2 + e);
          if (is_finite_bfloat16(v)) continue;
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (i >= row(r))
              sum[q][2 * r + e] += __uint_as_float(Bits(*scores.at(0, row(r), i)) << 16) * __uint_as_float(v << 16);
        }
  }

  // sum[i] += sum_{j<=i} scores[j][i] dt[j] x[j]
  __device__ void multiply_scores_x(Sum16& sum, int column) const {
    const auto scores = shared.scores();
    const auto x = this->x();
    const auto& steps = this->steps();
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      if (k > strip) break;
      Bits a[kTerms][4], raw[kTermsOfInput][4], b[kTerms][4];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) load_A<Read::columns>(scores.at(i, 16 * k, 16 * strip), scores.kStride, a[i]);
#pragma unroll
      for (int i = 0; i < kTermsOfInput; ++i) load_B<Read::rows>(x.at(i, 16 * k, column), x.kStride, raw[i]);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Bits keep = finite_halves(raw[0][r]);
        finite = finite && keep == ~0u;
        Bits of[kTermsOfInput], products[kTerms];
#pragma unroll
        for (int i = 0; i < kTermsOfInput; ++i) of[i] = raw[i][r] & keep;
        const float2 v = join(of), dt = steps.pair(steps.dt, 16 * k + r % 2 * 8 + lane_id() % 4 * 2);
        split(v.x * dt.x, v.y * dt.y, products);
#pragma unroll
        for (int i = 0; i < kTerms; ++i) b[i][r] = products[i];
      }
#pragma unroll
      for (int i = 0; i < kTerms; ++i)
#pragma unroll
        for (int j = 0; j < kTerms; ++j)
          if (counts<kTerms, kTerms>(i, j)) multiply_add(sum, a[i], b[j]);
    }
    if (__all_sync(~0u, finite)) return;
#pragma unroll 1
    for (int j = 0; j < 16 * strip + 16; ++j)
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Bits v = *x.at(0, j, column + 8 * q + lane_id() % 4 * 2 + e);
          if (is_finite_bfloat16(v)) continue;
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (j <= row(r))
              sum[q][2 * r + e] +=
                  __uint_as_float(Bits(*scores.at(0, j, row(r))) << 16) * steps.dt[j] * __uint_as_float(v << 16);
        }
  }

  // ---- a slice of a head ---------------------------------------------------------------------------------------------------
  __device__ float2 D_at(std::int64_t head, std::int64_t column) const {
    const char* from = p.D.data + head * p.D.head + column * p.D.column;
    return make_float2(column < p.headdim ? *reinterpret_cast<const float*>(from) : 0.0f,
                       column + 1 < p.headdim ? *reinterpret_cast<const float*>(from + p.D.column) : 0.0f);
  }

  // sum = state of[i] for 16 rows of the state: what a state gives to the strip's tokens.
  template <class Of>
  __device__ void multiply_state(Sum16& sum, const Of& of, const StateTile<Policy>& state, int column) const {
#pragma unroll 4
    for (int k = 0; k < Policy::kDstate; k += 16)
      multiply_blocks<kTermsOfInput, Policy::kTermsOfState, Read::rows, Read::columns>(sum, of, 16 * strip, k, state, column,
                                                                                       k);
  }

  __device__ void store_dx(std::int64_t head, std::int64_t first, int column, int terms) const {
    const auto& steps = this->steps();
    Sum16 sum{}, scored{};
    multiply_state(sum, shared.B(), shared.state(stage, 1), column);
    multiply_scores_g(scored, column, terms);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int c = column + 8 * q + lane_id() % 4 * 2;
      const int left = static_cast<int>(min(std::int64_t(2), p.headdim - first - c));
      const float2 D = p.D.data ? D_at(head, first + c) : make_float2(0.0f, 0.0f);
      float dD[2] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int j = row(r);
        const float2 g_j = pair_at<kTerms>(g(), j, c, terms);
        const float dt = steps.dt[j], weight = steps.to_end[j];
        float dx0 = fmaf(weight, sum[q][2 * r], dt * scored[q][2 * r]);
        float dx1 = fmaf(weight, sum[q][2 * r + 1], dt * scored[q][2 * r + 1]);
        if (p.D.data) dx0 = fmaf(D.x, g_j.x, dx0), dx1 = fmaf(D.y, g_j.y, dx1);
        if (p.dx.data && j < place.count && left > 0)
          store_two<kDType>(p.dx, token_at(p.dx, place.walk, place.start + j, head, first + c), left, dx0, dx1);
        if (p.dD_shares) {
          const float2 x_j = pair_at<kTermsOfInput>(x(), j, c);
          dD[0] = fmaf(g_j.x, x_j.x, dD[0]);
          dD[1] = fmaf(g_j.y, x_j.y, dD[1]);
        }
      }
      if (p.dD_shares)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float of_strip = sum_of_column(dD[e]);
          if (lane_id() < 4) shared.sums().dD[strip][c + e] = of_strip;
        }
    }
  }

  __device__ void store_dz(std::int64_t head, std::int64_t first, int column) const {
    const auto& steps = this->steps();
    Sum16 y{};
    multiply_state(y, shared.C(), shared.state(stage, 0), column);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int e = 0; e < 2; ++e) y[q][2 * r + e] *= steps.from_start[row(r)];
    multiply_scores_x(y, column);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int c = column + 8 * q + lane_id() % 4 * 2;
      const int left = static_cast<int>(min(std::int64_t(2), p.headdim - first - c));
      const float2 D = p.D.data ? D_at(head, first + c) : make_float2(0.0f, 0.0f);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = row(r);
        if (i >= place.count || left <= 0) continue;
        const float2 dy = load_two<kDType>(p.dy, token_at(p.dy, place.walk, place.start + i, head, first + c), left);
        const float2 z = load_two<kDType>(p.z, token_at(p.z, place.walk, place.start + i, head, first + c), left);
        float y0 = y[q][2 * r], y1 = y[q][2 * r + 1];
        if (p.D.data) {
          const float2 x_i = pair_at<kTermsOfInput>(x(), i, c);
          y0 = fmaf(D.x, x_i.x, y0), y1 = fmaf(D.y, x_i.y, y1);
        }
        store_two<kDType>(p.dz, token_at(p.dz, place.walk, place.start + i, head, first + c), left,
                          dy.x * cuda::fast_dsilu(z.x) * y0, dy.y * cuda::fast_dsilu(z.y) * y1);
      }
    }
  }

  // The slice's part of dD, once all strips are there.
  __device__ void store_dD(std::int64_t head, std::int64_t first) const {
    const int column = threadIdx.x;
    if (column >= width(first) || first + column >= p.headdim) return;
    float sum = 0;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) sum += shared.sums().dD[m][column];
    p.dD_shares[(place.slot * p.nheads + head) * p.headdim + first + column] = sum;
  }

  // ---- steps ---------------------------------------------------------------------------------------------------------------
  static constexpr int kOfLane = kChunk / 32;

  // Exclusive sums over the lanes before, or after; `v` is the lane's own. No difference: sums of what is wanted alone.
  static __device__ float sum_before(float v) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_up_sync(~0u, v, step);
      if (lane_id() >= step) v += other;
    }
    v = __shfl_up_sync(~0u, v, 1);
    return lane_id() == 0 ? 0.0f : v;
  }

  static __device__ float sum_after(float v) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_down_sync(~0u, v, step);
      if (lane_id() + step < 32) v += other;
    }
    v = __shfl_down_sync(~0u, v, 1);
    return lane_id() == 31 ? 0.0f : v;
  }

  static __device__ float sum_of_warp(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
  }

  // to[k] += sum_{j<i} v[j] for the lane's tokens i that are kept.
  template <class Keeps>
  static __device__ void add_before(float (&to)[kOfLane], const float (&v)[kOfLane], Keeps keeps) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) sum += v[k];
    sum = sum_before(sum);
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      if (keeps(k)) to[k] += sum;
      sum += v[k];
    }
  }

  // ddt of a head, and the chunk's shares of dA and ddt_bias: by one warp.
  __device__ void finish_steps(std::int64_t head) const {
    const auto& steps = this->steps();
    const auto& sums = shared.sums();
    const int first = lane_id() * kOfLane;
    float whole = lane_id() < Policy::kWarps ? sums.whole[lane_id()] : 0.0f;
    whole = sum_of_warp(whole) * steps.from_start[kChunk - 1];
    float ddtA[kOfLane], slope[kOfLane], dt[kOfLane], from_adjoint[kOfLane], from_state[kOfLane];
    float own = 0;
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      const int i = first + k;
      dt[k] = steps.dt[i];
      float dot_B = 0, dot_C = 0;
#pragma unroll
      for (int w = 0; w < kParts; ++w) dot_B += sums.dot_B[w][i], dot_C += sums.dot_C[w][i];
      const float to_end = exp2_fast((steps.high[kChunk - 1] - steps.high[i]) + (steps.low[kChunk - 1] - steps.low[i]));
      slope[k] = to_end * dot_B;
      from_adjoint[k] = dt[k] * slope[k];
      from_state[k] = steps.from_start[i] * dot_C;
      own += from_state[k];
      ddtA[k] = whole;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        if (m <= i / 16) ddtA[k] += sums.of_columns[m][i];
        if (m >= i / 16) slope[k] += sums.of_rows[m][i];
      }
    }
    float after = sum_after(own);
#pragma unroll
    for (int k = kOfLane; k-- > 0;) ddtA[k] += after += from_state[k];
    add_before(ddtA, from_adjoint, [](int) { return true; });
    // Pairs of an earlier j with the k of a later block than i's.
#pragma unroll
    for (int m = 1; m < kBlocks; ++m) {
      float v[kOfLane];
#pragma unroll
      for (int k = 0; k < kOfLane; ++k) v[k] = first + k < 16 * m ? dt[k] * sums.of_rows[m][first + k] : 0.0f;
      add_before(ddtA, v, [&](int k) { return first + k < 16 * m; });
    }
    const float A = *reinterpret_cast<const float*>(p.A.data + head * p.A.head);
    const float bias = p.dt_bias.data ? *reinterpret_cast<const float*>(p.dt_bias.data + head * p.dt_bias.head) : 0.0f;
    float dA = 0, ddt_bias = 0;
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      const int i = first + k;
      if (i >= place.count) continue;
      const std::int64_t token = place.walk.origin + (place.start + i) * place.walk.sign;
      const float raw =
          cuda::load_element(p.dt.data + place.walk.batch * p.dt.batch + token * p.dt.token + head * p.dt.head, p.dt.dtype) +
          bias;
      const float step = p.dt_softplus ? softplus(raw) : raw;
      float ddt = fmaf(A, ddtA[k], slope[k]);
      dA = fmaf(dt[k], ddtA[k], dA);
      if (p.dt_softplus) ddt *= sigmoid(raw);
      if (step < p.dt_min || step > p.dt_max) ddt = 0;
      ddt_bias += ddt;
      if (p.ddt.data)
        cuda::store_element(p.ddt.data + place.walk.batch * p.ddt.batch + token * p.ddt.token + head * p.ddt.head, p.ddt.dtype,
                            ddt);
    }
    dA = sum_of_warp(dA), ddt_bias = sum_of_warp(ddt_bias);
    if (lane_id() == 0) {
      p.dA_shares[place.slot * p.nheads + head] = dA;
      p.ddt_bias_shares[place.slot * p.nheads + head] = ddt_bias;
    }
  }

  // ---- dB and dC -----------------------------------------------------------------------------------------------------------
  // Where the sums over heads lie in memory between parts and splits.
  __device__ float* sums_at(float* sums, std::uint32_t split, int step) const {
    const std::int64_t token = place.walk.origin + (place.start + step) * place.walk.sign;
    return sums + (((split * p.batch + place.walk.batch) * p.sequences.seqlen + token) * p.ngroups + group) * p.dstate;
  }

  __device__ void load_sums(float (&to)[kColumns / 8][4], float* sums, std::uint32_t split) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row(r) >= place.count) continue;
      const float* from = sums_at(sums, split, row(r));
#pragma unroll
      for (int q = 0; q < kColumns / 8; ++q)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = part * kColumns + 8 * q + lane_id() % 4 * 2 + e;
          if (n < p.dstate) to[q][2 * r + e] = from[n];
        }
    }
  }

  __device__ void store_sums(const float (&v)[kColumns / 8][4], const TokenView& gradient, float* sums,
                             std::uint32_t split) const {
    if (!gradient.data) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row(r) >= place.count) continue;
#pragma unroll
      for (int q = 0; q < kColumns / 8; ++q) {
        const int n = part * kColumns + 8 * q + lane_id() % 4 * 2;
        const int left = static_cast<int>(min(std::int64_t(2), p.dstate - n));
        if (left <= 0) continue;
        if (sums && !(p.is_last && p.splits == 1)) {
          float* to = sums_at(sums, split, row(r)) + n;
          to[0] = v[q][2 * r];
          if (left > 1) to[1] = v[q][2 * r + 1];
        } else {
          store_two<kDType>(gradient, token_at(gradient, place.walk, place.start + row(r), group, n), left, v[q][2 * r],
                            v[q][2 * r + 1]);
        }
      }
    }
  }

  // dB += weights C, dC += weights^T B: what the heads have in common is multiplied once.
  __device__ void multiply_weights(const Sum16 (&weights)[Policy::kPairs], float (&dB)[kColumns / 8][4],
                                   float (&dC)[kColumns / 8][4]) const {
    const auto tile = shared.scores();
#pragma unroll
    for (int pair = 0; pair < Policy::kPairs; ++pair)
      if (has_pairs(pair))
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            Bits terms[kTerms];
            split(weights[pair][q][2 * r], weights[pair][q][2 * r + 1], terms);
#pragma unroll
            for (int i = 0; i < kTerms; ++i)
              *reinterpret_cast<Bits*>(tile.at(i, row(r), 16 * block_of(pair) + 8 * q + lane_id() % 4 * 2)) = terms[i];
          }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kColumns; n += 16) {
      const int column = part * kColumns + n;
      Sum16 sum_B{}, sum_C{};
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
        if (k >= strip)
          multiply_blocks<kTerms, kTermsOfInput, Read::rows, Read::rows>(sum_B, tile, 16 * strip, 16 * k, shared.C(), 16 * k,
                                                                         column);
        if (k <= strip)
          multiply_blocks<kTerms, kTermsOfInput, Read::columns, Read::rows>(sum_C, tile, 16 * k, 16 * strip, shared.B(), 16 * k,
                                                                            column);
      }
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int e = 0; e < 4; ++e) dB[n / 8 + q][e] += sum_B[q][e], dC[n / 8 + q][e] += sum_C[q][e];
    }
  }

  // ---- all of it -----------------------------------------------------------------------------------------------------------
  __device__ std::int64_t head_at(int k) const { return group * p.heads_of_group + p.part.first_head + k; }

  // Tiles of a head are needed slice by slice, and then, for what takes all of a head's scores, in the opposite order; the last
  // slice serves both.
  __device__ void load(int to, int k, int turn) const {
    const int slices = p.slices, slice = turn < slices ? turn : 2 * slices - 2 - turn;
    const std::int64_t kept = ((place.slot * p.part.groups + group - p.part.first_group) * p.part.heads + k) * p.headdim *
                              p.columns * Policy::kBytesOfKept;
    load_slice(to, k, p.states + kept, p.adjoints + kept, slice * static_cast<int>(p.slice));
  }

  // Brings the tiles of a turn, and begins with those of the next.
  __device__ void next_tiles(int turn, int end) {
    if (p.stages == 1) {
      __syncthreads();  // what lies in the tiles is read
      load(0, at, turn);
    }
    cute::cp_async_wait<0>();
    __syncthreads();
    if (p.stages == 1) return;
    stage = 1 - stage;
    if (turn + 2 < 2 * static_cast<int>(p.slices)) load(1 - stage, at, turn + 1);
    else if (at + 1 < end) load(1 - stage, at + 1, 0);
  }

  __device__ void load_steps(int k) const {
    StepLoader<kChunk> loader(p, place.walk, head_at(k));
    loader.load(place.start, place.count);
    loader.finish(shared.steps(k));
  }

  __device__ void run(std::uint32_t split) {
    const int heads = static_cast<int>(p.part.heads), each = (heads + p.splits - 1) / p.splits;
    const int begin = min(static_cast<int>(split) * each, heads), end = min(begin + each, heads);
    const int terms = terms_of_g<Policy>(p);

    using GroupLoader = RowLoader<Policy, Policy::kThreads, Policy::kDstate>;
    GroupLoader(p.B, place.walk, group, p.dstate).load(shared.B(), place.start, place.count, 0, 0);
    GroupLoader(p.C, place.walk, group, p.dstate).load(shared.C(), place.start, place.count, 0, 0);
    cute::cp_async_fence();
    if (begin < end) {
      if (p.stages > 1) load(1, begin, 0);
      if (warp == 0) load_steps(begin);
    }
    cute::cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int pair = 0; pair < Policy::kPairs; ++pair) {
      if (!has_pairs(pair)) continue;
      Sum16 CB{};
#pragma unroll 2
      for (int k = 0; k < Policy::kDstate; k += 16)
        multiply_blocks<kTermsOfInput, kTermsOfInput, Read::rows, Read::columns>(CB, shared.B(), 16 * strip, k, shared.C(),
                                                                                 16 * block_of(pair), k);
#pragma unroll
      for (int e = 0; e < 8; ++e) shared.sums().CB[pair][e][threadIdx.x] = CB[e / 4][e % 4];
    }
    Sum16 weights[Policy::kPairs] = {};
    float dB[kColumns / 8][4] = {}, dC[kColumns / 8][4] = {};
    if (!p.is_first) {
      if (p.dB.data) load_sums(dB, p.dB_sums, split);
      if (p.dC.data) load_sums(dC, p.dC_sums, split);
    }

#pragma unroll 1
    for (at = begin; at < end; ++at) {
      const std::int64_t head = head_at(at);
      Sum16 gx[Policy::kPairs] = {};
      float dots_B[2] = {}, dots_C[2] = {}, whole = 0;
#pragma unroll 1
      for (int slice = 0; slice < static_cast<int>(p.slices); ++slice) {
        next_tiles(slice, end);
        const int columns = width(std::int64_t(slice) * p.slice);
#pragma unroll
        for (int pair = 0; pair < Policy::kPairs; ++pair)
          if (has_pairs(pair))
#pragma unroll
            for (int c = 0; c < Policy::kSlice; c += 16)
              if (c < columns)
                multiply_blocks<kTermsOfInput, kTerms, Read::rows, Read::columns>(gx[pair], x(), 16 * strip, c, g(),
                                                                                  16 * block_of(pair), c, kTermsOfInput, terms);
        add_from_state<kTermsOfInput>(dB, dots_B, x(), kTermsOfInput, shared.state(stage, 1), shared.B(), steps().to_end,
                                      columns);
        add_from_state<kTerms>(dC, dots_C, g(), terms, shared.state(stage, 0), shared.C(), steps().from_start, columns);
        whole += dot_states(stage, columns);
      }
#pragma unroll
      for (int pair = 0; pair < Policy::kPairs; ++pair)
        if (has_pairs(pair)) combine_pairs(pair, gx[pair], weights[pair]);
      store_dots(shared.sums().dot_B, dots_B);
      store_dots(shared.sums().dot_C, dots_C);
      whole = sum_of_warp(whole);
      if (lane_id() == 0) shared.sums().whole[warp] = whole;
      __syncthreads();
      // By warps of the last strip, which has the fewest pairs of tokens in what follows.
      if (warp == kBlocks - 1) finish_steps(head);
      if (at + 1 < end && warp == Policy::kWarps - 1) load_steps(at + 1);
#pragma unroll 1
      for (int slice = p.slices; slice-- > 0;) {
        const std::int64_t first = std::int64_t(slice) * p.slice;
        if (slice + 1 < static_cast<int>(p.slices)) next_tiles(2 * p.slices - 2 - slice, end);
#pragma unroll 1
        for (int column = 16 * part; column < width(first); column += 16 * kParts) {
          store_dx(head, first, column, terms);
          if (p.dz.data) store_dz(head, first, column);
        }
        if (p.dD_shares) {
          __syncthreads();
          store_dD(head, first);
        }
      }
    }
    __syncthreads();
    multiply_weights(weights, dB, dC);
    store_sums(dB, p.dB, p.dB_sums, split);
    store_sums(dC, p.dC, p.dC_sums, split);
  }
};

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, 1) ssd_scan_backward_kernel(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(16) char memory[];
  const BackwardLayout<Policy> shared{memory, static_cast<int>(p.slice)};
  const std::uint32_t split = blockIdx.x % p.splits;
  const std::int64_t rest = blockIdx.x / p.splits, slot = rest / p.part.groups;
  ChunkPlace& place = shared.place();
  if (threadIdx.x == 0) place = ChunkPlace(p.sequences, slot);
  __syncthreads();
  if (place.count == 0) return;
  BackwardBlock<Policy>(p, shared, place, static_cast<int>(p.part.first_group + rest % p.part.groups)).run(split);
}

}  // namespace statescan::ssd_scan
