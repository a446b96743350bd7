// JAX: ops as XLA FFI handlers, called by XLA's runtime without Python. A handler turns buffers into Tensors, XLA's errors and
// streams into ours, and runs the op. Leading axes that vmap put before the first one are part of it.
#include <array>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <statescan/dispatch.h>
#include <statescan/error.h>
#include <statescan/state_scan.h>

#include "module.h"
#include "workspace.h"
#include "xla_ffi_abi.h"

namespace statescan::python {

namespace {

namespace xla = xla_ffi_abi;

// ---- ops, as a list of operands ------------------------------------------------------------------------------------------
// Each op has: the rank of every argument and result, and its Args made of them. Absent tensors are optional arguments that
// were not given, or results that a check does not have.
template <std::size_t kCount>
using Tensors = std::array<Tensor, kCount>;

struct StateScan {
  static constexpr const char* kName = "state_scan";
  using Args = state_scan::Args;
  static constexpr std::array kArgumentRanks = {3, 5, 4};  // log_decay, update, initial_state (optional)
  static constexpr std::array kResultRanks = {5, 4};       // states, final_state

  static Args make(const Tensors<3>& arguments, const Tensors<2>& results, bool reverse) {
    Args args;
    args.log_decay = arguments[0];
    args.update = arguments[1];
    args.initial_state = arguments[2];
    args.reverse = reverse;
    args.states = results[0];
    args.final_state = results[1];
    return args;
  }
};

struct StateScanBackward {
  static constexpr const char* kName = "state_scan_backward";
  using Args = state_scan::BackwardArgs;
  static constexpr std::array kArgumentRanks = {3, 5, 5, 4};  // log_decay, states, dstates, dfinal_state
  static constexpr std::array kResultRanks = {3, 5, 4};       // dlog_decay, dupdate, dinitial_state

