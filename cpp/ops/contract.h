// The checks that every op's validate() is made of. Each raises before anything is written, naming the argument, what was
// expected and what came.
#pragma once

#include <initializer_list>
#include <string>

#include <statescan/tensor.h>

namespace statescan {

// One axis of an expected shape; a size of kAny is free.
struct Axis {
  const char* name;
  std::int64_t size;
};
inline constexpr std::int64_t kAny = -1;

// A set of dtypes, as bits.
using DTypes = unsigned;
constexpr DTypes just(DType dtype) { return 1u << static_cast<unsigned>(dtype); }
inline constexpr DTypes kReal = just(DType::float32) | just(DType::float16) | just(DType::bfloat16);
inline constexpr DTypes kIndex = just(DType::int32) | just(DType::int64);

std::string shape_of(const Tensor& t);        // "(2, 512, 3, 16)"
std::string names_of(DTypes dtypes);          // "float32, float16 or bfloat16"

class Contract {
 public:
  // `main` fixes the device and decides between float32 and float64 arithmetic.
  Contract(const char* op, const char* main_name, const Tensor& main);

  const char* op() const { return op_; }
  bool is_float64() const { return main_dtype_ == DType::float64; }
  DType main_dtype() const { return main_dtype_; }

  // The dtypes that go with float32 accumulation, or float64 alone when the op runs in float64.
  DTypes parameter() const { return just(is_float64() ? DType::float64 : DType::float32); }
  DTypes main_or_parameter() const { return just(main_dtype_) | parameter(); }
  DTypes state() const { return is_float64() ? just(DType::float64) : kReal; }
  DTypes step() const { return is_float64() ? just(DType::float64) : kReal; }
  DTypes complex_parameter() const { return just(is_float64() ? DType::complex128 : DType::complex64); }

  // An input: present, on the main device, with data, of this shape and one of these dtypes.
  void input(const char* name, const Tensor& t, std::initializer_list<Axis> axes, DTypes dtypes) const;
  // The same when the tensor is given, nothing when it is absent.
  void optional(const char* name, const Tensor& t, std::initializer_list<Axis> axes, DTypes dtypes) const;
  // An output: as optional, and no two elements may share memory.
  void output(const char* name, const Tensor& t, std::initializer_list<Axis> axes, DTypes dtypes) const;
  // run() cannot go on without it.
  void required(const char* name, const Tensor& t) const;

  // cu_seqlens [s+1] over `total` tokens (or chunks) of a batch of one: returns s; `batch` when it is absent. On the CPU the
  // values are checked as well: the first is 0, they never decrease, the last is at most total.
  std::int64_t sequences(const Tensor& cu_seqlens, std::int64_t batch, std::int64_t total) const;
  // state_positions [s,k] and the states at them, both or neither: returns k. On the CPU the values are checked as well: those
  // inside their sequence never decrease.
  std::int64_t positions(const Tensor& positions, const Tensor& states, const Tensor& cu_seqlens, std::int64_t sequences,
                         std::int64_t seqlen) const;
  // Slot indices [b] into `slots`; on the CPU the values are checked: -1 (padding, if allowed) to slots-1.
  void slot_indices(const char* name, const Tensor& t, std::int64_t batch, std::int64_t slots) const;

  void divides(const char* divisor_name, std::int64_t divisor, const char* from, const Tensor& source, const char* name,
               std::int64_t size) const;
  void limits(double dt_min, double dt_max) const;
  void rank(const char* name, const Tensor& t, std::initializer_list<int> ranks, const char* expected) const;

 private:
  void data(const char* name, const Tensor& t) const;
  void dtype(const char* name, const Tensor& t, DTypes dtypes) const;
  void shape(const char* name, const Tensor& t, std::initializer_list<Axis> axes) const;

  const char* op_;
  const char* main_name_;
  Device device_;
  DType main_dtype_;
};

// Reads element i of an int32 or int64 vector in CPU memory.
inline std::int64_t index_at(const Tensor& t, std::int64_t i) {
  return t.dtype == DType::int64 ? static_cast<const std::int64_t*>(t.data)[i * t.stride[0]]
                                 : static_cast<const std::int32_t*>(t.data)[i * t.stride[0]];
}

// The same of a matrix.
inline std::int64_t index_at(const Tensor& t, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * t.stride[0] + j * t.stride[1];
  return t.dtype == DType::int64 ? static_cast<const std::int64_t*>(t.data)[at] : static_cast<const std::int32_t*>(t.data)[at];
}

}  // namespace statescan
