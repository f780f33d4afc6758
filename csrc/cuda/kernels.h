// The CUDA kernels as plain functions over pointers, sizes and strides. Matrices are row-major with unit stride along a
// row; strides count elements between rows. Sums are taken in float32, in an order that is fixed by the shapes, a plan
// and the device; no kernel synchronises or allocates. With bulk-copied blocks, dx sums in another order, and in
// bfloat16 with rounded deltas; whether blocks are bulk-copied also depends on the alignment of grad and its rows.
//
// dtype is float32, bfloat16 or float16. A column outside [0, d_in) marks a slot without a connection: it adds nothing,
// and nothing is read through it.
#pragma once

#include <cstdint>

#include "neuroada/dtype.h"
#include "neuroada/merge_mode.h"

namespace neuroada::cuda {

// Properties of the GPU to which launchers fit grids and tiles.
struct Device {
  int64_t shared_bytes;  // available to one CTA
  int64_t multiprocessors;
  int64_t threads = 512;             // per CTA of most kernels, a multiple of 32 and a power of two up to 512
  int64_t scratch_bytes = 32 << 20;  // limit of SDDMM's partial sums, but at least one part
  bool bulk_copies = false;          // 16-bit blocks come by bulk asynchronous copies of sm_90a
  bool two_tiles = false;            // and forward and SDDMM double-buffer their tiles
};

// out[t, j] = base[t, j] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
struct BypassFwd {
  DType dtype;  // of x, base, bias and out
  int64_t tokens, d_in, d_out, k;
  const void* x;  // [tokens, d_in]
  int64_t x_stride;
  const int32_t* index;  // [d_out, k]
  const float* delta;    // [d_out, k]
  const void* base;      // [tokens, d_out], or null for zero
  int64_t base_stride;
  const void* bias;  // [d_out], or null for zero
  void* out;         // [tokens, d_out], may be base itself
  int64_t out_stride;
  bool wide_base = false;  // base is float32, whatever dtype is
};

// A connection as the transposed product reads it.
struct alignas(8) WeightedNeuron {
  int32_t neuron;
  float delta;
};

// out[t, c] = base[t, c] + the sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
struct BypassBwdInput {
  DType dtype;  // of grad and out
  int64_t tokens, d_in, d_out, k;
  const void* grad;  // [tokens, d_out]
  int64_t grad_stride;
  const int32_t* plan;  // [plan_size(d_in, live)], see neuroada/planner.h; ordered for the same Device, or unordered
  int64_t live;
  const float* delta;       // [d_out, k]
  WeightedNeuron* scratch;  // [bypass_bwd_input_entries], 16-byte aligned
  void* out;                // [tokens, d_in]
  int64_t out_stride;
  const float* base = nullptr;  // [tokens, d_in], or null for zero
  int64_t base_stride = 0;
};

// Stores in a copy of a plan of index [d_out, k] the order in which bypass_bwd_input reads its columns and entries, so
// that calls in 16 bits without a base need not compute it. With such a plan, sums are taken in another order than
// without.
struct OrderPlan {
  int64_t d_in, d_out, k;
  const int32_t* plan;  // [plan_size(d_in, live)]
  int64_t live;
  int32_t* out;  // a copy of the plan
};

constexpr int kGroupNeurons = 16;

// A connection of a group of neurons: its entry e = j * k + s, its column within the block, its row j within the group.
struct alignas(8) BlockEntry {
  int32_t e;
  uint16_t column, row;
};

// The connections of each group of neurons by blocks of columns. Those of group g begin at entry[16 g, 0]; of them,
// start[b, g] up to start[b + 1, g] are in block b, in ascending order of e.
struct BlockEntries {
  int64_t d_in, d_out, k;
  int64_t width;         // of a block, up to 65536 columns
  const int32_t* index;  // [d_out, k]
  int32_t* start;        // [blocks + 1, ceil(d_out / 16)]
  BlockEntry* entry;     // [d_out, k]
};

// out = from weight^T + bias, or out = from weight, where each weight[j, index[j, s]] is round(weight + delta[j, s]) as
// by `patch`, but only while its tile is in shared memory. On sm_90a.
struct LinearPatched {
  DType dtype;  // bfloat16 or float16: of from, weight, bias and out
  int64_t tokens, d_in, d_out, k;
  const void* from;  // x [tokens, d_in], or grad [tokens, d_out]
  int64_t from_stride;
  const void* weight;  // [d_out, d_in]
  int64_t weight_stride;
  const int32_t* index;  // [d_out, k]
  const float* delta;    // [d_out, k]
  const void* bias;      // [d_out], or null for zero and for grad
  int32_t* start;        // [linear_patched_starts], scratch
  BlockEntry* entry;     // [d_out, k], scratch
  void* out;             // [tokens, d_out], or [tokens, d_in]
  int64_t out_stride;
};

// onto = from weight^T + bias + onto, or onto = from weight + onto: summed in float32 and rounded once. On sm_90a, by
// CUTLASS.
struct ProductOnto {
  DType dtype;  // bfloat16 or float16: of from, weight, bias and onto
  int64_t tokens, d_in, d_out;
  const void* from;  // x [tokens, d_in], or grad [tokens, d_out]
  int64_t from_stride;
  const void* weight;  // [d_out, d_in]
  int64_t weight_stride;
  const void* bias;  // [d_out], or null for zero and for grad
  void* onto;        // [tokens, d_out], or [tokens, d_in]; overlaps nothing else
  int64_t onto_stride;
};

// out[j, s] = sum_t grad[t, j] x[t, index[j, s]], and zero in a slot without a connection
struct Sddmm {
  DType dtype;  // of grad and x
  int64_t tokens, d_in, d_out, k;
  const void* grad;  // [tokens, d_out]
  int64_t grad_stride;
  const void* x;  // [tokens, d_in]
  int64_t x_stride;
  const int32_t* index;    // [d_out, k]
  float* partial;          // [sddmm_parts, d_out, k], scratch; unused if sddmm_parts is 0 or 1
  float* out;              // [d_out, k]
  int64_t whole_d_in = 0;  // see csrc/cpu/kernels.h
};

using neuroada::MergeMode;

struct Merge {
  DType dtype;  // of weight and original
  MergeMode mode;
  int64_t d_in, d_out, k;
  void* weight;  // [d_out, d_in]
  int64_t weight_stride;
  const int32_t* index;  // [d_out, k]
  const float* delta;    // [d_out, k], for merge and patch
  void* original;        // [d_out, k], zero in a slot without a connection; written by merge and gather
};

// out[t, i] = x[t, columns[i]], and zero for a column outside [0, d_in)
struct ChosenColumns {
  DType dtype;  // of x and out
  int64_t tokens, d_in, count;
  const void* x;  // [tokens, d_in]
  int64_t x_stride;
  const int32_t* columns;  // [count], in any order; ascending ones are fastest
  void* out;               // [tokens, count]
};

// Launchers. `stream` is a cudaStream_t of the current device. They throw std::runtime_error, naming the kernel and
// CUDA's error.
void bypass_fwd(const BypassFwd&, const Device&, void* stream);
void bypass_bwd_input(const BypassBwdInput&, const Device&, void* stream);
void order_plan(const OrderPlan&, const Device&, void* stream);
void sddmm(const Sddmm&, const Device&, void* stream);
void columns(const ChosenColumns&, const Device&, void* stream);
void merge(const Merge&, const Device&, void* stream);
void block_entries(const BlockEntries&, const Device&, void* stream);

// Number of connections in the scratch of bypass_bwd_input.
int64_t bypass_bwd_input_entries(const BypassBwdInput&, const Device&);

// Number of parts of the tokens that SDDMM sums separately.
int64_t sddmm_parts(const Sddmm&, const Device&);

// These kernels copy their operands by TMA: x, weight, grad and onto must be 16-byte aligned, their strides and widths
// multiples of 8 elements, and no size zero. The launchers check that first.
void linear_patched_fwd(const LinearPatched&, const Device&, void* stream);
void linear_patched_bwd_input(const LinearPatched&, const Device&, void* stream);
void product_onto_fwd(const ProductOnto&, const Device&, void* stream);
void product_onto_bwd_input(const ProductOnto&, const Device&, void* stream);

// Number of offsets in LinearPatched::start.
int64_t linear_patched_starts(int64_t d_in, int64_t d_out, bool forward);

}  // namespace neuroada::cuda
