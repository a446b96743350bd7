// The decay exp(dt A) and the step of a state, for a real or complex A.
#pragma once

#include "../common/element.cuh"
#include "policy.h"

namespace statescan::selective_scan {

// A's real part is scaled by this once, so that the decay is 2^(dt rate).
inline constexpr float kRateScale = 1.44269504f;

// A decay as what is added to a state: state' = factor state (+ state where from_one). Near one the factor is decay - 1, since
// rounding the decay itself would be the same error at every token of a constant dt, and add up over a long memory.
struct Decay {
  float factor;
  bool from_one;
};

// 2^v: from one below 2^-3, by a polynomial that is within 6e-9 of 2^v - 1 there; what lies beyond has a memory of 12 tokens.
inline __device__ Decay decay_of(float v) {
  constexpr float kNear = 0.125f;
  float q = fmaf(9.6211430e-3f, v, 5.5524953e-2f);
  q = fmaf(q, v, 2.4022650e-1f);
  q = fmaf(q, v, 6.9314714e-1f);
  const bool near = fabsf(v) <= kNear;
  return {near ? q * v : cuda::fast_exp2(v), near};
}

// log(1 + exp(v)). Beside 16-bit x within 9e-6 of itself, with one instruction of the special-function unit: log(1 + e) / e for
// e up to 1 is a polynomial.
template <Arithmetic arithmetic>
__device__ float softplus(float v) {
  if constexpr (arithmetic == Arithmetic::fast) {
    const float e = cuda::fast_exp2(-1.44269504f * fabsf(v));
    float q = fmaf(e, -2.38691494e-2f, 1.01222292e-1f);
    q = fmaf(e, q, -2.10048720e-1f);
    q = fmaf(e, q, 3.25206697e-1f);
    q = fmaf(e, q, -4.99361366e-1f);
    q = fmaf(e, q, 9.99991596e-1f);
    return fmaf(e, q, fmaxf(v, 0.0f));
  } else {
    return cuda::fast_softplus(v);
  }
}

// d softplus(v) / dv
inline __device__ float softplus_slope(float v) {
  const float e = cuda::fast_exp2(-1.44269504f * fabsf(v)), above = cuda::fast_reciprocal(1.0f + e);
  return v < 0.0f ? e * above : above;
}

struct SinCos {
  float sin, cos, cos_minus_one;  // cos_minus_one where small
  bool small;                     // the angle lies in the first quadrant about zero
};

// sin and cos of x + tail, a product and its rounding error. pi/2 is taken off in three parts, exact for |x| up to about 1e4;
// beyond 1e6 neighbouring floats lie so far apart that the angle means nothing, and the result is that of 1e6.
inline __device__ SinCos sincos_of(float x, float tail) {
  constexpr float kLimit = 1e6f;
  x = x > kLimit ? kLimit : (x < -kLimit ? -kLimit : x);
  const float k = rintf(x * 0.636619772f);
  const int quadrant = static_cast<int>(k);
  float r = fmaf(k, -1.5703125f, x);
  r = fmaf(k, -4.837512969970703125e-4f, r);
  r = fmaf(k, -7.54978995489188216e-8f, r);
  r += tail;
  const float r2 = r * r;
  float s = fmaf(r2, -1.9515295891e-4f, 8.3321608736e-3f);
  s = fmaf(s, r2, -1.6666654611e-1f);
  s = fmaf(s * r2, r, r);
  float c = fmaf(r2, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = fmaf(c, r2, 4.166664568298827e-2f);
  c = fmaf(c, r2, -0.5f);
  const float cos_minus_one = c * r2, cosine = cos_minus_one + 1.0f;
  const bool odd = quadrant & 1;
  const float first = odd ? cosine : s, second = odd ? s : cosine;
  return {quadrant & 2 ? -first : first, (quadrant + 1) & 2 ? -second : second, cos_minus_one, quadrant == 0};
}

// exp(dt rate) as what is added to a state; rate is A with its real part scaled by kRateScale.
template <Arithmetic arithmetic>
struct Step {
  static constexpr int kParts = arithmetic == Arithmetic::complex_rate ? 2 : 1;
  float factor[kParts];
  bool from_one;  // of the real part
};

template <Arithmetic arithmetic>
__device__ Step<arithmetic> step_of(float dt, const float* rate) {
  if constexpr (arithmetic == Arithmetic::fast) {
    return {{cuda::fast_exp2(dt * rate[0])}, false};
  } else if constexpr (arithmetic == Arithmetic::precise) {
    const Decay decay = decay_of(dt * rate[0]);
    return {{decay.factor}, decay.from_one};
  } else {
    const Decay size = decay_of(dt * rate[0]);
    const float angle = dt * rate[1];
    const SinCos turn = sincos_of(angle, fmaf(dt, rate[1], -angle));
    const bool from_one = size.from_one && turn.small;
    const float whole = size.from_one ? size.factor + 1.0f : size.factor;
    // |decay| cos - 1 = (|decay| - 1) cos + (cos - 1)
    return {{from_one ? fmaf(size.factor, turn.cos, turn.cos_minus_one) : whole * turn.cos, whole * turn.sin}, from_one};
  }
}

// state' = exp(dt rate) state + u B
template <Arithmetic arithmetic>
__device__ void advance(float* state, const Step<arithmetic>& step, float u, const float* B) {
  if constexpr (arithmetic == Arithmetic::complex_rate) {
    const float real = fmaf(-step.factor[1], state[1], fmaf(step.factor[0], state[0], u * B[0]));
    const float imag = fmaf(step.factor[1], state[0], fmaf(step.factor[0], state[1], u * B[1]));
    state[0] = real + (step.from_one ? state[0] : 0.0f);
    state[1] = imag + (step.from_one ? state[1] : 0.0f);
  } else {
    const float added = fmaf(step.factor[0], state[0], u * B[0]);
    state[0] = arithmetic == Arithmetic::precise ? added + (step.from_one ? state[0] : 0.0f) : added;
  }
}

// adjoint' = conj(exp(dt rate)) adjoint
template <Arithmetic arithmetic>
__device__ void retreat(float* adjoint, const Step<arithmetic>& step) {
  if constexpr (arithmetic == Arithmetic::complex_rate) {
    const float real = fmaf(step.factor[1], adjoint[1], step.factor[0] * adjoint[0]);
    const float imag = fmaf(-step.factor[1], adjoint[0], step.factor[0] * adjoint[1]);
    adjoint[0] = real + (step.from_one ? adjoint[0] : 0.0f);
    adjoint[1] = imag + (step.from_one ? adjoint[1] : 0.0f);
  } else {
    const float kept = step.factor[0] * adjoint[0];
    adjoint[0] = arithmetic == Arithmetic::precise ? kept + (step.from_one ? adjoint[0] : 0.0f) : kept;
  }
}

// sum + Re(C state)
template <int kParts>
__device__ float read_out(const float* C, const float* state, float sum) {
  sum = fmaf(C[0], state[0], sum);
  if constexpr (kParts == 2) sum = fmaf(-C[1], state[1], sum);
  return sum;
}

// Re(C . state) of some states: pairs, then pairs of these. However states are dealt out to lanes and warps, by two, four or
// eight, their sum has the same bits.
template <int kParts, int kStates>
__device__ float output_of(const float* C, const float* state) {
  if constexpr (kStates == 2) {
    return read_out<kParts>(C + kParts, state + kParts, read_out<kParts>(C, state, 0.0f));
  } else {
    constexpr int kHalf = kStates / 2;
    return output_of<kParts, kHalf>(C, state) + output_of<kParts, kHalf>(C + kHalf * kParts, state + kHalf * kParts);
  }
}

}  // namespace statescan::selective_scan
