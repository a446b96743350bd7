// Tokens from memory to tiles of bfloat16 terms in shared memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "../common/element.cuh"
#include "fragment.cuh"
#include "walk.cuh"

namespace statescan::ssd_scan {

// A thread's part of every [kChunk, kColumns] tile of a tensor: 8 columns of every kStep-th token. What lies outside of the
// call's columns or past its tokens becomes zero. bfloat16 that can be accessed as vectors goes by cp.async, past the
// registers.
template <class Policy, int kColumns>
class TileLoader {
 public:
  using Target = Tile<Policy::kChunk, kColumns, Policy::kTermsOfInput>;

  // `columns`: how many of the 8 from this thread's first on exist; `first`: the address of that at step 0 of the walk.
  __device__ TileLoader(const TokenView& t, const char* first, int columns, const Walk& walk)
      : tensor_(t), sign_(walk.sign), from_(first), columns_(columns) {}

  // This thread's first column.
  static __device__ int column() { return threadIdx.x % kUnits * 8; }

  // Begins to load tokens [start, start + count) of the walk.
  __device__ void load(const Target& tile, std::int64_t start, int count) const {
    const std::int64_t step = tensor_.token * sign_;
    const int first = threadIdx.x / kUnits;
    const char* from = from_ + (start + first) * step;
    if (Policy::kDType == DType::bfloat16 && tensor_.vector) {
#pragma unroll
      for (int k = 0; k < kRows; ++k, from += kStep * step) {
        const bool inside = first + k * kStep < count && columns_ > 0;
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(inside ? from : from_),
            *reinterpret_cast<cute::uint128_t*>(tile.at(0, first + k * kStep, column())), inside);
      }
      return;
    }
    // Rare in bfloat16: one row after the other, for a loop that the instruction cache holds.
    constexpr int kAtOnce = Policy::kDType == DType::bfloat16 ? 1 : kRows;
#pragma unroll kAtOnce
    for (int k = 0; k < kRows; ++k, from += kStep * step) {
      const int row = first + k * kStep;
      float v[8];
      load_run(from, row < count ? columns_ : 0, v);
      Bits terms[4][Policy::kTermsOfInput];
#pragma unroll
      for (int i = 0; i < 4; ++i) split(v[2 * i], v[2 * i + 1], terms[i]);
#pragma unroll
      for (int i = 0; i < Policy::kTermsOfInput; ++i)
        *reinterpret_cast<uint4*>(tile.at(i, row, column())) = make_uint4(terms[0][i], terms[1][i], terms[2][i], terms[3][i]);
    }
  }

 private:
  static constexpr int kUnits = kColumns / 8;
  static constexpr int kStep = Policy::kThreads / kUnits;
  static constexpr int kRows = Policy::kChunk / kStep;
  static_assert(Policy::kThreads % kUnits == 0 && Policy::kChunk % kStep == 0);

  const TokenView& tensor_;  // in the kernel's parameters: costs no register
  int sign_;
  const char* from_;
  int columns_;

  __device__ void load_run(const char* from, int columns, float (&v)[8]) const {
    using Element = typename cuda::ElementOf<Policy::kDType>::type;
    if (tensor_.vector) {
      cuda::Vector<Element, 8> bits{};
      if (columns > 0) bits = cuda::load_vector<Element, 8>(reinterpret_cast<const Element*>(from));
      cuda::widen(bits, v);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < columns ? cuda::load_element(from + i * tensor_.column, Policy::kDType) : 0.0f;
  }
};

// B or C: all columns of a group.
template <class Policy>
__device__ TileLoader<Policy, Policy::kDstate> group_loader(const TokenView& t, const Params& p, const Task& task,
                                                            const Walk& walk) {
  using Loader = TileLoader<Policy, Policy::kDstate>;
  const std::int64_t left = p.dstate - Loader::column();
  const char* first = t.data + walk.batch * t.batch + walk.origin * t.token + task.group * t.head;
  return {t, left > 0 ? first + Loader::column() * t.column : first, static_cast<int>(max(0l, min(8l, left))), walk};
}

// Where a column of the tile of x, z or y lies: 16 of each warp.
struct RowsOfHead {
  int head;          // of the tile
  std::int64_t row;  // of headdim
  bool inside;

  __device__ RowsOfHead(const Params& p, const Task& task, int column) {
    const Slot slot(p.tasks, task, column / kRowsOfWarp);
    head = slot.head, row = slot.first_row + column % kRowsOfWarp;
    inside = slot.inside && row < p.headdim;
  }

  // At step 0 of the walk.
  __device__ char* in(const TokenView& t, const Task& task, const Walk& walk) const {
    return t.data + walk.batch * t.batch + walk.origin * t.token + (task.first_head + head) * t.head + row * t.column;
  }
};

template <class Policy>
__device__ TileLoader<Policy, Policy::kRows> head_loader(const TokenView& t, const Params& p, const Task& task,
                                                         const Walk& walk) {
  using Loader = TileLoader<Policy, Policy::kRows>;
  const RowsOfHead rows(p, task, Loader::column());
  const std::int64_t left = rows.inside ? p.headdim - rows.row : 0;
  return {t, rows.inside ? rows.in(t, task, walk) : t.data, static_cast<int>(min(8l, left)), walk};
}

}  // namespace statescan::ssd_scan
