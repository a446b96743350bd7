// ssd_scan as masked attention, the whole sequence one chunk
// Math     s[i] = sum_{k<=i} dt[k] A from the start of the sequence, h the initial state:
//          y[i] = exp(s[i]) C[i].h + sum_{j<=i} (C[i].B[j]) exp(s[i] - s[j]) dt[j] x[j] + D x[i], then y[i] *= silu(z[i])
//          the state after m tokens is exp(s[m-1]) h + sum_{j<m} B[j] exp(s[m-1] - s[j]) dt[j] x[j]
// Traffic  x, B and C once for each block of kRows tokens before which they come; no state between tokens is made
// Numerics as the chunked form
#pragma once

#include "ssd_unit.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

template <class T>
struct Quadratic {
  static constexpr std::int64_t kRows = 48;   // tokens whose scores against as many others are in cache together
  static constexpr std::int64_t kPitch = 48;  // of a row of scores, whole vectors
  static_assert(kPitch % kLanes<T> == 0 && kPitch >= kRows);

  static Tiling cut(const ssd_scan::Args&, const ssd_scan::Dims& d) { return cut_units(d, kRows); }

  using Shared = NothingShared;
  struct Scratch {
    Scratch(Arena& arena, const Tiling& t, const ssd_scan::Args& args, const ssd_scan::Dims& d) {
      constexpr std::int64_t kLine = 64 / sizeof(T);
      const std::int64_t p_stride = whole_vectors<T>(t.columns), size = d.dstate * p_stride;
      padded_length = ceil_div(most(d.seqlen, 1), kLine) * kLine;
      all_steps = arena.take<T>(t.heads * 5 * padded_length);
      state = arena.take<T>(t.heads * size);
      wanted = arena.take<T>(size);
      C = arena.take<T>(kRows * d.dstate);
      B_transposed = arena.take<T>(d.dstate * kPitch);
      for (T** square : {&pairs, &scores}) *square = arena.take<T>(kRows * kPitch);
      x = arena.take<T>(kRows * p_stride);
      y = arena.take<T>(t.heads * kRows * p_stride);
      gate = Gate<T>(arena, args, kRows * p_stride, p_stride);
    }

    // The steps of the unit's head k, over the whole sequence.
    Steps<T> steps(std::int64_t k) const {
      Arena arena(all_steps + k * 5 * padded_length);
      return Steps<T>(arena, padded_length);
    }

    std::int64_t padded_length;
    T* all_steps;
    T* state;           // [heads,n,p*] the initial states
    T* wanted;          // [n,p*] a state for the caller
    T* C;               // [q,n]
    T* B_transposed;    // [n,q*]
    T *pairs, *scores;  // [q,q*] C[i].B[j], and with its weight
    T* x;               // [q,p*]
    T* y;               // [heads,q,p*]
    Gate<T> gate;
  };

  const UnitView<T>& view;
  const Scratch& scratch;

  static void run(const UnitView<T>& view, const Scratch& scratch, const Shared&, const Tiling&) { Quadratic{view, scratch}.run(); }

 private:
  T* state(std::int64_t k) const { return scratch.state + k * view.state_size(); }

  void run() const {
    const std::int64_t length = view.walk.length();
    Positions positions = view.positions(scratch.wanted);
    for (std::int64_t k = 0; k < view.unit.heads; ++k) {
      view.load_initial_state(state(k), k);
      if (length > 0) load_steps<T>(scratch.steps(k), view.args, view.walk, 0, length, view.unit.h0 + k);
    }
    for (std::int64_t i = 0; i < length; i += kRows) attend(i, least(kRows, length - i));
    for (std::int64_t k = 0; k < view.unit.heads; ++k) {
      for (Positions next = positions; next.next() <= length; next.pop())
        view.store_position_state(next.index(), k, state_after(next.next(), k));
      for (std::int64_t i = view.next_stretch(0); i < length; i += kStretch) view.store_stretch_state(i, k, state_after(i, k));
      if (view.args.final_state) view.store_final_state(k, state_after(length, k));
    }
  }

