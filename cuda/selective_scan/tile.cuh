// Tiles of x, dt, z and y, [tokens, channels] in any layout: what a thread moves of each, and where that lies in shared memory.
#pragma once

#include "../common/element.cuh"
#include "params.h"

namespace statescan::selective_scan {

// Eight elements as they came from memory. kBytes: of the widest element that they may have.
template <int kBytes>
class Run {
 public:
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word_[i] = 0;
  }
  __device__ void load_vector(const char* from, DType dtype) {
    const uint4* words = reinterpret_cast<const uint4*>(from);
    set(0, words[0]);
    if constexpr (kBytes == 4)
      if (dtype == DType::float32) set(4, words[1]);
  }
  // Element i of those that are not loaded as a vector.
  __device__ void load_element(int i, const char* from, DType dtype) {
    if (kBytes == 4 && dtype == DType::float32) word_[i % kWords] = *reinterpret_cast<const std::uint32_t*>(from);
    else word_[i / 2] |= static_cast<std::uint32_t>(*reinterpret_cast<const std::uint16_t*>(from)) << i % 2 * 16;
  }
  __device__ void widen(DType dtype, float (&values)[kRun]) const {
    if (kBytes == 4 && dtype == DType::float32) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] = __uint_as_float(word_[i % kWords]);
    } else if (dtype == DType::bfloat16) {
#pragma unroll
      for (int i = 0; i < kRun; i += 2)
        values[i] = __uint_as_float(word_[i / 2] << 16), values[i + 1] = __uint_as_float(word_[i / 2] & 0xffff0000u);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] = cuda::widen_bits(word_[i / 2] >> i % 2 * 16 & 0xffffu, DType::float16);
    }
  }
  __device__ static void store_vector(char* to, DType dtype, const float (&values)[kRun]) {
    uint4* words = reinterpret_cast<uint4*>(to);
    if (kBytes == 4 && dtype == DType::float32) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        words[i] = make_uint4(__float_as_uint(values[4 * i]), __float_as_uint(values[4 * i + 1]),
                              __float_as_uint(values[4 * i + 2]), __float_as_uint(values[4 * i + 3]));
    } else {
      std::uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[i] = cuda::narrow_bits(values[2 * i], dtype) | cuda::narrow_bits(values[2 * i + 1], dtype) << 16;
      words[0] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
  }

 private:
  static constexpr int kWords = kRun * kBytes / 4;
  std::uint32_t word_[kWords];

  __device__ void set(int i, const uint4& v) {
    word_[i % kWords] = v.x, word_[(i + 1) % kWords] = v.y, word_[(i + 2) % kWords] = v.z, word_[(i + 3) % kWords] = v.w;
  }
};

// The elements of a tile that a thread moves: kRun of them, along the tokens or the channels. Tokens count in scan order.
struct Place {
  int token, channel;  // of the first element
  bool along_tokens, is_vector;
  int token_step;      // along the tokens: -1 where a vector runs against the scan

  __device__ int token_of(int i) const { return along_tokens ? token + i * token_step : token; }
  __device__ int channel_of(int i) const { return along_tokens ? channel : channel + i; }
  __device__ bool holds(int i, int tokens, int channels) const { return token_of(i) < tokens && channel_of(i) < channels; }
};

inline __device__ Place place_of(Reach reach, bool reverse, int thread) {
  switch (reach) {
    case Reach::channels: return {thread / 8, thread % 8 * kRun, false, true, 1};
    case Reach::tokens: return {thread % 2 * kRun + (reverse ? kRun - 1 : 0), thread / 2, true, true, reverse ? -1 : 1};
    case Reach::by_channel: return {thread / kChannels * kRun, thread % kChannels, true, false, 1};
    default: return {thread % kTile, thread / kTile * kRun, false, false, 1};
  }
}

// A tensor at the first token of a tile, and the step to the next in scan order, in bytes.
struct Walk {
  char* at;
  std::int64_t token, channel;
  DType dtype;
};

template <int kBytes>
__device__ void load_run(Run<kBytes>& run, const Walk& t, const Place& place, int tokens, int channels) {
  run.clear();
  const char* const from = t.at + place.token * t.token + place.channel * t.channel;
  if (place.is_vector) {
    if (place.holds(0, tokens, channels)) run.load_vector(from, t.dtype);
    return;
  }
  const std::int64_t step = place.along_tokens ? place.token_step * t.token : t.channel;
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (place.holds(i, tokens, channels)) run.load_element(i, from + i * step, t.dtype);
}

template <int kBytes>
__device__ void store_run(const Walk& t, const Place& place, int tokens, int channels, const float (&values)[kRun]) {
  char* const to = t.at + place.token * t.token + place.channel * t.channel;
  if (place.is_vector) {
    if (place.holds(0, tokens, channels)) Run<kBytes>::store_vector(to, t.dtype, values);
    return;
  }
  const std::int64_t step = place.along_tokens ? place.token_step * t.token : t.channel;
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (place.holds(i, tokens, channels)) cuda::store_element(to + i * step, t.dtype, values[i]);
}

// ---- shared memory ---------------------------------------------------------------------------------------------------------
// Steps of a tile, [token][pair of channels] of {dt, dt, u, u}. The pairs are permuted so that threads that write eight channels
// each, and lanes that read one pair each, both touch all banks.
inline __device__ int slot_of_pair(int pair) { return pair ^ (pair >> 3 & 3); }

inline __device__ void put_steps(float4* steps, const Place& place, const float (&dt)[kRun], const float (&u)[kRun]) {
  if (place.along_tokens) {
    float* const at = reinterpret_cast<float*>(steps + slot_of_pair(place.channel / 2)) + place.channel % 2;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      float* const to = at + place.token_of(i) * (2 * kChannels);
      to[0] = dt[i], to[2] = u[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 2)
      steps[place.token * (kChannels / 2) + slot_of_pair((place.channel + i) / 2)] = make_float4(dt[i], dt[i + 1], u[i], u[i + 1]);
  }
}

// The part of y that a warp's states give, [token][channel], permuted by fours for the same reason.
inline __device__ int place_in_sums(int channel) {
  const int four = channel / 4;
  return (four ^ (four >> 3 & 1)) * 4 + channel % 4;
}

inline __device__ void add_sums(const float* sums, const Place& place, float (&values)[kRun]) {
  if (place.along_tokens) {
    const float* const at = sums + place_in_sums(place.channel);
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] += at[place.token_of(i) * kChannels];
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(sums + place.token * kChannels + place_in_sums(place.channel + i));
      values[i] += v.x, values[i + 1] += v.y, values[i + 2] += v.z, values[i + 3] += v.w;
    }
  }
}

}  // namespace statescan::selective_scan
