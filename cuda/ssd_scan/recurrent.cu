// ssd_scan forward, token by token: any dtype, any strides, dstate up to 256
// Math     h = exp(dt A) h + dt B x;   y = C.h + D x, then y *= silu(z)
// Shapes   x, z, y [b,l,h,p], dt [b,l,h], B, C [b,l,g,n], h [p,n] of each head
// Traffic  x, z, y and dt once; B and C once for each 32 rows of a head; states stay in registers
// Launch   a block for each 32 rows of (sequence, head): 128 threads, of which 8 share two rows and take 32 columns each
// Numerics float32; a decay near one is kept as its difference from one, since rounding it would be the same error at every
//          token of a constant dt. A row depends on nothing beside it, so its bits are the same in any batch or packing
#include "recurrent.h"

#include <statescan/math.h>

#include "../common/element.cuh"
#include "../common/launch.h"
#include "positions.cuh"

namespace statescan::ssd_scan {

namespace {

constexpr int kThreads = 128, kLanes = 8, kSlots = kThreads / kLanes, kRowsOfThread = 2, kRows = kSlots * kRowsOfThread;
constexpr int kTokens = 16;                            // in shared memory
constexpr int kQuads = kRecurrentDstate / kLanes / 4;  // of columns, kLanes quads apart: lane i has columns 4 i.. of each
constexpr int kColumnsOfQuads = 4 * kLanes;

struct Step {
  float dt, factor, of_state;  // state' = of_state state + factor state + dt x B

  __device__ Step(float dt, float A) : dt(dt) {
    const float v = dt * A;
    const bool near = fabsf(v) <= 0.125f;
    factor = near ? expm1f(v) : expf(v);
    of_state = near ? 1.0f : 0.0f;
  }
};

struct Tokens {
  alignas(16) float B[kTokens][kRecurrentDstate], C[kTokens][kRecurrentDstate];
  float x[kTokens][kRows], y[kTokens][kRows];
  float dt[kTokens], factor[kTokens], of_state[kTokens];
};

__global__ void __launch_bounds__(kThreads, 3)
    ssd_scan_recurrent_kernel(const __grid_constant__ Params p, DType dtype, std::int64_t tiles) {
  __shared__ Tokens shared;
  const std::int64_t first_row = blockIdx.x % tiles * kRows, rest = blockIdx.x / tiles;
  const std::int64_t head = rest % p.nheads, sequence = rest / p.nheads, group = head / p.tasks.heads_of_group;
  const Walk walk = walk_of(p.sequences, sequence, 0);
  const auto address = [&](const TokenView& t, std::int64_t slab, std::int64_t token, std::int64_t column) {
    return t.data + walk.batch * t.batch + (walk.origin + token * walk.sign) * t.token + slab * t.head + column * t.column;
  };
  // Calls visit(token, row of the block, row) for the thread's elements of x, z and y of `count` tokens.
  const auto for_each_element = [&](int count, auto visit) {
#pragma unroll
    for (int k = 0; k < kTokens * kRows / kThreads; ++k) {
      const int i = k * kThreads + threadIdx.x, token = i / kRows, row = i % kRows;
      if (token < count && first_row + row < p.headdim) visit(token, row, first_row + row);
    }
  };
  if (sequence == p.sequences.count) {  // past the last packed token
    for (std::int64_t start = 0; start < walk.length; start += kTokens)
      for_each_element(
          static_cast<int>(min(std::int64_t(kTokens), walk.length - start)),
          [&](int token, int, std::int64_t row) { cuda::store_element(address(p.y, head, start + token, row), dtype, 0.0f); });
    return;
  }

  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  float state[kRowsOfThread][kQuads][4] = {};
  // Calls visit(element of the state, address) for what there is of the thread's rows in a tensor.
  const auto for_each_state = [&](const StateView& t, std::int64_t offset, auto visit) {
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const std::int64_t row = first_row + slot + r * kSlots;
      if (row >= p.headdim) break;
      char* first = t.data + offset + sequence * t.sequence + head * t.head + row * t.row;
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = q * kColumnsOfQuads + 4 * lane + e;
          if (column < p.dstate) visit(state[r][q][e], first + column * t.column);
        }
    }
  };
  const auto store = [&](const StateView& t, std::int64_t offset) {
    for_each_state(t, offset, [&](float h, char* to) { cuda::store_element(to, t.dtype, h); });
  };
  const PositionsOfSequence positions(p.positions, sequence);
  const auto leave_state = [&](std::int64_t token) {
    positions.take(token, token + 1, [&](std::int64_t offset) { store(p.positions.entries, offset); });
    if (p.kept.states.data && token % kStretch == 0 && token < walk.length)
      store(p.kept.states, kept_index(p.sequences, sequence, token) * p.kept.step);
  };
  if (p.start.data)
    for_each_state(p.start, 0, [&](float& h, const char* from) { h = cuda::load_element(from, p.start.dtype); });

