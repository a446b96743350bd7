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

}  // namespace

std::string why_not_tma(const char* name, const Tensor& t) {
  if (!t) return "";
  if (t.shape[3] > 1 && t.stride[3] != 1) return std::string("needs ") + name + " to be contiguous along its last axis";
  bool aligned = reinterpret_cast<std::uintptr_t>(t.data) % kAlignment == 0;
  for (int i = 0; i < 3; ++i) {
    const std::int64_t bytes = t.stride[i] * size_of(t.dtype);
    aligned = aligned && (t.shape[i] == 1 || (bytes % kAlignment == 0 && bytes >= 0 && bytes < std::int64_t{1} << 40));
  }
  return aligned ? "" : std::string("needs ") + name + " and its strides aligned to 16 bytes, and strides not negative";
}

CUtensorMap tma_map(const Tensor& t, int tokens) {
  const int order[] = {3, 2, 1, 0};
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(t.shape[order[i]]);
  for (int i = 1; i < 4; ++i)  // an axis of one element may have any stride
    strides[i - 1] = sizes[i] == 1 ? kAlignment : static_cast<cuuint64_t>(t.stride[order[i]] * size_of(t.dtype));
  const cuuint32_t box[] = {kBoxElements, 1, static_cast<cuuint32_t>(tokens), 1}, steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto encode = [&] {
    return encoder()(&map, t.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                     t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
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

}  // namespace statescan::cuda
