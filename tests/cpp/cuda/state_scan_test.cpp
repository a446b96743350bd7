// A native program on a GPU: state_scan forward and backward on the caller's own stream, first of all inside the capture of a
// CUDA graph, against the recurrence written out. The program brings its own CUDA runtime. Without a device it checks the
// error.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include <statescan/dispatch.h>
#include <statescan/state_scan.h>

using statescan::Device;
using statescan::DeviceType;
using statescan::DType;
using statescan::Tensor;

constexpr std::int64_t kBatch = 2, kChunks = 5, kHeads = 3, kHeaddim = 4, kDstate = 24, kSlice = kHeaddim * kDstate;
constexpr Device kGpu{DeviceType::cuda, 0};

static void cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

static void expect(bool good, const char* what) {
  if (!good) throw std::runtime_error(what);
}

static std::vector<float> numbers(std::int64_t count, float phase) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(phase + 0.7f * static_cast<float>(i));
  return values;
}

// Device memory that starts as a copy of `values`.
struct Buffer {
  explicit Buffer(const std::vector<float>& values) : count(values.size()) {
    cuda(cudaMalloc(&data, bytes()));
    cuda(cudaMemcpy(data, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  explicit Buffer(std::int64_t count) : Buffer(std::vector<float>(static_cast<std::size_t>(count), NAN)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { (void)cudaFree(data); }
  std::size_t bytes() const { return count * sizeof(float); }
  std::vector<float> read() const {
    std::vector<float> values(count);
    cuda(cudaMemcpy(values.data(), data, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }
  std::size_t count;
  void* data = nullptr;
};

static double error(const std::vector<float>& got, const std::vector<double>& exact) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    difference += (got[i] - exact[i]) * (got[i] - exact[i]);
    size += exact[i] * exact[i];
  }
  return std::sqrt(difference / size);
}

static int without_device() {
  float nothing = 0;
  const Tensor update = Tensor::contiguous(&nothing, DType::float32, {1, 1, 1, 1, 1}, kGpu);
  statescan::state_scan::Args args;
  args.update = args.states = update;
  args.log_decay = Tensor::contiguous(&nothing, DType::float32, {1, 1, 1}, kGpu);
  try {
    statescan::state_scan::run(args);
  } catch (const statescan::CudaError& e) {
    expect(std::strstr(e.what(), statescan::cuda_unavailable_reason().c_str()), e.what());
    std::printf("no device: %s\n", e.what());
    return 0;
  } catch (const statescan::NotImplementedError& e) {  // a build without CUDA
    std::printf("no device: %s\n", e.what());
    return 0;
  }
  return 1;
}

static void run() {
  const std::int64_t count = kBatch * kChunks * kHeads * kSlice, steps = kBatch * kChunks * kHeads,
                     ends = kBatch * kHeads * kSlice;
  std::vector<float> log_decay = numbers(steps, 0.1f);
  for (float& v : log_decay) v = -std::fabs(v);
  const std::vector<float> update = numbers(count, 1), initial = numbers(ends, 2), dstates = numbers(count, 3),
                           dfinal = numbers(ends, 4);

  auto chunked = [](const Buffer& b) {
    return Tensor::contiguous(b.data, DType::float32, {kBatch, kChunks, kHeads, kHeaddim, kDstate}, kGpu);
  };
  auto state = [](const Buffer& b) {
    return Tensor::contiguous(b.data, DType::float32, {kBatch, kHeads, kHeaddim, kDstate}, kGpu);
  };
  auto scalars = [](const Buffer& b) { return Tensor::contiguous(b.data, DType::float32, {kBatch, kChunks, kHeads}, kGpu); };

  const Buffer log_decay_gpu(log_decay), update_gpu(update), initial_gpu(initial), dstates_gpu(dstates), dfinal_gpu(dfinal);
  const Buffer states_gpu(count), final_gpu(ends), dupdate_gpu(count), dlog_decay_gpu(steps), dinitial_gpu(ends);

  statescan::state_scan::Args forward;
  forward.log_decay = scalars(log_decay_gpu);
  forward.initial_state = state(initial_gpu);
  forward.update = chunked(update_gpu);
  forward.states = chunked(states_gpu);
  forward.final_state = state(final_gpu);

  statescan::state_scan::BackwardArgs backward;
  backward.log_decay = forward.log_decay;
  backward.states = forward.states;
  backward.dstates = chunked(dstates_gpu);
  backward.dfinal_state = state(dfinal_gpu);
  backward.dlog_decay = scalars(dlog_decay_gpu);
  backward.dupdate = chunked(dupdate_gpu);
  backward.dinitial_state = state(dinitial_gpu);
  const statescan::Plan plan = statescan::state_scan::plan(backward, statescan::state_scan::validate(backward));
  const Buffer workspace(static_cast<std::int64_t>(plan.workspace_bytes / sizeof(float)));
  backward.workspace = {workspace.data, plan.workspace_bytes};

  // The first call of the process, inside a capture: it may neither allocate nor wait.
  cudaStream_t stream = nullptr;
  cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  statescan::state_scan::run(forward, stream);
  statescan::state_scan::run(backward, stream);
  cudaGraph_t graph = nullptr;
  cuda(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t replay = nullptr;
  cuda(cudaGraphInstantiate(&replay, graph, 0));
  expect(std::isnan(states_gpu.read()[0]), "a captured call ran");
  cuda(cudaGraphLaunch(replay, stream));
  cuda(cudaStreamSynchronize(stream));

  std::vector<double> states(update.size()), dupdate(update.size()), dlog_decay(log_decay.size()), last(initial.size()),
      first(initial.size());
  for (std::int64_t b = 0; b < kBatch; ++b)
    for (std::int64_t h = 0; h < kHeads; ++h)
      for (std::int64_t i = 0; i < kSlice; ++i) {
        const std::int64_t end = (b * kHeads + h) * kSlice + i;
        auto at = [&](std::int64_t c) { return ((b * kChunks + c) * kHeads + h) * kSlice + i; };
        auto step = [&](std::int64_t c) { return (b * kChunks + c) * kHeads + h; };
        double s = initial[end];
        for (std::int64_t c = 0; c < kChunks; ++c) {
          states[at(c)] = s;
          s = std::exp(double(log_decay[step(c)])) * s + update[at(c)];
        }
        last[end] = s;
        double g = dfinal[end];
        for (std::int64_t c = kChunks; c-- > 0;) {
          const double decay = std::exp(double(log_decay[step(c)]));
          dupdate[at(c)] = g;
          dlog_decay[step(c)] += decay * g * states[at(c)];
          g = decay * g + dstates[at(c)];
        }
        first[end] = g;
      }
  expect(error(states_gpu.read(), states) < 1e-5, "states");
  expect(error(final_gpu.read(), last) < 1e-5, "final_state");
  expect(error(dupdate_gpu.read(), dupdate) < 1e-5, "dupdate");
  expect(error(dlog_decay_gpu.read(), dlog_decay) < 1e-5, "dlog_decay");
  expect(error(dinitial_gpu.read(), first) < 1e-5, "dinitial_state");

  // And without a graph: the same bits.
  const std::vector<float> captured = dlog_decay_gpu.read();
  cuda(cudaMemset(dlog_decay_gpu.data, 0xff, dlog_decay_gpu.bytes()));
  statescan::state_scan::run(forward, stream);
  statescan::state_scan::run(backward, stream);
  cuda(cudaStreamSynchronize(stream));
  expect(dlog_decay_gpu.read() == captured, "a plain call gives other bits than a captured one");
  cuda(cudaGraphExecDestroy(replay));
  cuda(cudaGraphDestroy(graph));
  cuda(cudaStreamDestroy(stream));
  std::printf("state_scan on the caller's stream and in a graph: kernel %s\n", plan.kernel);
}

int main() {
  try {
    if (!statescan::cuda_unavailable_reason().empty()) return without_device();
    run();
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "failed: %s\n", e.what());
    return 1;
  }
}
