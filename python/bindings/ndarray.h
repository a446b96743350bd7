// Arrays of any framework as Tensors, and the life of one call: inputs viewed, outputs allocated in the framework of the
// inputs, the stream found, the workspace lent, the GIL released while the op runs.
#pragma once

#include <initializer_list>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <statescan/dispatch.h>
#include <statescan/tensor.h>

#include "dlpack_abi.h"

namespace nb = nanobind;

namespace statescan::python {

// An attribute name as a Python string, made once.
#define STATESCAN_INTERNED(text)                                          \
  ([]() -> PyObject* {                                                    \
    static PyObject* const name = PyUnicode_InternFromString(text);       \
    return name;                                                          \
  }())

// The descriptor behind an attribute of a type's instances, when it is one of C's and attributes are looked up in the common way:
// asking it directly spares the look-up, half the time of the question. Null otherwise.
PyObject* getter_of(PyTypeObject* type, const char* attribute);
PyObject* get(PyObject* descriptor, PyObject* object);

// While it lives, calls of this thread take torch tensors as they are: whoever holds it has asked whether they require grad.
class GradientsAskedFor {
 public:
  GradientsAskedFor() : former_(active_) { active_ = true; }
  ~GradientsAskedFor() { active_ = former_; }
  GradientsAskedFor(const GradientsAskedFor&) = delete;
  GradientsAskedFor& operator=(const GradientsAskedFor&) = delete;
  static bool active() { return active_; }

 private:
  inline static thread_local bool active_ = false;
  bool former_;
};

// The op's own run() and run_validated() by argument-dependent lookup, which Call's members of those names would hide.
template <class Args>
void run_op(const Args& args, Stream stream) {
  run(args, stream);
}
template <class Args, class Dims>
void run_validated_op(const Args& args, const Dims& dims, Stream stream) {
  run_validated(args, dims, stream);
}

// One call of an op. The main array decides the framework of the outputs, the device and the stream. Arguments are handles
// borrowed from the caller, who keeps them alive; whatever a conversion makes is owned here until the call ends.
class __attribute__((visibility("hidden"))) Call {
 public:
  Call(const char* op, const char* main_name, nb::handle main, nb::handle stream);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Tensor& main() const { return main_; }

  // An input; None gives an absent Tensor.
  Tensor in(const char* name, nb::handle object);
  // A tensor that is updated in place (the state of a cache) or was given to be written.
  Tensor in_out(const char* name, nb::handle object);
  // An output: the caller's array, or a new one of the main array's framework when `object` is None. It becomes the next
  // result().
  Tensor out(const char* name, nb::handle object, std::initializer_list<std::int64_t> shape, DType dtype);
  // An output that the caller gave, to be validated with the inputs; absent when `object` is None. Becomes the next result().
  Tensor given(const char* name, nb::handle object) {
    return object.is_none() ? Tensor{} : output(name, object, nullptr, 0, DType::float32);
  }
  // The same as out(), with the shape of another tensor.
  Tensor out_like(const char* name, nb::handle object, const Tensor& like, DType dtype);

  // The same for a [b,l,d] tensor in the layout of another: a caller whose tokens lie side by side (channels first) gets them back
  // so, from the frameworks that have such views.
  Tensor out_as_laid_out(const char* name, nb::handle object, const Tensor& like);

  // Which gradients a backward makes: bit i is its i-th result. All of them unless said.
  void want(std::uint32_t gradients) { wanted_ = gradients; }
  // Whether the next result is wanted; it is None if not.
  bool wants_next() {
    if (wanted_ >> result_count_ & 1) return true;
    results_[result_count_++] = nb::none();
    return false;
  }
  // A new output of the shape and dtype of what it differentiates; None when that was not given or its gradient is not wanted.
  Tensor gradient(const char* name, const Tensor& of) {
    if (of) return wants_next() ? out_like(name, nb::none(), of, of.dtype) : Tensor{};
    results_[result_count_++] = nb::none();
    return {};
  }

  // The same in the layout of what it differentiates, [b,l,d].
  Tensor gradient_as_laid_out(const char* name, const Tensor& of) {
    if (of) return wants_next() ? out_as_laid_out(name, nb::none(), of) : Tensor{};
    results_[result_count_++] = nb::none();
    return {};
  }

  // Runs the op and returns its outputs: none as None, one alone, several as a tuple.
  template <class Args, class Dims>
  nb::object run(Args& args, const Dims& dims) {
    return lend_and_run(args, dims, [](const Args& a, const Dims&, Stream stream) { run_op(a, stream); });
  }

  // The same for a decode op, whose outputs were given before validate() or made to measure after it.
  template <class Args, class Dims>
  nb::object run_validated(Args& args, const Dims& dims) {
    return lend_and_run(args, dims, [](const Args& a, const Dims& d, Stream stream) { run_validated_op(a, d, stream); });
  }

  // What statescan.plan() shows of the call.
  template <class Args, class Dims>
  static nb::object describe(const Args& args, const Dims& dims) {
    const Plan chosen = plan(args, dims);
    return nb::make_tuple(chosen.backend, chosen.kernel, chosen.workspace_bytes, chosen.segment_tokens,
                          chosen.reads_kept_states);
  }

 private:
  enum class GradMode : char { unknown, off, on };

  const char* op_;
  GradMode grad_mode_ = GradMode::unknown;  // torch's, asked once a call
  nb::handle main_object_;
  nb::handle stream_;
  const dlpack_abi::ExchangeApi* api_ = nullptr;  // of the main array's type, or null
  Tensor main_;
  static constexpr int kMaxImports = 24, kMaxResults = 10;
  nb::ndarray<nb::ro> imports_[kMaxImports];  // what the way without an exchange API made, held until the call ends
  int import_count_ = 0;
  nb::object workspace_;
  nb::object results_[kMaxResults];
  bool to_finish_[kMaxResults] = {};  // made as a NumPy array, to be handed back in the main array's own type
  int result_count_ = 0;
  std::uint32_t wanted_ = ~0u;

  const dlpack_abi::ExchangeApi* view(const char* name, nb::handle object, bool writable, Tensor& tensor);
  void refuse_dropped_gradient(const char* name, nb::handle object, PyObject* getter);
  void refuse_lazy_view(const char* name, nb::handle object) const;
  bool view_numpy(const char* name, nb::handle object, PyObject* array_struct, bool writable, Tensor& tensor) const;
  void import(const char* name, nb::handle object, bool writable, Tensor& tensor);
  Tensor tensor_from(const char* name, const dlpack_abi::TensorDescriptor& descriptor) const;
  Tensor allocate(const std::int64_t* shape, int ndim, DType dtype, nb::object& array);
  Tensor output(const char* name, nb::handle object, const std::int64_t* shape, int ndim, DType dtype);
  template <class Args, class Dims, class Run>
  nb::object lend_and_run(Args& args, const Dims& dims, Run run) {
    const Stream stream = find_stream();
    lend_workspace(plan(args, dims).workspace_bytes, stream, args.workspace);
    {
      nb::gil_scoped_release unlocked;
      run(args, dims, stream);
    }
    return results();
  }

  void lend_workspace(std::size_t bytes, Stream stream, Workspace& workspace);
  Stream find_stream() const;
  nb::object results();
};

// The dtype of states that go with the main tensor: float32, or what float64 arithmetic needs.
inline DType parameter_dtype(const Tensor& main) { return main.dtype == DType::float64 ? DType::float64 : DType::float32; }

// dt_limit=(low, high) into dt_min and dt_max; None leaves them.
void read_limit(const char* op, nb::handle dt_limit, double& dt_min, double& dt_max);

}  // namespace statescan::python
