// out[t, j] = sum_c x[t, c] W[j, c] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
//
// Fused: product.h stages x once for the GEMM and the bypass. Rows of W are often a power of two apart and
// would evict each other from L1, so for many tokens a block of them is copied, and widened where the
// types differ.
#include "entry.h"
#include "product.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T>
struct ForwardWeight {
  using Source = T;
  using Cell = typename ProductCell<T>::type;
  using Element = typename Cell::Element;
  static constexpr bool kPacked = false;
  // A cache line more than a block's row, so that the rows of a tile lie in different sets of the cache.
  static constexpr int64_t kStep = kBlockCells<Cell> * Cell::kDepth + 64 / sizeof(Element);
  static constexpr int64_t kLine = 64 / sizeof(T), kLineStep = kLine;
  static constexpr bool kInPlace = std::is_same_v<T, Element>;
  static constexpr int64_t kSequentialTokens = !kInPlace || !kCopiesAside ? kFewTokens : Cell::kDepth == 1 ? 64 : 48;

  const T* weight;  // [d_out, d_in]
  int64_t stride, d_in;

  static int64_t most_tokens(int64_t) { return kMostTokens; }
  static BlockSize block(int64_t tokens) {
    return {tokens <= kSequentialTokens ? 2 * kBlockRows : kBlockRows, kBlockCells<Cell>, kStep};
  }

  // The block in place, without a copy, or null: no tile may read past the last row, nor a pair past a row's end.
  WeightBlock<Element> in_place(const BlockPlace& b) const {
    if constexpr (kInPlace) {
      const bool whole = b.width % kTileSums == 0 && columns(b) == b.cells * Cell::kDepth;
      if (whole) return {source(b), stride, Cell::kDepth};
    }
    return {};
  }
  static WeightBlock<Element> copied(const BlockPlace&, const Element* scratch) {
    return {scratch, kStep, Cell::kDepth};
  }

  // Returns the copy of the whole lines; the rest of the block, and zeros up to whole tiles, are written here.
  BlockCopy<ForwardWeight> copy(const BlockPlace& b, Element* scratch) const {
    const int64_t there = columns(b), lines = there / kLine, elements = b.cells * Cell::kDepth;
    for (int64_t r = 0; r < round_up(b.width, kTileSums); ++r) {
      const T* row = source(b) + r * stride;
      Element* target = scratch + r * kStep;
      int64_t c = r < b.width ? lines * kLine : 0;
      for (; r < b.width && c < there; ++c) widen_into(row[c], target[c]);
      std::fill(target + c, target + elements, Element{});
    }
    return {*this, {source(b), scratch, stride, kStep, b.width, lines}};
  }

  template <int locality>
  inline __attribute__((always_inline)) void prefetch_line(const T* line) const {
    __builtin_prefetch(line, 0, locality);
  }

  inline __attribute__((always_inline)) void copy_line(const T* line, Element* target) const {
    if constexpr (std::is_same_v<T, Element>) {
      std::memcpy(target, line, kLine * sizeof(T));
    } else {
      constexpr int lanes = kLanes<Element>;
#pragma GCC unroll 4
      for (int64_t c = 0; c < kLine; c += lanes) store(target + c, load(line + c));
    }
  }

 private:
  const T* source(const BlockPlace& b) const { return weight + b.row * stride + b.cell * Cell::kDepth; }
  int64_t columns(const BlockPlace& b) const { return std::min(b.cells * Cell::kDepth, d_in - b.cell * Cell::kDepth); }
};

}  // namespace

void linear_fwd(const LinearFwd& args, const Executor& executor) {
  const BypassFwd& b = args.bypass;
  with_product_dtype(b.dtype, [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    const Product<T> product{b.tokens,
                             b.d_in,
                             b.d_out,
                             static_cast<const T*>(b.x),
                             b.x_stride,
                             static_cast<const T*>(b.bias),
                             static_cast<T*>(b.out),
                             b.out_stride};
    const ForwardWeight<T> weight{static_cast<const T*>(args.weight), args.weight_stride, b.d_in};
    const EllRows<A> rows{b.index, static_cast<const A*>(b.delta), b.k};
    multiply_and_gather(product, weight, rows, executor);
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
