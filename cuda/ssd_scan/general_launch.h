// The general path as its table and its launchers see it.
#pragma once

#include <statescan/dispatch.h>

#include "params.h"

namespace statescan::ssd_scan {

template <class Policy>
Segments general_segments(const Args& args, const Dims& dims) {
  return segments_for(dims, Policy::kRows, kMultiprocessors, Policy::kChunk, args.batch_invariant);
}

template <class Policy>
void launch_general(const Args& args, const Dims& dims, Stream stream);

// Leaves the state before each segment in the workspace: both segment kernels.
template <class Policy>
void launch_segment_starts(const SegmentArgs& args, const Dims& dims, Stream stream);

struct PositionArgs : Args {
  Segments segments;  // of the main pass
};

// The states at args.state_positions, added up as in the main pass. To run before the main pass: final_state may lie where
// initial_state does.
template <class Policy>
void launch_position_states(const PositionArgs& args, const Dims& dims, Stream stream);

// The main pass, but for its tasks.
inline Params main_params(const Args& args, const Dims& dims, const Segments& segments) {
  Params p = params_of(args, dims, segments);
  p.y = token_view(args.y);
  p.start_per_segment = segments.count > 1;
  p.start = p.start_per_segment ? segment_states(SegmentWorkspace(args.workspace.data, dims, segments), dims, segments)
                                : state_view(args.initial_state);
  p.final_state = state_view(args.final_state);
  return p;
}

}  // namespace statescan::ssd_scan
