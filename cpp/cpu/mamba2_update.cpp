// mamba2_update on the CPU
// Math     [z | xBC | dt] = zxbcdt; xBC = silu(conv(xBC)); one step of the SSM; y = norm of (y, z); both states move on
// Shapes   zxbcdt [b,t,m]; conv_state [slots,conv_dim,w-1]; state [slots,h,p,n]; y [b,t,d_inner]
// Traffic  read and write both states: 2 b (h p n + conv_dim (w-1)) elements; between the steps b t (conv_dim + d_inner)
//          floats of scratch, which stay in a near cache
// Tasks    those of causal_conv1d_update and selective_state_update, whose kernels run on views of zxbcdt and of the
//          scratch; then runs of rows for the norm
// Numerics float32 between the steps, whatever the dtype of zxbcdt
#include "isa.h"
#include "norm_row.h"
#include "parallel.h"
#include "scratch.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {
namespace {

using mamba2_update::Args;
using mamba2_update::Dims;

constexpr std::int64_t kTaskOutputs = 32768;  // of the norm, as in gated_rms_norm

// Views are filled in by hand: Tensor's own makers are shared with the rest of the program, which isa.h forbids here.

// Columns first..first+count-1 of zxbcdt, [b,t,count].
Tensor columns(const Args& args, const Dims& d, std::int64_t first, std::int64_t count) {
  Tensor t = args.zxbcdt;
  const std::int64_t step = t.stride[t.ndim - 1];
  t.data = static_cast<char*>(t.data) + first * step * size_of(t.dtype);
  t.ndim = 3;
  t.shape[0] = d.batch, t.shape[1] = d.ntokens, t.shape[2] = count;
  t.stride[1] = d.has_token_axis ? t.stride[1] : 0, t.stride[2] = step;
  return t;
}

// A piece of scratch whose tokens are `pitch` apart, [b,t,outer,inner].
template <class T>
Tensor scratch_view(T* data, const Dims& d, std::int64_t pitch, std::int64_t outer, std::int64_t inner) {
  Tensor t;
  t.data = data, t.dtype = kDTypeOf<T>, t.ndim = 4;
  t.shape[0] = d.batch, t.shape[1] = d.ntokens, t.shape[2] = outer, t.shape[3] = inner;
  t.stride[0] = d.ntokens * pitch, t.stride[1] = pitch, t.stride[2] = inner, t.stride[3] = 1;
  return t;
}

causal_conv1d_update::Dims conv_dims(const Dims& d) { return {d.batch, d.ntokens, d.conv_dim, d.width, d.slots}; }

selective_state_update::Dims state_dims(const Dims& d) {
  selective_state_update::Dims s{};
  s.batch = d.batch, s.ntokens = d.ntokens, s.nheads = d.nheads, s.headdim = d.headdim, s.ngroups = d.ngroups;
  s.dstate = d.dstate, s.slots = d.slots, s.has_token_axis = true, s.varying_B = s.varying_C = true;
  s.D_per_channel = d.D_per_channel;
  return s;
}

// What the steps hand to one another.
template <class T>
struct Between {
  T *xBC, *y;  // [b*t][conv_dim], [b*t][d_inner]
  T* weight;   // [d_inner]
};

template <class T>
Between<T> lay_out(Arena& arena, const Dims& d) {
  Between<T> between;
  between.xBC = arena.take<T>(d.batch * d.ntokens * d.conv_dim);
  between.y = arena.take<T>(d.batch * d.ntokens * d.d_inner);
  between.weight = arena.take<T>(d.d_inner);
  return between;
}

template <class T>
void convolve(const Args& args, const Dims& d, const Between<T>& between) {
  causal_conv1d_update::Args conv;
  conv.x = columns(args, d, d.d_inner, d.conv_dim);
  conv.state = args.conv_state, conv.weight = args.conv_weight, conv.bias = args.conv_bias;
  conv.state_indices = args.state_indices;
  conv.activation = causal_conv1d::Activation::silu;
  conv.y = scratch_view(between.xBC, d, d.conv_dim, d.conv_dim, 1);
  conv.y.ndim = 3;
  run(conv, conv_dims(d));
}

template <class T>
selective_state_update::Args state_args(const Args& args, const Dims& d, const Between<T>& between) {
  selective_state_update::Args update;
  T* const B = between.xBC + d.d_inner;
  update.state = args.state;
  update.x = scratch_view(between.xBC, d, d.conv_dim, d.nheads, d.headdim);
  update.B = scratch_view(B, d, d.conv_dim, d.ngroups, d.dstate);
  update.C = scratch_view(B + d.ngroups * d.dstate, d, d.conv_dim, d.ngroups, d.dstate);
  update.dt = columns(args, d, d.d_inner + d.conv_dim, d.nheads);
  update.A = args.A, update.D = args.D, update.dt_bias = args.dt_bias;
  update.state_indices = args.state_indices;
  update.dt_softplus = args.dt_softplus, update.dt_min = args.dt_min, update.dt_max = args.dt_max;
  update.y = scratch_view(between.y, d, d.d_inner, d.nheads, d.headdim);
  return update;
}

// Gate and norm of row r of b*t, in place in scratch, then out. Padding rows are zero already, and stay so whatever z holds.
template <class T>
void finish_row(const Args& args, const Dims& d, const Between<T>& between, const Tensor& z, T* z_row, std::int64_t r) {
  const std::int64_t row = r / d.ntokens, token = r % d.ntokens;
  T* y = between.y + r * d.d_inner;
  if (!args.state_indices || index_at(args.state_indices, row) >= 0) {
    load_row<T>(z_row, z.data, z.dtype, offset_of(z, row, token), z.stride[2], d.d_inner);
    if (args.norm_weight)
      gated_norm_row<T>(y, y, z_row, between.weight, d.d_inner, d.norm_group_size, args.eps, args.norm_before_gate);
    else
      gate_row<T>(y, y, z_row, d.d_inner);
  }
  const std::int64_t first = row * args.y.stride[0] + (d.has_token_axis ? token * args.y.stride[1] : 0);
  store_row<T>(args.y.data, args.y.dtype, first, args.y.stride[args.y.ndim - 1], d.d_inner, y);
}

template <class T>
void finish(const Args& args, const Dims& d, const Between<T>& between) {
  const Tensor z = columns(args, d, 0, d.d_inner), &weight = args.norm_weight;
  if (weight) load_row<T>(between.weight, weight.data, weight.dtype, 0, weight.stride[0], d.d_inner);
  // By now x of a row has been read: its place takes z.
  parallel_for_groups(d.batch * d.ntokens, kTaskOutputs / d.d_inner, [&](std::int64_t r, int) {
    finish_row<T>(args, d, between, z, between.xBC + r * d.conv_dim, r);
  });
}

template <class T>
std::size_t bytes_between(const Dims& d) {
  Arena count(nullptr);
  lay_out<T>(count, d);
  return count.used();
}

// What selective_state_update wants for itself; 0 unless states are very long. Sizes and the dtype of x decide: the rest of its
// arguments would cost a decode step 0.1 us.
template <class T>
std::size_t bytes_of_update(const Dims& d) {
  selective_state_update::Args update;
  update.x.dtype = kDTypeOf<T>;
  return workspace_bytes(update, state_dims(d));
}

template <class T>
std::size_t bytes_as(const Dims& d) {
  const std::size_t between = bytes_between<T>(d);
  return (between <= kStackBytes ? 0 : between) + bytes_of_update<T>(d);
}

template <class T>
void run_as(const Args& args, const Dims& d) {
  const std::size_t bytes = bytes_between<T>(d);
  with_scratch(args.workspace, bytes, 0, [&](Arena arena) {
    const Between<T> between = lay_out<T>(arena, d);
    convolve<T>(args, d, between);
    selective_state_update::Args update = state_args<T>(args, d, between);
    update.workspace.data = static_cast<char*>(args.workspace.data) + (bytes <= kStackBytes ? 0 : bytes);
    run(update, state_dims(d));
    finish<T>(args, d, between);
  });
}

}  // namespace

std::size_t workspace_bytes(const Args& args, const Dims& d) {
  return args.zxbcdt.dtype == DType::float64 ? bytes_as<double>(d) : bytes_as<float>(d);
}

void run(const Args& args, const Dims& d) {
  args.zxbcdt.dtype == DType::float64 ? run_as<double>(args, d) : run_as<float>(args, d);
}

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
