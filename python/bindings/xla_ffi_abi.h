// The part of XLA's foreign-function C ABI (version 0.1) that the JAX handlers speak. Declared here, in our words, from the
// published ABI, so that building needs no jaxlib. Every struct starts with its size and a list of extensions; later versions
// of the ABI append fields. https://openxla.org/xla/custom_call
#pragma once

#include <cstddef>
#include <cstdint>

namespace statescan::python::xla_ffi_abi {

inline constexpr int kMajorVersion = 0, kMinorVersion = 1;

struct Extension {
  std::size_t struct_size;
  int type;
  Extension* next;
};
inline constexpr int kMetadataExtension = 1;

struct Header {
  std::size_t struct_size;
  Extension* extensions;
};

struct ApiVersion {
  Header header;
  int major, minor;
};

struct Metadata {
  std::size_t struct_size;
  ApiVersion version;
  std::uint32_t traits;
};
inline constexpr std::uint32_t kCommandBufferCompatible = 1;  // launches the same work each time: a CUDA graph may replay it

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Error;    // XLA's
struct Context;  // XLA's
enum class ErrorCode : int { invalid_argument = 3, unimplemented = 12, internal = 13 };

struct ErrorCreateArgs {
  Header header;
  const char* message;
  ErrorCode code;
};
struct ErrorDestroyArgs {
  Header header;
  Error* error;
};
struct StreamGetArgs {
  Header header;
  Context* context;
  void* stream;  // out
};
struct DeviceOrdinalGetArgs {
  Header header;
  Context* context;
  std::int32_t ordinal;  // out
};

// XLA's primitive types, those that an op can take.
enum class ElementType : int { pred = 1, s32 = 4, s64 = 5, f16 = 10, f32 = 11, f64 = 12, c64 = 15, bf16 = 16, c128 = 18 };

struct Buffer {
  Header header;
  ElementType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

struct ByteSpan {
  const char* data;
  std::size_t size;
};
struct Scalar {
  ElementType dtype;
  void* value;
};

struct Operands {  // arguments, or results
  Header header;
  std::int64_t count;
  int* types;  // 1: a buffer
  void** values;
};
struct Attributes {
  Header header;
  std::int64_t count;
  int* types;
  ByteSpan** names;
  void** values;
};
inline constexpr int kBufferType = 1, kScalarAttribute = 3;

using Function = Error*(void*);
struct Api {
  Header header;
  ApiVersion version;
  void* internal;
  Error* (*error_create)(ErrorCreateArgs*);
  Function* error_get_message;
  void (*error_destroy)(ErrorDestroyArgs*);
  Function* handler_register;
  Error* (*stream_get)(StreamGetArgs*);
  Function *type_id_register, *context_get, *state_set, *state_get, *memory_allocate, *memory_free, *thread_pool_schedule,
      *thread_pool_count, *future_create, *future_set_available, *future_set_error, *run_id_get;
  Error* (*device_ordinal_get)(DeviceOrdinalGetArgs*);
};

enum class Stage : int { instantiate, prepare, initialize, execute };

struct CallFrame {
  Header header;
  const Api* api;
  Context* context;
  Stage stage;
  Operands arguments, results;
  Attributes attributes;
};

}  // namespace statescan::python::xla_ffi_abi
