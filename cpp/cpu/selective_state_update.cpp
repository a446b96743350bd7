// selective_state_update on the CPU
// Math     state = exp(dt A) state + dt B x;  y = C . state + D x, times silu(z)
// Shapes   Mamba-1 state [slots,d,n], A [d,n]; Mamba-2 state [slots,h,p,n], A [h]; x [b,t,..] and B, C [b,t,g,n] or [d,n]
// Traffic  read and write the state: 2 b d n (b h p n) elements; all else is small beside it
// Tasks    runs of units; a unit is one head of one row (Mamba-2), or some channels of one group of one row (Mamba-1)
// Numerics lanes are states; rows of state (channels) go through in blocks of one vector, whose dot products with C are
//          added up together, each in the same order. Between the tokens of one call a narrow state stays in float32.
#include "decay.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "state_rows.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using selective_state_update::Args;
using selective_state_update::Dims;

constexpr std::int64_t kTaskStates = 65536;  // about 10 us of Mamba-2 states: below it, waking a thread costs more
constexpr std::int64_t kExpCost = 4;         // of a Mamba-1 state, which has an exp of its own, beside a Mamba-2 state
constexpr std::int64_t kUnitBlocks = 4;      // vectors of channels in a unit of Mamba-1: they share the rows of B and C

Slots slots_of(const Args& args, std::int64_t row) {
  const std::int64_t from = args.state_indices ? index_at(args.state_indices, row) : row;
  return {from, args.out_state_indices ? index_at(args.out_state_indices, row) : from};
}

// One token through kRows rows of a head, which share its decay, B and C; sums[r] = the lanes of C . state. The rows are T, or
// the narrow floats of a state that is updated where it lies.
template <class T, DType kDType, int kRows>
STATESCAN_INLINE void advance_rows(const Memory<kDType>* from, std::int64_t from_step, Memory<kDType>* to, std::int64_t to_step,
                                   std::int64_t n, Vec<T> decay, const T* u, const T* B, const T* C, Vec<T>* sums) {
  Vec<T> sum[kRows] = {};
  std::int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> b = load<T>(B + i), c = load<T>(C + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> state = fma(decay, load_as<T, kDType>(from + r * from_step + i), splat(u[r]) * b);
      store_as<T, kDType>(to + r * to_step + i, state);
      sum[r] = fma(c, state, sum[r]);
    }
  }
  if (const int left = static_cast<int>(n - i)) {
    const Vec<T> b = load_first<T>(B + i, left), c = load_first<T>(C + i, left);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> state = fma(decay, load_run<T>(from, kDType, r * from_step + i, left), splat(u[r]) * b);
      store_run<T>(to, kDType, r * to_step + i, left, state);
      sum[r] = fma(c, state, sum[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r] = sum[r];
}

template <class T, DType kDType>
void advance_head(const Memory<kDType>* from, std::int64_t from_step, Memory<kDType>* to, std::int64_t to_step, int rows,
                  std::int64_t n, Vec<T> decay, const T* u, const T* B, const T* C, Vec<T>* sums) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    advance_rows<T, kDType, 4>(from + r * from_step, from_step, to + r * to_step, to_step, n, decay, u + r, B, C, sums + r);
  for (; r < rows; ++r)
    advance_rows<T, kDType, 1>(from + r * from_step, from_step, to + r * to_step, to_step, n, decay, u + r, B, C, sums + r);
}

// One token through the rows of a block of Mamba-1 channels, which have A, and perhaps B and C, of their own.
template <class T, int kParts>
STATESCAN_INLINE void advance_channels(const StateBlock<T, kParts>& block, const T* dt, const T* u, const Rows<T, kParts>& A,
                                       const Rows<T, kParts>& B, const Rows<T, kParts>& C, Vec<T>* sums) {
  const auto advance_vector = [&](int row, std::int64_t i, int lanes, Vec<T>& sum) {
    Parts<T, kParts> rate = load_vector<T, kParts>(A, row, i, lanes);
    rate.part[0] = rate.part[0] * kRateScale<T>;
    const Parts<T, kParts> state =
        advance<T, kParts>(decay<T, kParts>(splat(dt[row]), rate), load_vector<T, kParts>(block.from, row, i, lanes),
                           splat(u[row]), load_vector<T, kParts>(B, row, i, lanes));
    for (int part = 0; part < kParts; ++part) {
      T* to = block.to[part] + row * block.to_step + i;
      lanes == kLanes<T> ? store<T>(to, state.part[part]) : store_first<T>(to, state.part[part], lanes);
    }
    sum = read_out<T, kParts>(load_vector<T, kParts>(C, row, i, lanes), state, sum);
  };
  for (int row = 0; row < block.rows; ++row) {
    Vec<T> sum{};
    std::int64_t i = 0;
    for (; i + kLanes<T> <= block.n; i += kLanes<T>) advance_vector(row, i, kLanes<T>, sum);
    if (i < block.n) advance_vector(row, i, static_cast<int>(block.n - i), sum);
    sums[row] = kParts == 1 ? sum : T(2) * sum;
  }
}

