#include "ndarray.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include <nanobind/stl/string.h>

#include "workspace.h"

namespace statescan::python {

PyObject* getter_of(PyTypeObject* type, const char* attribute) {
  if (PyType_GetSlot(type, Py_tp_getattro) != reinterpret_cast<void*>(&PyObject_GenericGetAttr)) return nullptr;
  nb::object descriptor = nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), attribute, nb::none());
  return Py_TYPE(descriptor.ptr()) == &PyGetSetDescr_Type ? descriptor.release().ptr() : nullptr;
}

PyObject* get(PyObject* descriptor, PyObject* object) {
  static const auto getter = reinterpret_cast<descrgetfunc>(PyType_GetSlot(&PyGetSetDescr_Type, Py_tp_descr_get));
  return getter(descriptor, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
}

namespace {

// What is known of a Python type: asked once, then remembered with a reference held, so that a cached pointer never dangles.
struct TypeTraits {
  PyTypeObject* type;
  const dlpack_abi::ExchangeApi* api;  // null: no exchange API
  bool is_torch, is_numpy, is_jax;
  // The getters of an attribute, as descriptors; null: the type answers in a way of its own.
  PyObject* requires_grad;  // of torch
  PyObject* array_struct;   // of NumPy
};

std::string module_of(PyTypeObject* type) {
  nb::object name = nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__module__", nb::str(""));
  const std::string full = nb::isinstance<nb::str>(name) ? nb::cast<std::string>(name) : "";
  return full.substr(0, full.find('.'));
}

bool inherits_from(PyTypeObject* type, const char* module, const char* name) {
  nb::object bases = nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__mro__");
  for (nb::handle base : bases) {
    auto* candidate = reinterpret_cast<PyTypeObject*>(base.ptr());
    if (module_of(candidate) == module && nb::cast<std::string>(nb::getattr(base, "__name__")) == name) return true;
  }
  return false;
}

const dlpack_abi::ExchangeApi* exchange_api(PyTypeObject* type) {
  nb::object capsule = nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header = static_cast<dlpack_abi::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header && header->version.major > dlpack_abi::kMajorVersion) header = header->previous;
  if (!header || header->version.major != dlpack_abi::kMajorVersion) return nullptr;
  auto* api = reinterpret_cast<const dlpack_abi::ExchangeApi*>(header);
  return api->descriptor_from_object ? api : nullptr;
}

TypeTraits traits_of(PyTypeObject* type) {
  constexpr int kSlots = 16;
  static TypeTraits known[kSlots];  // the GIL guards it
  static int used = 0;
  for (int i = 0; i < used; ++i)
    if (known[i].type == type) return known[i];
  const std::string module = module_of(type);
  const bool is_torch = inherits_from(type, "torch", "Tensor");
  const bool is_numpy = inherits_from(type, "numpy", "ndarray");
  const TypeTraits found{type,
                         exchange_api(type),
                         is_torch,
                         is_numpy,
                         module == "jax" || module == "jaxlib",
                         is_torch ? getter_of(type, "requires_grad") : nullptr,
                         is_numpy ? getter_of(type, "__array_struct__") : nullptr};
  if (used < kSlots) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));
    known[used++] = found;
  } else {
    Py_XDECREF(found.requires_grad);  // the type keeps them
    Py_XDECREF(found.array_struct);
  }
  return found;
}

bool is_true(PyObject* object) {
  const bool yes = object == Py_True;
  Py_XDECREF(object);
  if (!object) throw nb::python_error();
  return yes;
}

// Whether a torch tensor could be a lazy view: a complex one (conj), or a real one whose strides are all even, as those of the
// imaginary part of a lazy conjugate are. Asking torch costs 0.1 us a tensor; this spares nearly all of them.
bool may_be_lazy(const Tensor& t) {
  if (is_complex(t.dtype)) return true;
  if (t.dtype == DType::int32 || t.dtype == DType::int64) return false;
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] > 1 && t.stride[i] % 2 != 0) return false;
  return true;
}

