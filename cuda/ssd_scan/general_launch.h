// The general path as its table and its launchers see it.
#pragma once

#include <statescan/dispatch.h>

#include "../common/device.h"
#include "params.h"

namespace statescan::ssd_scan {

// Whether kernels take their places while the one ahead ends: the build's lowest architecture is what these are compiled for.
inline bool starts_early() { return cuda::lowest_compute_capability() >= 90; }

template <class Policy>
Segments general_segments(const Args& args, const Dims& dims) {
  if (dims.nheads == 0 || dims.headdim == 0) return {};
  const Tasks tasks = tasks_of<Policy>(dims, 1, 0, 1, Policy::kMaxHeads);
  return segments_for(dims, tasks.tiles, kMultiprocessors, Policy::kChunk, args.batch_invariant, starts_early());
}

// Without args.y only the states of whole sequences are found.
template <class Policy>
void launch_general(const Args& args, const Dims& dims, Stream stream);

// Into the workspace: what segments add to the state, or, combined, the states that they start from.
struct StateArgs : Args {
  Segments segments;
};

template <class Policy>
void launch_states(const StateArgs& args, const Dims& dims, Stream stream);

template <class Policy>
void launch_quadratic(const Args& args, const Dims& dims, Stream stream);

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
  p.start = state_view(args.initial_state);
  if (segments.count > 1) {
    const SegmentWorkspace workspace(args.workspace.data, dims, segments);
    p.between = segment_states(workspace, dims, segments), p.places = segments.states();
    if (segments.computed()) p.log2_decay = workspace.log2_decay;
    else p.done = workspace.done;
  }
  p.final_state = state_view(args.final_state);
  p.kept = kept_states(args.chunk_states, static_cast<bool>(args.cu_seqlens));
  return p;
}

}  // namespace statescan::ssd_scan
