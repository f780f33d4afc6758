// Torch glue of the CPU kernels: checks, pointers, and torch's own threads. See
// neuroada/schemas.h for the schemas and kernels.h for the formulas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <mutex>
#include <optional>
#include <tuple>

#include "kernels.h"
#include "neuroada/check.h"
#include "neuroada/planner.h"

namespace neuroada::cpu {
namespace {

Executor torch_executor() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*body)(void*, int64_t), void* context) {
            // An exception that passed through torch's C interface would lose its type and message.
            std::mutex mutex;
            std::exception_ptr error;
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              try {
                for (int64_t task = begin; task < end; ++task) body(context, task);
              } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!error) error = std::current_exception();
              }
            });
            if (error) std::rethrow_exception(error);
          }};
}

void check_delta(const char* name, const Tensor& delta, DType dtype) {
  const bool is_double = dtype == DType::f64;
  check_dtype(name, delta, is_double ? ScalarType::Double : ScalarType::Float, is_double ? "float64" : "float32");
  check_contiguous(name, delta);
}

// One vectorized pass over the index, which takes microseconds: a wrong index cannot read outside x,
// and raises before anything is written.
void check_index(const Tensor& index, int64_t d_in) {
  check_matrix("index", index, -1, -1);
  check_dtype("index", index, ScalarType::Int, "int32");
  check_contiguous("index", index);
  const Bounds columns = kernels().bounds(static_cast<const int32_t*>(index.const_data_ptr()), index.numel());
  STD_TORCH_CHECK(columns.lowest >= -1 && columns.highest < d_in, "index: column ",
                  columns.lowest < -1 ? columns.lowest : columns.highest, " is out of range for a weight with ", d_in,
                  " inputs");
}

void check_weight(const Tensor& weight, int64_t d_out, int64_t d_in, DType dtype, const char* other) {
  check_matrix("weight", weight, d_out, d_in);
  check_same_dtype("weight", weight, dtype, other);
}

// Checks and returns the arguments of a forward pass into out.
BypassFwd forward_args(const Tensor& x, const Tensor& index, const Tensor& delta, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& base, Tensor& out) {
  check_matrix("x", x, -1, -1);
  check_index(index, x.size(1));
  const int64_t tokens = x.size(0), d_in = x.size(1), d_out = index.size(0), k = index.size(1);
  const DType dtype = dtype_of("x", x);
  check_matrix("delta", delta, d_out, k);
  check_delta("delta", delta, dtype);
  check_matrix("out", out, tokens, d_out);
  check_written("out", out);
  check_same_dtype("out", out, dtype, "x");
  if (base) {
    check_matrix("base", *base, tokens, d_out);
    check_same_dtype("base", *base, dtype, "x");
  }
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == d_out && bias->is_cpu(), "bias: shape ", shape_of(*bias),
                    ", expected [", d_out, "] on the CPU");
    check_same_dtype("bias", *bias, dtype, "x");
    check_contiguous("bias", *bias);
    check_storage("bias", *bias);
  }
  return {dtype,
          tokens,
          d_in,
          d_out,
          k,
          x.const_data_ptr(),
          x.stride(0),
          static_cast<const int32_t*>(index.const_data_ptr()),
          delta.const_data_ptr(),
          base ? base->const_data_ptr() : nullptr,
          base ? base->stride(0) : 0,
          bias ? bias->const_data_ptr() : nullptr,
          out.mutable_data_ptr(),
          out.stride(0)};
}

// base + bias + bypass(x) into out, which may be base.
void bypass_fwd_op(const Tensor& x, const Tensor& index, const Tensor& delta, std::optional<Tensor> bias,
                   std::optional<Tensor> base, Tensor out) {
  kernels().bypass_fwd(forward_args(x, index, delta, bias, base, out), torch_executor());
}

// x W^T + bias + bypass(x)
Tensor linear_fwd_op(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& delta,
                     std::optional<Tensor> bias) {
  check_matrix("x", x, -1, -1);
  check_weight(weight, -1, x.size(1), dtype_of("x", x), "x");
  check_matrix("index", index, weight.size(0), -1);
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  const BypassFwd bypass = forward_args(x, index, delta, bias, std::nullopt, out);
  kernels().linear_fwd({bypass, weight.const_data_ptr(), weight.stride(0)}, torch_executor());
  return out;
}

