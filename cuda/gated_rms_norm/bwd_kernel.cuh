// gated_rms_norm backward
// Math     with s = silu(z), v = x (or x s), n = v r, r = 1 / sqrt(mean(v^2) + eps), dn = dy weight (times s): dv = r (dn - n
//          mean(dn n)); dx = dv (times s); dz = dy weight n silu'(z), or dv x silu'(z); dweight = sum over rows of dy n (times
//          s)
// Shapes   x, z, dy, dx, dz [..., d]; weight, dweight [d]; x as in the forward
// Traffic  read x, z and dy, write dx and dz: 5*rows*d*sizeof(Element); floor: that over 3.0 TB/s. The shares of dweight are
//          8*d*shares bytes. A group of up to 8,192 elements stays in registers; a longer one is read twice
// Launch   one axis of groups x shares of the rows; a warp (up to 256 elements) or a block takes a group through its share of
// the
//          rows, the next row on its way while it works on one. Then the shares of dweight are added up
// Numerics float32; sums of a row as in the forward, dweight over the rows of a share in order. No atomics: the bits of dx and
// dz
//          depend on the group alone, those of dweight on the shape as well
#pragma once

#include "fwd_kernel.cuh"

namespace statescan::gated_rms_norm {

struct BackwardParams {
  Rows rows;
  std::int64_t shares;  // of the rows, each of every shares-th
  View x, z, weight, dy, dx, dz;
  End end;
  const std::uint8_t* x_exponents;  // null: x has its dtype
  float* partial;                   // [shares, d]: each share's sum of dweight; null: not wanted
};

// How the elements of a group lie on a team.
enum class Team {
  warp,
  block,
  chunked_block,  // more than it can hold at once
};

// Sums of two values over a team: a warp, or all of the block. `of_warp` must not be the one of the call before.
template <Team team>
__device__ float2 sum_over_team(float2 v, float2 (&of_warp)[kWarp]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, distance);
    v.y += __shfl_xor_sync(0xffffffffu, v.y, distance);
  }
  if (team == Team::warp) return v;
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  float2 sum = make_float2(0.0f, 0.0f);
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum.x += of_warp[w].x, sum.y += of_warp[w].y;
  return sum;
}

template <class Policy, Team team, int kHeld>
__global__ void __launch_bounds__(team == Team::warp ? Policy::kSmallThreads : backward_threads(kHeld),
                                  team == Team::warp ? 4 : 1)
    gated_rms_norm_backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kRun = Policy::kRun, kRuns = kHeld / kRun;
  constexpr DType kDType = Policy::kDType;
  constexpr bool kVector = Policy::kAccess == Access::vector;
  using Run = cuda::Run<Policy::kAccess, kRun>;
  __shared__ float2 of_warp[2][kWarp];
  const int threads = team == Team::warp ? kWarp : blockDim.x, thread = threadIdx.x % threads;
  const std::int64_t unit =
      team == Team::warp ? std::int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp : blockIdx.x;
  const std::int64_t share = unit / p.rows.groups, first = unit % p.rows.groups * p.rows.group_size;
  const std::int64_t chunks = team == Team::chunked_block ? p.rows.chunks : 1;

  // From one element to the next, in bytes; a constant where it can be.
  const auto step_of = [](const View& t) -> std::int64_t { return kVector ? cuda::bytes_of(kDType) : t.column; };
  const std::int64_t weight_step = kVector ? cuda::bytes_of(p.weight.dtype) : p.weight.column;
  const auto column_of = [&](std::int64_t chunk, int v) -> std::int64_t {
    return ((chunk * kRuns + v) * threads + thread) * kRun;
  };
  const auto count_of = [&](std::int64_t column) {
    const std::int64_t left = p.rows.group_size - column;
    return left < 0 ? 0 : (left < kRun ? static_cast<int>(left) : kRun);
  };

  // What a thread has of a row, as it comes from memory.
  struct Packed {
    Run x[kRuns], z[kRuns], dy[kRuns];
    std::uint32_t exponent[kRuns];  // of x
  };
  const bool is_scaled = kDType == DType::bfloat16 && p.x_exponents;
  const auto load = [&](Packed& packed, std::int64_t row, std::int64_t chunk) {
    const auto load_of = [&](const View& t, Run(&run)[kRuns]) {
      if (!t.data) return;
      const char* const from = row_of(t, p.rows, row) + first * t.column;
      const std::int64_t step = step_of(t);
#pragma unroll
      for (int v = 0; v < kRuns; ++v)
        run[v].load(from + column_of(chunk, v) * step, kDType, step, count_of(column_of(chunk, v)));
    };
    load_of(p.x, packed.x);
    load_of(p.z, packed.z);
    load_of(p.dy, packed.dy);
    if (!is_scaled) return;
    const std::uint8_t* const exponents =
        p.x_exponents + (row * p.rows.groups * p.rows.group_size + first) / cuda::kScaledTogether;
#pragma unroll
    for (int v = 0; v < kRuns; ++v) {
      const std::int64_t column = column_of(chunk, v);
      packed.exponent[v] = count_of(column) > 0 ? exponents[column / cuda::kScaledTogether] : 0;
    }
  };
  // And as numbers: v and dn, the gate silu(z), and what dz is a multiple of.
  struct Held {
    float v[kHeld], dn[kHeld], gate[kHeld], dz[kHeld];
  };
  const auto widen = [&](const Packed& packed, std::int64_t chunk, Held& held) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      float x[kRun], dy[kRun], z[kRun], weight[kRun];
      packed.x[r].widen(is_scaled ? DType::float16 : kDType, x);
      if (is_scaled && packed.exponent[r] != 0) {
        const float scale = cuda::scale_up(static_cast<std::uint8_t>(packed.exponent[r]));
#pragma unroll
        for (int i = 0; i < kRun; ++i) x[i] *= scale;
      }
      packed.dy[r].widen(kDType, dy);
      if (p.z.data) packed.z[r].widen(kDType, z);
      if (p.weight.data) {
        Run run;
        run.load(p.weight.data + first * p.weight.column + column_of(chunk, r) * weight_step, p.weight.dtype, weight_step,
                 count_of(column_of(chunk, r)));
        run.widen(p.weight.dtype, weight);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int e = r * kRun + i;
        float gate = 1.0f, dgate = 0.0f;
        if (p.z.data) {
          const float s = cuda::fast_sigmoid(z[i]);
          gate = z[i] * s;
          dgate = s * fmaf(z[i], 1.0f - s, 1.0f);
        }
        const float dn = p.weight.data ? dy[i] * weight[i] : dy[i];
        held.gate[e] = gate;
        held.v[e] = p.rows.norm_before_gate ? x[i] : x[i] * gate;
        held.dn[e] = p.rows.norm_before_gate ? dn * gate : dn;
        held.dz[e] = p.rows.norm_before_gate ? dn * dgate : x[i] * dgate;
      }
    }
  };

  const auto store = [&](const View& t, std::int64_t row, std::int64_t column, const float (&gradient)[kRun]) {
    if (!t.data) return;
    const std::int64_t step = step_of(t);
    Run::store(row_of(t, p.rows, row) + first * t.column + column * step, kDType, step, count_of(column), gradient);
  };

  cuda::wait_for_earlier_kernels();
  cuda::let_next_kernel_in();
  if (share >= p.shares) return;  // a whole warp
  const std::int64_t rows = rows_before(p.end, p.rows.count);
  float dweight[kHeld] = {};
  Packed packed;
  load(packed, share, 0);
  int parity = 0;
  std::int64_t row = share;
