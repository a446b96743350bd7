#include <statescan/ssd_scan.h>

#include <string>

#include <nanobind/stl/string.h>

#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

ssd_scan::SsdMode read_mode(nb::handle mode) {
  using ssd_scan::SsdMode;
  if (mode.is_none()) return SsdMode::automatic;
  std::string name;
  if (nb::try_cast(mode, name)) {
    if (name == "chunked") return SsdMode::chunked;
    if (name == "recurrent") return SsdMode::recurrent;
    if (name == "quadratic") return SsdMode::quadratic;
  }
  fail<ValueError>("ssd_scan: ssd_mode must be None, \"chunked\", \"recurrent\" or \"quadratic\", got ",
                   nb::repr(mode).c_str());
}

// The inputs that both directions share.
void read_inputs(Call& call, ssd_scan::Inputs& args, nb::handle dt, nb::handle A, nb::handle B, nb::handle C, nb::handle D,
                 nb::handle z, nb::handle dt_bias, nb::handle initial_state, nb::handle cu_seqlens) {
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
                   nb::handle dt_bias, bool dt_softplus, nb::handle dt_limit, nb::handle initial_state, bool return_final_state,
                   nb::handle cu_seqlens, bool reverse, std::int64_t chunk_size, bool batch_invariant,
                   nb::handle state_positions, nb::handle ssd_mode, bool save_states, nb::handle out,
                   nb::handle final_state_out, nb::handle position_states_out, nb::handle chunk_states_out, nb::handle stream,
                   bool plan_only) {
  Call call("ssd_scan", "x", x, stream);
  ssd_scan::Args args;
  read_inputs(call, args, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens);
  args.dt_softplus = dt_softplus;
  read_limit("ssd_scan", dt_limit, args.dt_min, args.dt_max);
  args.reverse = reverse;
  args.chunk_size = chunk_size;
  args.batch_invariant = batch_invariant;
  args.state_positions = call.in("state_positions", state_positions);
  args.mode = read_mode(ssd_mode);
  const auto d = validate(args);
  save_states = save_states || !chunk_states_out.is_none();
  if (plan_only) {
    if (save_states)  // that it is wanted counts, its memory does not
      args.chunk_states =
          Tensor::contiguous(nullptr, args.x.dtype, {d.batch, d.nstretches, d.nheads, d.headdim, d.dstate}, args.x.device);
    return Call::describe(args, d);
  }
  args.y = call.out_like("out", out, args.x, args.x.dtype);
  if (return_final_state || !final_state_out.is_none())
    args.final_state = call.out("final_state_out", final_state_out, {d.num_sequences, d.nheads, d.headdim, d.dstate},
                                parameter_dtype(args.x));
  if (args.state_positions || !position_states_out.is_none())
    args.position_states =
        call.out("position_states_out", position_states_out,
                 {d.num_sequences, d.npositions, d.nheads, d.headdim, d.dstate}, parameter_dtype(args.x));
  if (save_states)
    args.chunk_states =
        call.out("chunk_states_out", chunk_states_out, {d.batch, d.nstretches, d.nheads, d.headdim, d.dstate}, args.x.dtype);
  return call.run(args, d);
}

nb::object backward(nb::handle x, nb::handle dt, nb::handle A, nb::handle B, nb::handle C, nb::handle dy, nb::handle D,
                    nb::handle z, nb::handle dt_bias, bool dt_softplus, nb::handle dt_limit, nb::handle initial_state,
                    nb::handle cu_seqlens, bool reverse, std::int64_t chunk_size, bool batch_invariant, nb::handle dfinal_state,
                    nb::handle chunk_states, nb::handle stream, bool plan_only, std::uint32_t wanted) {
  Call call("ssd_scan_backward", "x", x, stream);
  call.want(wanted);
  ssd_scan::BackwardArgs args;
  read_inputs(call, args, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens);
  args.dy = call.in("dy", dy);
  args.dfinal_state = call.in("dfinal_state", dfinal_state);
  args.chunk_states = call.in("chunk_states", chunk_states);
  args.dt_softplus = dt_softplus;
  read_limit("ssd_scan_backward", dt_limit, args.dt_min, args.dt_max);
  args.reverse = reverse;
  args.chunk_size = chunk_size;
  args.batch_invariant = batch_invariant;
  const auto d = validate(args);
  if (plan_only) {  // that these are wanted counts, for what can lie there before them; their memory does not
    const auto wanted_as = [](const Tensor& of) {
      return Tensor::contiguous(nullptr, of.dtype, {of.shape[0], of.shape[1], of.shape[2], of.shape[3]}, of.device);
    };
    args.dx = wanted_as(args.x), args.dB = wanted_as(args.B), args.dC = wanted_as(args.C);
    if (args.z) args.dz = wanted_as(args.z);
    return Call::describe(args, d);
  }
  args.dx = call.gradient("dx", args.x);
  args.ddt = call.gradient("ddt", args.dt);
  args.dA = call.gradient("dA", args.A);
  args.dB = call.gradient("dB", args.B);
  args.dC = call.gradient("dC", args.C);
  args.dD = call.gradient("dD", args.D);
  args.dz = call.gradient("dz", args.z);
  args.ddt_bias = call.gradient("ddt_bias", args.dt_bias);
  args.dinitial_state = call.gradient("dinitial_state", args.initial_state);
  return call.run(args, d);
}

}  // namespace

void bind_ssd_scan(nb::module_& m) {
  m.def("ssd_scan", &forward, nb::arg("x").none(), nb::arg("dt").none(), nb::arg("A").none(), nb::arg("B").none(),
        nb::arg("C").none(), nb::arg("D") = nb::none(), nb::arg("z") = nb::none(), nb::arg("dt_bias") = nb::none(),
        nb::arg("dt_softplus") = false, nb::arg("dt_limit") = nb::none(), nb::arg("initial_state") = nb::none(),
        nb::arg("return_final_state") = false, nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false,
        nb::arg("chunk_size") = 0, nb::arg("batch_invariant") = false, nb::arg("state_positions") = nb::none(),
        nb::arg("ssd_mode") = nb::none(), nb::arg("save_states") = false, nb::arg("out") = nb::none(),
        nb::arg("final_state_out") = nb::none(), nb::arg("position_states_out") = nb::none(),
        nb::arg("chunk_states_out") = nb::none(), nb::arg("stream") = nb::none(), nb::arg("plan_only") = false);
  m.def("ssd_scan_backward", &backward, nb::arg("x").none(), nb::arg("dt").none(), nb::arg("A").none(), nb::arg("B").none(),
        nb::arg("C").none(), nb::arg("dy").none(), nb::arg("D") = nb::none(), nb::arg("z") = nb::none(),
        nb::arg("dt_bias") = nb::none(), nb::arg("dt_softplus") = false, nb::arg("dt_limit") = nb::none(),
        nb::arg("initial_state") = nb::none(), nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false,
        nb::arg("chunk_size") = 0, nb::arg("batch_invariant") = false, nb::arg("dfinal_state") = nb::none(),
        nb::arg("chunk_states") = nb::none(), nb::arg("stream") = nb::none(), nb::arg("plan_only") = false,
        nb::arg("wanted") = ~0u);
}

}  // namespace statescan::python