// Every offset of the plan is checked, so that the plan of another index cannot access memory out of bounds.
void check_plan(const Tensor& plan, int64_t d_in, int64_t entries) {
  STD_TORCH_CHECK(entries <= INT32_MAX, "delta: ", entries, " bypasses, expected fewer than 2^31");
  STD_TORCH_CHECK(plan.dim() == 1 && plan.is_cpu() && plan.size(0) >= plan_size(d_in, 0), "plan: shape ",
                  shape_of(plan), ", expected at least [", plan_size(d_in, 0), "] on the CPU");
  check_dtype("plan", plan, ScalarType::Int, "int32");
  check_contiguous("plan", plan);
  check_storage("plan", plan);
  const PlanView view(static_cast<const int32_t*>(plan.const_data_ptr()), d_in);
  bool valid = view.column_start[0] == 0 && plan.size(0) == plan_size(d_in, view.live());
  for (int64_t c = 0; c < d_in; ++c) valid &= view.column_start[c] <= view.column_start[c + 1];
  valid &= view.split[0] == 0 && view.split[kSplits] == d_in;
  for (int64_t i = 0; i < kSplits; ++i) valid &= view.split[i] <= view.split[i + 1];
  STD_TORCH_CHECK(valid, "plan: not the plan of an index into ", d_in, " columns");
  const Bounds entry = kernels().bounds(view.entry, view.live());
  STD_TORCH_CHECK(entry.lowest >= 0 && entry.highest < entries, "plan: entry ",
                  entry.lowest < 0 ? entry.lowest : entry.highest, " is out of range for ", entries, " bypasses");
}

// Checks and returns the arguments of a backward pass into out.
BypassBwdInput backward_args(const Tensor& grad, const Tensor& plan, const Tensor& delta, Tensor& out) {
  check_matrix("delta", delta, -1, -1);
  const int64_t d_out = delta.size(0), k = delta.size(1);
  check_matrix("grad", grad, -1, d_out);
  const int64_t tokens = grad.size(0);
  check_matrix("out", out, tokens, -1);
  check_written("out", out);
  const int64_t d_in = out.size(1);
  const DType dtype = dtype_of("grad", grad);
  check_same_dtype("out", out, dtype, "grad");
  check_delta("delta", delta, dtype);
  check_plan(plan, d_in, d_out * k);
  return {dtype,
          tokens,
          d_in,
          d_out,
          k,
          grad.const_data_ptr(),
          grad.stride(0),
          static_cast<const int32_t*>(plan.const_data_ptr()),
          delta.const_data_ptr(),
          out.mutable_data_ptr(),
          out.stride(0)};
}

// bypass(grad) transposed, written to all of out. On the CPU torch's GEMM accumulates onto out afterwards, so only GPUs
// accept a base.
void bypass_bwd_input_op(const Tensor& grad, const Tensor& plan, const Tensor& delta, std::optional<Tensor> base,
                         Tensor out) {
  STD_TORCH_CHECK(!base, "base: shape ", shape_of(*base), ", expected none on the CPU");
  kernels().bypass_bwd_input(backward_args(grad, plan, delta, out), torch_executor());
}

// grad W + bypass(grad) transposed
Tensor linear_bwd_input_op(const Tensor& grad, const Tensor& weight, const Tensor& plan, const Tensor& delta) {
  check_matrix("grad", grad, -1, -1);
  check_weight(weight, grad.size(1), -1, dtype_of("grad", grad), "grad");
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), weight.size(1)});
  const BypassBwdInput bypass = backward_args(grad, plan, delta, out);
  kernels().linear_bwd_input({bypass, weight.const_data_ptr(), weight.stride(0)}, torch_executor());
  return out;
}

