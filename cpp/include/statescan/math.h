// The scalar functions of the recurrences, written once for host and device.
#pragma once

#include <cmath>

#include <statescan/tensor.h>

namespace statescan {

// log(1 + exp(v)), exact for very negative v (it tends to exp(v), never to 0 too early) and v itself for large v.
template <class T>
STATESCAN_HOST_DEVICE inline T softplus(T v) {
  constexpr T kLinear = sizeof(T) == 8 ? T(40) : T(20);  // beyond it exp(-v) is below half an ulp of v
  return v > kLinear ? v : std::log1p(std::exp(v));
}

// d softplus(v) / dv, the logistic function.
template <class T>
STATESCAN_HOST_DEVICE inline T sigmoid(T v) {
  return v >= T(0) ? T(1) / (T(1) + std::exp(-v)) : std::exp(v) / (T(1) + std::exp(v));
}

template <class T>
STATESCAN_HOST_DEVICE inline T silu(T v) {
  return v * sigmoid(v);
}

// v limited to [low, high]; NaN stays NaN.
template <class T>
STATESCAN_HOST_DEVICE inline T clamp(T v, T low, T high) {
  return v < low ? low : (v > high ? high : v);
}

// The step dt of a token, from its raw value: bias, softplus and limit, in this order.
template <class T>
STATESCAN_HOST_DEVICE inline T discretise(T dt, T dt_bias, bool dt_softplus, T dt_min, T dt_max) {
  dt += dt_bias;
  if (dt_softplus) dt = softplus(dt);
  return clamp(dt, dt_min, dt_max);
}

}  // namespace statescan
