// causal_conv1d forward on the CPU
// Math     y[t] = act(bias + sum_k weight[k] x[t-w+1+k]), channel by channel; reverse mirrors the time axis
// Shapes   x, y [b,l,d]; weight [d,w]; states [b,d,w-1]
// Traffic  read x, write y: 2*b*l*d*sizeof(Element)
// Tasks    (batch row, run of tokens, run of channels); vectors run over channels when those are contiguous (channels-last),
//          else over time (channels-first, and any other strides)
// Numerics bias, then the taps from the oldest input on; an output depends on its own window alone
#include <type_traits>

#include "conv_row.h"
#include "isa.h"
#include "parallel.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using causal_conv1d::Args;
using causal_conv1d::Dims;

constexpr std::int64_t kTaskOutputs = 65536;  // 20 to 100 us of work
constexpr int kTile = 8;                      // tokens that share one load of the weights, and most loads of x
constexpr int kAhead = 512;                   // bytes from a tile to what it fetches: the arithmetic of SiLU hides no miss
constexpr std::int64_t kTimeBlock = 1024;     // tokens of one channel that are widened at once

std::int64_t at_most(std::int64_t v, std::int64_t limit) { return v < limit ? v : limit; }
std::int64_t at_least(std::int64_t v, std::int64_t limit) { return v > limit ? v : limit; }

// Tokens [first, last) of a batch row, and whose state they start from. Inside a sequence, tokens are numbered in the order
// in which the convolution sees them: from the right when it is reversed.
struct Sequence {
  std::int64_t batch, index, first, last;
};

template <class T>
struct Weights {
  const T* weight;  // [w, stride], stride leaves room to read whole vectors
  const T* bias;
  std::int64_t stride;
};

// Every output of one vector of channels in a tile of tokens. x points at the oldest input of the first output.
template <class T, DType kIn, DType kOut, int kWidth>
STATESCAN_INLINE void convolve_tile(Memory<kOut>* y, std::int64_t y_step, const Memory<kIn>* x, std::int64_t x_step,
                                    const Weights<T>& weights, std::int64_t channel, bool with_silu) {
  for (int t = 0; t < kTile; ++t) {
    __builtin_prefetch(x + (t + kWidth - 1) * x_step + kAhead / sizeof(*x));
    __builtin_prefetch(y + t * y_step + kAhead / sizeof(*y), 1);
  }
  Vec<T> w[kWidth], sum[kTile];
  for (int k = 0; k < kWidth; ++k) w[k] = load<T>(weights.weight + k * weights.stride + channel);
  for (int t = 0; t < kTile; ++t) sum[t] = load<T>(weights.bias + channel);
#pragma GCC unroll 16
  for (int i = 0; i < kTile + kWidth - 1; ++i) {
    const Vec<T> input = load_as<T, kIn>(x + i * x_step);
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k)
      if (i - k >= 0 && i - k < kTile) sum[i - k] = sum[i - k] + w[k] * input;
  }
  for (int t = 0; t < kTile; ++t) store_as<T, kOut>(y + t * y_step, activate<T>(sum[t], with_silu));
}

// At least kTile tokens of at least kLanes<T> contiguous channels. The last tile and the last vector reach back over outputs
// that are already there, and write the same values again.
template <class T, DType kIn, DType kOut, int kWidth>
void convolve_tokens(Memory<kOut>* y, std::int64_t y_step, const Memory<kIn>* x, std::int64_t x_step,
                     const Weights<T>& weights, bool with_silu, std::int64_t tokens, std::int64_t channels) {
  for (std::int64_t i = 0; i < tokens; i += kTile) {
    const std::int64_t t = at_most(i, tokens - kTile);
    for (std::int64_t j = 0; j < channels; j += kLanes<T>) {
      const std::int64_t c = at_most(j, channels - kLanes<T>);
      convolve_tile<T, kIn, kOut, kWidth>(y + t * y_step + c, y_step, x + t * x_step + c, x_step, weights, c, with_silu);
    }
  }
}

