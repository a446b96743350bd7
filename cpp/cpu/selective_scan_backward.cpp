// selective_scan backward on the CPU
// Math     with a[t] = exp(dt[t] A), u = dt x, g[t] the gradient of y before the gate (twice that where A is complex), and the
//          adjoint of the state p[t] = conj(C[t]) g[t] + conj(a[t+1]) p[t+1]:
//            dC[t] = g conj(h[t])            dB[t] = u p[t]           q[t] = p[t] conj(a[t] h[t-1])
//            du[t] = Re(conj(B[t]) . p[t])   dA = sum_t dt q[t]       dx[t] = dt du + D g
//            ddt[t] = (Re(conj(A) . q[t]) + x du) * (slope of softplus and limit)
//          A complex gradient is dL/dRe + i dL/dIm, as torch's
// Shapes   x, dt, z, dy, dx, ddt, dz [b,l,d]; A, states [d,n]; B, C [b,l,g,n] or [d,n]
// Traffic  read x, dt twice, z, dy, write dx, ddt, dz: 9 b l d elements; the partial dB and dC of each block of channels,
// written
//          and read once, 4 b l n elements a block; states at the start of each tile stay with their task
// Tasks    (part of the sequences, block of channels of one group). Lanes are channels. A task walks a sequence in tiles,
// keeping
//          the state before each, then goes back: it runs a tile again, keeps the states of a few vectors of channels at every
//          token, and takes the adjoints through it. At last the blocks' dB and dC are added up
// Numerics a tile's share of a sum over time is made in T, the tiles' and the sequences' in double; dB and dC are summed over
//          channels lane by lane, then over lanes, then over blocks. Blocks and parts are cut by the shape alone
#include <type_traits>

#include "isa.h"
#include "parallel.h"
#include "selective_tile.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using selective_scan::BackwardArgs;
using selective_scan::Dims;

constexpr std::int64_t kTileTokens = 64;     // from one kept state to the next
constexpr std::int64_t kBlockChannels = 64;  // of a block, or a multiple where that bounds the blocks, whose dB and dC are kept
constexpr std::int64_t kMostBlocks = 40;
constexpr std::int64_t kMostParts = 32;  // bounds the memory of the partial sums

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The tokens of a sequence, and the row of its states.
struct Sequence {
  std::int64_t batch, first, length, index;
};

Sequence sequence_at(const BackwardArgs& args, const Dims& d, std::int64_t index) {
  if (!args.cu_seqlens) return {index, 0, d.seqlen, index};
  const std::int64_t first = index_at(args.cu_seqlens, index);
  return {0, first, index_at(args.cu_seqlens, index + 1) - first, index};
}

// Tokens of the first row that belong to a sequence; every token without packing.
std::int64_t used_tokens(const BackwardArgs& args, const Dims& d) {
  return args.cu_seqlens ? index_at(args.cu_seqlens, d.num_sequences) : d.seqlen;
}

// How a call is cut. Threads have no say, for the cut decides the order of the sums.
struct Cut {
  std::int64_t channels_per_group, width, blocks_per_group, blocks, parts, tiles;
};

template <class T>
Cut cut_of(const BackwardArgs& args, const Dims& d) {
  Cut cut{};
  cut.channels_per_group = d.ngroups > 0 ? d.dim / d.ngroups : 0;
  const std::int64_t channels = most(1, cut.channels_per_group);
  cut.width = kBlockChannels * ceil_div(channels, kBlockChannels * kMostBlocks);
  cut.width = least(cut.width, ceil_div(channels, kLanes<T>) * kLanes<T>);
  cut.blocks_per_group = ceil_div(cut.channels_per_group, cut.width);
  cut.blocks = cut.blocks_per_group * d.ngroups;
  cut.parts = least(d.num_sequences, kMostParts);
  for (std::int64_t s = 0; s < d.num_sequences; ++s)
    cut.tiles = most(cut.tiles, ceil_div(sequence_at(args, d, s).length, kTileTokens));
  return cut;
}

// States and vectors of channels that go through a tile together: what is kept of them should stay in the nearest cache, their
// adjoints and sums in registers.
template <int kParts>
inline constexpr int kStatesAtOnce = kParts == 1 ? 2 : 1;
inline constexpr int kVectorsAtOnce = kVectorBytes == 64 ? 4 : 2;

// What a task holds of its channels.
template <class T, int kParts>
struct Block {
  std::int64_t width, dstate;
  T *A[kParts], *rate[kParts];       // [n][width]; the real part of rate is scaled by kRateScale
  T *B[kParts], *C[kParts];          // [n][width] when time-invariant, else [tile tokens][n]
  T *D, *dt_bias;                    // [width]
  T *dt, *slope, *x, *g, *y, *z;     // [tile tokens][width]; z is made into dy silu'(z), slope is that of dt
  T *du, *ddt;                       // [tile tokens][width]
  T* state[kParts];                  // [tiles][n][width], before each tile
  T* adjoint[kParts];                // [n][width], what the tokens to come add to the adjoint of the last state
  T *kept[kParts], *factor[kParts];  // [tile tokens + 1], [tile tokens] of the states that go together: h before each token,
  T* from_one;                       // and the step from it
  T *dB_lanes[kParts], *dC_lanes[kParts];  // [tile tokens][n] vectors, sums over the vectors of channels

