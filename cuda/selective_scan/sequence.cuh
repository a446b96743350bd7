// The tokens and the states that a block works on, and how its threads reach them.
#pragma once

#include "decay.cuh"
#include "tile.cuh"

namespace statescan::selective_scan {

// The tokens of a sequence's segment, counted in scan order from the sequence's start.
struct Span {
  std::int64_t row, first, last;  // of the sequence, in memory
  std::int64_t begin, end;        // of the segment
};

// What a block works on.
struct Task {
  std::int64_t sequence, segment, channel, group;
  std::uint32_t block;
  int channels;
};

inline __device__ Task task_of(const Params& p, std::int64_t index, std::int64_t segments) {
  Task t;
  t.block = static_cast<std::uint32_t>(index % p.blocks);
  t.group = t.block / p.blocks_of_group;
  const std::uint32_t within = t.block % p.blocks_of_group * kChannels;
  t.channels = min(static_cast<int>(p.group_channels - within), kChannels);
  t.channel = t.group * p.group_channels + within;
  t.segment = index / p.blocks % segments;
  t.sequence = index / p.blocks / segments;
  return t;
}

// cu_seqlens on a device cannot be checked without waiting for it: wrong values give wrong results, but no wild access.
inline __device__ std::int64_t boundary(const Params& p, std::int64_t i) {
  const std::int64_t at = p.cu_is_int64 ? static_cast<const std::int64_t*>(p.cu_seqlens)[i * p.cu_stride]
                                        : static_cast<const std::int32_t*>(p.cu_seqlens)[i * p.cu_stride];
  return at < 0 ? 0 : (at > p.seqlen ? p.seqlen : at);
}

inline __device__ Span span_of(const Params& p, std::int64_t sequence, std::int64_t segment) {
  Span s{sequence, 0, p.seqlen, 0, 0};
  if (p.cu_seqlens) s = {0, boundary(p, sequence), sequence == p.sequences ? p.seqlen : boundary(p, sequence + 1), 0, 0};
  const std::int64_t length = s.last > s.first ? s.last - s.first : 0;
  const std::int64_t tiles = (length + kTile - 1) / kTile, each = segment_tiles(p, tiles) * kTile,
                     first = tiles * kTile - (p.segments - 1) * each;
  s.begin = segment == 0 ? 0 : min(first + (segment - 1) * each, length);
  s.end = min(first + segment * each, length);
  return s;
}

// Some of a segment's tiles: link number `link`, counted in scan order.
inline __device__ Span link_of(const Span& s, std::uint32_t link, std::uint32_t links) {
  const std::int64_t tiles = (s.end - s.begin + kTile - 1) / kTile, each = (tiles + links - 1) / links * kTile;
  Span part = s;
  part.begin = min(s.begin + link * each, s.end);
  part.end = min(part.begin + each, s.end);
  return part;
}

// The same of lanes, whose tiles have up to 64 tokens: where there are many, the last three are 3/4, 1/2 and 1/4 as long as the
// others, so that places left empty at the end of a launch are empty for less time. H100, d5120, forward twice: b8 l2048 along
// the tokens 514 and 517 us instead of 545 and 543, along the channels 523 and 527 as before; b1 l16384 680 and 676 instead of
// 678 and 698, along the tokens 702 and 703 instead of 713 and 700.
inline __device__ Span lanes_link_of(const Span& s, std::uint32_t link, std::uint32_t links) {
  constexpr std::int64_t kStep = 64;
  const std::int64_t steps = (s.end - s.begin + kStep - 1) / kStep, alike = links > 3 ? links - 3 : links;
  const auto parts_before = [&](std::int64_t count) {
    const std::int64_t shorter = count > alike ? count - alike : 0;
    return 4 * (count - shorter) + shorter * (7 - shorter) / 2;
  };
  const auto token_at = [&](std::int64_t count) {
    return min(s.begin + steps * parts_before(count) / parts_before(links) * kStep, s.end);
  };
  Span part = s;
  part.begin = token_at(link), part.end = token_at(link + 1);
  return part;
}

// The same of the backward, from the last tokens to the first.
inline __device__ Span backward_link_of(const Params& p, const Span& s, int link) {
  const std::int64_t tiles = (s.end - s.begin + kTile - 1) / kTile;
  const auto parts = [&](int of) { return parts_after(of, p.links, p.segments > 1); };
  Span part = s;
  part.begin = s.begin + parts(link) * tiles / parts(-1) * kTile;
  part.end = min(s.begin + parts(link - 1) * tiles / parts(-1) * kTile, s.end);
  return part;
}

// Blocks begin in the order of their numbers, links of one segment far apart: one waits only for another that is done or runs.
inline __device__ void sleep_until_done(const std::uint32_t* done, std::uint32_t count) {
  std::uint32_t value;
  while (true) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(done) : "memory");
    if (value >= count) break;
    __nanosleep(100);  // the multiprocessor's other blocks need the issue slots
  }
}
// Every thread of the block calls these.
inline __device__ void wait_for_turn(const std::uint32_t* done, std::uint32_t count) {
  if (threadIdx.x == 0) sleep_until_done(done, count);
  __syncthreads();
}
// After a fence of every thread, and a barrier.
inline __device__ void begin_turn(std::uint32_t* done, std::uint32_t count) {
  if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(done), "r"(count) : "memory");
}
inline __device__ void end_turn(std::uint32_t* done, std::uint32_t count) {
  __threadfence();
  __syncthreads();
  begin_turn(done, count);
}

