// ssd_scan forward, the general path: any size up to dstate 256, any strides, float32, float16 and bfloat16, sm_80 and newer
// Math     s[i] = sum_{k<=i} dt[k] A, from the start of a chunk of q tokens, h the state that enters it:
//          y[i] = exp(s[i]) C[i].h + sum_{j<=i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j] + D x[i], then y[i] *= silu(z[i])
//          h    = exp(s[q-1]) h + sum_j B[j] exp(s[q-1] - s[j]) dt[j] x[j]
// Shapes   x, z, y [b,l,h,p], dt [b,l,h], B, C [b,l,g,n], h [p,n] of each head
// Traffic  x, z, y and dt once; B and C once for each tile of heads (from the second cache, mostly); states stay in registers
// Launch   a block of 8 warps for each (sequence, segment, tile), which walks the chunks; a warp takes 16 rows of p of a head.
// A
//          segment starts from a state that was computed before, or that the block of the segment before it hands on (plan.h)
// Numerics sums in a fixed order that depends on the segments alone; C B^T, scores, weighted x and h go into the products as
//          sums of bfloat16 terms (policy.h). Scores above the diagonal are selected away, and an x that is not finite is kept
//          out of the products that reach earlier tokens
#pragma once

#include "../common/early.cuh"
#include "state.cuh"

namespace statescan::ssd_scan {

// Shared memory of a block, cut up at run time: as many stages as fit, as many scores as a tile has heads.
template <class Policy>
struct GeneralLayout {
  using Rows = TileOfRows<Policy>;
  using Group = TileOfGroup<Policy>;
  using Scores = Tile<Policy::kChunk, Policy::kChunk, Policy::kTerms>;
  using ChunkSteps = Steps<Policy::kChunk>;

  static constexpr int kStageBytes = 2 * Group::kBytes + Rows::kBytes;
  static constexpr int kHeadBytes = Scores::kBytes + 2 * sizeof(ChunkSteps);  // steps of this chunk and of the next

  static constexpr int bytes(int stages, int heads) { return stages * kStageBytes + heads * kHeadBytes; }

  char* base;
  int stages, heads;

  __device__ char* stage(int i) const { return base + i * kStageBytes; }
  __device__ Group B(int i) const { return {reinterpret_cast<std::uint16_t*>(stage(i))}; }
  __device__ Group C(int i) const { return {reinterpret_cast<std::uint16_t*>(stage(i) + Group::kBytes)}; }
  __device__ Rows x(int i) const { return {reinterpret_cast<std::uint16_t*>(stage(i) + 2 * Group::kBytes)}; }
  __device__ Scores scores(int head) const {
    return {reinterpret_cast<std::uint16_t*>(base + stages * kStageBytes + head * Scores::kBytes)};
  }
  __device__ ChunkSteps& steps(int which, int head) const {
    char* first = base + stages * kStageBytes + heads * Scores::kBytes;
    return reinterpret_cast<ChunkSteps*>(first)[which * heads + head];
  }
};

template <class Policy>
using Outputs = float[Policy::kChunk / 16][2][4];  // y of a warp's 16 rows, as sums [16 tokens, 8 rows]

// The C B^T of a warp's part of a chunk: a strip of columns j beside 16 rows i. On the diagonal what lies above it is left out.
template <class Policy, bool kDiagonal>
struct ScoresOfWarp {
  static constexpr int kBlocks = Policy::kChunk / 16, kStrips = Policy::kWarps / kBlocks;
  static constexpr int kStrip = Policy::kChunk / kStrips > 16 ? Policy::kChunk / kStrips : 16;

  int block, first;  // rows from 16 block on, columns from `first` on
  bool inside;
  float sum[kStrip / 8][4] = {};

  __device__ ScoresOfWarp() {
    const int warp = threadIdx.x / 32, strip = warp / kBlocks;
    // The long strips of the lower rows are spread over the schedulers, one for each of 4 consecutive warps.
    block = strip % 2 ? kBlocks - 1 - warp % kBlocks : warp % kBlocks;
    first = strip * kStrip;
    inside = first < Policy::kChunk && has_columns(0);
  }

  __device__ bool has_columns(int from) const { return !kDiagonal || first + from < 16 * block + 16; }

