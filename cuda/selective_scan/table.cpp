// CUDA kernels of selective_scan.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "params.h"

namespace statescan::selective_scan {

namespace {

template <class A>
std::string never(const A&, const Dims&) {
  return "";
}
template <class A>
std::string why_not_channels(const A& args, const Dims& dims) {
  return why_not_vectors(args, dims, 2);
}
template <class A>
std::string why_not_tokens(const A& args, const Dims& dims) {
  return why_not_vectors(args, dims, 1);
}

// States at positions come from another kernel than lanes: without segments there too, so that y keeps its bits.
Args as_lanes(Args args, const Dims& dims) {
  if (args.state_positions && suits_lanes(args, dims)) args.batch_invariant = true;
  return args;
}

std::size_t scratch_bytes(const Args& args, const Dims& dims) {
  if (takes_lanes(args, dims)) return sizeof(float) * LanesScratch(dims, lanes_plan(args, dims)).total();
  return sizeof(float) * ForwardScratch(as_lanes(args, dims), dims).total();
}
std::size_t scratch_bytes(const BackwardArgs& args, const Dims& dims) {
  return sizeof(float) * BackwardScratch(args, dims).total();
}

template <Arithmetic arithmetic, int states>
void forward_with(const Args& args, const Dims& dims, Stream stream) {
  if (dims.varying_B && dims.varying_C) launch_forward<Policy<arithmetic, states, false>>(args, dims, stream);
  else launch_forward<Policy<arithmetic, states, true>>(args, dims, stream);
}

// Calls `visit` with what the kernels for 16-bit x, a real A and four states a thread may take for granted.
template <class A, class Visit>
void with_known(const A& args, const Dims& dims, Visit visit) {
  switch (known_of(args, dims)) {
    case Known::bfloat16_channels:
      return visit.template operator()<Known::bfloat16_channels>();
    case Known::bfloat16_tokens:
      return visit.template operator()<Known::bfloat16_tokens>();
    case Known::float16_channels:
      return visit.template operator()<Known::float16_channels>();
    case Known::float16_tokens:
      return visit.template operator()<Known::float16_tokens>();
    case Known::nothing:
      return visit.template operator()<Known::nothing>();
  }
}

// Kernels of float32's arithmetic take any x; those for 16-bit x ask B and C to change with the token.
template <class A>
bool is_precise(const A& args, const Dims& dims) {
  return args.x.dtype == DType::float32 || !dims.varying_B || !dims.varying_C;
}

void forward(const Args& args, const Dims& dims, Stream stream) {
  const bool long_rows = states_per_thread(dims) == 8;
  if (dims.complex_A) forward_with<Arithmetic::complex_rate, 4>(args, dims, stream);
  else if (is_precise(args, dims) && long_rows) forward_with<Arithmetic::precise, 8>(args, dims, stream);
  else if (is_precise(args, dims)) forward_with<Arithmetic::precise, 4>(args, dims, stream);
  else if (long_rows) launch_forward<Policy<Arithmetic::fast, 8, false>>(args, dims, stream);
  else if (!takes_lanes(args, dims)) launch_forward<Policy<Arithmetic::fast, 4, false>>(as_lanes(args, dims), dims, stream);
  else
    with_known(args, dims, [&]<Known known> {
      if constexpr (known != Known::nothing) launch_lanes<Policy<Arithmetic::fast, 4, false, known>>(args, dims, stream);
    });
}

template <Arithmetic arithmetic>
void backward_with(const BackwardArgs& args, const Dims& dims, Stream stream) {
  if (dims.varying_B && dims.varying_C) launch_backward<Policy<arithmetic, kBackwardStates, false>>(args, dims, stream);
  else launch_backward<Policy<arithmetic, kBackwardStates, true>>(args, dims, stream);
}

void backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  // Packed sequences have no vectors along the tokens: without them, with batch_invariant, one alone gets the bits it has packed.
  const bool as_packed = args.batch_invariant && reach_of(args, dims) == Reach::tokens;
  if (dims.complex_A) backward_with<Arithmetic::complex_rate>(args, dims, stream);
  else if (is_precise(args, dims)) backward_with<Arithmetic::precise>(args, dims, stream);
  else if (as_packed) launch_backward<Policy<Arithmetic::fast, kBackwardStates, false>>(args, dims, stream);
  else
    with_known(args, dims, [&]<Known known> {
      launch_backward<Policy<Arithmetic::fast, kBackwardStates, false, known>>(args, dims, stream);
    });
}

// The rows differ in how x, dt, z and y are reached. With batch_invariant forward rows give the same bits, and backward rows but
// channels_last of 16-bit x; without, a small call may be cut into segments where it does not suit the kernel of lanes.
constexpr cuda::Row<Args, Dims> kForwardRows[] = {
    {"channels_last", kReal, cuda::kSm80AndNewer, why_not_channels, scratch_bytes, forward},
    {"channels_first", kReal, cuda::kSm80AndNewer, why_not_tokens, scratch_bytes, forward},
    {"strided", kReal, cuda::kSm80AndNewer, never, scratch_bytes, forward},
};
constexpr cuda::Row<BackwardArgs, Dims> kBackwardRows[] = {
    {"channels_last", kReal, cuda::kSm80AndNewer, why_not_channels, scratch_bytes, backward},
    {"channels_first", kReal, cuda::kSm80AndNewer, why_not_tokens, scratch_bytes, backward},
    {"strided", kReal, cuda::kSm80AndNewer, never, scratch_bytes, backward},
};
constexpr cuda::Table<Args, Dims> kForward{"selective_scan", &Args::x, kForwardRows};
constexpr cuda::Table<BackwardArgs, Dims> kBackward{"selective_scan_backward", &BackwardArgs::x, kBackwardRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::selective_scan
