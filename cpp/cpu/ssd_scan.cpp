// ssd_scan on the CPU, a chunk of q tokens at a time
// Math     s[i] = sum_{k<=i} dt[k] A, from the start of the chunk, h the state that enters it:
//          y[i] = exp(s[i]) C[i].h + sum_{j<=i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j] + D x[i], then y[i] *= silu(z[i])
//          h    = exp(s[q-1]) h + sum_j B[j] exp(s[q-1] - s[j]) dt[j] x[j]
// Shapes   x, z, y [b,l,h,p], dt [b,l,h], B, C [b,l,g,n]; states are held as [n,p]
// Traffic  x, dt, z and y once; B and C once for each block of heads; states stay in the second cache
// Tasks    units of (sequence, block of heads of a group, block of headdim), see Tiling: each walks the chunks of its
//          sequence; short ones share a task
// Numerics sums of T in a fixed order that depends on the row's own shape alone. s is summed in float64 and kept as two T, so
//          that a difference is exact to T even where s is large. Scores above the diagonal are never computed from nor read:
//          a NaN or an overflow in a token reaches no earlier one
#include "isa.h"
#include "matmul.h"
#include "parallel.h"
#include "simd.h"
#include "tile.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

STATESCAN_INLINE constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
STATESCAN_INLINE constexpr std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
STATESCAN_INLINE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How a call is cut. Batch, packing and threads have no say, so a row's bits never depend on them.
struct Tiling {
  std::int64_t chunk;           // tokens of a chunk, the last of a sequence may be shorter
  std::int64_t heads;           // heads of a unit of work: they share the loads of B and C and the product C B^T
  std::int64_t columns;         // headdim of a unit
  std::int64_t head_blocks;     // in a group
  std::int64_t column_blocks;
  std::int64_t units;           // of a sequence
};

// A chunk of q tokens costs q/2 (n + p) multiply-adds a token beside the recurrence's own 2 n p: short enough that this stays
// small, long enough that the tiles are worth their set-up, and whole register blocks. On Zen 4, 32 to 64 tokens are within
// 3 percent of each other for p 64, n 128; 96 cost 7 percent more. Chunks longer than kMaxChunk only cost time and scratch, so
// a larger chunk_size is cut to it.
constexpr std::int64_t kChunk = 48, kMaxChunk = 256;
// Up to kHeads heads share C B^T, unless a sequence then has fewer units than kUnits, which feed the threads of a small batch;
// with fewer heads than that, headdim is cut as well, into pieces of at least kColumns.
constexpr std::int64_t kHeads = 8, kUnits = 8, kColumns = 32;

Tiling tiling_of(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  Tiling t{};
  if (d.nheads == 0 || d.headdim == 0) return t;
  t.chunk = least(args.chunk_size > 0 ? args.chunk_size : kChunk, kMaxChunk);
  const std::int64_t group_heads = d.nheads / d.ngroups;
  t.heads = least(group_heads, most(1, least(kHeads, d.nheads / kUnits)));
  t.head_blocks = ceil_div(group_heads, t.heads);
  const std::int64_t wanted = most(1, least(ceil_div(kUnits, d.ngroups * t.head_blocks), d.headdim / kColumns));
  t.columns = ceil_div(ceil_div(d.headdim, wanted), kColumns) * kColumns;
  t.columns = least(t.columns, d.headdim);
  t.column_blocks = ceil_div(d.headdim, t.columns);
  t.units = d.ngroups * t.head_blocks * t.column_blocks;
  return t;
}

// The tiles of one thread. q tokens, n of dstate, p columns of headdim; rows marked * are padded to whole vectors.
template <class T>
struct Tiles {
  Tiles(Arena& arena, const Tiling& t, const ssd_scan::Args& args, const ssd_scan::Dims& d)
      : q_stride(whole_vectors<T>(least(t.chunk, most(d.seqlen, 1)))), p_stride(whole_vectors<T>(t.columns)) {
    state = arena.take<T>(t.heads * d.dstate * p_stride);
    C = arena.take<T>(q_stride * d.dstate);
    B_transposed = arena.take<T>(d.dstate * q_stride);
    CB = arena.take<T>(q_stride * q_stride);
    scores = arena.take<T>(q_stride * q_stride);
    x = arena.take<T>(q_stride * p_stride);
    x_weighted = arena.take<T>(q_stride * p_stride);
    y = arena.take<T>(q_stride * p_stride);
    z = arena.take<T>(args.z ? q_stride * p_stride : 0);
    D = arena.take<T>(p_stride);
    for (T** row : {&dt, &sum_high, &sum_low, &from_start, &to_end}) *row = arena.take<T>(q_stride);
  }

