// ssd_scan backward on the CPU, a chunk of q tokens at a time, the last chunk first
// Math     s[i] = sum_{k<=i} dt[k] A from the start of the chunk, L[i][j] = exp(s[i] - s[j]) for j <= i, g = dy silu(z), h the
//          state [p,n] that enters the chunk, G the adjoint of the state that leaves it, end = q-1:
//          dx[j] = dt[j] r[j] + D g[j],    r[j] = L[end][j] G B[j] + sum_{i>=j} (C[i].B[j]) L[i][j] g[i]
//          dB[j] = sum over heads of       dt[j] L[end][j] G^T x[j] + sum_{i>=j} (g[i].x[j]) L[i][j] dt[j] C[i]
//          dC[i] = sum over heads of       exp(s[i]) h^T g[i] + sum_{j<=i} (g[i].x[j]) L[i][j] dt[j] B[j]
//          ddtA[i] = <adjoint of h[i], exp(dt[i] A) h[i-1]>, every product of a term of one with a term of the other:
//                  = exp(s[end]) <G,h> + sum_{j<i} dt[j] L[end][j] x[j].(G B[j]) + sum_{k>=i} exp(s[k]) g[k].(h C[k])
//                    + sum_{k>=i>j} (C[k].B[j]) (g[k].x[j]) L[k][j] dt[j]
//          ddt[i] = x[i].r[i] + A ddtA[i], through limit, softplus and bias;  dA = sum dt[i] ddtA[i]
//          G      = exp(s[end]) G + sum_i exp(s[i]) g[i] C[i]^T, for the chunk before
// Shapes   x, z, dy [b,l,h,p], dt [b,l,h], B, C [b,l,g,n]; states and adjoints are held as [p,n]
// Traffic  x twice, dt twice, dy, z and the gradients once; B and C twice for each unit; the states that enter the chunks of a
//          unit, [heads,chunks,p,n], written and read once: of the whole sequence, or of one stretch where the forward kept
//          the states before the stretches. As much of each as a chunk of dx can hold lies in dx, until that is written
// Tasks    the units of the forward (ssd_chunk.h). The first of a group makes C B^T of each chunk for all; they add their parts
//          of dB, dC and of the weights (g[i].x[j]) L[i][j] dt[j] one after the other, chunk by chunk, each a chunk behind the
//          one before, and the last multiplies the weights with B and C. The sums so far lie in dB and dC themselves where
//          these can hold them. dx, dB and dC may lie where x, B and C lie, and hold nothing else then: a unit reads its x of
//          a chunk for the last time before it writes dx there, and the last of a group writes dB and dC behind all others
// Numerics sums of T in a fixed order that depends on the row's own shape alone; what is summed over tokens (dA, dD, ddt_bias)
//          is summed in float64. ddtA has no difference in it, so that it keeps its digits where decays leave next to nothing.
//          No product has a factor from above the diagonal: a NaN in dy reaches no later token
#include <type_traits>

#include "isa.h"
#include "parallel.h"
#include "ssd_chunk.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using ssd_scan::BackwardArgs;
using ssd_scan::Dims;

// The states that enter the chunks are kept: at 64 tokens they take n/64 times the memory of x, and the products inside a chunk
// are a fifth of all.
constexpr std::int64_t kChunk = 64;

// A thread holds the states of its unit's heads, of the whole sequence where the forward kept none: 1 MB a head at 2048 tokens,
// p 64 and n 128. So units are half of the forward's. Of 80 heads 16 threads take a fifth less time by it, one or two up to a
// twentieth more, since more units hand on dB and dC.
constexpr std::int64_t kHeads = 4;

Tiling tiling_of(const BackwardArgs& args, const Dims& d) {
  std::int64_t chunk = least(most(args.chunk_size, kChunk), kMaxChunk);
  static_assert(kStretch % kChunk == 0);
  while (args.chunk_states && kStretch % chunk != 0) --chunk;  // a stretch is whole chunks
  return cut_units(d, chunk, kHeads);
}

std::int64_t longest_sequence(const BackwardArgs& args, const Dims& d) {
  if (!args.cu_seqlens) return d.seqlen;
  std::int64_t length = 0;
  for (std::int64_t s = 0; s < d.num_sequences; ++s) length = most(length, walk_of(args, d, s).length());
  return length;
}

// Whether a gradient is memory of T that no input lies in, so that it can hold other things until it is written.
template <class T>
bool has_room(const Tensor& gradient, const Tensor& of) {
  return gradient && gradient.dtype == kDTypeOf<T> && gradient.data != of.data;
}

// What the units of a call share.
template <class T>
struct Shared {
  Shared(Arena& arena, const Tiling& t, const BackwardArgs& args, const Dims& d, std::int64_t longest)
      : q_stride(chunk_stride<T>(t, longest)), n_stride(whole_vectors<T>(d.dstate)), CB(arena, t, d, longest) {
    const std::int64_t tokens = d.batch * d.seqlen, rows = units_of_group(t) > 1 ? tokens * d.ngroups : 0;
    dB = sums_of(args.dB, args.B, arena, rows, d);
    dC = sums_of(args.dC, args.C, arena, rows, d);
    weights = arena.take<T>(rows * q_stride);
    dt_slope = arena.take<T>(t.column_blocks > 1 ? tokens * d.nheads : 0);
    const std::int64_t heads = d.num_sequences * d.nheads;
    share_count = heads * (2 + (d.D_per_channel ? d.headdim : 1));
    dA = arena.take<double>(share_count);
    ddt_bias = dA + heads;
    dD = ddt_bias + heads;
    chunks_done = arena.take<int>(d.num_sequences * t.units);
  }

