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
  whole.segments = whole.pieces = 1;
  return walk_of(whole, sequence, 0);
}

// The last sequence that begins with this slot or before.
inline __device__ std::int64_t sequence_of_slot(const Sequences& s, std::int64_t slot) {
  if (!s.cu_seqlens) return slot / chunks_of(s, 0);
  std::int64_t first = 0;
  for (std::int64_t last = s.count; last - first > 1;) {
    const std::int64_t middle = (first + last) / 2;
    (first_slot(s, middle) <= slot ? first : last) = middle;
  }
  return first;
}

struct alignas(16) ChunkPlace {
  Walk walk;
  std::int64_t slot, start;  // start: step of the walk
  int count;                 // tokens; 0: the slot is empty

  __device__ ChunkPlace(const Sequences& s, std::int64_t at) : slot(at) {
    const std::int64_t sequence = sequence_of_slot(s, slot);
    walk = whole_walk(s, sequence);
    start = (slot - first_slot(s, sequence)) * s.chunk;
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
inline __device__ char* token_at(const TokenView& t, const Walk& walk, std::int64_t step, std::int64_t head,
                                 std::int64_t column) {
  return t.data + walk.batch * t.batch + (walk.origin + step * walk.sign) * t.token + head * t.head + column * t.column;
}

// A thread's part of every tile [kChunk, kWidth] of a tensor: 8 columns of every kStep-th token. What does not exist becomes
// zero. bfloat16 goes by cp.async where it can. Addresses are found once.
template <class Policy, int kThreads, int kWidth>
class RowLoader {
 public:
  static constexpr int kUnits = kWidth / 8;
  static constexpr int kStep = kThreads / kUnits;
  static_assert(kThreads % kUnits == 0);

  // Of `size` columns of a head.
  __device__ RowLoader(const TokenView& t, const Walk& walk, std::int64_t head, std::int64_t size)
      : tensor_(t),
        left_(static_cast<int>(size) - column()),
        step_(t.token * walk.sign),
        from_(token_at(t, walk, row(), head, column())) {}

  static __device__ int row() { return threadIdx.x / kUnits; }
  static __device__ int column() { return threadIdx.x % kUnits * 8; }

  // Begins to load tokens [start, start + count), so many heads and columns further on.
  template <class Target>
  __device__ void load(const Target& tile, std::int64_t start, int count, int heads, int columns) const {
    const char* from = at(start, heads, columns);
    const int left = left_ - columns;
    if (Policy::kAhead || (Policy::kDType == DType::bfloat16 && tensor_.vector)) {
      for_each_row([&](int k) {
        const bool inside = row() + k < count && left > 0;
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(inside ? from + k * step_ : tensor_.data),
            *reinterpret_cast<cute::uint128_t*>(tile.at(0, row() + k, column())), inside);
      });
    } else {
      for_each_row([&](int k) {
        float v[8];
        load_run<Policy::kDType>(tensor_, from + k * step_, row() + k < count ? min(left, 8) : 0, v);
        store_run<Policy::kTermsOfInput>(tile.at(0, row() + k, column()), Target::kPlane, v);
      });
    }
  }

 private:
  template <class, int, int>
  friend class GateLoader;

  __device__ const char* at(std::int64_t start, int heads, int columns) const {
    return from_ + (start * step_ + heads * tensor_.head + columns * tensor_.column);
  }

  template <class Visit>
  static __device__ void for_each_row(Visit visit) {
#pragma unroll
    for (int k = 0; k < Policy::kChunk; k += kStep)
      if (kStep <= Policy::kChunk || row() < Policy::kChunk) visit(k);
  }

  const TokenView& tensor_;  // in the kernel's parameters: costs no register
  int left_;
  std::int64_t step_;
  const char* from_;
};

// How many terms g has: with a gate it is computed.
template <class Policy>
__device__ int terms_of_g(const BackwardParams& p) {
  return p.z.data ? Policy::kTerms : Policy::kTermsOfInput;
}

// g: dy, or dy silu(z).
template <class Policy, int kThreads, int kWidth>
class GateLoader {
 public:
  using Rows = RowLoader<Policy, kThreads, kWidth>;

  __device__ GateLoader(const BackwardParams& p, const Walk& walk, std::int64_t head)
      : dy_(p.dy, walk, head, p.headdim), z_(p.z, walk, head, p.headdim) {}

  template <class Target>
  __device__ void load(const Target& tile, std::int64_t start, int count, int heads, int columns) const {
    if (!z_.tensor_.data) {
      dy_.load(tile, start, count, heads, columns);
      return;
    }
    const char *dy = dy_.at(start, heads, columns), *z = z_.at(start, heads, columns);
    const int left = min(dy_.left_ - columns, 8);
    Rows::for_each_row([&](int k) {
      float v[8], gate[8];
      load_run<Policy::kDType>(dy_.tensor_, dy + k * dy_.step_, Rows::row() + k < count ? left : 0, v);
      load_run<Policy::kDType>(z_.tensor_, z + k * z_.step_, Rows::row() + k < count ? left : 0, gate);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= cuda::fast_silu(gate[i]);
      store_run<Policy::kTerms>(tile.at(0, Rows::row() + k, Rows::column()), Target::kPlane, v);
    });
  }

 private:
  Rows dy_, z_;
};

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
