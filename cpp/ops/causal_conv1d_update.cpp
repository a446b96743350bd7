#include <statescan/causal_conv1d_update.h>

#include "backend.h"
#include "contract.h"

namespace statescan::causal_conv1d_update {

Dims validate(const Args& args) {
  const Contract check("causal_conv1d_update", "x", args.x);
  check.rank("x", args.x, {2, 3}, "(batch, dim) or (batch, ntokens, dim)");
  const bool has_token_axis = args.x.ndim == 3;
  Dims d{};
  d.batch = args.x.shape[0], d.ntokens = has_token_axis ? args.x.shape[1] : 1, d.dim = args.x.shape[args.x.ndim - 1];
  const DTypes main = just(check.main_dtype());
  if (has_token_axis) check.input("x", args.x, {{"batch", d.batch}, {"ntokens", d.ntokens}, {"dim", d.dim}}, main);
  else check.input("x", args.x, {{"batch", d.batch}, {"dim", d.dim}}, main);
  check.input("weight", args.weight, {{"dim", d.dim}, {"width", kAny}}, check.main_or_parameter());
  d.width = args.weight.shape[1];
  if (d.width < causal_conv1d::kMinWidth || d.width > causal_conv1d::kMaxWidth)
    fail<ValueError>(check.op(), ": width=", d.width, " (from weight, shape ", shape_of(args.weight), ") must be between ",
                     causal_conv1d::kMinWidth, " and ", causal_conv1d::kMaxWidth);
  check.required("state", args.state);
  check.output("state", args.state,
               {{"slots", args.state_indices ? kAny : d.batch}, {"dim", d.dim}, {"width - 1", d.width - 1}},
               check.main_or_parameter());
  d.slots = args.state.shape[0];
  check.optional("bias", args.bias, {{"dim", d.dim}}, just(args.weight.dtype));
  check.slot_indices("state_indices", args.state_indices, d.batch, d.slots);
  if (has_token_axis) check.output("y", args.y, {{"batch", d.batch}, {"ntokens", d.ntokens}, {"dim", d.dim}}, main);
  else check.output("y", args.y, {{"batch", d.batch}, {"dim", d.dim}}, main);
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }

void run(const Args& args, Stream stream) { run_validated(args, validate(args), stream); }

void run_validated(const Args& args, const Dims& dims, Stream stream) {
  if (!args.y) fail<ValueError>("causal_conv1d_update: y, the output, is required");
  run_on("causal_conv1d_update", args, dims, args.x.device, stream);
}

}  // namespace statescan::causal_conv1d_update
