// causal_conv1d_update on the CPU
// Math     y = act(bias + sum_k weight[k] window[k]), the window being the state and the new token; then the state shifts
// Shapes   x, y [b,t,d]; state [slots,d,w-1]; weight [d,w]
// Traffic  read x, weight and state, write y and state: b*d*(2t + 2(w-1)) + d*w elements
// Tasks    runs of (row, block of channels)
// Numerics a window holds inputs, which every state dtype keeps exactly: several tokens equal one at a time, bit for bit
#include "conv_row.h"
#include "isa.h"
#include "parallel.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kTaskOutputs = 16384;  // below this, waking a thread costs more than the work

// Tokens of row `row` through channels [first, first + count).
template <class T>
void update_block(const causal_conv1d_update::Args& args, const causal_conv1d_update::Dims& d, std::int64_t row,
                  std::int64_t first, std::int64_t count) {
  const int width = static_cast<int>(d.width), last = args.x.ndim - 1;
  const std::int64_t x_token = last == 2 ? args.x.stride[1] : 0, y_token = last == 2 ? args.y.stride[1] : 0;
  const std::int64_t x_first = row * args.x.stride[0] + first * args.x.stride[last];
  const std::int64_t y_first = row * args.y.stride[0] + first * args.y.stride[last];
  const std::int64_t slot = args.state_indices ? index_at(args.state_indices, row) : row;
  alignas(kVectorBytes) T y[kConvBlock];
  if (slot < 0) {
    for (std::int64_t c = 0; c < count; ++c) y[c] = T(0);
    for (std::int64_t t = 0; t < d.ntokens; ++t)
      store_row<T>(args.y.data, args.y.dtype, y_first + t * y_token, args.y.stride[last], count, y);
    return;
  }
  alignas(kVectorBytes) T weight[kMaxConvWidth * kConvBlock], bias[kConvBlock] = {};
  load_taps<T>(weight, kConvBlock, args.weight, first * args.weight.stride[0], count, width);
  if (args.bias) load_row<T>(bias, args.bias.data, args.bias.dtype, first * args.bias.stride[0], args.bias.stride[0], count);
  const std::int64_t state_first = offset_of(args.state, slot, first);
  ConvWindow<T> window(width);
  window.load_state(args.state, state_first, count);
  for (std::int64_t t = 0; t < d.ntokens; ++t) {
    load_row<T>(window.newest(), args.x.data, args.x.dtype, x_first + t * x_token, args.x.stride[last], count);
    conv_token<T>(y, window.rows(), weight, kConvBlock, bias, width, args.activation == causal_conv1d::Activation::silu, count);
    store_row<T>(args.y.data, args.y.dtype, y_first + t * y_token, args.y.stride[last], count, y);
    window.shift();
  }
  store_taps<T>(args.state, state_first, count, width - 1, window.rows());
}

template <class T>
void update(const causal_conv1d_update::Args& args, const causal_conv1d_update::Dims& d) {
  const std::int64_t blocks = (d.dim + kConvBlock - 1) / kConvBlock, units = d.batch * blocks;
  parallel_for_groups(units, kTaskOutputs / (kConvBlock * (d.ntokens > 0 ? d.ntokens : 1)), [&](std::int64_t unit, int) {
    const std::int64_t first = unit % blocks * kConvBlock;
    update_block<T>(args, d, unit / blocks, first, d.dim - first < kConvBlock ? d.dim - first : kConvBlock);
  });
}

}  // namespace

std::size_t workspace_bytes(const causal_conv1d_update::Args&, const causal_conv1d_update::Dims&) { return 0; }

void run(const causal_conv1d_update::Args& args, const causal_conv1d_update::Dims& d) {
  args.x.dtype == DType::float64 ? update<double>(args, d) : update<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
