"""Every kernel in all forms on small odd shapes, for compute-sanitizer: no pytest, few launches.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/triton_kernels/smoke_gpu.py triton

By itself, with ``--large``, the first look at kernels that were never on a GPU: one form after
another, and of each at once whether it is right.
"""

from __future__ import annotations

import argparse
import os

import torch

import neuroada_kernels as nk
from neuroada_kernels.plan import chosen_columns, columns_of
from neuroada_kernels.testing import Case, make_inputs, rms_error, tolerance

CASES = (
    Case(tokens=1, d_in=67, d_out=101, k=3, bias=True, index="ragged"),
    Case(tokens=130, d_in=96, d_out=72, k=2, index="one_column"),
    Case(tokens=257, d_in=130, d_out=130, k=8, bias=True),
    Case(tokens=300, d_in=328, d_out=264, k=8),
)
#: More tiles than a GPU has multiprocessors, so that a program that stays for several does.
LARGE = Case(tokens=2500, d_in=2056, d_out=2056, k=8)

#: What decides which kernels serve a layer; a form is its value.
SETTINGS = {"triton": "NEUROADA_TRITON_FUSED", "cuda": "NEUROADA_CUDA_PATCHED"}


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    i = make_inputs(case, dtype, device=device)
    x, delta = i.x.requires_grad_(), i.delta.requires_grad_()
    y = nk.functional.neuroada_linear(x, i.weight, i.index, delta, i.bias)
    grads = torch.autograd.grad(y, (x, delta), i.grad_output)
    wide = [t.detach().double().requires_grad_() for t in (x, delta)]
    bias = None if i.bias is None else i.bias.double()
    exact = nk.reference.neuroada_linear(wide[0], i.weight.double(), i.index, wide[1], bias)
    truth = (exact, *torch.autograd.grad(exact, wide, i.grad_output.double()))
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


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=SETTINGS)
    parser.add_argument("--forms", default="01", help="of these settings: " + str(SETTINGS))
    parser.add_argument("--large", action="store_true", help="also what takes a sanitizer long")
    options = parser.parse_args(argv)
    backend = options.backend
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with nk.use_backend(backend):
        for form in options.forms:
            if form != "0" and backend == device == "cuda" and _capability() != (9, 0):
                print(f"smoke test skipped: form {form} is for compute capability 9.0", flush=True)
                continue
            os.environ[SETTINGS[backend]] = form
            for dtype in (torch.float32, torch.bfloat16):
                for case in (*CASES, *[LARGE] * options.large):
                    check(case, dtype, device)
            # Said at once: the next form may crash, or never end.
            print(f"smoke test passed: {backend} on {device}, form {form}", flush=True)


if __name__ == "__main__":
    main()