  std::int64_t q_stride, p_stride;
  T* state;         // [heads,n,p*]
  T* C;             // [q,n]
  T* B_transposed;  // [n,q*]
  T* CB;            // [q,q*] C.B of each pair of tokens, up to the diagonal
  T* scores;        // [q,q*] CB exp(s[i] - s[j]) dt[j]
  T* x;             // [q,p*]
  T* x_weighted;    // [q,p*] exp(s[q-1] - s[j]) dt[j] x[j]
  T* y;             // [q,p*]
  T* z;             // [q,p*]
  T* D;             // [p*]
  T *dt, *sum_high, *sum_low;  // [q*] the step, and s as a sum of two
  T *from_start, *to_end;      // [q*] exp(s[i]), and exp(s[q-1] - s[j]) dt[j]
};

// The tokens of one sequence in the order of the scan.
struct Walk {
  std::int64_t batch, first, last;
  bool reverse;

  std::int64_t length() const { return last - first; }
  std::int64_t token(std::int64_t i) const { return reverse ? last - 1 - i : first + i; }
  std::int64_t step(std::int64_t stride) const { return reverse ? -stride : stride; }
};

Walk walk_of(const ssd_scan::Args& args, const ssd_scan::Dims& d, std::int64_t s) {
  if (!args.cu_seqlens) return {s, 0, d.seqlen, args.reverse};
  return {0, index_at(args.cu_seqlens, s), index_at(args.cu_seqlens, s + 1), args.reverse};
}

// dt, its prefix sums s and their exps for one head; returns exp(s[q-1]).
template <class T>
T load_steps(const Tiles<T>& tiles, const ssd_scan::Args& args, const Walk& walk, std::int64_t start, std::int64_t q,
             std::int64_t h) {
  const T A = load_element<T>(args.A.data, args.A.dtype, h * args.A.stride[0]);
  const T bias = args.dt_bias ? load_element<T>(args.dt_bias.data, args.dt_bias.dtype, h * args.dt_bias.stride[0]) : T(0);
  const std::int64_t first = offset_of(args.dt, walk.batch, walk.token(start), h);
  load_tile<T>(tiles.dt, whole_vectors<T>(q), {args.dt.data, args.dt.dtype, first, 0, walk.step(args.dt.stride[1])}, 1, q);
  for (std::int64_t i = 0; i < q; i += kLanes<T>)
    store<T>(tiles.dt + i, discretise<T>(load<T>(tiles.dt + i), splat(bias), args.dt_softplus, T(args.dt_min), T(args.dt_max)));
  // What a sum in double rounds away counts where T is double too, so it is summed beside it (Knuth's two-sum).
  double sum = 0, lost = 0;
  for (std::int64_t i = 0; i < whole_vectors<T>(q); ++i) {
    if (i < q) {
      const double term = double(tiles.dt[i]) * double(A), next = sum + term, added = next - sum;
      if constexpr (sizeof(T) == sizeof(double)) lost += (sum - (next - added)) + (term - added);
      sum = next;
    }
    tiles.sum_high[i] = T(sum);
    tiles.sum_low[i] = T((sum - double(tiles.sum_high[i])) + lost);
  }
  for (std::int64_t i = 0; i < q; i += kLanes<T>) {
    const Vec<T> high = load<T>(tiles.sum_high + i), low = load<T>(tiles.sum_low + i);
    store<T>(tiles.from_start + i, exp(high));
    store<T>(tiles.to_end + i, exp((tiles.sum_high[q - 1] - high) + (tiles.sum_low[q - 1] - low)) * load<T>(tiles.dt + i));
  }
  return tiles.from_start[q - 1];
}

// CB = C B^T up to the diagonal, in whole register blocks.
template <class T>
void multiply_CB(const Tiles<T>& tiles, std::int64_t q, std::int64_t dstate) {
  for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
    for_column_blocks<T>(whole_vectors<T>(i + R), [&]<int V>(Constant<V>, std::int64_t j) {
      Vec<T> sum[R][V] = {};
      multiply_add<T>(sum, tiles.C + i * dstate, dstate, tiles.B_transposed + j, tiles.q_stride, dstate);
      store_block<T>(tiles.CB + i * tiles.q_stride + j, tiles.q_stride, sum);
    });
  });
}

// scores[i][j] for j <= i; what a row's last vector holds past the diagonal is never read.
template <class T>
void decay_scores(const Tiles<T>& tiles, std::int64_t q) {
  for (std::int64_t i = 0; i < q; ++i) {
    const T* CB = tiles.CB + i * tiles.q_stride;
    T* scores = tiles.scores + i * tiles.q_stride;
    for (std::int64_t j = 0; j <= i; j += kLanes<T>) {
      const Vec<T> high = tiles.sum_high[i] - load<T>(tiles.sum_high + j), low = tiles.sum_low[i] - load<T>(tiles.sum_low + j);
      store<T>(scores + j, load<T>(CB + j) * (exp(high + low) * load<T>(tiles.dt + j)));
    }
  }
}

