// Untransposed rows of one or two matrices, those of a token adjacent, in a circular buffer of stages in shared memory
// that bulk asynchronous copies (sm_90a) fill. For kernels that do so little work per row that they are bound by memory
// bandwidth.
#pragma once

#include "hopper.cuh"
#include "staging.cuh"

namespace neuroada::cuda {

// Maximum number of stages.
constexpr int kRingStages = 8;

// One barrier per stage, then the stages. A row holds the values of the first matrix, then of the second.
struct Ring {
  int32_t rows, stages;         // per stage, and of the buffer
  int32_t width, second_width;  // values per row of each matrix, multiples of 8

  static constexpr int32_t kBarrierBytes = kRingStages * 8;
  __host__ __device__ int32_t row() const { return width + second_width; }
  template <class T>
  __host__ __device__ int64_t bytes() const {
    return kBarrierBytes + int64_t{stages} * rows * row() * static_cast<int64_t>(sizeof(T));
  }
};

// Rows of a matrix; `width` values of each are read.
template <class T>
struct RowsOf {
  const T* data;
  int64_t stride;
  int32_t width;
};

// The tokens [begin, end) of both matrices; the second may have width 0.
template <class T, bool kBulk>
struct TokenRows {
  const Ring& ring;
  RowsOf<T> first, second;
  int64_t begin, end;

  // Starts the copies into all stages.
  __device__ __forceinline__ void start() const {
#ifdef NEUROADA_HOPPER
    if constexpr (kBulk) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < ring.stages; ++i) init_barrier(full(i), 1);
        publish_barriers();
      }
      __syncthreads();
      for (int i = 0; i < ring.stages; ++i) copy(i, begin + int64_t{i} * ring.rows);
    }
#endif
  }

  // Calls read(token, row of the first, row of the second) for each token in order.
  template <class Read>
  __device__ __forceinline__ void for_each(Read&& read) const {
    if constexpr (kBulk) {
      for_each_copied(read);
    } else {
      NEUROADA_ROLLED
      for (int64_t t = begin; t < end; ++t) read(t, first.data + t * first.stride, second.data + t * second.stride);
    }
  }

 private:
#ifdef NEUROADA_HOPPER
  __device__ __forceinline__ Barrier& full(int stage) const {
    return reinterpret_cast<Barrier*>(shared_quads())[stage];
  }
  __device__ __forceinline__ T* row_of(int stage, int32_t row) const {
    T* stages = reinterpret_cast<T*>(shared_quads() + Ring::kBarrierBytes / 16);
    return stages + (stage * ring.rows + row) * ring.row();
  }
  __device__ __forceinline__ int32_t rows_from(int64_t t) const {
    return static_cast<int32_t>(end - t < ring.rows ? end - t : ring.rows);
  }

  // One lane copies each row. All threads have read the overwritten stage: see RawBlocks::copy.
  __device__ __forceinline__ void copy(int stage, int64_t t) const {
    const int32_t row = static_cast<int32_t>(threadIdx.x), count = t < end ? rows_from(t) : 0;
    if (row >= count) return;
    const uint32_t bytes = static_cast<uint32_t>(first.width) * sizeof(T),
                   second_bytes = static_cast<uint32_t>(second.width) * sizeof(T);
    fence_operands();
    if (row == 0) arrive_expecting(full(stage), (bytes + second_bytes) * static_cast<uint32_t>(count));
    copy_bulk(row_of(stage, row), first.data + (t + row) * first.stride, bytes, full(stage));
    if (second_bytes == 0) return;
    copy_bulk(row_of(stage, row) + ring.width, second.data + (t + row) * second.stride, second_bytes, full(stage));
  }
#endif

  template <class Read>
  __device__ __forceinline__ void for_each_copied(Read&& read) const {
#ifdef NEUROADA_HOPPER
    int stage = 0;
    uint32_t parity = 0;
    for (int64_t t = begin; t < end; t += ring.rows) {
      wait(full(stage), parity);
      const T* row = row_of(stage, 0);
      const int32_t rows = rows_from(t);
      NEUROADA_ROLLED
      for (int32_t r = 0; r < rows; ++r, row += ring.row()) read(t + r, row, row + ring.width);
      __syncthreads();  // all threads have read the stage
      copy(stage, t + int64_t{ring.stages} * ring.rows);
      if (++stage == ring.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
#endif
  }
};

// Adjacent neurons whose values of a token are read or written by one access.
constexpr int kGroup = 8;

// The neurons of a CTA.
struct NeuronPart {
  int64_t first;
  int32_t count;

  __device__ __forceinline__ static NeuronPart of_cta(int32_t neurons_per_part, int64_t all) {
    const int64_t first = int64_t{blockIdx.x} * neurons_per_part, left = all - first;
    return {first, left < neurons_per_part ? static_cast<int32_t>(left) : neurons_per_part};
  }
};

// The columns of a lane's groups of neurons for one slot, 16 bits each; column 0 in a slot without a connection.
template <int kGroups>
struct GroupColumns {
  uint32_t both[kGroups][kGroup / 2];

  __device__ __forceinline__ static int32_t first_neuron(int group) {
    return kGroup * static_cast<int32_t>(group * blockDim.x + threadIdx.x);
  }

  // -1 without a connection.
  __device__ __forceinline__ static int32_t column_of(const int32_t* index, int32_t neuron, int32_t neurons,
                                                      int64_t d_in) {
    const int32_t column = neuron < neurons ? index[neuron] : -1;
    return static_cast<uint32_t>(column) < static_cast<uint32_t>(d_in) ? column : -1;
  }

  // `index` begins with the CTA's first neuron, of `neurons`.
  __device__ __forceinline__ void load(const int32_t* index, int32_t neurons, int64_t d_in) {
    NEUROADA_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      NEUROADA_UNROLL
      for (int n = 0; n < kGroup; n += 2) {
        const int32_t neuron = first_neuron(group) + n;
        const int32_t even = column_of(index, neuron, neurons, d_in), odd = column_of(index, neuron + 1, neurons, d_in);
        both[group][n / 2] = static_cast<uint32_t>(even < 0 ? 0 : even) | static_cast<uint32_t>(odd < 0 ? 0 : odd)
                                                                              << 16;
      }
    }
  }
  __device__ __forceinline__ uint32_t operator()(int group, int n) const {
    return both[group][n / 2] >> 16 * (n % 2) & 0xffff;
  }
};

}  // namespace neuroada::cuda