// ml_dtypes' bfloat16 is one of NumPy's void-kind dtypes; the kind is a quick look, the name a slow one.
bool is_numpy_bfloat16(nb::handle array) {
  nb::object dtype = nb::steal(PyObject_GetAttr(array.ptr(), STATESCAN_INTERNED("dtype")));
  nb::object kind = nb::steal(PyObject_GetAttr(dtype.ptr(), STATESCAN_INTERNED("kind")));
  if (PyUnicode_CompareWithASCIIString(kind.ptr(), "V") != 0) return false;
  return nb::cast<std::string>(nb::getattr(dtype, "name")) == "bfloat16";
}

// Helpers that are easier said in Python: statescan/_arrays.py.
nb::handle arrays_module() {
  static PyObject* const module = nb::module_::import_("statescan._arrays").release().ptr();
  return module;
}

dlpack_abi::DataType dlpack_dtype(DType dtype) {
  const int code = is_complex(dtype)                                     ? dlpack::kComplex
                   : dtype == DType::int32 || dtype == DType::int64      ? dlpack::kInt
                   : dtype == DType::bfloat16                            ? dlpack::kBfloat
                                                                         : dlpack::kFloat;
  return {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(8 * size_of(dtype)), 1};
}

}  // namespace

namespace {

// What NumPy's __array_struct__ points to: version 2 or later of its array interface, here in the fields that all have.
struct ArrayInterface {
  int two, ndim;
  char kind;
  int itemsize, flags;
  Py_ssize_t *shape, *strides;  // strides in bytes
  void* data;
};
constexpr int kAligned = 0x100, kNativeOrder = 0x200, kWriteable = 0x400;

bool dtype_of(const ArrayInterface& a, DType& dtype) {
  switch (a.kind) {
    case 'f':
      dtype = a.itemsize == 4 ? DType::float32 : (a.itemsize == 8 ? DType::float64 : DType::float16);
      return a.itemsize <= 8;
    case 'c':
      dtype = a.itemsize == 8 ? DType::complex64 : DType::complex128;
      return a.itemsize <= 16;
    case 'i':
      dtype = a.itemsize == 4 ? DType::int32 : DType::int64;
      return a.itemsize == 4 || a.itemsize == 8;
    default: return false;
  }
}

}  // namespace

void* thread_workspace(std::size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t held = 0;
  if (bytes > held) {
    constexpr std::size_t kAlign = 256;
    const std::size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
    memory.reset();
    held = 0;
    memory.reset(std::aligned_alloc(kAlign, rounded));
    if (!memory) throw std::bad_alloc();
    held = rounded;
  }
  return memory.get();
}

Call::Call(const char* op, const char* main_name, nb::handle main, nb::handle stream)
    : op_(op), main_object_(main), stream_(stream) {
  api_ = view(main_name, main, false, main_);
}

// Fills `tensor` and returns the exchange API of the array's type, or null.
const dlpack_abi::ExchangeApi* Call::view(const char* name, nb::handle object, bool writable, Tensor& tensor) {
  if (object.is_none()) return nullptr;
  const TypeTraits traits = traits_of(reinterpret_cast<PyTypeObject*>(object.type().ptr()));
  if (traits.is_torch) refuse_dropped_gradient(name, object, traits.requires_grad);
  if (writable && traits.is_jax)
    fail<TypeError>(op_, ": ", name, " is a JAX array, which is immutable and cannot be written; use statescan.jax");
  if (!traits.api) {
    if (!traits.array_struct || !view_numpy(name, object, traits.array_struct, writable, tensor))
      import(name, object, writable, tensor);
    return nullptr;
  }
  dlpack_abi::TensorDescriptor descriptor;
  if (traits.api->descriptor_from_object(object.ptr(), &descriptor)) {
    nb::python_error cause;
    fail<TypeError>(op_, ": ", name, ": ", cause.what());
  }
  tensor = tensor_from(name, descriptor);
  if (traits.is_torch && may_be_lazy(tensor)) refuse_lazy_view(name, object);
  return traits.api;
}