// A vector of elements one stride apart; a stride of 0 repeats one.
template <class T>
STATESCAN_INLINE Vec<T> load_lanes(const Tensor& t, std::int64_t first, std::int64_t stride, int count) {
  if (stride == 0) return splat(load_element<T>(t.data, t.dtype, first));
  alignas(kVectorBytes) T lanes[kLanes<T>] = {};
  load_row<T>(lanes, t.data, t.dtype, first, stride, count);
  return load<T>(lanes);
}

// Scratch of one thread.
template <class T, int kParts>
struct Scratch {
  T *state[kParts], *A[kParts], *B[kParts], *C[kParts];
};

template <class T, int kParts>
Scratch<T, kParts> lay_out(Arena& arena, const Dims& d) {
  const std::int64_t n = padded<T>(d.dstate);
  Scratch<T, kParts> scratch;
  for (int part = 0; part < kParts; ++part) {
    scratch.state[part] = arena.take<T>(kLanes<T> * n);
    scratch.A[part] = arena.take<T>(d.mamba1 ? kLanes<T> * n : 0);
    scratch.B[part] = arena.take<T>((d.varying_B ? d.ntokens : kLanes<T>) * n);
    scratch.C[part] = arena.take<T>((d.varying_C ? d.ntokens : kLanes<T>) * n);
  }
  return scratch;
}

template <class T, int kParts>
std::size_t bytes_per_thread(const Dims& d) {
  Arena count(nullptr);
  lay_out<T, kParts>(count, d);
  return count.used();
}

template <class T, int kParts>
class Update {
 public:
  Update(const Args& args, const Dims& d) : args_(args), d_(d), tok_(d.has_token_axis ? 1 : 0) {
    channels_per_group_ = d.ngroups > 0 ? d.nheads / d.ngroups : 0;
    units_per_group_ = d.mamba1 ? (channels_per_group_ + kUnit - 1) / kUnit : channels_per_group_;
  }

  std::int64_t units() const { return d_.batch * d_.ngroups * units_per_group_; }

  void run_unit(std::int64_t unit, const Scratch<T, kParts>& scratch) const {
    const std::int64_t row = unit / (d_.ngroups * units_per_group_), group = unit / units_per_group_ % d_.ngroups;
    const std::int64_t within = unit % units_per_group_;
    const Slots slots = slots_of(args_, row);
    // Mamba-1: the rows of state are channels; Mamba-2: the headdim of one head.
    const std::int64_t head = group * channels_per_group_ + within * (d_.mamba1 ? kUnit : 1);
    const std::int64_t left = channels_per_group_ - within * kUnit;
    const std::int64_t rows = d_.mamba1 ? (left < kUnit ? left : kUnit) : d_.headdim;
    Rows<T, kParts> B{}, C{};
    if (slots.from >= 0) {
      if (d_.varying_B) B = projection(args_.B, row, group, scratch.B);
      if (d_.varying_C) C = projection(args_.C, row, group, scratch.C);
    }
    for (std::int64_t first = 0; first < rows; first += kLanes<T>) {
      const int count = static_cast<int>(rows - first < kLanes<T> ? rows - first : kLanes<T>);
      if (slots.from < 0) clear(row, head, first, count);
      else if (d_.mamba1) run_channels(row, slots, head + first, count, B, C, scratch);
      else if constexpr (kParts == 1) run_head_rows(row, slots, head, first, count, B, C, scratch);
    }
  }

 private:
  static constexpr std::int64_t kUnit = kUnitBlocks * kLanes<T>;

  // B or C of a row: one for each token.
  Rows<T, kParts> projection(const Tensor& t, std::int64_t row, std::int64_t group, T* const (&scratch)[kParts]) const {
    return rows_of<T, kParts>(t, row * t.stride[0] + group * t.stride[1 + tok_], tok_ * t.stride[1], d_.ntokens, scratch);
  }

