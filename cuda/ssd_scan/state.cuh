// The state of 16 rows of headdim in the registers of a warp: sums [16,8] of mma.sync, one for every 8 columns of dstate.
#pragma once

#include "discretise.cuh"
#include "positions.cuh"
#include "state_access.cuh"
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

// state = decay state + sum_j to_end[j] x[j] B[j] over a chunk. The products of a chunk are summed apart: the tensor core's
// sums truncate, which would add up in a state of many chunks.
template <class Policy>
__device__ void update_state(State<Policy>& state, const Columns<Policy>& x, const TileOfGroup<Policy>& sB,
                             const Steps<Policy::kChunk>& steps) {
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
      const float2 v = join(terms), w = steps.pair(steps.to_end, 16 * k + r % 2 * 8 + 2 * t);
      split(v.x * w.x, v.y * w.y, products);
#pragma unroll
      for (int i = 0; i < kTerms; ++i) weighted[k][i][r / 2 + r % 2 * 2] = products[i];
    }
  const float decay = steps.from_start[Policy::kChunk - 1];
  constexpr int kSlab = Policy::kDstate > 128 ? 32 : 64;
#pragma unroll
  for (int n = 0; n < Policy::kDstate; n += kSlab) {
    float sum[kSlab / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
#pragma unroll
      for (int j = 0; j < Policy::kTermsOfInput; ++j) {
        Bits b[kSlab / 16][4];
#pragma unroll
        for (int part = 0; part < kSlab / 16; ++part) load_transposed(sB.at(j, 16 * k, n + 16 * part), sB.kStride, b[part]);
#pragma unroll
        for (int i = 0; i < kTerms; ++i)
          if (counts<kTerms, Policy::kTermsOfInput>(i, j))
#pragma unroll
            for (int part = 0; part < kSlab / 16; ++part) {
              multiply_add(sum[2 * part], weighted[k][i], b[part][0], b[part][1]);
              multiply_add(sum[2 * part + 1], weighted[k][i], b[part][2], b[part][3]);
            }
      }
#pragma unroll
    for (int q = 0; q < kSlab / 8; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[n / 8 + q][e] = fmaf(decay, state[n / 8 + q][e], sum[q][e]);
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

// Calls visit(pair of columns, row, address, columns left from there on) for the lane's part of a state.
template <class Policy, class Visit>
__device__ void for_each_pair(const StateView& t, const StatePlace& place, std::int64_t dstate, Visit visit) {
#pragma unroll
  for (int q = 0; q < Policy::kDstate / 8; ++q)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::int64_t n = 8 * q + lane_id() % 4 * 2;
      visit(q, r, place.row + 8 * r * t.row + n * t.column, r < place.rows ? dstate - n : 0);
    }
}

// States that cannot be accessed in pairs are rare. One loop for all of them goes through a copy: in place, and unrolled, they
// took half of a kernel's code.
template <class Policy>
__device__ __noinline__ void load_elements(float* state, StateView t, StatePlace place, std::int64_t dstate) {
#pragma unroll 1
  for (int i = 0; i < Policy::kDstate / 4; ++i) {
    const std::int64_t n = 8 * (i / 2) + lane_id() % 4 * 2;
    const float2 v = load_pair<false>(place.row + 8 * (i % 2) * t.row + n * t.column, t, i % 2 < place.rows ? dstate - n : 0);
    state[2 * i] = v.x, state[2 * i + 1] = v.y;
  }
}

template <class Policy>
__device__ __noinline__ void store_elements(const float* state, StateView t, StatePlace place, std::int64_t dstate) {
#pragma unroll 1
  for (int i = 0; i < Policy::kDstate / 4; ++i) {
    const std::int64_t n = 8 * (i / 2) + lane_id() % 4 * 2;
    store_pair<false>(place.row + 8 * (i % 2) * t.row + n * t.column, t, i % 2 < place.rows ? dstate - n : 0,
                      make_float2(state[2 * i], state[2 * i + 1]));
  }
}

template <class Policy>
__device__ void load_state(State<Policy>& state, const StateView& t, const StatePlace& place, std::int64_t dstate) {
  if (t.pairs) {
    for_each_pair<Policy>(t, place, dstate, [&](int q, int r, const char* from, std::int64_t left) {
      const float2 v = load_pair<true>(from, t, left);
      state[q][2 * r] = v.x;
      state[q][2 * r + 1] = v.y;
    });
    return;
  }
  float copy[Policy::kDstate / 2];
  load_elements<Policy>(copy, t, place, dstate);
#pragma unroll
  for (int i = 0; i < Policy::kDstate / 2; ++i) state[i / 4][i % 4] = copy[i];
}

// state = decay state + one in the workspace, whose dstate is even.
template <class Policy>
__device__ void add_state(State<Policy>& state, float decay, const StatePlace& place, std::int64_t dstate) {
  const float* from = reinterpret_cast<const float*>(place.row) + lane_id() % 4 * 2;
#pragma unroll
  for (int q = 0; q < Policy::kDstate / 8; ++q)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 v = {0.0f, 0.0f};
      if (r < place.rows && 8 * q + lane_id() % 4 * 2 < dstate)
        v = *reinterpret_cast<const float2*>(from + 8 * r * dstate + 8 * q);
      state[q][2 * r] = fmaf(decay, state[q][2 * r], v.x);
      state[q][2 * r + 1] = fmaf(decay, state[q][2 * r + 1], v.y);
    }
}

// kFloat: the tensor is always float32.
template <class Policy, bool kFloat = false>
__device__ void store_state(const State<Policy>& state, const StateView& t, const StatePlace& place, std::int64_t dstate) {
  if (t.pairs) {
    for_each_pair<Policy>(t, place, dstate, [&](int q, int r, char* to, std::int64_t left) {
      store_pair<true>(to, t, left, make_float2(state[q][2 * r], state[q][2 * r + 1]));
    });
    return;
  }
  if constexpr (!kFloat && Policy::kDType != DType::float32) {
    if (t.words && t.dtype == Policy::kDType) {
      for_each_pair<Policy>(t, place, dstate, [&](int q, int r, char* to, std::int64_t left) {
        using Element = typename cuda::ElementOf<Policy::kDType>::type;
        if (left > 0) *reinterpret_cast<Bits*>(to) = cuda::narrow_word<Element>(state[q] + 2 * r);
      });
      return;
    }
  }
  float copy[Policy::kDstate / 2];
#pragma unroll
  for (int i = 0; i < Policy::kDstate / 2; ++i) copy[i] = state[i / 4][i % 4];
  store_elements<Policy>(copy, t, place, dstate);
}

// Leaves the state that comes before a chunk, tokens [begin, end) of the sequence, for the positions among these and for a
// stretch that begins with them.
template <class Policy>
__device__ void leave_states(const State<Policy>& state, const PositionsOfSequence& positions, std::int64_t begin,
                             std::int64_t end, bool enters_chunk, const Params& p, const Task& task, std::int64_t head,
                             std::int64_t first_row) {
  const auto place_in = [&](const StateView& t, std::int64_t offset) {
    int row = static_cast<int>(first_row);
    asm volatile("" : "+r"(row));  // addresses are worked out here, and take no registers from the loop
    StatePlace place(t, p, task.sequence, head, row);
    place.row += offset;
    return place;
  };
  positions.take(begin, end, [&](std::int64_t entry) {
    store_state<Policy, true>(state, p.positions.entries, place_in(p.positions.entries, entry), p.dstate);
  });
  if (p.kept.states.data && enters_chunk && begin % kStretch == 0)
    store_state<Policy>(state, p.kept.states,
                        place_in(p.kept.states, kept_index(p.sequences, task.sequence, begin) * p.kept.step), p.dstate);
}

}  // namespace statescan::ssd_scan
