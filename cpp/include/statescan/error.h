// The exceptions that the library raises. Python sees each under its own name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace statescan {

// An argument has a wrong shape, stride, size or value.
struct __attribute__((visibility("default"))) ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
// An argument has a dtype or device that the op does not take.
struct __attribute__((visibility("default"))) TypeError : std::logic_error {
  using std::logic_error::logic_error;
};
// The arguments are valid, but no kernel in this build serves them.
struct __attribute__((visibility("default"))) NotImplementedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A CUDA call failed; the message names it.
struct __attribute__((visibility("default"))) CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Raises Error with its parts written one after the other. Kept out of line so that checks stay small.
template <class Error, class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace statescan