  std::int64_t at_head(const Tensor& t, std::int64_t row, std::int64_t token, std::int64_t head) const {
    return row * t.stride[0] + tok_ * token * t.stride[1] + head * t.stride[1 + tok_];
  }
  // Where x, z or y (dt in Mamba-1) has channel `first` of `head` at a token.
  std::int64_t at(const Tensor& t, std::int64_t row, std::int64_t token, std::int64_t head, std::int64_t first) const {
    return at_head(t, row, token, head) + (d_.mamba1 ? 0 : first * t.stride[2 + tok_]);
  }
  std::int64_t row_stride(const Tensor& t) const { return t.stride[d_.mamba1 ? 1 + tok_ : 2 + tok_]; }

  void store_y(Vec<T> y, std::int64_t row, std::int64_t token, std::int64_t head, std::int64_t first, int count) const {
    alignas(kVectorBytes) T lanes[kLanes<T>];
    store<T>(lanes, y);
    store_row<T>(args_.y.data, args_.y.dtype, at(args_.y, row, token, head, first), row_stride(args_.y), count, lanes);
  }

  void clear(std::int64_t row, std::int64_t head, std::int64_t first, int count) const {
    const std::int64_t channel = d_.mamba1 ? head + first : head;
    for (std::int64_t token = 0; token < d_.ntokens; ++token) store_y(Vec<T>{}, row, token, channel, first, count);
  }

  // y of a block at a token, from the sums of its rows.
  void finish(Vec<T> (&sums)[kLanes<T>], Vec<T> x, Vec<T> D, std::int64_t row, std::int64_t token, std::int64_t head,
              std::int64_t first, int count) const {
    Vec<T> y = fma(D, x, sum_rows<T>(sums));
    if (args_.z) y = y * silu<T>(load_lanes<T>(args_.z, at(args_.z, row, token, head, first), row_stride(args_.z), count));
    store_y(y, row, token, head, first, count);
  }

  Vec<T> step(Vec<T> dt, Vec<T> bias) const {
    return discretise<T>(dt, bias, args_.dt_softplus, static_cast<T>(args_.dt_min), static_cast<T>(args_.dt_max));
  }

  void run_channels(std::int64_t row, Slots slots, std::int64_t channel, int count, Rows<T, kParts> B, Rows<T, kParts> C,
                    const Scratch<T, kParts>& scratch) const {
    const Tensor& state = args_.state;
    const std::int64_t within = channel * state.stride[1];
    const Rows<T, kParts> A = rows_of<T, kParts>(args_.A, channel * args_.A.stride[0], args_.A.stride[0], count, scratch.A);
    if (!d_.varying_B) B = rows_of<T, kParts>(args_.B, channel * args_.B.stride[0], args_.B.stride[0], count, scratch.B);
    if (!d_.varying_C) C = rows_of<T, kParts>(args_.C, channel * args_.C.stride[0], args_.C.stride[0], count, scratch.C);
    const auto of_channels = [&](const Tensor& t) {
      return t ? load_lanes<T>(t, channel * t.stride[0], t.stride[0], count) : Vec<T>{};
    };
    const Vec<T> D = of_channels(args_.D), bias = of_channels(args_.dt_bias);
    StateBlock<T, kParts> block =
        open_block<T, kParts>(state, slots, within, state.stride[1], count, d_.ntokens > 0, scratch.state);
    for (std::int64_t token = 0; token < d_.ntokens; ++token) {
      const Vec<T> x = load_lanes<T>(args_.x, at(args_.x, row, token, channel, 0), row_stride(args_.x), count);
      const Vec<T> dt = step(load_lanes<T>(args_.dt, at(args_.dt, row, token, channel, 0), row_stride(args_.dt), count), bias);
      alignas(kVectorBytes) T steps[kLanes<T>], u[kLanes<T>];
      store<T>(steps, dt);
      store<T>(u, dt * x);
      Vec<T> sums[kLanes<T>] = {};
      advance_channels<T, kParts>(block, steps, u, A, of_token(B, d_.varying_B, token), of_token(C, d_.varying_C, token), sums);
      finish(sums, x, D, row, token, channel, 0, count);
      block.next_token();
    }
    close_block<T, kParts>(block, state, slots, within, state.stride[1]);
  }

  // A varying projection has one row for all channels of a token.
  static Rows<T, kParts> of_token(Rows<T, kParts> rows, bool varying, std::int64_t token) {
    if (!varying) return rows;
    for (const T*& part : rows.part) part += token * rows.step;
    rows.step = 0;
    return rows;
  }

