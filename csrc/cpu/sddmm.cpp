// out[j, s] = sum_t grad[t, j] x[t, index[j, s]]
//
// Blocks of tokens are transposed, so that a bypass is a dot product of two contiguous runs; for few bypasses per
// neuron see sddmm_few.cpp.
#include "entry.h"
#include "sddmm_chunks.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

// Neurons are grouped by the number of lanes of a vector. partial[chunk][group] has a sum for each of the group's
// entries of index, in their order.
template <class A>
struct Partial {
  int64_t groups, k;
  Scratch<A> sums;

  Partial(int64_t chunks, int64_t d_out, int64_t k)
      : groups(ceil_div(d_out, kLanes<A>)), k(k), sums(make_scratch<A>(chunks * groups * k * kLanes<A>)) {}

  A* at(int64_t chunk, int64_t group) const { return sums.get() + (chunk * groups + group) * k * kLanes<A>; }
};

// Groups whose grad is staged at once: with pairs of tokens two cache lines of each row, half of an L1 of 32 KB.
// A block of single tokens has fewer rows and does not gain.
template <class Tokens>
constexpr int kStagedGroups = Tokens::kTokens == 1 ? 1 : 4;

#ifdef NEUROADA_AVX512_BF16

// staged[c - first][i] = the tokens t and t + 16 of column c, t = 32 (i / 16) + i % 16, zero past the
// last. x and grad pair the same tokens, so the pairing does not affect their product.
template <int block>
void stage_tokens(PairedTokens, const BFloat16* source, int64_t stride, int64_t tokens, int64_t first, int64_t last,
                  int64_t columns, float* staged) {
  constexpr int lanes = kLanes<float>;
  constexpr int64_t line = 2 * lanes, ahead = 2 * line;
  const int64_t whole = first + (last - first) / line * line;
  // 32 rows along all columns, then the next 32: hardware prefetchers track that many streams, but not a block's rows.
  for (int64_t t = 0; t < 2 * block; t += line) {
    for (int64_t c = first; c < whole; c += line) {
      const int64_t rows = std::min(line, tokens - t);
      if (c + ahead < columns) prefetch_rows<0>(source + t * stride, stride, rows, c + ahead);
      alignas(64) float half[2][lanes * lanes];  // [column pair][token]
      for (int64_t h = 0; h < 2; ++h) {
        const int64_t row = t + h * lanes;
        stage_tile<PairCell, lanes, 1>(source + row * stride + c, stride, tokens - row, half[h]);
      }
      for (int64_t pair = 0; pair < lanes; ++pair) {
        const VecU32 a = (VecU32)load(half[0] + pair * lanes), b = (VecU32)load(half[1] + pair * lanes);
        float* place = staged + (c - first + 2 * pair) * block + t / 2;
        store(place, (Vec<float>)((a & 0xffffu) | (b << 16)));
        store(place + block, (Vec<float>)((a >> 16) | (b & 0xffff0000u)));
      }
    }
  }
  for (int64_t c = whole; c < last; ++c) {
    const auto bits = [&](int64_t t) { return t < tokens ? uint32_t{source[t * stride + c].bits} : 0; };
    for (int64_t i = 0; i < block; ++i) {
      const int64_t t = i / lanes * line + i % lanes;
      staged[(c - first) * block + i] = float_from_bits(bits(t) | bits(t + lanes) << 16);
    }
  }
}

#endif

template <int block, class T>
void stage_tokens(WideTokens<T>, const T* source, int64_t stride, int64_t tokens, int64_t first, int64_t last,
                  int64_t columns, accumulate_t<T>* staged) {
  stage_transposed<WideCell<T>, block>(source, stride, tokens, first, last, columns, staged);
}

// Adds a block of tokens to the sums of a group's entries, in the order of index: dot products of grad [neuron][block]
// and staged x [column][block] along the block, whose lanes are added up last. A neuron's grad stays in registers for
// all its entries.
template <class Tokens, int block, class A>
inline void add_block(const A* grad, const A* staged, const int32_t* index, int64_t entries, int64_t k, A* sums) {
  constexpr int lanes = kLanes<A>, vectors = block / lanes;
  Vec<A> neuron[vectors];
  int64_t left = 0;
  for (int64_t e = 0; e < entries; e += lanes) {
    Vec<A> product[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      product[i] = zero<A>();
      if (e + i >= entries) continue;
      if (left == 0) {
        left = k;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) neuron[v] = load(grad + v * lanes);
        grad += block;
      }
      --left;
      const int32_t column = index[e + i];
      if (column < 0) continue;
      const A* gathered = staged + int64_t{column} * block;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) Tokens::add(product[i], neuron[v], load(gathered + v * lanes));
    }
    store(sums + e, load(sums + e) + sum_rows<A>(product));
  }
}

