// The GPU of a call: where its tensors lie, what its launchers fit their grids to, and torch's
// current stream on it.
#pragma once

#include <optional>

#include "kernels.h"
#include "neuroada/check.h"

namespace neuroada::cuda {

// Of the first argument; everything else is checked to lie there too.
Site site_of(const char* name, const Tensor& tensor);

// While it lives, the GPU is the current one.
class CurrentDevice {
 public:
  explicit CurrentDevice(Site site);

  const Device& facts() const { return facts_; }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Device facts_;
  void* stream_;
};

}  // namespace neuroada::cuda
