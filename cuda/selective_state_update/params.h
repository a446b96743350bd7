// A call as the kernel takes it. Both forms are the same there: a row of the batch has bands of rows of dstate states. A band
// is a head and its rows the headdim (Mamba-2), or the channels of one group of B and C (Mamba-1).
#pragma once

#include "policy.h"

namespace statescan::selective_state_update {

// A tensor; strides in bytes, 0 along what it lacks. data is null where it is absent.
struct View {
  char* data;
  DType dtype;
  std::int64_t batch, token, band, row, column;
};

// Indices [b]; data null: not given.
struct Indices {
  const void* data;
  bool is_int64;
  std::int64_t stride;
};

struct Params {
  std::uint32_t tiles;                 // blocks of threads for a row of the batch
  std::uint32_t units, units_of_band;  // a unit: the rows that a team of lanes takes; units of a row of the batch, of a band
  std::uint32_t lanes;                 // of a team: a power of two, at most a warp, no fewer than a unit's rows
  std::uint32_t band_rows, bands_of_group;
  std::int64_t dstate, ntokens, slots, pieces;
  Indices from, to;                    // slots; to.data null: where they were read
  bool dt_softplus;
  float dt_min, dt_max;
  View state;                             // "batch" is a slot
  View x, dt, A, B, C, D, z, dt_bias, y;  // in a varying B and C a "band" is a group
  float* partial;                      // [b, t, bands, band_rows] when pieces > 1
};

// Works out the strides of a call's tensors along the kernel's axes.
class Axes {
 public:
  explicit Axes(const Dims& dims)
      : mamba1_(dims.mamba1), token_(dims.has_token_axis ? 1 : 0),
        channels_(dims.mamba1 && dims.ngroups > 0 ? dims.nheads / dims.ngroups : 1),
        bands_(dims.mamba1 ? dims.ngroups : dims.nheads), rows_(dims.mamba1 ? channels_ : dims.headdim) {}

  std::int64_t bands() const { return bands_; }
  std::int64_t rows() const { return rows_; }

  // [b,t,d], or [b,t,h,p]
  View channels(const Tensor& t) const {
    if (!t) return {};
    View view = steps(t);
    if (!mamba1_) view.row = step(t, 2 + token_);
    return view;
  }
  // [b,t,d], or [b,t,h]
  View steps(const Tensor& t) const {
    View view = heads(t, 1 + token_);
    view.batch = step(t, 0);
    view.token = token_ * step(t, 1);
    return view;
  }
  // [d], or [h]
  View of_heads(const Tensor& t) const { return t ? heads(t, 0) : View{}; }
  // D: the same, or [h,p]
  View of_channels(const Tensor& t) const {
    View view = of_heads(t);
    if (t && t.ndim == 2) view.row = step(t, 1);
    return view;
  }
  // A: [d,n], or [h]
  View rates(const Tensor& t) const {
    View view = heads(t, 0);
    if (mamba1_) view.column = step(t, 1);
    return view;
  }
  // B, C: [b,t,g,n], or [d,n]
  View projection(const Tensor& t, bool varying) const {
    if (!varying) return rates(t);
    return {static_cast<char*>(t.data), t.dtype, step(t, 0), token_ * step(t, 1), step(t, 1 + token_), 0, step(t, 2 + token_)};
  }
  View state(const Tensor& t) const {
    View view = heads(t, 1);
    view.batch = step(t, 0);
    if (!mamba1_) view.row = step(t, 2);
    view.column = step(t, t.ndim - 1);
    return view;
  }

 private:
  bool mamba1_;
  int token_;
  std::int64_t channels_, bands_, rows_;

  static std::int64_t step(const Tensor& t, int axis) { return t.stride[axis] * size_of(t.dtype); }
  View heads(const Tensor& t, int axis) const {
    return {static_cast<char*>(t.data), t.dtype, 0, 0, step(t, axis) * channels_, mamba1_ ? step(t, axis) : 0, 0};
  }
};

inline Indices indices_of(const Tensor& t) { return {t ? t.data : nullptr, t.dtype == DType::int64, t ? t.stride[0] : 0}; }

}  // namespace statescan::selective_state_update
