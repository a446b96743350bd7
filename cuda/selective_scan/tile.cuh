// Tiles of x, dt, z and y, [tokens, channels] in any layout: what a thread moves of each, and where that lies in shared memory.
#pragma once

#include "../common/element.cuh"
#include "../common/vector.cuh"
#include "params.h"

namespace statescan::selective_scan {

// Memory to shared memory without a register in between: 8 or 16 bytes, or as many zeros. L2 gets the whole line of 128 bytes,
// of which the following tiles of rows along the tokens take the rest.
template <int kBytes>
__device__ void copy_async(void* to, const char* from, bool wanted) {
  const std::uint32_t at = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = wanted ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes), "r"(bytes) : "memory");
}
inline __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
inline __device__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// kCount consecutive elements as they lie in memory, in shared memory of the thread's own: `pitch` words of 16 bytes from one
// word to the next, so that neighbouring threads use neighbouring banks.
template <int kCount>
struct Slot {
  uint4* at;
  int pitch;

  __device__ void fetch_vector(const char* from, DType dtype, bool wanted) const {
    if (kCount * 2 < 16 && dtype != DType::float32) {
      copy_async<8>(at, from, wanted);
      return;
    }
    const int words = kCount * cuda::bytes_of(dtype) / 16;
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w)
      if (w < words) copy_async<16>(at + w * pitch, from + 16 * w, wanted);
  }
  // One of the elements, or zero.
  __device__ void fetch_element(int i, const char* from, DType dtype, bool wanted) const {
    if (dtype == DType::float32)
      reinterpret_cast<std::uint32_t*>(at + i / 4 * pitch)[i % 4] = wanted ? *reinterpret_cast<const std::uint32_t*>(from) : 0;
    else
      reinterpret_cast<std::uint16_t*>(at + i / 8 * pitch)[i % 8] = wanted ? *reinterpret_cast<const std::uint16_t*>(from) : 0;
  }
  __device__ void widen(DType dtype, float (&values)[kCount]) const {
    if (dtype == DType::float32) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 v = at[i / 4 * pitch];
        values[i] = __uint_as_float(v.x), values[i + 1] = __uint_as_float(v.y);
        values[i + 2] = __uint_as_float(v.z), values[i + 3] = __uint_as_float(v.w);
      }
      return;
    }
    std::uint32_t pair[kCount / 2];
    if constexpr (kCount == 4) {
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      pair[0] = v.x, pair[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 8) {
        const uint4 v = at[i / 8 * pitch];
        pair[i / 2] = v.x, pair[i / 2 + 1] = v.y, pair[i / 2 + 2] = v.z, pair[i / 2 + 3] = v.w;
      }
    }
    if (dtype == DType::bfloat16) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2)
        values[i] = __uint_as_float(pair[i / 2] << 16), values[i + 1] = __uint_as_float(pair[i / 2] & 0xffff0000u);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = cuda::widen_bits(pair[i / 2] >> i % 2 * 16 & 0xffffu, DType::float16);
    }
  }
};

// The elements of a tile that a thread moves: kRun of them, along the tokens or the channels. Tokens count in scan order.
struct Place {
  int token, channel;  // of the first element
  bool along_tokens, is_vector;
  int token_step;  // along the tokens: -1 where a vector runs against the scan

  __device__ int token_of(int i) const { return along_tokens ? token + i * token_step : token; }
  __device__ int channel_of(int i) const { return along_tokens ? channel : channel + i; }
  __device__ bool holds(int i, int tokens, int channels) const { return token_of(i) < tokens && channel_of(i) < channels; }
};

// The same. What comes in vectors alone is there whole, or not at all.
template <class Policy>
__device__ bool holds(const Place& place, int i, int tokens, int channels) {
  return place.holds(Policy::kKnown ? 0 : i, tokens, channels);
}

template <class Policy>
__device__ Place place_of(Reach reach, bool reverse, int thread) {
  switch (Policy::kKnown ? Policy::kReach : reach) {
    case Reach::channels:
      return {thread / 8, thread % 8 * kRun, false, true, 1};
    case Reach::tokens:
      return {thread % 2 * kRun + (reverse ? kRun - 1 : 0), thread / 2, true, true, reverse ? -1 : 1};
    case Reach::by_channel:
      return {thread / kChannels * kRun, thread % kChannels, true, false, 1};
    default:
      return {thread % kTile, thread / kTile * kRun, false, false, 1};
  }
}

