// The order in which an octet of lanes reads the connections of its columns, as a sequence of matchings of lanes with
// banks. csrc/order_slots.cpp orders the slots of neurons likewise, and explains why. It takes one thread per octet and
// many steps, so it is done once, not in each backward.
#pragma once

#include "device.cuh"
#include "neuroada/planner.h"

namespace neuroada::cuda {

// Eight numbers of four bits.
struct Nibbles {
  uint32_t bits = 0;

  __device__ __forceinline__ int operator[](int i) const { return static_cast<int>(bits >> 4 * i & 15); }
  __device__ __forceinline__ void set(int i, int value) {
    bits = (bits & ~(15u << 4 * i)) | static_cast<uint32_t>(value) << 4 * i;
  }
};

__device__ __forceinline__ int first_in(uint32_t set) { return __ffs(static_cast<int>(set)) - 1; }

// Eight lanes, and how many unread connections each has in each bank. Sets of lanes and of banks are bit masks.
struct Octet {
  uint16_t (*left)[kBanks];  // [lane][bank], in shared memory
  Nibbles choice{};          // the bank of each lane in the current step
  uint32_t free = 0;         // lanes without a bank so far

  __device__ __forceinline__ uint32_t lanes_of(int bank) const {
    uint32_t lanes = 0;
    for (int lane = 0; lane < kBanks; ++lane) lanes |= left[lane][bank] > 0 ? 1u << lane : 0;
    return lanes;
  }
  __device__ __forceinline__ int32_t left_of(int bank) const {
    int32_t sum = 0;
    for (int lane = 0; lane < kBanks; ++lane) sum += left[lane][bank];
    return sum;
  }

  // Gives the bank to one more lane: a free one, or one whose bank can move to another lane (an augmenting path).
  __device__ bool give(int bank, uint32_t active) {
    Nibbles from{}, by{};  // the bank from which a lane was reached, and the lane from which a bank was
    uint32_t reached = 0, open = 1u << bank, seen = open;
    while (open != 0) {
      int at = first_in(open);
      open &= open - 1;
      const uint32_t lanes = lanes_of(at) & active & ~reached;
      if ((lanes & free) != 0) {
        int lane = first_in(lanes & free);
        for (uint32_t rest = lanes & free; rest != 0; rest &= rest - 1) {
          if (left[first_in(rest)][at] > left[lane][at]) lane = first_in(rest);
        }
        free &= ~(1u << lane);
        choice.set(lane, at);
        while (at != bank) {
          lane = by[at];
          at = from[lane];
          choice.set(lane, at);
        }
        return true;
      }
      reached |= lanes;
      for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int lane = first_in(rest), own = choice[lane];
        from.set(lane, at);
        if ((seen >> own & 1) != 0) continue;
        seen |= 1u << own;
        open |= 1u << own;
        by.set(own, lane);
      }
    }
    return false;
  }

  // Chooses the banks of the `active` lanes for the next of `steps` steps. Banks with the most connections left come
  // first; none is read more often than the fullest one needs, unless a lane would have no bank.
  __device__ void choose(uint32_t active, int32_t steps) {
    free = active;
    int32_t bank_left[kBanks], most = 0;
    NEUROADA_UNROLL
    for (int b = 0; b < kBanks; ++b) {
      bank_left[b] = left_of(b);
      most = most < bank_left[b] ? bank_left[b] : most;
    }
    Nibbles reads{};
    for (int most_reads = most > steps ? (most + steps - 1) / steps : 1; free != 0; ++most_reads) {
      for (uint32_t open = (1u << kBanks) - 1; free != 0 && open != 0;) {
        int best = -1;
        int32_t best_left = 0;
        NEUROADA_UNROLL
        for (int b = 0; b < kBanks; ++b) {
          const int32_t after = bank_left[b] - reads[b];
          if ((open >> b & 1) != 0 && (best < 0 || after > best_left)) {
            best = b;
            best_left = after;
          }
        }
        const bool given = reads[best] < most_reads && give(best, active);
        if (given) reads.set(best, reads[best] + 1);
        if (!given || reads[best] >= most_reads) open &= ~(1u << best);
      }
    }
  }

  // Removes the connections that the step reads.
  __device__ __forceinline__ void take(uint32_t active) {
    for (; active != 0; active &= active - 1) --left[first_in(active)][choice[first_in(active)]];
  }
};

}  // namespace neuroada::cuda
