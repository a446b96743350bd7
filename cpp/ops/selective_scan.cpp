#include <statescan/selective_scan.h>

#include "backend.h"
#include "contract.h"

namespace statescan::selective_scan {

// B or C: [b,l,g,n], or [d,n] when time-invariant. Finds ngroups where it varies; returns whether it does.
static bool validate_projection(const Contract& check, const char* name, const Tensor& t, Dims& d, bool groups_known) {
  check.rank(name, t, {2, 4}, "(batch, seqlen, ngroups, dstate), or (dim, dstate) when time-invariant");
  if (t.ndim == 2) {
    check.input(name, t, {{"dim", d.dim}, {"dstate", d.dstate}},
                d.complex_A ? check.complex_parameter() : check.parameter());
    return false;
  }
  check.input(name, t,
              {{"batch", d.batch}, {"seqlen", d.seqlen}, {"ngroups", groups_known ? d.ngroups : kAny}, {"dstate", d.dstate}},
              d.complex_A ? check.complex_parameter() : just(check.main_dtype()));
  d.ngroups = t.shape[2];
  check.divides("ngroups", d.ngroups, name, t, "dim", d.dim);
  return true;
}

static Dims validate_inputs(const Contract& check, const Inputs& in) {
  check.input("x", in.x, {{"batch", kAny}, {"seqlen", kAny}, {"dim", kAny}}, just(check.main_dtype()));
  Dims d{};
  d.batch = in.x.shape[0], d.seqlen = in.x.shape[1], d.dim = in.x.shape[2], d.ngroups = 1;
  check.input("dt", in.dt, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"dim", d.dim}}, check.step());
  check.input("A", in.A, {{"dim", d.dim}, {"dstate", kAny}}, check.parameter() | check.complex_parameter());
  d.dstate = in.A.shape[1], d.complex_A = is_complex(in.A.dtype);
  d.varying_B = validate_projection(check, "B", in.B, d, false);
  d.varying_C = validate_projection(check, "C", in.C, d, d.varying_B);
  check.optional("D", in.D, {{"dim", d.dim}}, check.parameter());
  check.optional("z", in.z, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"dim", d.dim}}, just(check.main_dtype()));
  check.optional("dt_bias", in.dt_bias, {{"dim", d.dim}}, check.parameter());
  check.limits(in.dt_min, in.dt_max);
  d.num_sequences = check.sequences(in.cu_seqlens, d.batch, d.seqlen);
  check.optional("initial_state", in.initial_state,
                 {{in.cu_seqlens ? "num_sequences" : "batch", d.num_sequences}, {"dim", d.dim}, {"dstate", d.dstate}},
                 d.complex_A ? check.complex_parameter() : check.state());
  return d;
}

Dims validate(const Args& args) {
  const Contract check("selective_scan", "x", args.x);
  Dims d = validate_inputs(check, args);
  check.output("y", args.y, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"dim", d.dim}}, just(check.main_dtype()));
  check.output("final_state", args.final_state,
               {{"num_sequences", d.num_sequences}, {"dim", d.dim}, {"dstate", d.dstate}},
               d.complex_A ? check.complex_parameter() : check.state());
  d.npositions = check.positions(args.state_positions, args.position_states, args.cu_seqlens, d.num_sequences, d.seqlen);
  check.output("position_states", args.position_states,
               {{"num_sequences", d.num_sequences}, {"npositions", d.npositions}, {"dim", d.dim}, {"dstate", d.dstate}},
               d.complex_A ? check.complex_parameter() : check.state());
  return d;
}

static void validate_projection_gradient(const Contract& check, const char* name, const Tensor& t, const Tensor& of) {
  if (!t) return;
  if (of.ndim == 2) check.output(name, t, {{"dim", of.shape[0]}, {"dstate", of.shape[1]}}, just(of.dtype));
  else
    check.output(name, t, {{"batch", of.shape[0]}, {"seqlen", of.shape[1]}, {"ngroups", of.shape[2]}, {"dstate", of.shape[3]}},
                 just(of.dtype));
}

Dims validate(const BackwardArgs& args) {
  const Contract check("selective_scan_backward", "x", args.x);
  const Dims d = validate_inputs(check, args);
  const std::initializer_list<Axis> like_x = {{"batch", d.batch}, {"seqlen", d.seqlen}, {"dim", d.dim}};
  const std::initializer_list<Axis> like_state = {{"num_sequences", d.num_sequences}, {"dim", d.dim}, {"dstate", d.dstate}};
  const DTypes main = just(check.main_dtype());
  const DTypes state = d.complex_A ? check.complex_parameter() : check.state();
  check.input("dy", args.dy, like_x, main);
  check.optional("dfinal_state", args.dfinal_state, like_state, state);
  check.output("dx", args.dx, like_x, main);
  check.output("ddt", args.ddt, like_x, check.step());
  check.output("dA", args.dA, {{"dim", d.dim}, {"dstate", d.dstate}}, just(args.A.dtype));
  validate_projection_gradient(check, "dB", args.dB, args.B);
  validate_projection_gradient(check, "dC", args.dC, args.C);
  check.output("dD", args.dD, {{"dim", d.dim}}, check.parameter());
  check.output("dz", args.dz, like_x, main);
  check.output("ddt_bias", args.ddt_bias, {{"dim", d.dim}}, check.parameter());
  check.output("dinitial_state", args.dinitial_state, like_state, state);
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }
Plan plan(const BackwardArgs& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }

void run(const Args& args, Stream stream) {
  const Dims dims = validate(args);
  if (!args.y) fail<ValueError>("selective_scan: y, the output, is required");
  if (args.state_positions && !args.position_states)
    fail<ValueError>("selective_scan: position_states, the output, is required with state_positions");
  run_on("selective_scan", args, dims, args.x.device, stream);
}

void run(const BackwardArgs& args, Stream stream) {
  const Dims dims = validate(args);
  run_on("selective_scan_backward", args, dims, args.x.device, stream);
}

}  // namespace statescan::selective_scan
