"""Weights of nn.Linear that torchao has quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels.nn._weight import BaseWeight


class TorchaoWeight(BaseWeight):
    """A torchao tensor subclass, which dequantises itself."""

    def __init__(self, module: nn.Module) -> None:
        self.weight: Any = module.get_parameter("weight")
        kind = f"torchao {type(self.weight).__name__}"
        if self.weight.dim() != 2:
            raise ValueError(f"base: shape {list(self.weight.shape)}, expected [d_out, d_in]")
        d_out, d_in = self.weight.shape
        super().__init__(module, kind, (d_out, d_in), self.weight.dtype, self.weight.device)
        self._whole: Tensor | None = None

    @torch.no_grad()
    def rows(self, rows: slice) -> Tensor:
        if self._whole is None:
            try:
                part: Tensor = self.weight[rows].dequantize()
                return part
            except (NotImplementedError, RuntimeError, AssertionError):
                # Packed in tiles, which cannot be sliced by rows: dequantise and cache all of it.
                self._whole = self._dequantised()
        return self._whole[rows]

    def _dequantised(self) -> Tensor:
        try:
            dense: Tensor = self.weight.dequantize()
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(f"base: {self.kind}, which cannot be dequantised: {error}") from error
        return dense

    def quantise(self, weight: Tensor) -> object:
        held, weight, kind = self.weight, weight.to(self.dtype), type(self.weight).__name__
        if kind == "Float8Tensor":
            return held.from_hp(
                weight,
                float8_dtype=held.qdata.dtype,
                granularity=_granularity(held.block_size, self.shape),
                mm_config=held.mm_config,
                kernel_preference=held.kernel_preference,
                act_quant_kwargs=held.act_quant_kwargs,
            )
        if kind == "Int8Tensor" and held.act_quant_scale is None:
            return held.from_hp(
                weight,
                granularity=_granularity(held.block_size, self.shape),
                mapping_type=_mapping(held.zero_point),
                act_quant_kwargs=held.act_quant_kwargs,
                act_pre_scale=held.act_pre_scale,
                reduce_range=held.reduce_range,
            )
        if kind == "IntxUnpackedToInt8Tensor":
            return held.from_hp(
                weight,
                tuple(held.block_size),
                held.target_dtype,
                mapping_type=_mapping(held.zero_point),
                activation_quantization=held.activation_quantization,
            )
        return super().quantise(weight)

    def exchange(self, quantised: object) -> object:
        before = self.weight
        assert isinstance(quantised, Tensor)
        self.module.weight = nn.Parameter(quantised, requires_grad=False)
        self.weight, self._whole = self.module.weight, None
        return before


def _granularity(block: Sequence[int], shape: tuple[int, int]) -> object:
    """The torchao granularity of blocks of this size."""
    from torchao import quantization as ao

    if tuple(block) == shape:
        return ao.PerTensor()
    return ao.PerRow() if tuple(block) == (1, shape[1]) else ao.PerGroup(block[1])


def _mapping(zero_point: Tensor | None) -> object:
    from torchao.quantization.quant_primitives import MappingType

    symmetric = zero_point is None or not bool(zero_point.any())
    return MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