// The quick way to a NumPy array, half the time of the buffer protocol. False for what it cannot say: the other way then answers
// or complains.
bool Call::view_numpy(const char* name, nb::handle object, PyObject* array_struct, bool writable, Tensor& tensor) const {
  const nb::object capsule = nb::steal(get(array_struct, object.ptr()));
  if (!capsule.is_valid()) throw nb::python_error();
  const auto* a = static_cast<const ArrayInterface*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (!a) throw nb::python_error();
  DType dtype;
  if (a->two != 2 || !(a->flags & kAligned) || !(a->flags & kNativeOrder) || a->ndim > kMaxDims || !dtype_of(*a, dtype))
    return false;
  for (int i = 0; i < a->ndim; ++i)
    if (a->strides[i] % a->itemsize != 0) return false;
  if (writable && !(a->flags & kWriteable)) fail<ValueError>(op_, ": ", name, " is written, but the array is read-only");
  tensor.data = a->data;
  tensor.dtype = dtype;
  tensor.ndim = a->ndim;
  for (int i = 0; i < a->ndim; ++i) {
    tensor.shape[i] = a->shape[i];
    tensor.stride[i] = a->strides[i] / a->itemsize;
  }
  return true;
}

// A torch tensor that autograd follows would lose its gradient here, silently.
void Call::refuse_dropped_gradient(const char* name, nb::handle object, PyObject* getter) {
  if (grad_mode_ == GradMode::unknown && GradientsAskedFor::active()) grad_mode_ = GradMode::off;
  if (grad_mode_ == GradMode::unknown) {
    static PyObject* const is_grad_enabled =
        nb::getattr(nb::module_::import_("torch"), "is_grad_enabled").release().ptr();
    grad_mode_ = is_true(PyObject_CallNoArgs(is_grad_enabled)) ? GradMode::on : GradMode::off;
  }
  if (grad_mode_ == GradMode::off) return;
  if (!is_true(getter ? get(getter, object.ptr()) : PyObject_GetAttr(object.ptr(), STATESCAN_INTERNED("requires_grad")))) return;
  fail<TypeError>(op_, ": ", name, " requires grad, and this function would drop its gradient; pass ", name,
                  ".detach(), or call it under torch.no_grad()");
}

// The memory behind a lazy negative or conjugate holds other values than the tensor shows.
void Call::refuse_lazy_view(const char* name, nb::handle object) const {
  if (is_true(PyObject_CallMethodObjArgs(object.ptr(), STATESCAN_INTERNED("is_neg"), nullptr)) ||
      is_true(PyObject_CallMethodObjArgs(object.ptr(), STATESCAN_INTERNED("is_conj"), nullptr)))
    fail<TypeError>(op_, ": ", name, " is a lazy negative or conjugate view, whose memory holds other values; pass ", name,
                    ".resolve_neg() or .resolve_conj()");
}

// The way without an exchange API: the buffer protocol or __dlpack__, through nanobind.
void Call::import(const char* name, nb::handle object, bool writable, Tensor& tensor) {
  const TypeTraits traits = traits_of(reinterpret_cast<PyTypeObject*>(object.type().ptr()));
  nb::object source = nb::borrow(object);
  bool is_bfloat16 = false;
  if (traits.is_numpy) {
    if (is_numpy_bfloat16(object)) {  // ml_dtypes': neither buffer nor DLPack knows it
      is_bfloat16 = true;
      source = nb::getattr(object, "view")("uint16");
    }
    if (writable && !nb::cast<bool>(nb::getattr(nb::getattr(object, "flags"), "writeable")))
      fail<ValueError>(op_, ": ", name, " is written, but the array is read-only");
  } else if (nb::hasattr(object, "__dlpack_device__")) {
    nb::tuple device = nb::cast<nb::tuple>(nb::getattr(object, "__dlpack_device__")());
    // On a GPU -1 asks for no synchronisation: order comes from the stream of the call, and graph capture goes on.
    if (nb::cast<int>(device[0]) != dlpack::kCPU) {
      if (traits.is_jax)  // it has no stream to work on, and refuses -1
        fail<TypeError>(op_, ": ", name, " is a JAX array on a GPU; use statescan.jax");
      source = nb::getattr(object, "__dlpack__")(nb::arg("stream") = -1);
    }
  }
  if (import_count_ == kMaxImports) fail<ValueError>(op_, ": more than ", kMaxImports, " arrays");
  nb::ndarray<nb::ro>& array = imports_[import_count_++];
  bool taken;
  if (writable && !traits.is_numpy) {  // NumPy's flag is read above; others refuse to be imported as writable
    nb::ndarray<> as_writable;
    taken = nb::try_cast(source, as_writable, false);
    if (taken) array = nb::ndarray<nb::ro>(as_writable);  // one import: a DLPack capsule can be taken once
  } else {
    taken = nb::try_cast(source, array, false);
  }
  if (!taken)
    fail<TypeError>(op_, ": ", name, " is ", nb::type_name(object.type()).c_str(), "; expected ",
                    writable ? "a writable array" : "an array", " (NumPy, torch, or anything with __dlpack__)");
  const auto dtype = array.dtype();
  const dlpack_abi::TensorDescriptor descriptor{
      const_cast<void*>(array.data()),
      {array.device_type(), array.device_id()},
      static_cast<std::int32_t>(array.ndim()),
      is_bfloat16 ? dlpack_dtype(DType::bfloat16) : dlpack_abi::DataType{dtype.code, dtype.bits, dtype.lanes},
      const_cast<std::int64_t*>(array.shape_ptr()),
      const_cast<std::int64_t*>(array.stride_ptr()),
      0};
  tensor = tensor_from(name, descriptor);
}

