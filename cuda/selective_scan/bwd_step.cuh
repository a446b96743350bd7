// A few tokens of the backward: their states forward into registers, then their gradients from the last to the first.
#pragma once

#include "fwd_kernel.cuh"

namespace statescan::selective_scan {

// D += A B of one warp: 16x8 by 8x8, added up in float32. Of the mantissas 10 bits count, the others are cut off.
inline __device__ void multiply_tf32(float (&D)[4], const std::uint32_t (&A)[4], std::uint32_t B0, std::uint32_t B1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
}

// Sums of 32 rows over a warp. Lane i ends with the sum of row i.
inline __device__ float sum_over_warp(float (&left)[kWarp]) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const bool odd = threadIdx.x & distance;
#pragma unroll
    for (int k = 0; k < kWarp / 2 / distance; ++k) {
      const float kept = odd ? left[2 * k + 1] : left[2 * k], given = odd ? left[2 * k] : left[2 * k + 1];
      left[k] = kept + __shfl_xor_sync(0xffffffffu, given, distance);
    }
  }
  return left[0];
}

// The same in a third of the instructions, the first additions by the tensor cores. What is added is cut to 11 bits: for a sum
// that ends as bfloat16, times kCutOff. Four rows are a matrix of 16 by 8; one of zeros and ones adds up its left and its right
// half into columns 2m and 2m + 1 of D. The rest waits for shuffles, so it is apart: of several sums at once.
struct CoarseSum {
  float D[2][4] = {};

  __device__ void add(const float (&rows)[kWarp], int lane) {
    constexpr std::uint32_t kOne = 0x3f800000;
    const int quad = lane / 4;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const of = rows + half * 16 + 4 * m;
        const std::uint32_t A[4] = {__float_as_uint(of[0]), __float_as_uint(of[1]), __float_as_uint(of[2]),
                                    __float_as_uint(of[3])};
        multiply_tf32(D[half], A, quad == 2 * m ? kOne : 0, quad == 2 * m + 1 ? kOne : 0);
      }
    }
  }
  __device__ float over_warp(int lane) const {
    const bool second = lane & 16, lower = lane & 8, right = lane & 4;
    float four[4], two[2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      four[i] = (second ? D[1][i] : D[0][i]) + __shfl_xor_sync(0xffffffffu, second ? D[0][i] : D[1][i], 16);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      two[i] = (lower ? four[i + 2] : four[i]) + __shfl_xor_sync(0xffffffffu, lower ? four[i] : four[i + 2], 8);
    return (right ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, right ? two[0] : two[1], 4);
  }
  // The row whose sum a lane ends with.
  static __device__ int row_of_lane(int lane) { return (lane & 16) + (lane & 3) * 4 + (lane & 4) / 2 + (lane & 8) / 8; }
};

// The states and decays of kSub tokens, forward from h: hs[i] is the state before token i. Gives the warp's part of y.
template <class Policy, int kSub>
struct Trail {
  static constexpr int kValues = Policy::kValues, kParts = Policy::kParts;
  float h[kSub + 1][2][kValues], factor[kSub][2][kValues];
  std::uint32_t from_one[(kSub * 2 * Policy::kStates + 31) / 32] = {};  // a bit a decay

