// The way that a call of statescan.torch takes. Its questions are those of every call: asked from Python, one by one, they take
// a microsecond.
#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

// What of torch is asked, found once, and kept: the interpreter ends before statics do.
struct Torch {
  nb::object tensor, parameter, forward_ad;
  nb::object count_dispatch_modes, transforms_are_active, autocast_is_active, is_grad_enabled;
  PyObject* requires_grad;  // the getter of both types, or null
};

const Torch& torch() {
  static const Torch& found = *[] {
    const nb::module_ torch = nb::module_::import_("torch"), C = nb::module_::import_("torch._C");
    auto* t = new Torch{torch.attr("Tensor"), torch.attr("nn").attr("Parameter"), nb::module_::import_("torch.autograd.forward_ad"),
            C.attr("_len_torch_dispatch_stack"), C.attr("_are_functorch_transforms_active"),
            C.attr("_is_any_autocast_enabled"), torch.attr("is_grad_enabled"), nullptr};
    t->requires_grad = getter_of(reinterpret_cast<PyTypeObject*>(t->tensor.ptr()), "requires_grad");
    return t;
  }();
  return found;
}

nb::object checked(PyObject* result) {
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

bool says_yes(nb::handle question) { return checked(PyObject_CallNoArgs(question.ptr())).ptr() == Py_True; }

bool requires_grad(PyObject* tensor) {
  PyObject* const getter = torch().requires_grad;
  return checked(getter ? get(getter, tensor) : PyObject_GetAttr(tensor, STATESCAN_INTERNED("requires_grad"))).ptr() == Py_True;
}

bool is_option(PyTypeObject* type) {
  return type == Py_TYPE(Py_None) || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
         type == &PyUnicode_Type || type == &PyTuple_Type || type == &PyList_Type;
}

nb::object call(nb::handle callable, nb::handle args) { return checked(PyObject_Call(callable.ptr(), args.ptr(), nullptr)); }

// The ways of one op's calls, as Python holds them: callables that take its arguments.
struct Ways {
  explicit Ways(const nb::tuple& t) : kernel(t[0]), watched(t[1]), positions(t[2]), dispatched(t[3]), carefully(t[4]) {}

  nb::handle kernel, watched, positions, dispatched, carefully;
};

// What an op's autograd.Function holds of the op, as Python has it.
struct Watching {
  explicit Watching(const nb::tuple& t)
      : kernel(t[0]), saved(t[1]), options(t[2]), several(t[3]), keeps(t[4].ptr() == Py_True) {}

  nb::handle kernel;
  nb::handle saved, options;  // the places of arguments, as tuples
  nb::handle several;  // called with (ctx, args, results) where there are several results: those to hand on, and one kept
  bool keeps;          // whether the backward takes such a result
};

// The arguments at some places, and room for `more`.
nb::object pick(const nb::tuple& args, nb::handle places, Py_ssize_t more = 0) {
  const Py_ssize_t count = PyTuple_Size(places.ptr());
  nb::object picked = checked(PyTuple_New(count + more));
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GetItem(places.ptr(), i));
    PyTuple_SetItem(picked.ptr(), i, nb::handle(args[place]).inc_ref().ptr());
  }
  return picked;
}

void append(const nb::object& tuple, nb::handle last) {
  PyTuple_SetItem(tuple.ptr(), PyTuple_Size(tuple.ptr()) - 1, last.inc_ref().ptr());
}

nb::object forward(const Watching& op, nb::handle ctx, const nb::tuple& args) {
  const GradientsAskedFor asked;
  nb::object results = call(op.kernel, args), kept = nb::none();
  if (PyTuple_Check(results.ptr())) {
    const nb::tuple both(
        checked(PyObject_CallFunctionObjArgs(op.several.ptr(), ctx.ptr(), args.ptr(), results.ptr(), nullptr)));
    results = both[0], kept = both[1];
  }
  const nb::object saved = pick(args, op.saved, op.keeps);
  if (op.keeps) append(saved, kept);
  call(checked(PyObject_GetAttr(ctx.ptr(), STATESCAN_INTERNED("save_for_backward"))), saved);
  if (PyObject_SetAttr(ctx.ptr(), STATESCAN_INTERNED("options"), pick(args, op.options).ptr()) != 0) throw nb::python_error();
  return results;
}

// The forward of an autograd.Function as torch calls it: ctx, the tensors that have a gradient, and the tuple of all arguments.
// Its own time counts, since a training step has hundreds of these calls.
PyObject* forward_of_function(PyObject* watching, PyObject* given) {
  try {
    const nb::handle ctx = PyTuple_GetItem(given, 0), args = PyTuple_GetItem(given, PyTuple_Size(given) - 1);
    return forward(Watching(nb::borrow<nb::tuple>(watching)), ctx, nb::borrow<nb::tuple>(args)).release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
    return nullptr;
  }
}

nb::object torch_forward(const nb::tuple& watching) {
  static PyMethodDef definition{"forward", forward_of_function, METH_VARARGS, nullptr};
  return checked(PyCFunction_NewEx(&definition, watching.ptr(), nullptr));
}

// To the dispatcher when an argument is neither an option nor a plain tensor: torch.Tensor or torch.nn.Parameter, no subclass. To
// autograd when a gradient is wanted: as the tensors that have one and the tuple of all arguments, since each further one costs
// autograd 0.1 us. Else straight to the library.
nb::object call_by_arguments(const nb::tuple& ways, const nb::tuple& args) {
  const Ways way(ways);
  const Torch& t = torch();
  const bool grad_is_enabled = says_yes(t.is_grad_enabled);
  bool wants_gradient = false;
  for (nb::handle arg : args) {
    PyTypeObject* const type = Py_TYPE(arg.ptr());
    const auto* const as_object = reinterpret_cast<PyObject*>(type);
    if (as_object == t.tensor.ptr() || as_object == t.parameter.ptr())
      wants_gradient = wants_gradient || (grad_is_enabled && requires_grad(arg.ptr()));
    else if (!is_option(type))
      return call(way.dispatched, args);
  }
  if (!wants_gradient) {
    const GradientsAskedFor asked;
    return call(way.kernel, args);
  }
  const nb::object watched_args = pick(args, way.positions, 1);
  append(watched_args, args);
  return call(way.watched, watched_args);
}

// Where a mode, a transform, forward-mode AD or autocast is on, Python decides; else the arguments do.
nb::object torch_call(const nb::tuple& ways, const nb::tuple& args) {
  const Torch& t = torch();
  const bool is_common =
      PyLong_AsLong(checked(PyObject_CallNoArgs(t.count_dispatch_modes.ptr())).ptr()) == 0 &&
      !says_yes(t.transforms_are_active) && !says_yes(t.autocast_is_active) &&
      PyLong_AsLong(checked(PyObject_GetAttr(t.forward_ad.ptr(), STATESCAN_INTERNED("_current_level"))).ptr()) < 0;
  return is_common ? call_by_arguments(ways, args) : call(Ways(ways).carefully, args);
}

}  // namespace

void bind_torch_call(nb::module_& m) {
  m.def("torch_call", &torch_call, nb::arg("ways"), nb::arg("args"));
  m.def("torch_call_by_arguments", &call_by_arguments, nb::arg("ways"), nb::arg("args"));
  m.def("torch_forward", &torch_forward, nb::arg("watching"));
}

}  // namespace statescan::python