// from_dlpack, its complaints preceded by the names of the op and the argument.
Tensor Call::tensor_from(const char* name, const dlpack_abi::TensorDescriptor& descriptor) const {
  try {
    return from_dlpack(descriptor);
  } catch (const TypeError& error) {
    fail<TypeError>(op_, ": ", name, ": ", error.what());
  } catch (const ValueError& error) {
    fail<ValueError>(op_, ": ", name, ": ", error.what());
  }
}

Tensor Call::in(const char* name, nb::handle object) {
  if (object.is(main_object_)) return main_;
  Tensor tensor;
  view(name, object, false, tensor);
  return tensor;
}

Tensor Call::in_out(const char* name, nb::handle object) {
  Tensor tensor;
  view(name, object, true, tensor);
  return tensor;
}

Tensor Call::allocate(const std::int64_t* shape, int ndim, DType dtype, nb::object& array) {
  Tensor tensor;
  if (api_) {
    std::int64_t sizes[kMaxDims];
    std::copy(shape, shape + ndim, sizes);
    dlpack_abi::TensorDescriptor prototype{};
    prototype.device = {main_.device.type == DeviceType::cpu ? dlpack::kCPU : dlpack::kCUDA, main_.device.index};
    prototype.ndim = ndim;
    prototype.dtype = dlpack_dtype(dtype);
    prototype.shape = sizes;
    std::string error;
    dlpack_abi::ManagedTensor* made = nullptr;
    if (api_->allocate(&prototype, &made, &error,
                       [](void* text, const char*, const char* message) { *static_cast<std::string*>(text) = message; }))
      throw std::runtime_error(std::string(op_) + ": allocating an output failed: " + error);
    tensor = from_dlpack(made->tensor);
    void* object = nullptr;
    if (api_->object_from_managed(made, &object)) throw nb::python_error();
    array = nb::steal(static_cast<PyObject*>(object));
    return tensor;
  }
  nb::list sizes;
  for (int i = 0; i < ndim; ++i) sizes.append(shape[i]);
  array = arrays_module().attr("empty")(main_object_, nb::tuple(sizes), name_of(dtype), main_.device.type == DeviceType::cuda);
  view("output", array, true, tensor);
  return tensor;
}

Tensor Call::output(const char* name, nb::handle object, const std::int64_t* shape, int ndim, DType dtype) {
  const int index = result_count_++;
  if (object.is_none()) {
    to_finish_[index] = !api_;
    return allocate(shape, ndim, dtype, results_[index]);
  }
  results_[index] = nb::borrow(object);
  return in_out(name, object);
}

Tensor Call::out(const char* name, nb::handle object, std::initializer_list<std::int64_t> shape, DType dtype) {
  return output(name, object, shape.begin(), static_cast<int>(shape.size()), dtype);
}

Tensor Call::out_like(const char* name, nb::handle object, const Tensor& like, DType dtype) {
  return output(name, object, like.shape, like.ndim, dtype);
}

Tensor Call::out_as_laid_out(const char* name, nb::handle object, const Tensor& like) {
  const TypeTraits traits = traits_of(reinterpret_cast<PyTypeObject*>(main_object_.type().ptr()));
  const bool has_views = api_ || traits.is_numpy || traits.is_torch;
  const bool channels_first = like.ndim == 3 && like.shape[1] > 1 && like.stride[1] == 1 && like.stride[2] >= like.shape[1];
  if (!object.is_none() || !has_views || !channels_first) return out_like(name, object, like, like.dtype);
  const std::int64_t shape[] = {like.shape[0], like.shape[2], like.shape[1]};
  nb::object& result = results_[result_count_];
  Tensor tensor = output(name, object, shape, 3, like.dtype);
  result = result.attr("swapaxes")(1, 2);
  std::swap(tensor.shape[1], tensor.shape[2]);
  std::swap(tensor.stride[1], tensor.stride[2]);
  return tensor;
}

