// B and C on their way from memory to the lanes of a warp.
#pragma once

#include "sequence.cuh"

namespace statescan::selective_scan {

// B or C of a tile: each lane of half a warp takes the warp's states of one token to shared memory, as they are, and from there
// as floats to [token][state].
template <class Policy>
class Projection {
 public:
  // B, or C, from the tile that starts with `token`.
  __device__ Projection(const Params& p, bool of_C, bool wanted, const Span& s, std::int64_t token, std::int64_t group,
                        std::int64_t state, std::int64_t states, uint4* slot)
      : token_(threadIdx.x % kTile), of_C_(of_C), slot_{slot, kWarp} {
    const View& t = of(p);
    states_ = wanted && (of_C ? p.varying_C : p.varying_B) ? static_cast<int>(min(states, std::int64_t(Policy::kStates))) : 0;
    at_ = row_at(p, t, s, token) + token_ * t.step + group * t.channel + state * t.state;
  }
  // Then moves by `tiles`.
  __device__ void fetch(const Params& p, int tokens, int tiles) {
    if (states_ == 0) return;
    const View& t = of(p);
    const bool wanted = token_ < tokens;
    if (Policy::kKnown || (of_C_ ? p.vectors_C : p.vectors_B)) {
      slot_.fetch_vector(at_, dtype(p), wanted);
    } else {
#pragma unroll
      for (int i = 0; i < Policy::kValues; ++i) {
        const int state = i / Policy::kParts, part = i % Policy::kParts;
        slot_.fetch_element(i, at_ + state * t.state + 4 * part, dtype(p), wanted && state < states_);
      }
    }
    at_ += tiles * kTile * t.step;
  }
  __device__ void put(const Params& p, float* tile) const {
    if (states_ == 0) return;
    float values[Policy::kValues];
    slot_.widen(dtype(p), values);
    float4* const to = reinterpret_cast<float4*>(tile + token_ * Policy::kValues);
#pragma unroll
    for (int v = 0; v < Policy::kValues; v += 4)
      to[v / 4] = make_float4(values[v], values[v + 1], values[v + 2], values[v + 3]);
  }

 private:
  char* at_;
  int token_, states_;  // states_: 0 where it does not change with the token
  bool of_C_;
  Slot<Policy::kValues> slot_;

  __device__ const View& of(const Params& p) const { return of_C_ ? p.C : p.B; }
  __device__ DType dtype(const Params& p) const { return Policy::kParts == 2 ? DType::float32 : dtype_of<Policy>(of(p)); }
};

// The same for a B or C of [d,n]: the states of a lane's two channels, [channel of the lane][lane][state].
template <class Policy>
__device__ void keep_fixed(const View& t, const Task& task, std::int64_t state, std::int64_t states, float* fixed) {
  float values[2][Policy::kValues];
  load_states<Policy>(t, 0, task, state, states, values);
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int v = 0; v < Policy::kValues; ++v) fixed[c * kWarp * Policy::kValues + v] = values[c][v];
}

// B or C at a token of the tile, for channel c of the lane; `fixed` is null where it changes with the token.
template <class Policy>
__device__ void read_projection(float (&to)[Policy::kValues], const float* tile, const float* fixed, int token, int c) {
  const float* const from =
      Policy::kTimeInvariant && fixed ? fixed + c * kWarp * Policy::kValues : tile + token * Policy::kValues;
#pragma unroll
  for (int v = 0; v < Policy::kValues; v += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + v);
    to[v] = four.x, to[v + 1] = four.y, to[v + 2] = four.z, to[v + 3] = four.w;
  }
}

}  // namespace statescan::selective_scan
