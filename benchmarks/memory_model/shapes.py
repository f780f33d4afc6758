"""Sizes of real models and of scaled ones, and the setting of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuroada_kernels.benchmarks import llama


@dataclass(frozen=True)
class Sizes:
    """Of a transformer; ``kv_heads`` None is an encoder like RoBERTa, with biases and GELU."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None

    @property
    def is_encoder(self) -> bool:
        return self.kv_heads is None

    @property
    def linears(self) -> list[str]:
        """The modules that every method adapts: all linears of a layer."""
        return ENCODER_LINEARS if self.is_encoder else llama.LINEARS


#: As transformers names them; the head's ``classifier.dense`` is none of them.
ENCODER_LINEARS = [
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]

MODELS = {
    "RoBERTa-large": Sizes(1024, 4096, 24, 16, 50265),
    "Llama-7B": Sizes(4096, 11008, 32, 32, 32000, 32),
    "Llama-13B": Sizes(5120, 13824, 40, 40, 32000, 40),
    "Llama-3-8B": Sizes(4096, 14336, 32, 32, 128256, 8),
}


@dataclass(frozen=True)
class Setting:
    """A training step: its model, dtype, tokens and k."""

    sizes: Sizes
    batch: int
    sequence: int
    dtype: str
    k: int
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
