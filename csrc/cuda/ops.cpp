// Torch glue of the CUDA kernels: checks, pointers, torch's current stream, and scratch from torch's
// allocator. See schemas.h for the ops and kernels.h for what each computes.
//
// The values of index and plan are on the GPU, and are not read here: a kernel treats a column out of range as a slot
// without a connection, and accesses nothing outside its arguments, whatever the values.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "current_device.h"
#include "neuroada/planner.h"

namespace neuroada::cuda {
namespace {

DType element_dtype(const char* name, const Tensor& tensor) {
  const DType dtype = dtype_of(name, tensor);
  STD_TORCH_CHECK(dtype != DType::f64, name, ": dtype float64, expected float32, bfloat16 or float16");
  return dtype;
}

// index, delta or originals: a dense [d_out, k].
void check_slots(const char* name, const Tensor& tensor, int64_t d_out, int64_t k, Site site) {
  check_matrix(name, tensor, d_out, k, site);
  check_contiguous(name, tensor);
}

void check_index(const Tensor& index, int64_t d_out, Site site) {
  check_slots("index", index, d_out, -1, site);
  check_dtype("index", index, ScalarType::Int, "int32");
  STD_TORCH_CHECK(index.numel() <= INT32_MAX, "index: ", index.numel(), " connections, expected fewer than 2^31");
}

void check_delta(const Tensor& delta, int64_t d_out, int64_t k, Site site) {
  check_slots("delta", delta, d_out, k, site);
  check_dtype("delta", delta, ScalarType::Float, "float32");
}

void check_bias(const Tensor& bias, int64_t d_out, DType dtype, Site site) {
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == d_out, "bias: shape ", shape_of(bias), ", expected [", d_out, "]");
  check_site("bias", bias, site);
  check_same_dtype("bias", bias, dtype, "x");
  check_contiguous("bias", bias);
  check_storage("bias", bias);
}

// Returns the number of connections in a plan for a weight with d_in inputs, at most `most`.
int64_t check_plan(const char* name, const Tensor& plan, int64_t d_in, int64_t most, Site site) {
  STD_TORCH_CHECK(plan.dim() == 1 && plan.size(0) >= plan_size(d_in, 0), name, ": shape ", shape_of(plan),
                  ", expected at least [", plan_size(d_in, 0), "]");
  check_site(name, plan, site);
  check_dtype(name, plan, ScalarType::Int, "int32");
  check_contiguous(name, plan);
  check_storage(name, plan);
  const int64_t live = plan.size(0) - plan_size(d_in, 0);
  STD_TORCH_CHECK(live <= most, name, ": ", live, " connections, expected at most ", most);
  return live;
}

// Scratch for the connections by blocks of columns.
Tensor new_entries(const Tensor& index) {
  return torch::stable::new_empty(index, {index.numel(), static_cast<int64_t>(sizeof(BlockEntry) / sizeof(int32_t))});
}

const int32_t* int32_values(const Tensor& tensor) { return static_cast<const int32_t*>(tensor.const_data_ptr()); }
const float* float_values(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// base + bias + bypass(x) into out, which may be base.
void bypass_fwd_op(const Tensor& x, const Tensor& index, const Tensor& delta, std::optional<Tensor> bias,
                   std::optional<Tensor> base, Tensor out) {
  const Site site = site_of("x", x);
  check_matrix("x", x, -1, -1, site);
  check_index(index, -1, site);
  const int64_t tokens = x.size(0), d_in = x.size(1), d_out = index.size(0), k = index.size(1);
  const DType dtype = element_dtype("x", x);
  check_delta(delta, d_out, k, site);
  check_matrix("out", out, tokens, d_out, site);
  check_written("out", out);
  check_same_dtype("out", out, dtype, "x");
  if (base) {
    check_matrix("base", *base, tokens, d_out, site);
    if (base->scalar_type() != ScalarType::Float) check_same_dtype("base", *base, dtype, "x");
  }
  if (bias) check_bias(*bias, d_out, dtype, site);
  const CurrentDevice device(site);
  bypass_fwd(
      {dtype, tokens, d_in, d_out, k, x.const_data_ptr(), x.stride(0), int32_values(index), float_values(delta),
       base ? base->const_data_ptr() : nullptr, base ? base->stride(0) : 0, bias ? bias->const_data_ptr() : nullptr,
       out.mutable_data_ptr(), out.stride(0), base && base->scalar_type() == ScalarType::Float},
      device.facts(), device.stream());
}

// out = base + the transposed bypass of grad; all of out is written; base is float32.
void bypass_bwd_input_op(const Tensor& grad, const Tensor& plan, const Tensor& delta, std::optional<Tensor> base,
                         Tensor out) {
  const Site site = site_of("grad", grad);
  check_delta(delta, -1, -1, site);
  const int64_t d_out = delta.size(0), k = delta.size(1);
  check_matrix("grad", grad, -1, d_out, site);
  check_matrix("out", out, grad.size(0), -1, site);
  check_written("out", out);
  const int64_t tokens = grad.size(0), d_in = out.size(1);
  const DType dtype = element_dtype("grad", grad);
  check_same_dtype("out", out, dtype, "grad");
  STD_TORCH_CHECK(delta.numel() <= INT32_MAX, "delta: ", delta.numel(), " bypasses, expected fewer than 2^31");
  const int64_t live = check_plan("plan", plan, d_in, delta.numel(), site);
  if (base) {
    check_matrix("base", *base, tokens, d_in, site);
    check_dtype("base", *base, ScalarType::Float, "float32");
  }
  const CurrentDevice device(site);
  BypassBwdInput args{dtype,
                      tokens,
                      d_in,
                      d_out,
                      k,
                      grad.const_data_ptr(),
                      grad.stride(0),
                      int32_values(plan),
                      live,
                      float_values(delta),
                      nullptr,
                      out.mutable_data_ptr(),
                      out.stride(0),
                      base ? static_cast<const float*>(base->const_data_ptr()) : nullptr,
                      base ? base->stride(0) : 0};
  constexpr int64_t kWords = sizeof(WeightedNeuron) / sizeof(float);
  Tensor scratch = torch::stable::new_empty(delta, {bypass_bwd_input_entries(args, device.facts()), kWords});
  args.scratch = static_cast<WeightedNeuron*>(scratch.mutable_data_ptr());
  bypass_bwd_input(args, device.facts(), device.stream());
}

// Writes the order of dx for an index [d_out, k] into d_in columns to a copy of its plan.
void order_plan_op(const Tensor& plan, int64_t d_in, int64_t d_out, int64_t k, Tensor out) {
  const Site site = site_of("plan", plan);
  STD_TORCH_CHECK(0 <= d_in && d_in < INT32_MAX, "d_in: ", d_in, ", expected 0 to 2^31 - 2");
  STD_TORCH_CHECK(d_out >= 0 && k >= 0 && (k == 0 || d_out <= INT32_MAX / k), "d_out: ", d_out, " of k ", k,
                  ", expected fewer than 2^31 connections");
  const int64_t live = check_plan("plan", plan, d_in, d_out * k, site);
  STD_TORCH_CHECK(check_plan("out", out, d_in, d_out * k, site) == live, "out: shape ", shape_of(out),
                  ", expected that of plan, ", shape_of(plan));
  const int32_t *from = int32_values(plan), *to = int32_values(out);
  STD_TORCH_CHECK(from + plan.size(0) <= to || to + plan.size(0) <= from, "out: overlaps with plan, expected a copy");
  const CurrentDevice device(site);
  order_plan({d_in, d_out, k, int32_values(plan), live, static_cast<int32_t*>(out.mutable_data_ptr())}, device.facts(),
             device.stream());
}

Tensor sddmm_op(const Tensor& grad, const Tensor& x, const Tensor& index, std::optional<int64_t> whole_d_in) {
  const Site site = site_of("grad", grad);
  check_matrix("x", x, -1, -1, site);
  check_whole_d_in(whole_d_in, x);
  check_index(index, -1, site);
  const int64_t tokens = x.size(0), d_in = x.size(1), d_out = index.size(0), k = index.size(1);
  check_matrix("grad", grad, tokens, d_out, site);
  const DType dtype = element_dtype("grad", grad);
  check_same_dtype("x", x, dtype, "grad");
  const CurrentDevice device(site);
  Tensor out = torch::stable::new_empty(x, {d_out, k}, ScalarType::Float);
  Sddmm args{dtype,
             tokens,
             d_in,
             d_out,
             k,
             grad.const_data_ptr(),
             grad.stride(0),
             x.const_data_ptr(),
             x.stride(0),
             int32_values(index),
             nullptr,
             static_cast<float*>(out.mutable_data_ptr()),
             whole_d_in.value_or(d_in)};
  const int64_t parts = sddmm_parts(args, device.facts());
  Tensor partial = torch::stable::new_empty(x, {parts > 1 ? parts : 0, d_out, k}, ScalarType::Float);
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  sddmm(args, device.facts(), device.stream());
  return out;
}

// Checks a GEMM's weight: [rows, columns], in 16 bits, of the dtype of its first operand.
void check_weight(const Tensor& weight, int64_t rows, int64_t columns, const char* first, const Tensor& operand,
                  Site site) {
  const DType dtype = element_dtype(first, operand);
  STD_TORCH_CHECK(dtype != DType::f32, first, ": dtype float32, expected bfloat16 or float16");
  check_matrix("weight", weight, rows, columns, site);
  check_same_dtype("weight", weight, dtype, first);
}

// from weight^T + bias, or from weight, with round(weight + delta), which is never in global memory.
Tensor linear_patched(const char* name, const Tensor& from, const Tensor& weight, const Tensor& index,
                      const Tensor& delta, const std::optional<Tensor>& bias, bool forward) {
  const Site site = site_of(name, from);
  check_matrix(name, from, -1, -1, site);
  check_weight(weight, forward ? -1 : from.size(1), forward ? from.size(1) : -1, name, from, site);
  const int64_t tokens = from.size(0), d_out = weight.size(0), d_in = weight.size(1);
  check_index(index, d_out, site);
  const int64_t k = index.size(1);
  check_delta(delta, d_out, k, site);
  const DType dtype = dtype_of(name, from);
  if (bias) check_bias(*bias, d_out, dtype, site);
  const CurrentDevice device(site);
  Tensor out = torch::stable::new_empty(from, {tokens, forward ? d_out : d_in});
  if (out.numel() == 0) return out;
  Tensor start = torch::stable::new_empty(index, {linear_patched_starts(d_in, d_out, forward)});
  Tensor entry = new_entries(index);
  const LinearPatched args{dtype,
                           tokens,
                           d_in,
                           d_out,
                           k,
                           from.const_data_ptr(),
                           from.stride(0),
                           weight.const_data_ptr(),
                           weight.stride(0),
                           int32_values(index),
                           float_values(delta),
                           bias ? bias->const_data_ptr() : nullptr,
                           static_cast<int32_t*>(start.mutable_data_ptr()),
                           static_cast<BlockEntry*>(entry.mutable_data_ptr()),
                           out.mutable_data_ptr(),
                           out.stride(0)};
  (forward ? linear_patched_fwd : linear_patched_bwd_input)(args, device.facts(), device.stream());
  return out;
}

Tensor linear_patched_fwd_op(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& delta,
                             std::optional<Tensor> bias) {
  return linear_patched("x", x, weight, index, delta, bias, true);
}

Tensor linear_patched_bwd_input_op(const Tensor& grad, const Tensor& weight, const Tensor& index, const Tensor& delta) {
  return linear_patched("grad", grad, weight, index, delta, std::nullopt, false);
}

// onto += from weight^T + bias, or from weight: summed in float32, and rounded once.
void product_onto(const char* name, const Tensor& from, const Tensor& weight, const std::optional<Tensor>& bias,
                  Tensor& onto, bool forward) {
  const Site site = site_of(name, from);
  check_matrix(name, from, -1, -1, site);
  check_weight(weight, forward ? -1 : from.size(1), forward ? from.size(1) : -1, name, from, site);
  const int64_t tokens = from.size(0), d_out = weight.size(0), d_in = weight.size(1);
  const DType dtype = dtype_of(name, from);
  check_matrix("onto", onto, tokens, forward ? d_out : d_in, site);
  check_written("onto", onto);
  check_same_dtype("onto", onto, dtype, name);
  if (bias) check_bias(*bias, d_out, dtype, site);
  if (onto.numel() == 0) return;
  const CurrentDevice device(site);
  const ProductOnto args{dtype,
                         tokens,
                         d_in,
                         d_out,
                         from.const_data_ptr(),
                         from.stride(0),
                         weight.const_data_ptr(),
                         weight.stride(0),
                         bias ? bias->const_data_ptr() : nullptr,
                         onto.mutable_data_ptr(),
                         onto.stride(0)};
  (forward ? product_onto_fwd : product_onto_bwd_input)(args, device.facts(), device.stream());
}

void product_onto_fwd_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, Tensor onto) {
  product_onto("x", x, weight, bias, onto, true);
}

void product_onto_bwd_input_op(const Tensor& grad, const Tensor& weight, Tensor onto) {
  product_onto("grad", grad, weight, std::nullopt, onto, false);
}

// Shared by the four ops on the chosen entries of W; delta may be null.
void run_merge(MergeMode mode, const Tensor& weight, const Tensor& index, const Tensor* delta, const Tensor& original) {
  const Site site = site_of("weight", weight);
  check_matrix("weight", weight, -1, -1, site);
  check_index(index, weight.size(0), site);
  const int64_t d_out = weight.size(0), d_in = weight.size(1), k = index.size(1);
  const DType dtype = element_dtype("weight", weight);
  if (delta) check_delta(*delta, d_out, k, site);
  check_slots("original", original, d_out, k, site);
  check_same_dtype("original", original, dtype, "weight");
  if (writes_weight(mode)) check_written("weight", weight);
  const CurrentDevice device(site);
  merge({dtype, mode, d_in, d_out, k, data_of(weight, writes_weight(mode)), weight.stride(0), int32_values(index),
         delta ? float_values(*delta) : nullptr, data_of(original, writes_original(mode))},
        device.facts(), device.stream());
}

Tensor new_original(const Tensor& weight, const Tensor& index) {
  STD_TORCH_CHECK(index.dim() == 2, "index: shape ", shape_of(index), ", expected a matrix");
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

// x[:, columns], and zero for a column outside x.
Tensor columns_op(const Tensor& x, const Tensor& columns) {
  const Site site = site_of("x", x);
  check_matrix("x", x, -1, -1, site);
  const DType dtype = element_dtype("x", x);
  STD_TORCH_CHECK(columns.dim() == 1, "columns: shape ", shape_of(columns), ", expected one dimension");
  check_site("columns", columns, site);
  check_dtype("columns", columns, ScalarType::Int, "int32");
  check_contiguous("columns", columns);
  check_storage("columns", columns);
  const CurrentDevice device(site);
  const int64_t tokens = x.size(0), count = columns.size(0);
  Tensor out = torch::stable::new_empty(x, {tokens, count});
  cuda::columns(
      {dtype, tokens, x.size(1), count, x.const_data_ptr(), x.stride(0), int32_values(columns), out.mutable_data_ptr()},
      device.facts(), device.stream());
  return out;
}

}  // namespace

#ifdef NEUROADA_HOST_CUDA  // tests/cuda/host_library.cpp: this glue and the kernels on the CPU
STABLE_TORCH_LIBRARY_IMPL(neuroada_host_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(neuroada_C, CUDA, m) {
#endif
  m.impl("bypass_fwd", TORCH_BOX(&bypass_fwd_op));
  m.impl("bypass_bwd_input", TORCH_BOX(&bypass_bwd_input_op));
  m.impl("order_plan", TORCH_BOX(&order_plan_op));
  m.impl("sddmm", TORCH_BOX(&sddmm_op));
  m.impl("linear_patched_fwd", TORCH_BOX(&linear_patched_fwd_op));
  m.impl("linear_patched_bwd_input", TORCH_BOX(&linear_patched_bwd_input_op));
  m.impl("product_onto_fwd", TORCH_BOX(&product_onto_fwd_op));
  m.impl("product_onto_bwd_input", TORCH_BOX(&product_onto_bwd_input_op));
  m.impl("merge", TORCH_BOX(&merge_op));
  m.impl("gather", TORCH_BOX(&gather_op));
  m.impl("patch", TORCH_BOX(&patch_op));
  m.impl("restore", TORCH_BOX(&restore_op));
  m.impl("columns", TORCH_BOX(&columns_op));
}

}  // namespace neuroada::cuda
