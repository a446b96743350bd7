#include <statescan/ssd_scan.h>

#include "backend.h"
#include "contract.h"

namespace statescan::ssd_scan {

// [h] or [h,p].
static void validate_D(const Contract& check, const char* name, const Tensor& D, const Dims& d, bool written) {
  if (!D) return;
  const std::initializer_list<Axis> per_head = {{"nheads", d.nheads}};
  const std::initializer_list<Axis> per_channel = {{"nheads", d.nheads}, {"headdim", d.headdim}};
  const auto& axes = D.ndim == 1 ? per_head : per_channel;
  written ? check.output(name, D, axes, check.parameter()) : check.input(name, D, axes, check.parameter());
}

static void validate_chunk_states(const Contract& check, const Tensor& states, const Dims& d, bool written) {
  if (!states) return;
  const std::initializer_list<Axis> axes = {
      {"batch", d.batch}, {"nstretches", d.nstretches}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}};
  written ? check.output("chunk_states", states, axes, check.main_or_parameter())
          : check.input("chunk_states", states, axes, check.main_or_parameter());
}

static Dims validate_inputs(const Contract& check, const Inputs& in) {
  check.input("x", in.x, {{"batch", kAny}, {"seqlen", kAny}, {"nheads", kAny}, {"headdim", kAny}}, just(check.main_dtype()));
  Dims d{};
  d.batch = in.x.shape[0], d.seqlen = in.x.shape[1], d.nheads = in.x.shape[2], d.headdim = in.x.shape[3];
  check.input("dt", in.dt, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"nheads", d.nheads}}, check.step());
  check.input("A", in.A, {{"nheads", d.nheads}}, check.parameter());
  check.input("B", in.B, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"ngroups", kAny}, {"dstate", kAny}},
              just(check.main_dtype()));
  d.ngroups = in.B.shape[2], d.dstate = in.B.shape[3];
  check.divides("ngroups", d.ngroups, "B", in.B, "nheads", d.nheads);
  check.input("C", in.C, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"ngroups", d.ngroups}, {"dstate", d.dstate}},
              just(check.main_dtype()));
  validate_D(check, "D", in.D, d, false);
  d.D_per_channel = in.D && in.D.ndim == 2;
  check.optional("z", in.z, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"nheads", d.nheads}, {"headdim", d.headdim}},
                 just(check.main_dtype()));
  check.optional("dt_bias", in.dt_bias, {{"nheads", d.nheads}}, check.parameter());
  check.limits(in.dt_min, in.dt_max);
  d.num_sequences = check.sequences(in.cu_seqlens, d.batch, d.seqlen);
  const std::int64_t stretch = stretch_of(in.x.device.type);
  d.nstretches = in.cu_seqlens ? d.seqlen / stretch + d.num_sequences : (d.seqlen + stretch - 1) / stretch;
  check.optional("initial_state", in.initial_state,
                 {{in.cu_seqlens ? "num_sequences" : "batch", d.num_sequences}, {"nheads", d.nheads},
                  {"headdim", d.headdim}, {"dstate", d.dstate}},
                 check.state());
  if (in.chunk_size < 0)
    fail<ValueError>(check.op(), ": chunk_size=", in.chunk_size, " must be positive, or 0 to let the library pick");
  return d;
}

Dims validate(const Args& args) {
  const Contract check("ssd_scan", "x", args.x);
  Dims d = validate_inputs(check, args);
  check.output("y", args.y, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"nheads", d.nheads}, {"headdim", d.headdim}},
               just(check.main_dtype()));
  check.output("final_state", args.final_state,
               {{"num_sequences", d.num_sequences}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}},
               check.state());
  d.npositions = check.positions(args.state_positions, args.position_states, args.cu_seqlens, d.num_sequences, d.seqlen);
  check.output("position_states", args.position_states,
               {{"num_sequences", d.num_sequences}, {"npositions", d.npositions}, {"nheads", d.nheads},
                {"headdim", d.headdim}, {"dstate", d.dstate}},
               check.state());
  validate_chunk_states(check, args.chunk_states, d, true);
  return d;
}

Dims validate(const BackwardArgs& args) {
  const Contract check("ssd_scan_backward", "x", args.x);
  Dims d = validate_inputs(check, args);
  const std::initializer_list<Axis> like_x = {
      {"batch", d.batch}, {"seqlen", d.seqlen}, {"nheads", d.nheads}, {"headdim", d.headdim}};
  const std::initializer_list<Axis> like_B = {
      {"batch", d.batch}, {"seqlen", d.seqlen}, {"ngroups", d.ngroups}, {"dstate", d.dstate}};
  const std::initializer_list<Axis> like_state = {
      {"num_sequences", d.num_sequences}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}};
  const DTypes main = just(check.main_dtype());
  if (args.dz && !args.z) fail<ValueError>(check.op(), ": dz needs z, which is absent");
  check.input("dy", args.dy, like_x, main);
  check.optional("dfinal_state", args.dfinal_state, like_state, check.state());
  validate_chunk_states(check, args.chunk_states, d, false);
  check.output("dx", args.dx, like_x, main);
  check.output("ddt", args.ddt, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"nheads", d.nheads}}, check.step());
  check.output("dA", args.dA, {{"nheads", d.nheads}}, check.parameter());
  check.output("dB", args.dB, like_B, main);
  check.output("dC", args.dC, like_B, main);
  if (!args.D) d.D_per_channel = args.dD.ndim == 2;
  if (args.D && args.dD && args.dD.ndim != args.D.ndim)
    fail<ValueError>(check.op(), ": dD has shape ", shape_of(args.dD), "; expected ", shape_of(args.D), ", the shape of D");
  validate_D(check, "dD", args.dD, d, true);
  check.output("dz", args.dz, like_x, main);
  check.output("ddt_bias", args.ddt_bias, {{"nheads", d.nheads}}, check.parameter());
  check.output("dinitial_state", args.dinitial_state, like_state, check.state());
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }
Plan plan(const BackwardArgs& args, const Dims& dims) {
  Plan plan = plan_on(args, dims, args.x.device);
  if (args.x.device.type == DeviceType::cpu) plan.reads_kept_states = true;
  return plan;
}

void run(const Args& args, Stream stream) {
  const Dims dims = validate(args);
  if (!args.y) fail<ValueError>("ssd_scan: y, the output, is required");
  if (args.state_positions && !args.position_states)
    fail<ValueError>("ssd_scan: position_states, the output, is required with state_positions");
  run_on("ssd_scan", args, dims, args.x.device, stream);
}

void run(const BackwardArgs& args, Stream stream) {
  const Dims dims = validate(args);
  run_on("ssd_scan_backward", args, dims, args.x.device, stream);
}

}  // namespace statescan::ssd_scan
