// selective_state_update
// Math     state = exp(dt A) state + dt B x;  y = C . state + D x, times silu(z); 2 Re(C . state) with a complex A
// Shapes   Mamba-1 state [slots,d,n], A [d,n]; Mamba-2 state [slots,h,p,n], A [h]; x [b,t,..] and B, C [b,t,g,n] or [d,n]
// Traffic  read and write the state once for all tokens: 2*b*h*p*n (2*b*d*n) elements; floor: that over 3.0 TB/s. B and C are
//          read again for every 4 rows, from the caches
// Launch   one axis of tiles x batch blocks of 64 to 320 threads; a team of lanes, at most a warp, takes 4 rows (1 or 2 long
//          ones), each lane four 16-byte runs of states
// Numerics float32; states stay in registers from token to token. A lane adds up its states in order, the lanes of a team as a
//          tree that depends on dstate alone
#pragma once

#include <type_traits>

#include <statescan/math.h>

#include "../common/early.cuh"
#include "../common/element.cuh"
#include "params.h"

namespace statescan::selective_state_update {

// -1 for padding; so is what lies outside the slots, which cannot be checked on the host without waiting.
inline __device__ std::int64_t slot_at(const Indices& indices, std::int64_t row, std::int64_t slots) {
  const std::int64_t slot = indices.is_int64 ? static_cast<const std::int64_t*>(indices.data)[row * indices.stride]
                                             : static_cast<const std::int32_t*>(indices.data)[row * indices.stride];
  return slot < slots ? slot : -1;
}

// The rows of a band that a team of lanes works on, and the lane's place in the team.
struct Unit {
  std::uint32_t batch, band, group, first;
  int rows;  // 0: the team has nothing to do, but its lanes meet the others of the warp in the shuffles
  int lane, lanes;
};

template <int kRows>
__device__ Unit unit_of(const Params& p) {
  const std::uint32_t unit = blockIdx.x % p.tiles * (blockDim.x / p.lanes) + threadIdx.x / p.lanes;
  Unit u;
  u.batch = blockIdx.x / p.tiles;
  u.band = unit / p.units_of_band;
  u.group = u.band / p.bands_of_group;
  u.first = unit % p.units_of_band * kRows;
  const std::uint32_t left = p.band_rows - u.first;
  u.rows = unit >= p.units ? 0 : (left < kRows ? static_cast<int>(left) : kRows);
  u.lanes = static_cast<int>(p.lanes);
  u.lane = static_cast<int>(threadIdx.x & (p.lanes - 1));
  return u;
}

// Row `row` of a unit in a tensor, at the first token.
inline __device__ char* at(const View& t, const Unit& u, std::uint32_t row = 0) {
  return t.data + (u.batch * t.batch + u.band * t.band + (u.first + row) * t.row);
}
inline __device__ char* at_projection(const View& t, const Unit& u) {
  return t.data + (u.batch * t.batch + u.group * t.band + u.first * t.row);
}
inline __device__ char* at_slot(const View& t, const Unit& u, std::int64_t slot) {
  return t.data + (slot * t.batch + u.band * t.band + u.first * t.row);
}

// An element of a tensor that may be absent, as bits.
inline __device__ std::uint32_t load_if(bool wanted, const View& t, const char* from, DType dtype = DType::float32) {
  return wanted && t.data ? cuda::load_bits(from, dtype) : 0;
}

// Sums of kRows rows over a team: lane i ends with the sum of row i % kRows. Halving the rows with each of the first steps
// takes 6 shuffles for 4 rows and 32 lanes, where one row after the other takes 20.
template <int kRows>
__device__ float sum_over_team(const float (&sums)[kRows], int lanes) {
  constexpr unsigned kAll = 0xffffffffu;
  float left[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) left[r] = sums[r];
#pragma unroll
  for (int distance = 1; distance < kRows; distance *= 2) {
    const bool odd = threadIdx.x & distance;
#pragma unroll
    for (int k = 0; k < kRows / 2 / distance; ++k) {
      const float kept = odd ? left[2 * k + 1] : left[2 * k], given = odd ? left[2 * k] : left[2 * k + 1];
      left[k] = kept + __shfl_xor_sync(kAll, given, distance);
    }
  }
#pragma unroll 1
  for (int distance = kRows; distance < lanes; distance *= 2) left[0] += __shfl_xor_sync(kAll, left[0], distance);
  return left[0];
}

// Has words from memory widened no earlier than here. Of a known type the compiler does that right behind the load, and waits
// there.
template <class Words>
__device__ void stay_packed(Words& words) {
  static_assert(std::is_trivially_copyable_v<Words> && sizeof(Words) % 4 == 0);
  auto* const word = reinterpret_cast<std::uint32_t*>(&words);
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Words) / 4; ++i) asm volatile("" : "+r"(word[i]));
}

