// A native program that uses the installed library: ssd_scan on plain pointers, then on DLPack tensors, checked against the
// recurrence written out.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <statescan/ssd_scan.h>

// DLTensor, as dlpack.h declares it: statescan takes any type with these fields.
struct DLTensor {
  void* data;
  struct { std::int32_t device_type, device_id; } device;
  std::int32_t ndim;
  struct { std::uint8_t code, bits; std::uint16_t lanes; } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

using statescan::DType;
using statescan::Tensor;

constexpr std::int64_t kSeqlen = 100, kHeads = 2, kHeaddim = 3, kGroups = 1, kDstate = 4;

static std::vector<float> numbers(std::size_t count, float scale) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = scale * std::sin(0.7f * static_cast<float>(i + 1));
  return values;
}

static double worst_error(const std::vector<float>& y, const std::vector<float>& x, const std::vector<float>& dt,
                          const std::vector<float>& A, const std::vector<float>& B, const std::vector<float>& C) {
  double worst = 0;
  for (std::int64_t h = 0; h < kHeads; ++h)
    for (std::int64_t p = 0; p < kHeaddim; ++p) {
      double state[kDstate] = {};
      for (std::int64_t t = 0; t < kSeqlen; ++t) {
        const double step = dt[t * kHeads + h], input = x[(t * kHeads + h) * kHeaddim + p];
        double expected = 0;
        for (std::int64_t n = 0; n < kDstate; ++n) {
          state[n] = std::exp(step * A[h]) * state[n] + step * B[t * kDstate + n] * input;
          expected += C[t * kDstate + n] * state[n];
        }
        worst = std::fmax(worst, std::fabs(expected - y[(t * kHeads + h) * kHeaddim + p]));
      }
    }
  return worst;
}

static void run(statescan::ssd_scan::Args& args) {
  std::vector<char> scratch(plan(args, validate(args)).workspace_bytes + 256);
  auto aligned = (reinterpret_cast<std::uintptr_t>(scratch.data()) + 255) / 256 * 256;
  args.workspace = {reinterpret_cast<void*>(aligned), scratch.size() - 255};
  statescan::ssd_scan::run(args);
}

int main() {
  std::vector<float> x = numbers(kSeqlen * kHeads * kHeaddim, 1.0f), dt = numbers(kSeqlen * kHeads, 0.1f), A{-0.5f, -1.0f};
  for (float& step : dt) step = std::fabs(step);
  std::vector<float> B = numbers(kSeqlen * kGroups * kDstate, 0.9f), C = numbers(kSeqlen * kGroups * kDstate, 1.1f);
  std::vector<float> y(x.size(), NAN), y_dlpack(x.size(), NAN);

  statescan::ssd_scan::Args args;
  args.x = Tensor::contiguous(x.data(), DType::float32, {1, kSeqlen, kHeads, kHeaddim});
  args.dt = Tensor::contiguous(dt.data(), DType::float32, {1, kSeqlen, kHeads});
  args.A = Tensor::contiguous(A.data(), DType::float32, {kHeads});
  args.B = Tensor::contiguous(B.data(), DType::float32, {1, kSeqlen, kGroups, kDstate});
  args.C = Tensor::contiguous(C.data(), DType::float32, {1, kSeqlen, kGroups, kDstate});
  args.y = Tensor::contiguous(y.data(), DType::float32, {1, kSeqlen, kHeads, kHeaddim});
  run(args);

  std::int64_t shape[] = {1, kSeqlen, kHeads, kHeaddim};
  DLTensor in{x.data(), {1, 0}, 4, {2, 32, 1}, shape, nullptr, 0},
      out{y_dlpack.data(), {1, 0}, 4, {2, 32, 1}, shape, nullptr, 0};
  args.x = statescan::from_dlpack(in);
  args.y = statescan::from_dlpack(out);
  run(args);

  const double error = worst_error(y, x, dt, A, B, C);
  const bool same = y == y_dlpack;
  std::printf("statescan %s on %s: worst error %.1e, pointers and DLPack %s\n", statescan::version(), statescan::cpu_isa(),
              error, same ? "agree" : "differ");

  bool caught = false;
  args.A = Tensor::contiguous(A.data(), DType::float32, {kHeads - 1});
  try {
    statescan::ssd_scan::run(args);
  } catch (const statescan::ValueError& e) {
    std::printf("%s\n", e.what());
    caught = true;
  }
  return error < 1e-5 && same && caught ? 0 : 1;
}
