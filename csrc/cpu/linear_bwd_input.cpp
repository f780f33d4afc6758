// out[t, c] = sum_j grad[t, j] W[j, c] + sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// The forward pass with columns for rows: W is read along its rows all the same, a block of neurons at
// a time, and laid down as [neuron][column].
#include "entry.h"
#include "plan_rows.h"
#include "product.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T>
struct BackwardWeight {
  using Cell = typename ProductCell<T>::type;
  using Element = typename Cell::Element;
  static constexpr bool kPacked = true;
  static constexpr int64_t kStep = kBlockRows * Cell::kDepth;  // from one cell to the next
  static constexpr int64_t kScratch = kBlockCells * kStep, kAhead = 8;

  const T* weight;  // [d_out, d_in]
  int64_t stride, d_out;

  WeightBlock<Element> block(const BlockPlace& b, int64_t, Element* scratch) const {
    for (int64_t i = 0; i < b.cells; ++i) {
      const int64_t neuron = (b.cell + i) * Cell::kDepth;
      const T* source = weight + neuron * stride + b.row;
      for (int64_t n = kAhead; n < kAhead + Cell::kDepth && neuron + n < d_out; ++n) {
        prefetch_row(source + n * stride, b.width);
      }
      pack(source, d_out - neuron, b.width, scratch + i * kStep);
    }
    return {scratch, Cell::kDepth, kStep};
  }

 private:
  // One cell of `width` columns, zeros up to a whole tile; `left` neurons are there.
  void pack(const T* source, int64_t left, int64_t width, Element* target) const {
    int64_t c = 0;
    if constexpr (Cell::kDepth == 1) {
      constexpr int lanes = kLanes<Element>;
      for (; c + lanes <= width; c += lanes) store(target + c, load(source + c));
      for (; c < width; ++c) target[c] = widen(source[c]);
    } else {
      const T* next = left > 1 ? source + stride : nullptr;
      for (; next != nullptr && c + kLanes<float> <= width; c += kLanes<float>)
        pack_pairs(source + c, next + c, target + 2 * c);
      for (; c < width; ++c) {
        target[2 * c] = source[c];
        target[2 * c + 1] = next != nullptr ? next[c] : T{};
      }
    }
    std::fill(target + c * Cell::kDepth, target + round_up(width, kTileSums) * Cell::kDepth, Element{});
  }

  // target[2 i] = low[i], target[2 i + 1] = high[i]
  static void pack_pairs(const BFloat16* low, const BFloat16* high, BFloat16* target) {
    const VecU32 pairs = ((VecU32)load(low) >> 16) | (VecU32)load(high);
    std::memcpy(target, &pairs, sizeof(pairs));
  }
};

}  // namespace

void linear_bwd_input(const LinearBwdInput& args, const Executor& executor) {
  const BypassBwdInput& b = args.bypass;
  with_dtype(b.dtype, [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    const Product<T> product{
        b.tokens,    b.d_out, b.d_in, static_cast<const T*>(b.grad), b.grad_stride, nullptr, static_cast<T*>(b.out),
        b.out_stride};
    const BackwardWeight<T> weight{static_cast<const T*>(args.weight), args.weight_stride, b.d_out};
    with_plan_rows<A>(b, ceil_div(b.tokens, kTileVectors * kLanes<A>), executor,
                      [&](const auto& rows) { multiply_and_gather(product, weight, rows, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