  // y of q tokens from token i on.
  void attend(std::int64_t i, std::int64_t q) const {
    const std::int64_t dstate = view.d.dstate, p_stride = view.p_stride;
    view.load_projection(scratch.C, view.args.C, i, q);
    for (std::int64_t k = 0; k < view.unit.heads; ++k) start_y(y(k), k, i, q);
    for (std::int64_t j = 0; j <= i; j += kRows) {
      const bool diagonal = j == i;
      const std::int64_t others = diagonal ? q : kRows;
      view.load_B_transposed(scratch.B_transposed, kPitch, j, others);
      if (diagonal) multiply_pairs<T>(scratch.pairs, kPitch, scratch.C, dstate, scratch.B_transposed, q, dstate);
      else matmul<false, T>(scratch.pairs, kPitch, scratch.C, dstate, scratch.B_transposed, kPitch, q, kPitch, dstate);
      for (std::int64_t k = 0; k < view.unit.heads; ++k) {
        const std::int64_t h = view.unit.h0 + k;
        view.load_rows(scratch.x, view.args.x, j, others, h);
        weigh(scratch.steps(k), i, q, j, others);
        if (!diagonal) {
          matmul<true, T>(y(k), p_stride, scratch.scores, kPitch, scratch.x, p_stride, q, p_stride, others, T(1));
          continue;
        }
        add_lower(y(k), q);
        view.finish_y(y(k), scratch.x, scratch.gate, i, q, h);
      }
    }
  }

  T* y(std::int64_t k) const { return scratch.y + k * kRows * view.p_stride; }

  // What the initial state gives.
  void start_y(T* y, std::int64_t k, std::int64_t i, std::int64_t q) const {
    const std::int64_t p_stride = view.p_stride;
    if (!view.args.initial_state) {
      for (std::int64_t at = 0; at < q * p_stride; ++at) y[at] = T(0);
      return;
    }
    matmul<false, T>(y, p_stride, scratch.C, view.d.dstate, state(k), p_stride, q, p_stride, view.d.dstate);
    const T* const decay = scratch.steps(k).from_start + i;
    for (std::int64_t r = 0; r < q; ++r)
      for (std::int64_t c = 0; c < p_stride; c += kLanes<T>)
        store<T>(y + r * p_stride + c, decay[r] * load<T>(y + r * p_stride + c));
  }

  // scores of q tokens from i on against others from j on; on the diagonal what lies above it is never read.
  void weigh(const Steps<T>& steps, std::int64_t i, std::int64_t q, std::int64_t j, std::int64_t others) const {
    for (std::int64_t r = 0; r < q; ++r)
      for (std::int64_t c = 0; c < others && j + c <= i + r; c += kLanes<T>) {
        const Vec<T> weight = steps.decay(i + r, j + c) * load<T>(steps.dt + j + c);
        store<T>(scratch.scores + r * kPitch + c, load<T>(scratch.pairs + r * kPitch + c) * weight);
      }
  }

  void add_lower(T* y, std::int64_t q) const {
    const std::int64_t p_stride = view.p_stride;
    for_column_blocks<T>(p_stride, [&]<int V>(Constant<V>, std::int64_t c) {
      for_row_blocks(q, [&]<int R>(Constant<R>, std::int64_t i) {
        Vec<T> sum[R][V];
        load_block<T>(sum, y + i * p_stride + c, p_stride);
        multiply_lower<T>(sum, scratch.scores, kPitch, scratch.x + c, p_stride, i);
        store_block<T>(y + i * p_stride + c, p_stride, sum);
      });
    });
  }

  // The state of head k after some tokens of the sequence.
  const T* state_after(std::int64_t count, std::int64_t k) const {
    if (count == 0) return state(k);
    const std::int64_t p_stride = view.p_stride;
    const Steps<T> steps = scratch.steps(k);
    for (std::int64_t at = 0; at < view.state_size(); ++at)
      scratch.wanted[at] = view.args.initial_state ? steps.from_start[count - 1] * state(k)[at] : T(0);
    for (std::int64_t j = 0; j < count; j += kRows) {
      const std::int64_t q = least(kRows, count - j);
      view.load_B_transposed(scratch.B_transposed, kPitch, j, q);
      view.load_rows(scratch.x, view.args.x, j, q, view.unit.h0 + k);
      alignas(kVectorBytes) T weights[kPitch];
      for (std::int64_t c = 0; c < q; c += kLanes<T>)
        store<T>(weights + c, steps.decay(count - 1, j + c) * load<T>(steps.dt + j + c));
      for (std::int64_t r = 0; r < q; ++r)
        for (std::int64_t c = 0; c < p_stride; c += kLanes<T>)
          store<T>(scratch.x + r * p_stride + c, weights[r] * load<T>(scratch.x + r * p_stride + c));
      matmul<true, T>(scratch.wanted, p_stride, scratch.B_transposed, kPitch, scratch.x, p_stride, view.d.dstate, p_stride, q,
                      T(1));
    }
    return scratch.wanted;
  }
};

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
