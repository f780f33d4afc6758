#include "product_onto_sm90.cuh"

namespace neuroada::cuda {

void product_onto_bwd_input(const ProductOnto& p, const Device& device, void* stream) {
  product_onto<false>("product_onto_bwd_input", p, device, stream);
}

}  // namespace neuroada::cuda
