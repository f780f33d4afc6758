#include "product_onto_sm90.cuh"

namespace neuroada::cuda {

void product_onto_fwd(const ProductOnto& p, const Device& device, void* stream) {
  product_onto<true>("product_onto_fwd", p, device, stream);
}

}  // namespace neuroada::cuda
