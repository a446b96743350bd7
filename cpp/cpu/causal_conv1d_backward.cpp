// causal_conv1d backward on the CPU
// Math     with v[j] the inputs, the w-1 of the state before those of the sequence, s[t] = bias + sum_k weight[k] v[t+k] and
//          ds[t] = dy[t] act'(s[t]):
//          dv[j] = sum_k weight[k] ds[j-k], plus dfinal_state on the last w-1;  dweight[k] = sum_t ds[t] v[t+k];  dbias = sum
//          ds
// Shapes   x, dy, dx [b,l,d]; weight, dweight [d,w]; bias, dbias [d]; states and their gradients [b,d,w-1]
// Traffic  read x and dy, write dx: 3*b*l*d*sizeof(Element); s is computed again
// Tasks    (part of the segments, block of channels); a segment is a run of tokens of one sequence. Lanes are channels; any
//          strides become contiguous T in tiles of tokens. Each part leaves its own sums of dweight and dbias
// Numerics a tile's share of dweight and dbias is summed in T, the tiles in double, the parts in order. Tiles and segments
// count
//          from the start of their sequence and parts are cut by the number of segments, so that threads change no bits
#include "conv_row.h"
#include "isa.h"
#include "parallel.h"
#include "tile.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using causal_conv1d::BackwardArgs;
using causal_conv1d::Dims;

constexpr std::int64_t kTileTokens = 64, kSegmentTokens = 8 * kTileTokens;
constexpr std::int64_t kBlockChannels = 64;  // a row of a tile is then whole cache lines
constexpr std::int64_t kMostParts = 64;      // bounds the memory of the partial sums
constexpr int kMostTaps = kMaxConvWidth - 1;

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Sequence {
  std::int64_t batch, index, first, length;
};

Sequence sequence_at(const BackwardArgs& args, const Dims& d, std::int64_t index) {
  if (!args.cu_seqlens) return {index, index, 0, d.seqlen};
  const std::int64_t first = index_at(args.cu_seqlens, index);
  return {0, index, first, index_at(args.cu_seqlens, index + 1) - first};
}

// An empty sequence has a segment too: its final state is its initial one.
std::int64_t segments_in(const Sequence& q) { return most(1, ceil_div(q.length, kSegmentTokens)); }

// How a call is cut; threads have no say.
struct Cut {
  std::int64_t segments = 0, parts, blocks;

  Cut(const BackwardArgs& args, const Dims& d) {
    for (std::int64_t s = 0; s < d.num_sequences; ++s) segments += segments_in(sequence_at(args, d, s));
    parts = least(segments, kMostParts);
    blocks = ceil_div(d.dim, kBlockChannels);
  }

  // body(sequence, first token, end) for the segments of a part, in order.
  template <class Body>
  void for_segments(const BackwardArgs& args, const Dims& d, std::int64_t part, Body&& body) const {
    const std::int64_t first = part * segments / parts, end = (part + 1) * segments / parts;
    for (std::int64_t s = 0, before = 0; s < d.num_sequences && before < end; ++s) {
      const Sequence q = sequence_at(args, d, s);
      const std::int64_t count = segments_in(q);
      for (std::int64_t i = most(first - before, 0); i < least(count, end - before); ++i)
        body(q, i * kSegmentTokens, least((i + 1) * kSegmentTokens, q.length));
      before += count;
    }
  }
};

// What a task holds of its channels, rows of kBlockChannels each. Row r of x and ds is token r - (w-1) of the tile.
template <class T>
struct Tiles {
  T *weight, *bias;   // [w], [1]
  T *x, *ds;          // [w-1 + tile tokens]
  T* dx;              // [tile tokens]
  T* dinitial_state;  // [w-1]
  T* dfinal_state;    // [w-1]

  explicit Tiles(Arena& arena) {
    weight = arena.take<T>(kMaxConvWidth * kBlockChannels);
    bias = arena.take<T>(kBlockChannels);
    for (T** rows : {&x, &ds}) *rows = arena.take<T>((kMostTaps + kTileTokens) * kBlockChannels);
    dx = arena.take<T>(kTileTokens * kBlockChannels);
    for (T** rows : {&dinitial_state, &dfinal_state}) *rows = arena.take<T>(kMostTaps * kBlockChannels);
  }
};