  // The gradient itself where its rows are whole vectors.
  Tensor sums_of(const Tensor& gradient, const Tensor& of, Arena& arena, std::int64_t rows, const Dims& d) const {
    if (has_room<T>(gradient, of) && gradient.stride[3] == 1 && d.dstate == n_stride) return gradient;
    Tensor sums;
    sums.data = arena.take<T>(rows * n_stride);
    sums.dtype = kDTypeOf<T>;
    const std::int64_t stride[] = {d.seqlen * d.ngroups * n_stride, d.ngroups * n_stride, n_stride, 1};
    for (int i = 0; i < 4; ++i) sums.stride[i] = stride[i];
    return sums;
  }

  std::int64_t q_stride, n_stride;
  GroupCB<T> CB;
  Tensor dB, dC;          // [b,l,g,n*] summed over the units of the group so far
  T* weights;             // [b,g,l,q*] the same in the order of the scan, up to the diagonal
  T* dt_slope;            // [b,l,h] ddt before limit and softplus, summed over the blocks of headdim so far
  std::int64_t share_count;
  double *dA, *ddt_bias;  // [s,h] each sequence's share, in one piece with the next
  double* dD;             // [s,h] or [s,h,p]
  int* chunks_done;       // of each unit
};

// The tiles of one thread. q tokens, n of dstate, p columns of headdim; rows marked * are padded to whole vectors.
template <class T>
struct Tiles {
  Tiles(Arena& arena, const Tiling& t, const BackwardArgs& args, const Dims& d, std::int64_t longest)
      : q_stride(chunk_stride<T>(t, longest)),
        p_stride(whole_vectors<T>(t.columns)),
        n_stride(whole_vectors<T>(d.dstate)),
        own_rows(t.columns - (has_room<T>(args.dx, args.x) ? least(t.columns, t.chunk * t.columns / most(n_stride, 1)) : 0)),
        chunks(args.chunk_states ? kStretch / t.chunk : most(ceil_div(longest, t.chunk), 1)),
        head_states((chunks - 1) * own_rows * n_stride + t.columns * n_stride),
        steps(arena, q_stride) {
    const std::int64_t tokens_p = q_stride * p_stride, tokens_n = q_stride * n_stride, pairs = q_stride * q_stride;
    states = arena.take<T>(t.heads * head_states);
    adjoints = arena.take<T>(t.heads * t.columns * n_stride);
    adjoint_transposed = arena.take<T>(d.dstate * p_stride);
    for (T** tile : {&B, &C, &dB, &dC}) *tile = arena.take<T>(tokens_n);
    B_transposed = arena.take<T>(d.dstate * q_stride);
    for (T** tile : {&gx, &scores, &weights}) *tile = arena.take<T>(pairs);
    CB = arena.take<T>(units_of_group(t) > 1 ? 0 : pairs);
    for (T** tile : {&x, &x_weighted, &g, &g_weighted, &dx}) *tile = arena.take<T>(tokens_p);
    x_transposed = arena.take<T>(t.columns * q_stride);
    for (T** tile : {&dz, &x_stepped, &y}) *tile = arena.take<T>(args.z ? tokens_p : 0);
    state_transposed = arena.take<T>(args.z ? d.dstate * p_stride : 0);
    D = arena.take<T>(p_stride);
    for (T** row : {&from_adjoint, &from_state, &pairs_across, &pairs_below}) *row = arena.take<T>(q_stride);
    partial_dots = arena.take<T>(q_stride * kLanes<T>);
    dt_slope = arena.take<T>(t.heads * q_stride);
    dA = arena.take<double>(t.heads);
    ddt_bias = arena.take<double>(t.heads);
    dD = arena.take<double>(t.heads * p_stride);
  }

  std::int64_t q_stride, p_stride, n_stride;
  std::int64_t own_rows;     // of a state: the next one takes the place of the others, which lie in dx meanwhile
  std::int64_t chunks;       // whose states are there at the same time
  std::int64_t head_states;  // the size of those of a head
  Steps<T> steps;
  T* states;              // [heads] of the states [p,n*] that enter each chunk, each own_rows behind the one before
  T* adjoints;            // [heads,p,n*] of the states that leave the chunk
  T* adjoint_transposed;  // [n,p*] of one head
  T *B, *C, *dB, *dC;     // [q,n*]
  T* B_transposed;        // [n,q*]
  T* CB;                  // [q,q*] C[i].B[j], up to the diagonal as the next three, where no other unit wants it
  T* gx;                  // [q,q*] g[i].x[j]
  T* scores;              // [q,q*] CB L
  T* weights;             // [q,q*] sum over heads of gx L dt[j]
  T *x, *g, *dx;          // [q,p*]
  T* x_weighted;          // [q,p*] L[end][j] dt[j] x[j]
  T* g_weighted;          // [q,p*] exp(s[i]) g[i]
  T* x_transposed;        // [p,q*]
  T* dz;                  // [q,p*] dy silu'(z), then times y
  T *x_stepped, *y;       // [q,p*] dt x, and y before the gate
  T* state_transposed;    // [n,p*] of one head
  T* D;                   // [p*]
  T* from_adjoint;        // [q*] L[end][j] x[j].(G B[j])
  T* from_state;          // [q*] exp(s[i]) g[i].(h C[i])
  T* pairs_across;        // [q*] sum_{k>=i>j} CB[k][j] gx[k][j] L[k][j] dt[j]
  T* pairs_below;         // [q*] sum_{i>=j} CB[i][j] gx[i][j] L[i][j]
  T* partial_dots;        // [q,lanes]
  T* dt_slope;            // [heads,q*] ddt before limit and softplus
  double *dA, *ddt_bias;  // [heads] of the tokens so far
  double* dD;             // [heads,p*]
};