  __device__ void multiply(const TileOfGroup<Policy>& sB, const TileOfGroup<Policy>& sC) {
    constexpr int kTerms = Policy::kTermsOfInput;
#pragma unroll
    for (int n = 0; n < Policy::kDstate; n += 16) {
      Bits c[kTerms][4];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) load_matrix(sC.at(i, 16 * block, n), sC.kStride, c[i]);
#pragma unroll
      for (int part = 0; part < kStrip / 16; ++part) {
        if (!has_columns(16 * part)) break;
#pragma unroll
        for (int j = 0; j < kTerms; ++j) {
          Bits b[4];
          load_matrix(sB.at(j, first + 16 * part, n), sB.kStride, b);
#pragma unroll
          for (int i = 0; i < kTerms; ++i)
            if (counts<kTerms, kTerms>(i, j)) {
              multiply_add(sum[2 * part], c[i], b[0], b[2]);
              multiply_add(sum[2 * part + 1], c[i], b[1], b[3]);
            }
        }
      }
    }
  }

  // Writes the strip with the weights that row(i) gives: a function of a pair of columns.
  template <class Scores, class Row>
  __device__ void store(const Scores& scores, Row row) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 16 * block + g + 8 * r;
      const auto weights = row(i);
#pragma unroll
      for (int q = 0; q < kStrip / 8; ++q) {
        const int j = first + 8 * q + 2 * t;
        if (!has_columns(8 * q)) break;
        const float2 weight = weights(j);
        const float v0 = sum[q][2 * r] * weight.x, v1 = sum[q][2 * r + 1] * weight.y;
        Bits terms[Policy::kTerms];
        split(!kDiagonal || j <= i ? v0 : 0.0f, !kDiagonal || j + 1 <= i ? v1 : 0.0f, terms);
#pragma unroll
        for (int k = 0; k < Policy::kTerms; ++k) *reinterpret_cast<Bits*>(scores.at(k, i, j)) = terms[k];
      }
    }
  }
};

// scores[i][j] = C[i].B[j] exp(s[i] - s[j]) dt[j] of every head, zero above the diagonal. C B^T is computed once for all heads.
template <class Policy>
__device__ void compute_scores(const GeneralLayout<Policy>& shared, int stage, int which, int heads) {
  ScoresOfWarp<Policy, true> part;
  if (!part.inside) return;
  part.multiply(shared.B(stage), shared.C(stage));
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
    const auto& steps = shared.steps(which, head);
    part.store(shared.scores(head), [&](int i) {
      return [&steps, high = steps.high[i], low = steps.low[i]](int j) {
        const float2 high_j = steps.pair(steps.high, j), low_j = steps.pair(steps.low, j), dt = steps.pair(steps.dt, j);
        return make_float2(exp2_fast((high - high_j.x) + (low - low_j.x)) * dt.x,
                           exp2_fast((high - high_j.y) + (low - low_j.y)) * dt.y);
      };
    });
  }
}

// y = from_start[i] C[i].h, given y = 0
template <class Policy>
__device__ void multiply_state(Outputs<Policy>& y, const State<Policy>& state, const TileOfGroup<Policy>& sC,
                               const Steps<Policy::kChunk>& steps) {
  constexpr int kTerms = Policy::kTerms;
#pragma unroll
  for (int k = 0; k < Policy::kDstate / 16; ++k) {
    Bits h[2][2][kTerms];  // of rows 0..7 and 8..15: b0 and b1
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int b = 0; b < 2; ++b) split(state[2 * k + b][2 * half], state[2 * k + b][2 * half + 1], h[half][b]);
#pragma unroll
    for (int i = 0; i < Policy::kTermsOfInput; ++i) {
      Bits c[Policy::kChunk / 16][4];
#pragma unroll
      for (int m = 0; m < Policy::kChunk / 16; ++m) load_matrix(sC.at(i, 16 * m, 16 * k), sC.kStride, c[m]);
#pragma unroll
      for (int j = 0; j < kTerms; ++j)
        if (counts<Policy::kTermsOfInput, kTerms>(i, j))
#pragma unroll
          for (int m = 0; m < Policy::kChunk / 16; ++m) {
            multiply_add(y[m][0], c[m], h[0][0][j], h[0][1][j]);
            multiply_add(y[m][1], c[m], h[1][0][j], h[1][1][j]);
          }
    }
  }
#pragma unroll
  for (int m = 0; m < Policy::kChunk / 16; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float from_start = steps.from_start[16 * m + lane_id() / 4 + 8 * r];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        y[m][half][2 * r] *= from_start;
        y[m][half][2 * r + 1] *= from_start;
      }
    }
}