// From one of a thread's elements to its next, in bytes.
inline __device__ std::int64_t element_step(const View& t, const Place& place) {
  return place.along_tokens ? place.token_step * t.step : t.channel;
}

// The dtype of x, dt, z, y, B or C.
template <class Policy>
__device__ DType dtype_of(const View& t) {
  return Policy::kKnown ? Policy::kElement : t.dtype;
}

// The thread's elements of a tile, of which the first lies at `from`.
template <class Policy>
__device__ void fetch(const Slot<kRun>& slot, const char* from, const Params& p, const View& t, const Place& place, int tokens,
                      int channels) {
  if (place.is_vector) {
    slot.fetch_vector(from, dtype_of<Policy>(t), place.holds(0, tokens, channels));
    return;
  }
  const std::int64_t step = element_step(t, place);
#pragma unroll 4
  for (int i = 0; i < kRun; ++i) slot.fetch_element(i, from + i * step, t.dtype, place.holds(i, tokens, channels));
}

inline __device__ void store_vector(char* to, DType dtype, const float (&values)[kRun]) {
  uint4* const words = reinterpret_cast<uint4*>(to);
  if (dtype == DType::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      words[i] = make_uint4(__float_as_uint(values[4 * i]), __float_as_uint(values[4 * i + 1]),
                            __float_as_uint(values[4 * i + 2]), __float_as_uint(values[4 * i + 3]));
    return;
  }
  std::uint32_t pair[4];
  if (dtype == DType::bfloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = cuda::narrow_word<__nv_bfloat16>(values + 2 * i);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = cuda::narrow_word<__half>(values + 2 * i);
  }
  words[0] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

template <class Policy>
__device__ void store(char* to, const Params& p, const View& t, const Place& place, int tokens, int channels,
                      const float (&values)[kRun]) {
  if (place.is_vector) {
    if (place.holds(0, tokens, channels)) store_vector(to, dtype_of<Policy>(t), values);
    return;
  }
  const std::int64_t step = element_step(t, place);
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (place.holds(i, tokens, channels)) cuda::store_element(to + i * step, t.dtype, values[i]);
}

// ---- shared memory ---------------------------------------------------------------------------------------------------------
// Steps of a tile, [token][pair of channels] of {dt, dt, u, u}. The pairs are permuted so that threads that write eight
// channels each, and lanes that read one pair each, both touch all banks.
inline __device__ int slot_of_pair(int pair) { return pair ^ (pair >> 3 & 3); }

template <bool kAlongTokens>
__device__ void put_steps(float4* steps, const Place& place, const float (&dt)[kRun], const float (&u)[kRun]) {
  if constexpr (kAlongTokens) {
    float* const at = reinterpret_cast<float*>(steps + slot_of_pair(place.channel / 2)) + place.channel % 2;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      float* const to = at + (place.token + i * place.token_step) * (2 * kChannels);
      to[0] = dt[i], to[2] = u[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 2)
      steps[place.token * (kChannels / 2) + slot_of_pair(place.channel / 2 + i / 2)] =
          make_float4(dt[i], dt[i + 1], u[i], u[i + 1]);
  }
}

// The part of y that a warp's states give, [token][channel], permuted by fours for the same reason.
inline __device__ int place_in_sums(int channel) {
  const int four = channel / 4;
  return (four ^ (four >> 3 & 1)) * 4 + channel % 4;
}

template <bool kAlongTokens>
__device__ void get_sums(const float* sums, const Place& place, float (&values)[kRun]) {
  if constexpr (kAlongTokens) {
    const float* const at = sums + place_in_sums(place.channel);
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = at[(place.token + i * place.token_step) * kChannels];
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(sums + place.token * kChannels + place_in_sums(place.channel + i));
      values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
    }
  }
}
template <bool kAlongTokens>
__device__ void add_sums(const float* sums, const Place& place, float (&values)[kRun]) {
  float more[kRun];
  get_sums<kAlongTokens>(sums, place, more);
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] += more[i];
}

// A value of each channel, of those of the thread's elements.
template <bool kAlongTokens>
__device__ float of_channel(const float* values, const Place& place, int i) {
  return values[kAlongTokens ? place.channel : place.channel + i];
}

}  // namespace statescan::selective_scan
