// out[t, c] = sum_j grad[t, j] W[j, c] + sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// The forward pass with columns in place of rows. W is still read along its rows, a block of neurons at
// a time, in place or copied to the layout that the GEMM's tile reads.
#include "entry.h"
#include "plan_rows.h"
#ifdef NEUROADA_AMX_TILES
#include "transposed_weight.h"
#else
#include "packed_weight.h"
#endif

namespace neuroada::cpu::NEUROADA_ISA {

void linear_bwd_input(const LinearBwdInput& args, const Executor& executor) {
  const BypassBwdInput& b = args.bypass;
  with_product_dtype(b.dtype, [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    const Product<T> product{
        b.tokens,    b.d_out, b.d_in, static_cast<const T*>(b.grad), b.grad_stride, nullptr, static_cast<T*>(b.out),
        b.out_stride};
    const BackwardWeight<T> weight{static_cast<const T*>(args.weight), args.weight_stride, b.d_out};
    constexpr int gathered = kGatherTiles * kTileVectors<typename ProductCell<T>::type> * kLanes<A>;
    with_plan_rows<A>(b, ceil_div(b.tokens, gathered), executor,
                      [&](const auto& rows) { multiply_and_gather(product, weight, rows, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
