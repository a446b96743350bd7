// Tensor: a borrowed, strided view of memory on one device. Every op takes its tensors as these; nothing here owns memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#if defined(_WIN32)
#error "statescan supports Linux and other ELF or Mach-O systems"
#endif
#if defined(__CUDACC__)
#define STATESCAN_HOST_DEVICE __host__ __device__
#else
#define STATESCAN_HOST_DEVICE
#endif
#define STATESCAN_API __attribute__((visibility("default")))

#include <statescan/error.h>

namespace statescan {

enum class DType : std::uint8_t { float32, float64, float16, bfloat16, complex64, complex128, int32, int64 };

constexpr std::int64_t size_of(DType dtype) {
  constexpr std::int64_t kBytes[] = {4, 8, 2, 2, 8, 16, 4, 8};
  return kBytes[static_cast<int>(dtype)];
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32",   "float64",    "float16", "bfloat16",
                                    "complex64", "complex128", "int32",   "int64"};
  return kNames[static_cast<int>(dtype)];
}

constexpr bool is_complex(DType dtype) { return dtype == DType::complex64 || dtype == DType::complex128; }

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  std::int32_t index = 0;
  friend constexpr bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
  friend constexpr bool operator!=(Device a, Device b) { return !(a == b); }
};

inline constexpr int kMaxDims = 6;

// A default-constructed Tensor is absent: an optional argument that was not given. Strides count elements.
struct Tensor {
  void* data = nullptr;
  std::int64_t shape[kMaxDims] = {};
  std::int64_t stride[kMaxDims] = {};
  std::int32_t ndim = -1;
  DType dtype = DType::float32;
  Device device = {};

  explicit constexpr operator bool() const { return ndim >= 0; }

  constexpr std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  // A row-major view of caller memory.
  static Tensor contiguous(const void* data, DType dtype, std::initializer_list<std::int64_t> shape, Device device = {}) {
    Tensor t = with_shape(data, dtype, shape, device);
    std::int64_t step = 1;
    for (int i = t.ndim; i-- > 0;) {
      t.stride[i] = step;
      step *= t.shape[i];
    }
    return t;
  }

  // A view with strides of its own, in elements.
  static Tensor strided(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                        std::initializer_list<std::int64_t> stride, Device device = {}) {
    Tensor t = with_shape(data, dtype, shape, device);
    if (stride.size() != shape.size()) fail<ValueError>("Tensor: ", shape.size(), " sizes but ", stride.size(), " strides");
    int i = 0;
    for (std::int64_t s : stride) t.stride[i++] = s;
    return t;
  }

 private:
  static Tensor with_shape(const void* data, DType dtype, std::initializer_list<std::int64_t> shape, Device device) {
    if (shape.size() > kMaxDims) fail<ValueError>("Tensor: at most ", kMaxDims, " dimensions, got ", shape.size());
    Tensor t;
    t.data = const_cast<void*>(data);  // const-ness follows the role in Args: inputs are never written
    t.dtype = dtype;
    t.device = device;
    t.ndim = static_cast<std::int32_t>(shape.size());
    int i = 0;
    for (std::int64_t s : shape) t.shape[i++] = s;
    return t;
  }
};

// DLPack's numeric codes (DLDeviceType, DLDataTypeCode), so that this header needs no other.
namespace dlpack {
inline constexpr int kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13;
inline constexpr int kInt = 0, kFloat = 2, kBfloat = 4, kComplex = 5;
}  // namespace dlpack

// View of a DLPack tensor. Accepts any type with DLTensor's fields: dlpack.h's own, nanobind's, or XLA's.
// Raises TypeError for a dtype or device that no op takes, ValueError for more than kMaxDims dimensions.
template <class DLTensorLike>
Tensor from_dlpack(const DLTensorLike& t) {
  Tensor view;
  const int code = static_cast<int>(t.dtype.code), bits = static_cast<int>(t.dtype.bits);
  if (code == dlpack::kFloat && bits == 32) view.dtype = DType::float32;
  else if (code == dlpack::kFloat && bits == 64) view.dtype = DType::float64;
  else if (code == dlpack::kFloat && bits == 16) view.dtype = DType::float16;
  else if (code == dlpack::kBfloat && bits == 16) view.dtype = DType::bfloat16;
  else if (code == dlpack::kComplex && bits == 64) view.dtype = DType::complex64;
  else if (code == dlpack::kComplex && bits == 128) view.dtype = DType::complex128;
  else if (code == dlpack::kInt && bits == 32) view.dtype = DType::int32;
  else if (code == dlpack::kInt && bits == 64) view.dtype = DType::int64;
  else fail<TypeError>("dtype with DLPack code ", code, " and ", bits, " bits is not supported; use float32, float64, ",
                       "float16, bfloat16, complex64, complex128, int32 or int64");
  if (t.dtype.lanes != 1) fail<TypeError>("vector dtypes are not supported, got ", static_cast<int>(t.dtype.lanes), " lanes");
  const int type = static_cast<int>(t.device.device_type);
  if (type == dlpack::kCPU || type == dlpack::kCUDAHost) view.device = {DeviceType::cpu, 0};
  else if (type == dlpack::kCUDA || type == dlpack::kCUDAManaged) view.device = {DeviceType::cuda, t.device.device_id};
  else fail<TypeError>("device with DLPack type ", type, " is not supported; use a CPU or CUDA tensor");
  if (t.ndim > kMaxDims) fail<ValueError>("at most ", kMaxDims, " dimensions are supported, got ", t.ndim);
  view.ndim = t.ndim;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  std::int64_t step = 1;
  for (int i = t.ndim; i-- > 0;) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides ? t.strides[i] : step;
    step *= t.shape[i];
  }
  return view;
}

}  // namespace statescan