// The sums of one chunk for the groups [first, last).
template <class T, int block>
void sum_chunk(const Sddmm& a, const TokenChunks& chunks, const Partial<accumulate_t<T>>& partial, int64_t chunk,
               int64_t first, int64_t last) {
  using A = accumulate_t<T>;
  using Tokens = typename ProductCell<T>::tokens;
  constexpr int lanes = kLanes<A>, together = kStagedGroups<Tokens>;
  std::fill(partial.at(chunk, first), partial.at(chunk, last), A{0});
  const Scratch<A> staged = make_scratch<A>(a.d_in * block);
  const int64_t end = chunks.end(chunk);
  for (int64_t t = chunks.begin(chunk); t < end; t += block * Tokens::kTokens) {
    const int64_t tokens = std::min<int64_t>(block * Tokens::kTokens, end - t);
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
    const T* grad = static_cast<const T*>(a.grad) + t * a.grad_stride;
    stage_tokens<block>(Tokens{}, x, a.x_stride, tokens, 0, a.d_in, a.d_in, staged.get());
    for (int64_t group = first; group < last; group += together) {
      const int64_t j = group * lanes, after = std::min(std::min(group + together, last) * lanes, a.d_out);
      alignas(64) A grad_staged[together * lanes * block];
      stage_tokens<block>(Tokens{}, grad, a.grad_stride, tokens, j, after, a.d_out, grad_staged);
      for (int64_t g = group; g * lanes < after; ++g) {
        const int64_t width = std::min<int64_t>(lanes, a.d_out - g * lanes);
        add_block<Tokens, block>(grad_staged + (g - group) * lanes * block, staged.get(), a.index + g * lanes * a.k,
                                 width * a.k, a.k, partial.at(chunk, g));
      }
    }
  }
}

template <class A>
void add_chunks(const Partial<A>& partial, int64_t chunks, int64_t group, int64_t d_out, A* out) {
  constexpr int lanes = kLanes<A>;
  const int64_t entries = std::min<int64_t>(lanes, d_out - group * lanes) * partial.k;
  out += group * lanes * partial.k;
  for (int64_t e = 0; e < entries; e += lanes) {
    Vec<A> sum = zero<A>();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(partial.at(chunk, group) + e);
    std::memcpy(out + e, &sum, static_cast<size_t>(std::min<int64_t>(lanes, entries - e)) * sizeof(A));
  }
}

template <class T, int block>
void run(const Sddmm& a, const Executor& executor) {
  using A = accumulate_t<T>;
  const TokenChunks chunks(a.tokens, block * ProductCell<T>::tokens::kTokens);
  const Partial<A> partial(chunks.count, a.d_out, a.k);
  const int64_t groups = partial.groups;
  each_chunk(chunks, groups, executor.limited(work_of(a)), [&](int64_t chunk, int64_t first, int64_t last) {
    sum_chunk<T, block>(a, chunks, partial, chunk, first, last);
  });
  each_group(groups, chunks.count * groups * a.k * kLanes<A>, executor,
             [&](int64_t group) { add_chunks(partial, chunks.count, group, a.d_out, static_cast<A*>(a.out)); });
}

// Calls f with a block's length in lanes. The sum over lanes costs as much as the products of a short
// block; with long blocks it is needed less often.
template <class T, class F>
void with_token_block(const Sddmm& a, F&& f) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>;
  const int64_t columns = std::max(a.d_in, a.whole_d_in);
  if constexpr (ProductCell<T>::tokens::kTokens == 1) {
    with_block<A>(a.tokens, columns, f);
  } else {
    constexpr int64_t kMostBytes = 512 << 10;
    const int64_t fit = kMostBytes / std::max<int64_t>(columns * static_cast<int64_t>(sizeof(A)), 1);
    const int64_t most = std::min(fit, (a.tokens + 1) / 2);
    if (most >= 4 * lanes) return f(std::integral_constant<int, 4 * lanes>{});
    if (most >= 2 * lanes) return f(std::integral_constant<int, 2 * lanes>{});
    f(std::integral_constant<int, lanes>{});
  }
}

}  // namespace

void sddmm(const Sddmm& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_token_block<T>(args, [&](auto block) { run<T, block>(args, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
