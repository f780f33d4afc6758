// Columns of a matrix, copied by the CPU's kernel in every instruction set.
#pragma once

#include <string>
#include <vector>

#include "columns_problem.h"
#include "run_cpu.h"

namespace neuroada::testing {

template <class T>
void check_columns(int64_t tokens, int64_t d_in, const std::vector<int32_t>& columns, int64_t threads, Random& random,
                   const std::string& where) {
  const ColumnsProblem<T> p(tokens, d_in, columns, random);
  each_isa([&](const cpu::Kernels& kernels) {
    const bool made = p.is_made_by([&](Matrix<T>& out) {
      kernels.columns({dtype_of<T>(), tokens, d_in, p.count(), p.x.data(), p.x.stride(), columns.data(), out.data()},
                      sequential(threads));
    });
    CHECK(made, label<T>(kernels) + ", columns, " + where);
  });
}

}  // namespace neuroada::testing