// y += scores x; on the diagonal up to its blocks
template <class Policy, bool kDiagonal, class Scores>
__device__ void multiply_scores(Outputs<Policy>& y, const Scores& scores, const Columns<Policy>& x) {
  constexpr int kTerms = Policy::kTerms;
#pragma unroll
  for (int k = 0; k < Policy::kChunk / 16; ++k)
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      Bits s[Policy::kChunk / 16][4];
#pragma unroll
      for (int m = kDiagonal ? k : 0; m < Policy::kChunk / 16; ++m)
        load_matrix(scores.at(i, 16 * m, 16 * k), scores.kStride, s[m]);
#pragma unroll
      for (int j = 0; j < Policy::kTermsOfInput; ++j)
        if (counts<kTerms, Policy::kTermsOfInput>(i, j))
#pragma unroll
          for (int m = kDiagonal ? k : 0; m < Policy::kChunk / 16; ++m) {
            multiply_add(y[m][0], s[m], x[k][j][0], x[k][j][1]);
            multiply_add(y[m][1], s[m], x[k][j][2], x[k][j][3]);
          }
    }
}

inline __device__ bool is_finite(Bits bfloat16) { return (bfloat16 & 0x7f80u) != 0x7f80u; }

// Whether all x of the warp's rows are finite. Zero times what is not is NaN, and that stays in a sum.
template <class Policy>
__device__ bool all_finite(const Columns<Policy>& x) {
  __nv_bfloat162 sum = __floats2bfloat162_rn(0.0f, 0.0f);
#pragma unroll
  for (int k = 0; k < Policy::kChunk / 16; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      sum = __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&x[k][0][r]), __floats2bfloat162_rn(0.0f, 0.0f), sum);
  const Bits bits = *reinterpret_cast<const Bits*>(&sum);
  return __all_sync(~0u, (bits & 0x7fff7fffu) == 0);
}

template <class Policy>
__device__ void clear_not_finite(Columns<Policy>& x) {
#pragma unroll
  for (int k = 0; k < Policy::kChunk / 16; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Bits keep = (is_finite(x[k][0][r]) ? 0xffffu : 0u) | (is_finite(x[k][0][r] >> 16) ? 0xffff0000u : 0u);
#pragma unroll
      for (int i = 0; i < Policy::kTermsOfInput; ++i) x[k][i][r] &= keep;
    }
}

// What clear_not_finite took away, added to the tokens that it belongs to: its own and later ones.
template <class Policy, class Scores>
__device__ void add_not_finite(Outputs<Policy>& y, const Scores& scores, const TileOfRows<Policy>& sX, int warp) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
  for (int j = 0; j < Policy::kChunk; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Bits x = *sX.at(0, j, warp * kRowsOfWarp + 8 * half + 2 * t + e);
        if (is_finite(x)) continue;
#pragma unroll
        for (int m = 0; m < Policy::kChunk / 16; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int i = 16 * m + g + 8 * r;
            if (i >= j) y[m][half][2 * r + e] += __uint_as_float(Bits(*scores.at(0, i, j)) << 16) * __uint_as_float(x << 16);
          }
      }
}

// y += scores x on the diagonal, where an x that is not finite reaches no earlier token.
template <class Policy, class Scores>
__device__ void multiply_diagonal(Outputs<Policy>& y, const Scores& scores, Columns<Policy>& x, const TileOfRows<Policy>& sX,
                                  int warp) {
  if (all_finite<Policy>(x)) {
    multiply_scores<Policy, true>(y, scores, x);
    return;
  }
  clear_not_finite<Policy>(x);
  multiply_scores<Policy, true>(y, scores, x);
  add_not_finite<Policy>(y, scores, sX, warp);
  load_columns<Policy>(x, sX, warp);
}

// The lane's elements of z or y: rows 2t, 2t+1 of each half of the warp's 16, at tokens g and g+8 of each 16.
template <class Policy>
class LaneOfOutputs {
 public:
  static constexpr DType kDType = Policy::kDType;
  static constexpr bool kWide = kDType == DType::float32;
  using Pairs = Bits[Policy::kChunk / 16][2][2][kWide ? 2 : 1];  // tokens, r, half

  __device__ LaneOfOutputs(const Params& p, const Task& task, const Walk& walk, int warp)
      : walk_(walk),
        task_(task),
        rows_(p, task, warp * kRowsOfWarp),
        left_(rows_.inside ? static_cast<int>(min(std::int64_t(kRowsOfWarp), p.headdim - rows_.row)) : 0) {}

