// One function for each file of this folder that binds something.
#pragma once

#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace statescan::python {

void bind_state_scan(nb::module_& m);
void bind_ssd_scan(nb::module_& m);
void bind_selective_scan(nb::module_& m);
void bind_causal_conv1d(nb::module_& m);
void bind_gated_rms_norm(nb::module_& m);
void bind_mamba2_scan(nb::module_& m);
void bind_causal_conv1d_update(nb::module_& m);
void bind_selective_state_update(nb::module_& m);
void bind_mamba2_update(nb::module_& m);
void bind_torch_call(nb::module_& m);
void bind_xla(nb::module_& m);

}  // namespace statescan::python
