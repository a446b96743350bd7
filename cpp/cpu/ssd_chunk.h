// What the forward and the backward of ssd_scan share: how a sequence is walked and cut into units of work, and, of a chunk of
// q tokens, the steps with their prefix sums, the lower triangle of a product such as C B^T, and how a state goes on.
#pragma once

#include <statescan/ssd_scan.h>

#include "matmul.h"
#include "parallel.h"
#include "simd.h"
#include "tile.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

STATESCAN_INLINE constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
STATESCAN_INLINE constexpr std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
STATESCAN_INLINE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Chunks longer than this only cost time and scratch, so a larger chunk_size is cut to it.
inline constexpr std::int64_t kMaxChunk = 256;

// A tile in scratch.
template <class T>
STATESCAN_INLINE TileView tile_view(const T* tile, std::int64_t stride) {
  return {const_cast<T*>(tile), kDTypeOf<T>, 0, stride, 1};
}

// How a call is cut. Batch, packing and threads have no say, so a row's bits never depend on them.
struct Tiling {
  std::int64_t chunk = 0;       // tokens of a chunk, the last of a sequence may be shorter
  std::int64_t heads = 0;       // heads of a unit of work: they share the loads of B and C and the product C B^T
  std::int64_t columns = 0;     // headdim of a unit
  std::int64_t head_blocks = 0; // in a group
  std::int64_t column_blocks = 0;
  std::int64_t units = 0;       // of a sequence
};

// Up to `most_heads` heads share their tiles of B and C, unless a sequence then has fewer units than kUnits, which feed the
// threads of a small batch; with fewer heads than that, headdim is cut as well, into pieces of at least kColumns.
inline Tiling cut_units(const ssd_scan::Dims& d, std::int64_t chunk, std::int64_t most_heads = 8) {
  constexpr std::int64_t kUnits = 8, kColumns = 32;
  Tiling t{.chunk = chunk};
  if (d.nheads == 0 || d.headdim == 0) return t;
  const std::int64_t group_heads = d.nheads / d.ngroups;
  t.heads = least(group_heads, most(1, least(most_heads, d.nheads / kUnits)));
  t.head_blocks = ceil_div(group_heads, t.heads);
  const std::int64_t wanted = most(1, least(ceil_div(kUnits, d.ngroups * t.head_blocks), d.headdim / kColumns));
  t.columns = ceil_div(ceil_div(d.headdim, wanted), kColumns) * kColumns;
  t.columns = least(t.columns, d.headdim);
  t.column_blocks = ceil_div(d.headdim, t.columns);
  t.units = d.ngroups * t.head_blocks * t.column_blocks;
  return t;
}

STATESCAN_INLINE std::int64_t units_of_group(const Tiling& t) { return t.head_blocks * t.column_blocks; }

// The row of a tile with an element for each token of a chunk.
template <class T>
STATESCAN_INLINE std::int64_t chunk_stride(const Tiling& t, std::int64_t longest) {
  return whole_vectors<T>(least(t.chunk, most(longest, 1)));
}

// Units of work, one a sequence and part, that a thread takes at a time: about 20 us of multiply-adds, of which a token costs
// `passes` times headdim x dstate.
inline std::int64_t units_per_task(const Tiling& t, const ssd_scan::Dims& d, std::int64_t passes) {
  constexpr std::int64_t kMultiplyAdds = 1 << 20;
  const std::int64_t tokens = d.seqlen * d.batch / most(d.num_sequences, 1);
  return kMultiplyAdds / most(t.heads * t.columns * d.dstate * passes * most(tokens, 1), 1);
}

// What a unit works on: heads h0.. of a group and columns p0.. of headdim, over all chunks of a sequence. A group's units follow
// each other, those of the same heads side by side; `place` counts them. Every other block of heads comes first: where rows do not
// begin with a line of the caches, neighbours write to the same lines, and two threads in step lose a tenth of their time by it.
struct Unit {
  Unit(const Tiling& t, const ssd_scan::Dims& d, std::int64_t index) : sequence(index / t.units) {
    const std::int64_t part = index % t.units, group_heads = d.nheads / d.ngroups;
    column_block = part % t.column_blocks;
    const std::int64_t turn = part / t.column_blocks % t.head_blocks, evens = (t.head_blocks + 1) / 2;
    head_block = turn < evens ? 2 * turn : 2 * (turn - evens) + 1;
    group = part / t.column_blocks / t.head_blocks;
    place = part % units_of_group(t);
    h0 = group * group_heads + head_block * t.heads;
    heads = least(t.heads, group_heads - head_block * t.heads);
    p0 = column_block * t.columns;
    columns = least(t.columns, d.headdim - p0);
  }