// y[i] = from_start[i] C[i].h + sum_{j<=i} scores[i][j] x[j]. The square of a block's own tokens is summed as a triangle: a
// zero score would not do, since zero times NaN is NaN.
template <class T, bool kFromState>
void multiply_y(const Tiles<T>& tiles, const T* state, std::int64_t q, std::int64_t dstate) {
  const std::int64_t q_stride = tiles.q_stride, p_stride = tiles.p_stride;
  for_column_blocks<T>(p_stride, [&]<int V>(Constant<V>, std::int64_t c) {
    for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
      Vec<T> sum[R][V] = {};
      if constexpr (kFromState) {
        multiply_add<T>(sum, tiles.C + i * dstate, dstate, state + c, p_stride, dstate);
        scale_rows<T>(sum, tiles.from_start + i);
      }
      const T* scores = tiles.scores + i * q_stride;
      multiply_add<T>(sum, scores, q_stride, tiles.x + c, p_stride, i);
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec<T> x = load<T>(tiles.x + (i + j) * p_stride + c + v * kLanes<T>);
#pragma GCC unroll 16
          for (int r = j; r < R; ++r) sum[r][v] += scores[r * q_stride + i + j] * x;
        }
      store_block<T>(tiles.y + i * p_stride + c, p_stride, sum);
    });
  });
}

// One unit: heads h0.. of a group and columns p0.. of headdim, over all chunks of a sequence.
template <class T>
struct Block {
  const ssd_scan::Args& args;
  const ssd_scan::Dims& d;
  const Tiles<T>& tiles;
  Walk walk;
  std::int64_t sequence, group, h0, heads, p0, columns;

  T* state(std::int64_t k) const { return tiles.state + k * d.dstate * tiles.p_stride; }

  // This block's columns of x, y or z from a token of the scan on.
  TileView rows(const Tensor& t, std::int64_t i, std::int64_t h) const {
    return {t.data, t.dtype, offset_of(t, walk.batch, walk.token(i), h, p0), walk.step(t.stride[1]), t.stride[3]};
  }

  // The state [n,p] of head k of the block, in a tensor.
  TileView state_view(const Tensor& t, std::int64_t k) const {
    return {t.data, t.dtype, offset_of(t, sequence, h0 + k, p0), t.stride[3], t.stride[2]};
  }

