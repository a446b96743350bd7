#include <statescan/mamba2_update.h>

#include "backend.h"
#include "contract.h"
#include "mamba2_block.h"

namespace statescan::mamba2_update {

Dims validate(const Args& args) {
  const Contract check("mamba2_update", "zxbcdt", args.zxbcdt);
  check.rank("zxbcdt", args.zxbcdt, {2, 3},
             "(batch, d_inner + conv_dim + nheads) or (batch, ntokens, d_inner + conv_dim + nheads)");
  Dims d{};
  d.has_token_axis = args.zxbcdt.ndim == 3;
  d.batch = args.zxbcdt.shape[0], d.ntokens = d.has_token_axis ? args.zxbcdt.shape[1] : 1;
  const Axis batch{"batch", d.batch}, tokens{"ntokens", d.ntokens}, width{"d_inner + conv_dim + nheads", kAny};
  const DTypes main = just(check.main_dtype());
  if (d.has_token_axis) check.input("zxbcdt", args.zxbcdt, {batch, tokens, width}, main);
  else check.input("zxbcdt", args.zxbcdt, {batch, width}, main);
  validate_mamba2_block(check, args, d);
  const Axis slots{"slots", args.state_indices ? kAny : d.batch};
  check.required("conv_state", args.conv_state);
  check.output("conv_state", args.conv_state, {slots, {"conv_dim", d.conv_dim}, {"width - 1", d.width - 1}},
               check.main_or_parameter());
  d.slots = args.conv_state.shape[0];
  check.required("state", args.state);
  check.output("state", args.state, {{"slots", d.slots}, {"nheads", d.nheads}, {"headdim", d.headdim}, {"dstate", d.dstate}},
               check.state());
  check.slot_indices("state_indices", args.state_indices, d.batch, d.slots);
  const Axis inner{"d_inner", d.d_inner};
  if (d.has_token_axis) check.output("y", args.y, {batch, tokens, inner}, main);
  else check.output("y", args.y, {batch, inner}, main);
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.zxbcdt.device); }

void run(const Args& args, Stream stream) { run_validated(args, validate(args), stream); }

void run_validated(const Args& args, const Dims& dims, Stream stream) {
  if (!args.y) fail<ValueError>("mamba2_update: y, the output, is required");
  run_on("mamba2_update", args, dims, args.zxbcdt.device, stream);
}

}  // namespace statescan::mamba2_update
