// A backward call as the fused kernels take it.
#pragma once

#include <vector_types.h>

#include "fused_bwd_plan.h"

namespace statescan::ssd_scan {

// What a chunk does to a state that passes it, or to an adjoint.
struct alignas(16) WalkSteps {
  float weight[kFusedTile];  // of the chunk's tokens in what it leaves
  float total, unused[3];    // decay through the chunk
};
static_assert(sizeof(WalkSteps) == kFusedTile * sizeof(float) + 16, "or the plan counts something else");

// Of the tensors that move in boxes of tokens.
struct TokenMaps {
  CUtensorMap x, dy, z, B, C, dB, dC;
  CUtensorMap x_eights, dy_eights, z_eights, dx_eights, B_eights, C_eights;  // in boxes of eight tokens
};

// A chunk of a packed sequence that begins with token `first`.
struct alignas(16) PackedChunk {
  int sequence, first, length, chunk;
};
static_assert(sizeof(TokenMaps) == kTokenMapsBytes && sizeof(PackedChunk) == kPackedChunkBytes);

// [b,l,h,p] or [b,l,g,n] of 16-bit elements, contiguous along the last axis; strides in bytes.
struct GradientView {
  char* data;
  std::int64_t batch, token, head;  // head: or group
};

struct FusedBackwardParams {
  TokenMaps maps;
  Sequences sequences;
  // Of packed sequences, or null: their chunks one after the other, how many these are, the sequences from the longest to the
  // shortest, and maps that end where each of them does.
  PackedChunk* packed_chunks;
  unsigned *packed_count, *packed_order;
  TokenMaps* ends;
  CUtensorMap states, adjoints;  // [pairs, items, 64, padded dstate] of the part: what enters, what leaves a pair of chunks
  bool from_forward;    // `states` is a map of chunk_states then, [pairs, headdim, nheads, dstate] of the call: elements, those
                        // of the part from first_pair on; past the end where all are zeros. All walks go backward
  bool adjoints_in_dx;  // `adjoints` is a map of dx then: tile k of a pair lies where dx of its k-th chunk in memory will
  std::uint8_t *state_exponents, *adjoint_exponents;  // [pairs, items, padded dstate / 64, 64]: of their rows
  WalkSteps *first_steps, *second_steps;  // [pairs, items] of the part: of the chunks that the main kernel passes again
  StepView dt;
  HeadView A, dt_bias, D;
  StateView initial_state, dfinal_state, dinitial_state;
  char* ddt;  // null: not wanted
  DType ddt_dtype;
  std::int64_t ddt_batch, ddt_token, ddt_head;  // strides in bytes
  GradientView dx_before;  // what dx is added to: dx of other states, where it will lie itself; null: nothing
  bool of_side;            // a call for some of the states
  bool dt_softplus, has_dx, has_dB, has_dC, D_per_channel;
  float dt_min, dt_max;
  int nheads, headdim, ngroups, dstate;
  int first_pair;     // see from_forward
  int chunks, pairs;  // of a row of the batch, where it is not packed; the last pair may lack its second chunk
  int slices, heads_per_group;
  FusedPart part;
  int kept_items;  // of all groups of the part
  int splits;
  unsigned walks;                                  // of one direction: groups of items x sequences
  int items_of_walk, walks_per_group;              // items: 1 or 2
  unsigned slots;                                  // of the part: chunks of its sequences, as many as there can be
  unsigned tasks;                                  // of the main kernel: slots x groups of the part x splits
  float4 *dB_sums, *dC_sums;                       // of splits and pieces (kept_sums)
  bool keeps_sums;                                 // this part leaves them, else it writes dB and dC
  float *dA_shares, *ddt_bias_shares, *dD_shares;  // [slots,h], dD [slots,h,p] too
};

struct FusedSplitSumParams {
  const float4 *dB_sums, *dC_sums;
  GradientView dB, dC;
  const PackedChunk* packed_chunks;  // null: not packed
  const unsigned* packed_count;
  std::int64_t seqlen;
  int first_batch, slots, chunks, ngroups, splits, dstate;  // slots: of the part
  bool reverse;
};

}  // namespace statescan::ssd_scan
