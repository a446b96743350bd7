// ssd_scan, states at chosen tokens: from the state that enters a token's chunk
// Math     h = exp(s[m-1]) entry + sum_{j<m} B[j] exp(s[m-1] - s[j]) dt[j] x[j], m tokens of the chunk, s its sums of dt A
// Shapes   entry, h [num_sequences, npositions, h, p, n]; x [b,l,h,p], B [b,l,g,n]
// Traffic  read the entries, write h, and at most 64 tokens of x and B for each
// Launch   a block for each 64 rows and 64 columns of (sequence, position, head): 256 threads of 4 x 4 elements
// Numerics float32 sums in the order of the scan: a state does not depend on which others are asked for
#include "position_states.h"

#include "../common/launch.h"
#include "discretise.cuh"
#include "state_access.cuh"

namespace statescan::ssd_scan {

namespace {

constexpr int kTile = 64, kThreads = 256, kOfThread = 4;
constexpr int kMostTokens = 64;  // of a chunk

struct PositionParams {
  Params scan;
  StateView states;    // the caller's
  std::int64_t state;  // bytes from one position to the next
  bool in_place;       // the entries lie there
  std::int64_t chunk;
  std::int64_t row_tiles, column_tiles;
};

// Columns of some tokens, zeros past `columns`; each token times its weight.
__device__ void load_tile(float (&tile)[kMostTokens][kTile], const char* from, DType dtype, std::int64_t token_step, int tokens,
                          std::int64_t column_step, std::int64_t columns, const float* weights) {
  for (int i = threadIdx.x; i < tokens * kTile; i += kThreads) {
    const int token = i / kTile, column = i % kTile;
    const float v = column < columns ? cuda::load_element(from + token * token_step + column * column_step, dtype) : 0.0f;
    tile[token][column] = weights ? v * weights[token] : v;
  }
}

__global__ void __launch_bounds__(kThreads)
    ssd_scan_position_states_kernel(const __grid_constant__ PositionParams p, DType dtype) {
  const Params& scan = p.scan;
  const Positions& positions = scan.positions;
  std::int64_t rest = blockIdx.x;
  const auto part = [&](std::int64_t count) {
    const std::int64_t index = rest % count;
    rest /= count;
    return index;
  };
  const std::int64_t first_column = part(p.column_tiles) * kTile, first_row = part(p.row_tiles) * kTile;
  const std::int64_t head = part(scan.nheads), position = part(positions.count), sequence = rest;
  const std::int64_t at =
      index_at(positions.data, positions.is_int64, sequence * positions.sequence + position * positions.position);
  const Walk walk = walk_of(scan.sequences, sequence, 0);
  const bool inside = at >= 0 && at <= walk.length;
  const std::int64_t begin = inside && at < walk.length ? at / p.chunk * p.chunk : at;  // at the end it is left itself
  const int tokens = static_cast<int>(at - begin);
  if (inside && tokens == 0 && p.in_place) return;

  __shared__ Steps<kMostTokens> steps;
  __shared__ alignas(16) float sX[kMostTokens][kTile], sB[kMostTokens][kTile];
  if (tokens > 0) {
    if (threadIdx.x < 32) {
      StepLoader<kMostTokens> loader(scan, walk, head);
      loader.load(begin, tokens);
      loader.finish(steps);
    }
    __syncthreads();
    const auto load = [&](float (&tile)[kMostTokens][kTile], const TokenView& t, std::int64_t slab, std::int64_t first,
                          std::int64_t columns, const float* weights) {
      const char* from =
          t.data + walk.batch * t.batch + (walk.origin + begin * walk.sign) * t.token + slab * t.head + first * t.column;
      load_tile(tile, from, dtype, walk.sign * t.token, tokens, t.column, columns - first, weights);
    };
    load(sX, scan.x, head, first_row, scan.headdim, steps.to_end);
    load(sB, scan.B, head / scan.tasks.heads_of_group, first_column, scan.dstate, nullptr);
    __syncthreads();
  }

  const int row = threadIdx.x / (kTile / kOfThread) * kOfThread, column = threadIdx.x % (kTile / kOfThread) * kOfThread;
  float sum[kOfThread][kOfThread] = {};
  for (int j = 0; j < tokens; ++j) {
    const float4 x = *reinterpret_cast<const float4*>(&sX[j][row]), B = *reinterpret_cast<const float4*>(&sB[j][column]);
    const float of_x[] = {x.x, x.y, x.z, x.w}, of_B[] = {B.x, B.y, B.z, B.w};
#pragma unroll
    for (int r = 0; r < kOfThread; ++r)
#pragma unroll
      for (int c = 0; c < kOfThread; ++c) sum[r][c] = fmaf(of_x[r], of_B[c], sum[r][c]);
  }
  const float decay = tokens > 0 ? steps.from_start[kMostTokens - 1] : 1.0f;
  const auto place = [&](const StateView& t, std::int64_t step, int r, int c) {
    return t.data + sequence * t.sequence + position * step + head * t.head + (first_row + row + r) * t.row +
           (first_column + column + c) * t.column;
  };
#pragma unroll
  for (int r = 0; r < kOfThread; ++r)
#pragma unroll
    for (int c = 0; c < kOfThread; c += 2) {
      const std::int64_t left = first_row + row + r < scan.headdim ? scan.dstate - (first_column + column + c) : 0;
      float2 h = {0.0f, 0.0f};
      if (inside) {
        const float2 entry = load_pair<false>(place(positions.entries, positions.entry, r, c), positions.entries, left);
        h = make_float2(fmaf(decay, entry.x, sum[r][c]), fmaf(decay, entry.y, sum[r][c + 1]));
      }
      store_pair<false>(place(p.states, p.state, r, c), p.states, left, h);
    }
}

}  // namespace

void launch_position_states(const Args& args, const Dims& dims, void* entries, std::int64_t chunk, Stream stream) {
  PositionParams p{};
  p.scan = params_of(args, dims, {.count = 1, .chunks_per_segment = 0, .chunk = chunk});
  p.scan.positions = positions_of(args, dims, entries);
  p.scan.tasks.heads_of_group = static_cast<std::uint32_t>(dims.nheads / dims.ngroups);
  p.states = first_of_each(args.position_states);
  p.state = args.position_states.stride[1] * size_of(args.position_states.dtype);
  p.chunk = chunk;
  p.in_place = entries_in_place(args, false);
  p.row_tiles = divide_up(dims.headdim, kTile), p.column_tiles = divide_up(dims.dstate, kTile);
  const std::int64_t blocks = dims.num_sequences * dims.npositions * dims.nheads * p.row_tiles * p.column_tiles;
  if (blocks == 0) return;
  cuda::launch("ssd_scan_position_states_kernel", ssd_scan_position_states_kernel, {blocks, kThreads}, stream, p, args.x.dtype);
}

}  // namespace statescan::ssd_scan
