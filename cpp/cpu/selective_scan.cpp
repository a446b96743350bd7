// selective_scan on the CPU
// Math     h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t];  y[t] = C[t] . h[t] + D x[t], times silu(z[t])
// Shapes   x, dt, z, y [b,l,d]; A, state [d,n]; B, C [b,l,g,n] or [d,n]
// Traffic  read x, dt, z, write y once: 4 b l d elements; B and C once a block of channels, from the nearest caches
// Tasks    one a (sequence, block of channels of one group); lanes are channels, and the block walks the sequence in tiles
//          of tokens, converted to contiguous T, with some states of one vector of channels in registers over a whole tile
// Numerics a channel sees the same operations wherever it lies in a vector, a batch or a packing
#include "isa.h"
#include "norm_row.h"
#include "parallel.h"
#include "positions.h"
#include "selective_tile.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using selective_scan::Args;
using selective_scan::Dims;

constexpr std::int64_t kTileTokens = 32;
constexpr int kMostVectors = 4;  // of channels in a block: a token's row is then 256 bytes of float32, whole cache lines

// How the channels are cut into blocks. No block crosses a group; the cut changes no bits.
struct Cut {
  std::int64_t channels_per_group, width, blocks_per_group, blocks;
};

template <class T>
Cut cut_channels(const Dims& d) {
  Cut cut{};
  cut.channels_per_group = d.ngroups > 0 ? d.dim / d.ngroups : 0;
  const std::int64_t vectors = (cut.channels_per_group + kLanes<T> - 1) / kLanes<T>;
  // Wide blocks share the loads of B and C; narrow ones give every thread a few tasks.
  const std::int64_t wanted = 4 * max_threads();
  std::int64_t each = kMostVectors;
  while (each > 1 && d.num_sequences * d.ngroups * ((vectors + each - 1) / each) < wanted) each /= 2;
  cut.width = each * kLanes<T>;
  cut.blocks_per_group = (vectors + each - 1) / each;
  cut.blocks = cut.blocks_per_group * d.ngroups;
  return cut;
}

// What a task holds of its channels, [..][width] each.
template <class T, int kParts>
struct Block {
  std::int64_t width, dstate;
  T* state[kParts];             // [n]
  T* rate[kParts];              // [n]: A, its real part scaled by kRateScale
  T *B[kParts], *C[kParts];     // [n] when time-invariant; else [tile tokens][n] without the channel axis
  T *D, *dt_bias;
  T *dt, *u, *y;                // [tile tokens]; u = dt x
};

template <class T, int kParts>
Block<T, kParts> lay_out(Arena& arena, const Dims& d, std::int64_t width) {
  Block<T, kParts> block;
  block.width = width, block.dstate = d.dstate;
  for (int part = 0; part < kParts; ++part) {
    block.state[part] = arena.take<T>(d.dstate * width);
    block.rate[part] = arena.take<T>(d.dstate * width);
    block.B[part] = arena.take<T>(d.dstate * (d.varying_B ? kTileTokens : width));
    block.C[part] = arena.take<T>(d.dstate * (d.varying_C ? kTileTokens : width));
  }
  for (T** row : {&block.D, &block.dt_bias}) *row = arena.take<T>(width);
  for (T** tile : {&block.dt, &block.u, &block.y}) *tile = arena.take<T>(kTileTokens * width);
  return block;
}

template <class T, int kParts>
std::size_t bytes_per_thread(const Dims& d) {
  Arena count(nullptr);
  lay_out<T, kParts>(count, d, cut_channels<T>(d).width);
  return count.used();
}

// One vector of channels and kStates states through a tile: y += C . h.
template <class T, int kParts, int kStates, bool kVaryingB, bool kVaryingC>
STATESCAN_INLINE void scan_states(const Block<T, kParts>& block, std::int64_t lane, std::int64_t n, std::int64_t count,
                                  bool reverse) {
  using P = Parts<T, kParts>;
  const std::int64_t width = block.width;
  P h[kStates];
#pragma GCC unroll 16
  for (int k = 0; k < kStates; ++k)
    for (int part = 0; part < kParts; ++part) h[k].part[part] = load<T>(block.state[part] + (n + k) * width + lane);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = reverse ? count - 1 - i : i;
    const Vec<T> dt = load<T>(block.dt + t * width + lane), u = load<T>(block.u + t * width + lane);
    Vec<T> sum{};
#pragma GCC unroll 16
    for (int k = 0; k < kStates; ++k) {
      P rate, B, C;
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        rate.part[part] = load<T>(block.rate[part] + (n + k) * width + lane);
        B.part[part] = projection<T, kVaryingB>(block.B[part], t * block.dstate + n + k, (n + k) * width + lane);
        C.part[part] = projection<T, kVaryingC>(block.C[part], t * block.dstate + n + k, (n + k) * width + lane);
      }
      h[k] = advance<T, kParts>(decay<T, kParts>(dt, rate), h[k], u, B);
      sum = read_out<T, kParts>(C, h[k], sum);
    }
    const Vec<T> y = load<T>(block.y + t * width + lane);
    store<T>(block.y + t * width + lane, kParts == 1 ? y + sum : fma(splat(T(2)), sum, y));
  }
