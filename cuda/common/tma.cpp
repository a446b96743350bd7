#include "tma.h"

#include <cuda_runtime_api.h>

#include "launch.h"

namespace statescan::cuda {

namespace {

constexpr int kBoxElements = 64;
constexpr std::int64_t kAlignment = 16;

// The driver's function, found through the runtime: nothing links to libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (result != cudaDriverEntryPointSuccess)
      fail<CudaError>("the CUDA driver has no cuTensorMapEncodeTiled; it needs CUDA 12");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

CUtensorMapDataType type_of(DType dtype) {
  if (dtype == DType::float32) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Of the first axes of a tensor, the last of them fastest.
template <int kAxes>
CUtensorMap map_of(const Tensor& t, const cuuint32_t (&box)[kAxes], CUtensorMapSwizzle swizzle) {
  cuuint64_t sizes[kAxes], strides[kAxes - 1];
  cuuint32_t steps[kAxes];
  for (int i = 0; i < kAxes; ++i) sizes[i] = static_cast<cuuint64_t>(t.shape[kAxes - 1 - i]), steps[i] = 1;
  for (int i = 1; i < kAxes; ++i)  // an axis of one element may have any stride
    strides[i - 1] = sizes[i] == 1 ? kAlignment : static_cast<cuuint64_t>(t.stride[kAxes - 1 - i] * size_of(t.dtype));
  CUtensorMap map;
  const auto encode = [&] {
    return encoder()(&map, type_of(t.dtype), kAxes, t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  // The driver wants the device's context current. In a thread that has had nothing to do with the device so far, such as that
  // of torch's autograd when ours is its first node, it is not yet.
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    status = encode();
  }
  if (status != CUDA_SUCCESS) fail<CudaError>("cuTensorMapEncodeTiled failed with code ", static_cast<int>(status));
  return map;
}

// Why the engine cannot address a tensor of so many axes, or "".
std::string why_not_map(const char* name, const Tensor& t, int axes) {
  if (!t) return "";
  if (t.shape[axes - 1] > 1 && t.stride[axes - 1] != 1)
    return std::string("needs ") + name + " to be contiguous along its last axis";
  bool aligned = reinterpret_cast<std::uintptr_t>(t.data) % kAlignment == 0;
  for (int i = 0; i + 1 < axes; ++i) {
    const std::int64_t bytes = t.stride[i] * size_of(t.dtype);
    aligned = aligned && (t.shape[i] == 1 || (bytes % kAlignment == 0 && bytes >= 0 && bytes < std::int64_t{1} << 40));
  }
  return aligned ? "" : std::string("needs ") + name + " and its strides aligned to 16 bytes, and strides not negative";
}

}  // namespace

std::string why_not_tma(const char* name, const Tensor& t) { return why_not_map(name, t, 4); }

CUtensorMap tma_map(const Tensor& t, int tokens) {
  return map_of<4>(t, {kBoxElements, 1, static_cast<cuuint32_t>(tokens), 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

std::string why_not_tma_steps(const char* name, const Tensor& t) {
  for (int i = 0; t && i < 2; ++i)
    if (t.shape[i] > 1 && t.stride[i] == 0) return std::string("needs ") + name + " not to be expanded";
  return why_not_map(name, t, 3);
}

CUtensorMap tma_map_steps(const Tensor& t, int tokens) {
  const auto heads = static_cast<cuuint32_t>(kAlignment / size_of(t.dtype));
  return map_of<3>(t, {heads, static_cast<cuuint32_t>(tokens), 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace statescan::cuda
