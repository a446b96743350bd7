#include <statescan/selective_state_update.h>

#include "backend.h"
#include "contract.h"

namespace statescan::selective_state_update {

// A tensor with the batch axis, the token axis when x has one, and the two last axes given (or one: last.name == nullptr).
static void per_token(const Contract& check, const char* name, const Tensor& t, const Dims& d, Axis first, Axis last,
                      DTypes dtypes, bool written) {
  if (!t) return;
  auto judge = [&](std::initializer_list<Axis> axes) {
    written ? check.output(name, t, axes, dtypes) : check.input(name, t, axes, dtypes);
  };
  const Axis batch{"batch", d.batch}, tokens{"ntokens", d.ntokens};
  if (d.has_token_axis) last.name ? judge({batch, tokens, first, last}) : judge({batch, tokens, first});
  else last.name ? judge({batch, first, last}) : judge({batch, first});
}

// B or C: per token, or [d,n] for a time-invariant Mamba-1. Returns whether it varies.
static bool validate_projection(const Contract& check, const char* name, const Tensor& t, const Args& args, Dims& d,
                                bool groups_known) {
  check.required(name, t);
  if (d.mamba1 && t.ndim == 2) {
    check.input(name, t, {{"dim", d.nheads}, {"dstate", d.dstate}},
                d.complex_A ? check.complex_parameter() : check.parameter());
    return false;
  }
  per_token(check, name, t, d, {"ngroups", groups_known ? d.ngroups : kAny}, {"dstate", d.dstate},
            d.complex_A ? check.complex_parameter() : just(args.x.dtype), false);
  d.ngroups = t.shape[t.ndim - 2];
  check.divides("ngroups", d.ngroups, name, t, d.mamba1 ? "dim" : "nheads", d.nheads);
  return true;
}

Dims validate(const Args& args) {
  const Contract check("selective_state_update", "x", args.x);
  check.rank("state", args.state, {3, 4}, "(slots, dim, dstate) for Mamba-1 or (slots, nheads, headdim, dstate) for Mamba-2");
  Dims d{};
  d.mamba1 = args.state.ndim == 3;
  const int x_rank = d.mamba1 ? 2 : 3;
  check.rank("x", args.x, {x_rank, x_rank + 1},
             d.mamba1 ? "(batch, dim) or (batch, ntokens, dim), to go with a state of three axes"
                      : "(batch, nheads, headdim) or (batch, ntokens, nheads, headdim), to go with a state of four axes");
  d.has_token_axis = args.x.ndim == x_rank + 1;
  d.batch = args.x.shape[0], d.ntokens = d.has_token_axis ? args.x.shape[1] : 1, d.ngroups = 1;
  d.nheads = args.state.shape[1], d.headdim = d.mamba1 ? 1 : args.state.shape[2];
  d.dstate = args.state.shape[args.state.ndim - 1];
  check.required("A", args.A);
  d.complex_A = d.mamba1 && is_complex(args.A.dtype);
  const Axis heads{d.mamba1 ? "dim" : "nheads", d.nheads}, none{nullptr, 0};
  const Axis channels = d.mamba1 ? none : Axis{"headdim", d.headdim};
  const DTypes main = just(check.main_dtype()), state = d.complex_A ? check.complex_parameter() : check.state();
  const Axis slots{"slots", args.state_indices ? kAny : d.batch}, states{"dstate", d.dstate};
  if (d.mamba1) check.output("state", args.state, {slots, heads, states}, state);
  else check.output("state", args.state, {slots, heads, channels, states}, state);
  d.slots = args.state.shape[0];
  per_token(check, "x", args.x, d, heads, channels, main, false);
  check.required("dt", args.dt);
  per_token(check, "dt", args.dt, d, heads, none, check.step(), false);
  if (d.mamba1) check.input("A", args.A, {heads, states}, check.parameter() | check.complex_parameter());
  else check.input("A", args.A, {heads}, check.parameter());
  d.varying_B = validate_projection(check, "B", args.B, args, d, false);
  d.varying_C = validate_projection(check, "C", args.C, args, d, d.varying_B);
  d.D_per_channel = !d.mamba1 && args.D && args.D.ndim == 2;
  if (d.D_per_channel) check.input("D", args.D, {heads, channels}, check.parameter());
  else check.optional("D", args.D, {heads}, check.parameter());
  per_token(check, "z", args.z, d, heads, channels, main, false);
  check.optional("dt_bias", args.dt_bias, {heads}, check.parameter());
  check.limits(args.dt_min, args.dt_max);
  check.slot_indices("state_indices", args.state_indices, d.batch, d.slots);
  check.slot_indices("out_state_indices", args.out_state_indices, d.batch, d.slots);
  per_token(check, "y", args.y, d, heads, channels, main, true);
  return d;
}

Plan plan(const Args& args, const Dims& dims) { return plan_on(args, dims, args.x.device); }

void run(const Args& args, Stream stream) { run_validated(args, validate(args), stream); }

void run_validated(const Args& args, const Dims& dims, Stream stream) {
  if (!args.y) fail<ValueError>("selective_state_update: y, the output, is required");
  run_on("selective_state_update", args, dims, args.x.device, stream);
}

}  // namespace statescan::selective_state_update
