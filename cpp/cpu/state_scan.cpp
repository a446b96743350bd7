// state_scan on the CPU
// Math     S[c] = exp(log_decay[c]) S[c-1] + update[c], and its adjoint
// Shapes   update, states [b,c,h,p,n]
// Traffic  forward reads update, writes states; backward reads states and dstates, writes dupdate
// Tasks    a (sequence, head), several when they are small: the state of a head stays in the nearest cache
// Numerics a head's sums run in a fixed order on one thread
#include "isa.h"
#include "parallel.h"
#include "simd.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

// Where sequence s lies: its batch row and chunks [first, last).
struct Span {
  std::int64_t batch, first, last;
};

Span span_of(const Tensor& cu_seqlens, std::int64_t s, std::int64_t nchunks) {
  if (!cu_seqlens) return {s, 0, nchunks};
  return {0, index_at(cu_seqlens, s), index_at(cu_seqlens, s + 1)};
}

// A [p,n] slice of a tensor whose last two axes are headdim and dstate, as one row per p.
template <class T>
void load_slice(T* to, const Tensor& t, std::int64_t offset, std::int64_t headdim, std::int64_t dstate) {
  for (std::int64_t p = 0; p < headdim; ++p)
    load_row<T>(to + p * dstate, t.data, t.dtype, offset + p * t.stride[t.ndim - 2], t.stride[t.ndim - 1], dstate);
}

template <class T>
void store_slice(const Tensor& t, std::int64_t offset, std::int64_t headdim, std::int64_t dstate, const T* from) {
  for (std::int64_t p = 0; p < headdim; ++p)
    store_row<T>(t.data, t.dtype, offset + p * t.stride[t.ndim - 2], t.stride[t.ndim - 1], dstate, from + p * dstate);
}

// to = scale * to + add.
template <class T>
void scale_add(T* to, T scale, const T* add, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, load<T>(to + i) * scale + load<T>(add + i));
  for (; i < count; ++i) to[i] = to[i] * scale + add[i];
}

