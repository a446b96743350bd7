// gated_rms_norm forward on the CPU
// Math     y = rms(x) weight silu(z), or rms(x silu(z)) weight
// Shapes   x, z, y [..., d]; weight [d]
// Traffic  read x and z, write y: 3*rows*d*sizeof(Element)
// Tasks    runs of rows
// Numerics a group's squares are added in a fixed order on one thread
#include "isa.h"
#include "norm_row.h"
#include "parallel.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using gated_rms_norm::Args;
using gated_rms_norm::Dims;

constexpr std::int64_t kTaskOutputs = 32768;  // 10 to 50 us of work

// Offset of row `row`, counted over all leading axes.
std::int64_t row_offset(const Tensor& t, std::int64_t row) {
  std::int64_t offset = 0;
  for (int axis = t.ndim - 2; axis >= 0; --axis) {
    offset += row % t.shape[axis] * t.stride[axis];
    row /= t.shape[axis];
  }
  return offset;
}

// Contiguous rows of T are worked on where they lie; others pass through a buffer.
template <class T>
bool in_place(const Tensor& t) {
  return t.dtype == kDTypeOf<T> && t.stride[t.ndim - 1] == 1;
}

template <class T>
const T* read_row(const Tensor& t, std::int64_t row, std::int64_t count, T* buffer) {
  const std::int64_t offset = row_offset(t, row);
  if (in_place<T>(t)) return static_cast<const T*>(t.data) + offset;
  load_row<T>(buffer, t.data, t.dtype, offset, t.stride[t.ndim - 1], count);
  return buffer;
}

// The weight, then each thread's rows of x, z and y.
template <class T>
std::size_t bytes_of(const Dims& d) {
  Arena count(nullptr);
  for (int i = 0; i < 1 + 3 * max_threads(); ++i) count.take<T>(d.dim);
  return count.used();
}

template <class T>
void forward(const Args& args, const Dims& d) {
  Arena shared(args.workspace.data);
  T* weight = shared.take<T>(d.dim);
  if (args.weight) load_row<T>(weight, args.weight.data, args.weight.dtype, 0, args.weight.stride[0], d.dim);
  else for (std::int64_t c = 0; c < d.dim; ++c) weight[c] = T(1);
  const std::int64_t rows_per_task = kTaskOutputs / d.dim > 1 ? kTaskOutputs / d.dim : 1;
  parallel_for((d.rows + rows_per_task - 1) / rows_per_task, [&](std::int64_t task, int thread) {
    Arena arena = shared;
    T* buffers[3] = {};
    for (int i = 0; i <= thread; ++i)
      for (T*& buffer : buffers) buffer = arena.take<T>(d.dim);
    const std::int64_t end = (task + 1) * rows_per_task < d.rows ? (task + 1) * rows_per_task : d.rows;
    for (std::int64_t row = task * rows_per_task; row < end; ++row) {
      const T* x = read_row<T>(args.x, row, d.dim, buffers[0]);
      const T* z = args.z ? read_row<T>(args.z, row, d.dim, buffers[1]) : nullptr;
      const std::int64_t offset = row_offset(args.y, row);
      T* y = in_place<T>(args.y) ? static_cast<T*>(args.y.data) + offset : buffers[2];
      gated_norm_row<T>(y, x, z, weight, d.dim, d.group_size, args.eps, args.norm_before_gate);
      if (!in_place<T>(args.y)) store_row<T>(args.y.data, args.y.dtype, offset, args.y.stride[args.y.ndim - 1], d.dim, y);
    }
  });
}

}  // namespace

std::size_t workspace_bytes(const Args& args, const Dims& d) {
  return args.x.dtype == DType::float64 ? bytes_of<double>(d) : bytes_of<float>(d);
}

void run(const Args& args, const Dims& d) {
  if (d.rows == 0 || d.dim == 0) return;
  args.x.dtype == DType::float64 ? forward<double>(args, d) : forward<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
