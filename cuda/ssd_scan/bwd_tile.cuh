// What the backward kernels of ssd_scan share: where a chunk lies, tiles from memory, and products of terms.
#pragma once

#include "bwd_params.h"
#include "discretise.cuh"
#include "tile.cuh"

namespace statescan::ssd_scan {

// ---- chunks ----------------------------------------------------------------------------------------------------------------
inline __device__ std::int64_t chunks_of(const Sequences& s, std::int64_t sequence) {
  return (length_of(s, sequence) + s.chunk - 1) / s.chunk;
}

// The slot of a sequence's first chunk. Those of packed sequences never meet, wherever their boundaries lie.
inline __device__ std::int64_t first_slot(const Sequences& s, std::int64_t sequence) {
  return s.cu_seqlens ? boundary(s, sequence) / s.chunk + sequence : sequence * chunks_of(s, sequence);
}

// A sequence as one segment.
inline __device__ Walk whole_walk(const Sequences& s, std::int64_t sequence) {
  Sequences whole = s;
  whole.segments = 1;
  return walk_of(whole, sequence, 0);
}

struct alignas(16) ChunkPlace {
  Walk walk;
  std::int64_t slot, start;  // start: step of the walk
  int count;                 // tokens; 0: the slot is empty

  __device__ ChunkPlace(const Sequences& s, std::int64_t at) : slot(at) {
    std::int64_t first = 0;
    if (s.cu_seqlens) {  // the last sequence that begins here or before
      for (std::int64_t last = s.count; last - first > 1;) {
        const std::int64_t middle = (first + last) / 2;
        (first_slot(s, middle) <= slot ? first : last) = middle;
      }
    } else {
      first = slot / chunks_of(s, 0);
    }
    walk = whole_walk(s, first);
    start = (slot - first_slot(s, first)) * s.chunk;
    count = static_cast<int>(max(0l, min(s.chunk, walk.length - start)));
  }
};

// ---- tokens ----------------------------------------------------------------------------------------------------------------
// 8 columns of a token as floats: `columns` of them exist.
template <DType dtype>
__device__ void load_run(const TokenView& t, const char* from, int columns, float (&v)[8]) {
  using Element = typename cuda::ElementOf<dtype>::type;
  if (t.vector) {
    cuda::Vector<Element, 8> bits{};
    if (columns > 0) bits = cuda::load_vector<Element, 8>(reinterpret_cast<const Element*>(from));
    cuda::widen(bits, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < columns ? cuda::load_element(from + i * t.column, dtype) : 0.0f;
}

// 8 floats as terms in a row of a tile.
template <int kTerms>
__device__ void store_run(std::uint16_t* to, int plane, const float (&v)[8]) {
  Bits terms[4][kTerms];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(v[2 * i], v[2 * i + 1], terms[i]);
#pragma unroll
  for (int i = 0; i < kTerms; ++i)
    *reinterpret_cast<uint4*>(to + i * plane) = make_uint4(terms[0][i], terms[1][i], terms[2][i], terms[3][i]);
}

// The address of a token of the walk, at a head (or group) and column.
inline __device__ char* token_at(const TokenView& t, const Walk& walk, std::int64_t step, std::int64_t head, std::int64_t column) {
  return t.data + walk.batch * t.batch + (walk.origin + step * walk.sign) * t.token + head * t.head + column * t.column;
}

inline __device__ int columns_left(std::int64_t size, std::int64_t column) {
  return static_cast<int>(max(0l, min(8l, size - column)));
}

// Begins to load a tile [kChunk, kColumns] of tokens [start, start + count), columns from `first` to `size` of a head; zeros
// elsewhere. bfloat16 goes by cp.async where it can.
template <class Policy, int kThreads, class Target>
__device__ void load_tokens(const Target& tile, int width, const TokenView& t, const Walk& walk, std::int64_t start, int count,
                            std::int64_t head, std::int64_t first, std::int64_t size) {
  const int units = width / 8;
  for (int unit = threadIdx.x; unit < Policy::kChunk * units; unit += kThreads) {
    const int row = unit / units, column = unit % units * 8;
    const int columns = row < count ? columns_left(size, first + column) : 0;
    const char* from = columns > 0 ? token_at(t, walk, start + row, head, first + column) : t.data;
    if (Policy::kAhead || (Policy::kDType == DType::bfloat16 && t.vector)) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(*reinterpret_cast<const cute::uint128_t*>(from),
                                                                   *reinterpret_cast<cute::uint128_t*>(tile.at(0, row, column)),
                                                                   columns > 0);
      continue;
    }
    float v[8];
    load_run<Policy::kDType>(t, from, columns, v);
    store_run<Policy::kTermsOfInput>(tile.at(0, row, column), Target::kPlane, v);
  }
}

// How many terms g has: with a gate it is computed.
template <class Policy>
__device__ int terms_of_g(const BackwardParams& p) {
  return p.z.data ? Policy::kTerms : Policy::kTermsOfInput;
}

// g = dy silu(z), as load_tokens.
template <class Policy, int kThreads, class Target>
__device__ void load_g(const Target& tile, int width, const BackwardParams& p, const Walk& walk, std::int64_t start, int count,
                       std::int64_t head, std::int64_t first) {
  if (!p.z.data) {
    load_tokens<Policy, kThreads>(tile, width, p.dy, walk, start, count, head, first, p.headdim);
    return;
  }
  const int units = width / 8;
  for (int unit = threadIdx.x; unit < Policy::kChunk * units; unit += kThreads) {
    const int row = unit / units, column = unit % units * 8;
    const int columns = row < count ? columns_left(p.headdim, first + column) : 0;
    float dy[8], z[8];
    load_run<Policy::kDType>(p.dy, columns > 0 ? token_at(p.dy, walk, start + row, head, first + column) : p.dy.data, columns, dy);
    load_run<Policy::kDType>(p.z, columns > 0 ? token_at(p.z, walk, start + row, head, first + column) : p.z.data, columns, z);
#pragma unroll
    for (int i = 0; i < 8; ++i) dy[i] *= cuda::fast_silu(z[i]);
    store_run<Policy::kTerms>(tile.at(0, row, column), Target::kPlane, dy);
  }
}

// Two neighbours of a token as floats; `left` columns exist from the first on.
template <DType dtype>
__device__ float2 load_two(const TokenView& t, const char* from, int left) {
  if (t.vector && left > 1) {
    if constexpr (dtype == DType::float32) return *reinterpret_cast<const float2*>(from);
    const Bits bits = *reinterpret_cast<const Bits*>(from);
    return make_float2(cuda::widen_bits(bits & 0xffffu, dtype), cuda::widen_bits(bits >> 16, dtype));
  }
  return make_float2(left > 0 ? cuda::load_element(from, dtype) : 0.0f,
                     left > 1 ? cuda::load_element(from + t.column, dtype) : 0.0f);
}

template <DType dtype>
__device__ void store_two(const TokenView& t, char* to, int left, float v0, float v1) {
  if (t.vector && left > 1) {
    if constexpr (dtype == DType::float32) {
      *reinterpret_cast<float2*>(to) = make_float2(v0, v1);
    } else {
      const float pair[2] = {v0, v1};
      *reinterpret_cast<Bits*>(to) = cuda::narrow_word<typename cuda::ElementOf<dtype>::type>(pair);
    }
    return;
  }
  if (left > 0) cuda::store_element(to, dtype, v0);
  if (left > 1) cuda::store_element(to + t.column, dtype, v1);
}

// ---- products --------------------------------------------------------------------------------------------------------------
using Sum16 = float[2][4];  // [16,16], as two sums [16,8]

// Two terms of a bfloat16 pair at (row, column) of a tile, added up.
template <int kTerms, class Target>
__device__ float2 pair_at(const Target& tile, int row, int column, int terms = kTerms) {
  Bits bits[kTerms];
#pragma unroll
  for (int i = 0; i < kTerms; ++i) bits[i] = i < terms ? *reinterpret_cast<const Bits*>(tile.at(i, row, column)) : 0;
  return join(bits);
}

// Which of the two ways to read a block [16,16] of a tile gives the operand that is wanted.
enum class Read { rows, columns };

// A operand: rows of the tile as they lie, or (columns) its transpose.
template <Read read>
__device__ void load_A(const std::uint16_t* at, int stride, Bits (&a)[4]) {
  if constexpr (read == Read::rows) {
    load_matrix(at, stride, a);
  } else {
    Bits r[4];
    load_transposed(at, stride, r);
    a[0] = r[0], a[1] = r[2], a[2] = r[1], a[3] = r[3];
  }
}

// B operand of two products side by side, b[0] b[1] and b[2] b[3]: rows of the tile run along the sum (rows), or across it.
template <Read read>
__device__ void load_B(const std::uint16_t* at, int stride, Bits (&b)[4]) {
  if constexpr (read == Read::rows) {
    load_transposed(at, stride, b);
  } else {
    Bits r[4];
    load_matrix(at, stride, r);
    b[0] = r[0], b[1] = r[2], b[2] = r[1], b[3] = r[3];
  }
}

inline __device__ void multiply_add(Sum16& sum, const Bits (&a)[4], const Bits (&b)[4]) {
  multiply_add(sum[0], a, b[0], b[1]);
  multiply_add(sum[1], a, b[2], b[3]);
}

// sum += A B for factors of kTermsOfA and kTermsOfB terms, of which the first terms_a and terms_b are there.
template <int kTermsOfA, int kTermsOfB, Read read_A, Read read_B, class TileA, class TileB>
__device__ void multiply_blocks(Sum16& sum, const TileA& A, int row_A, int column_A, const TileB& B, int row_B, int column_B,
                                int terms_a = kTermsOfA, int terms_b = kTermsOfB) {
  Bits a[kTermsOfA][4];
#pragma unroll
  for (int i = 0; i < kTermsOfA; ++i)
    if (i < terms_a) load_A<read_A>(A.at(i, row_A, column_A), TileA::kStride, a[i]);
#pragma unroll
  for (int j = 0; j < kTermsOfB; ++j) {
    if (j >= terms_b) break;
    Bits b[4];
    load_B<read_B>(B.at(j, row_B, column_B), TileB::kStride, b);
#pragma unroll
    for (int i = 0; i < kTermsOfA; ++i)
      if (counts<kTermsOfA, kTermsOfB>(i, j) && i < terms_a) multiply_add(sum, a[i], b);
  }
}

// The same for kCount blocks [16,16] of B side by side, which share A.
template <int kTermsOfA, int kTermsOfB, Read read_A, Read read_B, int kCount, class TileA, class TileB>
__device__ void multiply_strip(float (&sum)[kCount][2][4], const TileA& A, int row_A, int column_A, const TileB& B, int row_B,
                               int column_B, int terms_a = kTermsOfA) {
  Bits a[kTermsOfA][4];
#pragma unroll
  for (int i = 0; i < kTermsOfA; ++i)
    if (i < terms_a) load_A<read_A>(A.at(i, row_A, column_A), TileA::kStride, a[i]);
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int j = 0; j < kTermsOfB; ++j) {
      Bits b[4];
      if constexpr (read_B == Read::rows) load_B<read_B>(B.at(j, row_B, column_B + 16 * n), TileB::kStride, b);
      else load_B<read_B>(B.at(j, row_B + 16 * n, column_B), TileB::kStride, b);
#pragma unroll
      for (int i = 0; i < kTermsOfA; ++i)
        if (counts<kTermsOfA, kTermsOfB>(i, j) && i < terms_a) multiply_add(sum[n], a[i], b);
    }
}

// Sum over the 4 lanes of a row, and over the 8 rows of a column.
inline __device__ float sum_of_row(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

inline __device__ float sum_of_column(float v) {
  v += __shfl_xor_sync(~0u, v, 4);
  v += __shfl_xor_sync(~0u, v, 8);
  return v + __shfl_xor_sync(~0u, v, 16);
}

}  // namespace statescan::ssd_scan
