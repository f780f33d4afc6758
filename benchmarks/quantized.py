"""Training over a 4-bit base: loss and memory, beside PEFT's QLoRA of rank 8.

``python -m neuroada_kernels.benchmarks.quantized``, with bitsandbytes, and PEFT for its rows.
Blocks of a transformer (attention and gated MLP) with their linears in nf4; values are random, and
do not affect the memory. ``qlora`` has its adapters in float32, which is
PEFT's default; ``qlora16`` in the dtype of the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.allocations import allocated_peak
from neuroada_kernels.benchmarks.memory import kept_bytes
from neuroada_kernels.nn.foreign import missing_library

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """The measurements of one method; bytes beside the model's own."""

    method: str
    trained: int  # values
    optimizer_bytes: int  # of AdamW
    kept_bytes: int  # from forward to backward
    peak_bytes: int  # of a forward and backward, gradients included
    first_loss: float
    last_loss: float
    base_unchanged: bool


class Block(nn.Module):
    """Attention and a gated MLP, each with a residual."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, width: int, heads: int, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        for name in LINEARS[:4]:
            setattr(self, name, make(width, width))
        self.gate_proj, self.up_proj = make(width, 4 * width), make(width, 4 * width)
        self.down_proj = make(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.norm_mlp(x)
        mixed: Tensor = self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + mixed


def build(options: argparse.Namespace) -> nn.Module:
    """The same frozen blocks each time, quantised."""
    from bitsandbytes.nn import Linear4bit

    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)

    def make(d_in: int, d_out: int) -> nn.Module:
        linear = nn.Linear(d_in, d_out, bias=False, dtype=dtype)
        layer: nn.Module = Linear4bit(d_in, d_out, False, dtype, quant_type="nf4")
        layer.load_state_dict(linear.state_dict(), assign=False)
        return layer.to(dtype).to(options.device)

    blocks = [Block(options.width, options.heads, make) for _ in range(options.layers)]
    return nn.Sequential(*blocks).to(options.device, dtype).requires_grad_(False)


def _neuroada(model: nn.Module, k: int) -> nn.Module:
    nk.adapt(model, k, LINEARS)
    return model


def _qlora(model: nn.Module, rank: int, *, in_float32: bool = True) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LINEARS)
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    if not in_float32:
        adapted.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    return adapted


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "neuroada": _neuroada,
    "qlora": _qlora,
    "qlora16": partial(_qlora, in_float32=False),
}


def measure(method: str, options: argparse.Namespace) -> Row:
    """Train by ``neuroada-k<K>``, ``qlora-r<R>`` or ``qlora16-r<R>``, and count."""
    name, _, number = method.partition("-")
    model = build(options)
    before = _digest(model)
    model = METHODS[name](model, int(number[1:])).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.sequence, options.width)
    dtype = getattr(torch, options.dtype)
    x, target = (
        torch.randn(shape, generator=generator).to(options.device, dtype) for _ in range(2)
    )
    x.requires_grad_()  # as behind an embedding, or another block

    def loss() -> Tensor:
        y: Tensor = model(x)
        return F.mse_loss(y.float(), target.float())

    optimizer = torch.optim.AdamW(trained, lr=options.rate)
    losses = []
    for _ in range(options.steps):
        optimizer.zero_grad()
        current = loss()
        current.backward()
        optimizer.step()
        losses.append(current.item())
    x.grad = None
    optimizer.zero_grad()
    given = [x, target, *model.parameters(), *model.buffers()]
    return Row(
        method,
        sum(parameter.numel() for parameter in trained),
        2 * sum(parameter.nbytes for parameter in trained),
        kept_bytes(loss, given),
        allocated_peak(lambda: loss().backward()) if options.device == "cpu" else 0,
        losses[0],
        losses[-1],
        _digest(model) == before,
    )


def _digest(model: nn.Module) -> str:
    """Over the bytes of all 4-bit weights and their scales."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            for tensor in (parameter.data, state.absmax):
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table; returns 1 if nothing was measured, or a base has changed."""
    options = _parser().parse_args(argv)
    missing = missing_library("bitsandbytes")
    if missing is not None:
        print(missing, file=sys.stderr)
        return 1
    rows = []
    print("| method | trained | AdamW, bytes | kept, bytes | peak, bytes | loss | base unchanged |")
    print("|---|---:|---:|---:|---:|---|---|")
    for method in options.methods:
        missing = missing_library("peft") if method.startswith("qlora") else None
        if missing is not None:
            print(f"| {method} | {missing} |", flush=True)
            continue
        rows.append(measure(method, options))
        print(_line(rows[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(not rows or not all(row.base_unchanged for row in rows))


def _line(row: Row) -> str:
    return (
        f"| {row.method} | {row.trained:,} | {row.optimizer_bytes:,} | {row.kept_bytes:,} "
        f"| {row.peak_bytes:,} | {row.first_loss:.4f} to {row.last_loss:.4f} "
        f"| {'yes' if row.base_unchanged else 'NO'} |"
    )


#: With k = 14 as many numbers train as with rank 8.
DEFAULT = ["neuroada-k1", "neuroada-k8", "neuroada-k14", "qlora-r8", "qlora16-r8"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neuroada_kernels.benchmarks.quantized",
        description="Train over a 4-bit base, and count the memory beside QLoRA's.",
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=DEFAULT, metavar="NAME")
    add("--width", type=int, default=512, help="default: 512")
    add("--heads", type=int, default=8, help="default: 8")
    add("--layers", type=int, default=2, help="blocks; default: 2")
    add("--batch", type=int, default=2, help="default: 2")
    add("--sequence", type=int, default=128, help="default: 128")
    add("--steps", type=int, default=10, help="default: 10")
    add("--rate", type=float, default=1e-3, help="of learning; default: 1e-3")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--device", default="cpu", help="default: cpu; on others no peak is counted")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