#pragma GCC unroll 16
  for (int k = 0; k < kStates; ++k)
    for (int part = 0; part < kParts; ++part) store<T>(block.state[part] + (n + k) * width + lane, h[k].part[part]);
}

template <class T, int kParts, bool kVaryingB, bool kVaryingC>
void scan_tile(const Block<T, kParts>& block, std::int64_t count, bool reverse) {
  // As many states as the registers hold beside the polynomial of exp; sin and cos take more.
  constexpr int kStates = (kVectorBytes == 64 ? 16 : 8) / (kParts == 1 ? 1 : 4);
  for (std::int64_t lane = 0; lane < block.width; lane += kLanes<T>) {
    std::int64_t n = 0;
    for (; n + kStates <= block.dstate; n += kStates)
      scan_states<T, kParts, kStates, kVaryingB, kVaryingC>(block, lane, n, count, reverse);
    if constexpr (kParts == 1)
      for (; n + 4 <= block.dstate; n += 4) scan_states<T, kParts, 4, kVaryingB, kVaryingC>(block, lane, n, count, reverse);
    for (; n < block.dstate; ++n) scan_states<T, kParts, 1, kVaryingB, kVaryingC>(block, lane, n, count, reverse);
  }
}

// dt, u and y = D x of a tile.
template <class T, int kParts>
void enter_tile(const Block<T, kParts>& block, const Args& args, std::int64_t count) {
  const T dt_min = static_cast<T>(args.dt_min), dt_max = static_cast<T>(args.dt_max);
  for (std::int64_t lane = 0; lane < block.width; lane += kLanes<T>) {
    const Vec<T> bias = load<T>(block.dt_bias + lane), D = load<T>(block.D + lane);
    for (std::int64_t i = lane; i < count * block.width; i += block.width) {
      const Vec<T> dt = discretise<T>(load<T>(block.dt + i), bias, args.dt_softplus, dt_min, dt_max);
      const Vec<T> x = load<T>(block.u + i);
      store<T>(block.dt + i, dt);
      store<T>(block.u + i, dt * x);
      store<T>(block.y + i, D * x);
    }
  }
}

// Writes the states, [n][width], of `channels` from `channel` on to a tensor [.., d, n].
template <class T, int kParts>
void store_states(const Tensor& t, std::int64_t first, std::int64_t channels, const Block<T, kParts>& block) {
  store_parts<T, kParts>(t, first, t.stride[t.ndim - 1], block.dstate, t.stride[t.ndim - 2], channels, block.state,
                         block.width);
}

template <class T, int kParts>
void clear_states(const Block<T, kParts>& block) {
  for (T* part : block.state)
    for (std::int64_t i = 0; i < block.dstate * block.width; ++i) part[i] = T(0);
}

