// See current_device.h. Loading this needs neither torch's CUDA library nor a GPU: symbols and attributes are looked up
// at the first call.
#include "current_device.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

namespace neuroada::cuda {
namespace {

void check(int gpu, const char* call, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "cuda:", gpu, ": ", call, ": ", cudaGetErrorName(error), ", ",
                  cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int gpu) {
  int value = 0;
  check(gpu, "cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, which, gpu));
  return value;
}

Device facts_of(int gpu) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(gpu);
  if (found != known.end()) return found->second;
  Device facts{attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu), attribute(cudaDevAttrMultiProcessorCount, gpu)};
  facts.bulk_copies = attribute(cudaDevAttrComputeCapabilityMajor, gpu) == 9 &&
                      attribute(cudaDevAttrComputeCapabilityMinor, gpu) == 0;  // the kernels are for sm_90a
  return known[gpu] = facts;
}

// CPU builds of torch lack this part of the stable ABI, so it is looked up instead of linked: first among this
// library's dependencies, then in libtorch_cuda.so.
using GetStream = AOTITorchError (*)(int32_t gpu, void** stream);

GetStream find_get_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, kName);
  if (found == nullptr) {
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, kName);
  }
  return reinterpret_cast<GetStream>(found);
}

void* current_stream(int gpu) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream != nullptr, "cuda:", gpu, ": this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(gpu, &stream) == AOTI_TORCH_SUCCESS, "cuda:", gpu, ": torch gives no current stream");
  return stream;
}

}  // namespace

Site site_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": not on a GPU, expected a CUDA tensor");
  return {true, tensor.get_device_index()};
}

// torch has its own CUDA runtime; the device must also be set in this library's runtime.
CurrentDevice::CurrentDevice(Site site)
    : guard_(site.gpu), facts_(facts_of(site.gpu)), stream_(current_stream(site.gpu)) {
  check(site.gpu, "cudaSetDevice", cudaSetDevice(site.gpu));
  facts_.bulk_copies = wants_bulk_copies() && facts_.bulk_copies;
  facts_.two_tiles = wants_two_tiles() && facts_.bulk_copies;
}

}  // namespace neuroada::cuda
