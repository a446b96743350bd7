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
#include "parallel.h"
#include "positions.h"
#include "ssd_chunk.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

// A chunk of q tokens costs q/2 (n + p) multiply-adds a token beside the recurrence's own 2 n p: short enough that this stays
// small, long enough that the tiles are worth their set-up, and whole register blocks. On Zen 4, 32 to 64 tokens are within
// 3 percent of each other for p 64, n 128; 96 cost 7 percent more.
constexpr std::int64_t kChunk = 48;

Tiling tiling_of(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  return cut_units(d, least(args.chunk_size > 0 ? args.chunk_size : kChunk, kMaxChunk));
}

// The tiles of one thread. q tokens, n of dstate, p columns of headdim; rows marked * are padded to whole vectors.
template <class T>
struct Tiles {
  Tiles(Arena& arena, const Tiling& t, const ssd_scan::Args& args, const ssd_scan::Dims& d)
      : q_stride(whole_vectors<T>(least(t.chunk, most(d.seqlen, 1)))),
        p_stride(whole_vectors<T>(t.columns)),
        steps(arena, q_stride) {
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
    wanted = arena.take<T>(args.state_positions ? d.dstate * p_stride : 0);
  }

  std::int64_t q_stride, p_stride;
  Steps<T> steps;
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
  T* wanted;        // [n,p*] a state inside a chunk, for the caller
};

// scores[i][j] for j <= i; what a row's last vector holds past the diagonal is never read.
template <class T>
void decay_scores(const Tiles<T>& tiles, std::int64_t q) {
  for (std::int64_t i = 0; i < q; ++i) {
    const T* CB = tiles.CB + i * tiles.q_stride;
    T* scores = tiles.scores + i * tiles.q_stride;
    for (std::int64_t j = 0; j <= i; j += kLanes<T>)
      store<T>(scores + j, load<T>(CB + j) * (tiles.steps.decay(i, j) * load<T>(tiles.steps.dt + j)));
  }
}

// y[i] = from_start[i] C[i].h + sum_{j<=i} scores[i][j] x[j].
template <class T, bool kFromState>
void multiply_y(const Tiles<T>& tiles, const T* state, std::int64_t q, std::int64_t dstate) {
  const std::int64_t q_stride = tiles.q_stride, p_stride = tiles.p_stride;
  for_column_blocks<T>(p_stride, [&]<int V>(Constant<V>, std::int64_t c) {
    for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
      Vec<T> sum[R][V] = {};
      if constexpr (kFromState) {
        multiply_add<T>(sum, tiles.C + i * dstate, dstate, state + c, p_stride, dstate);
        scale_rows<T>(sum, tiles.steps.from_start + i);
      }
      multiply_lower<T>(sum, tiles.scores, q_stride, tiles.x + c, p_stride, i);
      store_block<T>(tiles.y + i * p_stride + c, p_stride, sum);
    });
  });
}

// One unit over the chunks of its sequence.
template <class T>
struct Block {
  const ssd_scan::Args& args;
  const ssd_scan::Dims& d;
  const Tiles<T>& tiles;
  Unit unit;
  Walk walk;

  T* state(std::int64_t k) const { return tiles.state + k * d.dstate * tiles.p_stride; }

  // This unit's columns of x, y or z from a token of the scan on.
  TileView rows(const Tensor& t, std::int64_t i, std::int64_t h) const { return walk.rows(t, i, h, unit.p0); }

  // The state [n,p] of the unit's head k, in a tensor.
  TileView state_view(const Tensor& t, std::int64_t k) const {
    return {t.data, t.dtype, offset_of(t, unit.sequence, unit.h0 + k, unit.p0), t.stride[3], t.stride[2]};
  }

