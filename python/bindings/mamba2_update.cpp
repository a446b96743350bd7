#include <statescan/mamba2_update.h>

#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

nb::object update(nb::handle zxbcdt, nb::handle conv_state, nb::handle state, nb::handle conv_weight,
                  nb::handle conv_bias, nb::handle dt_bias, nb::handle A, nb::handle D, nb::handle norm_weight,
                  std::int64_t ngroups, std::int64_t norm_group_size, double eps, bool norm_before_gate,
                  bool dt_softplus, nb::handle dt_limit, nb::handle state_indices, nb::handle out, nb::handle stream,
                  bool plan_only) {
  Call call("mamba2_update", "zxbcdt", zxbcdt, stream);
  mamba2_update::Args args;
  args.zxbcdt = call.main();
  args.conv_state = call.in_out("conv_state", conv_state);
  args.state = call.in_out("state", state);
  args.conv_weight = call.in("conv_weight", conv_weight);
  args.conv_bias = call.in("conv_bias", conv_bias);
  args.dt_bias = call.in("dt_bias", dt_bias);
  args.A = call.in("A", A);
  args.D = call.in("D", D);
  args.norm_weight = call.in("norm_weight", norm_weight);
  args.state_indices = call.in("state_indices", state_indices);
  args.ngroups = ngroups;
  args.norm_group_size = norm_group_size;
  args.eps = eps;
  args.norm_before_gate = norm_before_gate;
  args.dt_softplus = dt_softplus;
  read_limit("mamba2_update", dt_limit, args.dt_min, args.dt_max);
  args.y = call.given("out", out);
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  if (!args.y)
    args.y = d.has_token_axis ? call.out("out", nb::none(), {d.batch, d.ntokens, d.d_inner}, args.zxbcdt.dtype)
                              : call.out("out", nb::none(), {d.batch, d.d_inner}, args.zxbcdt.dtype);
  return call.run_validated(args, d);
}

}  // namespace

void bind_mamba2_update(nb::module_& m) {
  m.def("mamba2_update", &update, nb::arg("zxbcdt").none(), nb::arg("conv_state").none(), nb::arg("state").none(),
        nb::arg("conv_weight").none(), nb::arg("conv_bias").none(), nb::arg("dt_bias").none(), nb::arg("A").none(),
        nb::arg("D") = nb::none(), nb::arg("norm_weight") = nb::none(), nb::arg("ngroups") = 1,
        nb::arg("norm_group_size") = 0, nb::arg("eps") = 1e-5, nb::arg("norm_before_gate") = false,
        nb::arg("dt_softplus") = true, nb::arg("dt_limit") = nb::none(), nb::arg("state_indices") = nb::none(),
        nb::arg("out") = nb::none(), nb::arg("stream") = nb::none(), nb::arg("plan_only") = false);
}

}  // namespace statescan::python
