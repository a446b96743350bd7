// ssd_scan on the CPU, a chunk of q tokens at a time; ssd_recurrent.h and ssd_quadratic.h have the other forms
// Math     s[i] = sum_{k<=i} dt[k] A, from the start of the chunk, h the state that enters it:
//          y[i] = exp(s[i]) C[i].h + sum_{j<=i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j] + D x[i], then y[i] *= silu(z[i])
//          h    = exp(s[q-1]) h + sum_j B[j] exp(s[q-1] - s[j]) dt[j] x[j]
// Shapes   x, z, y [b,l,h,p], dt [b,l,h], B, C [b,l,g,n]; states are held as [n,p]
// Traffic  x, dt, z and y once; B and C once for each block of heads; states stay in the second cache
// Tasks    units of (sequence, block of heads of a group, block of headdim), see Tiling: each walks the chunks of its
//          sequence, and the first of a group makes C B^T of them for all; short ones share a task
// Numerics sums of T in a fixed order that depends on the row's own shape alone. s is summed in float64 and kept as two T, so
//          that a difference is exact to T even where s is large. Scores above the diagonal are never computed from nor read:
//          a NaN or an overflow in a token reaches no earlier one
#include "isa.h"
#include "parallel.h"
#include "ssd_quadratic.h"
#include "ssd_recurrent.h"
#include "ssd_unit.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

// A chunk of q tokens costs q/2 (n + p) multiply-adds a token beside the recurrence's own 2 n p: short enough that this stays
// small, long enough that the tiles are worth their set-up, and whole register blocks. On Zen 4, 32 to 64 tokens are within
// 3 percent of each other for p 64, n 128; 96 cost 7 percent more.
constexpr std::int64_t kChunk = 48;

// The tiles of one thread. q tokens, n of dstate, p columns of headdim; rows marked * are padded to whole vectors.
template <class T>
struct Tiles {
  Tiles(Arena& arena, const Tiling& t, const ssd_scan::Args& args, const ssd_scan::Dims& d)
      : q_stride(chunk_stride<T>(t, d.seqlen)),
        p_stride(whole_vectors<T>(t.columns)),
        steps(arena, q_stride) {
    state = arena.take<T>(t.heads * d.dstate * p_stride);
    for (T** tile : {&B, &C}) *tile = arena.take<T>(q_stride * d.dstate);
    B_transposed = arena.take<T>(d.dstate * q_stride);
    CB = arena.take<T>(units_of_group(t) > 1 ? 0 : q_stride * q_stride);
    scores = arena.take<T>(q_stride * q_stride);
    x = arena.take<T>(q_stride * p_stride);
    x_weighted = arena.take<T>(q_stride * p_stride);
    y = arena.take<T>(q_stride * p_stride);
    gate = Gate<T>(arena, args, q_stride * p_stride, p_stride);
    wanted = arena.take<T>(args.state_positions || args.chunk_states ? d.dstate * p_stride : 0);
  }

  std::int64_t q_stride, p_stride;
  Steps<T> steps;
  T* state;         // [heads,n,p*]
  T *B, *C;         // [q,n]
  T* B_transposed;  // [n,q*]
  T* CB;            // [q,q*] C.B of each pair of tokens, up to the diagonal, where no other unit wants it
  T* scores;        // [q,q*] CB exp(s[i] - s[j]) dt[j]
  T* x;             // [q,p*]
  T* x_weighted;    // [q,p*] exp(s[q-1] - s[j]) dt[j] x[j]
  T* y;             // [q,p*]
  Gate<T> gate;
  T* wanted;        // [n,p*] a state inside a chunk, for the caller
};

// scores[i][j] for j <= i; what a row's last vector holds past the diagonal is never read.
template <class T>
void decay_scores(const Tiles<T>& tiles, const T* CB, std::int64_t q) {
  for (std::int64_t i = 0; i < q; ++i) {
    const std::int64_t row = i * tiles.q_stride;
    for (std::int64_t j = 0; j <= i; j += kLanes<T>)
      store<T>(tiles.scores + row + j, load<T>(CB + row + j) * (tiles.steps.decay(i, j) * load<T>(tiles.steps.dt + j)));
  }
}