template <class T>
std::size_t bytes_per_thread() {
  Arena count(nullptr);
  Tiles<T>{count};
  return count.used();
}

std::int64_t sums_per_block(const Dims& d) { return (d.width + 1) * kBlockChannels; }

template <class T>
void clear(T* rows, std::int64_t count) {
  for (std::int64_t i = 0; i < count * kBlockChannels; ++i) rows[i] = T(0);
}

// d silu(v) / dv.
template <class T>
STATESCAN_INLINE Vec<T> silu_slope(Vec<T> v) {
  const Vec<T> s = sigmoid<T>(v);
  return s * fma(v, T(1) - s, splat(T(1)));
}

// ds of `count` tokens of a tile, in place of their dy. With `sums`, the double rows of dweight and dbias, adds to them.
template <class T, int kWidth>
void differentiate(const Tiles<T>& tiles, std::int64_t count, bool with_silu, double* sums) {
  for (std::int64_t lane = 0; lane < kBlockChannels; lane += kLanes<T>) {
    Vec<T> weight[kWidth], dweight[kWidth] = {}, dbias{};
    for (int k = 0; k < kWidth; ++k) weight[k] = load<T>(tiles.weight + k * kBlockChannels + lane);
    const Vec<T> bias = load<T>(tiles.bias + lane);
    for (std::int64_t t = 0; t < count; ++t) {
      const T* x = tiles.x + t * kBlockChannels + lane;
      T* const to = tiles.ds + (kWidth - 1 + t) * kBlockChannels + lane;
      Vec<T> ds = load<T>(to);
      if (with_silu) {
        Vec<T> s = bias;
#pragma GCC unroll 8
        for (int k = 0; k < kWidth; ++k) s = fma(weight[k], load<T>(x + k * kBlockChannels), s);
        ds = ds * silu_slope<T>(s);
        store<T>(to, ds);
      }
      dbias = dbias + ds;
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) dweight[k] = fma(ds, load<T>(x + k * kBlockChannels), dweight[k]);
    }
    if (!sums) continue;
    alignas(kVectorBytes) T lanes[kLanes<T>];
    for (int k = 0; k <= kWidth; ++k) {
      store<T>(lanes, k < kWidth ? dweight[k] : dbias);
      for (int i = 0; i < kLanes<T>; ++i) sums[k * kBlockChannels + lane + i] += static_cast<double>(lanes[i]);
    }
  }
}

// dv of the first `count` rows of the tile, from their ds and those of the w-1 rows after them.
template <class T, int kWidth>
void spread(const Tiles<T>& tiles, std::int64_t count) {
  for (std::int64_t lane = 0; lane < kBlockChannels; lane += kLanes<T>) {
    Vec<T> weight[kWidth];
    for (int k = 0; k < kWidth; ++k) weight[k] = load<T>(tiles.weight + k * kBlockChannels + lane);
    for (std::int64_t r = 0; r < count; ++r) {
      Vec<T> sum{};
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k)
        sum = fma(weight[k], load<T>(tiles.ds + (r + kWidth - 1 - k) * kBlockChannels + lane), sum);
      store<T>(tiles.dx + r * kBlockChannels + lane, sum);
    }
  }
}

// A block of channels.
template <class T>
class Block {
 public:
  Block(const BackwardArgs& args, const Dims& d, const Tiles<T>& tiles, std::int64_t channel)
      : args_(args),
        d_(d),
        tiles_(tiles),
        channel_(channel),
        channels_(least(kBlockChannels, d.dim - channel)),
        taps_(d.width - 1) {}

  void load_weights() const {
    clear(tiles_.weight, d_.width);
    clear(tiles_.bias, 1);
    load_taps<T>(tiles_.weight, kBlockChannels, args_.weight, offset_of(args_.weight, channel_), channels_,
                 static_cast<int>(d_.width));
    if (args_.bias)
      load_row<T>(tiles_.bias, args_.bias.data, args_.bias.dtype, offset_of(args_.bias, channel_), args_.bias.stride[0],
                  channels_);
  }

