#include <statescan/state_scan.h>

#include "backend.h"
#include "contract.h"

namespace statescan::state_scan {

// What both directions share; `main` is the [b,c,h,p,n] tensor that fixes the sizes.
static Dims validate_inputs(const Contract& check, const Inputs& in, const char* main_name, const Tensor& main) {
  check.input(main_name, main, {{"batch", kAny}, {"nchunks", kAny}, {"nheads", kAny}, {"headdim", kAny}, {"dstate", kAny}},
              just(check.main_dtype()));
  Dims d{main.shape[0], main.shape[1], main.shape[2], main.shape[3], main.shape[4], 0};
  check.input("log_decay", in.log_decay, {{"batch", d.batch}, {"nchunks", d.nchunks}, {"nheads", d.nheads}},
              check.parameter());
  d.num_sequences = check.sequences(in.cu_seqlens, d.batch, d.nchunks);
  check.optional("initial_state", in.initial_state,
                 {{in.cu_seqlens ? "num_sequences" : "batch", d.num_sequences}, {"nheads", d.nheads},
                  {"headdim", d.headdim}, {"dstate", d.dstate}},
                 check.state());
  return d;
}

Dims validate(const Args& args) {
  const Contract check("state_scan", "update", args.update);
  const Dims d = validate_inputs(check, args, "update", args.update);
  check.output("states", args.states,
               {{"batch", d.batch}, {"nchunks", d.nchunks}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}},
               just(check.main_dtype()));
  check.output("final_state", args.final_state,
               {{"num_sequences", d.num_sequences}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}},
               check.state());
  return d;
}

Dims validate(const BackwardArgs& args) {
  const Contract check("state_scan_backward", "states", args.states);
  const Dims d = validate_inputs(check, args, "states", args.states);
  const std::initializer_list<Axis> chunked = {
      {"batch", d.batch}, {"nchunks", d.nchunks}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}};
  const std::initializer_list<Axis> state = {
      {"num_sequences", d.num_sequences}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}};
  check.input("dstates", args.dstates, chunked, just(check.main_dtype()));
  check.optional("dfinal_state", args.dfinal_state, state, check.state());
  check.output("dlog_decay", args.dlog_decay, {{"batch", d.batch}, {"nchunks", d.nchunks}, {"nheads", d.nheads}},
               check.parameter());
  check.output("dupdate", args.dupdate, chunked, just(check.main_dtype()));
  check.output("dinitial_state", args.dinitial_state, state, check.state());
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.update.device); }
Plan plan(const BackwardArgs& args, const Dims& dims) { return plan_on(args, dims, args.states.device); }

void run(const Args& args, Stream stream) {
  const Dims dims = validate(args);
  if (!args.states) fail<ValueError>("state_scan: states, the output, is required");
  run_on("state_scan", args, dims, args.update.device, stream);
}

void run(const BackwardArgs& args, Stream stream) {
  const Dims dims = validate(args);
  run_on("state_scan_backward", args, dims, args.states.device, stream);
}

}  // namespace statescan::state_scan