  // Bits, not numbers: nothing waits for the loads.
  __device__ void load(Pairs& pairs, const TokenView& t, std::int64_t start, int count) const {
    if (t.vector) {
      for_each_token(t, start, count, [&](int m, int r, const char* from, bool inside) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool both = inside && row() + 8 * half < left_;
          using Pair = std::conditional_t<kWide, uint2, Bits>;
          Pair pair{};
          if (both) pair = *(reinterpret_cast<const Pair*>(from) + row() / 2 + 4 * half);
          if constexpr (kWide) pairs[m][r][half][0] = pair.x, pairs[m][r][half][1] = pair.y;
          else pairs[m][r][half][0] = pair;
        }
      });
      return;
    }
    for_each_token(t, start, count, [&](int m, int r, const char* from, bool inside) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row() + 8 * half;
        const Bits low = inside && at < left_ ? cuda::load_bits(from + at * t.column, kDType) : 0;
        const Bits high = inside && at + 1 < left_ ? cuda::load_bits(from + (at + 1) * t.column, kDType) : 0;
        if constexpr (kWide) pairs[m][r][half][0] = low, pairs[m][r][half][1] = high;
        else pairs[m][r][half][0] = low | high << 16;
      }
    });
  }

  static __device__ float2 widen(const Bits (&bits)[kWide ? 2 : 1]) {
    if constexpr (kWide) return make_float2(__uint_as_float(bits[0]), __uint_as_float(bits[1]));
    else return make_float2(cuda::widen_bits(bits[0] & 0xffffu, kDType), cuda::widen_bits(bits[0] >> 16, kDType));
  }

  __device__ void store(const TokenView& t, std::int64_t start, int count, const Outputs<Policy>& y) const {
    if (t.vector) {
      for_each_token(t, start, count, [&](int m, int r, char* to, bool inside) { store_vector(to, inside, y[m], r); });
      return;
    }
    for_each_token(t, start, count, [&](int m, int r, char* to, bool inside) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (inside && row() + 8 * half + e < left_)
            cuda::store_element(to + (row() + 8 * half + e) * t.column, kDType, y[m][half][2 * r + e]);
    });
  }

 private:
  const Walk& walk_;
  const Task& task_;
  RowsOfHead rows_;
  int left_;  // of the warp's rows

  static __device__ int row() { return lane_id() % 4 * 2; }

  // Calls visit(m, r, address of the warp's rows, whether it exists) for the lane's tokens 16 m + 8 r + g.
  template <class Visit>
  __device__ void for_each_token(const TokenView& t, std::int64_t start, int count, Visit visit) const {
    const std::int64_t step = walk_.sign * t.token;
    char* at = rows_.in(t, task_, walk_) + (start + lane_id() / 4) * step;
#pragma unroll
    for (int m = 0; m < Policy::kChunk / 16; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r, at += 8 * step) visit(m, r, at, 16 * m + 8 * r + lane_id() / 4 < count);
  }

  __device__ void store_vector(char* to, bool inside, const float (&y)[2][4], int r) const {
    const float *first = y[0] + 2 * r, *second = y[1] + 2 * r;
    if constexpr (kWide) {
      if (inside && row() < left_) *reinterpret_cast<float2*>(to + 4 * row()) = make_float2(first[0], first[1]);
      if (inside && row() + 8 < left_) *reinterpret_cast<float2*>(to + 4 * (row() + 8)) = make_float2(second[0], second[1]);
    } else {
      // Neighbours exchange a half, so that each has 4 elements in a row, and 4 lanes fill a sector of 32 bytes.
      using Element = typename cuda::ElementOf<kDType>::type;
      const Bits low = cuda::narrow_word<Element>(first), high = cuda::narrow_word<Element>(second);
      const bool odd = lane_id() % 2;
      const Bits other = __shfl_xor_sync(~0u, odd ? low : high, 1);
      const int at = odd ? row() + 6 : row();
      if (inside && at < left_)
        *reinterpret_cast<uint2*>(to + 2 * at) = odd ? make_uint2(other, high) : make_uint2(low, other);
    }
  }
};