template <class T>
T dot(const T* a, const T* b, std::int64_t count) {
  Vec<T> sum{};
  std::int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) sum = sum + load<T>(a + i) * load<T>(b + i);
  T total = sum_lanes<T>(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

template <class T>
T exp_scalar(T v) {
  alignas(kVectorBytes) T lanes[kLanes<T>] = {v};
  store<T>(lanes, exp(load<T>(lanes)));
  return lanes[0];
}

// Tokens past the last packed sequence: zero.
void clear_tail(const Tensor& t, const Tensor& cu_seqlens, const state_scan::Dims& d) {
  if (!cu_seqlens || !t) return;
  for (std::int64_t c = index_at(cu_seqlens, d.num_sequences); c < d.nchunks; ++c)
    for (std::int64_t h = 0; h < d.nheads; ++h)
      for (std::int64_t p = 0; p < d.headdim; ++p)
        for (std::int64_t n = 0; n < d.dstate; ++n) store_element<double>(t.data, t.dtype, offset_of(t, 0, c, h, p, n), 0.0);
}

// Heads that make a task: at least about 10 us of work.
std::int64_t heads_per_task(const state_scan::Dims& d) {
  constexpr std::int64_t kTaskElements = 1 << 15;
  return kTaskElements / (d.nchunks * d.headdim * d.dstate + 1);
}

// Two [p,n] slices a thread.
std::size_t slices_per_thread(const state_scan::Dims& d, DType dtype) {
  Arena count(nullptr);
  for (int i = 0; i < 2; ++i)
    dtype == DType::float64 ? (void)count.take<double>(d.headdim * d.dstate) : (void)count.take<float>(d.headdim * d.dstate);
  return count.used();
}

template <class T>
void forward(const state_scan::Args& args, const state_scan::Dims& d) {
  const std::int64_t size = d.headdim * d.dstate;
  parallel_for_groups(d.num_sequences * d.nheads, heads_per_task(d), [&](std::int64_t unit, int thread) {
    const std::int64_t s = unit / d.nheads, h = unit % d.nheads;
    Arena arena(static_cast<char*>(args.workspace.data) + thread * slices_per_thread(d, args.update.dtype));
    T* state = arena.take<T>(size);
    T* update = arena.take<T>(size);
    const Span span = span_of(args.cu_seqlens, s, d.nchunks);
    if (args.initial_state) load_slice<T>(state, args.initial_state, offset_of(args.initial_state, s, h), d.headdim, d.dstate);
    else for (std::int64_t i = 0; i < size; ++i) state[i] = T(0);
    for (std::int64_t k = span.first; k < span.last; ++k) {
      const std::int64_t c = args.reverse ? span.first + span.last - 1 - k : k;
      store_slice<T>(args.states, offset_of(args.states, span.batch, c, h), d.headdim, d.dstate, state);
      load_slice<T>(update, args.update, offset_of(args.update, span.batch, c, h), d.headdim, d.dstate);
      const T log_decay =
          load_element<T>(args.log_decay.data, args.log_decay.dtype, offset_of(args.log_decay, span.batch, c, h));
      scale_add<T>(state, exp_scalar<T>(log_decay), update, size);
    }
    if (args.final_state) store_slice<T>(args.final_state, offset_of(args.final_state, s, h), d.headdim, d.dstate, state);
  });
  clear_tail(args.states, args.cu_seqlens, d);
}

template <class T>
void backward(const state_scan::BackwardArgs& args, const state_scan::Dims& d) {
  const std::int64_t size = d.headdim * d.dstate;
  parallel_for_groups(d.num_sequences * d.nheads, heads_per_task(d), [&](std::int64_t unit, int thread) {
    const std::int64_t s = unit / d.nheads, h = unit % d.nheads;
    Arena arena(static_cast<char*>(args.workspace.data) + thread * slices_per_thread(d, args.states.dtype));
    T* adjoint = arena.take<T>(size);
    T* chunk = arena.take<T>(size);
    const Span span = span_of(args.cu_seqlens, s, d.nchunks);
    if (args.dfinal_state) load_slice<T>(adjoint, args.dfinal_state, offset_of(args.dfinal_state, s, h), d.headdim, d.dstate);
    else for (std::int64_t i = 0; i < size; ++i) adjoint[i] = T(0);
    for (std::int64_t k = span.last; k-- > span.first;) {
      const std::int64_t c = args.reverse ? span.first + span.last - 1 - k : k;
      const T decay = exp_scalar<T>(
          load_element<T>(args.log_decay.data, args.log_decay.dtype, offset_of(args.log_decay, span.batch, c, h)));
      if (args.dupdate) store_slice<T>(args.dupdate, offset_of(args.dupdate, span.batch, c, h), d.headdim, d.dstate, adjoint);
      if (args.dlog_decay) {
        load_slice<T>(chunk, args.states, offset_of(args.states, span.batch, c, h), d.headdim, d.dstate);
        store_element<T>(args.dlog_decay.data, args.dlog_decay.dtype, offset_of(args.dlog_decay, span.batch, c, h),
                         decay * dot<T>(adjoint, chunk, size));
      }
      load_slice<T>(chunk, args.dstates, offset_of(args.dstates, span.batch, c, h), d.headdim, d.dstate);
      scale_add<T>(adjoint, decay, chunk, size);
    }
    if (args.dinitial_state)
      store_slice<T>(args.dinitial_state, offset_of(args.dinitial_state, s, h), d.headdim, d.dstate, adjoint);
  });
  clear_tail(args.dupdate, args.cu_seqlens, d);
  if (args.cu_seqlens && args.dlog_decay)
    for (std::int64_t c = index_at(args.cu_seqlens, d.num_sequences); c < d.nchunks; ++c)
      for (std::int64_t h = 0; h < d.nheads; ++h)
        store_element<double>(args.dlog_decay.data, args.dlog_decay.dtype, offset_of(args.dlog_decay, 0, c, h), 0.0);
}

}  // namespace

std::size_t workspace_bytes(const state_scan::Args& args, const state_scan::Dims& d) {
  return slices_per_thread(d, args.update.dtype) * max_threads();
}

std::size_t workspace_bytes(const state_scan::BackwardArgs& args, const state_scan::Dims& d) {
  return slices_per_thread(d, args.states.dtype) * max_threads();
}

void run(const state_scan::Args& args, const state_scan::Dims& d) {
  args.update.dtype == DType::float64 ? forward<double>(args, d) : forward<float>(args, d);
}

void run(const state_scan::BackwardArgs& args, const state_scan::Dims& d) {
  args.states.dtype == DType::float64 ? backward<double>(args, d) : backward<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
