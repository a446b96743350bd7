// The activation argument of the convolutions.
#pragma once

#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <statescan/causal_conv1d.h>

namespace statescan::python {

// None, "silu" or its other name "swish".
inline causal_conv1d::Activation read_activation(const char* op, nanobind::handle activation) {
  if (activation.is_none()) return causal_conv1d::Activation::none;
  std::string name;
  if (nanobind::try_cast(activation, name) && (name == "silu" || name == "swish")) return causal_conv1d::Activation::silu;
  fail<ValueError>(op, ": activation must be None or \"silu\", got ", nanobind::repr(activation).c_str());
}

}  // namespace statescan::python
