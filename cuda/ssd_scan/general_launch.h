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

template <class Policy>
void launch_quadratic(const Args& args, const Dims& dims, Stream stream);

struct StateArgs : Args {
  Segments segments;
};

// States without y. Of several segments: the state before each, in the workspace. Of whole sequences: what args asks for.
template <class Policy>
void launch_states(const StateArgs& args, const Dims& dims, Stream stream);

// Entries of the positions lie behind the states of the segments.
inline std::size_t workspace_bytes(const Args& args, const Dims& dims, const Segments& segments) {
  return SegmentWorkspace::bytes(dims, segments) + entry_bytes(args, dims);
}

inline void* entries_of(const Args& args, const Dims& dims, const Segments& segments) {
  return static_cast<char*>(args.workspace.data) + SegmentWorkspace::bytes(dims, segments);
}

// The main pass, but for its tasks.
inline Params main_params(const Args& args, const Dims& dims, const Segments& segments) {
  Params p = params_of(args, dims, segments);
  p.y = token_view(args.y);
  p.positions = positions_of(args, dims, entries_of(args, dims, segments));
  p.starts = segments.computed() ? segments.states() : 0;
  p.start = p.starts > 0 ? segment_states(SegmentWorkspace(args.workspace.data, dims, segments), dims, segments)
                          : state_view(args.initial_state);
  if (segments.handed_on) {
    const SegmentWorkspace workspace(args.workspace.data, dims, segments);
    p.handed_on = segment_states(workspace, dims, segments), p.done = workspace.done;
  }
  p.final_state = state_view(args.final_state);
  p.kept = kept_states(args.chunk_states, static_cast<bool>(args.cu_seqlens));
  return p;
}

}  // namespace statescan::ssd_scan
