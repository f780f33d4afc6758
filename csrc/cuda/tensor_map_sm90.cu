// See tensor_map_sm90.h.
#include <stdexcept>
#include <string>

#include "tensor_map_sm90.h"

#ifdef NEUROADA_HOST_CUDA

namespace neuroada::cuda {

TensorMap make_tensor_map(const char* kernel, DType, const void* base, int64_t rows, int64_t columns, int64_t stride,
                          int32_t box_rows, int32_t box_columns) {
  return host_cuda::make_tensor_map(kernel, base, rows, columns, stride, box_rows, box_columns);
}

}  // namespace neuroada::cuda

#else

#include <cudaTypedefs.h>

#include "launch.h"

namespace neuroada::cuda {
namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// Looked up in the driver, which is present wherever a kernel runs, and alone knows the encoding.
Encode find_encode(const char* kernel) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check(kernel, "cudaGetDriverEntryPointByVersion",
        cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result));
#else
  check(kernel, "cudaGetDriverEntryPoint", cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error(std::string(kernel) + ": this driver has no " + kName + ", expected CUDA 12 or newer");
  }
  return reinterpret_cast<Encode>(found);
}

}  // namespace

TensorMap make_tensor_map(const char* kernel, DType dtype, const void* base, int64_t rows, int64_t columns,
                          int64_t stride, int32_t box_rows, int32_t box_columns) {
  static const Encode encode = find_encode(kernel);
  const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(kernel) + ": cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(result)) + " for a matrix [" + std::to_string(rows) +
                             ", " + std::to_string(columns) + "] with stride " + std::to_string(stride));
  }
  return map;
}

}  // namespace neuroada::cuda

#endif