  const auto parameter = [&](const HeadView& t) {
    return t.data ? *reinterpret_cast<const float*>(t.data + head * t.head) : 0.0f;
  };
  const float A = parameter(p.A), dt_bias = parameter(p.dt_bias);
#pragma unroll 1
  for (std::int64_t start = 0; start < walk.length; start += kTokens) {
    const int count = static_cast<int>(min(std::int64_t(kTokens), walk.length - start));
    __syncthreads();  // the tokens before are done with
    for (int column = threadIdx.x; column < (p.dstate + kColumnsOfQuads - 1) / kColumnsOfQuads * kColumnsOfQuads;
         column += kThreads)
#pragma unroll 4
      for (int token = 0; token < kTokens; ++token) {
        const bool inside = token < count && column < p.dstate;
        shared.B[token][column] = inside ? cuda::load_element(address(p.B, group, start + token, column), dtype) : 0.0f;
        shared.C[token][column] = inside ? cuda::load_element(address(p.C, group, start + token, column), dtype) : 0.0f;
      }
    for_each_element(count, [&](int token, int row, std::int64_t channel) {
      shared.x[token][row] = cuda::load_element(address(p.x, head, start + token, channel), dtype);
    });
    if (threadIdx.x < count) {
      const char* from = p.dt.data + walk.batch * p.dt.batch + (walk.origin + (start + threadIdx.x) * walk.sign) * p.dt.token +
                         head * p.dt.head;
      const Step step(discretise(cuda::load_element(from, p.dt.dtype), dt_bias, p.dt_softplus, p.dt_min, p.dt_max), A);
      shared.dt[threadIdx.x] = step.dt, shared.factor[threadIdx.x] = step.factor, shared.of_state[threadIdx.x] = step.of_state;
    }
    __syncthreads();

#pragma unroll 1
    for (int token = 0; token < count; ++token) {
      leave_state(start + token);
      const float factor = shared.factor[token], of_state = shared.of_state[token];
      float u[kRowsOfThread], y[kRowsOfThread] = {};
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) u[r] = shared.dt[token] * shared.x[token][slot + r * kSlots];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        if (q * kColumnsOfQuads >= p.dstate) break;
        const float4 B4 = *reinterpret_cast<const float4*>(&shared.B[token][q * kColumnsOfQuads + 4 * lane]);
        const float4 C4 = *reinterpret_cast<const float4*>(&shared.C[token][q * kColumnsOfQuads + 4 * lane]);
        const float B[] = {B4.x, B4.y, B4.z, B4.w}, C[] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& h = state[r][q][e];
            h = fmaf(of_state, h, fmaf(factor, h, u[r] * B[e]));
            y[r] = fmaf(C[e], h, y[r]);
          }
      }
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
        for (int distance = 1; distance < kLanes; distance *= 2) y[r] += __shfl_xor_sync(~0u, y[r], distance);
        if (lane == 0) shared.y[token][slot + r * kSlots] = y[r];
      }
    }
    __syncthreads();
    for_each_element(count, [&](int token, int row, std::int64_t channel) {
      float y = shared.y[token][row];
      if (p.D.data)
        y = fmaf(*reinterpret_cast<const float*>(p.D.data + head * p.D.head + channel * p.D.column), shared.x[token][row], y);
      if (p.z.data) y *= cuda::fast_silu(cuda::load_element(address(p.z, head, start + token, channel), dtype));
      cuda::store_element(address(p.y, head, start + token, channel), dtype, y);
    });
  }

  leave_state(walk.length);
  if (p.final_state.data) store(p.final_state, 0);
  const Positions& t = p.positions;
  for (std::int64_t i = 0; i < t.count; ++i) {
    const std::int64_t at = index_at(t.data, t.is_int64, sequence * t.sequence + i * t.position);
    if (at < 0 || at > walk.length)
      for_each_state(t.entries, i * t.entry, [&](float, char* to) { cuda::store_element(to, t.entries.dtype, 0.0f); });
  }
}

}  // namespace

void launch_recurrent(const Args& args, const Dims& dims, Stream stream) {
  Params p = params_of(args, dims, {});
  p.y = token_view(args.y);
  p.start = state_view(args.initial_state), p.final_state = state_view(args.final_state);
  p.kept = kept_states(args.chunk_states, static_cast<bool>(args.cu_seqlens));
  p.tasks.heads_of_group = static_cast<std::uint32_t>(dims.nheads / dims.ngroups);
  if (args.state_positions && dims.npositions > 0) p.positions = positions_in(args.state_positions, args.position_states);
  const std::int64_t tiles = divide_up(dims.headdim, kRows);
  const std::int64_t blocks = (dims.num_sequences + (args.cu_seqlens ? 1 : 0)) * dims.nheads * tiles;
  if (blocks == 0) return;
  cuda::launch("ssd_scan_recurrent_kernel", ssd_scan_recurrent_kernel, {blocks, kThreads}, stream, p, args.x.dtype, tiles);
}

}  // namespace statescan::ssd_scan
