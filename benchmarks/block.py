"""Activations that a transformer's block saves for backward, by method.

The command is ``neuroada bench memory --block``.

The block is Llama's as transformers builds it: norm, q, k and v, rotary embedding, attention by
``scaled_dot_product_attention``, o; norm, gate and up, SiLU, down; two residuals. The count
is of storages that autograd saves, each once, however many tensors share it, without those that
the module holds anyway (parameters, buffers). The difference from the frozen block is saved by the
linears: activation function, attention and norms save the same in every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.baselines import LoRALinear
from neuroada_kernels.benchmarks.environment import environment
from neuroada_kernels.testing import Inputs

MIB = 1 << 20
RANK = 8


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block and its input."""

    tokens: int = 512
    width: int = 1024
    hidden: int = 4096
    heads: int = 16
    k: int = 1


class RMSNorm(nn.Module):
    """In float32, as transformers computes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    cos: Tensor  # [tokens, width / heads]
    sin: Tensor

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        pairs = width // self.heads // 2
        angles = torch.arange(sizes.tokens)[:, None] * 1e4 ** (-torch.arange(pairs) / pairs)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self._turned(query), self._turned(key)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        y: Tensor = self.o_proj(attended.transpose(1, 2).contiguous().flatten(2))
        return y

    def _turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


class MLP(nn.Module):
    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.up_proj = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down_proj = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.norm, self.norm_mlp = RMSNorm(sizes.width), RMSNorm(sizes.width)
        self.self_attn, self.mlp = Attention(sizes), MLP(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        y: Tensor = x + self.mlp(self.norm_mlp(x))
        return y


def _frozen(block: Block, k: int) -> None:
    block.requires_grad_(False)


def _lora(block: Block, k: int) -> None:
    block.requires_grad_(False)
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                weight = child.weight.detach()
                nothing = weight.new_empty(0)
                inputs = Inputs(nothing, weight, nothing, nothing, None, nothing)
                setattr(parent, name, LoRALinear(inputs, RANK))


def _neuroada(**options: str) -> Callable[[Block, int], None]:
    def adapt(block: Block, k: int) -> None:
        nk.adapt(block, k, **options)  # type: ignore[call-overload]

    return adapt


METHODS: dict[str, Callable[[Block, int], None]] = {
    "frozen": _frozen,
    f"lora-r{RANK}": _lora,
    "full": _neuroada(save_activations="full"),
    "compact": _neuroada(save_activations="compact"),
    "auto": _neuroada(save_activations="auto"),
    "resident, compact": _neuroada(save_activations="compact", strategy="resident"),
}


def measure_block(sizes: BlockSizes, dtype: torch.dtype, device: str = "cpu") -> dict[str, int]:
    """Bytes that one forward keeps, by method."""
    return {method: _kept(method, sizes, dtype, device) for method in METHODS}


def _kept(method: str, sizes: BlockSizes, dtype: torch.dtype, device: str) -> int:
    generator = torch.Generator().manual_seed(0)
    block = Block(sizes)
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02, generator=generator)
    block.to(device, dtype)
    METHODS[method](block, sizes.k)
    x = torch.randn(1, sizes.tokens, sizes.width, generator=generator).to(device, dtype)
    x.requires_grad_()
    held = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # The tensor itself, so that its address is not reused.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    del y
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in held)


def run(device: str, dtypes: list[str], console: Console) -> dict[str, Any]:
    """Measure, print the table, and return what goes into the JSON."""
    sizes = BlockSizes()
    kept = {d: measure_block(sizes, getattr(torch, d), device) for d in dtypes}
    for dtype, methods in kept.items():
        console.print(_table(dtype, sizes, methods))
    return {
        "kind": "block-memory",
        "command": "neuroada bench memory --block",
        "sessions": [environment(device)],
        "sizes": asdict(sizes),
        "results": [
            {
                "key": f"{dtype} {method}",
                "dtype": dtype,
                "method": method,
                "kept_bytes": count,
                "kept_bytes_by_the_linears": count - methods["frozen"],
            }
            for dtype, methods in kept.items()
            for method, count in methods.items()
        ],
    }


def _table(dtype: str, sizes: BlockSizes, methods: dict[str, int]) -> Table:
    title = f"saved for backward, T {sizes.tokens}, d {sizes.width}, k {sizes.k}, {dtype}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("method")
    for heading in ("block\nMiB", "of\nfull", "by the linears\nMiB", "of\nfull"):
        table.add_column(heading, justify="right")
    full, frozen = methods["full"], methods["frozen"]
    for method, count in methods.items():
        table.add_row(
            method,
            f"{count / MIB:.1f}",
            f"{count / full:.2f}",
            f"{(count - frozen) / MIB:.2f}",
            f"{(count - frozen) / (full - frozen):.2f}",
        )
    return table