// exp(dt A): a rate's real part, and its imaginary part with a complex A.
template <int kParts>
__device__ void decay_of(float dt, const float* rate, float* decay) {
  decay[0] = expf(dt * rate[0]);
  if constexpr (kParts == 2) {
    // sin and cos of multiples of pi reduce their argument exactly, without a table.
    constexpr float kOverPi = 0.318309886183790671538f;
    float sine, cosine;
    sincospif(dt * rate[1] * kOverPi, &sine, &cosine);
    decay[1] = decay[0] * sine;
    decay[0] *= cosine;
  }
}

// state = decay state + u B, then sum += C state (its real part).
template <int kParts>
__device__ void advance(float* state, const float* decay, float u, const float* B, const float* C, float& sum) {
  if constexpr (kParts == 1) {
    state[0] = fmaf(decay[0], state[0], u * B[0]);
    sum = fmaf(C[0], state[0], sum);
  } else {
    const float real = fmaf(decay[0], state[0], fmaf(-decay[1], state[1], u * B[0]));
    state[1] = fmaf(decay[0], state[1], fmaf(decay[1], state[0], u * B[1]));
    state[0] = real;
    sum = fmaf(C[0], state[0], fmaf(-C[1], state[1], sum));
  }
}

// kOneToken: no addresses are kept for a next token, which takes a quarter of the registers off.
template <class Policy, int kRunsOfRow, bool kOneToken, Elements kElements>
__global__ void __launch_bounds__(most_threads<Policy>(kRunsOfRow), kRunsOfRow == 1 ? 0 : 4)
    selective_state_update_kernel(const __grid_constant__ Params p) {
  constexpr int kRows = Policy::kRuns / kRunsOfRow, kRun = Policy::kRun, kParts = Policy::kParts, kValues = kRun * kParts;
  constexpr bool kMamba1 = Policy::kForm == Form::mamba1, kVector = Policy::kAccess == Access::vector;
  constexpr DType kRate = kParts == 2 ? DType::complex64 : DType::float32;
  constexpr unsigned kAll = 0xffffffffu;
  const auto dtype_of = [](const View& t) { return kElements == Elements::bfloat16 ? DType::bfloat16 : t.dtype; };
  using Run = cuda::Run<Policy::kAccess, kRun, kParts>;
  const std::int64_t pieces = kRunsOfRow == 1 ? 1 : p.pieces, ntokens = kOneToken ? 1 : p.ntokens;
  const Unit unit = unit_of<kRows>(p);
  // What a row has one of, one lane in kRows loads and works out, and the first of them stores.
  const int row = unit.lane % kRows;
  const bool has_row = row < unit.rows, stores_row = has_row && unit.lane < kRows;
  const bool has_step =
      kMamba1 ? has_row : unit.rows > 0;  // the rows of a head share dt: every lane works out the head's decay
  // Ahead of the wait: addresses, and states on their way to L2. A batch of one lasts no longer than this would take after it.
  const char *first_x = at(p.x, unit, row), *first_dt = at(p.dt, unit, row), *first_z = at(p.z, unit, row);
  const char *first_B = at_projection(p.B, unit), *first_C = at_projection(p.C, unit);
  const char *bias_at = at(p.dt_bias, unit, row), *D_at = at(p.D, unit, row), *rate_at = at(p.A, unit);
  char *first_y = at(p.y, unit, row), *slots_at = at_slot(p.state, unit, 0);
  cuda::work_out(first_x, first_dt, first_z, first_B, first_C, bias_at, D_at, rate_at, first_y, slots_at);
  if constexpr (kVector) {
    constexpr std::uint32_t kBlocksAhead = 2048, kLine = 128;  // later blocks start after the wait
    const char* line = slots_at + unit.batch * p.state.batch + unit.lane * 16;
    for (int r = 0; r < unit.rows && !p.from.data && blockIdx.x < kBlocksAhead; ++r, line += p.state.row)
      if (reinterpret_cast<std::uintptr_t>(line) % kLine == 0 && unit.lane * kRun < p.dstate) cuda::prefetch(line);
  }
  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  const std::int64_t from = p.from.data ? slot_at(p.from, unit.batch, p.slots) : unit.batch;
  if (from < 0) {
    char* y = first_y;
    for (std::int64_t t = 0; t < ntokens; ++t, y += p.y.token)
      if (stores_row) cuda::store_element(y, dtype_of(p.y), 0.0f);
    return;
  }

#pragma unroll 1
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    std::int64_t column[kRunsOfRow];
    int count[kRunsOfRow];  // of the run's states, how many there are
#pragma unroll
    for (int v = 0; v < kRunsOfRow; ++v) {
      column[v] = ((piece * kRunsOfRow + v) * unit.lanes + unit.lane) * kRun;
      const std::int64_t left = p.dstate - column[v];
      count[v] = left < 0 ? 0 : (left < kRun ? static_cast<int>(left) : kRun);
    }
    const auto count_of = [&](int r, int v) { return r < unit.rows ? count[v] : 0; };
    // From one state to the next, in bytes; a constant where it can be.
    const auto step_of = [&](const View& t) -> std::int64_t {
      return !kVector ? t.column : (kParts == 2 ? 8 : cuda::bytes_of(dtype_of(t)));
    };
    const std::int64_t state_step = kVector ? 16 / kRun : p.state.column, rate_step = kVector ? 4 * kParts : p.A.column;

    // Everything that the first token needs is on its way before the first use of any of it.
    Run packed_state[kRows][kRunsOfRow], packed_rate[kMamba1 ? kRows : 1][kRunsOfRow], packed_B[kRunsOfRow],
        packed_C[kRunsOfRow];
    const char* const state_at = slots_at + from * p.state.batch;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kRunsOfRow; ++v)
        packed_state[r][v].load(state_at + r * p.state.row + column[v] * state_step, Policy::kState, state_step,
                                count_of(r, v));
    asm volatile("" ::: "memory");  // the states come from farthest away: no other load goes before them
    const auto load_projection = [&](const View& view, const char* first, int r, Run(&packed)[kRunsOfRow]) {
      const std::int64_t step = step_of(view);
#pragma unroll
      for (int v = 0; v < kRunsOfRow; ++v)
        packed[v].load(first + r * view.row + column[v] * step, dtype_of(view), step, count_of(r, v));
    };
    const char *x_at = first_x, *dt_at = first_dt, *z_at = first_z, *B_at = first_B, *C_at = first_C;
    char* y_at = first_y;
    std::uint32_t dt_bits, x_bits, z_bits;
    const auto load_token = [&] {
      dt_bits = load_if(has_step, p.dt, dt_at, dtype_of(p.dt));
      x_bits = load_if(has_row, p.x, x_at, dtype_of(p.x));
      load_projection(p.B, B_at, 0, packed_B);
      load_projection(p.C, C_at, 0, packed_C);
      z_bits = load_if(has_row, p.z, z_at, dtype_of(p.z));
    };
    if (ntokens > 0) load_token();
    const float bias = __uint_as_float(load_if(has_step, p.dt_bias, bias_at));  // float32, as A and D
    const float D = __uint_as_float(load_if(has_row, p.D, D_at));
    float head_rate = 0.0f;
    if constexpr (kMamba1) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kRunsOfRow; ++v)
          packed_rate[r][v].load(rate_at + r * p.A.row + column[v] * rate_step, kRate, rate_step, count_of(r, v));
    } else {
      head_rate = __uint_as_float(load_if(unit.rows > 0, p.A, rate_at));
    }

    const std::int64_t to = p.to.data ? slot_at(p.to, unit.batch, p.slots) : from;
    if constexpr (kElements != Elements::any) {  // all of them are on their way by here
      stay_packed(dt_bits), stay_packed(x_bits), stay_packed(z_bits);
      stay_packed(packed_B), stay_packed(packed_C), stay_packed(packed_state);
    }

    float state[kRows][kRunsOfRow][kValues];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kRunsOfRow; ++v) packed_state[r][v].widen(Policy::kState, state[r][v]);

    char* const to_at = slots_at + to * p.state.batch;
    const auto store_states = [&] {
      if (to < 0) return;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kRunsOfRow; ++v)
          Run::store(to_at + r * p.state.row + column[v] * state_step, Policy::kState, state_step, count_of(r, v), state[r][v]);
    };
