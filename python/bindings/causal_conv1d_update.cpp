#include <statescan/causal_conv1d_update.h>

#include "activation.h"
#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

nb::object update(nb::handle x, nb::handle state, nb::handle weight, nb::handle bias, nb::handle activation,
                  nb::handle state_indices, nb::handle out, nb::handle stream, bool plan_only) {
  Call call("causal_conv1d_update", "x", x, stream);
  causal_conv1d_update::Args args;
  args.x = call.main();
  args.state = call.in_out("state", state);
  args.weight = call.in("weight", weight);
  args.bias = call.in("bias", bias);
  args.state_indices = call.in("state_indices", state_indices);
  args.activation = read_activation("causal_conv1d_update", activation);
  args.y = call.given("out", out);
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  if (!args.y) args.y = call.out_like("out", nb::none(), args.x, args.x.dtype);
  return call.run_validated(args, d);
}

}  // namespace

void bind_causal_conv1d_update(nb::module_& m) {
  m.def("causal_conv1d_update", &update, nb::arg("x").none(), nb::arg("state").none(), nb::arg("weight").none(),
        nb::arg("bias") = nb::none(), nb::arg("activation") = nb::none(), nb::arg("state_indices") = nb::none(),
        nb::arg("out") = nb::none(), nb::arg("stream") = nb::none(), nb::arg("plan_only") = false);
}

}  // namespace statescan::python