  void load_x(std::int64_t start, std::int64_t q, std::int64_t h) const {
    load_tile<T>(tiles.x, tiles.p_stride, rows(args.x, start, h), q, unit.columns);
    for (std::int64_t j = 0; j < q; ++j) {
      const T weight = tiles.steps.to_end[j] * tiles.steps.dt[j];
      for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>)
        store<T>(tiles.x_weighted + j * tiles.p_stride + c, weight * load<T>(tiles.x + j * tiles.p_stride + c));
    }
  }

  void load_BC(std::int64_t start, std::int64_t q) const {
    load_tile<T>(tiles.B_transposed, tiles.q_stride, transposed(walk.rows(args.B, start, unit.group, 0)), d.dstate, q);
    load_tile<T>(tiles.C, d.dstate, walk.rows(args.C, start, unit.group, 0), q, d.dstate);
  }

  void load_D(std::int64_t h) const {
    for (std::int64_t c = 0; c < unit.columns; ++c)
      tiles.D[c] = load_element<T>(args.D.data, args.D.dtype,
                                   d.D_per_channel ? offset_of(args.D, h, unit.p0 + c) : offset_of(args.D, h));
  }

  // D x, the gate, and out to memory.
  void finish_y(std::int64_t start, std::int64_t q, std::int64_t h) const {
    if (args.D) load_D(h);
    if (args.z) load_tile<T>(tiles.z, tiles.p_stride, rows(args.z, start, h), q, unit.columns);
    if (args.D || args.z)
      for (std::int64_t i = 0; i < q; ++i)
        for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>) {
          const std::int64_t at = i * tiles.p_stride + c;
          Vec<T> y = load<T>(tiles.y + at);
          if (args.D) y += load<T>(tiles.D + c) * load<T>(tiles.x + at);
          if (args.z) y *= silu<T>(load<T>(tiles.z + at));
          store<T>(tiles.y + at, y);
        }
    store_tile<T>(rows(args.y, start, h), q, unit.columns, tiles.y, tiles.p_stride);
  }

  void clear_state(std::int64_t k) const {
    for (std::int64_t i = 0; i < d.dstate * tiles.p_stride; ++i) state(k)[i] = T(0);
  }

  void store_state(const T* from, const TileView& to) const {
    store_tile<T>(to, d.dstate, unit.columns, from, tiles.p_stride);
  }

  // Where the state of head k after a wanted number of tokens goes.
  TileView position_view(std::int64_t place, std::int64_t k) const {
    const Tensor& t = args.position_states;
    return {t.data, t.dtype, offset_of(t, unit.sequence, place, unit.h0 + k, unit.p0), t.stride[4], t.stride[3]};
  }

  // The state after `count` tokens of the chunk, of which the caller asked for one: as at a chunk's end, but beside it. Takes
  // tiles.y, which is in memory by now, for the weighted x.
  void store_state_within(std::int64_t place, std::int64_t k, std::int64_t count, bool from_state) const {
    const Steps<T>& steps = tiles.steps;
    const std::int64_t p_stride = tiles.p_stride;
    T decay = T(0);
    if (count > 0) {
      decay = steps.from_start[count - 1];
      alignas(kVectorBytes) T weights[kMaxChunk];
      for (std::int64_t j = 0; j < count; j += kLanes<T>)
        store<T>(weights + j, steps.decay(count - 1, j) * load<T>(steps.dt + j));
      for (std::int64_t j = 0; j < count; ++j)
        for (std::int64_t c = 0; c < p_stride; c += kLanes<T>)
          store<T>(tiles.y + j * p_stride + c, weights[j] * load<T>(tiles.x + j * p_stride + c));
    }
    if (count == 0 && from_state) return store_state(state(k), position_view(place, k));
    if (from_state) std::memcpy(tiles.wanted, state(k), d.dstate * p_stride * sizeof(T));
    auto add = from_state ? matmul<true, T> : matmul<false, T>;
    add(tiles.wanted, p_stride, tiles.B_transposed, tiles.q_stride, tiles.y, p_stride, d.dstate, p_stride, count, decay);
    store_state(tiles.wanted, position_view(place, k));
  }

  void store_wanted(Positions positions, std::int64_t k, std::int64_t start, std::int64_t q, bool from_state) const {
    for (; positions.next() < start + q; positions.pop())
      store_state_within(positions.index(), k, positions.next() - start, from_state);
  }

  void run(std::int64_t chunk) const {
    Positions positions(args.state_positions, unit.sequence, walk.length());
    positions.for_outside([&](std::int64_t place) {
      for (std::int64_t k = 0; k < unit.heads; ++k) {
        clear_state(k);
        store_state(state(k), position_view(place, k));
      }
    });
    const bool empty = walk.length() == 0;
    for (std::int64_t k = 0; k < unit.heads; ++k) {
      if (args.initial_state) load_tile<T>(state(k), tiles.p_stride, state_view(args.initial_state, k), d.dstate, unit.columns);
      else if (empty) clear_state(k);
    }
    for (std::int64_t start = 0; start < walk.length(); start += chunk) {
      const std::int64_t q = least(chunk, walk.length() - start);
      const bool from_state = start > 0 || args.initial_state;
      const bool to_state = start + q < walk.length() || args.final_state || args.state_positions;
      load_BC(start, q);
      multiply_pairs<T>(tiles.CB, tiles.q_stride, tiles.C, d.dstate, tiles.B_transposed, q, d.dstate);
      for (std::int64_t k = 0; k < unit.heads; ++k) {
        const std::int64_t h = unit.h0 + k;
        load_steps<T>(tiles.steps, args, walk, start, q, h);
        load_x(start, q, h);
        decay_scores<T>(tiles, q);
        from_state ? multiply_y<T, true>(tiles, state(k), q, d.dstate) : multiply_y<T, false>(tiles, state(k), q, d.dstate);
        finish_y(start, q, h);
        store_wanted(positions, k, start, q, from_state);
        if (!to_state) continue;
        auto update = from_state ? matmul<true, T> : matmul<false, T>;
        update(state(k), tiles.p_stride, tiles.B_transposed, tiles.q_stride, tiles.x_weighted, tiles.p_stride, d.dstate,
               tiles.p_stride, q, tiles.steps.from_start[q - 1]);
      }
      while (positions.next() < start + q) positions.pop();
    }
    for (std::int64_t k = 0; k < unit.heads; ++k) {
      for (Positions last = positions; last.next() <= walk.length(); last.pop())
        store_state(state(k), position_view(last.index(), k));
      if (args.final_state) store_state(state(k), state_view(args.final_state, k));
    }
  }
};

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
  parallel_for_groups(d.num_sequences * t.units, units_per_task(t, d, 2), [&](std::int64_t index, int thread) {
    Arena arena(static_cast<char*>(args.workspace.data) + thread * bytes);
    const Tiles<T> tiles(arena, t, args, d);
    const Unit unit(t, d, index);
    const Block<T> block{args, d, tiles, unit, walk_of(args, d, unit.sequence)};
    block.run(t.chunk);
  });
  clear_tokens(args.y, packed_tokens(args, d));
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
