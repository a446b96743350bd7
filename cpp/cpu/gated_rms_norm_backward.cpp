// gated_rms_norm backward on the CPU
// Math     with s = silu(z), v the normed vector, r = 1 / sqrt(mean(v^2) + eps) and g the gradient of v r:
//            gate first  v = x s, g = dy weight:    dv = r (g - v r mean(g v r)), dx = dv s, dz = dv x s'
//            norm first  v = x,   g = dy weight s:  dx = r (g - v r mean(g v r)), dz = dy weight v r s'
//          dweight = sum over rows of dy v r, times s where the norm comes first
// Shapes   x, z, dy, dx, dz [..., d]; weight, dweight [d]
// Traffic  read x, z, dy, write dx, dz: 5*rows*d*sizeof(Element); the second pass over a row finds it in the nearest caches
// Tasks    runs of rows, cut by the shape alone; each run leaves its own sum of dweight
// Numerics a group's sums run in a fixed order on one thread; dweight is summed over a few rows in T, then in double, run by
//          run
#include <type_traits>

#include "isa.h"
#include "norm_row.h"
#include "parallel.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using gated_rms_norm::BackwardArgs;
using gated_rms_norm::Dims;

constexpr std::int64_t kTaskOutputs = 32768;  // 10 to 50 us of work
constexpr std::int64_t kMostRuns = 128;       // bounds the memory of the partial sums
constexpr std::int64_t kRowsInT = 32;         // rows whose dweight is summed in T
constexpr std::int64_t kSumChannels = 512;    // of dweight that a task adds up

std::int64_t rows_per_run(const Dims& d) {
  const std::int64_t for_work = kTaskOutputs / d.dim, for_memory = (d.rows + kMostRuns - 1) / kMostRuns;
  return for_work > for_memory ? for_work : (for_memory > 1 ? for_memory : 1);
}

std::int64_t runs_of(const Dims& d) { return (d.rows + rows_per_run(d) - 1) / rows_per_run(d); }

// Shared by all threads.
template <class T>
struct Sums {
  T* weight;
  double* dweight;  // [runs][dim]
  Sums(Arena& arena, const Dims& d) : weight(arena.take<T>(d.dim)), dweight(arena.take<double>(runs_of(d) * d.dim)) {}
};

// Rows of one thread: copies of what does not lie as contiguous T, the sigmoid of z, and dweight of a few rows.
template <class T>
struct Buffers {
  T *x, *z, *dy, *dx, *dz, *sigmas, *dweight;
  Buffers(Arena& arena, std::int64_t dim) {
    for (T** row : {&x, &z, &dy, &dx, &dz, &sigmas, &dweight}) *row = arena.take<T>(dim);
  }
};

template <class T>
std::size_t bytes_per_thread(const Dims& d) {
  Arena count(nullptr);
  Buffers<T>(count, d.dim);
  return count.used();
}

template <class T>
bool lies_ready(const Tensor& t) {
  return t.dtype == kDTypeOf<T> && has_contiguous_rows(t);
}

template <class T>
const T* read_row(const Tensor& t, std::int64_t row, T* copy) {
  if (lies_ready<T>(t)) return static_cast<const T*>(t.data) + row_offset(t, row);
  load_row<T>(copy, t.data, t.dtype, row_offset(t, row), t.stride[t.ndim - 1], t.shape[t.ndim - 1]);
  return copy;
}

// Where a row of an output is made; finish_row takes it to the tensor if it was made elsewhere.
template <class T>
T* row_to_write(const Tensor& t, std::int64_t row, T* copy) {
  return t && lies_ready<T>(t) ? static_cast<T*>(t.data) + row_offset(t, row) : copy;
}

template <class T>
void finish_row(const Tensor& t, std::int64_t row, const T* from) {
  if (t && !lies_ready<T>(t))
    store_row<T>(t.data, t.dtype, row_offset(t, row), t.stride[t.ndim - 1], t.shape[t.ndim - 1], from);
}

// The lanes of a vector: all of them, known at compile time, or the first few.
template <class T>
using Whole = std::integral_constant<int, kLanes<T>>;

template <class T, class Lanes>
STATESCAN_INLINE Vec<T> load_lanes(const T* p, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, int>) return load_first<T>(p, lanes);
  else return load<T>(p);
}

template <class T, class Lanes>
STATESCAN_INLINE void store_lanes(T* p, Vec<T> v, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, int>) store_first<T>(p, v, lanes);
  else store<T>(p, v);
}

template <class T, class Body>
STATESCAN_INLINE void for_lanes(std::int64_t count, Body&& body) {
  for_vectors<T>(count, [&](std::int64_t i) { body(i, Whole<T>{}); }, [&](std::int64_t i, int n) { body(i, n); });
}

enum class Gate { none, first, last };

// A group of channels of one row.
template <class T, Gate kGate>
struct GroupGradient {
  const T *x, *z, *dy, *weight;
  T *dx, *dz, *sigmas, *dweight;
  std::int64_t count;

  // What is normed and the gradient of its normed form, from the gate s.
  template <class Lanes>
  STATESCAN_INLINE void normed(std::int64_t i, Lanes n, Vec<T> s, Vec<T>& v, Vec<T>& g) const {
    v = load_lanes(x + i, n);
    g = load_lanes(dy + i, n) * load_lanes(weight + i, n);
    if constexpr (kGate == Gate::first) v = v * s;
    if constexpr (kGate == Gate::last) g = g * s;
  }

