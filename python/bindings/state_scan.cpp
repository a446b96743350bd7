#include <statescan/state_scan.h>

#include "module.h"
#include "ndarray.h"

namespace statescan::python {

namespace {

nb::object forward(nb::handle log_decay, nb::handle update, nb::handle initial_state, nb::handle cu_seqlens, bool reverse,
                   nb::handle out, nb::handle final_state_out, nb::handle stream, bool plan_only) {
  Call call("state_scan", "update", update, stream);
  state_scan::Args args;
  args.update = call.main();
  args.log_decay = call.in("log_decay", log_decay);
  args.initial_state = call.in("initial_state", initial_state);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
  args.reverse = reverse;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.states = call.out_like("out", out, args.update, args.update.dtype);
  args.final_state = call.out("final_state_out", final_state_out, {d.num_sequences, d.nheads, d.headdim, d.dstate},
                              parameter_dtype(args.update));
  return call.run(args, d);
}

nb::object backward(nb::handle log_decay, nb::handle states, nb::handle dstates, nb::handle dfinal_state,
                    nb::handle initial_state, nb::handle cu_seqlens, bool reverse, nb::handle stream, bool plan_only,
                    std::uint32_t wanted) {
  Call call("state_scan_backward", "states", states, stream);
  call.want(wanted);
  state_scan::BackwardArgs args;
  args.states = call.main();
  args.log_decay = call.in("log_decay", log_decay);
  args.dstates = call.in("dstates", dstates);
  args.dfinal_state = call.in("dfinal_state", dfinal_state);
  args.initial_state = call.in("initial_state", initial_state);
  args.cu_seqlens = call.in("cu_seqlens", cu_seqlens);
  args.reverse = reverse;
  const auto d = validate(args);
  if (plan_only) return Call::describe(args, d);
  args.dlog_decay = call.gradient("dlog_decay", args.log_decay);
  args.dupdate = call.gradient("dupdate", args.states);
  if (call.wants_next())
    args.dinitial_state = call.out("dinitial_state", nb::none(), {d.num_sequences, d.nheads, d.headdim, d.dstate},
                                   parameter_dtype(args.states));
  return call.run(args, d);
}

}  // namespace

void bind_state_scan(nb::module_& m) {
  m.def("state_scan", &forward, nb::arg("log_decay").none(), nb::arg("update").none(),
        nb::arg("initial_state") = nb::none(), nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false,
        nb::arg("out") = nb::none(), nb::arg("final_state_out") = nb::none(), nb::arg("stream") = nb::none(),
        nb::arg("plan_only") = false);
  m.def("state_scan_backward", &backward, nb::arg("log_decay").none(), nb::arg("states").none(),
        nb::arg("dstates").none(), nb::arg("dfinal_state") = nb::none(), nb::arg("initial_state") = nb::none(),
        nb::arg("cu_seqlens") = nb::none(), nb::arg("reverse") = false, nb::arg("stream") = nb::none(),
        nb::arg("plan_only") = false, nb::arg("wanted") = ~0u);
}

}  // namespace statescan::python