// A row of a tensor that changes with the token, which counts in scan order.
inline __device__ char* row_at(const Params& p, const View& t, const Span& s, std::int64_t token) {
  return t.data + s.row * t.row + (p.reverse ? s.last - 1 - token : s.first + token) * t.token;
}

// A [b,l,d] tensor at a thread's first element of the tile that starts with `token`.
inline __device__ char* place_at(const Params& p, const View& t, const Span& s, const Place& place, std::int64_t token,
                                 std::int64_t channel) {
  return row_at(p, t, s, token) + place.token * t.step + (channel + place.channel) * t.channel;
}

// A warp's part of a [d,n] tensor or of one sequence's states: two channels of each lane.
template <class Policy, class Visit>
__device__ void visit_states(const View& t, std::int64_t row, const Task& task, std::int64_t state, std::int64_t states,
                             Visit visit) {
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int k = 0; k < Policy::kStates; ++k) {
      const int lane_channel = threadIdx.x % kWarp * 2 + c;
      if (lane_channel >= task.channels || k >= states) continue;
      char* const at = t.data + row * t.row + (task.channel + lane_channel) * t.channel + (state + k) * t.state;
#pragma unroll
      for (int part = 0; part < Policy::kParts; ++part) visit(c, k * Policy::kParts + part, at + 4 * part);
    }
}

template <class Policy>
__device__ void load_states(const View& t, std::int64_t row, const Task& task, std::int64_t state, std::int64_t states,
                            float (&values)[2][Policy::kValues]) {
  const DType dtype = Policy::kParts == 2 ? DType::float32 : t.dtype;
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int v = 0; v < Policy::kValues; ++v) values[c][v] = 0.0f;
  if (!t.data) return;
  visit_states<Policy>(t, row, task, state, states,
                       [&](int c, int v, const char* at) { values[c][v] = cuda::load_element(at, dtype); });
}

// A's rates, the real ones scaled by kRateScale.
template <class Policy>
__device__ void load_rates(const Params& p, const Task& task, std::int64_t state, std::int64_t states,
                           float (&rate)[2][Policy::kValues]) {
  load_states<Policy>(p.A, 0, task, state, states, rate);
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int v = 0; v < Policy::kValues; v += Policy::kParts) rate[c][v] *= kRateScale;
}