  // Tokens [begin, end) of a sequence, counted in the order of the scan. Goes through them a tile at a time; dv of a token is
  // known w-1 tokens later.
  void run_segment(const Sequence& q, std::int64_t begin, std::int64_t end, double* sums) const {
    clear(tiles_.ds, taps_);
    if (begin == 0) load_state(tiles_.x, args_.initial_state, q);
    else load_tile<T>(tiles_.x, kBlockChannels, tokens(args_.x, q, begin - taps_), taps_, channels_);
    for (std::int64_t t = begin; t < end; t += kTileTokens) {
      const std::int64_t count = least(kTileTokens, end - t);
      run_tile(q, t, count, sums);
      emit(q, t, count, begin);
      std::memmove(tiles_.x, tiles_.x + count * kBlockChannels, taps_ * kBlockChannels * sizeof(T));
      std::memmove(tiles_.ds, tiles_.ds + count * kBlockChannels, taps_ * kBlockChannels * sizeof(T));
    }
    const std::int64_t after = least(taps_, q.length - end);  // of the next segment, which sums them
    run_tile(q, end, after, nullptr);
    clear(tiles_.ds + (taps_ + after) * kBlockChannels, taps_ - after);
    emit_last(q, end, begin);
    if (begin == 0 && args_.dinitial_state) store_state(tiles_.dinitial_state, args_.dinitial_state, q);
  }

  // dx past the last packed token.
  void clear_tail() const {
    clear(tiles_.dx, kTileTokens);
    const std::int64_t first = index_at(args_.cu_seqlens, d_.num_sequences);
    for (std::int64_t t = first; t < d_.seqlen; t += kTileTokens)
      store_tile<T>(
          {args_.dx.data, args_.dx.dtype, offset_of(args_.dx, 0, t, channel_), args_.dx.stride[1], args_.dx.stride[2]},
          least(kTileTokens, d_.seqlen - t), channels_, tiles_.dx, kBlockChannels);
  }

  // dweight and dbias from the sums of the parts, `step` apart.
  void store_sums(double* sums, std::int64_t parts, std::int64_t step) const {
    for (std::int64_t part = 1; part < parts; ++part)
      for (std::int64_t i = 0; i < sums_per_block(d_); ++i) sums[i] += sums[part * step + i];
    for (std::int64_t c = 0; c < channels_; ++c) {
      for (std::int64_t k = 0; args_.dweight && k < d_.width; ++k)
        store_element<double>(args_.dweight.data, args_.dweight.dtype, offset_of(args_.dweight, channel_ + c, k),
                              sums[k * kBlockChannels + c]);
      if (args_.dbias)
        store_element<double>(args_.dbias.data, args_.dbias.dtype, offset_of(args_.dbias, channel_ + c),
                              sums[d_.width * kBlockChannels + c]);
    }
  }

 private:
  TileView tokens(const Tensor& t, const Sequence& q, std::int64_t token) const {
    const std::int64_t at = args_.reverse ? q.first + q.length - 1 - token : q.first + token;
    return {t.data, t.dtype, offset_of(t, q.batch, at, channel_), args_.reverse ? -t.stride[1] : t.stride[1], t.stride[2]};
  }

  void load_state(T* rows, const Tensor& state, const Sequence& q) const {
    clear(rows, taps_);
    if (state)
      load_taps<T>(rows, kBlockChannels, state, offset_of(state, q.index, channel_), channels_, static_cast<int>(taps_));
  }

  void store_state(const T* rows, const Tensor& state, const Sequence& q) const {
    const T* row[kMostTaps];
    for (std::int64_t k = 0; k < taps_; ++k) row[k] = rows + k * kBlockChannels;
    store_taps<T>(state, offset_of(state, q.index, channel_), channels_, static_cast<int>(taps_), row);
  }

  void run_tile(const Sequence& q, std::int64_t token, std::int64_t count, double* sums) const {
    if (count == 0) return;
    load_tile<T>(tiles_.x + taps_ * kBlockChannels, kBlockChannels, tokens(args_.x, q, token), count, channels_);
    load_tile<T>(tiles_.ds + taps_ * kBlockChannels, kBlockChannels, tokens(args_.dy, q, token), count, channels_);
    const bool with_silu = args_.activation == causal_conv1d::Activation::silu;
    with_taps(d_.width, [&](auto width) { differentiate<T, width()>(tiles_, count, with_silu, sums); });
  }

