#include <statescan/mamba2_scan.h>

#include "backend.h"
#include "contract.h"
#include "mamba2_block.h"

namespace statescan::mamba2_scan {

static Dims validate_inputs(const Contract& check, const Inputs& in) {
  check.input("zxbcdt", in.zxbcdt, {{"batch", kAny}, {"seqlen", kAny}, {"d_inner + conv_dim + nheads", kAny}},
              just(check.main_dtype()));
  Dims d{};
  d.batch = in.zxbcdt.shape[0], d.seqlen = in.zxbcdt.shape[1];
  validate_mamba2_block(check, in, d);
  d.num_sequences = check.sequences(in.cu_seqlens, d.batch, d.seqlen);
  const char* rows = in.cu_seqlens ? "num_sequences" : "batch";
  check.optional("initial_conv_state", in.initial_conv_state,
                 {{rows, d.num_sequences}, {"conv_dim", d.conv_dim}, {"width - 1", d.width - 1}}, check.main_or_parameter());
  check.optional("initial_state", in.initial_state,
                 {{rows, d.num_sequences}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}}, check.state());
  if (in.chunk_size < 0)
    fail<ValueError>(check.op(), ": chunk_size=", in.chunk_size, " must be positive, or 0 to let the library pick");
  return d;
}

Dims validate(const Args& args) {
  const Contract check("mamba2_scan", "zxbcdt", args.zxbcdt);
  const Dims d = validate_inputs(check, args);
  check.output("y", args.y, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"d_inner", d.d_inner}}, just(check.main_dtype()));
  check.output("final_conv_state", args.final_conv_state,
               {{"num_sequences", d.num_sequences}, {"conv_dim", d.conv_dim}, {"width - 1", d.width - 1}},
               check.main_or_parameter());
  check.output("final_state", args.final_state,
               {{"num_sequences", d.num_sequences}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}},
               check.state());
  return d;
}

Dims validate(const BackwardArgs& args) {
  const Contract check("mamba2_scan_backward", "zxbcdt", args.zxbcdt);
  Dims d = validate_inputs(check, args);
  const std::initializer_list<Axis> conv_state = {
      {"num_sequences", d.num_sequences}, {"conv_dim", d.conv_dim}, {"width - 1", d.width - 1}};
  const std::initializer_list<Axis> state = {
      {"num_sequences", d.num_sequences}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}};
  check.input("dy", args.dy, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"d_inner", d.d_inner}}, just(check.main_dtype()));
  check.optional("dfinal_conv_state", args.dfinal_conv_state, conv_state, check.main_or_parameter());
  check.optional("dfinal_state", args.dfinal_state, state, check.state());
  check.output("dzxbcdt", args.dzxbcdt,
               {{"batch", d.batch}, {"seqlen", d.seqlen}, {"d_inner + conv_dim + nheads", args.zxbcdt.shape[2]}},
               just(check.main_dtype()));
  check.output("dconv_weight", args.dconv_weight, {{"conv_dim", d.conv_dim}, {"width", d.width}}, check.main_or_parameter());
  check.output("dconv_bias", args.dconv_bias, {{"conv_dim", d.conv_dim}}, check.main_or_parameter());
  check.output("ddt_bias", args.ddt_bias, {{"nheads", d.nheads}}, check.parameter());
  check.output("dA", args.dA, {{"nheads", d.nheads}}, check.parameter());
  if (args.dnorm_weight && !args.norm_weight)
    fail<ValueError>(check.op(), ": dnorm_weight needs norm_weight, which is absent");
  if (!args.D) d.D_per_channel = args.dD.ndim == 2;
  if (d.D_per_channel)
    check.output("dD", args.dD, {{"nheads", d.nheads}, {"headdim", d.headdim}}, check.parameter());
  else check.output("dD", args.dD, {{"nheads", d.nheads}}, check.parameter());
  check.output("dnorm_weight", args.dnorm_weight, {{"d_inner", d.d_inner}}, check.main_or_parameter());
  check.output("dinitial_conv_state", args.dinitial_conv_state, conv_state, check.main_or_parameter());
  check.output("dinitial_state", args.dinitial_state, state, check.state());
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.zxbcdt.device); }
Plan plan(const BackwardArgs& args, const Dims& dims) { return plan_on(args, dims, args.zxbcdt.device); }

void run(const Args& args, Stream stream) {
  const Dims dims = validate(args);
  if (!args.y) fail<ValueError>("mamba2_scan: y, the output, is required");
  run_on("mamba2_scan", args, dims, args.zxbcdt.device, stream);
}

void run(const BackwardArgs& args, Stream stream) {
  const Dims dims = validate(args);
  run_on("mamba2_scan_backward", args, dims, args.zxbcdt.device, stream);
}

}  // namespace statescan::mamba2_scan
