// The decay exp(dt A) of the Mamba-1 recurrence, whose A is real or complex. Real parts go through 2^v, so that no
// multiplication by log2(e) is left in the loop over tokens: a kernel scales A once, by kRateScale.
#pragma once

#include "simd.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// What A is multiplied by before dt: decay_of(dt * (A * kRateScale)) = exp(dt A).
template <class T>
inline constexpr T kRateScale = T(1);
template <>
inline constexpr float kRateScale<float> = 1.44269504f;

// A decay as what is added to a state: state' = factor state (+ state in the lanes of from_one). Near one the factor is
// decay - 1, since rounding the decay itself would be the same error at every token of a constant dt, and add up over a long
// memory.
template <class T>
struct Decay {
  Vec<T> factor;
  IntVec<T> from_one;  // all bits or none
};

// 2^v within 1 ulp: v = k + f with |f| <= 1/2, 2^f = 1 + f q(f) with q minimax; from one where k = 0.
STATESCAN_INLINE Decay<float> decay_of(Vec<float> v) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  // Below 2^-150 all is zero; this operand order keeps NaN. vscalefps does the rest: gradual underflow and infinity.
  const V x = _mm512_max_ps(splat(-160.0f), v);
  const V k = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const V high = splat(129.0f), low = splat(-160.0f);
  const V x = v > high ? high : (v < low ? low : v);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const V shifted = x + kRound;
  const V k = shifted - kRound;
#endif
  const V f = x - k;
  V q = fma(splat(1.5353362e-4f), f, splat(1.3398875e-3f));
  q = fma(q, f, splat(9.6184369e-3f));
  q = fma(q, f, splat(5.5503324e-2f));
  q = fma(q, f, splat(2.4022648e-1f));
  q = fma(q, f, splat(6.9314718e-1f));
  const IntVec<float> from_one = k == 0.0f;
  const V e = fma(q, f, from_one ? V{} : splat(1.0f));
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(e, k), from_one};
#else
  using I = IntVec<float>;
  const I n = bits_as<I>(shifted) - std::int32_t(0x4B400000);  // the integer k
  const I half = n >> 1;                                       // two factors, so that neither under- nor overflows alone
  const V result = e * bits_as<V>((half + 127) << 23) * bits_as<V>((n - half + 127) << 23);
  return {v == v ? result : v, from_one};
#endif
}

STATESCAN_INLINE Decay<double> decay_of(Vec<double> v) { return {exp(v), IntVec<double>{}}; }

// The decay itself.
template <class T>
STATESCAN_INLINE Vec<T> whole_decay(Vec<T> v) {
  const Decay<T> decay = decay_of(v);
  return decay.from_one ? decay.factor + T(1) : decay.factor;
}

template <class T>
struct SinCos {
  Vec<T> sin, cos;
  Vec<T> cos_minus_one;  // where small
  IntVec<T> small;       // the angle lies in the first quadrant about zero
};

// sin and cos of x + tail, a product and its rounding error. pi/2 is taken off in three parts: exact for |x| up to about 1e4
// in float (1e9 in double). Beyond `limit` neighbouring numbers lie so far apart that the angle means nothing: the result
// is that of `limit`, still on the unit circle.
STATESCAN_INLINE SinCos<float> sincos(Vec<float> x, Vec<float> tail) {
  using V = Vec<float>;
  using I = IntVec<float>;
  const V limit = splat(1e6f);
  x = x > limit ? limit : (x < -limit ? -limit : x);
  constexpr float kRound = 12582912.0f;
  const V shifted = fma(x, splat(0.636619772f), splat(kRound));
  const V k = shifted - kRound;
  const I quadrant = bits_as<I>(shifted);
  V r = fma(k, splat(-1.5703125f), x);
  r = fma(k, splat(-4.837512969970703125e-4f), r);
  r = fma(k, splat(-7.54978995489188216e-8f), r);
  r = r + tail;
  const V r2 = r * r;
  V s = fma(r2, splat(-1.9515295891e-4f), splat(8.3321608736e-3f));
  s = fma(s, r2, splat(-1.6666654611e-1f));
  s = fma(s * r2, r, r);
  V c = fma(r2, splat(2.443315711809948e-5f), splat(-1.388731625493765e-3f));
  c = fma(c, r2, splat(4.166664568298827e-2f));
  c = fma(c, r2, splat(-0.5f));
  const V cos_minus_one = c * r2;
  c = fma(c, r2, splat(1.0f));
  const I odd = (quadrant & 1) != 0;
  const V sine = odd ? c : s, cosine = odd ? s : c;
  return {(quadrant & 2) != 0 ? -sine : sine, ((quadrant + 1) & 2) != 0 ? -cosine : cosine, cos_minus_one, k == V{}};
}

