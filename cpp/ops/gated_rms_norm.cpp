#include <statescan/gated_rms_norm.h>

#include "backend.h"
#include "contract.h"

namespace statescan::gated_rms_norm {

// A tensor of the shape of x, whatever its rank.
static void same_shape(const Contract& check, const char* name, const Tensor& t, const Tensor& x, bool written) {
  if (!t) return;
  const DTypes main = just(check.main_dtype());
  auto axis = [&](int i) { return Axis{i + 1 == x.ndim ? "dim" : "leading", x.shape[i]}; };
  auto judge = [&](std::initializer_list<Axis> axes) {
    written ? check.output(name, t, axes, main) : check.input(name, t, axes, main);
  };
  switch (x.ndim) {
    case 1: return judge({axis(0)});
    case 2: return judge({axis(0), axis(1)});
    case 3: return judge({axis(0), axis(1), axis(2)});
    case 4: return judge({axis(0), axis(1), axis(2), axis(3)});
    case 5: return judge({axis(0), axis(1), axis(2), axis(3), axis(4)});
    default: return judge({axis(0), axis(1), axis(2), axis(3), axis(4), axis(5)});
  }
}

static Dims validate_inputs(const Contract& check, const Inputs& in) {
  if (in.x.ndim < 1) fail<ValueError>(check.op(), ": x has shape (); expected (..., dim)");
  same_shape(check, "x", in.x, in.x, false);
  Dims d{1, in.x.shape[in.x.ndim - 1], in.group_size};
  for (int i = 0; i + 1 < in.x.ndim; ++i) d.rows *= in.x.shape[i];
  if (in.group_size == 0) d.group_size = d.dim;
  if (d.group_size < 0 || (d.dim > 0 && d.dim % d.group_size != 0))
    fail<ValueError>(check.op(), ": group_size=", in.group_size, " must divide dim=", d.dim);
  same_shape(check, "z", in.z, in.x, false);
  check.optional("weight", in.weight, {{"dim", d.dim}}, check.main_or_parameter());
  if (!(in.eps >= 0)) fail<ValueError>(check.op(), ": eps=", in.eps, " must not be negative");
  return d;
}

Dims validate(const Args& args) {
  const Contract check("gated_rms_norm", "x", args.x);
  const Dims d = validate_inputs(check, args);
  same_shape(check, "y", args.y, args.x, true);
  return d;
}

Dims validate(const BackwardArgs& args) {
  const Contract check("gated_rms_norm_backward", "x", args.x);
  const Dims d = validate_inputs(check, args);
  check.required("dy", args.dy);
  same_shape(check, "dy", args.dy, args.x, false);
  same_shape(check, "dx", args.dx, args.x, true);
  same_shape(check, "dz", args.dz, args.x, true);
  check.output("dweight", args.dweight, {{"dim", d.dim}}, check.main_or_parameter());
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }
Plan plan(const BackwardArgs& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }

void run(const Args& args, Stream stream) {
  const Dims dims = validate(args);
  if (!args.y) fail<ValueError>("gated_rms_norm: y, the output, is required");
  run_on("gated_rms_norm", args, dims, args.x.device, stream);
}

void run(const BackwardArgs& args, Stream stream) {
  const Dims dims = validate(args);
  run_on("gated_rms_norm_backward", args, dims, args.x.device, stream);
}

}  // namespace statescan::gated_rms_norm
