#include <statescan/gated_rms_norm.h>

#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

nb::object forward(nb::handle x, nb::handle z, nb::handle weight, std::int64_t group_size, double eps,
                   bool norm_before_gate, nb::handle out, nb::handle stream, bool plan_only) {
  Call call("gated_rms_norm", "x", x, stream);
  gated_rms_norm::Args args;
  args.x = call.main();
  args.z = call.in("z", z);
  args.weight = call.in("weight", weight);
  args.group_size = group_size;
  args.eps = eps;
  args.norm_before_gate = norm_before_gate;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.y = call.out_like("out", out, args.x, args.x.dtype);
  return call.run(args, d);
}

nb::object backward(nb::handle x, nb::handle dy, nb::handle z, nb::handle weight, std::int64_t group_size, double eps,
                    bool norm_before_gate, nb::handle stream, bool plan_only, std::uint32_t wanted) {
  Call call("gated_rms_norm_backward", "x", x, stream);
  call.want(wanted);
  gated_rms_norm::BackwardArgs args;
  args.x = call.main();
  args.z = call.in("z", z);
  args.weight = call.in("weight", weight);
  args.dy = call.in("dy", dy);
  args.group_size = group_size;
  args.eps = eps;
  args.norm_before_gate = norm_before_gate;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.dx = call.gradient("dx", args.x);
  args.dz = call.gradient("dz", args.z);
  args.dweight = call.gradient("dweight", args.weight);
  return call.run(args, d);
}

}  // namespace

void bind_gated_rms_norm(nb::module_& m) {
  m.def("gated_rms_norm", &forward, nb::arg("x").none(), nb::arg("z") = nb::none(), nb::arg("weight") = nb::none(),
        nb::arg("group_size") = 0, nb::arg("eps") = 1e-5, nb::arg("norm_before_gate") = false,
        nb::arg("out") = nb::none(), nb::arg("stream") = nb::none(), nb::arg("plan_only") = false);
  m.def("gated_rms_norm_backward", &backward, nb::arg("x").none(), nb::arg("dy").none(), nb::arg("z") = nb::none(),
        nb::arg("weight") = nb::none(), nb::arg("group_size") = 0, nb::arg("eps") = 1e-5,
        nb::arg("norm_before_gate") = false, nb::arg("stream") = nb::none(), nb::arg("plan_only") = false,
        nb::arg("wanted") = ~0u);
}

}  // namespace statescan::python
