// out[j, s] = sum_t grad[t, j] x[t, index[j, s]]
//
// Tokens are cut into chunks whose number follows from the shape alone; each chunk's sums are taken
// in one order, and the chunks' sums are added in theirs: the same bits for any number of threads.
#include "entry.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

constexpr int64_t kChunkTokens = 128;
constexpr int64_t kMostChunks = 16;  // 64 bytes of partial sums a bypass, in float32

template <class T, int vectors>
void run(const Sddmm& a, const Executor& executor) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>, block = kBlock<A, vectors>;
  const int64_t wanted = std::min(kMostChunks, (a.tokens + kChunkTokens - 1) / kChunkTokens);
  const int64_t per_chunk = wanted == 0 ? block : ((a.tokens + wanted - 1) / wanted + block - 1) / block * block;
  const int64_t chunks = (a.tokens + per_chunk - 1) / per_chunk;
  const int64_t groups = (a.d_out + lanes - 1) / lanes;  // of `lanes` neurons
  const int64_t ranges =
      chunks == 0 ? 1 : std::max<int64_t>(1, std::min((executor.threads + chunks - 1) / chunks, groups));

  // partial[chunk][group][s][lane]: one vector an entry slot, so that adding needs no shuffling.
  const int64_t chunk_size = groups * a.k * lanes;
  const Scratch<A> partial = make_scratch<A>(chunks * chunk_size);
  executor.parallel(chunks * ranges, [&](int64_t task) {
    const int64_t chunk = task / ranges, range = task % ranges;
    const int64_t first = groups * range / ranges, last = groups * (range + 1) / ranges;
    A* sums = partial.get() + chunk * chunk_size;
    std::fill(sums + first * a.k * lanes, sums + last * a.k * lanes, A{0});
    const Scratch<A> staged = make_scratch<A>(a.d_in * block);
    const int64_t end = std::min(a.tokens, (chunk + 1) * per_chunk);
    for (int64_t t = chunk * per_chunk; t < end; t += block) {
      const int64_t tokens = std::min<int64_t>(block, end - t);
      stage_transposed<A, block>(static_cast<const T*>(a.x) + t * a.x_stride, a.x_stride, tokens, 0, a.d_in,
                                 staged.get());
      for (int64_t group = first; group < last; ++group) {
        const int64_t j = group * lanes;
        const int width = static_cast<int>(std::min<int64_t>(lanes, a.d_out - j));
        alignas(64) A grad[lanes * block];
        stage_transposed<A, block>(static_cast<const T*>(a.grad) + t * a.grad_stride, a.grad_stride, tokens, j,
                                   j + width, grad);
        const int32_t* index = a.index + j * a.k;
        for (int64_t s = 0; s < a.k; ++s) {
          Vec<A> product[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) {
            product[i] = zero<A>();
            const int32_t column = i < width ? index[i * a.k + s] : -1;
            if (column < 0) continue;
            const A* gathered = staged.get() + int64_t{column} * block;
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
              product[i] += load(grad + i * block + v * lanes) * load(gathered + v * lanes);
            }
          }
          A* sum = sums + (group * a.k + s) * lanes;
          store(sum, load(sum) + sum_rows<A>(product));
        }
      }
    }
  });

  const int64_t parts = std::min(executor.threads, groups * a.k / 1024 + 1);
  executor.parallel(parts, [&](int64_t part) {
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      const int width = static_cast<int>(std::min<int64_t>(lanes, a.d_out - group * lanes));
      for (int64_t s = 0; s < a.k; ++s) {
        Vec<A> sum = zero<A>();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum += load(partial.get() + chunk * chunk_size + (group * a.k + s) * lanes);
        }
        for (int i = 0; i < width; ++i) static_cast<A*>(a.out)[(group * lanes + i) * a.k + s] = sum[i];
      }
    }
  });
}

}  // namespace

void sddmm(const Sddmm& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) { run<decltype(element), 2>(args, executor); });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