// y[i] = from_start[i] C[i].h + sum_{j<=i} scores[i][j] x[j]. Fetches two tiles meanwhile.
template <class T, bool kFromState>
void multiply_y(const Tiles<T>& tiles, const T* state, std::int64_t q, std::int64_t dstate, Ahead first, Ahead second) {
  const std::int64_t q_stride = tiles.q_stride, p_stride = tiles.p_stride;
  for_column_blocks<T>(p_stride, [&]<int V>(Constant<V>, std::int64_t c) {
    for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
      first.step();
      second.step();
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
  const UnitView<T>& view;
  const Tiles<T>& tiles;
  const GroupCB<T>& group_CB;

  T* state(std::int64_t k) const { return tiles.state + k * view.state_size(); }

  void load_x(std::int64_t start, std::int64_t q, std::int64_t h) const {
    view.load_rows(tiles.x, view.args.x, start, q, h);
    for (std::int64_t j = 0; j < q; ++j) {
      const T weight = tiles.steps.to_end[j] * tiles.steps.dt[j];
      for (std::int64_t c = 0; c < tiles.p_stride; c += kLanes<T>)
        store<T>(tiles.x_weighted + j * tiles.p_stride + c, weight * load<T>(tiles.x + j * tiles.p_stride + c));
    }
  }

  // To be fetched beside the product that makes a state: the rows of the next head, or of the first in the next chunk.
  Ahead next_rows(const Tensor& tensor, std::int64_t start, std::int64_t k, std::int64_t chunk) const {
    const std::int64_t next_k = (k + 1) % view.unit.heads, next = next_k > 0 ? start : start + chunk;
    if (next >= view.walk.length()) return {};
    return {view.rows(tensor, next, view.unit.h0 + next_k), least(chunk, view.walk.length() - next), view.unit.columns,
            count_blocks<T>(view.d.dstate, tiles.p_stride)};
  }

  // The same of B or C of the next chunk, beside the product that makes y.
  Ahead next_projection(const Tensor& tensor, std::int64_t next, std::int64_t chunk) const {
    if (next >= view.walk.length()) return {};
    const std::int64_t q = least(chunk, view.walk.length() - next);
    return {view.walk.rows(tensor, next, view.unit.group, 0), q, view.d.dstate, count_blocks<T>(q, tiles.p_stride)};
  }

  // The state after `count` tokens of the chunk, when the caller asked for it: as at a chunk's end, but beside it. Takes
  // tiles.y, which is in memory by now, for the weighted x.
  const T* state_within(std::int64_t k, std::int64_t count, bool from_state) const {
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
    if (count == 0 && from_state) return state(k);
    auto next = from_state ? carry<true, T> : carry<false, T>;
    next(tiles.wanted, state(k), decay, tiles.B, view.d.dstate, tiles.y, p_stride, view.d.dstate, count, {}, {});
    return tiles.wanted;
  }

  void run(std::int64_t chunk) const {
    const std::int64_t length = view.walk.length(), dstate = view.d.dstate;
    Positions positions = view.positions(tiles.state);
    for (std::int64_t k = 0; k < view.unit.heads; ++k)
      if (view.args.initial_state || length == 0) view.load_initial_state(state(k), k);
    for (std::int64_t start = 0; start < length; start += chunk) {
      const std::int64_t q = least(chunk, length - start);
      const bool from_state = start > 0 || view.args.initial_state;
      const bool to_state = start + q < length || view.args.final_state || view.args.state_positions;
      view.load_projection(tiles.B, view.args.B, start, q);
      view.load_projection(tiles.C, view.args.C, start, q);
      const T* const CB = group_CB.tile(view.unit, view.walk, start, start / chunk + 1, tiles.CB, [&](T* made) {
        load_tile<T>(tiles.B_transposed, tiles.q_stride, transposed(tile_view(tiles.B, dstate)), dstate, q);
        multiply_pairs<T>(made, tiles.q_stride, tiles.C, dstate, tiles.B_transposed, q, dstate);
      });
      for (std::int64_t k = 0; k < view.unit.heads; ++k) {
        const std::int64_t h = view.unit.h0 + k;
        load_steps<T>(tiles.steps, view.args, view.walk, start, q, h);
        load_x(start, q, h);
        decay_scores<T>(tiles, CB, q);
        const bool ends = k + 1 == view.unit.heads;  // and another chunk follows
        auto multiply = from_state ? multiply_y<T, true> : multiply_y<T, false>;
        multiply(tiles, state(k), q, dstate, ends ? next_projection(view.args.B, start + q, chunk) : Ahead(),
                 ends ? next_projection(view.args.C, start + q, chunk) : Ahead());
        view.finish_y(tiles.y, tiles.x, tiles.gate, start, q, h);
        for (Positions next = positions; next.next() < start + q; next.pop())
          view.store_position_state(next.index(), k, state_within(k, next.next() - start, from_state));
        for (std::int64_t i = view.next_stretch(start); i < start + q; i += kStretch)
          view.store_stretch_state(i, k, state_within(k, i - start, from_state));
        if (!to_state) continue;
        auto update = from_state ? carry<true, T> : carry<false, T>;
        update(state(k), state(k), tiles.steps.from_start[q - 1], tiles.B, dstate, tiles.x_weighted, tiles.p_stride, dstate, q,
               next_rows(view.args.x, start, k, chunk), next_rows(view.args.y, start, k, chunk));
      }
      while (positions.next() < start + q) positions.pop();
    }
    for (std::int64_t k = 0; k < view.unit.heads; ++k) {
      for (Positions last = positions; last.next() <= length; last.pop()) view.store_position_state(last.index(), k, state(k));
      view.store_final_state(k, state(k));
    }
  }
};

// The scratch of a call and that of one thread, and one unit of work, in each form.
template <class T>
struct Chunked {
  static Tiling cut(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
    return cut_units(d, least(args.chunk_size > 0 ? args.chunk_size : kChunk, kMaxChunk));
  }
  using Shared = GroupCB<T>;
  using Scratch = Tiles<T>;
  static void run(const UnitView<T>& view, const Scratch& tiles, const Shared& shared, const Tiling& t) {
    Block<T>{view, tiles, shared}.run(t.chunk);
  }
};

template <class Form>
std::size_t bytes_per_thread(const Tiling& t, const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  Arena count(nullptr);
  typename Form::Scratch(count, t, args, d);
  return count.used();
}

template <class Form>
std::size_t bytes_in(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  const Tiling t = Form::cut(args, d);
  Arena count(nullptr);
  typename Form::Shared(count, t, d, d.seqlen);
  return count.used() + bytes_per_thread<Form>(t, args, d) * least(max_threads(), d.num_sequences * t.units);
}

template <class T, class Form>
void scan(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  const Tiling t = Form::cut(args, d);
  const std::size_t bytes = bytes_per_thread<Form>(t, args, d);
  Arena common(args.workspace.data);
  const typename Form::Shared shared(common, t, d, d.seqlen);
  shared.start();
  parallel_for_groups(d.num_sequences * t.units, units_per_task(t, d, 2), [&](std::int64_t index, int thread) {
    Arena arena(static_cast<char*>(args.workspace.data) + common.used() + thread * bytes);
    const typename Form::Scratch scratch(arena, t, args, d);
    const Unit unit(t, d, index);
    const UnitView<T> view{args, d, unit, walk_of(args, d, unit.sequence), whole_vectors<T>(t.columns)};
    Form::run(view, scratch, shared, t);
  });
  clear_tokens(args.y, packed_tokens(args, d));
}

// The library's own choice is the chunked form.
template <class T>
std::size_t bytes_as(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  switch (args.mode) {
    case ssd_scan::SsdMode::recurrent: return bytes_in<Recurrent<T>>(args, d);
    case ssd_scan::SsdMode::quadratic: return bytes_in<Quadratic<T>>(args, d);
    default: return bytes_in<Chunked<T>>(args, d);
  }
}

template <class T>
void run_as(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  switch (args.mode) {
    case ssd_scan::SsdMode::recurrent: return scan<T, Recurrent<T>>(args, d);
    case ssd_scan::SsdMode::quadratic: return scan<T, Quadratic<T>>(args, d);
    default: return scan<T, Chunked<T>>(args, d);
  }
}

}  // namespace

std::size_t workspace_bytes(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  return args.x.dtype == DType::float64 ? bytes_as<double>(args, d) : bytes_as<float>(args, d);
}

void run(const ssd_scan::Args& args, const ssd_scan::Dims& d) {
  args.x.dtype == DType::float64 ? run_as<double>(args, d) : run_as<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
