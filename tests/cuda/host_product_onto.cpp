// Replaces csrc/cuda/product_onto_sm90.cuh, since CUTLASS does not run on a host: the same sums, in float32 and rounded
// once.
#include "cuda/product_onto_sm90.h"

namespace neuroada::cuda {
namespace {

template <class T>
float value(const void* data, int64_t at) {
  return widen(static_cast<const T*>(data)[at]);
}

// sum_d left[row, d] right[d, column]
template <class T>
float product(const OntoOperands& o, int64_t row, int64_t column) {
  float sum = 0;
  for (int64_t d = 0; d < o.left.columns; ++d) {
    const int64_t of_weight = o.rows_of_right ? d * o.weight.stride + column : column * o.weight.stride + d;
    sum += value<T>(o.left.data, row * o.left.stride + d) * value<T>(o.weight.data, of_weight);
  }
  return sum;
}

template <bool kForward>
void product_onto(const char* kernel, const ProductOnto& p) {
  const OntoOperands o = checked_onto_operands(kernel, p, kForward);
  with_element16(kernel, p.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t row = 0; row < o.onto.rows; ++row) {
      for (int64_t column = 0; column < o.onto.columns; ++column) {
        T& onto = static_cast<T*>(p.onto)[row * o.onto.stride + column];
        const float bias = kForward && p.bias != nullptr ? value<T>(p.bias, column) : 0;
        narrow(widen(onto) + (product<T>(o, row, column) + bias), onto);
      }
    }
  });
}

}  // namespace

void product_onto_fwd(const ProductOnto& p, const Device&, void*) { product_onto<true>("product_onto_fwd", p); }

void product_onto_bwd_input(const ProductOnto& p, const Device&, void*) {
  product_onto<false>("product_onto_bwd_input", p);
}

}  // namespace neuroada::cuda