  // The first `count` rows of the tile at `token`: those before the sequence are the state's, those before the segment
  // another's.
  void emit(const Sequence& q, std::int64_t token, std::int64_t count, std::int64_t begin) const {
    with_taps(d_.width, [&](auto width) { spread<T, width()>(tiles_, count); });
    store_rows(q, token, count, begin);
  }

  void emit_last(const Sequence& q, std::int64_t end, std::int64_t begin) const {
    with_taps(d_.width, [&](auto width) { spread<T, width()>(tiles_, taps_); });
    const std::int64_t left = q.length - end;
    if (args_.dfinal_state && left < taps_) {
      load_state(tiles_.dfinal_state, args_.dfinal_state, q);
      for (std::int64_t i = left * kBlockChannels; i < taps_ * kBlockChannels; ++i)
        tiles_.dx[i] += tiles_.dfinal_state[i - left * kBlockChannels];
    }
    store_rows(q, end, taps_, begin);
  }

  void store_rows(const Sequence& q, std::int64_t token, std::int64_t count, std::int64_t begin) const {
    const std::int64_t first = token - taps_;  // of the sequence, or of the state where negative
    if (begin == 0)
      for (std::int64_t r = 0; r < count && first + r < 0; ++r)
        std::memcpy(tiles_.dinitial_state + (token + r) * kBlockChannels, tiles_.dx + r * kBlockChannels,
                    kBlockChannels * sizeof(T));
    const std::int64_t skipped = most(0, begin - first);
    if (args_.dx && skipped < count)
      store_tile<T>(tokens(args_.dx, q, first + skipped), count - skipped, channels_, tiles_.dx + skipped * kBlockChannels,
                    kBlockChannels);
  }

  const BackwardArgs& args_;
  const Dims& d_;
  const Tiles<T>& tiles_;
  const std::int64_t channel_, channels_, taps_;
};

template <class T>
void backward(const BackwardArgs& args, const Dims& d) {
  const Cut cut(args, d);
  const bool with_sums = args.dweight || args.dbias;
  const std::int64_t block_sums = sums_per_block(d), part_sums = cut.blocks * block_sums;
  Arena arena(args.workspace.data);
  double* const sums = arena.take<double>(most(1, cut.parts) * part_sums);
  char* const per_thread = static_cast<char*>(args.workspace.data) + arena.used();
  const auto tiles_of = [&](int thread) {
    Arena own(per_thread + thread * bytes_per_thread<T>());
    return Tiles<T>(own);
  };
  parallel_for(cut.parts * cut.blocks, [&](std::int64_t task, int thread) {
    const std::int64_t part = task / cut.blocks, block = task % cut.blocks;
    const Tiles<T> tiles = tiles_of(thread);
    const Block<T> channels(args, d, tiles, block * kBlockChannels);
    double* const own_sums = with_sums ? sums + part * part_sums + block * block_sums : nullptr;
    for (std::int64_t i = 0; own_sums && i < block_sums; ++i) own_sums[i] = 0;
    channels.load_weights();
    cut.for_segments(args, d, part, [&](const Sequence& q, std::int64_t begin, std::int64_t end) {
      channels.run_segment(q, begin, end, own_sums);
    });
  });
  parallel_for(cut.blocks, [&](std::int64_t block, int thread) {
    const Tiles<T> tiles = tiles_of(thread);
    const Block<T> channels(args, d, tiles, block * kBlockChannels);
    if (args.cu_seqlens && args.dx) channels.clear_tail();
    if (!with_sums) return;
    double* const own_sums = sums + block * block_sums;
    for (std::int64_t i = 0; cut.parts == 0 && i < block_sums; ++i) own_sums[i] = 0;
    channels.store_sums(own_sums, cut.parts, part_sums);
  });
}

template <class T>
std::size_t bytes_of(const BackwardArgs& args, const Dims& d) {
  const Cut cut(args, d);
  Arena count(nullptr);
  count.take<double>(most(1, cut.parts) * cut.blocks * sums_per_block(d));
  return count.used() + max_threads() * bytes_per_thread<T>();
}

}  // namespace

std::size_t workspace_bytes(const BackwardArgs& args, const Dims& d) {
  return args.x.dtype == DType::float64 ? bytes_of<double>(args, d) : bytes_of<float>(args, d);
}

void run(const BackwardArgs& args, const Dims& d) {
  args.x.dtype == DType::float64 ? backward<double>(args, d) : backward<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
