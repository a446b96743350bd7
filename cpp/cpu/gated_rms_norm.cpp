// gated_rms_norm forward on the CPU
// Math     y = rms(x) weight silu(z), or rms(x silu(z)) weight
// Shapes   x, z, y [..., d]; weight [d]
// Traffic  read x and z, write y: 3*rows*d*sizeof(Element); the second pass over a row finds it in the nearest caches
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

// The rows of T that a thread may want: x, z and y where they don't lie as the kernel reads them, and what the gate makes.
template <class T>
struct Buffers {
  T *x, *z, *y, *gated;
  Buffers(Arena& arena, std::int64_t dim)
      : x(arena.take<T>(dim)), z(arena.take<T>(dim)), y(arena.take<T>(dim)), gated(arena.take<T>(dim)) {}
};

// The weight, then each thread's buffers.
template <class T>
std::size_t bytes_of(const Dims& d) {
  Arena count(nullptr);
  count.take<T>(d.dim);
  for (int i = 0; i < max_threads(); ++i) Buffers<T>(count, d.dim);
  return count.used();
}

template <DType kDType>
Memory<kDType>* row_at(const Tensor& t, std::int64_t row) {
  return static_cast<Memory<kDType>*>(t.data) + row_offset(t, row);
}

// A row whose tensors have contiguous rows of these dtypes, worked on where it lies.
template <class T, DType kX, DType kZ, DType kY>
void norm_in_place(const Args& args, const Dims& d, std::int64_t row, const T* weight, const Buffers<T>& buffers) {
  gated_norm_row<T, kX, kZ, kY>(row_at<kY>(args.y, row), row_at<kX>(args.x, row), args.z ? row_at<kZ>(args.z, row) : nullptr,
                                weight, buffers.gated, d.dim, d.group_size, args.eps, args.norm_before_gate);
}

// Any other row, by way of T.
template <class T>
void norm_by_copy(const Args& args, const Dims& d, std::int64_t row, const T* weight, const Buffers<T>& buffers) {
  const int last = args.x.ndim - 1;
  load_row<T>(buffers.x, args.x.data, args.x.dtype, row_offset(args.x, row), args.x.stride[last], d.dim);
  if (args.z) load_row<T>(buffers.z, args.z.data, args.z.dtype, row_offset(args.z, row), args.z.stride[last], d.dim);
  gated_norm_row<T>(buffers.y, buffers.x, args.z ? buffers.z : nullptr, weight, d.dim, d.group_size, args.eps,
                    args.norm_before_gate);
  store_row<T>(args.y.data, args.y.dtype, row_offset(args.y, row), args.y.stride[last], d.dim, buffers.y);
}

template <class T>
using NormRow = void (*)(const Args&, const Dims&, std::int64_t, const T*, const Buffers<T>&);

// x has the dtype of y, except that mamba2_scan hands over its scratch, which is T. z has it always.
template <class T>
NormRow<T> pick(const Args& args) {
  constexpr DType kT = kDTypeOf<T>, kHalf = DType::float16, kBrain = DType::bfloat16;
  const bool contiguous =
      has_contiguous_rows(args.x) && has_contiguous_rows(args.y) && (!args.z || has_contiguous_rows(args.z));
  if (!contiguous || (args.z && args.z.dtype != args.y.dtype)) return norm_by_copy<T>;
  if (args.x.dtype == kT && args.y.dtype == kT) return norm_in_place<T, kT, kT, kT>;
  if constexpr (kT == DType::float32) {
    if (args.y.dtype == kHalf)
      return args.x.dtype == kT ? norm_in_place<T, kT, kHalf, kHalf> : norm_in_place<T, kHalf, kHalf, kHalf>;
    if (args.y.dtype == kBrain)
      return args.x.dtype == kT ? norm_in_place<T, kT, kBrain, kBrain> : norm_in_place<T, kBrain, kBrain, kBrain>;
  }
  return norm_by_copy<T>;
}

template <class T>
void forward(const Args& args, const Dims& d) {
  Arena shared(args.workspace.data);
  T* weight = shared.take<T>(d.dim);
  if (args.weight) load_row<T>(weight, args.weight.data, args.weight.dtype, 0, args.weight.stride[0], d.dim);
  else for (std::int64_t c = 0; c < d.dim; ++c) weight[c] = T(1);
  const NormRow<T> norm_row = pick<T>(args);
  const std::int64_t rows_per_task = kTaskOutputs / d.dim > 1 ? kTaskOutputs / d.dim : 1;
  parallel_for((d.rows + rows_per_task - 1) / rows_per_task, [&](std::int64_t task, int thread) {
    Arena arena = shared;
    Buffers<T> buffers(arena, d.dim);
    for (int i = 0; i < thread; ++i) buffers = Buffers<T>(arena, d.dim);
    const std::int64_t end = (task + 1) * rows_per_task < d.rows ? (task + 1) * rows_per_task : d.rows;
    for (std::int64_t row = task * rows_per_task; row < end; ++row) norm_row(args, d, row, weight, buffers);
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