  static Args make(const Tensors<4>& arguments, const Tensors<3>& results, bool reverse) {
    Args args;
    args.log_decay = arguments[0];
    args.states = arguments[1];
    args.dstates = arguments[2];
    args.dfinal_state = arguments[3];
    args.reverse = reverse;
    args.dlog_decay = results[0];
    args.dupdate = results[1];
    args.dinitial_state = results[2];
    return args;
  }
};

// ---- XLA's side ------------------------------------------------------------------------------------------------------------
DType dtype_of(xla::ElementType type) {
  switch (type) {
    case xla::ElementType::f32: return DType::float32;
    case xla::ElementType::f64: return DType::float64;
    case xla::ElementType::f16: return DType::float16;
    case xla::ElementType::bf16: return DType::bfloat16;
    case xla::ElementType::c64: return DType::complex64;
    case xla::ElementType::c128: return DType::complex128;
    case xla::ElementType::s32: return DType::int32;
    case xla::ElementType::s64: return DType::int64;
    default: fail<TypeError>("XLA element type ", static_cast<int>(type), " is not supported");
  }
}

// A dense buffer as a tensor of `rank` axes; what is more at the front becomes one axis with the first.
Tensor dense(void* data, DType dtype, std::span<const std::int64_t> dims, int rank, Device device) {
  const int extra = static_cast<int>(dims.size()) - rank;
  if (static_cast<int>(dims.size()) > kMaxDims && extra <= 0) fail<ValueError>("at most ", kMaxDims, " axes are supported");
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.device = device;
  t.ndim = extra > 0 ? rank : static_cast<int>(dims.size());
  std::int64_t step = 1;
  for (int i = t.ndim; i-- > 0;) {
    t.shape[i] = dims[i + (extra > 0 ? extra : 0)];
    if (i == 0)
      for (int k = 0; k < extra; ++k) t.shape[0] *= dims[k];
    t.stride[i] = step;
    step *= t.shape[i];
  }
  return t;
}

Tensor tensor_of(const xla::Operands& operands, std::int64_t index, int rank, Device device) {
  if (operands.types[index] != xla::kBufferType) fail<TypeError>("operand ", index, " is not a buffer");
  const auto& buffer = *static_cast<const xla::Buffer*>(operands.values[index]);
  return dense(buffer.data, dtype_of(buffer.dtype), {buffer.dims, static_cast<std::size_t>(buffer.rank)}, rank, device);
}

bool flag(const xla::Attributes& attributes, std::string_view name) {
  for (std::int64_t i = 0; i < attributes.count; ++i) {
    if (std::string_view(attributes.names[i]->data, attributes.names[i]->size) != name) continue;
    const auto& scalar = *static_cast<const xla::Scalar*>(attributes.values[i]);
    if (attributes.types[i] == xla::kScalarAttribute && scalar.dtype == xla::ElementType::pred)
      return *static_cast<const bool*>(scalar.value);
  }
  fail<ValueError>("attribute ", name, " is missing or no bool");
}

template <class Struct>
xla::Header header_of() {
  return {sizeof(Struct), nullptr};
}

// Raises when XLA reports an error.
void check(const xla::CallFrame& frame, xla::Error* error, const char* call) {
  if (!error) return;
  xla::ErrorDestroyArgs destroy{header_of<xla::ErrorDestroyArgs>(), error};
  frame.api->error_destroy(&destroy);
  fail<CudaError>("XLA's ", call, " failed");
}

template <class Op, DeviceType type>
void execute(const xla::CallFrame& frame) {
  Device device{type, 0};
  Stream stream = nullptr;
  if constexpr (type == DeviceType::cuda) {
    xla::DeviceOrdinalGetArgs ordinal{header_of<xla::DeviceOrdinalGetArgs>(), frame.context, 0};
    check(frame, frame.api->device_ordinal_get(&ordinal), "DeviceOrdinal_Get");
    device.index = ordinal.ordinal;
    xla::StreamGetArgs current{header_of<xla::StreamGetArgs>(), frame.context, nullptr};
    check(frame, frame.api->stream_get(&current), "Stream_Get");
    stream = current.stream;
  }
  constexpr std::int64_t kArguments = Op::kArgumentRanks.size(), kResults = Op::kResultRanks.size();
  // One result more than the op has: scratch memory for the GPU.
  if (frame.arguments.count > kArguments || frame.results.count != kResults + 1)
    fail<ValueError>("got ", frame.arguments.count, " arguments and ", frame.results.count, " results");
  Tensors<kArguments> arguments;
  Tensors<kResults> results;
  for (std::int64_t i = 0; i < frame.arguments.count; ++i)
    arguments[i] = tensor_of(frame.arguments, i, Op::kArgumentRanks[i], device);
  for (std::int64_t i = 0; i < kResults; ++i) results[i] = tensor_of(frame.results, i, Op::kResultRanks[i], device);
  auto args = Op::make(arguments, results, flag(frame.attributes, "reverse"));
  if constexpr (type == DeviceType::cuda) {
    const Tensor scratch = tensor_of(frame.results, kResults, 1, device);
    args.workspace = {scratch.data, static_cast<std::size_t>(scratch.numel() * size_of(scratch.dtype))};
  } else {
    const std::size_t bytes = plan(args, validate(args)).workspace_bytes;
    args.workspace = {thread_workspace(bytes), bytes};
  }
  run(args, stream);
}

// XLA asks a handler for its version with a call frame that carries this extension and nothing else.
bool answer_metadata(const xla::CallFrame& frame, std::uint32_t traits) {
  for (xla::Extension* extension = frame.header.extensions; extension; extension = extension->next) {
    if (extension->type != xla::kMetadataExtension) continue;
    xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(extension)->metadata;
    metadata.version.major = xla::kMajorVersion;
    metadata.version.minor = xla::kMinorVersion;
    metadata.traits = traits;
    return true;
  }
  return false;
}

xla::Error* error(const xla::CallFrame& frame, xla::ErrorCode code, const char* message) {
  xla::ErrorCreateArgs args{header_of<xla::ErrorCreateArgs>(), message, code};
  return frame.api->error_create(&args);
}

template <class Op, DeviceType type>
xla::Error* handler(xla::CallFrame* frame) {
  if (answer_metadata(*frame, type == DeviceType::cuda ? xla::kCommandBufferCompatible : 0)) return nullptr;
  if (frame->stage != xla::Stage::execute) return nullptr;
  try {
    execute<Op, type>(*frame);
    return nullptr;
  } catch (const ValueError& e) {
    return error(*frame, xla::ErrorCode::invalid_argument, e.what());
  } catch (const TypeError& e) {
    return error(*frame, xla::ErrorCode::invalid_argument, e.what());
  } catch (const NotImplementedError& e) {
    return error(*frame, xla::ErrorCode::unimplemented, e.what());
  } catch (const std::exception& e) {
    return error(*frame, xla::ErrorCode::internal, e.what());
  }
}

// ---- Python's side ---------------------------------------------------------------------------------------------------------
DType dtype_named(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(DType::int64); ++i)
    if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  fail<TypeError>("dtype ", name, " is not supported");
}

using Described = std::pair<std::string, std::vector<std::int64_t>>;  // dtype, shape

// Raises what the op would raise for operands of these dtypes and shapes, and returns the bytes of scratch memory that a call
// needs on this machine's GPU. For tracing: there is no memory yet, so every tensor gets the same address, never followed.
template <class Op>
std::size_t check_operands(const std::vector<Described>& operands) {
  if (operands.size() > Op::kArgumentRanks.size()) fail<ValueError>(Op::kName, ": too many arguments");
  alignas(256) static char nowhere[256];
  const bool has_cuda = cuda_unavailable_reason().empty();
  auto make = [&](Device device) {
    Tensors<Op::kArgumentRanks.size()> arguments;
    for (std::size_t i = 0; i < operands.size(); ++i) {
      const auto& [dtype, shape] = operands[i];
      arguments[i] = dense(nowhere, dtype_named(dtype), shape, static_cast<int>(shape.size()), device);
    }
    return Op::make(arguments, {}, false);
  };
  const auto dims = validate(make({DeviceType::cpu, 0}));
  const auto args = make({DeviceType::cuda, 0});
  try {
    return has_cuda ? plan(args, dims).workspace_bytes : 0;
  } catch (const NotImplementedError&) {
    return 0;  // the CPU may serve it; on a GPU the call itself says why not
  }
}

template <class Op>
void bind(nb::module_& m, nb::dict& handlers) {
  auto add = [&](const char* platform, xla::Error* (*function)(xla::CallFrame*)) {
    handlers[nb::make_tuple((std::string("statescan_") + Op::kName).c_str(), platform)] =
        nb::capsule(reinterpret_cast<void*>(function), "xla._CUSTOM_CALL_TARGET");
  };
  add("cpu", handler<Op, DeviceType::cpu>);
  add("CUDA", handler<Op, DeviceType::cuda>);
  m.def((std::string("xla_check_") + Op::kName).c_str(), &check_operands<Op>, nb::arg("operands"));
}

}  // namespace

void bind_xla(nb::module_& m) {
  nb::dict handlers;
  bind<StateScan>(m, handlers);
  bind<StateScanBackward>(m, handlers);
  m.attr("xla_handlers") = handlers;
}

}  // namespace statescan::python
