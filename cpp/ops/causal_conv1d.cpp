#include <statescan/causal_conv1d.h>

#include "backend.h"
#include "contract.h"

namespace statescan::causal_conv1d {

static Dims validate_inputs(const Contract& check, const Inputs& in) {
  check.input("x", in.x, {{"batch", kAny}, {"seqlen", kAny}, {"dim", kAny}}, just(check.main_dtype()));
  Dims d{in.x.shape[0], in.x.shape[1], in.x.shape[2], 0, 0};
  check.input("weight", in.weight, {{"dim", d.dim}, {"width", kAny}}, check.main_or_parameter());
  d.width = in.weight.shape[1];
  if (d.width < kMinWidth || d.width > kMaxWidth)
    fail<ValueError>(check.op(), ": width=", d.width, " (from weight, shape ", shape_of(in.weight), ") must be between ",
                     kMinWidth, " and ", kMaxWidth);
  check.optional("bias", in.bias, {{"dim", d.dim}}, just(in.weight.dtype));
  d.num_sequences = check.sequences(in.cu_seqlens, d.batch, d.seqlen);
  check.optional("initial_state", in.initial_state,
                 {{in.cu_seqlens ? "num_sequences" : "batch", d.num_sequences}, {"dim", d.dim}, {"width - 1", d.width - 1}},
                 check.main_or_parameter());
  return d;
}

Dims validate(const Args& args) {
  const Contract check("causal_conv1d", "x", args.x);
  const Dims d = validate_inputs(check, args);
  check.output("y", args.y, {{"batch", d.batch}, {"seqlen", d.seqlen}, {"dim", d.dim}}, just(check.main_dtype()));
  check.output("final_state", args.final_state,
               {{"num_sequences", d.num_sequences}, {"dim", d.dim}, {"width - 1", d.width - 1}}, check.main_or_parameter());
  return d;
}

Dims validate(const BackwardArgs& args) {
  const Contract check("causal_conv1d_backward", "x", args.x);
  const Dims d = validate_inputs(check, args);
  const std::initializer_list<Axis> like_x = {{"batch", d.batch}, {"seqlen", d.seqlen}, {"dim", d.dim}};
  const std::initializer_list<Axis> like_state = {
      {"num_sequences", d.num_sequences}, {"dim", d.dim}, {"width - 1", d.width - 1}};
  check.input("dy", args.dy, like_x, just(check.main_dtype()));
  check.optional("dfinal_state", args.dfinal_state, like_state, check.main_or_parameter());
  check.output("dx", args.dx, like_x, just(check.main_dtype()));
  check.output("dweight", args.dweight, {{"dim", d.dim}, {"width", d.width}}, check.main_or_parameter());
  check.output("dbias", args.dbias, {{"dim", d.dim}}, check.main_or_parameter());
  check.output("dinitial_state", args.dinitial_state, like_state, check.main_or_parameter());
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }
Plan plan(const BackwardArgs& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }

void run(const Args& args, Stream stream) {
  const Dims dims = validate(args);
  if (!args.y) fail<ValueError>("causal_conv1d: y, the output, is required");
  run_on("causal_conv1d", args, dims, args.x.device, stream);
}

void run(const BackwardArgs& args, Stream stream) {
  const Dims dims = validate(args);
  run_on("causal_conv1d_backward", args, dims, args.x.device, stream);
}

}  // namespace statescan::causal_conv1d
