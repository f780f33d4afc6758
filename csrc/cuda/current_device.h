// The GPU of a call: where its tensors are, the properties that launchers fit grids to, and torch's current stream on
// it.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>

#include "kernels.h"
#include "neuroada/check.h"

namespace neuroada::cuda {

// That of the first argument; all others are checked to be on the same GPU.
Site site_of(const char* name, const Tensor& tensor);

// Makes the GPU the current one during its lifetime.
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

// The value of an environment variable, 0 or 1; `otherwise` if it is not set.
inline bool wants(const char* variable, bool otherwise) {
  const char* said = std::getenv(variable);
  if (said == nullptr) return otherwise;
  const std::string text = said;
  STD_TORCH_CHECK(text == "0" || text == "1", variable, ": '", text, "', expected 0 or 1");
  return text == "1";
}

// Whether blocks may be bulk-copied where supported, and whether into double-buffered tiles.
inline bool wants_bulk_copies() { return wants("NEUROADA_CUDA_BULK", true); }
inline bool wants_two_tiles() { return wants("NEUROADA_CUDA_TWO_TILES", false); }

}  // namespace neuroada::cuda
