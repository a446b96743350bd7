// The sizes of a Mamba-2 block, shared by mamba2_scan and mamba2_update.
#pragma once

#include "contract.h"

namespace statescan {

// Fills nheads, conv_dim, d_inner, headdim, dstate, width, ngroups, norm_group_size and D_per_channel from the parameters
// and the width of zxbcdt, and checks the parameters. Works on the Inputs of either op.
template <class Inputs, class Dims>
void validate_mamba2_block(const Contract& check, const Inputs& in, Dims& d) {
  const std::int64_t total = in.zxbcdt.shape[in.zxbcdt.ndim - 1];
  check.input("A", in.A, {{"nheads", kAny}}, check.parameter());
  d.nheads = in.A.shape[0];
  check.input("conv_weight", in.conv_weight, {{"conv_dim", kAny}, {"width", kAny}}, check.main_or_parameter());
  d.conv_dim = in.conv_weight.shape[0], d.width = in.conv_weight.shape[1];
  if (d.width < 2 || d.width > 8)
    fail<ValueError>(check.op(), ": width=", d.width, " (from conv_weight, shape ", shape_of(in.conv_weight),
                     ") must be between 2 and 8");
  d.d_inner = total - d.conv_dim - d.nheads;
  if (d.d_inner <= 0 || d.nheads == 0 || d.d_inner % d.nheads != 0)
    fail<ValueError>(check.op(), ": the last axis of zxbcdt, ", total, ", must be d_inner + conv_dim + nheads with d_inner a ",
                     "positive multiple of nheads; conv_dim=", d.conv_dim, " and nheads=", d.nheads,
                     " leave d_inner=", d.d_inner);
  d.headdim = d.d_inner / d.nheads;
  d.ngroups = in.ngroups;
  check.divides("ngroups", d.ngroups, "A", in.A, "nheads", d.nheads);
  const std::int64_t both = d.conv_dim - d.d_inner;
  if (both < 0 || both % (2 * d.ngroups) != 0)
    fail<ValueError>(check.op(), ": conv_dim=", d.conv_dim, " (from conv_weight) must be d_inner + 2 ngroups dstate; d_inner=",
                     d.d_inner, " and ngroups=", d.ngroups, " leave ", both, " for 2 ngroups dstate");
  d.dstate = both / (2 * d.ngroups);
  d.norm_group_size = in.norm_group_size == 0 ? d.d_inner / d.ngroups : in.norm_group_size;
  if (d.norm_group_size < 0 || d.d_inner % d.norm_group_size != 0)
    fail<ValueError>(check.op(), ": norm_group_size=", in.norm_group_size, " must divide d_inner=", d.d_inner);
  check.optional("conv_bias", in.conv_bias, {{"conv_dim", d.conv_dim}}, just(in.conv_weight.dtype));
  check.optional("dt_bias", in.dt_bias, {{"nheads", d.nheads}}, check.parameter());
  d.D_per_channel = in.D && in.D.ndim == 2;
  if (d.D_per_channel) check.input("D", in.D, {{"nheads", d.nheads}, {"headdim", d.headdim}}, check.parameter());
  else check.optional("D", in.D, {{"nheads", d.nheads}}, check.parameter());
  check.optional("norm_weight", in.norm_weight, {{"d_inner", d.d_inner}}, check.main_or_parameter());
  check.limits(in.dt_min, in.dt_max);
  if (!(in.eps >= 0)) fail<ValueError>(check.op(), ": eps=", in.eps, " must not be negative");
}

}  // namespace statescan
