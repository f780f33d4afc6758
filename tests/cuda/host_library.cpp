// The torch glue of the CUDA backend and its kernels, as ops of namespace neuroada_host_cuda on CPU
// tensors: for host_ops.py, where there is no GPU.
#include "cuda/current_device.h"
#include "neuroada/schemas.h"

STABLE_TORCH_LIBRARY(neuroada_host_cuda, m) { neuroada::define_ops(m); }

namespace neuroada::cuda {

Site site_of(const char* name, const Tensor& tensor) {
  check_site(name, tensor, kCpu);
  return kCpu;
}

// Small, so that the cases are partitioned as large ones are on a GPU.
CurrentDevice::CurrentDevice(Site)
    : facts_{24 << 10, 3, 64, 1 << 20, wants_bulk_copies(), wants_two_tiles()}, stream_(nullptr) {}

}  // namespace neuroada::cuda
