// The operations on the chosen entries of W; none touches other entries.
#pragma once

#include <cstdint>

namespace neuroada {

// Patch and restore assign, so that repeating them changes nothing.
enum class MergeMode : uint8_t {
  merge,    // original[j, s] = weight[j, index[j, s]], then weight[j, index[j, s]] += delta[j, s]
  gather,   // original[j, s] = weight[j, index[j, s]]
  patch,    // weight[j, index[j, s]] = original[j, s] + delta[j, s]
  restore,  // weight[j, index[j, s]] = original[j, s]
};

constexpr bool writes_weight(MergeMode mode) { return mode != MergeMode::gather; }
constexpr bool writes_original(MergeMode mode) { return mode == MergeMode::merge || mode == MergeMode::gather; }

}  // namespace neuroada
