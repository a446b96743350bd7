// One binary, several instruction sets: CMake compiles every kernel file of this folder once per set, each time with another
// STATESCAN_ISA_NAMESPACE, and dispatch.cpp picks at run time. A kernel file defines, in that namespace,
//
//   std::size_t workspace_bytes(const <op>::Args&, const <op>::Dims&);
//   void run(const <op>::Args&, const <op>::Dims&);
//
// Code compiled for a wide set must not leak into functions that the linker could share with the rest of the program: helpers
// in headers are templates or inlines of that namespace, or always_inline.
#pragma once

#include <cstddef>

#include "../ops/backend.h"

#define STATESCAN_DECLARE_CPU_KERNEL(op, A)                                \
  std::size_t workspace_bytes(const op::A& args, const op::Dims& dims);    \
  void run(const op::A& args, const op::Dims& dims);

#if defined(__x86_64__)
#define STATESCAN_FOR_EACH_ISA(apply) apply(avx512) apply(avx2) apply(baseline)
#else
#define STATESCAN_FOR_EACH_ISA(apply) apply(baseline)
#endif

#define STATESCAN_DECLARE_ISA(isa) \
  namespace statescan::cpu::isa {  \
  STATESCAN_FOR_EACH_OP(STATESCAN_DECLARE_CPU_KERNEL) \
  }
STATESCAN_FOR_EACH_ISA(STATESCAN_DECLARE_ISA)