  __device__ Step<Policy::kArithmetic> step(int i, int c, int v) const {
    Step<Policy::kArithmetic> s;
#pragma unroll
    for (int part = 0; part < kParts; ++part) s.factor[part] = factor[i][c][v + part];
    s.from_one = Policy::kArithmetic != Arithmetic::fast && from_one[bit(i, c, v) / 32] >> bit(i, c, v) % 32 & 1;
    return s;
  }
  __device__ void walk(const TileInputs& in, int first, const float (&rate)[2][kValues], float* sums) {
    float y[kSub][2] = {};  // stored last: the compiler takes a store for a hazard to the loads after it
#pragma unroll
    for (int i = 0; i < kSub; ++i) {
      TokenInputs<Policy, true> now;
      now.read(in, first + i);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int v = 0; v < kValues; v += kParts) {
          const Step<Policy::kArithmetic> s = step_of<Policy::kArithmetic>(now.dt[c], &rate[c][v]);
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            factor[i][c][v + part] = s.factor[part], h[i + 1][c][v + part] = h[i][c][v + part];
          if constexpr (Policy::kArithmetic != Arithmetic::fast)
            from_one[bit(i, c, v) / 32] |= static_cast<std::uint32_t>(s.from_one) << bit(i, c, v) % 32;
          advance<Policy::kArithmetic>(&h[i + 1][c][v], s, now.u[c], now.B_of(c) + v);
          y[i][c] = read_out<kParts>(now.C_of(c) + v, &h[i + 1][c][v], y[i][c]);
        }
    }
#pragma unroll
    for (int i = 0; i < kSub; ++i)
      *reinterpret_cast<float2*>(sums + (first + i) * kChannels) = make_float2(kParts * y[i][0], kParts * y[i][1]);
  }

 private:
  static constexpr __device__ int bit(int i, int c, int v) { return (i * 2 + c) * (kValues / kParts) + v / kParts; }
};

// Gradients that a thread adds up over its segment.
template <class Policy>
struct Totals {
  float A[2][Policy::kValues] = {};
  float B[2][Policy::kTimeInvariant ? Policy::kValues : 1] = {}, C[2][Policy::kTimeInvariant ? Policy::kValues : 1] = {};
};

// One token backwards. `terms`: what this lane adds to dB, then to dC. Returns du and A.q of the lane's channels, A scaled as
// rates are.
template <class Policy>
__device__ float4 step_back(const TileInputs& in, const float* gradients, int token, const float (&rate)[2][Policy::kValues],
                            const float (&before)[2][Policy::kValues], const float (&after)[2][Policy::kValues],
                            const Step<Policy::kArithmetic> (&steps)[2][Policy::kStates], float (&g)[2][Policy::kValues],
                            Totals<Policy>& totals, float* terms) {
  constexpr int kValues = Policy::kValues, kParts = Policy::kParts;
  TokenInputs<Policy, true> now;
  now.read(in, token);
  const float2 gradient = *reinterpret_cast<const float2*>(gradients + token * kChannels);
  const float dr[2] = {kParts * gradient.x, kParts * gradient.y};
  float du[2] = {}, dlog[2] = {};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int v = 0; v < kValues; v += kParts) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float sign = part == 0 ? 1.0f : -1.0f;  // of a conjugate
        g[c][v + part] = fmaf(sign * now.C_of(c)[v + part], dr[c], g[c][v + part]);
        const float dB = g[c][v + part] * now.u[c], dC = sign * after[c][v + part] * dr[c];
        terms[v + part] = c == 0 ? dB : fmaf(g[c][v + part], now.u[c], terms[v + part]);
        terms[kValues + v + part] = c == 0 ? dC : fmaf(sign * after[c][v + part], dr[c], terms[kValues + v + part]);
        if constexpr (Policy::kTimeInvariant) totals.B[c][v + part] += dB, totals.C[c][v + part] += dC;
        du[c] = fmaf(g[c][v + part], now.B_of(c)[v + part], du[c]);
      }
      retreat<Policy::kArithmetic>(&g[c][v], steps[c][v / kParts]);
      if constexpr (kParts == 1) {
        const float q = g[c][v] * before[c][v];
        dlog[c] = fmaf(q, rate[c][v], dlog[c]);
        totals.A[c][v] = fmaf(q, now.dt[c], totals.A[c][v]);
      } else {
        const float real = fmaf(g[c][v + 1], before[c][v + 1], g[c][v] * before[c][v]);
        const float imag = fmaf(g[c][v + 1], before[c][v], -g[c][v] * before[c][v + 1]);
        dlog[c] = fmaf(real, rate[c][v], fmaf(imag * kRateScale, rate[c][v + 1], dlog[c]));
        totals.A[c][v] = fmaf(real, now.dt[c], totals.A[c][v]), totals.A[c][v + 1] = fmaf(imag, now.dt[c], totals.A[c][v + 1]);
      }
    }
  }
  return make_float4(du[0], du[1], dlog[0], dlog[1]);
}

}  // namespace statescan::selective_scan