// partial[r] += the products of a block with what lies beside it, lane by lane.
template <class T, int R, int V>
STATESCAN_INLINE void add_dots(T* partial, const Vec<T> (&block)[R][V], const T* other, std::int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Vec<T> sum = load<T>(partial + r * kLanes<T>);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum += block[r][v] * load<T>(other + r * stride + v * kLanes<T>);
    store<T>(partial + r * kLanes<T>, sum);
  }
}

template <class T, int R, int V>
STATESCAN_INLINE void add_to_block(T* to, std::int64_t stride, const Vec<T> (&block)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* const at = to + r * stride + v * kLanes<T>;
      store<T>(at, load<T>(at) + block[r][v]);
    }
}

template <class T>
void clear(T* tile, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) tile[i] = T(0);
}

// to[r] = sum of the lanes of partial[r].
template <class T>
void sum_dots(T* to, const T* partial, std::int64_t rows) {
  for (std::int64_t first = 0; first < rows; first += kLanes<T>) {
    Vec<T> block[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) block[i] = load<T>(partial + (first + i) * kLanes<T>);
    store<T>(to + first, sum_rows<T>(block));
  }
}

template <class T>
T dot(const T* a, const T* b, std::int64_t whole_count) {
  Vec<T> sum[4] = {};
  for (std::int64_t i = 0; i < whole_count; i += kLanes<T>) {
    Vec<T>& into = sum[i / kLanes<T> % 4];
    into += load<T>(a + i) * load<T>(b + i);
  }
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One unit over the chunks of its sequence.
template <class T>
struct Block {
  const BackwardArgs& args;
  const Dims& d;
  const Tiling& t;
  const Shared<T>& shared;
  const Tiles<T>& tiles;
  Unit unit;
  Walk walk;

  std::int64_t chunks() const { return ceil_div(walk.length(), t.chunk); }
  T* state(std::int64_t k, std::int64_t chunk) const {
    return tiles.states + k * tiles.head_states + chunk % tiles.chunks * tiles.own_rows * tiles.n_stride;
  }
  T* adjoint(std::int64_t k) const { return tiles.adjoints + k * t.columns * tiles.n_stride; }

  TileView rows(const Tensor& tensor, std::int64_t i, std::int64_t h) const { return walk.rows(tensor, i, h, unit.p0); }

  std::int64_t tokens(std::int64_t start) const { return most(0, least(t.chunk, walk.length() - start)); }

  // To be fetched beside a product of `steps` blocks: the rows of head k in the chunk from token `start` on, those that follow
  // on chunk c of head k in the order of the backward, and a state.
  Ahead ahead(const Tensor& tensor, std::int64_t start, std::int64_t k, std::int64_t steps) const {
    const std::int64_t q = tokens(start);
    if (!tensor || q == 0) return {};
    return {rows(tensor, start, unit.h0 + k), q, unit.columns, steps};
  }

  Ahead next(const Tensor& tensor, std::int64_t c, std::int64_t k, std::int64_t steps) const {
    if (k + 1 < unit.heads) return ahead(tensor, c * t.chunk, k + 1, steps);
    return c > 0 ? ahead(tensor, (c - 1) * t.chunk, 0, steps) : Ahead();
  }

  Ahead ahead(const T* state, std::int64_t steps) const {
    return {tile_view<T>(state, tiles.n_stride), unit.columns, tiles.n_stride, steps};
  }

  // B or C of the chunk that comes after chunk c, and what the group's units before this one left of dB or dC.
  Ahead next_projection(const Tensor& tensor, std::int64_t c, std::int64_t steps) const {
    if (c == 0) return {};
    return {walk.rows(tensor, (c - 1) * t.chunk, unit.group, 0), t.chunk, d.dstate, steps};
  }

  Ahead ahead_of_sums(const Tensor& sums, std::int64_t start, std::int64_t steps) const {
    if (unit.place == 0) return {};
    return {walk.rows(sums, start, unit.group, 0), tokens(start), tiles.n_stride, steps};
  }

  // Of dx what comes next: the rows of head k in chunk c, or, where states lie there, those of the next state.
  Ahead ahead_of_rows(std::int64_t c, std::int64_t k, std::int64_t steps) const {
    if (tiles.own_rows >= unit.columns) return ahead(args.dx, c * t.chunk, k, steps);
    return c > 0 ? next(args.dx, c - 1, k, steps) : Ahead();
  }

  TileView state_view(const Tensor& tensor, std::int64_t k) const {
    return {tensor.data, tensor.dtype, offset_of(tensor, unit.sequence, unit.h0 + k, unit.p0), tensor.stride[2],
            tensor.stride[3]};
  }

  void load_x(std::int64_t start, std::int64_t q, std::int64_t h) const {
    load_tile<T>(tiles.x, tiles.p_stride, rows(args.x, start, h), q, unit.columns);
    for (std::int64_t j = 0; j < q; ++j)
      scale_row(tiles.x_weighted, tiles.x, j, tiles.steps.to_end[j] * tiles.steps.dt[j]);
  }

  void scale_row(T* to, const T* from, std::int64_t row, T scale) const {
    for (std::int64_t c = row * tiles.p_stride; c < (row + 1) * tiles.p_stride; c += kLanes<T>)
      store<T>(to + c, scale * load<T>(from + c));
  }

  // g, and with a gate dy silu'(z) in its place of dz.
  void load_g(std::int64_t start, std::int64_t q, std::int64_t h) const {
    load_tile<T>(tiles.g, tiles.p_stride, rows(args.dy, start, h), q, unit.columns);
    if (args.z) {
      load_tile<T>(tiles.dz, tiles.p_stride, rows(args.z, start, h), q, unit.columns);
      for (std::int64_t i = 0; i < q * tiles.p_stride; i += kLanes<T>) {
        const Vec<T> dy = load<T>(tiles.g + i), z = load<T>(tiles.dz + i), s = sigmoid<T>(z);
        store<T>(tiles.g + i, dy * (z * s));
        store<T>(tiles.dz + i, dy * (s + z * s * (T(1) - s)));
      }
    }
    for (std::int64_t i = 0; i < q; ++i) scale_row(tiles.g_weighted, tiles.g, i, tiles.steps.from_start[i]);
  }

  void load_D(std::int64_t h) const {
    for (std::int64_t c = 0; c < unit.columns; ++c)
      tiles.D[c] = load_element<T>(args.D.data, args.D.dtype,
                                   d.D_per_channel ? offset_of(args.D, h, unit.p0 + c) : offset_of(args.D, h));
  }

  // The first chunk of those whose states are there together with that of chunk c, and the last.
  std::int64_t first_beside(std::int64_t c) const { return c - c % tiles.chunks; }
  std::int64_t last_beside(std::int64_t c) const { return least(first_beside(c) + tiles.chunks, chunks()) - 1; }

  // The state that enters the first of these chunks, c: the one that the forward kept, or the initial one.
  void load_first_state(std::int64_t k, std::int64_t c) const {
    const Tensor& kept = args.chunk_states;
    if (kept) {
      const std::int64_t row = stretch_row(args, walk, unit.sequence, c / tiles.chunks);
      const std::int64_t first = offset_of(kept, walk.batch, row, unit.h0 + k, unit.p0);
      load_tile<T>(state(k, c), tiles.n_stride, {kept.data, kept.dtype, first, kept.stride[3], kept.stride[4]}, unit.columns,
                   d.dstate);
    } else if (args.initial_state) {
      load_tile<T>(state(k, c), tiles.n_stride, state_view(args.initial_state, k), unit.columns, d.dstate);
    }
  }

  // The rows of the state that enters chunk c whose place the next one takes: until they are wanted they lie in dx of the chunk
  // before, which is written later. move(rows of dx, how many, their columns, the same elements of the state), for all of them.
  template <class Move>
  void move_rows(std::int64_t k, std::int64_t c, Move&& move) const {
    const std::int64_t count = (unit.columns - tiles.own_rows) * tiles.n_stride;
    if (count <= 0) return;
    const std::int64_t whole = count / unit.columns, rest = count % unit.columns;
    TileView in_dx = rows(args.dx, (c - 1) * t.chunk, unit.h0 + k);
    T* const in_state = state(k, c + 1);  // where its own rows end
    move(in_dx, whole, unit.columns, in_state);
    in_dx.first += whole * in_dx.row_stride;
    if (rest > 0) move(in_dx, 1, rest, in_state + whole * unit.columns);
  }

  void put_by(std::int64_t k, std::int64_t c) const {
    move_rows(k, c, [](const TileView& to, std::int64_t count, std::int64_t columns, const T* from) {
      store_tile<T>(to, count, columns, from, columns);
    });
  }

  // The state that enters chunk c whole again, after the one that enters the next chunk.
  void take_back(std::int64_t k, std::int64_t c) const {
    if (tiles.own_rows >= unit.columns || c == last_beside(c)) return;
    if (c == first_beside(c)) return load_first_state(k, c);
    move_rows(k, c, [](const TileView& from, std::int64_t count, std::int64_t columns, T* to) {
      load_tile<T>(to, columns, from, count, columns);
    });
  }

  // The states that enter the chunks from `first` up to `last`.
  void sweep_states(std::int64_t first, std::int64_t last) const {
    for (std::int64_t k = 0; k < unit.heads; ++k) load_first_state(k, first);
    for (std::int64_t c = first; c < last; ++c) {
      const std::int64_t start = c * t.chunk;
      load_tile<T>(tiles.B, tiles.n_stride, walk.rows(args.B, start, unit.group, 0), t.chunk, d.dstate);
      for (std::int64_t k = 0; k < unit.heads; ++k) {
        if (c > first) put_by(k, c);
        load_steps<T>(tiles.steps, args, walk, start, t.chunk, unit.h0 + k);
        load_x(start, t.chunk, unit.h0 + k);
        const std::int64_t next_k = (k + 1) % unit.heads, next_c = next_k > 0 ? c : c + 1;
        const std::int64_t steps = count_blocks<T>(unit.columns, tiles.n_stride);
        auto next = c > 0 || args.initial_state ? carry<true, T> : carry<false, T>;
        next(state(k, c + 1), state(k, c), tiles.steps.from_start[t.chunk - 1], tiles.x_weighted, tiles.p_stride, tiles.B,
             tiles.n_stride, unit.columns, t.chunk, ahead(args.x, next_c * t.chunk, next_k, steps),
             next_c < last ? ahead(state(next_k, next_c + 1), steps) : Ahead());
      }
    }
  }

  // From C B^T and g x^T of one head: the scores, its part of the weights, and the sums over pairs that ddt is made of. Rows
  // come last to first: `below` holds sum_{k>=i} of each column. What a row's last vector has past the diagonal is never used.
  void combine_pairs(const T* CB, std::int64_t q) const {
    const Steps<T>& steps = tiles.steps;
    T* const below = tiles.partial_dots;  // [q*]
    clear(below, tiles.q_stride);
    Vec<T> across[kLanes<T>] = {};
    using Index = std::remove_reference_t<decltype(IntVec<T>{}[0])>;
    IntVec<T> lane;
    for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
    for (std::int64_t i = q; i-- > 0;) {
      const std::int64_t row = i * tiles.q_stride;
      Vec<T> sum{};
      for (std::int64_t j = 0; j <= i; j += kLanes<T>) {
        const IntVec<T> left = lane < static_cast<Index>(i - j);
        const Vec<T> L = steps.decay(i, j), dt = load<T>(steps.dt + j), gx = load<T>(tiles.gx + row + j);
        const Vec<T> score = load<T>(CB + row + j) * L;
        store<T>(tiles.scores + row + j, score);
        store<T>(tiles.weights + row + j, load<T>(tiles.weights + row + j) + gx * (L * dt));
        const Vec<T> column = load<T>(below + j) + score * gx;
        store<T>(below + j, column);
        sum += left ? column * dt : Vec<T>{};
      }
      tiles.pairs_below[i] = below[i];
      across[i % kLanes<T>] = sum;
      if (i % kLanes<T> == 0) store<T>(tiles.pairs_across + i, sum_rows<T>(across));
    }
  }

  // exp(s[i]) h^T g[i] into dC, and its dot with C[i].
  void add_from_state(const T* h, std::int64_t q, Ahead first, Ahead second) const {
    clear(tiles.partial_dots, tiles.q_stride * kLanes<T>);
    for_column_blocks<T>(tiles.n_stride, [&]<int V>(Constant<V>, std::int64_t c) {
      for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
        first.step();
        second.step();
        const std::int64_t at = i * tiles.n_stride + c;
        prefetch_block<T, R, V>(tiles.C + at, tiles.n_stride);
        prefetch_block<T, R, V>(tiles.dC + at, tiles.n_stride);
        Vec<T> sum[R][V] = {};
        multiply_add<T>(sum, tiles.g_weighted + i * tiles.p_stride, tiles.p_stride, h + c, tiles.n_stride, unit.columns);
        add_dots<T>(tiles.partial_dots + i * kLanes<T>, sum, tiles.C + at, tiles.n_stride);
        add_to_block<T>(tiles.dC + at, tiles.n_stride, sum);
      });
    });
    sum_dots<T>(tiles.from_state, tiles.partial_dots, q);
  }

  // dt[j] L[end][j] G^T x[j] into dB; L[end][j] G B[j] to dx, and its dot with x[j].
  void add_from_adjoint(const T* G, std::int64_t q, Ahead first, Ahead second, Ahead third, Ahead fourth) const {
    for_column_blocks<T>(tiles.n_stride, [&]<int V>(Constant<V>, std::int64_t c) {
      for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t j) {
        first.step();
        second.step();
        T* const dB = tiles.dB + j * tiles.n_stride + c;
        prefetch_block<T, R, V>(dB, tiles.n_stride);
        Vec<T> sum[R][V] = {};
        multiply_add<T>(sum, tiles.x_weighted + j * tiles.p_stride, tiles.p_stride, G + c, tiles.n_stride, unit.columns);
        add_to_block<T>(dB, tiles.n_stride, sum);
      });
    });
    load_tile<T>(tiles.adjoint_transposed, tiles.p_stride, transposed(tile_view<T>(G, tiles.n_stride)), d.dstate, unit.columns);
    clear(tiles.partial_dots, tiles.q_stride * kLanes<T>);
    for_column_blocks<T>(tiles.p_stride, [&]<int V>(Constant<V>, std::int64_t c) {
      for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t j) {
        third.step();
        fourth.step();
        const std::int64_t at = j * tiles.p_stride + c;
        Vec<T> sum[R][V] = {};
        const T* const B = tiles.B + j * tiles.n_stride;
        multiply_add<T>(sum, B, tiles.n_stride, tiles.adjoint_transposed + c, tiles.p_stride, d.dstate);
        scale_rows<T>(sum, tiles.steps.to_end + j);
        add_dots<T>(tiles.partial_dots + j * kLanes<T>, sum, tiles.x + at, tiles.p_stride);
        store_block<T>(tiles.dx + at, tiles.p_stride, sum);
      });
    });
    sum_dots<T>(tiles.from_adjoint, tiles.partial_dots, q);
  }

  // dz = dy silu'(z) y, y made again as the forward makes it; h null: no state enters.
  void store_dz(const T* h, std::int64_t start, std::int64_t q, std::int64_t head) const {
    for (std::int64_t j = 0; j < q; ++j) scale_row(tiles.x_stepped, tiles.x, j, tiles.steps.dt[j]);
    T* const h_transposed = tiles.state_transposed;
    if (h) load_tile<T>(h_transposed, tiles.p_stride, transposed(tile_view<T>(h, tiles.n_stride)), d.dstate, unit.columns);
    for_column_blocks<T>(tiles.p_stride, [&]<int V>(Constant<V>, std::int64_t c) {
      for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
        Vec<T> sum[R][V] = {};
        if (h) {
          multiply_add<T>(sum, tiles.C + i * tiles.n_stride, tiles.n_stride, h_transposed + c, tiles.p_stride, d.dstate);
          scale_rows<T>(sum, tiles.steps.from_start + i);
        }
        multiply_lower<T>(sum, tiles.scores, tiles.q_stride, tiles.x_stepped + c, tiles.p_stride, i);
        store_block<T>(tiles.y + i * tiles.p_stride + c, tiles.p_stride, sum);
      });
    });
    for (std::int64_t i = 0; i < q; ++i)
      for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>) {
        const std::int64_t at = i * tiles.p_stride + c;
        Vec<T> y = load<T>(tiles.y + at);
        if (args.D) y += load<T>(tiles.D + c) * load<T>(tiles.x + at);
        store<T>(tiles.dz + at, load<T>(tiles.dz + at) * y);
      }
    store_tile<T>(rows(args.dz, start, head), q, unit.columns, tiles.dz, tiles.p_stride);
  }

  // The rest of dx; kFromAdjoint: its tile holds the first term.
  template <bool kFromAdjoint>
  void store_dx(std::int64_t start, std::int64_t q, std::int64_t h) const {
    for_column_blocks<T>(tiles.p_stride, [&]<int V>(Constant<V>, std::int64_t c) {
      for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t j) {
        T* const dx = tiles.dx + j * tiles.p_stride + c;
        Vec<T> sum[R][V] = {};
        if constexpr (kFromAdjoint) load_block<T>(sum, dx, tiles.p_stride);
        multiply_lower_transposed<T>(sum, tiles.scores, tiles.q_stride, tiles.g + c, tiles.p_stride, j, q);
        scale_rows<T>(sum, tiles.steps.dt + j);
        store_block<T>(dx, tiles.p_stride, sum);
      });
    });
    if (args.D)
      for (std::int64_t j = 0; j < q; ++j)
        for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>) {
          const std::int64_t at = j * tiles.p_stride + c;
          store<T>(tiles.dx + at, load<T>(tiles.dx + at) + load<T>(tiles.D + c) * load<T>(tiles.g + at));
        }
    store_tile<T>(rows(args.dx, start, h), q, unit.columns, tiles.dx, tiles.p_stride);
  }

  void add_dD(std::int64_t k, std::int64_t q) const {
    for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>) {
      alignas(kVectorBytes) T lanes[kLanes<T>];
      Vec<T> sum{};
      for (std::int64_t at = c; at < q * tiles.p_stride; at += tiles.p_stride)
        sum += load<T>(tiles.g + at) * load<T>(tiles.x + at);
      store<T>(lanes, sum);
      for (int i = 0; i < kLanes<T>; ++i) tiles.dD[k * tiles.p_stride + c + i] += double(lanes[i]);
    }
  }

  // The slope of dt, and dA, from the four sums of ddtA; `whole` is exp(s[end]) <G,h>.
  void combine_steps(std::int64_t k, T whole, std::int64_t q) const {
    const double A = load_element<double>(args.A.data, args.A.dtype, (unit.h0 + k) * args.A.stride[0]);
    T* const slope = tiles.dt_slope + k * tiles.q_stride;
    double after = 0;  // sum_{k>=i} from_state[k], kept in slope's place
    for (std::int64_t i = q; i-- > 0;) slope[i] = T(after += double(tiles.from_state[i]));
    double before = whole, dA = 0;  // before: and sum_{j<i} dt[j] from_adjoint[j]
    for (std::int64_t i = 0; i < q; ++i) {
      const double dt = tiles.steps.dt[i], ddtA = (before + double(slope[i])) + double(tiles.pairs_across[i]);
      slope[i] = T(double(tiles.from_adjoint[i]) + double(tiles.pairs_below[i]) + A * ddtA);
      dA += dt * ddtA;
      before += dt * double(tiles.from_adjoint[i]);
    }
    tiles.dA[k] += dA;
  }

  // All that chunk c holds of head k: its part of dB and dC stays in their tiles, ddt in the slopes.
  void differentiate_head(std::int64_t c, std::int64_t k, const T* CB) const {
    const std::int64_t start = c * t.chunk, q = tokens(start), head = unit.h0 + k;
    const std::int64_t of_states = count_blocks<T>(q, tiles.n_stride), of_rows = count_blocks<T>(q, tiles.p_stride);
    const bool from_state = c > 0 || args.initial_state, from_adjoint = c + 1 < chunks() || args.dfinal_state;
    const T *h = from_state ? state(k, c) : nullptr, *G = adjoint(k);
    if (from_state) take_back(k, c);
    load_steps<T>(tiles.steps, args, walk, start, q, head);
    const T decay = tiles.steps.from_start[q - 1];
    load_x(start, q, head);
    load_tile<T>(tiles.x_transposed, tiles.q_stride, transposed(tile_view<T>(tiles.x, tiles.p_stride)), unit.columns, q);
    load_g(start, q, head);
    if (args.D) load_D(head);
    multiply_pairs<T>(tiles.gx, tiles.q_stride, tiles.g, tiles.p_stride, tiles.x_transposed, q, unit.columns);
    combine_pairs(CB, q);
    const bool ends = k + 1 == unit.heads;  // and the sums of the group's units come next, then another chunk
    if (from_state)
      add_from_state(h, q, next(args.x, c, k, of_states), ends ? ahead_of_sums(shared.dC, start, of_states) : Ahead());
    else
      clear(tiles.from_state, q);
    if (from_adjoint)
      add_from_adjoint(G, q, next(args.dy, c, k, of_states), ends ? ahead_of_sums(shared.dB, start, of_states) : Ahead(),
                       ahead_of_rows(c, k, of_rows), ends ? next_projection(args.B, c, of_rows) : Ahead());
    else clear(tiles.from_adjoint, q);
    if (args.dz) store_dz(h, start, q, head);
    if (args.dx) from_adjoint ? store_dx<true>(start, q, head) : store_dx<false>(start, q, head);
    if (args.dD) add_dD(k, q);
    combine_steps(k, from_state && from_adjoint ? decay * dot<T>(G, h, unit.columns * tiles.n_stride) : T(0), q);
    if (c == 0 && !args.dinitial_state) return;
    auto previous = from_adjoint ? carry<true, T> : carry<false, T>;
    const std::int64_t to_states = count_blocks<T>(unit.columns, tiles.n_stride);
    const T* const next_state = k + 1 < unit.heads ? (from_state ? state(k + 1, c) : nullptr) : c > 1 ? state(0, c - 1) : nullptr;
    previous(adjoint(k), G, decay, tiles.g_weighted, tiles.p_stride, tiles.C, tiles.n_stride, unit.columns, q,
             next_state ? ahead(next_state, to_states) : Ahead(), ends ? next_projection(args.C, c, to_states) : Ahead());
  }

  // What the weights, summed over heads, add to dB and dC.
  void multiply_weights(std::int64_t q) const {
    for_column_blocks<T>(tiles.n_stride, [&]<int V>(Constant<V>, std::int64_t c) {
      for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
        const std::int64_t at = i * tiles.n_stride + c;
        Vec<T> sum[R][V];
        load_block<T>(sum, tiles.dC + at, tiles.n_stride);
        multiply_lower<T>(sum, tiles.weights, tiles.q_stride, tiles.B + c, tiles.n_stride, i);
        store_block<T>(tiles.dC + at, tiles.n_stride, sum);
        load_block<T>(sum, tiles.dB + at, tiles.n_stride);
        multiply_lower_transposed<T>(sum, tiles.weights, tiles.q_stride, tiles.C + c, tiles.n_stride, i, q);
        store_block<T>(tiles.dB + at, tiles.n_stride, sum);
      });
    });
  }

  bool is_last() const { return unit.place + 1 == units_of_group(t); }

  // tile += what the group's units before this one left in `sums`; passed on there, unless this is the last. Of a triangle only
  // what lies up to the diagonal.
  template <bool kTriangle>
  void add_up(const TileView& sums, T* tile, std::int64_t stride, std::int64_t q) const {
    const bool is_first = unit.place == 0;
    if (is_first && is_last()) return;
    for (std::int64_t i = 0; i < q; ++i) {
      T *const mine = tile + i * stride, *const left = static_cast<T*>(sums.data) + sums.first + i * sums.row_stride;
      T* const to = is_last() ? mine : left;
      for (std::int64_t at = 0, end = kTriangle ? whole_vectors<T>(i + 1) : stride; at < end; at += kLanes<T>) {
        const Vec<T> v = load<T>(mine + at);
        store<T>(to + at, is_first ? v : load<T>(left + at) + v);
      }
    }
  }

  // The unit's part of dB and dC in the chunk from token `start` on, added up in the order of the group's units.
  void hand_on(std::int64_t start, std::int64_t q) const {
    const std::int64_t row = (walk.batch * d.ngroups + unit.group) * d.seqlen + walk.first + start;
    add_up<true>(tile_view<T>(shared.weights + row * tiles.q_stride, tiles.q_stride), tiles.weights, tiles.q_stride, q);
    if (is_last()) multiply_weights(q);
    add_up<false>(walk.rows(shared.dB, start, unit.group, 0), tiles.dB, tiles.n_stride, q);
    add_up<false>(walk.rows(shared.dC, start, unit.group, 0), tiles.dC, tiles.n_stride, q);
    if (!is_last()) return;
    if (args.dB) store_tile<T>(walk.rows(args.dB, start, unit.group, 0), q, d.dstate, tiles.dB, tiles.n_stride);
    if (args.dC) store_tile<T>(walk.rows(args.dC, start, unit.group, 0), q, d.dstate, tiles.dC, tiles.n_stride);
  }

  // ddt of head k: the slopes of the blocks of headdim added up, and by the last of them taken through limit and softplus.
  void finish_ddt(std::int64_t k, std::int64_t start, std::int64_t q) const {
    T* const slope = tiles.dt_slope + k * tiles.q_stride;
    const std::int64_t head = unit.h0 + k;
    if (t.column_blocks > 1) {
      const bool is_last = unit.column_block + 1 == t.column_blocks;
      for (std::int64_t i = 0; i < q; ++i) {
        T& sum = shared.dt_slope[(walk.batch * d.seqlen + walk.token(start + i)) * d.nheads + head];
        const T v = unit.column_block > 0 ? sum + slope[i] : slope[i];
        (is_last ? slope[i] : sum) = v;
      }
      if (!is_last) return;
    }
    const T bias = args.dt_bias ? load_element<T>(args.dt_bias.data, args.dt_bias.dtype, head * args.dt_bias.stride[0]) : T(0);
    T* const raw = tiles.steps.dt;
    load_tile<T>(raw, whole_vectors<T>(q), walk.row(args.dt, start, head), 1, q);
    for (std::int64_t i = 0; i < q; i += kLanes<T>) {
      const Vec<T> v = load<T>(raw + i) + bias, step = args.dt_softplus ? softplus<T>(v) : v;
      Vec<T> ddt = load<T>(slope + i);
      if (args.dt_softplus) ddt *= sigmoid<T>(v);
      ddt = step < T(args.dt_min) ? Vec<T>{} : step > T(args.dt_max) ? Vec<T>{} : ddt;
      store<T>(slope + i, ddt);
    }
    for (std::int64_t i = 0; i < q; ++i) tiles.ddt_bias[k] += double(slope[i]);
    if (args.ddt) store_tile<T>(walk.row(args.ddt, start, head), 1, q, slope, tiles.q_stride);
  }

  void differentiate_chunk(std::int64_t c) const {
    const std::int64_t start = c * t.chunk, q = tokens(start);
    load_tile<T>(tiles.B, tiles.n_stride, walk.rows(args.B, start, unit.group, 0), q, d.dstate);
    load_tile<T>(tiles.C, tiles.n_stride, walk.rows(args.C, start, unit.group, 0), q, d.dstate);
    const T* const CB = shared.CB.tile(unit, walk, start, chunks() - c, tiles.CB, [&](T* made) {
      load_tile<T>(tiles.B_transposed, tiles.q_stride, transposed(tile_view<T>(tiles.B, tiles.n_stride)), d.dstate, q);
      multiply_pairs<T>(made, tiles.q_stride, tiles.C, tiles.n_stride, tiles.B_transposed, q, d.dstate);
    });
    for (T* tile : {tiles.dB, tiles.dC}) clear(tile, q * tiles.n_stride);
    clear(tiles.weights, q * tiles.q_stride);
    for (std::int64_t k = 0; k < unit.heads; ++k) differentiate_head(c, k, CB);
  }

  // The unit's share of dA, ddt_bias and dD to what its sequence has of them; blocks of headdim add up.
  void add_sums() const {
    const bool is_first = unit.column_block == 0;
    for (std::int64_t k = 0; k < unit.heads; ++k) {
      const std::int64_t at = unit.sequence * d.nheads + unit.h0 + k;
      shared.dA[at] = (is_first ? 0 : shared.dA[at]) + tiles.dA[k];
      shared.ddt_bias[at] = (is_first ? 0 : shared.ddt_bias[at]) + tiles.ddt_bias[k];
      for (std::int64_t c = 0; c < unit.columns; ++c) {
        double& dD = d.D_per_channel ? shared.dD[at * d.headdim + unit.p0 + c] : shared.dD[at];
        const bool starts = d.D_per_channel || (is_first && c == 0);
        dD = (starts ? 0 : dD) + tiles.dD[k * tiles.p_stride + c];
      }
    }
  }

  void run(std::int64_t index) const {
    const bool waits = unit.place > 0;  // for the unit before it in its group
    for (double* sums : {tiles.dA, tiles.ddt_bias}) clear(sums, unit.heads);
    clear(tiles.dD, unit.heads * tiles.p_stride);
    for (std::int64_t k = 0; k < unit.heads; ++k) {
      if (args.dfinal_state) load_tile<T>(adjoint(k), tiles.n_stride, state_view(args.dfinal_state, k), unit.columns, d.dstate);
      else if (chunks() == 0) clear(adjoint(k), unit.columns * tiles.n_stride);
    }
    int done = 0;
    for (std::int64_t c = chunks(); c-- > 0;) {
      if (c == last_beside(c)) sweep_states(first_beside(c), c);
      differentiate_chunk(c);
      const std::int64_t start = c * t.chunk, q = tokens(start);
      if (waits) wait_for(shared.chunks_done[index - 1], done + 1);
      hand_on(start, q);
      for (std::int64_t k = 0; k < unit.heads; ++k) finish_ddt(k, start, q);
      advance_to(shared.chunks_done[index], ++done);
    }
    if (waits) wait_for(shared.chunks_done[index - 1], done + 1);
    add_sums();
    advance_to(shared.chunks_done[index], done + 1);
    if (args.dinitial_state)
      for (std::int64_t k = 0; k < unit.heads; ++k)
        store_tile<T>(state_view(args.dinitial_state, k), unit.columns, d.dstate, adjoint(k), tiles.n_stride);
  }
};

