#include <statescan/mamba2_scan.h>

#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

nb::object forward(nb::handle zxbcdt, nb::handle conv_weight, nb::handle conv_bias, nb::handle dt_bias, nb::handle A,
                   nb::handle D, nb::handle norm_weight, std::int64_t ngroups, std::int64_t norm_group_size,
                   double eps, bool norm_before_gate, bool dt_softplus, nb::handle dt_limit,
                   nb::handle initial_conv_state, nb::handle initial_state, bool return_final_states,
                   nb::handle cu_seqlens, bool reverse, std::int64_t chunk_size, bool batch_invariant, nb::handle out,
                   nb::handle final_conv_state_out, nb::handle final_state_out, nb::handle stream, bool plan_only) {
  Call call("mamba2_scan", "zxbcdt", zxbcdt, stream);
  mamba2_scan::Args args;
  args.zxbcdt = call.main();
  args.conv_weight = call.in("conv_weight", conv_weight);
  args.conv_bias = call.in("conv_bias", conv_bias);
  args.dt_bias = call.in("dt_bias", dt_bias);
  args.A = call.in("A", A);
  args.D = call.in("D", D);
  args.norm_weight = call.in("norm_weight", norm_weight);
  args.initial_conv_state = call.in("initial_conv_state", initial_conv_state);
  args.initial_state = call.in("initial_state", initial_state);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
  args.ngroups = ngroups;
  args.norm_group_size = norm_group_size;
  args.eps = eps;
  args.norm_before_gate = norm_before_gate;
  args.dt_softplus = dt_softplus;
  read_limit("mamba2_scan", dt_limit, args.dt_min, args.dt_max);
  args.reverse = reverse;
  args.chunk_size = chunk_size;
  args.batch_invariant = batch_invariant;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.y = call.out("out", out, {d.batch, d.seqlen, d.d_inner}, args.zxbcdt.dtype);
  if (return_final_states || !final_conv_state_out.is_none() || !final_state_out.is_none()) {
    args.final_conv_state = call.out("final_conv_state_out", final_conv_state_out,
                                     {d.num_sequences, d.conv_dim, d.width - 1}, args.zxbcdt.dtype);
    args.final_state = call.out("final_state_out", final_state_out, {d.num_sequences, d.nheads, d.headdim, d.dstate},
                                parameter_dtype(args.zxbcdt));
  }
  return call.run(args, d);
}

nb::object backward(nb::handle zxbcdt, nb::handle conv_weight, nb::handle conv_bias, nb::handle dt_bias, nb::handle A,
                    nb::handle dy, nb::handle D, nb::handle norm_weight, std::int64_t ngroups,
                    std::int64_t norm_group_size, double eps, bool norm_before_gate, bool dt_softplus,
                    nb::handle dt_limit, nb::handle initial_conv_state, nb::handle initial_state,
                    nb::handle cu_seqlens, bool reverse, std::int64_t chunk_size, bool batch_invariant,
                    nb::handle dfinal_conv_state, nb::handle dfinal_state, nb::handle stream, bool plan_only,
                    std::uint32_t wanted) {
  Call call("mamba2_scan_backward", "zxbcdt", zxbcdt, stream);
  call.want(wanted);
  mamba2_scan::BackwardArgs args;
  args.zxbcdt = call.main();
  args.conv_weight = call.in("conv_weight", conv_weight);
  args.conv_bias = call.in("conv_bias", conv_bias);
  args.dt_bias = call.in("dt_bias", dt_bias);
  args.A = call.in("A", A);
  args.D = call.in("D", D);
  args.norm_weight = call.in("norm_weight", norm_weight);
  args.initial_conv_state = call.in("initial_conv_state", initial_conv_state);
  args.initial_state = call.in("initial_state", initial_state);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
  args.dy = call.in("dy", dy);
  args.dfinal_conv_state = call.in("dfinal_conv_state", dfinal_conv_state);
  args.dfinal_state = call.in("dfinal_state", dfinal_state);
  args.ngroups = ngroups;
  args.norm_group_size = norm_group_size;
  args.eps = eps;
  args.norm_before_gate = norm_before_gate;
  args.dt_softplus = dt_softplus;
  read_limit("mamba2_scan_backward", dt_limit, args.dt_min, args.dt_max);
  args.reverse = reverse;
  args.chunk_size = chunk_size;
  args.batch_invariant = batch_invariant;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.dzxbcdt = call.gradient("dzxbcdt", args.zxbcdt);
  args.dconv_weight = call.gradient("dconv_weight", args.conv_weight);
  args.dconv_bias = call.gradient("dconv_bias", args.conv_bias);
  args.ddt_bias = call.gradient("ddt_bias", args.dt_bias);
  args.dA = call.gradient("dA", args.A);
  args.dD = call.gradient("dD", args.D);
  args.dnorm_weight = call.gradient("dnorm_weight", args.norm_weight);
  args.dinitial_conv_state = call.gradient("dinitial_conv_state", args.initial_conv_state);
  args.dinitial_state = call.gradient("dinitial_state", args.initial_state);
  return call.run(args, d);
}

}  // namespace

void bind_mamba2_scan(nb::module_& m) {
  m.def("mamba2_scan", &forward, nb::arg("zxbcdt").none(), nb::arg("conv_weight").none(), nb::arg("conv_bias").none(),
        nb::arg("dt_bias").none(), nb::arg("A").none(), nb::arg("D") = nb::none(), nb::arg("norm_weight") = nb::none(),
        nb::arg("ngroups") = 1, nb::arg("norm_group_size") = 0, nb::arg("eps") = 1e-5,
        nb::arg("norm_before_gate") = false, nb::arg("dt_softplus") = true, nb::arg("dt_limit") = nb::none(),
        nb::arg("initial_conv_state") = nb::none(), nb::arg("initial_state") = nb::none(),
        nb::arg("return_final_states") = false, nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false,
        nb::arg("chunk_size") = 0, nb::arg("batch_invariant") = false, nb::arg("out") = nb::none(),
        nb::arg("final_conv_state_out") = nb::none(), nb::arg("final_state_out") = nb::none(),
        nb::arg("stream") = nb::none(), nb::arg("plan_only") = false);
  m.def("mamba2_scan_backward", &backward, nb::arg("zxbcdt").none(), nb::arg("conv_weight").none(),
        nb::arg("conv_bias").none(), nb::arg("dt_bias").none(), nb::arg("A").none(), nb::arg("dy").none(),
        nb::arg("D") = nb::none(), nb::arg("norm_weight") = nb::none(), nb::arg("ngroups") = 1,
        nb::arg("norm_group_size") = 0, nb::arg("eps") = 1e-5, nb::arg("norm_before_gate") = false,
        nb::arg("dt_softplus") = true, nb::arg("dt_limit") = nb::none(), nb::arg("initial_conv_state") = nb::none(),
        nb::arg("initial_state") = nb::none(), nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false,
        nb::arg("chunk_size") = 0, nb::arg("batch_invariant") = false, nb::arg("dfinal_conv_state") = nb::none(),
        nb::arg("dfinal_state") = nb::none(), nb::arg("stream") = nb::none(), nb::arg("plan_only") = false,
        nb::arg("wanted") = ~0u);
}

}  // namespace statescan::python