// Ends of segments, [sequence, segment, d, n]: what a segment that starts from zero leaves, and the sum of its dt.
template <class Policy>
inline __device__ View view_of(const Params& p, float* states) {
  constexpr std::int64_t kEach = 4 * Policy::kParts;
  return {reinterpret_cast<char*>(states), DType::float32, p.dim * p.dstate * kEach, 0, p.dstate * kEach, kEach};
}

inline __device__ void load_steps(const Params& p, const Ends& ends, std::int64_t index, const Task& task, float (&steps)[2]) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int lane_channel = threadIdx.x % kWarp * 2 + c;
    steps[c] = lane_channel < task.channels ? ends.steps[index * p.dim + task.channel + lane_channel] : 0.0f;
  }
}

// state = what it becomes over a segment, whose end from zero is number `index` of `ends`.
template <class Policy>
__device__ void cross_segment(const Params& p, const Ends& ends, std::int64_t index, const Task& task, std::int64_t first,
                              std::int64_t states, const float (&rate)[2][Policy::kValues],
                              float (&state)[2][Policy::kValues]) {
  float end[2][Policy::kValues];
  load_states<Policy>(view_of<Policy>(p, ends.states), index, task, first, states, end);
  float dt[2];
  load_steps(p, ends, index, task, dt);
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int v = 0; v < Policy::kValues; v += Policy::kParts)
      advance<Policy::kArithmetic>(&state[c][v], step_of<Policy::kArithmetic>(dt[c], &rate[c][v]), 1.0f, &end[c][v]);
}

template <class Policy>
__device__ void store_states(const View& t, std::int64_t row, const Task& task, std::int64_t state, std::int64_t states,
                             const float (&values)[2][Policy::kValues]) {
  const DType dtype = Policy::kParts == 2 ? DType::float32 : t.dtype;
  visit_states<Policy>(t, row, task, state, states,
                       [&](int c, int v, char* at) { cuda::store_element(at, dtype, values[c][v]); });
}

template <class Policy>
__device__ void store_end(const Params& p, const Ends& ends, std::int64_t index, const Task& task, std::int64_t first,
                          std::int64_t states, const float (&state)[2][Policy::kValues], const float (&total)[2]) {
  store_states<Policy>(view_of<Policy>(p, ends.states), index, task, first, states, state);
  if (first > 0) return;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int lane_channel = threadIdx.x % kWarp * 2 + c;
    if (lane_channel < task.channels) ends.steps[index * p.dim + task.channel + lane_channel] = total[c];
  }
}

// What a lane has of the states, in words of 16 bytes that lie a warp apart.
template <class Policy>
struct LaneStates {
  static constexpr int kWords = 2 * Policy::kValues / 4;

  static __device__ void store(float4* to, const float (&h)[2][Policy::kValues]) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int v = 0; v < Policy::kValues; v += 4)
        to[(c * Policy::kValues + v) / 4 * kWarp] = make_float4(h[c][v], h[c][v + 1], h[c][v + 2], h[c][v + 3]);
  }
  static __device__ void load(const float4* from, float (&h)[2][Policy::kValues]) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int v = 0; v < Policy::kValues; v += 4) {
        const float4 four = from[(c * Policy::kValues + v) / 4 * kWarp];
        h[c][v] = four.x, h[c][v + 1] = four.y, h[c][v + 2] = four.z, h[c][v + 3] = four.w;
      }
  }
  static __device__ void fetch(float4* to, const float4* from) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) copy_async<16>(to + w * kWarp, reinterpret_cast<const char*>(from + w * kWarp), true);
  }
};

// The checkpoints up to the one before a token.
inline __device__ std::int64_t checkpoint_number(const Params& p, const Span& s, const Task& task, std::int64_t token) {
  const std::int64_t first = p.cu_seqlens ? s.first / kTile + task.sequence : task.sequence * ((p.seqlen + kTile - 1) / kTile);
  return first * (kTile / kCheckpoint) + token / kCheckpoint;
}
// Where one lies, in an order of their own: [checkpoint, block, four states, word, lane].
template <class Policy>
inline __device__ float4* checkpoint_at(const Params& p, const Span& s, const Task& task, std::int64_t token,
                                        std::int64_t state) {
  const std::int64_t warps = (p.dstate + Policy::kStates - 1) / Policy::kStates;
  const std::int64_t index = (checkpoint_number(p, s, task, token) * p.blocks + task.block) * warps + state / Policy::kStates;
  return reinterpret_cast<float4*>(p.checkpoints) + index * (LaneStates<Policy>::kWords * kWarp) + threadIdx.x % kWarp;
}

