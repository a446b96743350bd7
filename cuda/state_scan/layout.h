// Where the elements of a call lie, as its kernels take it: plain numbers, worked out on the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "policy.h"

namespace statescan::state_scan {

// A [p,n] slice as rows and columns: one row when every tensor of the call holds its slices without gaps.
struct Slice {
  std::int64_t rows, columns;
  constexpr STATESCAN_HOST_DEVICE std::int64_t size() const { return rows * columns; }
};

// Tensors; strides in elements. data is null where the tensor is absent.
struct ChunkView {  // [b,c,h,p,n]
  void* data;
  std::int64_t batch, chunk, head, row, column;
};
struct StateView {  // [b or s,h,p,n]
  void* data;
  DType dtype;
  std::int64_t sequence, head, row, column;
};
struct DecayView {  // [b,c,h]
  void* data;
  std::int64_t batch, chunk, head;
};

// Where the sequences lie. Sequence `count`, which only a packed call has, stands for the chunks past the last sequence.
struct Sequences {
  const void* cu_seqlens;  // null: sequence i is row i of the batch, whole
  bool is_int64;
  std::int64_t stride, count, nchunks;
};

// The work of a launch: a block takes one tile of one slice through all its chunks. Tiles vary fastest, then heads, so that
// neighbouring blocks stream neighbouring memory.
struct Tasks {
  std::uint32_t tiles, heads;
  std::int64_t sequences;
  std::int64_t blocks() const { return tiles * (heads * sequences); }
};

struct NamedTensor {
  const char* name;
  const Tensor* tensor;
};

class Layout {
 public:
  // `tensors`: all of the call whose last axes are headdim and dstate. Everything given must outlive the layout.
  Layout(const Dims& dims, const Inputs& inputs, std::initializer_list<NamedTensor> tensors) : dims_(dims), inputs_(inputs) {
    for (const NamedTensor& t : tensors) {
      tensors_[count_++] = t;
      is_packed_ = is_packed_ && is_packed(*t.tensor);
    }
    slice_ = is_packed_ ? Slice{1, dims.headdim * dims.dstate} : Slice{dims.headdim, dims.dstate};
  }

  const Slice& slice() const { return slice_; }

  ChunkView chunks(const Tensor& t) const {
    return t ? ChunkView{t.data, t.stride[0], t.stride[1], t.stride[2], row(t), column(t)} : ChunkView{};
  }
  StateView state(const Tensor& t) const {
    return t ? StateView{t.data, t.dtype, t.stride[0], t.stride[1], row(t), column(t)} : StateView{};
  }
  DecayView decay(const Tensor& t) const {
    return t ? DecayView{t.data, t.stride[0], t.stride[1], t.stride[2]} : DecayView{};
  }
  Sequences sequences() const {
    const Tensor& cu = inputs_.cu_seqlens;
    return {cu ? cu.data : nullptr, cu.dtype == DType::int64, cu ? cu.stride[0] : 0, dims_.num_sequences, dims_.nchunks};
  }
  Tasks tasks(std::int64_t elements_per_block) const {
    return {static_cast<std::uint32_t>(divide_up(slice_.size(), elements_per_block)), static_cast<std::uint32_t>(dims_.nheads),
            dims_.num_sequences + (inputs_.cu_seqlens ? 1 : 0)};
  }

  // Why accesses of `vector` elements along a row do not fit the tensors, or "".
  std::string why_not_vector(std::int64_t vector) const {
    if (slice_.columns % vector != 0)
      return "needs rows of a multiple of " + std::to_string(vector) + " elements, got " + std::to_string(slice_.columns);
    for (int k = 0; k < count_; ++k) {
      const Tensor& t = *tensors_[k].tensor;
      if (!t || t.numel() == 0) continue;
      if (column(t) != 1) return std::string("needs ") + tensors_[k].name + " to be contiguous along dstate";
      const std::int64_t bytes = std::min<std::int64_t>(vector * size_of(t.dtype), 16);
      bool aligned = reinterpret_cast<std::uintptr_t>(t.data) % bytes == 0;
      const int outer = is_packed_ ? t.ndim - 2 : t.ndim - 1;
      for (int i = 0; i < outer; ++i) aligned = aligned && (t.shape[i] == 1 || t.stride[i] * size_of(t.dtype) % bytes == 0);
      if (!aligned)
        return std::string("needs ") + tensors_[k].name + " and its strides aligned to " + std::to_string(bytes) + " bytes";
    }
    return "";
  }

 private:
  const Dims& dims_;
  const Inputs& inputs_;
  NamedTensor tensors_[5] = {};
  int count_ = 0;
  bool is_packed_ = true;
  Slice slice_{};

  // An axis of one element may have any stride.
  static bool is_packed(const Tensor& t) {
    if (!t) return true;
    const int p = t.ndim - 2, n = t.ndim - 1;
    return (t.shape[n] == 1 || t.stride[n] == 1) && (t.shape[p] == 1 || t.stride[p] == t.shape[n]);
  }
  std::int64_t row(const Tensor& t) const { return is_packed_ ? 0 : t.stride[t.ndim - 2]; }
  std::int64_t column(const Tensor& t) const { return is_packed_ ? 1 : t.stride[t.ndim - 1]; }
};

inline Layout layout_of(const Args& args, const Dims& dims) {
  return {dims, args, {{"update", &args.update}, {"states", &args.states}, {"initial_state", &args.initial_state},
                       {"final_state", &args.final_state}}};
}

inline Layout layout_of(const BackwardArgs& args, const Dims& dims) {
  return {dims, args, {{"states", &args.states}, {"dstates", &args.dstates}, {"dupdate", &args.dupdate},
                       {"dfinal_state", &args.dfinal_state}, {"dinitial_state", &args.dinitial_state}}};
}

}  // namespace statescan::state_scan