  void load_x(std::int64_t start, std::int64_t q, std::int64_t h) const {
    load_tile<T>(tiles.x, tiles.p_stride, rows(args.x, start, h), q, columns);
    for (std::int64_t j = 0; j < q; ++j)
      for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>)
        store<T>(tiles.x_weighted + j * tiles.p_stride + c, tiles.to_end[j] * load<T>(tiles.x + j * tiles.p_stride + c));
  }

  void load_BC(std::int64_t start, std::int64_t q) const {
    const std::int64_t token = walk.token(start);
    const std::int64_t B = offset_of(args.B, walk.batch, token, group), C = offset_of(args.C, walk.batch, token, group);
    load_tile<T>(tiles.B_transposed, tiles.q_stride,
                 {args.B.data, args.B.dtype, B, args.B.stride[3], walk.step(args.B.stride[1])}, d.dstate, q);
    load_tile<T>(tiles.C, d.dstate, {args.C.data, args.C.dtype, C, walk.step(args.C.stride[1]), args.C.stride[3]}, q, d.dstate);
  }

  void load_D(std::int64_t h) const {
    for (std::int64_t c = 0; c < columns; ++c)
      tiles.D[c] = load_element<T>(args.D.data, args.D.dtype,
                                   d.D_per_channel ? offset_of(args.D, h, p0 + c) : offset_of(args.D, h));
  }

  // D x, the gate, and out to memory.
  void finish_y(std::int64_t start, std::int64_t q, std::int64_t h) const {
    if (args.D) load_D(h);
    if (args.z) load_tile<T>(tiles.z, tiles.p_stride, rows(args.z, start, h), q, columns);
    if (args.D || args.z)
      for (std::int64_t i = 0; i < q; ++i)
        for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>) {
          const std::int64_t at = i * tiles.p_stride + c;
          Vec<T> y = load<T>(tiles.y + at);
          if (args.D) y += load<T>(tiles.D + c) * load<T>(tiles.x + at);
          if (args.z) y *= silu<T>(load<T>(tiles.z + at));
          store<T>(tiles.y + at, y);
        }
    store_tile<T>(rows(args.y, start, h), q, columns, tiles.y, tiles.p_stride);
  }

  void clear_state(std::int64_t k) const {
    for (std::int64_t i = 0; i < d.dstate * tiles.p_stride; ++i) state(k)[i] = T(0);
  }

  void run(std::int64_t chunk) const {
    const bool empty = walk.length() == 0;
    for (std::int64_t k = 0; k < heads; ++k) {
      if (args.initial_state) load_tile<T>(state(k), tiles.p_stride, state_view(args.initial_state, k), d.dstate, columns);
      else if (empty) clear_state(k);
    }
    for (std::int64_t start = 0; start < walk.length(); start += chunk) {
      const std::int64_t q = least(chunk, walk.length() - start);
      const bool from_state = start > 0 || args.initial_state;
      const bool to_state = start + q < walk.length() || args.final_state;
      load_BC(start, q);
      multiply_CB<T>(tiles, q, d.dstate);
      for (std::int64_t k = 0; k < heads; ++k) {
        const T decay = load_steps<T>(tiles, args, walk, start, q, h0 + k);
        load_x(start, q, h0 + k);
        decay_scores<T>(tiles, q);
        from_state ? multiply_y<T, true>(tiles, state(k), q, d.dstate) : multiply_y<T, false>(tiles, state(k), q, d.dstate);
        finish_y(start, q, h0 + k);
        if (!to_state) continue;
        auto update = from_state ? matmul<true, T> : matmul<false, T>;
        update(state(k), tiles.p_stride, tiles.B_transposed, tiles.q_stride, tiles.x_weighted, tiles.p_stride, d.dstate,
               tiles.p_stride, q, decay);
      }
    }
    if (args.final_state)
      for (std::int64_t k = 0; k < heads; ++k)
        store_tile<T>(state_view(args.final_state, k), d.dstate, columns, state(k), tiles.p_stride);
  }
};

// y past the last packed token.
void clear_tail(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  if (!args.cu_seqlens) return;
  for (std::int64_t l = index_at(args.cu_seqlens, d.num_sequences); l < d.seqlen; ++l)
    for (std::int64_t h = 0; h < d.nheads; ++h)
      for (std::int64_t p = 0; p < d.headdim; ++p)
        store_element<float>(args.y.data, args.y.dtype, offset_of(args.y, 0, l, h, p), 0.0f);
}

// Units of work, one a sequence and part, that a thread takes at a time: about 20 us of multiply-adds.
std::int64_t units_per_task(const Tiling& t, const ssd_scan::Dims& d) {
  constexpr std::int64_t kMultiplyAdds = 1 << 20;
  const std::int64_t tokens = d.seqlen * d.batch / most(d.num_sequences, 1);
  return kMultiplyAdds / most(t.heads * t.columns * d.dstate * 2 * most(tokens, 1), 1);
}

template <class T>
std::size_t bytes_per_thread(const Tiling& t, const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  Arena count(nullptr);
  Tiles<T>(count, t, args, d);
  return count.used();
}

template <class T>
void scan(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  const Tiling t = tiling_of(args, d);
  const std::size_t bytes = bytes_per_thread<T>(t, args, d);
  parallel_for_groups(d.num_sequences * t.units, units_per_task(t, d), [&](std::int64_t unit, int thread) {
    Arena arena(static_cast<char*>(args.workspace.data) + thread * bytes);
    const Tiles<T> tiles(arena, t, args, d);
    const std::int64_t sequence = unit / t.units, part = unit % t.units, column_block = part % t.column_blocks;
    const std::int64_t head_block = part / t.column_blocks % t.head_blocks, group = part / t.column_blocks / t.head_blocks;
    const std::int64_t group_heads = d.nheads / d.ngroups, first = head_block * t.heads, p0 = column_block * t.columns;
    const Block<T> block{args, d, tiles, walk_of(args, d, sequence), sequence, group, group * group_heads + first,
                         least(t.heads, group_heads - first), p0, least(t.columns, d.headdim - p0)};
    block.run(t.chunk);
  });
  clear_tail(args, d);
}

}  // namespace

std::size_t workspace_bytes(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  const Tiling t = tiling_of(args, d);
  const bool in_double = args.x.dtype == DType::float64;
  const std::size_t bytes = in_double ? bytes_per_thread<double>(t, args, d) : bytes_per_thread<float>(t, args, d);
  return bytes * least(max_threads(), d.num_sequences * t.units);
}

void run(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  args.x.dtype == DType::float64 ? scan<double>(args, d) : scan<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