  void run_head_rows(std::int64_t row, Slots slots, std::int64_t head, std::int64_t first, int count, const Rows<T, 1>& B,
                     const Rows<T, 1>& C, const Scratch<T, 1>& scratch) const {
    const Tensor& state = args_.state;
    const std::int64_t within = head * state.stride[1] + first * state.stride[2];
    const Vec<T> rate = load_lanes<T>(args_.A, head * args_.A.stride[0], 0, count) * kRateScale<T>;
    const Vec<T> bias = args_.dt_bias ? load_lanes<T>(args_.dt_bias, head * args_.dt_bias.stride[0], 0, count) : Vec<T>{};
    Vec<T> D{};
    if (args_.D) {
      const std::int64_t stride = d_.D_per_channel ? args_.D.stride[1] : 0;
      D = load_lanes<T>(args_.D, head * args_.D.stride[0] + first * stride, stride, count);
    }
    // One token on contiguous 16-bit states needs no float32 copy of them.
    const bool narrow = size_of(state.dtype) == 2 && state.stride[3] == 1 && d_.ntokens == 1 && slots.to >= 0;
    StateBlock<T, 1> block{};
    if (!narrow) block = open_block<T, 1>(state, slots, within, state.stride[2], count, d_.ntokens > 0, scratch.state);
    for (std::int64_t token = 0; token < d_.ntokens; ++token) {
      const Vec<T> x = load_lanes<T>(args_.x, at(args_.x, row, token, head, first), row_stride(args_.x), count);
      const Vec<T> dt = step(load_lanes<T>(args_.dt, at_head(args_.dt, row, token, head), 0, count), bias);
      const Vec<T> decay = whole_decay<T>(dt * rate);
      alignas(kVectorBytes) T u[kLanes<T>];
      store<T>(u, dt * x);
      Vec<T> sums[kLanes<T>] = {};
      const T *b = B.part[0] + token * B.step, *c = C.part[0] + token * C.step;
      if (narrow)
        advance_narrow(slots, within, count, decay, u, b, c, sums);
      else
        advance_head<T, kDTypeOf<T>>(block.from.part[0], block.from.step, block.to[0], block.to_step, count, d_.dstate, decay,
                                     u, b, c, sums);
      finish(sums, x, D, row, token, head, first, count);
      block.next_token();
    }
    if (!narrow) close_block<T, 1>(block, state, slots, within, state.stride[2]);
  }

  void advance_narrow(Slots slots, std::int64_t within, int count, Vec<T> decay, const T* u, const T* B, const T* C,
                      Vec<T>* sums) const {
    if constexpr (sizeof(T) == 4) {
      const Tensor& state = args_.state;
      const std::int64_t step = state.stride[2];
      auto* const base = static_cast<std::uint16_t*>(state.data) + within;
      const std::uint16_t* const from = base + slots.from * state.stride[0];
      std::uint16_t* const to = base + slots.to * state.stride[0];
      if (state.dtype == DType::bfloat16)
        advance_head<T, DType::bfloat16>(from, step, to, step, count, d_.dstate, decay, u, B, C, sums);
      else
        advance_head<T, DType::float16>(from, step, to, step, count, d_.dstate, decay, u, B, C, sums);
    }
  }

  const Args& args_;
  const Dims& d_;
  const int tok_;
  std::int64_t channels_per_group_, units_per_group_;
};

template <class T, int kParts>
void run_as(const Args& args, const Dims& d) {
  const Update<T, kParts> update(args, d);
  const std::int64_t units = update.units();
  const std::int64_t work = d.batch * d.ntokens * d.nheads * d.headdim * d.dstate * (d.mamba1 ? kExpCost : 1);
  const std::int64_t wanted = work / kTaskStates + 1, tasks = wanted < units ? wanted : units;
  const std::size_t bytes = bytes_per_thread<T, kParts>(d);
  parallel_for(tasks, [&](std::int64_t task, int thread) {
    with_scratch(args.workspace, bytes, thread, [&](Arena arena) {
      const Scratch<T, kParts> scratch = lay_out<T, kParts>(arena, d);
      for (std::int64_t unit = task * units / tasks; unit < (task + 1) * units / tasks; ++unit) update.run_unit(unit, scratch);
    });
  });
}

}  // namespace

std::size_t workspace_bytes(const Args& args, const Dims& d) {
  if (args.x.dtype == DType::float64)
    return workspace_beyond_stack(d.complex_A ? bytes_per_thread<double, 2>(d) : bytes_per_thread<double, 1>(d));
  return workspace_beyond_stack(d.complex_A ? bytes_per_thread<float, 2>(d) : bytes_per_thread<float, 1>(d));
}

void run(const Args& args, const Dims& d) {
  if (args.x.dtype == DType::float64) d.complex_A ? run_as<double, 2>(args, d) : run_as<double, 1>(args, d);
  else d.complex_A ? run_as<float, 2>(args, d) : run_as<float, 1>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