  STATESCAN_INLINE void run(double eps) const {
    Vec<T> squares{}, products{};
    for_lanes<T>(count, [&](std::int64_t i, auto n) {
      Vec<T> s{}, v, g;
      if constexpr (kGate != Gate::none) {
        const Vec<T> gate = load_lanes(z + i, n), sigma = sigmoid<T>(gate);
        store_lanes(sigmas + i, sigma, n);
        s = gate * sigma;
      }
      normed(i, n, s, v, g);
      squares = squares + v * v;
      products = products + g * v;
    });
    const double size = static_cast<double>(count), square = static_cast<double>(sum_lanes<T>(squares));
    const double r = 1.0 / __builtin_sqrt(square / size + eps);
    const T scale = static_cast<T>(r), mean = static_cast<T>(r * static_cast<double>(sum_lanes<T>(products)) / size);
    for_lanes<T>(count, [&](std::int64_t i, auto n) {
      Vec<T> s{}, slope{}, v, g;
      if constexpr (kGate != Gate::none) {
        const Vec<T> sigma = load_lanes(sigmas + i, n);
        s = load_lanes(z + i, n) * sigma;
        slope = sigma + s * (T(1) - sigma);
      }
      normed(i, n, s, v, g);
      const Vec<T> unit = v * scale, dv = (g - unit * mean) * scale;
      if constexpr (kGate == Gate::first) store_lanes(dz + i, dv * load_lanes(x + i, n) * slope, n);
      if constexpr (kGate == Gate::last)
        store_lanes(dz + i, load_lanes(dy + i, n) * load_lanes(weight + i, n) * unit * slope, n);
      const Vec<T> of_weight = load_lanes(dy + i, n) * unit;
      store_lanes(dweight + i, load_lanes(dweight + i, n) + (kGate == Gate::last ? of_weight * s : of_weight), n);
      store_lanes(dx + i, kGate == Gate::first ? dv * s : dv, n);  // last: dx may lie where x lies
    });
  }
};

template <class T, Gate kGate>
void run_row(const BackwardArgs& args, const Dims& d, std::int64_t row, const T* weight, const Buffers<T>& buffers) {
  const T* x = read_row<T>(args.x, row, buffers.x);
  const T* z = args.z ? read_row<T>(args.z, row, buffers.z) : nullptr;
  const T* dy = read_row<T>(args.dy, row, buffers.dy);
  T* dx = row_to_write<T>(args.dx, row, buffers.dx);
  T* dz = row_to_write<T>(args.dz, row, buffers.dz);
  for (std::int64_t c = 0; c < d.dim; c += d.group_size)
    GroupGradient<T, kGate>{
        x + c, z ? z + c : nullptr, dy + c, weight + c, dx + c, dz + c, buffers.sigmas + c, buffers.dweight + c, d.group_size}
        .run(args.eps);
  finish_row<T>(args.dx, row, dx);
  finish_row<T>(args.dz, row, dz);
}

template <class T>
void backward(const BackwardArgs& args, const Dims& d) {
  Arena arena(args.workspace.data);
  const Sums<T> sums(arena, d);
  if (args.weight) load_row<T>(sums.weight, args.weight.data, args.weight.dtype, 0, args.weight.stride[0], d.dim);
  else
    for (std::int64_t c = 0; c < d.dim; ++c) sums.weight[c] = T(1);
  const auto run = !args.z ? run_row<T, Gate::none> : args.norm_before_gate ? run_row<T, Gate::last> : run_row<T, Gate::first>;
  char* const per_thread = static_cast<char*>(args.workspace.data) + arena.used();
  const std::size_t bytes = bytes_per_thread<T>(d);
  const std::int64_t each = rows_per_run(d), runs = runs_of(d);
  parallel_for(runs, [&](std::int64_t task, int thread) {
    Arena own(per_thread + thread * bytes);
    const Buffers<T> buffers(own, d.dim);
    double* const total = args.dweight ? sums.dweight + task * d.dim : nullptr;
    for (std::int64_t c = 0; total && c < d.dim; ++c) total[c] = 0;
    const std::int64_t end = (task + 1) * each < d.rows ? (task + 1) * each : d.rows;
    for (std::int64_t first = task * each; first < end; first += kRowsInT) {
      for (std::int64_t c = 0; c < d.dim; ++c) buffers.dweight[c] = T(0);
      for (std::int64_t row = first; row < end && row < first + kRowsInT; ++row) run(args, d, row, sums.weight, buffers);
      for (std::int64_t c = 0; total && c < d.dim; ++c) total[c] += static_cast<double>(buffers.dweight[c]);
    }
  });
  if (!args.dweight) return;
  parallel_for((d.dim + kSumChannels - 1) / kSumChannels, [&](std::int64_t task, int) {
    const std::int64_t first = task * kSumChannels, end = first + kSumChannels < d.dim ? first + kSumChannels : d.dim;
    double total[kSumChannels] = {};
    for (std::int64_t run_index = 0; run_index < runs; ++run_index)
      for (std::int64_t c = first; c < end; ++c) total[c - first] += sums.dweight[run_index * d.dim + c];
    for (std::int64_t c = first; c < end; ++c)
      store_element<double>(args.dweight.data, args.dweight.dtype, c * args.dweight.stride[0], total[c - first]);
  });
}

template <class T>
std::size_t bytes_of(const Dims& d) {
  Arena count(nullptr);
  Sums<T>(count, d);
  return count.used() + max_threads() * bytes_per_thread<T>(d);
}

}  // namespace

std::size_t workspace_bytes(const BackwardArgs& args, const Dims& d) {
  if (d.dim == 0) return 0;
  return args.x.dtype == DType::float64 ? bytes_of<double>(d) : bytes_of<float>(d);
}

void run(const BackwardArgs& args, const Dims& d) {
  if (d.dim == 0) return;
  args.x.dtype == DType::float64 ? backward<double>(args, d) : backward<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
