#include <statescan/selective_state_update.h>

#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

nb::object update(nb::handle state, nb::handle x, nb::handle dt, nb::handle A, nb::handle B, nb::handle C,
                  nb::handle D, nb::handle z, nb::handle dt_bias, bool dt_softplus, nb::handle dt_limit,
                  nb::handle state_indices, nb::handle out_state_indices, nb::handle out, nb::handle stream,
                  bool plan_only) {
  Call call("selective_state_update", "x", x, stream);
  selective_state_update::Args args;
  args.x = call.main();
  args.state = call.in_out("state", state);
  args.dt = call.in("dt", dt);
  args.A = call.in("A", A);
  args.B = call.in("B", B);
  args.C = call.in("C", C);
  args.D = call.in("D", D);
  args.z = call.in("z", z);
  args.dt_bias = call.in("dt_bias", dt_bias);
  args.state_indices = call.in("state_indices", state_indices);
  args.out_state_indices = call.in("out_state_indices", out_state_indices);
  args.dt_softplus = dt_softplus;
  read_limit("selective_state_update", dt_limit, args.dt_min, args.dt_max);
  args.y = call.given("out", out);
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  if (!args.y) args.y = call.out_like("out", nb::none(), args.x, args.x.dtype);
  return call.run_validated(args, d);
}

}  // namespace

void bind_selective_state_update(nb::module_& m) {
  m.def("selective_state_update", &update, nb::arg("state").none(), nb::arg("x").none(), nb::arg("dt").none(),
        nb::arg("A").none(), nb::arg("B").none(), nb::arg("C").none(), nb::arg("D") = nb::none(),
        nb::arg("z") = nb::none(), nb::arg("dt_bias") = nb::none(), nb::arg("dt_softplus") = false,
        nb::arg("dt_limit") = nb::none(), nb::arg("state_indices") = nb::none(),
        nb::arg("out_state_indices") = nb::none(), nb::arg("out") = nb::none(), nb::arg("stream") = nb::none(),
        nb::arg("plan_only") = false);
}

}  // namespace statescan::python