  T* state_before(int part, std::int64_t tile) const { return state[part] + tile * dstate * width; }
};

template <class T, int kParts>
Block<T, kParts> lay_out(Arena& arena, const Dims& d, const Cut& cut) {
  Block<T, kParts> block;
  block.width = cut.width, block.dstate = d.dstate;
  const std::int64_t states = d.dstate * cut.width, together = kStatesAtOnce<kParts> * kVectorsAtOnce * kLanes<T>;
  for (int part = 0; part < kParts; ++part) {
    for (T** p : {&block.A[part], &block.rate[part], &block.adjoint[part]}) *p = arena.take<T>(states);
    block.B[part] = arena.take<T>(d.varying_B ? kTileTokens * d.dstate : states);
    block.C[part] = arena.take<T>(d.varying_C ? kTileTokens * d.dstate : states);
    block.state[part] = arena.take<T>(most(1, cut.tiles) * states);
    block.kept[part] = arena.take<T>((kTileTokens + 1) * together);
    block.factor[part] = arena.take<T>(kTileTokens * together);
    block.dB_lanes[part] = arena.take<T>(d.varying_B ? kTileTokens * d.dstate * kLanes<T> : 0);
    block.dC_lanes[part] = arena.take<T>(d.varying_C ? kTileTokens * d.dstate * kLanes<T> : 0);
  }
  block.from_one = arena.take<T>(kTileTokens * together);
  for (T** row : {&block.D, &block.dt_bias}) *row = arena.take<T>(cut.width);
  for (T** tile : {&block.dt, &block.slope, &block.x, &block.g, &block.y, &block.z, &block.du, &block.ddt})
    *tile = arena.take<T>(kTileTokens * cut.width);
  return block;
}

// A task's sums over time and sequences, in double.
template <int kParts>
struct Sums {
  double *dA[kParts], *dB[kParts], *dC[kParts];  // [n][width]; dB and dC when time-invariant
  double *dD, *ddt_bias;                         // [width]
};

template <int kParts>
Sums<kParts> lay_out_sums(Arena& arena, const Dims& d, const Cut& cut) {
  Sums<kParts> sums;
  const std::int64_t states = d.dstate * cut.width;
  for (int part = 0; part < kParts; ++part) {
    sums.dA[part] = arena.take<double>(states);
    sums.dB[part] = arena.take<double>(d.varying_B ? 0 : states);
    sums.dC[part] = arena.take<double>(d.varying_C ? 0 : states);
  }
  for (double** row : {&sums.dD, &sums.ddt_bias}) *row = arena.take<double>(cut.width);
  return sums;
}

template <int kParts>
std::size_t bytes_of_sums(const Dims& d, const Cut& cut) {
  Arena count(nullptr);
  lay_out_sums<kParts>(count, d, cut);
  return count.used();
}

template <class T, int kParts>
std::size_t bytes_per_thread(const Dims& d, const Cut& cut) {
  Arena count(nullptr);
  lay_out<T, kParts>(count, d, cut);
  return count.used();
}

// The workspace: the tasks' sums, the blocks' dB and dC, the threads' blocks.
template <class T, int kParts>
struct Workspaces {
  char *sums, *blocks;
  T *dB[kParts], *dC[kParts];  // [blocks of a group][groups][b][l][n] when they vary
  std::size_t bytes_before_blocks;

  Workspaces(void* memory, const Dims& d, const Cut& cut) {
    Arena arena(memory);
    sums = arena.take<char>(most(1, cut.parts) * cut.blocks * bytes_of_sums<kParts>(d, cut));
    const std::int64_t projections = cut.blocks * d.batch * d.seqlen * d.dstate;
    for (int part = 0; part < kParts; ++part) {
      dB[part] = arena.take<T>(d.varying_B ? projections : 0);
      dC[part] = arena.take<T>(d.varying_C ? projections : 0);
    }
    bytes_before_blocks = arena.used();
    blocks = static_cast<char*>(memory) + bytes_before_blocks;
  }
};

template <class T>
STATESCAN_INLINE void add_to(double* sums, Vec<T> v) {
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int i = 0; i < kLanes<T>; ++i) sums[i] += static_cast<double>(lanes[i]);
}

// v in the lanes of from_one, else zero: what a step adds to factor v.
template <class T>
STATESCAN_INLINE Vec<T> kept_whole(IntVec<T> from_one, Vec<T> v) {
  return bits_as<Vec<T>>(from_one & bits_as<IntVec<T>>(v));
}

