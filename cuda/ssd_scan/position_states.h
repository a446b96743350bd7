// States at positions, after the walks that leave those before them.
#pragma once

#include <statescan/dispatch.h>

#include "params.h"

namespace statescan::ssd_scan {

// The chunks of the walk that went before, counted from the start of a sequence, or from its end where its first is the short
// one.
struct ChunkGrid {
  std::int64_t chunk;
  bool from_end;

  // Where the chunk of token `at` begins; the end of the sequence is where it is left.
  STATESCAN_HOST_DEVICE std::int64_t chunk_of(std::int64_t at, std::int64_t length) const {
    if (at == length) return at;
    if (!from_end) return at / chunk * chunk;
    const std::int64_t first = length - (length - at + chunk - 1) / chunk * chunk;
    return first > 0 ? first : 0;
  }
};

// Turns the entries that a walk left into the states at args.state_positions, and writes zeros for positions outside.
void launch_position_states(const Args& args, const Dims& dims, void* entries, const ChunkGrid& grid, Stream stream);

}  // namespace statescan::ssd_scan
