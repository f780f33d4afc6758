// Schemas of the private op namespace neuroada_C. One schema serves every device; the kernels of a
// device register themselves in <device>/ops. The public ops live in Python, in namespace neuroada.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(neuroada_C, m) {
  m.def(
      "bypass_fwd(Tensor x, Tensor index, Tensor delta, Tensor? bias, Tensor? base, "
      "Tensor(a!) out) -> ()");
  m.def("bypass_bwd_input(Tensor grad, Tensor plan, Tensor delta, Tensor(a!) out) -> ()");
  m.def("sddmm(Tensor grad, Tensor x, Tensor index) -> Tensor");
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor index, Tensor delta, Tensor? bias) -> Tensor");
  m.def("linear_bwd_input(Tensor grad, Tensor weight, Tensor plan, Tensor delta) -> Tensor");
  m.def("merge(Tensor(a!) weight, Tensor index, Tensor delta) -> Tensor");
}
