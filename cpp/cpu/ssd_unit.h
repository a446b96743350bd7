// What the forms of ssd_scan's forward share: how a unit of work reads its tensors and writes y and the states that are wanted.
#pragma once

#include "positions.h"
#include "ssd_chunk.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// Scratch for D of one head and z of some tokens.
template <class T>
struct Gate {
  Gate() = default;
  Gate(Arena& arena, const ssd_scan::Args& args, std::int64_t size, std::int64_t p_stride)
      : z(arena.take<T>(args.z ? size : 0)), D(arena.take<T>(p_stride)) {}

  T* z = nullptr;  // [q,p*]
  T* D = nullptr;  // [p*]
};

// What the units of a call share in a form where they share nothing.
struct NothingShared {
  NothingShared(Arena&, const Tiling&, const ssd_scan::Dims&, std::int64_t) {}
  void start() const {}
};

// A unit, and where its rows lie. Tiles have columns of headdim, padded to p_stride; states are [n,p*].
template <class T>
struct UnitView {
  const ssd_scan::Args& args;
  const ssd_scan::Dims& d;
  Unit unit;
  Walk walk;
  std::int64_t p_stride;

  std::int64_t state_size() const { return d.dstate * p_stride; }

  // q tokens of x, y or z, from token `start` of the scan on.
  TileView rows(const Tensor& t, std::int64_t start, std::int64_t h) const { return walk.rows(t, start, h, unit.p0); }
  void load_rows(T* to, const Tensor& t, std::int64_t start, std::int64_t q, std::int64_t h) const {
    load_tile<T>(to, p_stride, rows(t, start, h), q, unit.columns);
  }

  // B or C as [q,n], and B as [n,q*].
  void load_projection(T* to, const Tensor& t, std::int64_t start, std::int64_t q) const {
    load_tile<T>(to, d.dstate, walk.rows(t, start, unit.group, 0), q, d.dstate);
  }
  void load_B_transposed(T* to, std::int64_t q_stride, std::int64_t start, std::int64_t q) const {
    load_tile<T>(to, q_stride, transposed(walk.rows(args.B, start, unit.group, 0)), d.dstate, q);
  }

  // D x, the gate, and out to memory.
  void finish_y(T* y, const T* x, const Gate<T>& gate, std::int64_t start, std::int64_t q, std::int64_t h) const {
    if (args.D)
      for (std::int64_t c = 0; c < unit.columns; ++c)
        gate.D[c] = load_element<T>(args.D.data, args.D.dtype,
                                    d.D_per_channel ? offset_of(args.D, h, unit.p0 + c) : offset_of(args.D, h));
    if (args.z) load_rows(gate.z, args.z, start, q, h);
    if (args.D || args.z)
      for (std::int64_t i = 0; i < q; ++i)
        for (std::int64_t c = 0; c < p_stride; c += kLanes<T>) {
          const std::int64_t at = i * p_stride + c;
          Vec<T> sum = load<T>(y + at);
          if (args.D) sum += load<T>(gate.D + c) * load<T>(x + at);
          if (args.z) sum *= silu<T>(load<T>(gate.z + at));
          store<T>(y + at, sum);
        }
    store_tile<T>(rows(args.y, start, h), q, unit.columns, y, p_stride);
  }

  // The state of the unit's head k before the sequence.
  void load_initial_state(T* to, std::int64_t k) const {
    const Tensor& t = args.initial_state;
    if (!t) return clear_state(to);
    const TileView from{t.data, t.dtype, offset_of(t, unit.sequence, unit.h0 + k, unit.p0), t.stride[3], t.stride[2]};
    load_tile<T>(to, p_stride, from, d.dstate, unit.columns);
  }

  void store_final_state(std::int64_t k, const T* from) const {
    if (const Tensor& t = args.final_state)
      store_tile<T>({t.data, t.dtype, offset_of(t, unit.sequence, unit.h0 + k, unit.p0), t.stride[3], t.stride[2]}, d.dstate,
                    unit.columns, from, p_stride);
  }

  // One of the states that the caller asked for.
  void store_position_state(std::int64_t place, std::int64_t k, const T* from) const {
    const Tensor& t = args.position_states;
    store_tile<T>({t.data, t.dtype, offset_of(t, unit.sequence, place, unit.h0 + k, unit.p0), t.stride[4], t.stride[3]},
                  d.dstate, unit.columns, from, p_stride);
  }

  // Those states' positions; zeros are written where they lie outside of the sequence. Takes one state of scratch.
  Positions positions(T* scratch) const {
    const Positions all(args.state_positions, unit.sequence, walk.length());
    if (args.state_positions) clear_state(scratch);
    all.for_outside([&](std::int64_t place) {
      for (std::int64_t k = 0; k < unit.heads; ++k) store_position_state(place, k, scratch);
    });
    return all;
  }

  // Where the next stretch begins whose state is kept, at token i or behind it; past the sequence where none is.
  std::int64_t next_stretch(std::int64_t i) const {
    return args.chunk_states ? ceil_div(i, kStretch) * kStretch : walk.length();
  }

  // The state before token i, where a stretch begins.
  void store_stretch_state(std::int64_t i, std::int64_t k, const T* from) const {
    const Tensor& t = args.chunk_states;
    const std::int64_t row = stretch_row(args, walk, unit.sequence, i / kStretch);
    store_tile<T>({t.data, t.dtype, offset_of(t, walk.batch, row, unit.h0 + k, unit.p0), t.stride[4], t.stride[3]}, d.dstate,
                  unit.columns, from, p_stride);
  }

  void clear_state(T* state) const {
    for (std::int64_t i = 0; i < state_size(); ++i) state[i] = T(0);
  }
};

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