// y += D x, then the gate, then out.
template <class Policy>
__device__ void finish_outputs(Outputs<Policy>& y, const Params& p, const LaneOfOutputs<Policy>& lane,
                               const typename LaneOfOutputs<Policy>::Pairs& z, const float (&D)[2][2],
                               const TileOfRows<Policy>& sX, int warp, std::int64_t start, int count) {
  const auto for_each_pair = [&](auto visit) {
#pragma unroll
    for (int m = 0; m < Policy::kChunk / 16; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) visit(m, r, half, y[m][half][2 * r], y[m][half][2 * r + 1]);
  };
  if (p.D.data)
    for_each_pair([&](int m, int r, int half, float& y0, float& y1) {
      Bits terms[Policy::kTermsOfInput];
#pragma unroll
      for (int i = 0; i < Policy::kTermsOfInput; ++i)
        terms[i] = *reinterpret_cast<const Bits*>(
            sX.at(i, 16 * m + 8 * r + lane_id() / 4, warp * kRowsOfWarp + 8 * half + lane_id() % 4 * 2));
      const float2 x = join(terms);
      y0 = fmaf(D[half][0], x.x, y0);
      y1 = fmaf(D[half][1], x.y, y1);
    });
  if (p.z.data)
    for_each_pair([&](int m, int r, int half, float& y0, float& y1) {
      const float2 gate = lane.widen(z[m][r][half]);
      y0 *= cuda::fast_silu(gate.x);
      y1 *= cuda::fast_silu(gate.y);
    });
  if (p.y.data) lane.store(p.y, start, count, y);
}

// D of the lane's rows.
template <class Policy>
__device__ void load_D(float (&D)[2][2], const Params& p, std::int64_t head, std::int64_t first_row) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::int64_t row = first_row + i / 2 * 8 + lane_id() % 4 * 2 + i % 2;
    const bool inside = p.D.data && row < p.headdim;
    D[i / 2][i % 2] = inside ? *reinterpret_cast<const float*>(p.D.data + head * p.D.head + row * p.D.column) : 0.0f;
  }
}

// y past the last packed token.
template <class Policy>
__device__ void clear_outputs(const Params& p, const Task& task, const Walk& walk) {
  const RowsOfHead rows(p, task, threadIdx.x % Policy::kRows);
  if (!rows.inside) return;
  constexpr int kStep = Policy::kThreads / Policy::kRows;
  for (std::int64_t i = threadIdx.x / Policy::kRows; i < walk.length; i += kStep)
    cuda::store_element(rows.in(p.y, task, walk) + i * walk.sign * p.y.token, Policy::kDType, 0.0f);
}

// Returns once the earlier segments of the block's rows have handed on their state.
inline __device__ void wait_for_segments(const unsigned* done, std::int64_t segments) {
  if (threadIdx.x == 0) {
    unsigned count;
    do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(count) : "l"(done) : "memory");
    while (count < segments);
  }
  __syncthreads();
}

inline __device__ void segment_is_done(unsigned* done, std::int64_t segment) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(done), "r"(static_cast<unsigned>(segment) + 1) : "memory");
}