// One vector of channels and kStates states through a tile, from the state before it to the state before the next.
template <class T, int kParts, int kStates, bool kVaryingB>
STATESCAN_INLINE void advance_states(const Block<T, kParts>& block, std::int64_t tile, std::int64_t lane, std::int64_t n,
                                     std::int64_t count, bool reverse) {
  using P = Parts<T, kParts>;
  const std::int64_t width = block.width;
  P h[kStates];
#pragma GCC unroll 16
  for (int k = 0; k < kStates; ++k)
    for (int part = 0; part < kParts; ++part)
      h[k].part[part] = load<T>(block.state_before(part, tile) + (n + k) * width + lane);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = reverse ? count - 1 - i : i;
    const Vec<T> dt = load<T>(block.dt + t * width + lane), u = dt * load<T>(block.x + t * width + lane);
#pragma GCC unroll 16
    for (int k = 0; k < kStates; ++k) {
      P rate, B;
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        rate.part[part] = load<T>(block.rate[part] + (n + k) * width + lane);
        B.part[part] = projection<T, kVaryingB>(block.B[part], t * block.dstate + n + k, (n + k) * width + lane);
      }
      h[k] = advance<T, kParts>(decay<T, kParts>(dt, rate), h[k], u, B);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kStates; ++k)
    for (int part = 0; part < kParts; ++part)
      store<T>(block.state_before(part, tile + 1) + (n + k) * width + lane, h[k].part[part]);
}

template <class T, int kParts, bool kVaryingB>
void advance_tile(const Block<T, kParts>& block, std::int64_t tile, std::int64_t count, bool reverse) {
  constexpr int kStates = (kVectorBytes == 64 ? 16 : 8) / (kParts == 1 ? 1 : 4);
  for (std::int64_t lane = 0; lane < block.width; lane += kLanes<T>) {
    std::int64_t n = 0;
    for (; n + kStates <= block.dstate; n += kStates)
      advance_states<T, kParts, kStates, kVaryingB>(block, tile, lane, n, count, reverse);
    for (; n < block.dstate; ++n) advance_states<T, kParts, 1, kVaryingB>(block, tile, lane, n, count, reverse);
  }
}

// kStates states of kVectors vectors of channels: through the tile with every h kept, then back.
template <class T, int kParts, bool kVaryingB, bool kVaryingC, int kStates, int kVectors>
struct TilePass {
  using P = Parts<T, kParts>;
  static constexpr int kL = kLanes<T>;

  const Block<T, kParts>& block;
  const Sums<kParts>& sums;
  std::int64_t lane, n;

  STATESCAN_INLINE std::int64_t at(std::int64_t t, int v) const { return t * block.width + lane + v * kL; }
  STATESCAN_INLINE std::int64_t at_state(int k, int v) const { return (n + k) * block.width + lane + v * kL; }
  STATESCAN_INLINE std::int64_t at_kept(std::int64_t i, int k, int v) const { return ((i * kStates + k) * kVectors + v) * kL; }

