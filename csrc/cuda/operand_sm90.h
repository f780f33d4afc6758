// An operand of a GEMM for sm_90, and what TMA requires of it.
#pragma once

#include "launch.h"

namespace neuroada::cuda {

// Its layout in memory.
struct Operand {
  const char* name;
  const void* data;
  int64_t rows, columns, stride;
};

inline void check_copyable(const char* kernel, const Operand& operand) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string(kernel) + ": " + operand.name + ": " + why);
  };
  if (!aligned16(operand.data)) refuse("not 16-byte aligned");
  if (operand.rows == 0) refuse("no rows, expected at least one");
  if (operand.columns == 0 || operand.columns % 8 != 0) {
    refuse(std::to_string(operand.columns) + " columns, expected a multiple of 8");
  }
  if (operand.stride < operand.columns) {
    refuse("stride " + std::to_string(operand.stride) + ", expected no less than the columns");
  }
  if (operand.stride % 8 != 0) refuse("stride " + std::to_string(operand.stride) + ", expected a multiple of 8");
  if (std::max(operand.rows, operand.columns) > INT32_MAX - 256) refuse("a size of more than 2^31");
}

}  // namespace neuroada::cuda
