// States at positions, after the walks that leave those before them.
#pragma once

#include <statescan/dispatch.h>

#include "params.h"

namespace statescan::ssd_scan {

// Turns the entries that a walk left into the states at args.state_positions, and writes zeros for positions outside. Entries
// are the states before chunks of so many tokens, counted from a sequence's start; with 1, the states themselves.
void launch_position_states(const Args& args, const Dims& dims, void* entries, std::int64_t chunk, Stream stream);

}  // namespace statescan::ssd_scan
