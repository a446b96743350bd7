#include "contract.h"

#include <algorithm>
#include <bit>

namespace statescan {

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + (t.ndim == 1 ? ",)" : ")");
}

std::string names_of(DTypes dtypes) {
  std::string text;
  int left = std::popcount(dtypes);
  for (int i = 0; i < 8; ++i) {
    if (!(dtypes >> i & 1u)) continue;
    text += name_of(static_cast<DType>(i));
    if (--left > 0) text += left == 1 ? " or " : ", ";
  }
  return text;
}

static std::string expected_shape(std::initializer_list<Axis> axes) {
  std::string text = "(";
  bool first = true;
  for (const Axis& axis : axes) {
    text += std::string(first ? "" : ", ") + axis.name;
    if (axis.size != kAny) text += "=" + std::to_string(axis.size);
    first = false;
  }
  return text + ")";
}

static std::string device_name(Device d) {
  return d.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(d.index);
}

Contract::Contract(const char* op, const char* main_name, const Tensor& main)
    : op_(op), main_name_(main_name), device_(main.device), main_dtype_(main.dtype) {
  required(main_name, main);
  dtype(main_name, main, kReal | just(DType::float64));
  if (main.dtype == DType::float64 && main.device.type == DeviceType::cuda)
    fail<TypeError>(op_, ": ", main_name, " is float64; on CUDA use ", names_of(kReal), " (float64 runs on the CPU)");
}

void Contract::required(const char* name, const Tensor& t) const {
  if (!t) fail<ValueError>(op_, ": ", name, " is required");
}

void Contract::data(const char* name, const Tensor& t) const {
  if (t.device != device_)
    fail<ValueError>(op_, ": ", name, " is on ", device_name(t.device), " but ", main_name_, " is on ", device_name(device_));
  if (!t.data && t.numel() > 0)
    fail<ValueError>(op_, ": ", name, " has no memory behind it (is it a FakeTensor or on the meta device?)");
}

void Contract::dtype(const char* name, const Tensor& t, DTypes dtypes) const {
  if (!(just(t.dtype) & dtypes))
    fail<TypeError>(op_, ": ", name, " is ", name_of(t.dtype), "; expected ", names_of(dtypes));
}

void Contract::shape(const char* name, const Tensor& t, std::initializer_list<Axis> axes) const {
  bool good = t.ndim == static_cast<int>(axes.size());
  int i = 0;
  for (const Axis& axis : axes) {
    if (!good) break;
    good = axis.size == kAny || axis.size == t.shape[i];
    ++i;
  }
  if (!good) fail<ValueError>(op_, ": ", name, " has shape ", shape_of(t), "; expected ", expected_shape(axes));
}

void Contract::input(const char* name, const Tensor& t, std::initializer_list<Axis> axes, DTypes dtypes) const {
  required(name, t);
  dtype(name, t, dtypes);
  shape(name, t, axes);
  data(name, t);
}

void Contract::optional(const char* name, const Tensor& t, std::initializer_list<Axis> axes, DTypes dtypes) const {
  if (t) input(name, t, axes, dtypes);
}

// Distinct indices must reach distinct addresses. Sorted by stride, each axis must step over all that the finer ones span;
// views that interleave without meeting fail this too, and none occurs in practice.
static bool overlaps_itself(const Tensor& t) {
  int order[kMaxDims];
  int count = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) return false;
    if (t.shape[i] > 1) order[count++] = i;
  }
  auto step = [&](int axis) { return t.stride[axis] < 0 ? -t.stride[axis] : t.stride[axis]; };
  std::sort(order, order + count, [&](int a, int b) { return step(a) < step(b); });
  std::int64_t span = 0;
  for (int k = 0; k < count; ++k) {
    if (step(order[k]) <= span) return true;
    span += step(order[k]) * (t.shape[order[k]] - 1);
  }
  return false;
}

