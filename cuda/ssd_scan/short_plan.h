// How the kernel for short sequences cuts a call into packets.
#pragma once

#include <algorithm>

#include "fused_params.h"
#include "plan.h"
#include "short_params.h"

namespace statescan::ssd_scan {

struct ShortPlan {
  std::int64_t slices, slices_of_group;  // see ShortParams
  std::int64_t packets_of_group, packets;
};

// Enough packets that blocks end together, and no more: each loads B and C, and multiplies them.
constexpr ShortPlan short_plan(const Dims& d) {
  constexpr std::int64_t kPacketsOfBlock = 4;
  ShortPlan plan{};
  plan.slices = divide_up(d.headdim, kFusedTile);
  plan.slices_of_group = plan.slices * (d.nheads / d.ngroups);
  const std::int64_t groups = d.batch * d.ngroups;
  plan.packets_of_group = std::min(plan.slices_of_group, divide_up(kPacketsOfBlock * kMultiprocessors, groups));
  plan.packets = plan.packets_of_group * groups;
  return plan;
}

}  // namespace statescan::ssd_scan