  template <bool kVarying>
  STATESCAN_INLINE P projected(T* const (&p)[kParts], std::int64_t t, int k, int v) const {
    P result;
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part)
      result.part[part] = projection<T, kVarying>(p[part], t * block.dstate + n + k, at_state(k, v));
    return result;
  }

  STATESCAN_INLINE P load_parts_at(const T* const (&p)[kParts], std::int64_t at) const {
    P result;
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) result.part[part] = load<T>(p[part] + at);
    return result;
  }

  STATESCAN_INLINE void forward(std::int64_t tile, std::int64_t count, bool reverse, bool with_y) const {
    P h[kStates][kVectors];
#pragma GCC unroll 8
    for (int k = 0; k < kStates; ++k)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        for (int part = 0; part < kParts; ++part) {
          h[k][v].part[part] = load<T>(block.state_before(part, tile) + at_state(k, v));
          store<T>(block.kept[part] + at_kept(0, k, v), h[k][v].part[part]);
        }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t t = reverse ? count - 1 - i : i;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> dt = load<T>(block.dt + at(t, v)), u = dt * load<T>(block.x + at(t, v));
        Vec<T> y{};
#pragma GCC unroll 8
        for (int k = 0; k < kStates; ++k) {
          const Step<T, kParts> step = decay<T, kParts>(dt, load_parts_at(block.rate, at_state(k, v)));
          h[k][v] = advance<T, kParts>(step, h[k][v], u, projected<kVaryingB>(block.B, t, k, v));
          for (int part = 0; part < kParts; ++part) {
            store<T>(block.factor[part] + at_kept(i, k, v), step.factor.part[part]);
            store<T>(block.kept[part] + at_kept(i + 1, k, v), h[k][v].part[part]);
          }
          store<T>(block.from_one + at_kept(i, k, v), bits_as<Vec<T>>(step.from_one));
          if (with_y) y = read_out<T, kParts>(projected<kVaryingC>(block.C, t, k, v), h[k][v], y);
        }
        if (with_y) store<T>(block.y + at(t, v), load<T>(block.y + at(t, v)) + (kParts == 1 ? y : y + y));
      }
    }
  }

  STATESCAN_INLINE void backward(std::int64_t count, bool reverse) const {
    P carried[kStates][kVectors], dA[kStates][kVectors] = {}, dB[kStates][kVectors] = {}, dC[kStates][kVectors] = {};
#pragma GCC unroll 8
    for (int k = 0; k < kStates; ++k)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) carried[k][v] = load_parts_at(block.adjoint, at_state(k, v));
    for (std::int64_t i = count; i-- > 0;) {
      const std::int64_t t = reverse ? count - 1 - i : i;
      Vec<T> du[kVectors] = {}, ddt[kVectors] = {};
#pragma GCC unroll 8
      for (int k = 0; k < kStates; ++k) {
        const std::int64_t lanes = (t * block.dstate + n + k) * kL;
        P dB_lanes, dC_lanes;
        if constexpr (kVaryingB) dB_lanes = load_parts_at(block.dB_lanes, lanes);
        if constexpr (kVaryingC) dC_lanes = load_parts_at(block.dC_lanes, lanes);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const Vec<T> dt = load<T>(block.dt + at(t, v)), u = dt * load<T>(block.x + at(t, v));
          const Vec<T> g = kParts == 1 ? load<T>(block.g + at(t, v)) : load<T>(block.g + at(t, v)) * T(2);
          const P h = load_parts_at(block.kept, at_kept(i + 1, k, v)), before = load_parts_at(block.kept, at_kept(i, k, v));
          const P factor = load_parts_at(block.factor, at_kept(i, k, v));
          const IntVec<T> from_one = bits_as<IntVec<T>>(load<T>(block.from_one + at_kept(i, k, v)));
          const P p = add_conjugate(carried[k][v], g, projected<kVaryingC>(block.C, t, k, v));
          P& of_C = kVaryingC ? dC_lanes : dC[k][v];
          of_C = add_conjugate(of_C, g, h);
          P& of_B = kVaryingB ? dB_lanes : dB[k][v];
          for (int part = 0; part < kParts; ++part) of_B.part[part] = fma(u, p.part[part], of_B.part[part]);
          du[v] = add_product(projected<kVaryingB>(block.B, t, k, v), p, du[v]);
          const P q = times_conjugate(p, decayed(factor, before, from_one));
          ddt[v] = add_product(load_parts_at(block.A, at_state(k, v)), q, ddt[v]);
          for (int part = 0; part < kParts; ++part) dA[k][v].part[part] = fma(dt, q.part[part], dA[k][v].part[part]);
          carried[k][v] = decayed_adjoint(factor, p, from_one);
        }
        for (int part = 0; part < kParts; ++part) {
          if constexpr (kVaryingB) store<T>(block.dB_lanes[part] + lanes, dB_lanes.part[part]);
          if constexpr (kVaryingC) store<T>(block.dC_lanes[part] + lanes, dC_lanes.part[part]);
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store<T>(block.du + at(t, v), load<T>(block.du + at(t, v)) + du[v]);
        store<T>(block.ddt + at(t, v), load<T>(block.ddt + at(t, v)) + ddt[v]);
      }
    }
    for (int k = 0; k < kStates; ++k)
      for (int v = 0; v < kVectors; ++v)
        for (int part = 0; part < kParts; ++part) {
          store<T>(block.adjoint[part] + at_state(k, v), carried[k][v].part[part]);
          add_to<T>(sums.dA[part] + at_state(k, v), dA[k][v].part[part]);
          if constexpr (!kVaryingB) add_to<T>(sums.dB[part] + at_state(k, v), dB[k][v].part[part]);
          if constexpr (!kVaryingC) add_to<T>(sums.dC[part] + at_state(k, v), dC[k][v].part[part]);
        }
  }

 private:
  // sum + g conj(v)
  STATESCAN_INLINE static P add_conjugate(const P& sum, Vec<T> g, const P& v) {
    if constexpr (kParts == 1) return {{fma(g, v.part[0], sum.part[0])}};
    else return {{fma(g, v.part[0], sum.part[0]), fma(-g, v.part[1], sum.part[1])}};
  }

  // sum + Re(conj(a) b)
  STATESCAN_INLINE static Vec<T> add_product(const P& a, const P& b, Vec<T> sum) {
    for (int part = 0; part < kParts; ++part) sum = fma(a.part[part], b.part[part], sum);
    return sum;
  }

  // a conj(b)
  STATESCAN_INLINE static P times_conjugate(const P& a, const P& b) {
    if constexpr (kParts == 1) return {{a.part[0] * b.part[0]}};
    else return {{fma(a.part[1], b.part[1], a.part[0] * b.part[0]), fma(a.part[1], b.part[0], -(a.part[0] * b.part[1]))}};
  }

  // The step's decay times a state, and its conjugate times an adjoint.
  STATESCAN_INLINE static P decayed(const P& factor, const P& h, IntVec<T> from_one) {
    if constexpr (kParts == 1) return {{fma(factor.part[0], h.part[0], kept_whole<T>(from_one, h.part[0]))}};
    else
      return {{fma(-factor.part[1], h.part[1], fma(factor.part[0], h.part[0], kept_whole<T>(from_one, h.part[0]))),
               fma(factor.part[1], h.part[0], fma(factor.part[0], h.part[1], kept_whole<T>(from_one, h.part[1])))}};
  }

  STATESCAN_INLINE static P decayed_adjoint(P factor, const P& p, IntVec<T> from_one) {
    if constexpr (kParts == 2) factor.part[1] = -factor.part[1];
    return decayed(factor, p, from_one);
  }
};

