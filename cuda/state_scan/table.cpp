// CUDA kernels of state_scan.
#include "../../cpp/ops/backend.h"
#include "../common/table.h"
#include "layout.h"

namespace statescan::state_scan {

namespace {

// Calls `visit` with the dtype as a template argument.
template <class Visit>
void with_dtype(DType dtype, Visit visit) {
  if (dtype == DType::float32) visit.template operator()<DType::float32>();
  else if (dtype == DType::float16) visit.template operator()<DType::float16>();
  else visit.template operator()<DType::bfloat16>();
}

const Tensor& main_of(const Args& args) { return args.update; }
const Tensor& main_of(const BackwardArgs& args) { return args.states; }

template <class A>
std::string why_not_vector(const A& args, const Dims& dims) {
  return layout_of(args, dims).why_not_vector(16 / size_of(main_of(args).dtype));
}

template <class A>
std::string never(const A&, const Dims&) {
  return "";
}

std::size_t no_workspace(const Args&, const Dims&) { return 0; }

std::size_t partial_sums(const BackwardArgs& args, const Dims& dims) {
  return sizeof(float) * dims.batch * dims.nchunks * dims.nheads * warps_per_slice(dims, args.states.dtype);
}

template <Access access>
void forward(const Args& args, const Dims& dims, Stream stream) {
  with_dtype(args.update.dtype, [&]<DType dtype> { launch_forward<Policy<dtype, access>>(args, dims, stream); });
}

// Why the tiles of a slice cannot be a cluster, or "".
std::string why_not_cluster(const BackwardArgs& args, const Dims& dims) {
  constexpr std::int64_t kMostShared = 16 * 1024;  // bytes, so that a multiprocessor's blocks all fit
  // b1 c32 h24 in bfloat16 is 5% faster this way, b1 c128 h80 as fast, b8 c16 h80 2% slower (p64 n128; H100, 2026-11-22).
  constexpr std::int64_t kMostSlices = 64;
  if (!cuda::has_sm90_code(cuda::compute_capability(args.states.device.index))) return "needs a build for sm_90 or newer";
  if (!args.dlog_decay) return "is for calls that want dlog_decay";
  const std::int64_t slices = dims.num_sequences * dims.nheads;
  if (slices > kMostSlices)
    return "is for up to " + std::to_string(kMostSlices) + " sequences x heads, got " + std::to_string(slices);
  const std::int64_t slice = dims.headdim * dims.dstate, tile = kClusterThreads * (16 / size_of(args.states.dtype));
  if (slice % tile != 0 || slice > kMostClusterBlocks * tile)
    return "needs slices of 1 to " + std::to_string(kMostClusterBlocks) + " tiles of " + std::to_string(tile) +
           " elements, got " + std::to_string(slice);
  if (cluster_sums_bytes(dims) > kMostShared) return "holds sums of fewer chunks, got " + std::to_string(dims.nchunks);
  return why_not_vector(args, dims);
}

std::size_t no_sums(const BackwardArgs&, const Dims&) { return 0; }

void backward_cluster(const BackwardArgs& args, const Dims& dims, Stream stream) {
  with_dtype(args.states.dtype,
             [&]<DType dtype> { launch_backward<Policy<dtype, Access::vector, Sums::cluster>>(args, dims, stream); });
}

template <Access access>
void backward(const BackwardArgs& args, const Dims& dims, Stream stream) {
  with_dtype(args.states.dtype, [&]<DType dtype> { launch_backward<Policy<dtype, access>>(args, dims, stream); });
}

using cuda::kSm80AndNewer;

constexpr cuda::Row<Args, Dims> kForwardRows[] = {
    {"vector", kReal, kSm80AndNewer, why_not_vector, no_workspace, forward<Access::vector>},
    {"strided", kReal, kSm80AndNewer, never, no_workspace, forward<Access::strided>},
};
constexpr cuda::Row<BackwardArgs, Dims> kBackwardRows[] = {
    {"cluster", kReal, cuda::kSm90AndNewer, why_not_cluster, no_sums, backward_cluster},
    {"vector", kReal, kSm80AndNewer, why_not_vector, partial_sums, backward<Access::vector>},
    {"strided", kReal, kSm80AndNewer, never, partial_sums, backward<Access::strided>},
};

constexpr cuda::Table<Args, Dims> kForward{"state_scan", &Args::update, kForwardRows};
constexpr cuda::Table<BackwardArgs, Dims> kBackward{"state_scan_backward", &BackwardArgs::states, kBackwardRows};

}  // namespace

Plan plan_cuda(const Args& args, const Dims& dims) { return kForward.plan(args, dims); }
void run_cuda(const Args& args, const Dims& dims, Stream stream) { kForward.run(args, dims, stream); }

Plan plan_cuda(const BackwardArgs& args, const Dims& dims) { return kBackward.plan(args, dims); }
void run_cuda(const BackwardArgs& args, const Dims& dims, Stream stream) { kBackward.run(args, dims, stream); }

}  // namespace statescan::state_scan