namespace {

// A little scratch memory on a GPU, kept for the calls to come: to have it allocated takes longer than a decode step's launch.
// The calls of one stream use it one after the other, and each holds it until its work is on the stream.
struct KeptScratch {
  static constexpr std::size_t kBytes = std::size_t{1} << 18;
  int device;
  Stream stream;
  nb::object array;  // null: none yet
  void* data;
};

// That of a stream, the GIL held: the one used longest ago makes room. A per-thread stream is another in every thread.
KeptScratch* kept_scratch(int device, Stream stream) {
  constexpr int kStreams = 8;
  static KeptScratch* const kept = new KeptScratch[kStreams]();  // never freed: the interpreter ends before statics do
  const Stream per_thread = reinterpret_cast<Stream>(std::uintptr_t{2});
  if (stream == per_thread || cuda_is_capturing(stream)) return nullptr;
  int at = 0;
  while (at < kStreams - 1 && kept[at].array.is_valid() && !(kept[at].device == device && kept[at].stream == stream)) ++at;
  if (!(kept[at].device == device && kept[at].stream == stream)) kept[at] = {device, stream, {}, nullptr};
  std::rotate(kept, kept + at, kept + at + 1);
  return kept;
}

}  // namespace

void Call::lend_workspace(std::size_t bytes, Stream stream, Workspace& workspace) {
  if (bytes == 0) return;
  if (main_.device.type == DeviceType::cpu) {
    workspace = {thread_workspace(bytes), bytes};
    return;
  }
  const auto kept = [&] { return kept_scratch(main_.device.index, stream); };
  const KeptScratch* const found = api_ && bytes <= KeptScratch::kBytes ? kept() : nullptr;
  if (found && found->array.is_valid()) {
    workspace_ = found->array;
    workspace = {found->data, bytes};
    return;
  }
  const std::int64_t words = static_cast<std::int64_t>(((found ? KeptScratch::kBytes : bytes) + 7) / 8);
  workspace = {allocate(&words, 1, DType::int64, workspace_).data, bytes};
  if (!found) return;
  KeptScratch& now = *kept();  // looked up again: another call may have come in between
  now.array = workspace_, now.data = workspace.data;
}

Stream Call::find_stream() const {
  if (main_.device.type == DeviceType::cpu) return nullptr;
  if (!stream_.is_none()) {
    nb::object handle = arrays_module().attr("stream_handle")(stream_);
    return reinterpret_cast<Stream>(nb::cast<std::uintptr_t>(handle));
  }
  if (api_) {
    void* current = nullptr;
    if (api_->current_stream(dlpack::kCUDA, main_.device.index, &current)) throw nb::python_error();
    return current;
  }
  nb::object handle = arrays_module().attr("current_stream")(main_object_);
  return reinterpret_cast<Stream>(nb::cast<std::uintptr_t>(handle));
}

nb::object Call::results() {
  for (int i = 0; i < result_count_; ++i)
    if (to_finish_[i]) results_[i] = arrays_module().attr("finish")(main_object_, results_[i]);
  if (result_count_ == 0) return nb::none();
  if (result_count_ == 1) return results_[0];
  nb::object tuple = nb::steal(PyTuple_New(result_count_));
  for (int i = 0; i < result_count_; ++i) PyTuple_SetItem(tuple.ptr(), i, results_[i].inc_ref().ptr());
  return tuple;
}

void read_limit(const char* op, nb::handle dt_limit, double& dt_min, double& dt_max) {
  if (dt_limit.is_none()) return;
  if (!PySequence_Check(dt_limit.ptr()) || nb::len(dt_limit) != 2)
    fail<ValueError>(op, ": dt_limit must be a pair (low, high) or None");
  dt_min = nb::cast<double>(dt_limit[0]);
  dt_max = nb::cast<double>(dt_limit[1]);
}

}  // namespace statescan::python
