// Picks the instruction set once, and sends each op to the kernels that were compiled for it.
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace statescan {
namespace cpu {

enum class Isa { baseline, avx2, avx512 };

static Isa detect() {
#if defined(__x86_64__)
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
  if (const char* asked = std::getenv("STATESCAN_ISA")) {
    if (std::strcmp(asked, "baseline") == 0) return Isa::baseline;
    if (std::strcmp(asked, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

static Isa isa() {
  static const Isa found = detect();
  return found;
}

}  // namespace cpu

const char* cpu_isa() {
  switch (cpu::isa()) {
    case cpu::Isa::avx512: return "avx512";
    case cpu::Isa::avx2: return "avx2";
    default: break;
  }
#if defined(__ARM_NEON)
  return "neon";
#else
  return "baseline";
#endif
}

#if defined(__x86_64__)
#define STATESCAN_SELECT(call)                            \
  switch (cpu::isa()) {                                   \
    case cpu::Isa::avx512: return cpu::avx512::call;      \
    case cpu::Isa::avx2: return cpu::avx2::call;          \
    default: return cpu::baseline::call;                  \
  }
#else
#define STATESCAN_SELECT(call) return cpu::baseline::call;
#endif

#define STATESCAN_CPU_OP(op, A)                                                                \
  namespace op {                                                                               \
  static std::size_t cpu_workspace_bytes(const A& args, const Dims& dims) {                    \
    STATESCAN_SELECT(workspace_bytes(args, dims))                                              \
  }                                                                                            \
  Plan plan_cpu(const A& args, const Dims& dims) { return {"cpu", cpu_isa(), cpu_workspace_bytes(args, dims)}; } \
  void run_cpu(const A& args, const Dims& dims) { STATESCAN_SELECT(run(args, dims)) }          \
  }

STATESCAN_FOR_EACH_OP(STATESCAN_CPU_OP)

}  // namespace statescan