#pragma unroll 1
  for (; row < rows; row += p.shares, parity ^= 1) {
    Held held;
    float2 sums = make_float2(0.0f, 0.0f);  // of v^2 and dn v
#pragma unroll 1
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (team == Team::chunked_block && (row > share || chunk > 0)) load(packed, row, chunk);
      widen(packed, chunk, held);
#pragma unroll
      for (int e = 0; e < kHeld; ++e) {
        sums.x = fmaf(held.v[e], held.v[e], sums.x);
        sums.y = fmaf(held.dn[e], held.v[e], sums.y);
      }
    }
    const Packed now = packed;
    if (team != Team::chunked_block && row + p.shares < rows) load(packed, row + p.shares, 0);
    sums = sum_over_team<team>(sums, of_warp[parity]);
    const float scale = 1.0f / sqrtf(fmaf(sums.x, p.rows.mean_scale, p.rows.eps)), mean = sums.y * scale * p.rows.mean_scale;
#pragma unroll 1
    for (std::int64_t chunk = chunks - 1; chunk >= 0; --chunk) {  // the last is still held
      Packed again = now;
      if (chunk + 1 < chunks) {
        load(again, row, chunk);
        widen(again, chunk, held);
      }
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        const std::int64_t column = column_of(chunk, r);
        float dy[kRun], dx[kRun], dz[kRun];
        again.dy[r].widen(kDType, dy);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int e = r * kRun + i;
          const float n = held.v[e] * scale, dv = scale * fmaf(-n, mean, held.dn[e]);
          dx[i] = p.rows.norm_before_gate ? dv : dv * held.gate[e];
          dz[i] = held.dz[e] * (p.rows.norm_before_gate ? n : dv);
          const float of_row = dy[i] * n * (p.rows.norm_before_gate ? held.gate[e] : 1.0f);
          if constexpr (team == Team::chunked_block) {  // too many to hold: a thread takes up what it left
            if (p.partial && i < count_of(column)) {
              float* const at = p.partial + share * p.rows.groups * p.rows.group_size + first + column + i;
              *at = row == share ? of_row : *at + of_row;
            }
          } else {
            dweight[e] += of_row;
          }
        }
        store(p.dx, row, column, dx);
        store(p.dz, row, column, dz);
      }
    }
  }

#pragma unroll 1
  for (; row < p.rows.count; row += p.shares)  // padding has no gradient
#pragma unroll 1
    for (std::int64_t column = column_of(0, 0); column < p.rows.group_size; column += threads * kRun) {
      const float zeros[kRun] = {};
      store(p.dx, row, column, zeros);
      store(p.dz, row, column, zeros);
    }

  if (!p.partial) return;
  float* const share_of_dweight = p.partial + share * p.rows.groups * p.rows.group_size + first;
  if constexpr (team == Team::chunked_block) {
    if (share >= rows)
      for (std::int64_t e = thread; e < p.rows.group_size; e += threads) share_of_dweight[e] = 0.0f;
  } else {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const std::int64_t column = column_of(0, r);
      float* const at = share_of_dweight + column;
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (i < count_of(column)) at[i] = dweight[r * kRun + i];
    }
  }
}

}  // namespace statescan::gated_rms_norm