void Contract::output(const char* name, const Tensor& t, std::initializer_list<Axis> axes, DTypes dtypes) const {
  if (!t) return;
  input(name, t, axes, dtypes);
  if (overlaps_itself(t))
    fail<ValueError>(op_, ": ", name, " is written, but its strides make elements share memory (an expanded view?)");
}

std::int64_t Contract::sequences(const Tensor& cu, std::int64_t batch, std::int64_t total) const {
  if (!cu) return batch;
  input("cu_seqlens", cu, {{"num_sequences + 1", kAny}}, kIndex);
  if (cu.shape[0] < 1) fail<ValueError>(op_, ": cu_seqlens has shape (0,); expected (num_sequences + 1)");
  if (batch != 1) fail<ValueError>(op_, ": cu_seqlens packs sequences along one axis, so batch must be 1, got ", batch);
  const std::int64_t count = cu.shape[0] - 1;
  if (cu.device.type != DeviceType::cpu) return count;
  std::int64_t last = index_at(cu, 0);
  if (last != 0) fail<ValueError>(op_, ": cu_seqlens must start at 0, got ", last);
  for (std::int64_t i = 1; i <= count; ++i) {
    const std::int64_t next = index_at(cu, i);
    if (next < last) fail<ValueError>(op_, ": cu_seqlens must not decrease, got ", last, " then ", next, " at position ", i);
    last = next;
  }
  if (last > total) fail<ValueError>(op_, ": cu_seqlens ends at ", last, ", past the ", total, " that there are");
  return count;
}

std::int64_t Contract::positions(const Tensor& positions, const Tensor& states, const Tensor& cu, std::int64_t sequences,
                                 std::int64_t seqlen) const {
  if (!positions) {
    if (states) fail<ValueError>(op_, ": position_states without state_positions, which say what it is to hold");
    return 0;
  }
  input("state_positions", positions, {{"num_sequences", sequences}, {"npositions", kAny}}, kIndex);
  if (positions.device.type != DeviceType::cpu) return positions.shape[1];
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t length = cu ? index_at(cu, s + 1) - index_at(cu, s) : seqlen;
    for (std::int64_t k = 0, last = 0; k < positions.shape[1]; ++k) {
      const std::int64_t next = index_at(positions, s, k);
      if (next < 0 || next > length) continue;
      if (next < last)
        fail<ValueError>(op_, ": state_positions must ascend, got ", last, " then ", next, " in sequence ", s);
      last = next;
    }
  }
  return positions.shape[1];
}

void Contract::slot_indices(const char* name, const Tensor& t, std::int64_t batch, std::int64_t slots) const {
  if (!t) return;
  input(name, t, {{"batch", batch}}, kIndex);
  if (t.device.type != DeviceType::cpu) return;
  for (std::int64_t i = 0; i < batch; ++i) {
    const std::int64_t slot = index_at(t, i);
    if (slot < -1 || slot >= slots)
      fail<ValueError>(op_, ": ", name, "[", i, "]=", slot, " must lie in 0..", slots - 1, ", or be -1 for padding");
  }
}

void Contract::divides(const char* divisor_name, std::int64_t divisor, const char* from, const Tensor& source,
                       const char* name, std::int64_t size) const {
  if (divisor > 0 && size % divisor == 0) return;
  if (divisor == 0 && size == 0) return;
  fail<ValueError>(op_, ": ", divisor_name, "=", divisor, " (from ", from, ", shape ", shape_of(source), ") must divide ",
                   name, "=", size);
}

void Contract::limits(double dt_min, double dt_max) const {
  if (!(dt_min <= dt_max)) fail<ValueError>(op_, ": dt_limit=(", dt_min, ", ", dt_max, ") must be ordered (low, high)");
}

void Contract::rank(const char* name, const Tensor& t, std::initializer_list<int> ranks, const char* expected) const {
  required(name, t);
  for (int r : ranks)
    if (t.ndim == r) return;
  fail<ValueError>(op_, ": ", name, " has shape ", shape_of(t), "; expected ", expected);
}

}  // namespace statescan
