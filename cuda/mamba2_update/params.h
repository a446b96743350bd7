// A call as the one-launch kernel takes it: plain numbers, worked out on the host.
#pragma once

#include "policy.h"

namespace statescan::mamba2_update {

// A tensor; strides in bytes. data is null where it is absent.
struct View {
  char* data;
  DType dtype;
  std::int64_t row, column, inner;  // row: of the batch, or a slot
};

struct Params {
  std::uint32_t blocks_of_row, units, units_of_block;  // a unit is kUnit channels of a row; a row has d_inner / kUnit
  std::uint32_t headdim, heads_of_group, ngroups, units_of_norm;
  std::int64_t slots;
  int width;
  bool has_norm, norm_before_gate, dt_softplus;
  float dt_min, dt_max, eps, mean_scale;
  const void* indices;  // null: row i has slot i
  bool indices_are_int64;
  std::int64_t index_stride;
  View z, xBC, dt, y;               // columns
  View conv_state;                  // [slot, channel, tap]
  View conv_weight, conv_bias;      // [channel, tap] as (column, inner)
  View state;                       // [slot, head, channel of the head], dstate side by side
  View A, D, dt_bias, norm_weight;  // columns; D: (head, channel of the head) as (column, inner)
  float* squares;                   // [b, units]: what each unit adds to the norm
};

}  // namespace statescan::mamba2_update
