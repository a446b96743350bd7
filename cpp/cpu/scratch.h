// Scratch memory of one thread: on its stack while it is small, so that a decode call needs no workspace.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

inline constexpr std::size_t kStackBytes = 32 * 1024;

// The workspace that a call asks of its caller when each of its threads wants `each` bytes.
inline std::size_t workspace_beyond_stack(std::size_t each) { return each <= kStackBytes ? 0 : each * max_threads(); }

// body(arena), with `each` bytes of the stack or of the workspace behind the arena.
template <class Body>
STATESCAN_INLINE void with_scratch(const Workspace& workspace, std::size_t each, int thread, Body&& body) {
  if (each <= kStackBytes) {
    alignas(64) char stack[kStackBytes];
    body(Arena(stack));
  } else {
    body(Arena(static_cast<char*>(workspace.data) + thread * each));
  }
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
