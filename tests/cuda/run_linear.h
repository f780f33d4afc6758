// Runs the fused kernels for sm_90a over a problem, in the tile of a GPU or in a smaller one.
#pragma once

#include "cuda/linear_bwd_sm90.h"
#include "run_cuda.h"

namespace neuroada::testing {

inline constexpr cuda::Device kLinearDevice{0, 2, 64, 1 << 20};

inline int64_t whole(int64_t tokens) { return cuda::ceil_div(tokens, 8) * 8; }

// With the tile of the GPU by the entry points that a GPU has.
template <class T, class Tile>
Matrix<T> run_fwd(const Problem<T>& p, int64_t chunk, int64_t out_gap = 0) {
  const Case& c = p.shape;
  Matrix<T> out(c.tokens, c.d_out, out_gap), transposed(c.d_in, chunk);
  const cuda::LinearFwd args{{dtype_of<T>(), c.tokens, c.d_in, c.d_out, c.k, p.x.data(), p.x.stride(), p.index.data(),
                              p.delta.data(), nullptr, 0, bias_of(p), out.data(), out.stride()},
                             p.weight.data(),
                             p.weight.stride(),
                             chunk,
                             transposed.data()};
  if constexpr (std::is_same_v<Tile, cuda::HopperTile>) {
    CHECK(cuda::linear_fwd_chunk(args.bypass, kLinearDevice) == chunk, "not the whole in one chunk");
    cuda::linear_fwd(args, kLinearDevice, nullptr);
  } else {
    cuda::run_linear_fwd<Tile>(args, kLinearDevice, nullptr);
  }
  return out;
}

// What the two backward kernels have in common.
template <class T>
struct BackwardRun {
  BackwardRun(const Problem<T>& p, int64_t chunk, int64_t out_gap)
      : out(p.shape.tokens, p.shape.d_in, out_gap),
        transposed(p.shape.d_out, chunk),
        plan(make_plan(p.index, p.shape.d_in)),
        live(static_cast<int64_t>(plan.size()) - plan_size(p.shape.d_in, 0)),
        ordered(1, live) {
    const Case& c = p.shape;
    args = {{dtype_of<T>(), c.tokens, c.d_in, c.d_out, c.k, p.grad.data(), p.grad.stride(), plan.data(), live,
             p.delta.data(), ordered.data(), out.data(), out.stride()},
            p.weight.data(),
            p.weight.stride(),
            chunk,
            transposed.data()};
  }

  Matrix<T> out, transposed;
  std::vector<int32_t> plan;
  int64_t live;
  Matrix<cuda::WeightedNeuron> ordered;
  cuda::LinearBwdInput args;
};

template <class T, class Tile>
Matrix<T> run_bwd(const Problem<T>& p, int64_t chunk, int64_t out_gap = 0) {
  BackwardRun<T> run(p, chunk, out_gap);
  if constexpr (std::is_same_v<Tile, cuda::HopperTile>) {
    CHECK(cuda::linear_bwd_input_chunk(run.args.bypass, kLinearDevice) == chunk, "not the whole in one chunk");
    cuda::linear_bwd_input(run.args, kLinearDevice, nullptr);
  } else {
    cuda::run_linear_bwd_input<Tile>(run.args, kLinearDevice, nullptr);
  }
  return run.out;
}

template <class T>
struct Gradients {
  Matrix<T> grad_x;
  Matrix<float> grad_delta;
};

template <class T, class Tile>
Gradients<T> run_both(const Problem<T>& p, int64_t chunk, int64_t out_gap = 0) {
  const Case& c = p.shape;
  BackwardRun<T> run(p, chunk, out_gap);
  const cuda::LinearBwdScratch needed = cuda::linear_bwd_scratch_of<Tile>(run.args.bypass, kLinearDevice);
  Matrix<int32_t> start(1, needed.starts);
  Matrix<cuda::BlockEntry> entry(c.d_out, c.k);
  Matrix<float> partial(cuda::ceil_div(chunk, Tile::kRows) * c.d_out, c.k), grad_delta(c.d_out, c.k);
  const cuda::LinearBwd args{run.args,     p.x.data(),   p.x.stride(),   p.index.data(),
                             start.data(), entry.data(), partial.data(), grad_delta.data()};
  if constexpr (std::is_same_v<Tile, cuda::HopperBwdTile>) {
    CHECK(needed.chunk == chunk, "not the whole in one chunk");
    cuda::linear_bwd(args, kLinearDevice, nullptr);
  } else {
    cuda::run_linear_bwd<Tile>(args, kLinearDevice, nullptr);
  }
  return {run.out, grad_delta};
}

template <class Tile>
std::string describe(const char* kernel, const char* dtype, const Case& c) {
  return std::string(kernel) + " " + dtype + ", " + std::to_string(Tile::kRows) + " x " +
         std::to_string(Tile::kColumns) + ", " + std::to_string(Tile::kStages) + " stages, " + c.name();
}

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace neuroada::testing