#pragma unroll 1
    for (std::int64_t t = 0; t < ntokens; ++t) {
      const float dt = discretise(cuda::widen_bits(dt_bits, dtype_of(p.dt)), bias, p.dt_softplus, p.dt_min, p.dt_max);
      const float x = cuda::widen_bits(x_bits, dtype_of(p.x)), u = dt * x;
      const float head_decay = kMamba1 ? 1.0f : expf(dt * head_rate);
      float B[kRunsOfRow][kValues], C[kRunsOfRow][kValues], sums[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool own_B = kMamba1 && p.B.row != 0, own_C = kMamba1 && p.C.row != 0;  // [d,n]: of a row's own
        if (r > 0 && own_B) load_projection(p.B, B_at, r, packed_B);
        if (r > 0 && own_C) load_projection(p.C, C_at, r, packed_C);
#pragma unroll
        for (int v = 0; v < kRunsOfRow; ++v) {
          if (r == 0 || own_B) packed_B[v].widen(dtype_of(p.B), B[v]);
          if (r == 0 || own_C) packed_C[v].widen(dtype_of(p.C), C[v]);
        }
        const float u_r = __shfl_sync(kAll, u, r, unit.lanes), dt_r = kMamba1 ? __shfl_sync(kAll, dt, r, unit.lanes) : dt;
        sums[r] = 0.0f;
#pragma unroll
        for (int v = 0; v < kRunsOfRow; ++v) {
          float rate[kValues];
          if constexpr (kMamba1) packed_rate[r][v].widen(kRate, rate);
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (kVector ? count[v] == 0 : i >= count[v]) continue;
            const int value = i * kParts;
            float decay[kParts] = {head_decay};
            if constexpr (kMamba1) decay_of<kParts>(dt_r, &rate[value], decay);
            advance<kParts>(&state[r][v][value], decay, u_r, &B[v][value], &C[v][value], sums[r]);
          }
        }
      }
      if (t + 1 == ntokens) store_states();  // they have the longest way: before the sums
      float y = kParts * sum_over_team(sums, unit.lanes);
      bool is_last = true;
      if (pieces > 1 && stores_row) {  // the same thread takes up what it left
        const std::int64_t bands = p.units / p.units_of_band;
        float* partial = p.partial + ((unit.batch * ntokens + t) * bands + unit.band) * p.band_rows + unit.first + row;
        if (piece > 0) y += *partial;
        is_last = piece + 1 == pieces;
        if (!is_last) *partial = y;
      }
      if (p.D.data) y = fmaf(D, x, y);
      if (p.z.data) y *= cuda::fast_silu(cuda::widen_bits(z_bits, dtype_of(p.z)));
      if (stores_row && is_last) cuda::store_element(y_at, dtype_of(p.y), y);
      x_at += p.x.token, dt_at += p.dt.token, z_at += p.z.token, B_at += p.B.token, C_at += p.C.token, y_at += p.y.token;
      if (t + 1 < ntokens) load_token();
    }
    if (ntokens == 0 && to != from) store_states();
  }
}

}  // namespace statescan::selective_state_update
