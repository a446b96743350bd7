#include <statescan/causal_conv1d.h>

#include "activation.h"
#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

nb::object forward(nb::handle x, nb::handle weight, nb::handle bias, nb::handle activation, nb::handle initial_state,
                   bool return_final_state, nb::handle cu_seqlens, bool reverse, nb::handle out,
                   nb::handle final_state_out, nb::handle stream, bool plan_only) {
  Call call("causal_conv1d", "x", x, stream);
  causal_conv1d::Args args;
  args.x = call.main();
  args.weight = call.in("weight", weight);
  args.bias = call.in("bias", bias);
  args.initial_state = call.in("initial_state", initial_state);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
  args.activation = read_activation("causal_conv1d", activation);
  args.reverse = reverse;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.y = call.out_as_laid_out("out", out, args.x);
  if (return_final_state || !final_state_out.is_none())
    args.final_state = call.out("final_state_out", final_state_out, {d.num_sequences, d.dim, d.width - 1}, args.x.dtype);
  return call.run(args, d);
}

nb::object backward(nb::handle x, nb::handle weight, nb::handle dy, nb::handle bias, nb::handle activation,
                    nb::handle initial_state, nb::handle cu_seqlens, bool reverse, nb::handle dfinal_state,
                    nb::handle stream, bool plan_only, std::uint32_t wanted) {
  Call call("causal_conv1d_backward", "x", x, stream);
  call.want(wanted);
  causal_conv1d::BackwardArgs args;
  args.x = call.main();
  args.weight = call.in("weight", weight);
  args.bias = call.in("bias", bias);
  args.initial_state = call.in("initial_state", initial_state);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
  args.activation = read_activation("causal_conv1d_backward", activation);
  args.reverse = reverse;
  args.dy = call.in("dy", dy);
  args.dfinal_state = call.in("dfinal_state", dfinal_state);
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.dx = call.gradient_as_laid_out("dx", args.x);
  args.dweight = call.gradient("dweight", args.weight);
  args.dbias = call.gradient("dbias", args.bias);
  args.dinitial_state = call.gradient("dinitial_state", args.initial_state);
  return call.run(args, d);
}

}  // namespace

void bind_causal_conv1d(nb::module_& m) {
  m.def("causal_conv1d", &forward, nb::arg("x").none(), nb::arg("weight").none(), nb::arg("bias") = nb::none(),
        nb::arg("activation") = nb::none(), nb::arg("initial_state") = nb::none(),
        nb::arg("return_final_state") = false, nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false,
        nb::arg("out") = nb::none(), nb::arg("final_state_out") = nb::none(), nb::arg("stream") = nb::none(),
        nb::arg("plan_only") = false);
  m.def("causal_conv1d_backward", &backward, nb::arg("x").none(), nb::arg("weight").none(), nb::arg("dy").none(),
        nb::arg("bias") = nb::none(), nb::arg("activation") = nb::none(), nb::arg("initial_state") = nb::none(),
        nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false, nb::arg("dfinal_state") = nb::none(),
        nb::arg("stream") = nb::none(), nb::arg("plan_only") = false, nb::arg("wanted") = ~0u);
}

}  // namespace statescan::python
