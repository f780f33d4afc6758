"""The weights of bitsandbytes' Linear4bit and Linear8bitLt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels.nn._weight import BaseWeight, is_of


def bitsandbytes_weight(module: nn.Module) -> BaseWeight:
    """The weight of either layer, which has to be quantised.

    Raises
    ------
    ValueError
        If it is not quantised yet, or in a form that cannot be trained through.
    """
    if is_of(module, "bitsandbytes", "Linear8bitLt"):
        return _Weight8bit(module)
    return _Weight4bit(module)


def keep_packing(module: nn.Module) -> None:
    """Prevent evaluation on a CPU from repacking a 4-bit weight.

    With AVX-512, bitsandbytes repacks the weight in the first evaluation for a faster GEMM: the
    scales are permanently rounded to bfloat16, and the gradient of x is no longer available.
    """
    if is_of(module, "bitsandbytes", "Linear4bit"):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@contextlib.contextmanager
def packing_kept(model: nn.Module) -> Iterator[None]:
    """:func:`keep_packing` of every module; undone if the block raises."""
    before = [
        (module, vars(module).get("support_avx512bf16_for_cpu"))
        for module in model.modules()
        if is_of(module, "bitsandbytes", "Linear4bit")
    ]
    try:
        for module, _ in before:
            keep_packing(module)
        yield
    except BaseException:
        for module, support in before:
            if support is None:  # this bitsandbytes version does not repack
                del module.support_avx512bf16_for_cpu
            else:
                module.support_avx512bf16_for_cpu = support
        raise


def elements(parameter: Tensor) -> int:
    """The number of values of a parameter; 4-bit parameters hold two values per byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None or state.shape is None else int(state.shape.numel())


class _Weight4bit(BaseWeight):
    """Blocks of 4-bit codes along the rows, one scale per block; scales may be quantised too."""

    def __init__(self, module: nn.Module) -> None:
        weight: Any = module.weight
        self.state: Any = getattr(weight, "quant_state", None)
        if self.state is None:
            self.state = getattr(module, "quant_state", None)  # where FSDP has lost it
        if weight.device.type != "meta" and self.state is None:
            raise ValueError("base: Linear4bit is not quantised yet, expected it on a device")
        if getattr(self.state, "packing_format_for_cpu", False):
            raise ValueError(
                "base: Linear4bit was packed for inference by an evaluation on the CPU, expected "
                "one that is adapted first; load it again"
            )
        kind = f"bitsandbytes {weight.quant_type}"
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        dtype = getattr(self.state, "dtype", torch.float32)
        super().__init__(module, kind, shape, dtype, weight.device)
        if tuple(self.state.shape) != shape:
            raise ValueError(
                f"base: Linear4bit quantised as {list(self.state.shape)}, expected {list(shape)}"
            )

    def rows(self, rows: slice) -> Tensor:
        from bitsandbytes import functional

        d_out, d_in = self.shape
        size = self.state.blocksize
        first, end = rows.start * d_in, rows.stop * d_in
        blocks = slice(first // size, -(-end // size))
        start, stop = blocks.start * size, min(blocks.stop * size, d_out * d_in)
        data: Tensor = self.module.weight  # type: ignore[assignment]
        part = data.detach().view(torch.uint8).view(-1)[start // 2 : (stop + 1) // 2, None]
        state = functional.QuantState(
            absmax=self._scales()[blocks],
            # Even, two values per byte: odd sizes would make torch.compile recompile for each.
            shape=torch.Size((2 * part.shape[0],)),
            dtype=self.state.dtype,
            blocksize=size,
            code=self.state.code,
            quant_type=self.state.quant_type,
        )
        flat: Tensor = functional.dequantize_4bit(part.contiguous(), state).view(-1)
        return flat[first - start : end - start].view(-1, d_in)

    def _scales(self) -> Tensor:
        """One float32 scale per block: for blocks of 64, an eighth of the 4-bit codes' size."""
        from bitsandbytes import functional

        if not self.state.nested:
            plain: Tensor = self.state.absmax
            return plain
        scales: Tensor = functional.dequantize_blockwise(self.state.absmax, self.state.state2)
        return scales.add(self.state.offset).float()

    def quantise(self, weight: Tensor) -> object:
        from bitsandbytes import functional

        held: Any = self.module.weight
        return functional.quantize_4bit(
            weight.to(self.dtype),
            blocksize=self.state.blocksize,
            compress_statistics=self.state.nested,
            quant_type=self.state.quant_type,
            quant_storage=held.dtype,
        )

    def exchange(self, quantised: object) -> object:
        held: Any = self.module.weight
        before = held.data, self.state
        held.data, self.state = quantised  # type: ignore[misc]
        held.quant_state = self.module.quant_state = self.state
        return before


class _Weight8bit(BaseWeight):
    """Rows of int8, with the absolute maximum of each row as its scale."""

    def __init__(self, module: nn.Module) -> None:
        weight: Any = module.weight
        state: Any = module.state
        if state.has_fp16_weights:
            raise ValueError(
                "base: Linear8bitLt with has_fp16_weights=True, which quantises in each forward, "
                "expected has_fp16_weights=False"
            )
        # The first forward moves the scales from the weight to the state.
        self.holder: Any = weight if weight.SCB is not None else state
        if weight.device.type != "meta" and self.holder.SCB is None:
            raise ValueError("base: Linear8bitLt is not quantised yet, expected it on a device")
        d_out, d_in = weight.shape
        super().__init__(module, "bitsandbytes int8", (d_out, d_in), torch.float32, weight.device)

    def rows(self, rows: slice) -> Tensor:
        from bitsandbytes import functional

        data: Tensor = self.module.weight  # type: ignore[assignment]
        dense: Tensor = functional.int8_vectorwise_dequant(
            data.detach()[rows], self.holder.SCB[rows]
        )
        return dense

    def quantise(self, weight: Tensor) -> object:
        from bitsandbytes import functional

        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return codes, scales

    def exchange(self, quantised: object) -> object:
        held: Any = self.module.weight
        before = held.data, self.holder.SCB
        held.data, self.holder.SCB = quantised  # type: ignore[misc]
        if self.holder.CB is not None:
            self.holder.CB = held.data
        return before