// At least kLanes<T> contiguous tokens of one channel, none of which needs the state. x points at the oldest input of the
// output at y; newer ones follow by step, which is -1 when the time axis is reversed. Several vectors at once, since the
// arithmetic of one waits for itself.
template <class T, DType kIn, DType kOut, int kWidth>
void convolve_channel(Memory<kOut>* y, const Memory<kIn>* x, int step, const Weights<T>& weights, std::int64_t channel,
                      bool with_silu, std::int64_t tokens) {
  Vec<T> w[kWidth];
  for (int k = 0; k < kWidth; ++k) w[k] = splat(weights.weight[k * weights.stride + channel]);
  const Vec<T> bias = splat(weights.bias[channel]);
  auto span = [&](std::int64_t t, auto vectors) {
    Vec<T> sum[vectors()];
    for (int v = 0; v < vectors(); ++v) sum[v] = bias;
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k)
      for (int v = 0; v < vectors(); ++v) sum[v] = sum[v] + w[k] * load_as<T, kIn>(x + t + v * kLanes<T> + k * step);
    for (int v = 0; v < vectors(); ++v) store_as<T, kOut>(y + t + v * kLanes<T>, activate<T>(sum[v], with_silu));
  };
  constexpr int kVectors = 4;
  std::int64_t i = 0;
  for (; i + kVectors * kLanes<T> <= tokens; i += kVectors * kLanes<T>) span(i, std::integral_constant<int, kVectors>{});
  for (; i < tokens; i += kLanes<T>) span(at_most(i, tokens - kLanes<T>), std::integral_constant<int, 1>{});
}

template <class T, DType kIn, DType kOut = kIn>
class Convolution {
 public:
  Convolution(const Args& args, const Dims& d) : args_(args), d_(d), width_(static_cast<int>(d.width)) {
    Arena arena(args.workspace.data);
    prepare_weights(arena);
  }

  static std::size_t workspace_bytes(const Dims& d) {
    Arena count(nullptr);
    count.take<T>((d.width + 1) * stride(d));
    return count.used();
  }

  void run() {
    const bool over_channels = args_.x.stride[2] == 1 && args_.y.stride[2] == 1 && d_.dim >= kLanes<T>;
    const std::int64_t tokens_per_task =
        over_channels ? at_least(kTaskOutputs / d_.dim / kTile * kTile, kTile) : at_least(at_most(d_.seqlen, kTaskOutputs), 1);
    const std::int64_t channels_per_task = over_channels ? d_.dim : at_least(kTaskOutputs / tokens_per_task, 1);
    const std::int64_t token_runs = (d_.seqlen + tokens_per_task - 1) / tokens_per_task;
    const std::int64_t channel_runs = d_.dim > 0 ? (d_.dim + channels_per_task - 1) / channels_per_task : 0;
    parallel_for(d_.batch * token_runs * channel_runs, [&](std::int64_t task, int) {
      const Box box = {task / (token_runs * channel_runs), task / channel_runs % token_runs * tokens_per_task, tokens_per_task,
                       task % channel_runs * channels_per_task, channels_per_task};
      over_channels ? run_box<true>(box) : run_box<false>(box);
    });
    if (args_.final_state) store_final_states();
  }

 private:
  // Where a task works; the sizes may reach past the end of their axis.
  struct Box {
    std::int64_t batch, token, tokens, channel, channels;
  };

  static std::int64_t stride(const Dims& d) { return d.dim + kLanes<T>; }

  void prepare_weights(Arena& arena) {
    T* memory = arena.take<T>((d_.width + 1) * stride(d_));
    T* bias = memory + d_.width * stride(d_);
    load_taps<T>(memory, stride(d_), args_.weight, 0, d_.dim, width_);
    if (args_.bias) load_row<T>(bias, args_.bias.data, args_.bias.dtype, 0, args_.bias.stride[0], d_.dim);
    else for (std::int64_t c = 0; c < d_.dim; ++c) bias[c] = T(0);
    weights_ = {memory, bias, stride(d_)};
  }

  // Index of a sequence's token and channel in x or y.
  std::int64_t at(const Tensor& t, const Sequence& q, std::int64_t token, std::int64_t channel) const {
    return offset_of(t, q.batch, args_.reverse ? q.last - 1 - token : q.first + token, channel);
  }

  Sequence sequence(std::int64_t index) const {
    if (!args_.cu_seqlens) return {index, index, 0, d_.seqlen};
    return {0, index, index_at(args_.cu_seqlens, index), index_at(args_.cu_seqlens, index + 1)};
  }

  bool with_silu() const { return args_.activation == causal_conv1d::Activation::silu; }

