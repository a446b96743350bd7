// causal_conv1d_update on the CPU
// Math     y = act(bias + sum_k weight[k] window[k]), the window being the state and the new token; then the state shifts
// Shapes   x, y [b,t,d]; state [slots,d,w-1]; weight [d,w]
// Traffic  read x, weight and state, write y and state: b*d*(2t + 2(w-1)) + d*w elements
// Tasks    (block of channels, run of rows): a task reads its weights once
// Numerics a window holds inputs, which every state dtype keeps exactly: several tokens equal one at a time, bit for bit
#include "conv_row.h"
#include "isa.h"
#include "parallel.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kTaskOutputs = 16384;  // below this, waking a thread costs more than the work

// A block of channels, the same in every row.
template <class T>
class Block {
 public:
  Block(const causal_conv1d_update::Args& args, const causal_conv1d_update::Dims& d, std::int64_t first)
      : args_(args), d_(d), width_(static_cast<int>(d.width)), first_(first) {
    count_ = d.dim - first < kConvBlock ? d.dim - first : kConvBlock;
    load_taps<T>(weight_, kConvBlock, args.weight, first * args.weight.stride[0], count_, width_);
    clear(bias_);
    const Tensor& bias = args.bias;
    if (bias) load_row<T>(bias_, bias.data, bias.dtype, first * bias.stride[0], bias.stride[0], count_);
  }

  // All tokens of a row.
  void update(std::int64_t row) const {
    const int last = args_.x.ndim - 1;
    const std::int64_t x_first = row * args_.x.stride[0] + first_ * args_.x.stride[last];
    const std::int64_t y_first = row * args_.y.stride[0] + first_ * args_.y.stride[last];
    const std::int64_t x_token = last == 2 ? args_.x.stride[1] : 0, y_token = last == 2 ? args_.y.stride[1] : 0;
    const std::int64_t slot = args_.state_indices ? index_at(args_.state_indices, row) : row;
    alignas(kVectorBytes) T y[kConvBlock];
    if (slot < 0) {
      clear(y);
      for (std::int64_t t = 0; t < d_.ntokens; ++t) store_outputs(y_first + t * y_token, y);
      return;
    }
    const std::int64_t state_first = offset_of(args_.state, slot, first_);
    ConvWindow<T> window(width_);
    window.load_state(args_.state, state_first, count_);
    for (std::int64_t t = 0; t < d_.ntokens; ++t) {
      load_row<T>(window.newest(), args_.x.data, args_.x.dtype, x_first + t * x_token, args_.x.stride[last], count_);
      conv_token<T>(y, window.rows(), weight_, kConvBlock, bias_, width_,
                    args_.activation == causal_conv1d::Activation::silu, count_);
      store_outputs(y_first + t * y_token, y);
      window.shift();
    }
    store_taps<T>(args_.state, state_first, count_, width_ - 1, window.rows());
  }

 private:
  static void clear(T* row) {
    for (std::int64_t c = 0; c < kConvBlock; ++c) row[c] = T(0);
  }

  void store_outputs(std::int64_t offset, const T* y) const {
    store_row<T>(args_.y.data, args_.y.dtype, offset, args_.y.stride[args_.y.ndim - 1], count_, y);
  }

  const causal_conv1d_update::Args& args_;
  const causal_conv1d_update::Dims& d_;
  const int width_;
  const std::int64_t first_;
  std::int64_t count_;
  alignas(kVectorBytes) T weight_[kMaxConvWidth * kConvBlock], bias_[kConvBlock];
};

template <class T>
void update(const causal_conv1d_update::Args& args, const causal_conv1d_update::Dims& d) {
  if (d.batch == 0) return;
  // Either several blocks of the one row that a task takes, or several rows of one block.
  const std::int64_t blocks = (d.dim + kConvBlock - 1) / kConvBlock;
  const std::int64_t units = kTaskOutputs / (kConvBlock * (d.ntokens > 0 ? d.ntokens : 1));
  const std::int64_t rows_per_task = units < 1 ? 1 : units < d.batch ? units : d.batch;
  const std::int64_t blocks_per_task = units / rows_per_task > 1 ? units / rows_per_task : 1;
  const std::int64_t row_runs = (d.batch + rows_per_task - 1) / rows_per_task;
  parallel_for(row_runs * ((blocks + blocks_per_task - 1) / blocks_per_task), [&](std::int64_t task, int) {
    const std::int64_t first_row = task % row_runs * rows_per_task, first_block = task / row_runs * blocks_per_task;
    for (std::int64_t b = first_block; b < blocks && b < first_block + blocks_per_task; ++b) {
      const Block<T> block(args, d, b * kConvBlock);
      for (std::int64_t row = first_row; row < d.batch && row < first_row + rows_per_task; ++row) block.update(row);
    }
  });
}

}  // namespace

std::size_t workspace_bytes(const causal_conv1d_update::Args&, const causal_conv1d_update::Dims&) { return 0; }

void run(const causal_conv1d_update::Args& args, const causal_conv1d_update::Dims& d) {
  args.x.dtype == DType::float64 ? update<double>(args, d) : update<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
