// CUDA kernels of ssd_scan.
#include <limits>
#include <string_view>

#include "../../cpp/ops/backend.h"
#include "../common/clear.h"
#include "../common/scaled.h"
#include "../common/table.h"
#include "../common/tma.h"
#include "bwd_policy.h"
#include "fused_bwd_plan.h"
#include "fused_plan.h"
#include "general_launch.h"
#include "recurrent.h"
#include "scaled_output.h"
#include "short_plan.h"

namespace statescan::ssd_scan {

template <class Policy>
void launch_fused(const Args& args, const Dims& dims, const FusedPlan& plan, std::uint8_t* y_exponents, const Tensor& dy,
                  Stream stream);

template <class Policy>
void launch_short(const Args& args, const Dims& dims, Stream stream);

template <class Policy>
void launch_fused_backward(const BackwardArgs& args, const Dims& dims, const FusedBackwardPlan& plan, bool of_side,
                           bool adds_to_dx, Stream stream);

template <class Policy>
void launch_fused_backward_sides(const BackwardArgs& args, const Dims& dims, const FusedBackwardSides& sides, Stream stream);

namespace {

std::string why_not_dstate(const Dims& dims, std::int64_t most) {
  return dims.dstate <= most ? "" : "takes dstate up to " + std::to_string(most) + ", got " + std::to_string(dims.dstate);
}

int padded_dstate(const Args& args, const Dims& dims) {
  if (dims.dstate > kMostStatesOfBlock) return 2 * kMostStatesOfBlock;
  return dims.dstate <= 64 && !args.state_positions && !args.chunk_states ? 64 : 128;
}

FusedPlan fused_plan_of(const Args& args, const Dims& dims) {
  // Where the final state takes the place of the initial one, nothing may read that beside the output pass.
  const bool in_place = args.initial_state && args.initial_state.data == args.final_state.data;
  FusedPlan plan = fused_plan(dims, padded_dstate(args, dims), static_cast<bool>(args.cu_seqlens), args.batch_invariant,
                              std::numeric_limits<std::int64_t>::max(), !in_place);
  if (plan.has_pieces() && plan.first_chunks == 0 && in_place) plan.combines = true;
  return plan;
}

// Why the bulk copy engine cannot move a tensor of the call, or "".
std::string why_not_tma(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  for (const auto& [name, tensor] : tensors)
    if (std::string reason = cuda::why_not_tma(name, *tensor); !reason.empty()) return reason;
  return "";
}

// Why the fused kernels cannot move chunk_states, or "".
std::string why_not_fused_states(const Tensor& states, DType dtype) {
  if (!states) return "";
  if (states.dtype != dtype) return "takes chunk_states in the dtype of x";
  if (states.shape[0] > 1 && states.stride[0] != states.shape[1] * states.stride[1])
    return "needs chunk_states of one sequence behind those of the other";
  return cuda::why_not_tma("chunk_states", chunk_states_of(states));
}

std::string why_not_fused(const Args& args, const Dims& dims) {
  if (args.chunk_states && args.reverse) return "keeps no chunk_states in reverse";
  if (args.chunk_states && args.state_positions) return "keeps no chunk_states beside state_positions";
  if (std::string reason = why_not_fused_states(args.chunk_states, args.x.dtype); !reason.empty()) return reason;
  if (args.mode != SsdMode::automatic && args.mode != SsdMode::chunked) return "computes in chunks";
  if (std::string reason = why_not_dstate(dims, args.state_positions ? kMostStatesOfBlock : 2 * kMostStatesOfBlock);
      !reason.empty())
    return args.state_positions ? reason + " with state_positions" : reason;
  if (dims.dstate % 2 != 0) return "takes an even dstate, got " + std::to_string(dims.dstate);
  if (dims.num_sequences == 0 || dims.seqlen == 0 || dims.headdim == 0 || dims.dstate == 0)
    return "needs at least one sequence, token, channel and state";
  constexpr std::int64_t kMost =
      std::numeric_limits<std::int32_t>::max();  // tokens are coordinates of boxes, tasks are counted
  const FusedPlan plan = fused_plan_of(args, dims);
  if (dims.seqlen > kMost || plan.pairs * plan.segments * dims.num_sequences > kMost - kMultiprocessors)
    return "counts tokens, and pairs of heads in all segments, in 32 bits";
  return why_not_tma({{"x", &args.x}, {"B", &args.B}, {"C", &args.C}, {"z", &args.z}, {"y", &args.y}});
}

// One row of a batch as one chunk, without states. Longer ones, packings and calls with a state round in other places, so that
// batch_invariant leaves all of them to the kernel that walks.
std::string why_not_short(const Args& args, const Dims& dims) {
  if (args.batch_invariant) return "rounds in other places than sequences of any length and packings do";
  if (dims.seqlen > kShortTokens)
    return "takes sequences of up to " + std::to_string(kShortTokens) + " tokens, got " + std::to_string(dims.seqlen);
  if (args.cu_seqlens) return "takes no cu_seqlens";
  if (args.reverse) return "does not go in reverse";
  if (args.initial_state || args.final_state || args.state_positions || args.chunk_states)
    return "begins with zeros and leaves no state";
  if (std::string reason = why_not_dstate(dims, kMostStatesOfBlock); !reason.empty()) return reason;
  return why_not_fused(args, dims);
}

template <DType dtype>
void run_short(const Args& args, const Dims& dims, Stream stream) {
  launch_short<FusedPolicy<dtype, 128>>(args, dims, stream);
}

// The segments' states, and those between parts.
std::size_t bytes_of_pass(const Inputs& in, const Dims& dims, const FusedPlan& plan, int padded_dstate) {
  const std::int64_t at_once = cuda::multiprocessors(in.x.device.index) / sides_of(padded_dstate);
  const Turns turns = fused_turns(dims, plan, static_cast<bool>(in.cu_seqlens), at_once);
  return plan.workspace_bytes() + PartBytes(turns, padded_dstate).sum();
}

// Those at positions as well.
std::size_t fused_workspace(const Args& args, const Dims& dims) {
  return bytes_of_pass(args, dims, fused_plan_of(args, dims), padded_dstate(args, dims)) +
         aligned(entry_bytes(args, dims, true));
}

std::int64_t fused_segment_tokens(const Args& args, const Dims& dims) {
  const FusedPlan plan = fused_plan_of(args, dims);
  return plan.segments > 1 ? plan.chunks_per_segment * kFusedTile : 0;
}

// y_exponents: null, or y goes out as halves that share them.
template <DType dtype>
void run_fused_scaled(const Args& args, const Dims& dims, std::uint8_t* y_exponents, Stream stream) {
  const FusedPlan plan = fused_plan_of(args, dims);
  const auto launch = [&]<int padded> { launch_fused<FusedPolicy<dtype, padded>>(args, dims, plan, y_exponents, {}, stream); };
  const int padded = padded_dstate(args, dims);
  if (padded == 64) launch.template operator()<64>();
  else if (padded == kMostStatesOfBlock) launch.template operator()<kMostStatesOfBlock>();
  else launch.template operator()<2 * kMostStatesOfBlock>();
}

template <DType dtype>
void run_fused(const Args& args, const Dims& dims, Stream stream) {
  run_fused_scaled<dtype>(args, dims, nullptr, stream);
}

// Calls `visit` with the policy of the general kernels for a call: its dtype, and dstate padded; k64: to 64 too, where there is
// that.
template <bool k64 = true, class Visit>
auto with_policy(const Args& args, const Dims& dims, Visit visit) {
  const auto with_dstate = [&]<DType dtype> {
    if constexpr (k64 && dtype == DType::bfloat16)
      if (dims.dstate <= 64) return visit(Policy<dtype, 64>());
    if (dims.dstate <= 128) return visit(Policy<dtype, 128>());
    return visit(Policy<dtype, kMaxDstate>());
  };
  if (args.x.dtype == DType::float32) return with_dstate.template operator()<DType::float32>();
  if (args.x.dtype == DType::float16) return with_dstate.template operator()<DType::float16>();
  return with_dstate.template operator()<DType::bfloat16>();
}

std::string why_not_general(const Args& args, const Dims& dims) {
  if (args.mode != SsdMode::automatic && args.mode != SsdMode::chunked) return "computes in chunks";
  return why_not_dstate(dims, kMaxDstate);
}

std::size_t general_workspace(const Args& args, const Dims& dims) {
  return with_policy(args, dims, [&]<class P>(P) { return workspace_bytes(args, dims, general_segments<P>(args, dims)); });
}

std::int64_t general_segment_tokens(const Args& args, const Dims& dims) {
  return with_policy(args, dims, [&]<class P>(P) {
    const Segments segments = general_segments<P>(args, dims);
    return segments.computed() ? segments.chunks_per_segment * segments.chunk : 0;
  });
}

void general(const Args& args, const Dims& dims, Stream stream) {
  with_policy(args, dims, [&]<class P>(P) { launch_general<P>(args, dims, stream); });
}

std::string why_not_quadratic(const Args& args, const Dims& dims) {
  if (args.mode != SsdMode::quadratic) return "computes a sequence as one chunk";
  return why_not_dstate(dims, kMaxDstate);
}

std::size_t quadratic_workspace(const Args& args, const Dims& dims) { return entry_bytes(args, dims); }

void quadratic(const Args& args, const Dims& dims, Stream stream) {
  with_policy<false>(args, dims, [&]<class P>(P) { launch_quadratic<P>(args, dims, stream); });
}

std::string why_not_recurrent(const Args& args, const Dims& dims) {
  if (args.mode != SsdMode::recurrent) return "computes token by token";
  return why_not_dstate(dims, kRecurrentDstate);
}

std::size_t no_workspace(const Args&, const Dims&) { return 0; }

// Calls `visit` with the policy of the backward kernels for a call.
template <States states, class Visit>
auto with_backward_policy(const BackwardArgs& args, const Dims& dims, Visit visit) {
  if constexpr (states == States::one_term) {
    if (dims.dstate <= 64) return visit(BackwardPolicy<DType::bfloat16, 64, states>());
    if (dims.dstate <= 128) return visit(BackwardPolicy<DType::bfloat16, 128, states>());
    return visit(BackwardPolicy<DType::bfloat16, kMaxDstate, states>());
  } else {
    const auto with_dstate = [&]<DType dtype> {
      if (dims.dstate <= 128) return visit(BackwardPolicy<dtype, 128, states>());
      return visit(BackwardPolicy<dtype, kMaxDstate, states>());
    };
    if (args.x.dtype == DType::float32) return with_dstate.template operator()<DType::float32>();
    if (args.x.dtype == DType::float16) return with_dstate.template operator()<DType::float16>();
    return visit(BackwardPolicy<DType::bfloat16, kMaxDstate, states>());  // rare: what cannot be accessed as vectors
  }
}

std::string why_not_backward(const BackwardArgs&, const Dims& dims) { return why_not_dstate(dims, kMaxDstate); }

std::string why_not_ahead(const BackwardArgs& args, const Dims& dims) {
  if (std::string reason = why_not_dstate(dims, kMaxDstate); !reason.empty()) return reason;
  for (const auto& [name, tensor] : {std::pair{"x", &args.x}, {"B", &args.B}, {"C", &args.C}, {"z", &args.z}, {"dy", &args.dy}})
    if (std::string reason = cuda::why_not_runs(name, *tensor, 3, 8); !reason.empty()) return reason;
  return "";
}

template <States states>
std::size_t backward_workspace(const BackwardArgs& args, const Dims& dims) {
  return with_backward_policy<states>(
      args, dims, [&]<class P>(P) { return sizeof(float) * BackwardScratch(args, dims, backward_plan<P>(args, dims)).total; });
}

template <States states>
std::int64_t backward_segment_tokens(const BackwardArgs& args, const Dims& dims) {
  return with_backward_policy<states>(args, dims, [&]<class P>(P) -> std::int64_t {
    const BackwardPlan plan = backward_plan<P>(args, dims);
    return plan.segments > 1 ? divide_up(divide_up(dims.seqlen, plan.chunk), plan.segments) * plan.chunk : 0;
  });
}

template <States states>
void backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  with_backward_policy<states>(args, dims, [&]<class P>(P) { launch_backward<P>(args, dims, stream); });
}

// Rare forms are compiled for 128 alone.
int padded_dstate(const BackwardArgs& args, const Dims& dims) {
  return dims.dstate <= 64 && !args.cu_seqlens && !args.reverse && !dims.D_per_channel && !args.z ? 64 : 128;
}

// dz, of a pass of the forward's, with no more states than the backward has room for.
int padded_dstate_of_gate(const Dims& dims) {
  return dims.dstate > kMostStatesOfBlock ? 2 * kMostStatesOfBlock : kMostStatesOfBlock;
}

FusedPlan gate_plan_of(const BackwardArgs& args, const Dims& dims) {
  const std::int64_t x = dims.batch * dims.seqlen * dims.nheads * dims.headdim * size_of(args.x.dtype);
  const std::int64_t piece = std::int64_t{dims.num_sequences} * dims.nheads * divide_up(dims.headdim, kFusedTile) * kFusedTile *
                             padded_dstate_of_gate(dims) * std::int64_t{sizeof(float)};
  const auto most = static_cast<std::int64_t>(kMostMemory * static_cast<double>(x) / static_cast<double>(piece));
  return fused_plan(dims, padded_dstate_of_gate(dims), static_cast<bool>(args.cu_seqlens), args.batch_invariant, most);
}

// Whether the fused backward reads chunk_states or, where none are given, would read those that the forward keeps. In reverse
// its chunks are not those of the stretches, and zeros it knows.
bool reads_kept_states(const BackwardArgs& args, const Dims& dims) {
  if (args.reverse || begins_with_zeros(args, dims)) return false;
  if (args.chunk_states) return why_not_fused_states(args.chunk_states, args.x.dtype).empty();
  const Tensor as_kept = Tensor::contiguous(
      nullptr, args.x.dtype, {dims.batch, dims.nstretches, dims.nheads, dims.headdim, dims.dstate}, args.x.device);
  return why_not_fused_states(as_kept, args.x.dtype).empty();
}

bool reads_kept_states_of_any_kind(const BackwardArgs&, const Dims&) { return true; }

bool from_forward(const BackwardArgs& args, const Dims& dims) {
  return begins_with_zeros(args, dims) || (args.chunk_states && reads_kept_states(args, dims));
}

FusedBackwardSides fused_backward_sides_of(const BackwardArgs& args, const Dims& dims) {
  return {dims, static_cast<bool>(args.cu_seqlens), args.batch_invariant, static_cast<bool>(args.dx), from_forward(args, dims)};
}

// Of the call, or of the first of two.
FusedBackwardPlan fused_backward_plan_of(const BackwardArgs& args, const Dims& dims) {
  if (dims.dstate > kMostStatesOfBlock) return fused_backward_sides_of(args, dims).calls[0];
  return fused_backward_plan(dims, padded_dstate(args, dims), static_cast<bool>(args.cu_seqlens), args.batch_invariant,
                             static_cast<bool>(args.dx), from_forward(args, dims));
}

std::string why_not_fused_backward(const BackwardArgs& args, const Dims& dims) {
  if (std::string reason = why_not_dstate(dims, 2 * kMostStatesOfBlock); !reason.empty()) return reason;
  if (dims.dstate % 2 != 0) return "takes an even dstate, got " + std::to_string(dims.dstate);
  // With 24 states, gradients of a gated call were up to 1.57 roundings off in tests; with 64 and more 1.5 at most.
  if (args.z && dims.dstate < 64) return "takes z with a dstate of at least 64, got " + std::to_string(dims.dstate);
  if (dims.num_sequences == 0 || dims.headdim == 0 || dims.dstate == 0) return "needs at least one sequence, channel and state";
  // What 16-bit states lose is then a share of every sum: ddt of one token is off by twice what rounding it costs.
  if (dims.batch * dims.seqlen < dims.num_sequences * kFusedTile)
    return "takes sequences of at least " + std::to_string(kFusedTile) + " tokens, packed ones on average";
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const FusedBackwardPlan plan = fused_backward_plan_of(args, dims);
  if (dims.seqlen > kMost - 2 * kFusedTile || plan.slots * dims.ngroups * plan.group_items > kMost / 8)
    return "counts tokens, and heads in all chunks, in 32 bits";
  return why_not_tma({{"x", &args.x},
                      {"B", &args.B},
                      {"C", &args.C},
                      {"dy", &args.dy},
                      {"dx", &args.dx},
                      {"dB", &args.dB},
                      {"dC", &args.dC},
                      {"z", &args.z},
                      {"dz", &args.dz}});
}

std::size_t fused_backward_workspace(const BackwardArgs& args, const Dims& dims) {
  const std::size_t bytes = dims.dstate > kMostStatesOfBlock ? fused_backward_sides_of(args, dims).workspace_bytes()
                                                             : fused_backward_plan_of(args, dims).workspace_bytes();
  if (!args.dz) return bytes;
  return std::max(bytes, bytes_of_pass(args, dims, gate_plan_of(args, dims), padded_dstate_of_gate(dims)));
}

// With z: dz by a pass of its own, the others by kernels that read z beside dy.
template <DType dtype>
void run_gated_backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  if (args.dz) {
    Args pass;
    static_cast<Inputs&>(pass) = args;
    pass.y = args.dz, pass.workspace = args.workspace;
    const FusedPlan plan = gate_plan_of(args, dims);
    if (dims.dstate <= kMostStatesOfBlock)
      launch_fused<FusedPolicy<dtype, kMostStatesOfBlock, true>>(pass, dims, plan, nullptr, args.dy, stream);
    else launch_fused<FusedPolicy<dtype, 2 * kMostStatesOfBlock, true>>(pass, dims, plan, nullptr, args.dy, stream);
  }
  using Policy = FusedPolicy<dtype, kMostStatesOfBlock, true>;
  if (dims.dstate <= kMostStatesOfBlock)
    launch_fused_backward<Policy>(args, dims, fused_backward_plan_of(args, dims), false, false, stream);
  else launch_fused_backward_sides<Policy>(args, dims, fused_backward_sides_of(args, dims), stream);
}

