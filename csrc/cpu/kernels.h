// The C++ kernels for the CPU, as plain functions over pointers, sizes and strides. Matrices are
// row-major with unit stride along a row; strides count elements between rows. Each kernel exists
// once per instruction set; `kernels()` returns those of the best set that this processor supports.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "neuroada/dtype.h"
#include "neuroada/merge_mode.h"

namespace neuroada::cpu {

// Runs the tasks of a kernel: on torch's thread pool in the op library, in a loop or on std::thread in tests.
struct Executor {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
  int64_t grain = 1 << 16;  // multiply-adds that justify waking one more thread, about 10 microseconds

  // This executor with at most work / grain + 1 threads. Always inlined: of several copies the linker keeps one, which
  // might be compiled for AVX-512.
  __attribute__((always_inline)) Executor limited(int64_t work) const {
    return {std::min(threads, work / grain + 1), run, grain};
  }

  template <class F>
  void parallel(int64_t tasks, F&& f) const {
    if (threads == 1 || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) f(task);
      return;
    }
    using Body = std::remove_reference_t<F>;
    run(tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &f);
  }

  // Calls f(begin, end) for contiguous parts of [0, count), one per thread.
  template <class F>
  void parallel_ranges(int64_t count, F&& f) const {
    const int64_t parts = threads < count ? threads : count;
    parallel(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
  }
};

// out[t, j] = base[t, j] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
struct BypassFwd {
  DType dtype;  // of x, base, bias and out
  int64_t tokens, d_in, d_out, k;
  const void* x;  // [tokens, d_in]
  int64_t x_stride;
  const int32_t* index;  // [d_out, k], -1 where a slot has no connection
  const void* delta;     // [d_out, k], in the accumulate type
  const void* base;      // [tokens, d_out], or null for zero
  int64_t base_stride;
  const void* bias;  // [d_out], or null for zero
  void* out;         // [tokens, d_out], may be base itself
  int64_t out_stride;
};

// out[t, c] = sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
struct BypassBwdInput {
  DType dtype;  // of grad and out
  int64_t tokens, d_in, d_out, k;
  const void* grad;  // [tokens, d_out]
  int64_t grad_stride;
  const int32_t* plan;  // see planner.h
  const void* delta;    // [d_out, k], in the accumulate type
  void* out;            // [tokens, d_in]
  int64_t out_stride;
};

// out[j, s] = sum_t grad[t, j] x[t, index[j, s]], and zero where index[j, s] is -1. x may hold only the
// columns that index refers to: given `whole_d_in`, the sums are bitwise equal to those of the full x.
struct Sddmm {
  DType dtype;  // of grad and x
  int64_t tokens, d_in, d_out, k;
  const void* grad;  // [tokens, d_out]
  int64_t grad_stride;
  const void* x;  // [tokens, d_in]
  int64_t x_stride;
  const int32_t* index;    // [d_out, k]
  void* out;               // [d_out, k], in the accumulate type
  int64_t whole_d_in = 0;  // d_in of the full x, which determines the blocks of tokens; 0: d_in
};

// out[t, j] = sum_c x[t, c] W[j, c] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
struct LinearFwd {
  BypassFwd bypass;    // without a base
  const void* weight;  // [d_out, d_in], of the same dtype
  int64_t weight_stride;
};

// out[t, c] = sum_j grad[t, j] W[j, c] + sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
struct LinearBwdInput {
  BypassBwdInput bypass;
  const void* weight;  // [d_out, d_in], of the same dtype
  int64_t weight_stride;
};

struct Merge {
  DType dtype;  // of weight and original
  MergeMode mode;
  int64_t d_out, k;
  void* weight;  // [d_out, d_in]
  int64_t weight_stride;
  const int32_t* index;  // [d_out, k]
  const void* delta;     // [d_out, k], in the accumulate type; for merge and patch
  void* original;        // [d_out, k], zero in a slot without a connection; written by merge and gather
};

enum class Ranking : uint8_t { value, magnitude, smallest };  // highest first; smallest: smallest magnitude first

// index[r, :] = columns of the k highest-ranked scores of row r, ascending; ties go to the lower columns.
// All -1 in a row with a NaN.
struct Largest {
  DType dtype;
  Ranking by;
  int64_t rows, columns, k;  // 1 <= k <= columns
  const void* scores;        // [rows, columns]
  int64_t stride;
  int32_t* index;  // [rows, k]
};

// out[t, i] = x[t, columns[i]]
struct Columns {
  DType dtype;
  int64_t tokens, d_in, count;
  const void* x;  // [tokens, d_in]
  int64_t x_stride;
  const int32_t* columns;  // [count], in any order
  void* out;               // [tokens, count]
};

// The minimum and maximum; of no values INT32_MAX and INT32_MIN, which pass every range check.
struct Bounds {
  int32_t lowest = INT32_MAX, highest = INT32_MIN;
};

struct Kernels {
  const char* isa;
  void (*bypass_fwd)(const BypassFwd&, const Executor&);
  void (*bypass_bwd_input)(const BypassBwdInput&, const Executor&);
  void (*sddmm)(const Sddmm&, const Executor&);
  void (*merge)(const Merge&, const Executor&);
  void (*linear_fwd)(const LinearFwd&, const Executor&);
  void (*linear_bwd_input)(const LinearBwdInput&, const Executor&);
  void (*largest)(const Largest&, const Executor&);
  void (*columns)(const Columns&, const Executor&);
  Bounds (*bounds)(const int32_t* values, int64_t count);
};

// The kernels of one instruction set by name, or null where it was not built or does not run here.
const Kernels* kernels_for(const char* isa);

// The kernels of the best set that runs here, or of the one that NEUROADA_CPU_ISA (generic, avx2, avx512, avx512_bf16,
// amx_bf16) names; throws if that one does not run here.
const Kernels& kernels();

}  // namespace neuroada::cpu