// A value of each channel of the block, zero where the tensor is absent.
inline __device__ void load_channels(const View& t, const Task& task, float* values) {
  for (int c = threadIdx.x; c < kChannels; c += blockDim.x)
    values[c] = t.data && c < task.channels ? *reinterpret_cast<const float*>(t.data + (task.channel + c) * t.channel) : 0.0f;
}

// Sums [b,l,d] of the thread's elements that go on from one piece of the states to the next.
inline __device__ void pass_on(float* partial, const Params& p, const Span& s, std::int64_t token, const Place& place,
                               int tokens, const Task& task, bool is_first, bool is_last, float (&values)[kRun]) {
  float* const at = partial + ((s.row * p.seqlen + s.first + token) * p.dim + task.channel);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (!place.holds(i, tokens, task.channels)) continue;
    float* const sum = at + place.token_of(i) * p.dim + place.channel_of(i);
    if (!is_first) values[i] += *sum;
    if (!is_last) *sum = values[i];
  }
}

// The positions of a sequence at which states are wanted, in order.
class Positions {
 public:
  __device__ Positions(const Params& p, const Task& task, const Span& s)
      : p_(p), row_(task.sequence * p.positions_row), length_(s.last - s.first), after_(s.begin) {
    find();
  }
  // The next one past the segment's start, or one that no sequence reaches.
  __device__ std::int64_t next() const { return next_; }
  __device__ void step() {
    ++index_;
    after_ = next_ - 1;  // they ascend; those that do not are passed over
    find();
  }
  __device__ View view() const { return view_of(index_); }
  // The state before the first token at the positions that ask for it, zeros at those outside of the sequence.
  template <class Policy>
  __device__ void store_first(const Task& task, std::int64_t state, std::int64_t states,
                              const float (&h)[2][Policy::kValues]) const {
    const float zeros[2][Policy::kValues] = {};
    for (std::int64_t k = 0; k < p_.npositions; ++k) {
      const std::int64_t at = position(k);
      if (at < 0 || at > length_) store_states<Policy>(view_of(k), task.sequence, task, state, states, zeros);
      else if (at == 0) store_states<Policy>(view_of(k), task.sequence, task, state, states, h);
    }
  }

 private:
  const Params& p_;
  static constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
  std::int64_t row_, length_, after_, index_ = 0, next_ = 0;

  __device__ std::int64_t position(std::int64_t k) const {
    const std::int64_t at = row_ + k * p_.positions_step;
    return p_.positions_are_int64 ? static_cast<const std::int64_t*>(p_.positions)[at]
                                  : static_cast<const std::int32_t*>(p_.positions)[at];
  }
  __device__ View view_of(std::int64_t k) const {
    View view = p_.position_states;
    view.data += k * view.token;
    return view;
  }
  __device__ void find() {
    for (; index_ < p_.npositions; ++index_) {
      next_ = position(index_);
      if (next_ > after_ && next_ <= length_) return;
    }
    next_ = kNever;
  }
};

// Zeros in the rows past the last packed token.
inline __device__ void clear_rows(const View& t, const Span& span, const Task& task) {
  if (!t.data) return;
  const int lane_channel = threadIdx.x % kChannels;
  for (std::int64_t token = span.first + threadIdx.x / kChannels; token < span.last; token += blockDim.x / kChannels)
    if (lane_channel < task.channels)
      cuda::store_element(t.data + token * t.token + (task.channel + lane_channel) * t.channel, t.dtype, 0.0f);
}

}  // namespace statescan::selective_scan