// The shares of the sequences, added up in their order.
void sum_over_sequences(const Tensor& gradient, const double* shares, const Dims& d, std::int64_t channels) {
  if (!gradient) return;
  for (std::int64_t h = 0; h < d.nheads; ++h)
    for (std::int64_t p = 0; p < channels; ++p) {
      double sum = 0;
      for (std::int64_t s = 0; s < d.num_sequences; ++s) sum += shares[(s * d.nheads + h) * channels + p];
      store_element<double>(gradient.data, gradient.dtype,
                            gradient.ndim == 2 ? offset_of(gradient, h, p) : offset_of(gradient, h), sum);
    }
}

template <class T>
std::size_t bytes_per_thread(const Tiling& t, const BackwardArgs& args, const Dims& d, std::int64_t longest) {
  Arena count(nullptr);
  Tiles<T>(count, t, args, d, longest);
  return count.used();
}

template <class T>
std::size_t bytes_shared(const Tiling& t, const BackwardArgs& args, const Dims& d, std::int64_t longest) {
  Arena count(nullptr);
  Shared<T>(count, t, args, d, longest);
  return count.used();
}

template <class T>
std::size_t bytes_of(const BackwardArgs& args, const Dims& d) {
  const Tiling t = tiling_of(args, d);
  const std::int64_t longest = longest_sequence(args, d);
  return bytes_shared<T>(t, args, d, longest) +
         bytes_per_thread<T>(t, args, d, longest) * least(max_threads(), d.num_sequences * t.units);
}

