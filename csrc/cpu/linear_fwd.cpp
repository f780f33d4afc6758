// out[t, j] = sum_c x[t, c] W[j, c] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
//
// One pass: product.h stages x for the product and the bypass alike. Rows of W lie a power of two apart
// and would push each other out of the first cache, so a block of them is copied, and widened on the way.
#include "entry.h"
#include "product.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T>
struct ForwardWeight {
  using Cell = typename ProductCell<T>::type;
  using Element = typename Cell::Element;
  static constexpr bool kPacked = false;

  // A cache line more than a block's row, so that the rows of a tile lie in different sets of the cache.
  static constexpr int64_t kStep = kBlockCells * Cell::kDepth + 64 / sizeof(Element);
  static constexpr int64_t kScratch = kBlockRows * kStep;
  static constexpr int64_t kFewTokens = 32, kAhead = 4;

  const T* weight;  // [d_out, d_in]
  int64_t stride, d_in;

  WeightBlock<Element> block(const BlockPlace& b, int64_t tokens, Element* scratch) const {
    const T* source = weight + b.row * stride + b.cell * Cell::kDepth;
    const int64_t elements = b.cells * Cell::kDepth, columns = std::min(elements, d_in - b.cell * Cell::kDepth);
    if constexpr (std::is_same_v<T, Element>) {
      // Few tokens are not worth a copy. No tile may read past the last row, nor a pair past its end.
      const bool whole = b.width % kTileSums == 0 && columns == elements;
      if (whole && tokens <= kFewTokens) return {source, stride, Cell::kDepth};
    }
    for (int64_t r = 0; r < round_up(b.width, kTileSums); ++r) {
      if (r + kAhead < b.width) prefetch_row(source + (r + kAhead) * stride, columns);
      copy_row(source + r * stride, r < b.width ? columns : 0, elements, scratch + r * kStep);
    }
    return {scratch, kStep, Cell::kDepth};
  }

 private:
  // `columns` elements, and zeros up to `count`.
  static void copy_row(const T* source, int64_t columns, int64_t count, Element* target) {
    int64_t c = 0;
    if constexpr (std::is_same_v<T, Element>) {
      c = std::copy_n(source, columns, target) - target;
    } else {
      constexpr int lanes = kLanes<Element>;
      for (; c + lanes <= columns; c += lanes) store(target + c, load(source + c));
      for (; c < columns; ++c) target[c] = widen(source[c]);
    }
    std::fill(target + c, target + count, Element{});
  }
};

}  // namespace

void linear_fwd(const LinearFwd& args, const Executor& executor) {
  const BypassFwd& b = args.bypass;
  with_dtype(b.dtype, [&](auto element) {
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
