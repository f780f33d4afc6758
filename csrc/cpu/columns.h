// out = x[:, columns], values copied as they are.
#pragma once

#include "kernels.h"

namespace neuroada::cpu {

template <class T>
void copy_columns(const T* x, int64_t stride, int64_t tokens, const int32_t* columns, int64_t count, T* out,
                  const Executor& all) {
  const Executor executor = all.limited(2 * tokens * count);
  const int64_t parts = std::min(executor.threads, tokens);
  executor.parallel(parts, [&](int64_t part) {
    for (int64_t t = tokens * part / parts; t < tokens * (part + 1) / parts; ++t) {
      for (int64_t i = 0; i < count; ++i) out[t * count + i] = x[t * stride + columns[i]];
    }
  });
}

}  // namespace neuroada::cpu
