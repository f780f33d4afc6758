// The GPU of a call: where its tensors lie, what its launchers fit their grids to, and torch's
// current stream on it.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>

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

// What a variable of the environment says, which may be 0 or 1, or else `otherwise`.
inline bool wants(const char* variable, bool otherwise) {
  const char* said = std::getenv(variable);
  if (said == nullptr) return otherwise;
  const std::string text = said;
  STD_TORCH_CHECK(text == "0" || text == "1", variable, ": '", text, "', expected 0 or 1");
  return text == "1";
}

// Whether the hardware may copy blocks of tokens ahead, where it can, and whether in two tiles.
inline bool wants_bulk_copies() { return wants("NEUROADA_CUDA_BULK", true); }
inline bool wants_two_tiles() { return wants("NEUROADA_CUDA_TWO_TILES", false); }

}  // namespace neuroada::cuda
