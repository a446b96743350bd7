// What both directions of state_scan share: which slice a thread works on, and how it reaches its elements there.
#pragma once

#include "../common/vector.cuh"
#include "layout.h"

namespace statescan::state_scan {

struct Span {
  std::int64_t batch, first, last;
};

// cu_seqlens on a device cannot be checked without waiting for it: wrong values give wrong results, but no wild access.
inline __device__ std::int64_t boundary(const Sequences& s, std::int64_t i) {
  const std::int64_t at = s.is_int64 ? static_cast<const std::int64_t*>(s.cu_seqlens)[i * s.stride]
                                     : static_cast<const std::int32_t*>(s.cu_seqlens)[i * s.stride];
  return at < 0 ? 0 : (at > s.nchunks ? s.nchunks : at);
}

inline __device__ Span span_of(const Sequences& s, std::int64_t sequence) {
  if (!s.cu_seqlens) return {sequence, 0, s.nchunks};
  return {0, boundary(s, sequence), sequence == s.count ? s.nchunks : boundary(s, sequence + 1)};
}

struct Task {
  std::int64_t sequence, head, tile;
};

inline __device__ Task task_of(const Tasks& tasks) {
  const std::uint32_t slice = blockIdx.x / tasks.tiles;
  return {slice / tasks.heads, slice % tasks.heads, blockIdx.x % tasks.tiles};
}

// The elements of a slice that one thread carries: kVector of them from `first` on, as far as the slice reaches. at() turns the
// address of a slice into the one that load() and store() take; it moves from chunk to chunk by the stride of the chunks.
template <class Policy, Access = Policy::kAccess>
class Lane;

template <class Policy>
class Lane<Policy, Access::vector> {
 public:
  static constexpr int kVector = Policy::kVector;

  __device__ Lane(const Slice& slice, std::int64_t first)
      : row_(first / slice.columns), column_(first % slice.columns), inside_(first < slice.size()) {}

  __device__ bool inside() const { return inside_; }

  template <class Element, class View>
  __device__ Element* at(Element* slice, const View& t) const {
    return slice + row_ * t.row + column_;
  }
  template <class Element, class View>
  __device__ cuda::Vector<Element, kVector> load(const Element* from, const View&) const {
    return cuda::load_vector<Element, kVector>(from);
  }
  template <class Element, class View>
  __device__ void store(Element* to, const View&, const cuda::Vector<Element, kVector>& v) const {
    cuda::store_vector(to, v);
  }

 private:
  std::int64_t row_, column_;
  bool inside_;
};

template <class Policy>
class Lane<Policy, Access::strided> {
 public:
  static constexpr int kVector = Policy::kVector;

  __device__ Lane(const Slice& slice, std::int64_t first)
      : row_(first / slice.columns), column_(first % slice.columns), columns_(slice.columns), left_(slice.size() - first) {}

  __device__ bool inside() const { return left_ > 0; }

  template <class Element, class View>
  __device__ Element* at(Element* slice, const View&) const {
    return slice;
  }
  template <class Element, class View>
  __device__ cuda::Vector<Element, kVector> load(const Element* slice, const View& t) const {
    cuda::Vector<Element, kVector> v{};
    walk(t, [&](int i, std::int64_t offset) { cuda::set_element(v, i, slice[offset]); });
    return v;
  }
  template <class Element, class View>
  __device__ void store(Element* slice, const View& t, const cuda::Vector<Element, kVector>& v) const {
    walk(t, [&](int i, std::int64_t offset) { slice[offset] = cuda::element_of(v, i); });
  }

 private:
  std::int64_t row_, column_, columns_, left_;

  template <class View, class Visit>
  __device__ void walk(const View& t, Visit visit) const {
    std::int64_t row = row_, column = column_;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < left_) visit(i, row * t.row + column * t.column);
      if (++column == columns_) {
        column = 0;
        ++row;
      }
    }
  }
};

template <class Element>
__device__ Element* slice_at(const ChunkView& t, std::int64_t batch, std::int64_t chunk, std::int64_t head) {
  return static_cast<Element*>(t.data) + batch * t.batch + chunk * t.chunk + head * t.head;
}

inline __device__ float* decay_at(const DecayView& t, std::int64_t batch, std::int64_t chunk, std::int64_t head) {
  return static_cast<float*>(t.data) + batch * t.batch + chunk * t.chunk + head * t.head;
}

template <class Element>
__device__ Element* state_at(const StateView& t, const Task& task) {
  return static_cast<Element*>(t.data) + task.sequence * t.sequence + task.head * t.head;
}

template <class Element, class Lane>
__device__ void load_state_as(const Lane& lane, const StateView& t, const Task& task, float (&state)[Lane::kVector]) {
  cuda::widen(lane.load(lane.at(state_at<Element>(t, task), t), t), state);
}

// The state at one end of a sequence; zero when the tensor is absent.
template <class Lane>
__device__ void load_state(const Lane& lane, const StateView& t, const Task& task, float (&state)[Lane::kVector]) {
#pragma unroll
  for (int i = 0; i < Lane::kVector; ++i) state[i] = 0.0f;
  if (!t.data || !lane.inside()) return;
  if (t.dtype == DType::float32) load_state_as<float>(lane, t, task, state);
  else if (t.dtype == DType::float16) load_state_as<__half>(lane, t, task, state);
  else load_state_as<__nv_bfloat16>(lane, t, task, state);
}

template <class Element, class Lane>
__device__ void store_state_as(const Lane& lane, const StateView& t, const Task& task, const float (&state)[Lane::kVector]) {
  lane.store(lane.at(state_at<Element>(t, task), t), t, cuda::narrow<Element>(state));
}

template <class Lane>
__device__ void store_state(const Lane& lane, const StateView& t, const Task& task, const float (&state)[Lane::kVector]) {
  if (!t.data || !lane.inside()) return;
  if (t.dtype == DType::float32) store_state_as<float>(lane, t, task, state);
  else if (t.dtype == DType::float16) store_state_as<__half>(lane, t, task, state);
  else store_state_as<__nv_bfloat16>(lane, t, task, state);
}

// Zeros in the chunks of a span: those past the last packed sequence.
template <class Element, class Lane>
__device__ void clear(const Lane& lane, const ChunkView& t, const Span& span, std::int64_t head) {
  if (!lane.inside()) return;
#pragma unroll 1
  for (std::int64_t c = span.first; c < span.last; ++c)
    lane.store(lane.at(slice_at<Element>(t, span.batch, c, head), t), t, cuda::Vector<Element, Lane::kVector>{});
}

}  // namespace statescan::state_scan
