// Tensor maps: a matrix and the boxes that TMA copies, in encoded form.
#pragma once

#include <cstdint>

#include "hopper.cuh"
#include "neuroada/dtype.h"

namespace neuroada::cuda {

// Encodes a matrix of 16-bit elements, in boxes whose rows of up to 128 bytes are swizzled over 128; elements outside
// the matrix are copied as zeros. base and rows are 16-byte aligned. Throws std::runtime_error, naming the kernel, if
// the driver refuses. The driver library is not linked.
TensorMap make_tensor_map(const char* kernel, DType dtype, const void* base, int64_t rows, int64_t columns,
                          int64_t stride, int32_t box_rows, int32_t box_columns);

}  // namespace neuroada::cuda