  std::int64_t sequence, group, place, head_block, column_block, h0, heads, p0, columns;
};

// The tokens of one sequence in the order of the scan.
struct Walk {
  std::int64_t batch, first, last;
  bool reverse;

  std::int64_t length() const { return last - first; }
  std::int64_t token(std::int64_t i) const { return reverse ? last - 1 - i : first + i; }
  std::int64_t step(std::int64_t stride) const { return reverse ? -stride : stride; }

  // Rows of a tensor [b,l,h,p] or [b,l,g,n] from token i of the scan on, at one h or g.
  TileView rows(const Tensor& t, std::int64_t i, std::int64_t head, std::int64_t first_column) const {
    return {t.data, t.dtype, offset_of(t, batch, token(i), head, first_column), step(t.stride[1]), t.stride[3]};
  }

  // One value a token, of a tensor [b,l,h].
  TileView row(const Tensor& t, std::int64_t i, std::int64_t h) const {
    return {t.data, t.dtype, offset_of(t, batch, token(i), h), 0, step(t.stride[1])};
  }
};

inline Walk walk_of(const ssd_scan::Inputs& in, const ssd_scan::Dims& d, std::int64_t s) {
  if (!in.cu_seqlens) return {s, 0, d.seqlen, in.reverse};
  return {0, index_at(in.cu_seqlens, s), index_at(in.cu_seqlens, s + 1), in.reverse};
}

inline constexpr std::int64_t kStretch = ssd_scan::stretch_of(DeviceType::cpu);

// The row of chunk_states that has the state of a stretch.
inline std::int64_t stretch_row(const ssd_scan::Inputs& in, const Walk& walk, std::int64_t sequence, std::int64_t stretch) {
  return in.cu_seqlens ? walk.first / kStretch + sequence + stretch : stretch;
}

inline TileView transposed(const TileView& t) { return {t.data, t.dtype, t.first, t.column_stride, t.row_stride}; }

// The tokens of every batch row that belong to a sequence; what lies past them is zero in outputs.
inline std::int64_t packed_tokens(const ssd_scan::Inputs& in, const ssd_scan::Dims& d) {
  return in.cu_seqlens ? index_at(in.cu_seqlens, d.num_sequences) : d.seqlen;
}

// Zeros from token `first` on, in a tensor [b,l,...] of three or four axes.
inline void clear_tokens(const Tensor& t, std::int64_t first) {
  if (!t) return;
  const std::int64_t last_axis = t.ndim == 4 ? t.shape[3] : 1;
  for (std::int64_t b = 0; b < t.shape[0]; ++b)
    for (std::int64_t l = first; l < t.shape[1]; ++l)
      for (std::int64_t i = 0; i < t.shape[2]; ++i)
        for (std::int64_t k = 0; k < last_axis; ++k)
          store_element<float>(t.data, t.dtype, offset_of(t, b, l, i) + (k > 0 ? k * t.stride[3] : 0), 0.0f);
}

// The steps of one head in a chunk, in rows padded to whole vectors. s is a sum of two T, so that a difference is exact to T
// even where s is large.
template <class T>
struct Steps {
  Steps(Arena& arena, std::int64_t stride) {
    for (T** row : {&dt, &sum_high, &sum_low, &from_start, &to_end}) *row = arena.take<T>(stride);
  }

  // exp(s[i] - s[j]) for the vector of steps at j.
  STATESCAN_INLINE Vec<T> decay(std::int64_t i, std::int64_t j) const {
    const Vec<T> high = sum_high[i] - load<T>(sum_high + j), low = sum_low[i] - load<T>(sum_low + j);
    return exp(high + low);
  }

  T *dt, *sum_high, *sum_low;  // [q*] the step, and s[i] = sum_{k<=i} dt[k] A as a sum of two
  T *from_start, *to_end;      // [q*] exp(s[i]), and exp(s[q-1] - s[i])
};

