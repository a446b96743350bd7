// The state of 16 rows of headdim in the registers of a warp: sums [16,8] of mma.sync, one for every 8 columns of dstate.
#pragma once

#include "discretise.cuh"
#include "tile.cuh"

namespace statescan::ssd_scan {

template <class Policy>
using State = float[Policy::kDstate / 8][4];

// x of a chunk, 16 tokens at a time, transposed: r0 (rows 0..7, tokens 0..7), r1 (0..7, 8..15), r2 (8..15, 0..7), r3
// (8..15, 8..15).
template <class Policy>
using Columns = Bits[Policy::kChunk / 16][Policy::kTermsOfInput][4];

template <class Policy>
using TileOfRows = Tile<Policy::kChunk, Policy::kRows, Policy::kTermsOfInput>;
template <class Policy>
using TileOfGroup = Tile<Policy::kChunk, Policy::kDstate, Policy::kTermsOfInput>;

template <class Policy>
__device__ void load_columns(Columns<Policy>& x, const TileOfRows<Policy>& sX, int warp) {
#pragma unroll
  for (int k = 0; k < Policy::kChunk / 16; ++k)
#pragma unroll
    for (int i = 0; i < Policy::kTermsOfInput; ++i) load_transposed(sX.at(i, 16 * k, warp * kRowsOfWarp), sX.kStride, x[k][i]);
}

// Where the state after some tokens of a chunk goes, besides to the next chunk.
struct Nowhere {
  static constexpr bool kPossible = false;
  template <class... Any>
  __device__ explicit Nowhere(const Any&...) {}
  __device__ int next(std::int64_t, int, int all) const { return all; }
  __device__ bool wanted() const { return false; }
};

// Keeps those of two tokens that lie before `count`. A weight of zero would not do: zero times NaN is NaN.
inline __device__ Bits first_tokens(int count) { return count >= 2 ? ~0u : (count == 1 ? 0xffffu : 0u); }

// state = decay state + sum_j weight[j] x[j] B[j] over the first `tokens` of the chunk: all of them to go on, fewer to tell
// `elsewhere` the state at a token, which leaves `state` as it is. The products of a chunk are summed apart: the tensor core's
// sums truncate, which would add up in a state of many chunks.
template <class Policy, class Elsewhere>
__device__ void update_state(State<Policy>& state, const Columns<Policy>& x, const TileOfGroup<Policy>& sB,
                             const Steps<Policy::kChunk>& steps, int tokens, const Elsewhere& elsewhere) {
  constexpr int kTerms = Policy::kTerms, kBlocks = Policy::kChunk / 16;
  const int t = lane_id() % 4;
  Bits weighted[kBlocks][kTerms][4];
#pragma unroll
  for (int k = 0; k < kBlocks; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Bits terms[Policy::kTermsOfInput], products[kTerms];
#pragma unroll
      for (int i = 0; i < Policy::kTermsOfInput; ++i) terms[i] = x[k][i][r];
      const int j = 16 * k + r % 2 * 8 + 2 * t;
      const float2 v = join(terms);
      float2 w = steps.pair(steps.to_end, j);
      if constexpr (Elsewhere::kPossible)
        if (tokens < Policy::kChunk) w = make_float2(steps.weight(j, tokens), steps.weight(j + 1, tokens));
      const bool both = tokens == Policy::kChunk || j + 1 < tokens, one = both || j < tokens;
      split(one ? v.x * w.x : 0.0f, both ? v.y * w.y : 0.0f, products);
#pragma unroll
      for (int i = 0; i < kTerms; ++i) weighted[k][i][r / 2 + r % 2 * 2] = products[i];
    }
  const float decay = steps.from_start[tokens - 1];
  constexpr int kSlab = 32;
#pragma unroll
  for (int n = 0; n < Policy::kDstate; n += kSlab) {
    float sum[kSlab / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
#pragma unroll
      for (int half = 0; half < kSlab / 16; ++half)
#pragma unroll
        for (int j = 0; j < Policy::kTermsOfInput; ++j) {
          Bits b[4];
          load_transposed(sB.at(j, 16 * k, n + 16 * half), sB.kStride, b);
          if constexpr (Elsewhere::kPossible)
            if (tokens < Policy::kChunk) {
#pragma unroll
              for (int r = 0; r < 4; ++r) b[r] &= first_tokens(tokens - 16 * k - r % 2 * 8 - 2 * t);
            }
#pragma unroll
          for (int i = 0; i < kTerms; ++i)
            if (counts<kTerms, Policy::kTermsOfInput>(i, j)) {
              multiply_add(sum[2 * half], weighted[k][i], b[0], b[1]);
              multiply_add(sum[2 * half + 1], weighted[k][i], b[2], b[3]);
            }
        }
#pragma unroll
    for (int q = 0; q < kSlab / 8; ++q) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[q][e] = fmaf(decay, state[n / 8 + q][e], sum[q][e]);
      if constexpr (Elsewhere::kPossible)
        if (elsewhere.wanted()) {
          elsewhere.store(n / 8 + q, sum[q]);
          continue;
        }
#pragma unroll
      for (int e = 0; e < 4; ++e) state[n / 8 + q][e] = sum[q][e];
    }
  }
}

// The addresses of a warp's state in a tensor.
struct StatePlace {
  char* row;  // of the lane's first row
  int rows;   // that exist, of the lane's two: 8 apart

  __device__ StatePlace(const StateView& t, const Params& p, std::int64_t index, std::int64_t head, std::int64_t first_row)
      : row(t.data + index * t.sequence + head * t.head + (first_row + lane_id() / 4) * t.row),
        rows(static_cast<int>((first_row + lane_id() / 4 < p.headdim) + (first_row + lane_id() / 4 + 8 < p.headdim))) {}
};

template <class Policy>
__device__ void load_state(State<Policy>& state, const StateView& t, const StatePlace& place, std::int64_t dstate) {
#pragma unroll
  for (int q = 0; q < Policy::kDstate / 8; ++q) {
    const std::int64_t n = 8 * q + lane_id() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const char* from = place.row + 8 * r * t.row + n * t.column;
      float2 v = {0.0f, 0.0f};
      if (t.pairs) {
        if (r < place.rows && n < dstate) v = *reinterpret_cast<const float2*>(from);
      } else {
        if (r < place.rows && n < dstate) v.x = cuda::load_element(from, t.dtype);
        if (r < place.rows && n + 1 < dstate) v.y = cuda::load_element(from + t.column, t.dtype);
      }
      state[q][2 * r] = v.x;
      state[q][2 * r + 1] = v.y;
    }
  }
}

// Columns 8q.. of the state.
inline __device__ void store_columns(const float (&v)[4], const StateView& t, const StatePlace& place, int q,
                                     std::int64_t dstate) {
  const std::int64_t n = 8 * q + lane_id() % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    char* to = place.row + 8 * r * t.row + n * t.column;
    if (t.pairs) {
      if (r < place.rows && n < dstate) *reinterpret_cast<float2*>(to) = make_float2(v[2 * r], v[2 * r + 1]);
    } else {
      if (r < place.rows && n < dstate) cuda::store_element(to, t.dtype, v[2 * r]);
      if (r < place.rows && n + 1 < dstate) cuda::store_element(to + t.column, t.dtype, v[2 * r + 1]);
    }
  }
}

template <class Policy>
__device__ void store_state(const State<Policy>& state, const StateView& t, const StatePlace& place, std::int64_t dstate) {
#pragma unroll
  for (int q = 0; q < Policy::kDstate / 8; ++q) store_columns(state[q], t, place, q, dstate);
}

}  // namespace statescan::ssd_scan