template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, 1) ssd_scan_general_kernel(const __grid_constant__ Params p, int stages) {
  constexpr int kChunk = Policy::kChunk;
  extern __shared__ __align__(16) char memory[];
  cuda::let_next_kernel_in();
  const GeneralLayout<Policy> shared{memory, stages, static_cast<int>(p.tasks.heads)};
  const Task task = task_of(p.tasks);
  const Walk walk = walk_of(p.sequences, task.sequence, task.segment);
  if (task.sequence == p.sequences.count) {
    cuda::wait_for_earlier_kernels();
    clear_outputs<Policy>(p, task, walk);
    return;
  }

  const int warp = threadIdx.x / 32;
  const auto [head, first_row, has_rows] = Slot(p.tasks, task, warp);

  const bool ends_sequence = task.segment + 1 == p.tasks.end_segment, hands_on = p.done && !ends_sequence;
  const bool needs_last_state = hands_on || (ends_sequence && (p.final_state.data || p.positions.data));
  const bool receives = p.places > 0 && (task.segment > 0 || !p.done);
  const StateView& from = receives ? p.between : p.start;
  unsigned* const done = p.done + task.sequence * p.tasks.tiles + blockIdx.x % p.tasks.tiles;
  if (p.done && receives) wait_for_segments(done, task.segment);
  const PositionsOfSequence positions(p.positions, task.sequence);
  cuda::wait_for_earlier_kernels();  // nothing was read before that they write
  State<Policy> state{};
  float D[2][2] = {};
  if (has_rows) {
    const auto place = [&](std::int64_t at) { return StatePlace(from, p, at, task.first_head + head, first_row); };
    const std::int64_t at = receives ? task.sequence * p.places : task.sequence;
    if (receives && p.log2_decay) {
#pragma unroll 1
      for (std::int64_t i = at; i < at + task.segment; ++i) {
        const float decay = i > at ? exp2_fast(p.log2_decay[i * p.nheads + task.first_head + head]) : 0.0f;
        add_state<Policy>(state, decay, place(i), p.dstate);
      }
    } else if (from.data) {
      load_state<Policy>(state, from, place(receives && !p.done ? at + task.segment * p.sequences.pieces : at), p.dstate);
    }
    load_D<Policy>(D, p, task.first_head + head, first_row);
  }

  const auto load_B = group_loader<Policy>(p.B, p, task, walk), load_C = group_loader<Policy>(p.C, p, task, walk);
  const auto load_x = head_loader<Policy>(p.x, p, task, walk);
  const auto count_at = [&](std::int64_t start) {
    return static_cast<int>(max(0l, min(std::int64_t(kChunk), walk.length - start)));
  };
  const auto load = [&](int stage, std::int64_t start) {
    const int count = count_at(start);
    load_B.load(shared.B(stage), start, count);
    load_C.load(shared.C(stage), start, count);
    load_x.load(shared.x(stage), start, count);
    cute::cp_async_fence();
  };
  const LaneOfOutputs<Policy> lane(p, task, walk, warp);
  // The last warps, which have the least of the scores, find the steps of a head each.
  const int steps_head = Policy::kWarps - 1 - warp;
  StepLoader<kChunk> step_loader(p, walk, task.first_head + min(steps_head, task.heads - 1));
  const bool has_steps = steps_head < task.heads;
  if (has_steps && walk.length > 0) {
    step_loader.load(0, count_at(0));
    step_loader.finish(shared.steps(0, steps_head));
    step_loader.load(kChunk, count_at(kChunk));
  }
  if (walk.length > 0) load(0, 0);

  int stage = 0, which = 0;
#pragma unroll 1
  for (std::int64_t start = 0;; start += kChunk) {
    const int count = count_at(start);
    const std::int64_t before = walk.before + min(start, walk.length);
    if (has_rows)
      leave_states<Policy>(state, positions, before, before + (ends_sequence && start >= walk.length ? 1 : count), count > 0, p,
                           task, task.first_head + head, first_row);
    if (start >= walk.length) break;
    const bool is_last = start + kChunk >= walk.length;
    cute::cp_async_wait<0>();
    __syncthreads();  // this chunk's tiles and steps are there, and nobody reads the last chunk's any more
    if (stages > 1 && !is_last) load(1 - stage, start + kChunk);
    if (has_steps && !is_last) {
      step_loader.finish(shared.steps(1 - which, steps_head));
      step_loader.load(start + 2 * kChunk, count_at(start + 2 * kChunk));
    }
    compute_scores<Policy>(shared, stage, which, task.heads);
    const auto& steps = shared.steps(which, head);
    Outputs<Policy> y{};
    if (has_rows && (start > 0 || from.data)) multiply_state<Policy>(y, state, shared.C(stage), steps);
    __syncthreads();
    if (has_rows) {
      typename LaneOfOutputs<Policy>::Pairs z;
      if (p.z.data) lane.load(z, p.z, start, count);
      Columns<Policy> x;
      load_columns<Policy>(x, shared.x(stage), warp);
      multiply_diagonal<Policy>(y, shared.scores(head), x, shared.x(stage), warp);
      finish_outputs<Policy>(y, p, lane, z, D, shared.x(stage), warp, start, count);
      if (!is_last || needs_last_state) update_state<Policy>(state, x, shared.B(stage), steps);
    }
    if (stages == 1 && !is_last) {
      __syncthreads();  // the only stage is read by all before it is written again
      load(0, start + kChunk);
    }
    if (stages > 1) stage = 1 - stage;
    which = 1 - which;
  }

  const StateView& to = hands_on ? p.between : p.final_state;
  if (has_rows && (hands_on || (ends_sequence && to.data)))
    store_state<Policy>(state, to, StatePlace(to, p, task.sequence, task.first_head + head, first_row), p.dstate);
  if (hands_on) segment_is_done(done, task.segment);
}

}  // namespace statescan::ssd_scan