  // The sequences that meet the tokens of a box, and zeros past the last one.
  template <bool kOverChannels>
  void run_box(const Box& box) const {
    const std::int64_t begin = box.token, end = at_most(box.token + box.tokens, d_.seqlen);
    const std::int64_t channel_end = at_most(box.channel + box.channels, d_.dim);
    if (!args_.cu_seqlens) return run_part<kOverChannels>(sequence(box.batch), begin, end, box.channel, channel_end);
    std::int64_t low = 0, high = d_.num_sequences;  // the first sequence that ends after `begin`
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (index_at(args_.cu_seqlens, middle + 1) > begin) high = middle;
      else low = middle + 1;
    }
    std::int64_t done = begin;
    for (std::int64_t s = low; s < d_.num_sequences && done < end; ++s) {
      const Sequence q = sequence(s);
      const std::int64_t stop = at_most(q.last, end);
      if (stop > done) run_part<kOverChannels>(q, done, stop, box.channel, channel_end);
      done = stop;
    }
    if (done < end) clear(done, end, box.channel, channel_end);
  }

  // Tokens [begin, end) of the time axis, all of sequence q.
  template <bool kOverChannels>
  void run_part(const Sequence& q, std::int64_t begin, std::int64_t end, std::int64_t channel, std::int64_t channel_end) const {
    if constexpr (!kOverChannels) {
      // [inner, inner_end) needs no state.
      std::int64_t inner = args_.reverse ? begin : at_most(at_least(begin, q.first + d_.width - 1), end);
      std::int64_t inner_end = args_.reverse ? at_least(at_most(end, q.last - (d_.width - 1)), begin) : end;
      const bool contiguous = args_.x.stride[1] == 1 && args_.y.stride[1] == 1;
      if (!contiguous || inner_end - inner < kLanes<T>) inner = inner_end = begin;
      for (std::int64_t c = channel; c < channel_end; ++c) {
        widen_channel(q, begin, inner, c);
        if (inner < inner_end) run_channel(q, inner, inner_end, c);
        widen_channel(q, inner_end, end, c);
      }
    } else {
      const std::int64_t first = args_.reverse ? q.last - end : begin - q.first, last = first + (end - begin);
      const std::int64_t inner = at_least(first, at_most(d_.width - 1, last));  // from here on no state is needed
      if (last - inner < kTile) return run_edge(q, first, last);
      run_edge(q, first, inner);
      const std::int64_t step = args_.reverse ? -1 : 1;
      auto* y = static_cast<Memory<kOut>*>(args_.y.data) + at(args_.y, q, inner, 0);
      const auto* x = static_cast<const Memory<kIn>*>(args_.x.data) + at(args_.x, q, inner - (d_.width - 1), 0);
      with_taps(d_.width, [&](auto width) {
        convolve_tokens<T, kIn, kOut, width()>(y, step * args_.y.stride[1], x, step * args_.x.stride[1], weights_, with_silu(),
                                            last - inner, d_.dim);
      });
    }
  }

  // A few tokens of all channels, those that reach into the state among them.
  void run_edge(const Sequence& q, std::int64_t first, std::int64_t last) const {
    if (first == last) return;
    alignas(kVectorBytes) T y[kConvBlock];
    for (std::int64_t c = 0; c < d_.dim; c += kConvBlock) {
      const std::int64_t count = at_most(d_.dim - c, kConvBlock);
      ConvWindow<T> window(width_);
      if (first < d_.width - 1)
        window.load_state(args_.initial_state, args_.initial_state ? offset_of(args_.initial_state, q.index, c) : 0, count);
      for (std::int64_t t = at_least(first - (d_.width - 1), 0); t < last; ++t) {
        load_row<T>(window.newest(), args_.x.data, args_.x.dtype, at(args_.x, q, t, c), 1, count);
        if (t >= first) {
          conv_token<T>(y, window.rows(), weights_.weight + c, weights_.stride, weights_.bias + c, width_, with_silu(), count);
          store_row<T>(args_.y.data, args_.y.dtype, at(args_.y, q, t, c), 1, count, y);
        }
        window.shift();
      }
    }
  }

  void run_channel(const Sequence& q, std::int64_t begin, std::int64_t end, std::int64_t channel) const {
    const std::int64_t before = args_.reverse ? -(d_.width - 1) : d_.width - 1;
    auto* y = static_cast<Memory<kOut>*>(args_.y.data) + offset_of(args_.y, q.batch, begin, channel);
    const auto* x = static_cast<const Memory<kIn>*>(args_.x.data) + offset_of(args_.x, q.batch, begin - before, channel);
    with_taps(d_.width, [&](auto width) {
      convolve_channel<T, kIn, kOut, width()>(y, x, args_.reverse ? -1 : 1, weights_, channel, with_silu(), end - begin);
    });
  }

  // Tokens of one channel that need the state, or have strides.
  void widen_channel(const Sequence& q, std::int64_t begin, std::int64_t end, std::int64_t channel) const {
    for (std::int64_t t = begin; t < end; t += kTimeBlock) widen_block(q, t, at_most(t + kTimeBlock, end), channel);
  }

  // Tokens [begin, end) of the time axis, at most kTimeBlock of one channel, widened together with the w-1 inputs before them
  // (after them when reversed).
  void widen_block(const Sequence& q, std::int64_t begin, std::int64_t end, std::int64_t channel) const {
    alignas(kVectorBytes) T x[kTimeBlock + kLanes<T> + kMaxConvWidth], y[kTimeBlock];
    const std::int64_t before = args_.reverse ? 0 : d_.width - 1, after = args_.reverse ? d_.width - 1 : 0;
    const std::int64_t low = at_least(begin - before, q.first), high = at_most(end + after, q.last);
    auto input = [&](std::int64_t t) -> T* { return x + (t - begin + before); };
    load_row<T>(input(low), args_.x.data, args_.x.dtype, offset_of(args_.x, q.batch, low, channel), args_.x.stride[1],
                high - low);
    for (std::int64_t t = begin - before; t < low; ++t) *input(t) = state_at(q, d_.width - 1 - (q.first - t), channel);
    for (std::int64_t t = high; t < end + after; ++t) *input(t) = state_at(q, d_.width - 2 - (t - q.last), channel);
    const std::int64_t whole = (end - begin + kLanes<T> - 1) / kLanes<T> * kLanes<T>;  // the buffers have room
    with_taps(d_.width, [&](auto width) {
      constexpr DType kT = kDTypeOf<T>;
      convolve_channel<T, kT, kT, width()>(y, args_.reverse ? x + d_.width - 1 : x, args_.reverse ? -1 : 1, weights_, channel,
                                           with_silu(), whole);
    });
    store_row<T>(args_.y.data, args_.y.dtype, offset_of(args_.y, q.batch, begin, channel), args_.y.stride[1], end - begin, y);
  }

  T state_at(const Sequence& q, std::int64_t tap, std::int64_t channel) const {
    const Tensor& state = args_.initial_state;
    return state ? load_element<T>(state.data, state.dtype, offset_of(state, q.index, channel, tap)) : T(0);
  }

  void clear(std::int64_t begin, std::int64_t end, std::int64_t channel, std::int64_t channel_end) const {
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t c = channel; c < channel_end; ++c)
        static_cast<Memory<kOut>*>(args_.y.data)[offset_of(args_.y, 0, t, c)] = Memory<kOut>(0);
  }

  // The last w-1 inputs of each sequence, its initial state included when it is shorter.
  void store_final_states() const {
    const std::int64_t blocks = (d_.dim + kConvBlock - 1) / kConvBlock;
    for (std::int64_t unit = 0; unit < d_.num_sequences * blocks; ++unit) {
      const Sequence q = sequence(unit / blocks);
      const std::int64_t c = unit % blocks * kConvBlock, count = at_most(d_.dim - c, kConvBlock);
      const std::int64_t length = q.last - q.first;
      ConvWindow<T> window(width_);
      if (length < d_.width - 1)
        window.load_state(args_.initial_state, args_.initial_state ? offset_of(args_.initial_state, q.index, c) : 0, count);
      for (std::int64_t t = at_least(length - (d_.width - 1), 0); t < length; ++t) {
        load_row<T>(window.newest(), args_.x.data, args_.x.dtype, at(args_.x, q, t, c), args_.x.stride[2], count);
        window.shift();
      }
      store_taps<T>(args_.final_state, offset_of(args_.final_state, q.index, c), count, width_ - 1, window.rows());
    }
  }

  const Args& args_;
  const Dims& d_;
  const int width_;
  Weights<T> weights_;
};

}  // namespace

std::size_t workspace_bytes(const Args& args, const Dims& d) {
  return args.x.dtype == DType::float64 ? Convolution<double, DType::float64>::workspace_bytes(d)
                                        : Convolution<float, DType::float32>::workspace_bytes(d);
}

// The contract gives y the dtype of x; mamba2_scan also calls with a wider y, its scratch.
void run(const Args& args, const Dims& d) {
  const bool widen = args.y.dtype != args.x.dtype;
  switch (args.x.dtype) {
    case DType::float64: return Convolution<double, DType::float64>(args, d).run();
    case DType::float16:
      if (widen) return Convolution<float, DType::float16, DType::float32>(args, d).run();
      return Convolution<float, DType::float16>(args, d).run();
    case DType::bfloat16:
      if (widen) return Convolution<float, DType::bfloat16, DType::float32>(args, d).run();
      return Convolution<float, DType::bfloat16>(args, d).run();
    default: return Convolution<float, DType::float32>(args, d).run();
  }
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