Tensor sddmm_op(const Tensor& grad, const Tensor& x, const Tensor& index, std::optional<int64_t> whole_d_in) {
  check_matrix("x", x, -1, -1);
  check_whole_d_in(whole_d_in, x);
  check_index(index, x.size(1));
  const int64_t tokens = x.size(0), d_in = x.size(1), d_out = index.size(0), k = index.size(1);
  check_matrix("grad", grad, tokens, d_out);
  const DType dtype = dtype_of("x", x);
  check_same_dtype("grad", grad, dtype, "x");
  Tensor out = torch::stable::new_empty(x, {d_out, k}, dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  kernels().sddmm(
      {dtype, tokens, d_in, d_out, k, grad.const_data_ptr(), grad.stride(0), x.const_data_ptr(), x.stride(0),
       static_cast<const int32_t*>(index.const_data_ptr()), out.mutable_data_ptr(), whole_d_in.value_or(d_in)},
      torch_executor());
  return out;
}

// linear_bwd_input and sddmm
std::tuple<Tensor, Tensor> linear_bwd_op(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& index,
                                         const Tensor& plan, const Tensor& delta) {
  check_matrix("weight", weight, -1, -1);
  check_matrix("x", x, -1, weight.size(1));
  check_matrix("index", index, -1, -1);
  check_matrix("delta", delta, index.size(0), index.size(1));
  const Tensor grad_delta = sddmm_op(grad, x, index, std::nullopt);
  return {linear_bwd_input_op(grad, weight, plan, delta), grad_delta};
}

// Shared by the four ops on the chosen entries of W; delta may be null.
void run_merge(MergeMode mode, const Tensor& weight, const Tensor& index, const Tensor* delta, const Tensor& original) {
  check_matrix("weight", weight, -1, -1);
  const int64_t d_out = weight.size(0), d_in = weight.size(1);
  check_index(index, d_in);
  const int64_t k = index.size(1);
  check_matrix("index", index, d_out, k);
  const DType dtype = dtype_of("weight", weight);
  if (delta) {
    check_matrix("delta", *delta, d_out, k);
    check_delta("delta", *delta, dtype);
  }
  check_matrix("original", original, d_out, k);
  check_same_dtype("original", original, dtype, "weight");
  check_contiguous("original", original);
  if (writes_weight(mode)) check_written("weight", weight);
  kernels().merge({dtype, mode, d_out, k, data_of(weight, writes_weight(mode)), weight.stride(0),
                   static_cast<const int32_t*>(index.const_data_ptr()), delta ? delta->const_data_ptr() : nullptr,
                   data_of(original, writes_original(mode))},
                  torch_executor());
}

Tensor new_original(const Tensor& weight, const Tensor& index) {
  check_matrix("index", index, -1, -1);
  return torch::stable::new_empty(weight, {index.size(0), index.size(1)});
}

Tensor merge_op(Tensor weight, const Tensor& index, const Tensor& delta) {
  Tensor original = new_original(weight, index);
  run_merge(MergeMode::merge, weight, index, &delta, original);
  return original;
}

Tensor gather_op(const Tensor& weight, const Tensor& index) {
  Tensor original = new_original(weight, index);
  run_merge(MergeMode::gather, weight, index, nullptr, original);
  return original;
}

void patch_op(Tensor weight, const Tensor& index, const Tensor& delta, const Tensor& original) {
  run_merge(MergeMode::patch, weight, index, &delta, original);
}

void restore_op(Tensor weight, const Tensor& index, const Tensor& original) {
  run_merge(MergeMode::restore, weight, index, nullptr, original);
}

// The columns of the k highest-ranked scores of each row; all -1 in a row with a NaN.
Tensor largest_op(const Tensor& scores, int64_t k, int64_t by) {
  check_matrix("scores", scores, -1, -1);
  const DType dtype = dtype_of("scores", scores);
  const int64_t rows = scores.size(0), columns = scores.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= columns, "k: ", k, ", expected 1 to ", columns, ", the columns of scores");
  STD_TORCH_CHECK(columns <= INT32_MAX, "scores: ", columns, " columns, expected fewer than 2^31");
  STD_TORCH_CHECK(by >= 0 && by <= 2, "by: ", by, ", expected 0, 1 or 2");
  Tensor index = torch::stable::new_empty(scores, {rows, k}, ScalarType::Int);
  kernels().largest({dtype, static_cast<Ranking>(by), rows, columns, k, scores.const_data_ptr(), scores.stride(0),
                     static_cast<int32_t*>(index.mutable_data_ptr())},
                    torch_executor());
  return index;
}

Tensor columns_op(const Tensor& x, const Tensor& columns) {
  check_matrix("x", x, -1, -1);
  const DType dtype = dtype_of("x", x);
  STD_TORCH_CHECK(columns.dim() == 1 && columns.is_cpu(), "columns: shape ", shape_of(columns),
                  ", expected one dimension on the CPU");
  check_dtype("columns", columns, ScalarType::Int, "int32");
  check_contiguous("columns", columns);
  check_storage("columns", columns);
  const int32_t* chosen = static_cast<const int32_t*>(columns.const_data_ptr());
  const int64_t tokens = x.size(0), d_in = x.size(1), count = columns.size(0);
  const Bounds range = kernels().bounds(chosen, count);
  STD_TORCH_CHECK(range.lowest >= 0 && range.highest < d_in,
                  "columns: ", range.lowest < 0 ? range.lowest : range.highest, " is out of range for an x with ", d_in,
                  " columns");
  Tensor out = torch::stable::new_empty(x, {tokens, count});
  kernels().columns({dtype, tokens, d_in, count, x.const_data_ptr(), x.stride(0), chosen, out.mutable_data_ptr()},
                    torch_executor());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neuroada_C, CPU, m) {
  m.impl("bypass_fwd", TORCH_BOX(&bypass_fwd_op));
  m.impl("bypass_bwd_input", TORCH_BOX(&bypass_bwd_input_op));
  m.impl("sddmm", TORCH_BOX(&sddmm_op));
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd_op));
  m.impl("linear_bwd_input", TORCH_BOX(&linear_bwd_input_op));
  m.impl("linear_bwd", TORCH_BOX(&linear_bwd_op));
  m.impl("merge", TORCH_BOX(&merge_op));
  m.impl("gather", TORCH_BOX(&gather_op));
  m.impl("patch", TORCH_BOX(&patch_op));
  m.impl("restore", TORCH_BOX(&restore_op));
  m.impl("largest", TORCH_BOX(&largest_op));
  m.impl("columns", TORCH_BOX(&columns_op));
}

}  // namespace neuroada::cpu