template <class T, int kParts, bool kVaryingB, bool kVaryingC>
void differentiate_tile(const Block<T, kParts>& block, const Sums<kParts>& sums, std::int64_t tile, std::int64_t count,
                        bool reverse, bool with_y) {
  const auto pass = [&](auto states, auto vectors, std::int64_t lane, std::int64_t n) {
    const TilePass<T, kParts, kVaryingB, kVaryingC, states(), vectors()> through{block, sums, lane, n};
    through.forward(tile, count, reverse, with_y);
    through.backward(count, reverse);
  };
  const auto every_state = [&](auto vectors, std::int64_t lane) {
    constexpr int kStates = kStatesAtOnce<kParts>;
    std::int64_t n = 0;
    for (; n + kStates <= block.dstate; n += kStates) pass(std::integral_constant<int, kStates>{}, vectors, lane, n);
    for (; n < block.dstate; ++n) pass(std::integral_constant<int, 1>{}, vectors, lane, n);
  };
  constexpr std::int64_t kTogether = kVectorsAtOnce * kLanes<T>;
  std::int64_t lane = 0;
  for (; lane + kTogether <= block.width; lane += kTogether) every_state(std::integral_constant<int, kVectorsAtOnce>{}, lane);
  for (; lane < block.width; lane += kLanes<T>) every_state(std::integral_constant<int, 1>{}, lane);
}

// Sums of the lanes of `count` vectors.
template <class T>
void sum_each(T* to, const T* vectors, std::int64_t count) {
  constexpr int kL = kLanes<T>;
  for (std::int64_t i = 0; i < count; i += kL) {
    const int here = at_most(count - i, kL);
    Vec<T> rows[kL];
    for (int k = 0; k < kL; ++k) rows[k] = k < here ? load<T>(vectors + (i + k) * kL) : Vec<T>{};
    const Vec<T> sum = sum_rows<T>(rows);
    here == kL ? store<T>(to + i, sum) : store_first<T>(to + i, sum, here);
  }
}

