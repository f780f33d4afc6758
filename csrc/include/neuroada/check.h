// Argument checks for the op library. A failed check names the argument, its value and the expected
// one, before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>

#include "neuroada/dtype.h"

namespace neuroada {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// A tensor whose storage was freed keeps its shape.
inline void check_storage(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name, ": its storage is empty");
}

// A tensor that is only read is accessed by const_data_ptr(): mutable_data_ptr() would copy a copy-on-write
// tensor.
inline void* data_of(const Tensor& tensor, bool written) {
  return written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
}

// The device on which the kernels of a call run and all its tensors must be.
struct Site {
  bool cuda;
  int32_t gpu;
};
inline constexpr Site kCpu{false, 0};

inline void check_site(const char* name, const Tensor& tensor, Site site) {
  if (!site.cuda) {
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": not on the CPU, expected a CPU tensor");
    return;
  }
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == site.gpu, name,
                  ": not on the GPU of the first argument, expected cuda:", site.gpu);
}

// A matrix of the given shape with unit stride along a row; -1 accepts any size.
inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, Site site = kCpu) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": shape ", shape_of(tensor), ", expected a matrix");
  STD_TORCH_CHECK((rows < 0 || tensor.size(0) == rows) && (columns < 0 || tensor.size(1) == columns), name, ": shape ",
                  shape_of(tensor), ", expected [", rows, ", ", columns, "]");
  check_site(name, tensor, site);
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, name, ": stride ",
                  tensor.stride(1), " along a row, expected 1");
  check_storage(name, tensor);
}

// The rows of a matrix that is written must not overlap, or threads would race.
inline void check_written(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(0) == 1 || tensor.stride(0) >= tensor.size(1), name, ": stride ",
                  tensor.stride(0), " between rows of ", tensor.size(1), ", expected rows that do not overlap");
}

// d_in of the full x, of whose columns x may have a subset.
inline void check_whole_d_in(const std::optional<int64_t>& d_in, const Tensor& x) {
  STD_TORCH_CHECK(!d_in.has_value() || *d_in >= x.size(1), "d_in: ", d_in.value_or(0), ", expected at least the ",
                  x.size(1), " columns of x");
  STD_TORCH_CHECK(d_in.value_or(0) <= INT32_MAX, "d_in: ", d_in.value_or(0), ", expected at most ", INT32_MAX);
}

inline DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, name, ": dtype is not float32, float64, bfloat16 or float16");
  }
  return DType::f32;
}

inline void check_same_dtype(const char* name, const Tensor& tensor, DType dtype, const char* other) {
  STD_TORCH_CHECK(dtype_of(name, tensor) == dtype, name, ": dtype differs from that of ", other);
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected, const char* expected_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, ": dtype is not the expected ", expected_name);
}

// An array that kernels take without strides, such as index, delta, plan and bias.
inline void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": not contiguous, expected a contiguous tensor");
}

}  // namespace neuroada
