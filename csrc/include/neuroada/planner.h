// The index planner: from index [d_out, k], the entries sorted by column, for the transposed product.
//
// A plan is one int32 array, so that it travels as one tensor:
//   column_start [d_in + 1]   the entries of column c are entry[column_start[c] .. column_start[c + 1])
//   split [kSplits + 1]       columns at which the work falls into kSplits parts of equal size
//   order [order_size]        facts, and the columns by position in the GPU's dx kernel; zeros if there is no order
//   entry [live]              j * k + s of each connection, by column; within one ascending, or as the order has them
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace neuroada {

inline constexpr int64_t kSplits = 64;

// An order is four facts about the kernel that it is for (csrc/cuda/order_facts.cuh), then columns in windows of 64.
inline constexpr int64_t kOrderFacts = 4, kOrderWindow = 64;
inline int64_t order_size(int64_t d_in) {
  return kOrderFacts + (d_in + kOrderWindow - 1) / kOrderWindow * kOrderWindow;
}

// Always inlined: callers may be compiled for AVX-512, and the linker might keep that copy for all callers.
struct PlanView {
  const int32_t* column_start;
  const int32_t* split;
  const int32_t* order;
  const int32_t* entry;
  int64_t d_in;

  __attribute__((always_inline)) PlanView(const int32_t* plan, int64_t d_in)
      : column_start(plan),
        split(plan + d_in + 1),
        order(split + kSplits + 1),
        entry(order + order_size(d_in)),
        d_in(d_in) {}

  __attribute__((always_inline)) int64_t live() const { return column_start[d_in]; }

  // The first column of part `part` of `parts`, rounded down to a stored split.
  __attribute__((always_inline)) int64_t boundary(int64_t part, int64_t parts) const {
    return split[kSplits * part / parts];
  }
};

inline int64_t plan_size(int64_t d_in, int64_t live) { return d_in + 1 + kSplits + 1 + order_size(d_in) + live; }

// Returns the number of connections in index [d_out, k]; -1 marks a slot without one. If a column is
// out of range or occurs twice in its row, sets `error` and returns -1.
int64_t check_index(const int32_t* index, int64_t d_out, int64_t k, int64_t d_in, std::string& error);

// Writes the plan_size(d_in, live) values of the plan of a checked index.
void plan_index(const int32_t* index, int64_t d_out, int64_t k, int64_t d_in, int32_t* plan);

// The bank of a GPU's shared memory, seen as eight banks of 16 bytes, in which the kernels stage a column.
inline constexpr int kBanks = 8;
inline int bank_of(int32_t column) { return (column ^ column >> 3) & (kBanks - 1); }

// Permutes each row of index [d_out, k] to reduce bank conflicts: an octet of neurons, whose reads of one slot a GPU
// serves together, then reads from as many banks as possible; a bank is read once per column that is read in it. A
// lane has two neighbouring neurons, so an octet is every second one of sixteen. The order depends on the index only.
void order_slots(int32_t* index, int64_t d_out, int64_t k);

}  // namespace neuroada