template <class T>
void fill(T* to, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

// A block of channels of one group.
template <class T, int kParts>
class Channels {
 public:
  Channels(const BackwardArgs& args, const Dims& d, const Cut& cut, const Workspaces<T, kParts>& memory, std::int64_t index)
      : args_(args), d_(d), cut_(cut), memory_(memory), index_(index), group_(index / cut.blocks_per_group) {
    const std::int64_t within = index % cut.blocks_per_group * cut.width;
    channel_ = group_ * cut.channels_per_group + within;
    channels_ = least(cut.width, cut.channels_per_group - within);
  }

  Sums<kParts> sums_of(std::int64_t part) const {
    Arena arena(memory_.sums + (part * cut_.blocks + index_) * bytes_of_sums<kParts>(d_, cut_));
    return lay_out_sums<kParts>(arena, d_, cut_);
  }

  void clear_sums(std::int64_t part) const {
    double* const all =
        reinterpret_cast<double*>(memory_.sums + (part * cut_.blocks + index_) * bytes_of_sums<kParts>(d_, cut_));
    fill<double>(all, bytes_of_sums<kParts>(d_, cut_) / sizeof(double), 0.0);
  }

  void load_parameters(const Block<T, kParts>& block) const {
    load_per_state<T, kParts>(block.A, block.width, args_.A, channel_ * args_.A.stride[0], channels_, d_.dstate);
    load_per_state<T, kParts>(block.rate, block.width, args_.A, channel_ * args_.A.stride[0], channels_, d_.dstate);
    for (std::int64_t i = 0; i < d_.dstate * block.width; ++i) block.rate[0][i] *= kRateScale<T>;
    if (!d_.varying_B)
      load_per_state<T, kParts>(block.B, block.width, args_.B, channel_ * args_.B.stride[0], channels_, d_.dstate);
    if (!d_.varying_C)
      load_per_state<T, kParts>(block.C, block.width, args_.C, channel_ * args_.C.stride[0], channels_, d_.dstate);
    load_per_channel<T>(block.D, block.width, args_.D, channel_, channels_);
    load_per_channel<T>(block.dt_bias, block.width, args_.dt_bias, channel_, channels_);
  }

  void run_sequence(const Block<T, kParts>& block, const Sums<kParts>& sums, const Sequence& q) const {
    load_states(block.state, args_.initial_state, q);
    const auto advance_here = d_.varying_B ? advance_tile<T, kParts, true> : advance_tile<T, kParts, false>;
    const std::int64_t tiles = ceil_div(q.length, kTileTokens);
    for (std::int64_t tile = 0; tile + 1 < tiles; ++tile) {
      const Tokens tokens = tokens_of(q, tile);
      load_scanned(block, tokens);
      advance_here(block, tile, tokens.count, args_.reverse);
    }
    load_states(block.adjoint, args_.dfinal_state, q);
    const auto differentiate =
        d_.varying_B
            ? (d_.varying_C ? differentiate_tile<T, kParts, true, true> : differentiate_tile<T, kParts, true, false>)
            : (d_.varying_C ? differentiate_tile<T, kParts, false, true> : differentiate_tile<T, kParts, false, false>);
    for (std::int64_t tile = tiles; tile-- > 0;) {
      const Tokens tokens = tokens_of(q, tile);
      load_scanned(block, tokens);
      enter_tile(block, tokens);
      differentiate(block, sums, tile, tokens.count, args_.reverse, static_cast<bool>(args_.z));
      leave_tile(block, sums, tokens);
    }
    if (const Tensor& to = args_.dinitial_state)
      store_parts<T, kParts>(to, offset_of(to, q.index, channel_), to.stride[2], d_.dstate, to.stride[1], channels_,
                             block.adjoint, block.width);
  }

  // Gradients of what has no tokens, from the sums of the parts.
  void store_sums(const Block<T, kParts>& block) const {
    const Sums<kParts> sums = sums_of(0);
    double* const all = sums.dA[0];
    for (std::int64_t part = 1; part < cut_.parts; ++part) {
      const double* const more = sums_of(part).dA[0];
      for (std::size_t i = 0; i < bytes_of_sums<kParts>(d_, cut_) / sizeof(double); ++i) all[i] += more[i];
    }
    store_state_sums(args_.dA, sums.dA, block);
    if (!d_.varying_B) store_state_sums(args_.dB, sums.dB, block);
    if (!d_.varying_C) store_state_sums(args_.dC, sums.dC, block);
    store_channel_sums(args_.dD, sums.dD);
    store_channel_sums(args_.ddt_bias, sums.ddt_bias);
  }

  // What has tokens, past the last packed one.
  void clear_tail(const Block<T, kParts>& block) const {
    fill(block.y, kTileTokens * block.width, T(0));
    for (std::int64_t t = used_tokens(args_, d_); t < d_.seqlen; t += kTileTokens)
      for (const Tensor* to : {&args_.dx, &args_.ddt, &args_.dz})
        store_tokens(*to, {0, t, least(kTileTokens, d_.seqlen - t)}, block.y, block.width);
  }

 private:
  Tokens tokens_of(const Sequence& q, std::int64_t tile) const {
    const std::int64_t done = tile * kTileTokens, left = q.length - done, count = least(left, kTileTokens);
    return {q.batch, q.first + (args_.reverse ? left - count : done), count};
  }

  // A state or its adjoint, zero when it was not given.
  void load_states(T* const (&to)[kParts], const Tensor& t, const Sequence& q) const {
    if (t) return load_per_state<T, kParts>(to, cut_.width, t, offset_of(t, q.index, channel_), channels_, d_.dstate);
    for (T* part : to) fill(part, d_.dstate * cut_.width, T(0));
  }

  void load_tokens(T* to, const Tensor& t, const Tokens& tokens) const {
    load_tile<T>(to, cut_.width, token_tile(t, tokens, channel_), tokens.count, channels_);
  }

  void store_tokens(const Tensor& t, const Tokens& tokens, const T* from, std::int64_t width) const {
    if (t) store_tile<T>(token_tile(t, tokens, channel_), tokens.count, channels_, from, width);
  }

  // What the recurrence itself reads: dt discretised, with its slope, x and B.
  void load_scanned(const Block<T, kParts>& block, const Tokens& tokens) const {
    load_tokens(block.dt, args_.dt, tokens);
    load_tokens(block.x, args_.x, tokens);
    if (d_.varying_B) load_projection<T, kParts>(block.B, args_.B, tokens, group_);
    const T low = static_cast<T>(args_.dt_min), high = static_cast<T>(args_.dt_max);
    for (std::int64_t lane = 0; lane < block.width; lane += kLanes<T>) {
      const Vec<T> bias = load<T>(block.dt_bias + lane);
      for (std::int64_t i = lane; i < tokens.count * block.width; i += block.width) {
        const Vec<T> raw = load<T>(block.dt + i) + bias, dt = args_.dt_softplus ? softplus<T>(raw) : raw;
        const Vec<T> slope = args_.dt_softplus ? sigmoid<T>(raw) : splat(T(1));
        store<T>(block.dt + i, clamp<T>(dt, low, high));
        store<T>(block.slope + i, dt < low ? Vec<T>{} : (dt > high ? Vec<T>{} : slope));
      }
    }
  }

  // g, the factor of dz, y = D x, and zeros to add to.
  void enter_tile(const Block<T, kParts>& block, const Tokens& tokens) const {
    const std::int64_t size = tokens.count * block.width;
    load_tokens(block.g, args_.dy, tokens);
    if (d_.varying_C) load_projection<T, kParts>(block.C, args_.C, tokens, group_);
    if (args_.z) {
      load_tokens(block.z, args_.z, tokens);
      for (std::int64_t lane = 0; lane < block.width; lane += kLanes<T>)
        for (std::int64_t i = lane; i < size; i += block.width) {
          const Vec<T> dy = load<T>(block.g + i), z = load<T>(block.z + i), s = sigmoid<T>(z);
          store<T>(block.g + i, dy * (z * s));
          store<T>(block.z + i, dy * (s * fma(z, T(1) - s, splat(T(1)))));
          store<T>(block.y + i, load<T>(block.D + lane) * load<T>(block.x + i));
        }
    }
    fill(block.du, size, T(0));
    fill(block.ddt, size, T(0));
    for (int part = 0; part < kParts; ++part) {
      if (d_.varying_B) fill(block.dB_lanes[part], tokens.count * d_.dstate * kLanes<T>, T(0));
      if (d_.varying_C) fill(block.dC_lanes[part], tokens.count * d_.dstate * kLanes<T>, T(0));
    }
  }

  void leave_tile(const Block<T, kParts>& block, const Sums<kParts>& sums, const Tokens& tokens) const {
    for (std::int64_t lane = 0; lane < block.width; lane += kLanes<T>) {
      const Vec<T> D = load<T>(block.D + lane);
      Vec<T> dD{}, ddt_bias{};
      for (std::int64_t i = lane; i < tokens.count * block.width; i += block.width) {
        const Vec<T> x = load<T>(block.x + i), g = load<T>(block.g + i), du = load<T>(block.du + i);
        const Vec<T> ddt = fma(x, du, load<T>(block.ddt + i)) * load<T>(block.slope + i);
        store<T>(block.du + i, fma(load<T>(block.dt + i), du, D * g));
        store<T>(block.ddt + i, ddt);
        if (args_.z) store<T>(block.z + i, load<T>(block.z + i) * load<T>(block.y + i));
        dD = fma(g, x, dD);
        ddt_bias = ddt_bias + ddt;
      }
      add_to<T>(sums.dD + lane, dD);
      add_to<T>(sums.ddt_bias + lane, ddt_bias);
    }
    store_tokens(args_.dx, tokens, block.du, block.width);
    store_tokens(args_.ddt, tokens, block.ddt, block.width);
    store_tokens(args_.dz, tokens, block.z, block.width);
    const std::int64_t size = tokens.count * d_.dstate;
    const std::int64_t at = ((index_ * d_.batch + tokens.batch) * d_.seqlen + tokens.first) * d_.dstate;
    for (int part = 0; part < kParts; ++part) {
      if (d_.varying_B) sum_each(memory_.dB[part] + at, block.dB_lanes[part], size);
      if (d_.varying_C) sum_each(memory_.dC[part] + at, block.dC_lanes[part], size);
    }
  }

  void store_state_sums(const Tensor& t, double* const (&from)[kParts], const Block<T, kParts>& block) const {
    if (!t) return;
    for (int part = 0; part < kParts; ++part)
      for (std::int64_t i = 0; i < d_.dstate * block.width; ++i) block.adjoint[part][i] = static_cast<T>(from[part][i]);
    store_parts<T, kParts>(t, offset_of(t, channel_), t.stride[1], d_.dstate, t.stride[0], channels_, block.adjoint,
                           block.width);
  }

  void store_channel_sums(const Tensor& t, const double* from) const {
    for (std::int64_t c = 0; t && c < channels_; ++c)
      store_element<double>(t.data, t.dtype, offset_of(t, channel_ + c), from[c]);
  }

  const BackwardArgs& args_;
  const Dims& d_;
  const Cut& cut_;
  const Workspaces<T, kParts>& memory_;
  std::int64_t index_, group_, channel_, channels_;
};

// dB or dC of some tokens of a group: the sum over its blocks of channels, zero past the last packed token.
template <class T, int kParts>
void add_blocks(const Tensor& t, T* const (&from)[kParts], const BackwardArgs& args, const Dims& d, const Cut& cut,
                const Tokens& tokens, std::int64_t group, T* const (&scratch)[kParts], std::int64_t pitch) {
  const std::int64_t block_size = d.batch * d.seqlen * d.dstate, used = used_tokens(args, d);
  for (std::int64_t i = 0; i < tokens.count; ++i) {
    const std::int64_t token = tokens.first + i, row = (tokens.batch * d.seqlen + token) * d.dstate;
    for (int part = 0; part < kParts; ++part)
      for (std::int64_t n = 0; n < d.dstate; n += kLanes<T>) {
        const int lanes = at_most(d.dstate - n, kLanes<T>);
        Vec<T> sum{};
        for (std::int64_t block = 0; token < used && block < cut.blocks_per_group; ++block) {
          const T* p = from[part] + (group * cut.blocks_per_group + block) * block_size + row + n;
          sum = sum + (lanes == kLanes<T> ? load<T>(p) : load_first<T>(p, lanes));
        }
        store<T>(scratch[part] + i * pitch + n, sum);
      }
  }
  store_parts<T, kParts>(t, offset_of(t, tokens.batch, tokens.first, group), t.stride[1], tokens.count, t.stride[3], d.dstate,
                         scratch, pitch);
}

template <class T, int kParts>
std::size_t bytes_of_addition(const Dims& d) {
  return kParts * kTileTokens * (ceil_div(d.dstate, kLanes<T>) * kLanes<T>)*sizeof(T);
}

template <class T, int kParts>
std::size_t bytes_of_thread(const Dims& d, const Cut& cut) {
  const std::size_t block = bytes_per_thread<T, kParts>(d, cut), addition = bytes_of_addition<T, kParts>(d);
  return block > addition ? block : addition;
}

template <class T, int kParts>
void run_as(const BackwardArgs& args, const Dims& d) {
  const Cut cut = cut_of<T>(args, d);
  const Workspaces<T, kParts> memory(args.workspace.data, d, cut);
  const std::size_t bytes = bytes_of_thread<T, kParts>(d, cut);
  parallel_for(cut.parts * cut.blocks, [&](std::int64_t task, int thread) {
    const std::int64_t part = task / cut.blocks;
    const Channels<T, kParts> channels(args, d, cut, memory, task % cut.blocks);
    Arena arena(memory.blocks + thread * bytes);
    const Block<T, kParts> block = lay_out<T, kParts>(arena, d, cut);
    channels.clear_sums(part);
    channels.load_parameters(block);
    for (std::int64_t s = part * d.num_sequences / cut.parts; s < (part + 1) * d.num_sequences / cut.parts; ++s)
      channels.run_sequence(block, channels.sums_of(part), sequence_at(args, d, s));
  });
  parallel_for(cut.blocks, [&](std::int64_t index, int thread) {
    const Channels<T, kParts> channels(args, d, cut, memory, index);
    Arena arena(memory.blocks + thread * bytes);
    const Block<T, kParts> block = lay_out<T, kParts>(arena, d, cut);
    if (cut.parts == 0) channels.clear_sums(0);
    channels.store_sums(block);
    channels.clear_tail(block);
  });
  const bool add_B = d.varying_B && args.dB, add_C = d.varying_C && args.dC;
  if (!add_B && !add_C) return;
  const std::int64_t runs = ceil_div(d.seqlen, kTileTokens);
  parallel_for(d.batch * d.ngroups * runs, [&](std::int64_t task, int thread) {
    const std::int64_t group = task / runs % d.ngroups, first = task % runs * kTileTokens;
    const Tokens tokens{task / runs / d.ngroups, first, least(kTileTokens, d.seqlen - first)};
    Arena arena(memory.blocks + thread * bytes);
    const std::int64_t pitch = ceil_div(d.dstate, kLanes<T>) * kLanes<T>;
    T* scratch[kParts];
    for (T*& part : scratch) part = arena.take<T>(kTileTokens * pitch);
    if (add_B) add_blocks<T, kParts>(args.dB, memory.dB, args, d, cut, tokens, group, scratch, pitch);
    if (add_C) add_blocks<T, kParts>(args.dC, memory.dC, args, d, cut, tokens, group, scratch, pitch);
  });
}

template <class T, int kParts>
std::size_t bytes_as(const BackwardArgs& args, const Dims& d) {
  const Cut cut = cut_of<T>(args, d);
  return Workspaces<T, kParts>(nullptr, d, cut).bytes_before_blocks + max_threads() * bytes_of_thread<T, kParts>(d, cut);
}

}  // namespace

std::size_t workspace_bytes(const BackwardArgs& args, const Dims& d) {
  if (args.x.dtype == DType::float64) return d.complex_A ? bytes_as<double, 2>(args, d) : bytes_as<double, 1>(args, d);
  return d.complex_A ? bytes_as<float, 2>(args, d) : bytes_as<float, 1>(args, d);
}

void run(const BackwardArgs& args, const Dims& d) {
  if (args.x.dtype == DType::float64) d.complex_A ? run_as<double, 2>(args, d) : run_as<double, 1>(args, d);
  else d.complex_A ? run_as<float, 2>(args, d) : run_as<float, 1>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
