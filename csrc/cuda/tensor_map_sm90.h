// The encoded form in which the copies of sm_90 take a matrix, and the boxes that they copy.
#pragma once

#include <cstdint>

#include "hopper.cuh"
#include "neuroada/dtype.h"

namespace neuroada::cuda {

// Of a matrix of 16-bit elements, in boxes whose rows of up to 128 bytes are swizzled over 128; what
// lies outside of the matrix is copied as zeros. base and rows are 16-byte aligned. It throws
// std::runtime_error, naming the kernel, where the driver refuses. No library of the driver is linked.
TensorMap make_tensor_map(const char* kernel, DType dtype, const void* base, int64_t rows, int64_t columns,
                          int64_t stride, int32_t box_rows, int32_t box_columns);

}  // namespace neuroada::cuda
