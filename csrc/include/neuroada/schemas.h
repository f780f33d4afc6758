// The schemas of the compiled ops; cpu/kernels.h and cuda/kernels.h hold their formulas.
#pragma once

#include <torch/csrc/stable/library.h>

namespace neuroada {

template <class Library>
void define_ops(Library& m) {
  m.def(
      "bypass_fwd(Tensor x, Tensor index, Tensor delta, Tensor? bias, Tensor? base, "
      "Tensor(a!) out) -> ()");
  m.def("bypass_bwd_input(Tensor grad, Tensor plan, Tensor delta, Tensor? base, Tensor(a!) out) -> ()");
  // GPU only: writes the order in which bypass_bwd_input reads the plan into out, a copy of it.
  m.def("order_plan(Tensor plan, int d_in, int d_out, int k, Tensor(a!) out) -> ()");
  // x may lack columns; given the d_in of the full x, the sums are bitwise the same.
  m.def("sddmm(Tensor grad, Tensor x, Tensor index, int? d_in=None) -> Tensor");
  m.def("merge(Tensor(a!) weight, Tensor index, Tensor delta) -> Tensor");
  // The next three on the CPU only; linear_bwd is linear_bwd_input and sddmm in one call, which saves
  // microseconds.
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor index, Tensor delta, Tensor? bias) -> Tensor");
  m.def("linear_bwd_input(Tensor grad, Tensor weight, Tensor plan, Tensor delta) -> Tensor");
  m.def(
      "linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor index, Tensor plan, Tensor delta) -> "
      "(Tensor, Tensor)");
  // GEMMs with round(W + delta), which is formed only in the kernel's staged copies of W; on sm_90a only.
  m.def("linear_patched_fwd(Tensor x, Tensor weight, Tensor index, Tensor delta, Tensor? bias) -> Tensor");
  m.def("linear_patched_bwd_input(Tensor grad, Tensor weight, Tensor index, Tensor delta) -> Tensor");
  // GEMMs accumulated onto `onto` in float32 and rounded once; on sm_90a only, if built with CUTLASS.
  m.def("product_onto_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) onto) -> ()");
  m.def("product_onto_bwd_input(Tensor grad, Tensor weight, Tensor(a!) onto) -> ()");
  // On the CPU only; by: 0 value, 1 magnitude, 2 smallest magnitude.
  m.def("largest(Tensor scores, int k, int by) -> Tensor");
  // x[:, columns]; on the CPU a column that x lacks is an error, on a GPU it is zero.
  m.def("columns(Tensor x, Tensor columns) -> Tensor");
  m.def("gather(Tensor weight, Tensor index) -> Tensor");
  m.def("patch(Tensor(a!) weight, Tensor index, Tensor delta, Tensor original) -> ()");
  m.def("restore(Tensor(a!) weight, Tensor index, Tensor original) -> ()");
}

}  // namespace neuroada
