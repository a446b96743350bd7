// ssd_scan as it is defined, token by token
// Math     h = exp(dt A) h + dt B x; y = C.h + D x, then y *= silu(z)
// Traffic  as the chunked form; B, C and x of some tokens at a time, through which a few rows of state go in registers
// Numerics a decay near one is kept as its difference from one (decay.h); where the runs of tokens end changes no bits
#pragma once

#include "decay.h"
#include "ssd_unit.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

template <class T>
struct Recurrent {
  static constexpr std::int64_t kTokens = 64;
  static constexpr int kRows = kVectorBytes == 64 ? 16 : 8;  // of state, in registers over a run of tokens

  static Tiling cut(const ssd_scan::Args&, const ssd_scan::Dims& d) { return cut_units(d, kTokens); }

  using Shared = NothingShared;
  struct Scratch {
    Scratch(Arena& arena, const Tiling& t, const ssd_scan::Args& args, const ssd_scan::Dims& d) {
      const std::int64_t p_stride = whole_vectors<T>(t.columns);
      state = arena.take<T>(t.heads * d.dstate * p_stride);
      for (T** projection : {&B, &C}) *projection = arena.take<T>(kTokens * d.dstate);
      for (T** tile : {&x, &y}) *tile = arena.take<T>(kTokens * p_stride);
      for (T** row : {&dt, &factor, &from_one}) *row = arena.take<T>(kTokens);
      gate = Gate<T>(arena, args, kTokens * p_stride, p_stride);
    }

    T* state;                   // [heads,n,p*]
    T *B, *C;                   // [q,n]
    T *x, *y;                   // [q,p*]
    T *dt, *factor, *from_one;  // [q] the step, and the decay that it stands for (decay.h); from_one is 1 or 0
    Gate<T> gate;
  };

  static void run(const UnitView<T>& view, const Scratch& scratch, const Shared&, const Tiling&) {
    const std::int64_t length = view.walk.length(), size = view.state_size();
    Positions positions = view.positions(scratch.state);
    for (std::int64_t k = 0; k < view.unit.heads; ++k) view.load_initial_state(scratch.state + k * size, k);
    for (std::int64_t start = 0, q = 0;; start += q) {
      for (; positions.next() == start; positions.pop())
        for (std::int64_t k = 0; k < view.unit.heads; ++k)
          view.store_position_state(positions.index(), k, scratch.state + k * size);
      if (start == length) break;
      const std::int64_t stretch = view.next_stretch(start);
      if (stretch == start)
        for (std::int64_t k = 0; k < view.unit.heads; ++k) view.store_stretch_state(start, k, scratch.state + k * size);
      q = least(least(kTokens, length - start), positions.next() - start);
      if (stretch > start) q = least(q, stretch - start);
      view.load_projection(scratch.B, view.args.B, start, q);
      view.load_projection(scratch.C, view.args.C, start, q);
      for (std::int64_t k = 0; k < view.unit.heads; ++k) {
        const std::int64_t h = view.unit.h0 + k;
        view.load_rows(scratch.x, view.args.x, start, q, h);
        load_decays(view, scratch, start, q, h);
        for (std::int64_t i = 0; i < q * view.p_stride; ++i) scratch.y[i] = T(0);
        std::int64_t n = 0;
        for (; n + kRows <= view.d.dstate; n += kRows) advance_rows<kRows>(view, scratch, k, n, q);
        for (; n < view.d.dstate; ++n) advance_rows<1>(view, scratch, k, n, q);
        view.finish_y(scratch.y, scratch.x, scratch.gate, start, q, h);
      }
    }
    for (std::int64_t k = 0; k < view.unit.heads; ++k) view.store_final_state(k, scratch.state + k * size);
  }

 private:
  static void load_decays(const UnitView<T>& view, const Scratch& scratch, std::int64_t start, std::int64_t q, std::int64_t h) {
    const ssd_scan::Args& args = view.args;
    const T rate = load_element<T>(args.A.data, args.A.dtype, h * args.A.stride[0]) * kRateScale<T>;
    const Vec<T> bias =
        splat(args.dt_bias ? load_element<T>(args.dt_bias.data, args.dt_bias.dtype, h * args.dt_bias.stride[0]) : T(0));
    load_tile<T>(scratch.dt, whole_vectors<T>(q), view.walk.row(args.dt, start, h), 1, q);
    for (std::int64_t i = 0; i < q; i += kLanes<T>) {
      const Vec<T> dt = discretise<T>(load<T>(scratch.dt + i), bias, args.dt_softplus, T(args.dt_min), T(args.dt_max));
      const Decay<T> decay = decay_of(dt * rate);
      store<T>(scratch.dt + i, dt);
      store<T>(scratch.factor + i, decay.factor);
      store<T>(scratch.from_one + i, decay.from_one ? splat(T(1)) : Vec<T>{});
    }
  }

  // kCount rows of the state of head k, from n on, through q tokens; adds what they give to y.
  template <int kCount>
  static void advance_rows(const UnitView<T>& view, const Scratch& scratch, std::int64_t k, std::int64_t n, std::int64_t q) {
    const std::int64_t p_stride = view.p_stride, dstate = view.d.dstate;
    T* const state = scratch.state + k * view.state_size() + n * p_stride;
    for (std::int64_t c = 0; c < p_stride; c += kLanes<T>) {
      Parts<T, 1> rows[kCount];
#pragma GCC unroll 16
      for (int r = 0; r < kCount; ++r) rows[r].part[0] = load<T>(state + r * p_stride + c);
      for (std::int64_t t = 0; t < q; ++t) {
        const Step<T, 1> step{{{splat(scratch.factor[t])}}, splat(scratch.from_one[t]) > Vec<T>{}};
        const Vec<T> u = scratch.dt[t] * load<T>(scratch.x + t * p_stride + c);
        Vec<T> y = load<T>(scratch.y + t * p_stride + c);
#pragma GCC unroll 16
        for (int r = 0; r < kCount; ++r) {
          const Parts<T, 1> B{{splat(scratch.B[t * dstate + n + r])}}, C{{splat(scratch.C[t * dstate + n + r])}};
          rows[r] = advance<T, 1>(step, rows[r], u, B);
          y = read_out<T, 1>(C, rows[r], y);
        }
        store<T>(scratch.y + t * p_stride + c, y);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kCount; ++r) store<T>(state + r * p_stride + c, rows[r].part[0]);
    }
  }
};

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