// Reads dt of q tokens of head h, discretised; s is summed in float64.
template <class T>
void load_steps(const Steps<T>& steps, const ssd_scan::Inputs& in, const Walk& walk, std::int64_t start, std::int64_t q,
                std::int64_t h) {
  const T A = load_element<T>(in.A.data, in.A.dtype, h * in.A.stride[0]);
  const T bias = in.dt_bias ? load_element<T>(in.dt_bias.data, in.dt_bias.dtype, h * in.dt_bias.stride[0]) : T(0);
  load_tile<T>(steps.dt, whole_vectors<T>(q), walk.row(in.dt, start, h), 1, q);
  for (std::int64_t i = 0; i < q; i += kLanes<T>)
    store<T>(steps.dt + i, discretise<T>(load<T>(steps.dt + i), splat(bias), in.dt_softplus, T(in.dt_min), T(in.dt_max)));
  // What a sum in double rounds away counts where T is double too, so it is summed beside it (Knuth's two-sum).
  double sum = 0, lost = 0;
  for (std::int64_t i = 0; i < whole_vectors<T>(q); ++i) {
    if (i < q) {
      const double term = double(steps.dt[i]) * double(A), next = sum + term, added = next - sum;
      if constexpr (sizeof(T) == sizeof(double)) lost += (sum - (next - added)) + (term - added);
      sum = next;
    }
    steps.sum_high[i] = T(sum);
    steps.sum_low[i] = T((sum - double(steps.sum_high[i])) + lost);
  }
  for (std::int64_t i = 0; i < q; i += kLanes<T>) {
    store<T>(steps.from_start + i, exp(load<T>(steps.sum_high + i)));
    store<T>(steps.to_end + i, steps.decay(q - 1, i));
  }
}

// to[i][j] = a[i].b[j] up to the diagonal, in whole register blocks: `to` [q,q*] and the transposed b [depth,q*] have rows of
// `pitch`.
template <class T>
void multiply_pairs(T* to, std::int64_t pitch, const T* a, std::int64_t a_stride, const T* b_transposed, std::int64_t q,
                    std::int64_t depth) {
  for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
    for_column_blocks<T>(whole_vectors<T>(i + R), [&]<int V>(Constant<V>, std::int64_t j) {
      Vec<T> sum[R][V] = {};
      multiply_add<T>(sum, a + i * a_stride, a_stride, b_transposed + j, pitch, depth);
      store_block<T>(to + i * pitch + j, pitch, sum);
    });
  });
}

// to = decay * from + a^T b for a [q,a*], b [q,b*] and states [rows,b*], of which `columns`; without kFrom to = a^T b. How a state
// goes on to the next chunk, and an adjoint to the one before. `to` may begin where `from` does or before its end: the last rows
// are made first. Fetches two tiles meanwhile.
template <bool kFrom, class T>
void carry(T* to, const T* from, T decay, const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride, std::int64_t rows,
           std::int64_t q, Ahead first, Ahead second) {
  for_column_blocks<T>(b_stride, [&]<int V>(Constant<V>, std::int64_t c) {
    for_row_blocks_upwards(rows, [&]<int R>(Constant<R>, std::int64_t r) {
      first.step();
      second.step();
      Vec<T> sum[R][V] = {};
      if constexpr (kFrom) prefetch_block<T, R, V>(from + r * b_stride + c, b_stride);
      multiply_add<T>(sum, a + r, 1, b + c, b_stride, q, a_stride);
      if constexpr (kFrom) add_scaled<T>(sum, decay, from + r * b_stride + c, b_stride);
      store_block<T>(to + r * b_stride + c, b_stride, sum);
    });
  });
}

// C B^T of the chunks, which the first unit of each group makes for all of them.
template <class T>
class GroupCB {
 public:
  GroupCB(Arena& arena, const Tiling& t, const ssd_scan::Dims& d, std::int64_t longest)
      : q_stride_(chunk_stride<T>(t, longest)), ngroups_(d.ngroups), seqlen_(d.seqlen), counters_(d.num_sequences * d.ngroups) {
    if (units_of_group(t) == 1) return;
    tiles_ = arena.take<T>(d.batch * d.ngroups * d.seqlen * q_stride_);
    done_ = arena.take<int>(counters_);
    is_shared_ = true;
  }

  void start() const {
    for (std::int64_t i = 0; is_shared_ && i < counters_; ++i) done_[i] = 0;
  }

  // The tile [q,q*] of the chunk from token `start` on, the unit's number-th from 1 on: made by make(tile), in `own` where there
  // is no other unit.
  template <class Make>
  STATESCAN_INLINE const T* tile(const Unit& unit, const Walk& walk, std::int64_t start, std::int64_t number, T* own,
                                 Make&& make) const {
    if (!is_shared_) {
      make(own);
      return own;
    }
    T* const tile = tiles_ + ((walk.batch * ngroups_ + unit.group) * seqlen_ + walk.first + start) * q_stride_;
    int& done = done_[unit.sequence * ngroups_ + unit.group];
    if (unit.place > 0) {
      wait_for(done, static_cast<int>(number));
    } else {
      make(tile);
      advance_to(done, static_cast<int>(number));
    }
    return tile;
  }

 private:
  std::int64_t q_stride_, ngroups_, seqlen_, counters_;
  bool is_shared_ = false;
  T* tiles_ = nullptr;   // [b,g,l,q*]
  int* done_ = nullptr;  // [s,g] chunks that are there
};

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
