// Splits the tokens of an SDDMM into chunks whose number depends on the shape only. The order of summation is
// fixed within a chunk and over the chunks, so the result is bitwise the same for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "sizes.h"

namespace neuroada::cpu::NEUROADA_ISA {

inline constexpr int64_t kChunkTokens = 128;
inline constexpr int64_t kMostChunks = 16;  // 64 bytes of partial sums per bypass, in float32

struct TokenChunks {
  int64_t tokens, length, count;

  // The length of a chunk is a multiple of a block's.
  TokenChunks(int64_t tokens, int64_t block) : tokens(tokens) {
    const int64_t wanted = std::max<int64_t>(1, std::min(kMostChunks, ceil_div(tokens, kChunkTokens)));
    length = std::max<int64_t>(1, ceil_div(ceil_div(tokens, wanted), block)) * block;
    count = ceil_div(tokens, length);
  }

  int64_t begin(int64_t chunk) const { return chunk * length; }
  int64_t end(int64_t chunk) const { return std::min(tokens, (chunk + 1) * length); }
};

// Calls f(chunk, first, last) for the groups of neurons [first, last) of each chunk: all of them, or ranges where
// the chunks are fewer than the threads.
template <class F>
void each_chunk(const TokenChunks& chunks, int64_t groups, const Executor& executor, F&& f) {
  const int64_t count = chunks.count, threads = executor.threads;
  const int64_t ranges = count == 0 ? 1 : std::max<int64_t>(1, std::min(ceil_div(threads, count), groups));
  executor.parallel(count * ranges, [&](int64_t task) {
    const int64_t range = task % ranges;
    f(task / ranges, groups * range / ranges, groups * (range + 1) / ranges);
  });
}

// Calls f(group) for all groups, which have `sums` partial sums altogether.
template <class F>
void each_group(int64_t groups, int64_t sums, const Executor& all, F&& f) {
  all.limited(sums).parallel_ranges(groups, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) f(group);
  });
}

// The multiply-adds and staged elements of an SDDMM, the unit of Executor::limited().
inline int64_t work_of(const Sddmm& a) { return a.tokens * (a.d_in + a.d_out * (a.k + 1)); }

}  // namespace neuroada::cpu::NEUROADA_ISA
