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

// Neurons are taken in groups of one vector. partial[chunk][group][s] is the vector of a slot's sums.
template <class A>
struct Partial {
  int64_t tokens_a_chunk, chunks, groups, k;
  Scratch<A> sums;

  Partial(int64_t tokens, int64_t d_out, int64_t k, int64_t block) : groups((d_out + kLanes<A> - 1) / kLanes<A>), k(k) {
    const int64_t wanted = std::max<int64_t>(1, std::min(kMostChunks, (tokens + kChunkTokens - 1) / kChunkTokens));
    tokens_a_chunk = std::max<int64_t>(1, ((tokens + wanted - 1) / wanted + block - 1) / block) * block;
    chunks = (tokens + tokens_a_chunk - 1) / tokens_a_chunk;
    sums = make_scratch<A>(chunks * groups * k * kLanes<A>);
  }

  A* at(int64_t chunk, int64_t group) const { return sums.get() + (chunk * groups + group) * k * kLanes<A>; }
};

// Adds a block of tokens to the sums of the `width` neurons of a group: grad [neuron][block] and
// staged x [column][block] are dotted along the block, and the lanes of each dot added up last.
template <class A, int block>
inline void add_block(const A* grad, const A* staged, const int32_t* index, int width, int64_t k, A* sums) {
  constexpr int lanes = kLanes<A>, vectors = block / lanes;
  for (int64_t s = 0; s < k; ++s) {
    Vec<A> product[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      product[i] = zero<A>();
      const int32_t column = i < width ? index[i * k + s] : -1;
      if (column < 0) continue;
      const A* gathered = staged + int64_t{column} * block;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        product[i] += load(grad + i * block + v * lanes) * load(gathered + v * lanes);
      }
    }
    A* sum = sums + s * lanes;
    store(sum, load(sum) + sum_rows<A>(product));
  }
}

// The sums of one chunk for the groups [first, last).
template <class T, int block>
void sum_chunk(const Sddmm& a, const Partial<accumulate_t<T>>& partial, int64_t chunk, int64_t first, int64_t last) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>;
  std::fill(partial.at(chunk, first), partial.at(chunk, last), A{0});
  const Scratch<A> staged = make_scratch<A>(a.d_in * block);
  const int64_t end = std::min(a.tokens, (chunk + 1) * partial.tokens_a_chunk);
  for (int64_t t = chunk * partial.tokens_a_chunk; t < end; t += block) {
    const int64_t tokens = std::min<int64_t>(block, end - t);
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
    const T* grad = static_cast<const T*>(a.grad) + t * a.grad_stride;
    stage_transposed<A, block>(x, a.x_stride, tokens, 0, a.d_in, a.d_in, staged.get());
    for (int64_t group = first; group < last; ++group) {
      const int64_t j = group * lanes;
      const int width = static_cast<int>(std::min<int64_t>(lanes, a.d_out - j));
      alignas(64) A grad_staged[lanes * block];
      stage_transposed<A, block>(grad, a.grad_stride, tokens, j, j + width, a.d_out, grad_staged);
      add_block<A, block>(grad_staged, staged.get(), a.index + j * a.k, width, a.k, partial.at(chunk, group));
    }
  }
}

template <class A>
void add_chunks(const Partial<A>& partial, int64_t group, int64_t d_out, A* out) {
  constexpr int lanes = kLanes<A>;
  const int width = static_cast<int>(std::min<int64_t>(lanes, d_out - group * lanes));
  for (int64_t s = 0; s < partial.k; ++s) {
    Vec<A> sum = zero<A>();
    for (int64_t chunk = 0; chunk < partial.chunks; ++chunk) sum += load(partial.at(chunk, group) + s * lanes);
    for (int i = 0; i < width; ++i) out[(group * lanes + i) * partial.k + s] = sum[i];
  }
}

template <class T, int block>
void run(const Sddmm& a, const Executor& all) {
  using A = accumulate_t<T>;
  const Executor executor = all.limited(a.tokens * (a.d_in + a.d_out * (a.k + 1)));
  const Partial<A> partial(a.tokens, a.d_out, a.k, block);
  const int64_t chunks = partial.chunks, groups = partial.groups, threads = executor.threads;
  const int64_t ranges = chunks == 0 ? 1 : std::max<int64_t>(1, std::min((threads + chunks - 1) / chunks, groups));
  executor.parallel(chunks * ranges, [&](int64_t task) {
    const int64_t range = task % ranges;
    sum_chunk<T, block>(a, partial, task / ranges, groups * range / ranges, groups * (range + 1) / ranges);
  });
  const Executor adding = all.limited(chunks * groups * a.k * kLanes<A>);
  const int64_t parts = std::min(adding.threads, groups);
  adding.parallel(parts, [&](int64_t part) {
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      add_chunks(partial, group, a.d_out, static_cast<A*>(a.out));
    }
  });
}

}  // namespace

void sddmm(const Sddmm& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_block<accumulate_t<T>>(args.tokens, args.d_in, [&](auto block) { run<T, block>(args, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