template <class T>
void differentiate(const BackwardArgs& args, const Dims& d) {
  const Tiling t = tiling_of(args, d);
  const std::int64_t longest = longest_sequence(args, d);
  const std::size_t bytes = bytes_per_thread<T>(t, args, d, longest);
  Arena common(args.workspace.data);
  const Shared<T> shared(common, t, args, d, longest);
  shared.CB.start();
  clear(shared.chunks_done, d.num_sequences * t.units);
  if (t.units == 0)  // no unit writes a share
    clear(shared.dA, shared.share_count);
  parallel_for_groups(d.num_sequences * t.units, units_per_task(t, d, 5), [&](std::int64_t index, int thread) {
    Arena arena(static_cast<char*>(args.workspace.data) + common.used() + thread * bytes);
    const Tiles<T> tiles(arena, t, args, d, longest);
    const Unit unit(t, d, index);
    const Block<T> block{args, d, t, shared, tiles, unit, walk_of(args, d, unit.sequence)};
    block.run(index);
  });
  sum_over_sequences(args.dA, shared.dA, d, 1);
  sum_over_sequences(args.ddt_bias, shared.ddt_bias, d, 1);
  sum_over_sequences(args.dD, shared.dD, d, d.D_per_channel ? d.headdim : 1);
  const std::int64_t reached = t.units > 0 ? packed_tokens(args, d) : 0;
  for (const Tensor& gradient : {args.dx, args.ddt, args.dB, args.dC, args.dz}) clear_tokens(gradient, reached);
}

}  // namespace

std::size_t workspace_bytes(const BackwardArgs& args, const Dims& d) {
  return args.x.dtype == DType::float64 ? bytes_of<double>(args, d) : bytes_of<float>(args, d);
}

void run(const BackwardArgs& args, const Dims& d) {
  args.x.dtype == DType::float64 ? differentiate<double>(args, d) : differentiate<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