template <DType dtype>
void run_fused_backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  if (args.z) {
    run_gated_backward<dtype>(args, dims, stream);
    return;
  }
  if (dims.dstate > kMostStatesOfBlock) {
    launch_fused_backward_sides<FusedPolicy<dtype, 128>>(args, dims, fused_backward_sides_of(args, dims), stream);
    return;
  }
  const FusedBackwardPlan plan = fused_backward_plan_of(args, dims);
  if (padded_dstate(args, dims) == 64) launch_fused_backward<FusedPolicy<dtype, 64>>(args, dims, plan, false, false, stream);
  else launch_fused_backward<FusedPolicy<dtype, 128>>(args, dims, plan, false, false, stream);
}

constexpr cuda::Row<Args, Dims> kForwardRows[] = {
#ifdef STATESCAN_CUDA_SM90A
    {"short_float16", just(DType::float16), cuda::kSm90Only, why_not_short, no_workspace, run_short<DType::float16>},
    {"short_bfloat16", just(DType::bfloat16), cuda::kSm90Only, why_not_short, no_workspace, run_short<DType::bfloat16>},
    {"fused_float16", just(DType::float16), cuda::kSm90Only, why_not_fused, fused_workspace, run_fused<DType::float16>,
     fused_segment_tokens},
    {"fused_bfloat16", just(DType::bfloat16), cuda::kSm90Only, why_not_fused, fused_workspace, run_fused<DType::bfloat16>,
     fused_segment_tokens},
#endif
    {"recurrent", kReal, cuda::kSm80AndNewer, why_not_recurrent, no_workspace, launch_recurrent},
    {"quadratic", kReal, cuda::kSm80AndNewer, why_not_quadratic, quadratic_workspace, quadratic},
    {"general", kReal, cuda::kSm80AndNewer, why_not_general, general_workspace, general, general_segment_tokens},
};
constexpr cuda::Table<Args, Dims> kForward{"ssd_scan", &Args::x, kForwardRows};
constexpr cuda::Row<BackwardArgs, Dims> kBackwardRows[] = {
#ifdef STATESCAN_CUDA_SM90A
    {"fused_float16", just(DType::float16), cuda::kSm90Only, why_not_fused_backward, fused_backward_workspace,
     run_fused_backward<DType::float16>, nullptr, reads_kept_states},
    {"fused_bfloat16", just(DType::bfloat16), cuda::kSm90Only, why_not_fused_backward, fused_backward_workspace,
     run_fused_backward<DType::bfloat16>, nullptr, reads_kept_states},
#endif
    {"ahead_bfloat16", just(DType::bfloat16), cuda::kSm80AndNewer, why_not_ahead, backward_workspace<States::one_term>,
     backward<States::one_term>, backward_segment_tokens<States::one_term>, reads_kept_states_of_any_kind},
    {"general", kReal, cuda::kSm80AndNewer, why_not_backward, backward_workspace<States::full>, backward<States::full>,
     backward_segment_tokens<States::full>, reads_kept_states_of_any_kind},
};
constexpr cuda::Table<BackwardArgs, Dims> kBackward{"ssd_scan_backward", &BackwardArgs::x, kBackwardRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

#ifdef STATESCAN_CUDA_SM90A
std::size_t exponent_bytes(const Args& args, const Dims& dims) {
  static_assert(kFusedTile == cuda::kScaledTogether);
  const bool can = std::string_view(kForward.plan(args, dims).kernel) == "fused_bfloat16" && padded_dstate(args, dims) == 128 &&
                   dims.headdim % kFusedTile == 0;
  return can ? dims.batch * dims.seqlen * dims.nheads * dims.headdim / kFusedTile : 0;
}

void run_scaled(const Args& args, const Dims& dims, std::uint8_t* exponents, Stream stream) {
  const cuda::DeviceGuard guard(args.x.device.index);
  cuda::clear(exponents, exponent_bytes(args, dims), stream);
  run_fused_scaled<DType::bfloat16>(args, dims, exponents, stream);
}
#else
std::size_t exponent_bytes(const Args&, const Dims&) { return 0; }
void run_scaled(const Args& args, const Dims& dims, std::uint8_t*, Stream stream) { run_cuda(args, dims, stream); }
#endif

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::ssd_scan
