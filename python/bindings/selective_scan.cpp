#include <statescan/selective_scan.h>

#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

// The inputs that both directions share.
void read_inputs(Call& call, selective_scan::Inputs& args, nb::handle dt, nb::handle A, nb::handle B, nb::handle C,
                 nb::handle D, nb::handle z, nb::handle dt_bias, nb::handle initial_state, nb::handle cu_seqlens) {
  args.x = call.main();
  args.dt = call.in("dt", dt);
  args.A = call.in("A", A);
  args.B = call.in("B", B);
  args.C = call.in("C", C);
  args.D = call.in("D", D);
  args.z = call.in("z", z);
  args.dt_bias = call.in("dt_bias", dt_bias);
  args.initial_state = call.in("initial_state", initial_state);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
}

nb::object forward(nb::handle x, nb::handle dt, nb::handle A, nb::handle B, nb::handle C, nb::handle D, nb::handle z,
                   nb::handle dt_bias, bool dt_softplus, nb::handle dt_limit, nb::handle initial_state,
                   bool return_final_state, nb::handle cu_seqlens, bool reverse, bool batch_invariant,
                   nb::handle state_positions, nb::handle out, nb::handle final_state_out, nb::handle position_states_out,
                   nb::handle stream, bool plan_only) {
  Call call("selective_scan", "x", x, stream);
  selective_scan::Args args;
  read_inputs(call, args, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens);
  args.dt_softplus = dt_softplus;
  read_limit("selective_scan", dt_limit, args.dt_min, args.dt_max);
  args.reverse = reverse;
  args.batch_invariant = batch_invariant;
  args.state_positions = call.in("state_positions", state_positions);
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.y = call.out_as_laid_out("out", out, args.x);
  const DType state_dtype = d.complex_A ? args.A.dtype : parameter_dtype(args.x);
  if (return_final_state || !final_state_out.is_none())
    args.final_state = call.out("final_state_out", final_state_out, {d.num_sequences, d.dim, d.dstate}, state_dtype);
  if (args.state_positions || !position_states_out.is_none())
    args.position_states = call.out("position_states_out", position_states_out,
                                    {d.num_sequences, d.npositions, d.dim, d.dstate}, state_dtype);
  return call.run(args, d);
}

nb::object backward(nb::handle x, nb::handle dt, nb::handle A, nb::handle B, nb::handle C, nb::handle dy,
                    nb::handle D, nb::handle z, nb::handle dt_bias, bool dt_softplus, nb::handle dt_limit,
                    nb::handle initial_state, nb::handle cu_seqlens, bool reverse, bool batch_invariant,
                    nb::handle dfinal_state, nb::handle stream, bool plan_only, std::uint32_t wanted) {
  Call call("selective_scan_backward", "x", x, stream);
  call.want(wanted);
  selective_scan::BackwardArgs args;
  read_inputs(call, args, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens);
  args.dy = call.in("dy", dy);
  args.dfinal_state = call.in("dfinal_state", dfinal_state);
  args.dt_softplus = dt_softplus;
  read_limit("selective_scan_backward", dt_limit, args.dt_min, args.dt_max);
  args.reverse = reverse;
  args.batch_invariant = batch_invariant;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.dx = call.gradient_as_laid_out("dx", args.x);
  args.ddt = call.gradient_as_laid_out("ddt", args.dt);
  args.dA = call.gradient("dA", args.A);
  args.dB = call.gradient("dB", args.B);
  args.dC = call.gradient("dC", args.C);
  args.dD = call.gradient("dD", args.D);
  args.dz = call.gradient_as_laid_out("dz", args.z);
  args.ddt_bias = call.gradient("ddt_bias", args.dt_bias);
  args.dinitial_state = call.gradient("dinitial_state", args.initial_state);
  return call.run(args, d);
}

}  // namespace

void bind_selective_scan(nb::module_& m) {
  m.def("selective_scan", &forward, nb::arg("x").none(), nb::arg("dt").none(), nb::arg("A").none(),
        nb::arg("B").none(), nb::arg("C").none(), nb::arg("D") = nb::none(), nb::arg("z") = nb::none(),
        nb::arg("dt_bias") = nb::none(), nb::arg("dt_softplus") = false, nb::arg("dt_limit") = nb::none(),
        nb::arg("initial_state") = nb::none(), nb::arg("return_final_state") = false,
        nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false, nb::arg("batch_invariant") = false,
        nb::arg("state_positions") = nb::none(), nb::arg("out") = nb::none(), nb::arg("final_state_out") = nb::none(),
        nb::arg("position_states_out") = nb::none(), nb::arg("stream") = nb::none(), nb::arg("plan_only") = false);
  m.def("selective_scan_backward", &backward, nb::arg("x").none(), nb::arg("dt").none(), nb::arg("A").none(),
        nb::arg("B").none(), nb::arg("C").none(), nb::arg("dy").none(), nb::arg("D") = nb::none(),
        nb::arg("z") = nb::none(), nb::arg("dt_bias") = nb::none(), nb::arg("dt_softplus") = false,
        nb::arg("dt_limit") = nb::none(), nb::arg("initial_state") = nb::none(), nb::arg("cu_seqlens") = nb::none(),
        nb::arg("reverse") = false, nb::arg("batch_invariant") = false, nb::arg("dfinal_state") = nb::none(),
        nb::arg("stream") = nb::none(), nb::arg("plan_only") = false, nb::arg("wanted") = ~0u);
}

}  // namespace statescan::python
