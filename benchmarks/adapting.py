"""Adapting a randomly initialised Llama: seconds per 10⁹ parameters, and memory beside the model.

``python -m neuroada_kernels.benchmarks.adapting --json FILE``. The sizes default to Llama-3-8B's.
Only as many layers are made as half the free memory holds, since all of them cost the same;
figures of the whole model are marked as extrapolated. Linux only: the kernel records the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.environment import environment
from neuroada_kernels.benchmarks.llama import LINEARS, Sizes
from neuroada_kernels.nn._base import BypassLinear


def shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """``[d_out, d_in]`` of the linears of one layer."""
    heads = sizes.hidden * sizes.kv_heads // sizes.heads
    attention = [(sizes.hidden, sizes.hidden), *[(heads, sizes.hidden)] * 2, (sizes.hidden,) * 2]
    mlp = [(sizes.intermediate, sizes.hidden)] * 2 + [(sizes.hidden, sizes.intermediate)]
    return dict(zip(LINEARS, [*attention, *mlp], strict=True))


def build(sizes: Sizes, layers: int, dtype: torch.dtype) -> nn.Module:
    """The linears of ``layers`` layers, with random weights."""
    model = nn.Module()
    for layer in range(layers):
        block = nn.Module()
        for name, (d_out, d_in) in shapes(sizes).items():
            linear = nn.Linear(d_in, d_out, bias=False, dtype=dtype, device="meta")
            # nn.Linear's own initialisation, in place and without a float32 copy.
            weight = torch.empty(d_out, d_in, dtype=dtype).uniform_(-(d_in**-0.5), d_in**-0.5)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            block.register_module(name, linear)
        model.register_module(f"layer{layer}", block)
    return model


def measure(sizes: Sizes, layers: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Adapt ``layers`` layers once, after a small model that warms up lazy loading."""
    nk.adapt(build(Sizes(hidden=256, intermediate=512), 1, dtype), k=1)
    model = build(sizes, layers, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = _forget_peak()
    start = perf_counter()
    nk.adapt(model, k=k)
    seconds = perf_counter() - start
    peak = _memory("VmHWM") - before
    kept = {
        "index_bytes": sum(layer.index.nbytes for layer in _layers(model)),
        "delta_bytes": sum(layer.delta.nbytes for layer in _layers(model)),
        "plan_bytes": sum(layer.plan.nbytes for layer in _layers(model)),
    }
    beside = peak - sum(kept.values())
    whole = {name: count // layers * sizes.layers for name, count in kept.items()}
    return {
        "layers": layers,
        "parameters": parameters,
        "k": k,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "seconds_per_billion": seconds * 1e9 / parameters,
        **kept,
        "peak_bytes": peak,
        # Negative if the warm-up left more free memory than adapting needs temporarily.
        "peak_bytes_beside_what_is_kept": beside,
        "extrapolated_to_all_layers": {
            "parameters": parameters // layers * sizes.layers,
            "seconds": seconds / layers * sizes.layers,
            **whole,
            "peak_bytes": sum(whole.values()) + beside,
        },
    }


def _layers(model: nn.Module) -> list[nk.NeuroAdaLinear]:
    found = [module for module in model.modules() if isinstance(module, BypassLinear)]
    return [module for module in found if isinstance(module, nk.NeuroAdaLinear)]


def _memory(field: str) -> int:
    """Bytes of this process, ``VmRSS`` now or ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: has no {field}")


def _forget_peak() -> int:
    """Reset the record of the peak; returns the bytes of the process now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _fitting(sizes: Sizes, dtype: torch.dtype) -> int:
    elements: int = sum(d_out * d_in for d_out, d_in in shapes(sizes).values())
    free: int = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fitting: int = free // 2 // (elements * dtype.itemsize)
    return min(sizes.layers, fitting) or 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[20])
    parser.add_argument(
        "--layers", type=int, help="by default as many as half the free memory holds"
    )
    parser.add_argument("--hidden", type=int, default=Sizes.hidden)
    parser.add_argument("--intermediate", type=int, default=Sizes.intermediate)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = Sizes(hidden=options.hidden, intermediate=options.intermediate)
    dtype: torch.dtype = getattr(torch, options.dtype)
    layers = options.layers or _fitting(sizes, dtype)
    rows = [measure(sizes, layers, k, dtype) for k in options.k]
    for row in rows:
        whole = row["extrapolated_to_all_layers"]
        kept = ", ".join(f"{p} {whole[p + '_bytes'] / 1e6:.0f}" for p in ("index", "delta", "plan"))
        print(
            f"k {row['k']}: {row['parameters'] / 1e9:.2f} billion parameters in {row['layers']} of "
            f"{sizes.layers} layers, {row['seconds_per_billion']:.2f} s per 10⁹, "
            f"{row['peak_bytes_beside_what_is_kept'] / 1e6:.0f} MB beside what is kept; in all "
            f"layers that is (extrapolated) {kept} MB"
        )
    if options.json is not None:
        facts = {"kind": "adapting", "environment": environment(), "sizes": asdict(sizes)}
        results = {**facts, "results": rows}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
