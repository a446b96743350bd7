// What statescan.torch asks about the arguments of every call. Asked from Python, one argument at a time, it takes 1.3 us.
#include "module.h"

namespace statescan::python {

namespace {

bool is_option(PyTypeObject* type) {
  return type == Py_TYPE(Py_None) || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
         type == &PyUnicode_Type || type == &PyTuple_Type || type == &PyList_Type;
}

bool requires_grad(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  PyObject* answer = PyObject_GetAttr(tensor, name);
  if (!answer) throw nb::python_error();
  Py_DECREF(answer);
  return answer == Py_True;
}

// Whether a tensor among the arguments requires grad; None when one is neither an option nor a plain tensor, so that torch's
// dispatcher must decide. The types of plain tensors are torch.Tensor and torch.nn.Parameter themselves, no subclass.
nb::object any_requires_grad(nb::tuple args, nb::handle tensor_type, nb::handle parameter_type) {
  bool any = false;
  for (nb::handle arg : args) {
    PyTypeObject* const type = Py_TYPE(arg.ptr());
    const bool is_tensor = reinterpret_cast<PyObject*>(type) == tensor_type.ptr() ||
                           reinterpret_cast<PyObject*>(type) == parameter_type.ptr();
    if (is_tensor)
      any = any || requires_grad(arg.ptr());
    else if (!is_option(type))
      return nb::none();
  }
  return nb::bool_(any);
}

}  // namespace

void bind_torch_call(nb::module_& m) {
  m.def("any_requires_grad", &any_requires_grad, nb::arg("args"), nb::arg("tensor_type"), nb::arg("parameter_type"));
}

}  // namespace statescan::python
