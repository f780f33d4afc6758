"""Every kernel in all forms on small odd shapes, for compute-sanitizer: no pytest, few launches.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/triton_kernels/smoke_gpu.py triton

By itself, with ``--large``, a first test of kernels that never ran on a GPU: one form after
another, each reported as soon as it passes.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels._extension import cutlass_version
from neuroada_kernels.plan import chosen_columns, columns_of
from neuroada_kernels.testing import Case, Inputs, make_inputs, rms_error, tolerance

CASES = (
    Case(tokens=1, d_in=67, d_out=101, k=3, bias=True, index="ragged"),
    Case(tokens=130, d_in=96, d_out=72, k=2, index="one_column"),
    Case(tokens=257, d_in=130, d_out=130, k=8, bias=True),
    Case(tokens=300, d_in=328, d_out=264, k=8),
)
#: More tiles than a GPU has SMs, so that persistent programs process several.
LARGE = Case(tokens=2500, d_in=2056, d_out=2056, k=8)

#: Rows of which shared memory holds two blocks, with one more in flight for the narrower ones; the
#: wider ones come in tiles. A column that every neuron chose has its connections in all tiles.
WIDE = (
    Case(tokens=17, d_in=7264, d_out=4856, k=8, index="ragged"),
    Case(tokens=17, d_in=4856, d_out=7264, k=2, index="one_column"),
    # One slot, rows in a circular buffer: neurons for half of the threads, more, and two groups.
    Case(tokens=130, d_in=328, d_out=2056, k=1),
    Case(tokens=33, d_in=328, d_out=4104, k=1, index="ragged"),
    Case(tokens=33, d_in=328, d_out=8200, k=1),
    # Sums so long that two warpgroups share a tile of the GEMM; tiles are partial in both sizes.
    Case(tokens=300, d_in=8200, d_out=264, k=8, bias=True),
)

#: As in a model: an SM has several tiles of each size, one after another.
LAYER = Case(tokens=8192, d_in=4096, d_out=4096, k=8, bias=True)

#: Exit status if results are right except for a second rounding.
ROUNDED_TWICE = 3

#: Variables that select non-default kernels: form 0 is the default, form n sets the n-th of these.
SETTINGS = {
    "triton": (("NEUROADA_TRITON_FUSED", "1"),),
    "cuda": (
        ("NEUROADA_CUDA_PATCHED", "1"),
        ("NEUROADA_CUDA_ONTO", "0"),
        ("NEUROADA_CUDA_BULK", "0"),
        ("NEUROADA_CUDA_TWO_TILES", "1"),
    ),
}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    i = make_inputs(case, dtype, device=device)
    x, delta = i.x.requires_grad_(), i.delta.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, delta)]
    bias = None if i.bias is None else i.bias.double()
    exact = nk.reference.neuroada_linear(wide[0], i.weight.double(), i.index, wide[1], bias)
    truth = (exact, *torch.autograd.grad(exact, wide, i.grad_output.double()))
    for plan in (nk.make_plan(i.index, case.d_in), None):  # ordered if kernels read it so
        y = nk.functional.neuroada_linear(x, i.weight, i.index, delta, i.bias, plan=plan)
        grads = torch.autograd.grad(y, (x, delta), i.grad_output)
        for found, expected in zip((y, *grads), truth, strict=True):
            error = rms_error(found, expected)
            assert error <= 2 * tolerance(dtype, 2048, found.dtype), f"{case.name} {dtype}: {error}"
    out = nk.functional.neuroada_bypass(i.grad_output, x, i.index, delta)
    torch.autograd.grad(out, (x, delta), i.grad_output)
    weight = i.weight.clone()
    original = torch.ops.neuroada.merge_(weight, i.index, i.delta)
    torch.ops.neuroada.unmerge_(weight, i.index, original)
    assert weight.equal(i.weight)
    chosen = chosen_columns([i.index], case.d_in)
    for columns in (chosen, chosen[1:]):  # an even number and an odd one
        assert columns_of(x, columns, dtype).equal(x.detach()[:, columns])


def y_and_dx(i: Inputs, delta: Tensor) -> tuple[Tensor, Tensor]:
    x, plan = i.x.detach().requires_grad_(), nk.make_plan(i.index, i.x.shape[1])
    y = nk.functional.neuroada_linear(x, i.weight, i.index, delta, i.bias, plan=plan)
    return y.detach(), *torch.autograd.grad(y, x, i.grad_output)


def rounds_once(case: Case, dtype: torch.dtype, device: str) -> bool:
    """y and dx have the error of one rounding, and bypasses far below a ULP take effect."""
    right = True
    i = make_inputs(case, dtype, device=device)
    tiny = torch.full_like(i.delta, 1e-4)
    weight, x, grad = i.weight.double(), i.x.double(), i.grad_output.double()
    bypass = nk.reference.merged_weight(torch.zeros_like(weight), i.index, tiny)
    weight += bypass
    bias = 0 if i.bias is None else i.bias.double()
    truth = (x @ weight.t() + bias, grad @ weight)
    moves = (x @ bypass.t(), grad @ bypass)
    found, still = (y_and_dx(i, delta) for delta in (tiny, torch.zeros_like(tiny)))
    for name, *values in zip(("y", "dx"), found, still, truth, moves, strict=True):
        y, before, exact, move = (value.double() for value in values)
        share = (((y - before) * move).sum() / move.square().sum()).item()
        error = ((y - exact).norm() / (exact.to(dtype).double() - exact).norm()).item()
        words = f"{name} in {dtype}: {share:.3f} of a tiny bypass, {error:.3f} of one rounding"
        print(words, flush=True)
        right &= abs(share - 1) < 0.05 and error < 1.02
    return right


def why_not(backend: str, form: int, device: str) -> str | None:
    """Why a form cannot be tried here: another would serve in its place. None if it can."""
    if form == 0 or backend != "cuda" or device != "cuda":
        return None
    if torch.cuda.get_device_capability() != (9, 0):
        return "is for compute capability 9.0"
    if SETTINGS[backend][form - 1][0] == "NEUROADA_CUDA_ONTO" and not cutlass_version():
        return "is the default one, as this was built without CUTLASS"
    return None


def choose(backend: str, form: int) -> None:
    for number, (variable, other) in enumerate(SETTINGS[backend], 1):
        os.environ[variable] = other if number == form else str(1 - int(other))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=SETTINGS)
    parser.add_argument("--forms", help="their digits, 0 the default: " + str(SETTINGS))
    parser.add_argument("--large", action="store_true", help="also what takes a sanitizer long")
    options = parser.parse_args(argv)
    backend = options.backend
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = range(len(SETTINGS[backend]) + 1)
    rounded = True
    with nk.use_backend(backend):
        for form in every if options.forms is None else map(int, options.forms):
            if reason := why_not(backend, form, device):
                print(f"smoke test skipped: form {form} {reason}", flush=True)
                continue
            choose(backend, form)
            # The kernels that CUDA's variables select are for 16 bits.
            narrow_alone = backend == "cuda" and form > 0
            for dtype in (torch.bfloat16,) if narrow_alone else (torch.float32, torch.bfloat16):
                wide = WIDE if backend == "cuda" else ()
                for case in (*CASES, *wide, *[LARGE] * options.large):
                    check(case, dtype, device)
            # A patched weight adds a rounding.
            if options.large and os.environ.get("NEUROADA_CUDA_PATCHED") != "1":
                for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else ():
                    rounded &= rounds_once(LAYER, dtype, device)
            # Printed at once: the next form may crash or hang.
            print(f"smoke test passed: {backend} on {device}, form {form}", flush=True)
    if not rounded:
        sys.exit(ROUNDED_TWICE)


if __name__ == "__main__":
    main()
