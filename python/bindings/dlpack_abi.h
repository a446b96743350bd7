// The part of DLPack's C ABI (version 1) that the bindings speak: the tensor descriptor and the exchange API that a framework
// offers on its tensor type as __dlpack_c_exchange_api__. Declared here, in our words, from the published ABI, so that building
// needs no DLPack header. https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace statescan::python::dlpack_abi {

inline constexpr std::uint32_t kMajorVersion = 1;

struct DeviceTag {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct TensorDescriptor {  // DLTensor
  void* data;
  DeviceTag device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct ManagedTensor {  // DLManagedTensorVersioned
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  TensorDescriptor tensor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

struct ExchangeApi {  // DLPackExchangeAPI; every function returns 0, or -1 with a Python error set
  ExchangeHeader header;
  int (*allocate)(TensorDescriptor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** out_object);
  int (*descriptor_from_object)(void* object, TensorDescriptor* out);  // borrowed; may be null
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out_stream);
};

}  // namespace statescan::python::dlpack_abi