template <class T, int kParts>
void scan_sequence(const Block<T, kParts>& block, const Args& args, const Dims& d, const Tokens& sequence,
                   std::int64_t state_row, std::int64_t group, std::int64_t channel, std::int64_t channels) {
  const std::int64_t width = block.width;
  load_per_state<T, kParts>(block.rate, width, args.A, channel * args.A.stride[0], channels, d.dstate);
  for (std::int64_t i = 0; i < d.dstate * width; ++i) block.rate[0][i] *= kRateScale<T>;
  if (!d.varying_B) load_per_state<T, kParts>(block.B, width, args.B, channel * args.B.stride[0], channels, d.dstate);
  if (!d.varying_C) load_per_state<T, kParts>(block.C, width, args.C, channel * args.C.stride[0], channels, d.dstate);
  load_per_channel<T>(block.D, width, args.D, channel, channels);
  load_per_channel<T>(block.dt_bias, width, args.dt_bias, channel, channels);
  Positions positions(args.state_positions, state_row, sequence.count);
  clear_states(block);
  positions.for_outside([&](std::int64_t k) {
    store_states(args.position_states, offset_of(args.position_states, state_row, k, channel), channels, block);
  });
  if (const Tensor& start = args.initial_state)
    load_per_state<T, kParts>(block.state, width, start, offset_of(start, state_row, channel), channels, d.dstate);
  // Tiles end where a state is wanted; where they end changes no bits.
  const auto store_wanted = [&](std::int64_t done) {
    for (; positions.next() == done; positions.pop())
      store_states(args.position_states, offset_of(args.position_states, state_row, positions.index(), channel), channels,
                   block);
  };

  const auto scan = d.varying_B ? (d.varying_C ? scan_tile<T, kParts, true, true> : scan_tile<T, kParts, true, false>)
                                : (d.varying_C ? scan_tile<T, kParts, false, true> : scan_tile<T, kParts, false, false>);
  store_wanted(0);
  for (std::int64_t done = 0, count = 0; done < sequence.count; done += count) {
    const std::int64_t left = sequence.count - done, to_wanted = positions.next() - done;
    count = left < kTileTokens ? left : kTileTokens;
    if (to_wanted < count) count = to_wanted;
    const Tokens tokens{sequence.batch, sequence.first + (args.reverse ? left - count : done), count};
    load_tile<T>(block.dt, width, token_tile(args.dt, tokens, channel), count, channels);
    load_tile<T>(block.u, width, token_tile(args.x, tokens, channel), count, channels);
    if (d.varying_B) load_projection<T, kParts>(block.B, args.B, tokens, group);
    if (d.varying_C) load_projection<T, kParts>(block.C, args.C, tokens, group);
    enter_tile<T, kParts>(block, args, count);
    scan(block, count, args.reverse);
    if (args.z) {
      load_tile<T>(block.u, width, token_tile(args.z, tokens, channel), count, channels);
      gate_row<T>(block.y, block.y, block.u, count * width);
    }
    store_tile<T>(token_tile(args.y, tokens, channel), count, channels, block.y, width);
    store_wanted(done + count);
  }
  if (args.final_state) store_states(args.final_state, offset_of(args.final_state, state_row, channel), channels, block);
}

// Tokens past the last packed sequence.
template <class T>
void clear_tail(T* zeros, std::int64_t width, const Args& args, const Tokens& tail, std::int64_t channel,
                std::int64_t channels) {
  for (std::int64_t i = 0; i < kTileTokens * width; ++i) zeros[i] = T(0);
  for (std::int64_t done = 0; done < tail.count; done += kTileTokens) {
    const std::int64_t left = tail.count - done, count = left < kTileTokens ? left : kTileTokens;
    store_tile<T>(token_tile(args.y, {tail.batch, tail.first + done, count}, channel), count, channels, zeros, width);
  }
}

template <class T, int kParts>
void run_as(const Args& args, const Dims& d) {
  const Cut cut = cut_channels<T>(d);
  const std::size_t bytes = bytes_per_thread<T, kParts>(d);
  const std::int64_t tails = args.cu_seqlens ? 1 : 0;
  parallel_for((d.num_sequences + tails) * cut.blocks, [&](std::int64_t task, int thread) {
    const std::int64_t s = task / cut.blocks, group = task % cut.blocks / cut.blocks_per_group;
    const std::int64_t within = task % cut.blocks_per_group * cut.width;
    const std::int64_t channel = group * cut.channels_per_group + within, left = cut.channels_per_group - within;
    const std::int64_t channels = left < cut.width ? left : cut.width;
    Arena arena(static_cast<char*>(args.workspace.data) + thread * bytes);
    const Block<T, kParts> block = lay_out<T, kParts>(arena, d, cut.width);
    if (!args.cu_seqlens) {
      scan_sequence<T, kParts>(block, args, d, {s, 0, d.seqlen}, s, group, channel, channels);
      return;
    }
    const std::int64_t first = index_at(args.cu_seqlens, s);
    if (s == d.num_sequences) {
      clear_tail<T>(block.y, cut.width, args, {0, first, d.seqlen - first}, channel, channels);
      return;
    }
    const Tokens sequence{0, first, index_at(args.cu_seqlens, s + 1) - first};
    scan_sequence<T, kParts>(block, args, d, sequence, s, group, channel, channels);
  });
}

}  // namespace

std::size_t workspace_bytes(const Args& args, const Dims& d) {
  if (args.x.dtype == DType::float64)
    return max_threads() * (d.complex_A ? bytes_per_thread<double, 2>(d) : bytes_per_thread<double, 1>(d));
  return max_threads() * (d.complex_A ? bytes_per_thread<float, 2>(d) : bytes_per_thread<float, 1>(d));
}

void run(const Args& args, const Dims& d) {
  if (args.x.dtype == DType::float64) d.complex_A ? run_as<double, 2>(args, d) : run_as<double, 1>(args, d);
  else d.complex_A ? run_as<float, 2>(args, d) : run_as<float, 1>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