STATESCAN_INLINE SinCos<double> sincos(Vec<double> x, Vec<double> tail) {
  using V = Vec<double>;
  using I = IntVec<double>;
  const V limit = splat(1e14);
  x = x > limit ? limit : (x < -limit ? -limit : x);
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const V shifted = fma(x, splat(0.63661977236758134), splat(kRound));
  const V k = shifted - kRound;
  const I quadrant = bits_as<I>(shifted);
  V r = fma(k, splat(-1.57079632673412561417), x);
  r = fma(k, splat(-6.07710050630396597660e-11), r);
  r = fma(k, splat(-2.02226624879595063154e-21), r);
  r = r + tail;
  const V r2 = r * r;
  V s = fma(r2, splat(1.58969099521155010221e-10), splat(-2.50507602534068634195e-08));
  s = fma(s, r2, splat(2.75573137070700676789e-06));
  s = fma(s, r2, splat(-1.98412698298579493134e-04));
  s = fma(s, r2, splat(8.33333333332248946124e-03));
  s = fma(s, r2, splat(-1.66666666666666324348e-01));
  s = fma(s * r2, r, r);
  V c = fma(r2, splat(-1.13596475577881948265e-11), splat(2.08757232129817482790e-09));
  c = fma(c, r2, splat(-2.75573143513906633035e-07));
  c = fma(c, r2, splat(2.48015872894767294178e-05));
  c = fma(c, r2, splat(-1.38888888888741095749e-03));
  c = fma(c, r2, splat(4.16666666666666019037e-02));
  c = fma(c, r2, splat(-0.5));
  const V cos_minus_one = c * r2;
  c = fma(c, r2, splat(1.0));
  const I odd = (quadrant & 1) != 0;
  const V sine = odd ? c : s, cosine = odd ? s : c;
  return {(quadrant & 2) != 0 ? -sine : sine, ((quadrant + 1) & 2) != 0 ? -cosine : cosine, cos_minus_one, k == V{}};
}

// A real or complex vector: kParts is 1 or 2.
template <class T, int kParts>
struct Parts {
  Vec<T> part[kParts];
};

// exp(dt A) and the lanes in which its real part is kept as decay - 1.
template <class T, int kParts>
struct Step {
  Parts<T, kParts> factor;
  IntVec<T> from_one;
};

// From the parts of A: the real one scaled by kRateScale, the imaginary one as it is. The rounding error of dt Im A is kept,
// for phases add up over a sequence.
template <class T, int kParts>
STATESCAN_INLINE Step<T, kParts> decay(Vec<T> dt, const Parts<T, kParts>& rate) {
  const Decay<T> size = decay_of(dt * rate.part[0]);
  if constexpr (kParts == 1) {
    return {{{size.factor}}, size.from_one};
  } else {
    const Vec<T> angle = dt * rate.part[1];
    const SinCos<T> turn = sincos(angle, fma(dt, rate.part[1], -angle));
    const IntVec<T> from_one = size.from_one & turn.small;
    const Vec<T> whole = size.from_one ? size.factor + T(1) : size.factor;
    // |decay| cos - 1 = (|decay| - 1) cos + (cos - 1)
    const Vec<T> real = from_one ? fma(size.factor, turn.cos, turn.cos_minus_one) : whole * turn.cos;
    return {{{real, whole * turn.sin}}, from_one};
  }
}

// state = decay state + u B, one rounding a term.
template <class T, int kParts>
STATESCAN_INLINE Parts<T, kParts> advance(const Step<T, kParts>& step, const Parts<T, kParts>& state, Vec<T> u,
                                          const Parts<T, kParts>& B) {
  const Parts<T, kParts>& factor = step.factor;
  if constexpr (kParts == 1) {
    const Vec<T> added = fma(factor.part[0], state.part[0], u * B.part[0]);
    return {{step.from_one ? added + state.part[0] : added}};
  } else {
    const Vec<T> real = fma(-factor.part[1], state.part[1], fma(factor.part[0], state.part[0], u * B.part[0]));
    const Vec<T> imag = fma(factor.part[1], state.part[0], fma(factor.part[0], state.part[1], u * B.part[1]));
    return {{step.from_one ? real + state.part[0] : real, step.from_one ? imag + state.part[1] : imag}};
  }
}

// sum + Re(C state).
template <class T, int kParts>
STATESCAN_INLINE Vec<T> read_out(const Parts<T, kParts>& C, const Parts<T, kParts>& state, Vec<T> sum) {
  sum = fma(C.part[0], state.part[0], sum);
  if constexpr (kParts == 2) sum = fma(-C.part[1], state.part[1], sum);
  return sum;
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
