// The extension module statescan._C: every op, and what info() tells.
#include "module.h"

#include <statescan/dispatch.h>
#include <statescan/error.h>

NB_MODULE(_C, m) {
  using namespace statescan;
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const NotImplementedError& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    } catch (const CudaError& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    } catch (const ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  m.def("version", &version);
  m.def("cpu_isa", &cpu_isa);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, nb::arg("count"));
  m.def("cuda_architectures", &cuda_architectures);
  m.def("cuda_unavailable_reason", [] { return nb::str(cuda_unavailable_reason().c_str()); });
  m.def("cuda_device_count", &cuda_device_count);
  python::bind_state_scan(m);
  python::bind_ssd_scan(m);
  python::bind_selective_scan(m);
  python::bind_causal_conv1d(m);
  python::bind_gated_rms_norm(m);
  python::bind_mamba2_scan(m);
  python::bind_causal_conv1d_update(m);
  python::bind_selective_state_update(m);
  python::bind_mamba2_update(m);
  python::bind_torch_call(m);
  python::bind_xla(m);
}
