"""The fixed table of cases, and the inputs of a case."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neuroada_kernels.selection import select

IndexKind = Literal["magnitude", "random", "one_column", "half_the_neurons", "ragged"]


@dataclass(frozen=True)
class Case:
    """A shape and how its index is chosen.

    ``index``: ``magnitude`` and ``random`` as in :func:`neuroada_kernels.select`; in
    ``one_column`` every neuron has columns 0 to k - 1; in ``half_the_neurons`` the other half has
    no bypasses; in ``ragged`` single slots are empty.
    """

    tokens: int
    d_in: int
    d_out: int
    k: int
    bias: bool = False
    index: IndexKind = "magnitude"

    @property
    def name(self) -> str:
        kind = "" if self.index == "magnitude" else f"-{self.index}"
        return f"T{self.tokens}-{self.d_in}to{self.d_out}-k{self.k}{'-bias' * self.bias}{kind}"


#: Every test that runs over shapes runs over these.
CASES: tuple[Case, ...] = (
    Case(tokens=17, d_in=64, d_out=48, k=1),
    Case(tokens=17, d_in=64, d_out=48, k=8, bias=True),
    Case(tokens=1, d_in=64, d_out=48, k=2),
    Case(tokens=1, d_in=67, d_out=101, k=20, bias=True, index="random"),
    Case(tokens=0, d_in=64, d_out=48, k=8),
    Case(tokens=0, d_in=13, d_out=7, k=1, bias=True),
    Case(tokens=512, d_in=96, d_out=257, k=2, bias=True),
    Case(tokens=512, d_in=257, d_out=96, k=8),
    Case(tokens=101, d_in=127, d_out=61, k=20, bias=True),
    Case(tokens=37, d_in=61, d_out=127, k=20, index="random"),
    Case(tokens=17, d_in=13, d_out=31, k=13, bias=True),
    Case(tokens=17, d_in=1, d_out=5, k=1),
    Case(tokens=33, d_in=5, d_out=1, k=2, bias=True),
    Case(tokens=65, d_in=128, d_out=200, k=1, index="one_column"),
    Case(tokens=17, d_in=96, d_out=300, k=8, bias=True, index="one_column"),
    Case(tokens=33, d_in=72, d_out=90, k=2, bias=True, index="half_the_neurons"),
    Case(tokens=49, d_in=90, d_out=72, k=8, index="ragged"),
)

#: The shapes that benchmarks measure; each with k of 1, 8 and 20.
BENCH_CASES: tuple[Case, ...] = tuple(
    Case(tokens=tokens, d_in=d_in, d_out=d_out, k=k)
    for tokens, d_in, d_out in (
        (512, 2048, 2048),
        (512, 1024, 4096),
        (512, 4096, 1024),
        (16, 2048, 2048),
    )
    for k in (1, 8, 20)
)

#: The linears of a Llama-3-8B block (q and o; k and v; gate and up; down), for GPUs.
GPU_BENCH_CASES: tuple[Case, ...] = tuple(
    Case(tokens=tokens, d_in=d_in, d_out=d_out, k=k)
    for tokens in (1024, 8192, 16384)
    for d_in, d_out in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
    for k in (1, 8, 20)
)


@dataclass(frozen=True)
class Shape:
    """A linear of a model."""

    d_in: int
    d_out: int
    bias: bool = False


def _llama(hidden: int, intermediate: int, kv: int, bias: bool = False) -> tuple[Shape, ...]:
    """The distinct shapes of q, k and v, o, gate and up, and down."""
    q, o = Shape(hidden, hidden, bias), Shape(hidden, hidden)
    up, down = Shape(hidden, intermediate), Shape(intermediate, hidden)
    return tuple(dict.fromkeys((q, Shape(hidden, kv, bias), o, up, down)))


def _encoder(hidden: int, intermediate: int) -> tuple[Shape, ...]:
    """The shape of attention's linears, and those of the MLP's two."""
    return (
        Shape(hidden, hidden, True),
        Shape(hidden, intermediate, True),
        Shape(intermediate, hidden, True),
    )


#: The distinct linears of a block of real models, from their published ``config.json``
#: (hidden_size, intermediate_size, num_key_value_heads times the size of a head).
MODEL_SHAPES: dict[str, tuple[Shape, ...]] = {
    "llama-3-8b": _llama(4096, 14336, 8 * 128),
    "llama-3-70b": _llama(8192, 28672, 8 * 128),
    "qwen2.5-7b": _llama(3584, 18944, 4 * 128, bias=True),  # q, k and v have biases
    "bert-base": _encoder(768, 3072),
    "vit-l": _encoder(1024, 4096),
    "gpt-2": (Shape(768, 3 * 768, True), *_encoder(768, 3072)),  # q, k and v are one linear
}


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; ``grad_output`` is the gradient of y."""

    x: Tensor  # [tokens, d_in]
    weight: Tensor  # [d_out, d_in]
    index: Tensor  # [d_out, k]
    delta: Tensor  # [d_out, k], float32 (float64 for float64)
    bias: Tensor | None  # [d_out]
    grad_output: Tensor  # [tokens, d_out]


def make_inputs(
    case: Case, dtype: torch.dtype, *, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """The inputs of a case, determined by the case, dtype, seed and type of device."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()) + seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        return values * scale

    weight = normal(case.d_out, case.d_in, scale=case.d_in**-0.5)
    index = _make_index(case, weight, generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        x=normal(case.tokens, case.d_in).to(dtype),
        weight=weight.to(dtype),
        index=index,
        delta=normal(case.d_out, case.k, scale=0.1 * case.d_in**-0.5).to(wide),
        bias=normal(case.d_out).to(dtype) if case.bias else None,
        grad_output=normal(case.tokens, case.d_out).to(dtype),
    )


def _make_index(case: Case, weight: Tensor, generator: torch.Generator) -> Tensor:
    if case.index == "one_column":
        row = torch.arange(case.k, dtype=torch.int32, device=weight.device)
        return row.expand(case.d_out, case.k).contiguous()
    if case.index == "half_the_neurons":
        return select(weight, case.k, generator=generator, neuron_fraction=0.5)
    if case.index == "ragged":
        index = select(weight, case.k, "random", generator=generator)
        kept = torch.rand(index.shape, generator=generator, device=weight.device) < 0.7
        return index.where(kept, -1)
    return select(weight, case.k, case.index, generator=generator)
