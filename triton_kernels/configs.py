"""Block sizes and kernel choices by shape, dtype and GPU: the heuristic ones, and all candidates.

Every figure here is a prediction until a measurement in ``benchmarks/results/`` corrects it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

#: Maximum bytes of transposed input per call, but at least one block of tokens.
WORKSPACE_BYTES = 32 << 20
#: Maximum bytes of a float32 GEMM result per call, but at least one block of tokens.
WIDE_BYTES = 64 << 20
#: Entries per program of the merge kernels.
MERGE_BLOCK = 256

_MIN_BLOCK_T, _MAX_BLOCK_T = 16, 128


@dataclass(frozen=True)
class Gpu:
    """What the choices depend on: FLOP/s of a GEMM in 16 bits, bytes/s of memory."""

    multiprocessors: int
    capability: tuple[int, int]
    shared_bytes: int  # available to one program
    flops: float
    bandwidth: float


#: An H200 as measured; the target for which tests compile, and of the interpreter.
H200 = Gpu(132, (9, 0), 227 << 10, 790e12, 4.3e12)
KNOWN_GPUS = {
    (8, 0): Gpu(108, (8, 0), 163 << 10, 250e12, 1.6e12),
    (8, 9): Gpu(128, (8, 9), 99 << 10, 160e12, 0.9e12),
    (9, 0): H200,
    (10, 0): Gpu(148, (10, 0), 227 << 10, 1600e12, 7e12),
}


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of tensors on ``device``; for the interpreter, on a CPU, an H200."""
    if device.type != "cuda":
        return H200
    known = torch.cuda.get_device_properties(device)
    capability = (known.major, known.minor)
    nearest = (
        KNOWN_GPUS.get(capability)
        or KNOWN_GPUS[max(c for c in KNOWN_GPUS if c[0] <= max(8, known.major))]
    )
    shared = getattr(known, "shared_memory_per_block_optin", nearest.shared_bytes)
    if torch.version.hip is not None:
        shared = 64 << 10  # of a workgroup on AMD's CDNA
    return replace(
        nearest,
        multiprocessors=known.multi_processor_count,
        capability=capability,
        shared_bytes=shared,
    )


@dataclass(frozen=True)
class TransposeConfig:
    block_t: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class BypassConfig:
    block_t: int
    block_n: int
    num_warps: int


class _LightColumns:
    """``rounds``: entries up to which a column is always light, summed one per round."""

    rounds: int

    def most_light(self, entries: int, d_in: int) -> int:
        """Maximum entries of a light column, if ``d_in`` columns have ``entries`` in total.

        At least twice the mean: a heavy column takes its whole program, which pays for a few
        columns that are much longer than the rest, but not for nearly all of them.
        """
        return max(self.rounds, 2 * triton.cdiv(entries, max(d_in, 1)))


@dataclass(frozen=True)
class TransposedConfig(_LightColumns):
    """``block_e``: entries of a heavy column that are summed at once."""

    block_t: int
    block_c: int
    block_e: int
    rounds: int
    num_warps: int

    def splits_per_program(self, splits: int, d_in: int) -> int:
        """How many of the plan's splits, a power of two, fill a block of columns."""
        columns_per_split = max(1, d_in // splits)
        return min(splits, triton.next_power_of_2(triton.cdiv(self.block_c, columns_per_split)))


@dataclass(frozen=True)
class SddmmConfig:
    block_e: int
    block_t: int
    num_warps: int


@dataclass(frozen=True)
class GemmConfig(_LightColumns):
    """A tile of the GEMM, and of the bypass that it starts from (``rounds``, ``block_e``)."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    max_programs: int
    rounds: int = 16
    block_e: int = 32

    def programs(self, rows: int, columns: int) -> int:
        """How many programs share the tiles of a ``[rows, columns]`` output."""
        tiles = triton.cdiv(rows, self.block_m) * triton.cdiv(columns, self.block_n)
        return min(tiles, self.max_programs)


def padding(tokens: int) -> int:
    """A transposed input is padded to a multiple of this number of tokens."""
    return min(max(triton.next_power_of_2(tokens), _MIN_BLOCK_T), _MAX_BLOCK_T)


def tokens_per_chunk(bytes_per_token: int) -> int:
    """How many tokens of transposed inputs fit into the workspace, a multiple of every block."""
    return _whole_blocks(WORKSPACE_BYTES, bytes_per_token)


def tokens_per_float32_gemm(width: int) -> int:
    """How many tokens of ``width`` float32 outputs are held at once, a multiple of every block."""
    return _whole_blocks(WIDE_BYTES, 4 * width)


def _whole_blocks(available: int, bytes_per_token: int) -> int:
    blocks = available // max(1, bytes_per_token) // _MAX_BLOCK_T
    return max(1, blocks) * _MAX_BLOCK_T


def transpose_config(tokens: int) -> TransposeConfig:
    """Blocks of as many tokens as the padding."""
    return TransposeConfig(padding(tokens), 64, 4)


def bypass_configs(tokens: int, dtype: torch.dtype) -> list[BypassConfig]:
    """The heuristic choice first, then the other candidates of tuning."""
    block_t = min(padding(tokens), 64)
    warps = (8, 4) if dtype == torch.float64 else (4, 8)
    return [BypassConfig(block_t, n, w) for w in warps for n in (64, 32)]


def transposed_configs(tokens: int, dtype: torch.dtype) -> list[TransposedConfig]:
    """As :func:`bypass_configs`, for the input gradient."""
    block_t = min(padding(tokens), 64)
    warps = 8 if dtype == torch.float64 else 4
    # In 16 bits dx is added to a float32 GEMM result, whose loads are coalesced in the narrow tile.
    widths = (32, 64) if dtype.itemsize == 2 else (64, 32)
    return [
        TransposedConfig(block_t, block_c, 32, rounds, warps)
        for block_c in widths
        for rounds in (16, 8, 32)
    ]


def sddmm_configs(tokens: int, dtype: torch.dtype) -> list[SddmmConfig]:
    """As :func:`bypass_configs`, for the sampled gradient."""
    block_t = padding(tokens)
    warps = (8, 4) if dtype == torch.float64 else (4, 8)
    return [SddmmConfig(e, block_t, w) for w in warps for e in (32, 16)]


def sddmm_parts(entries: int, tokens: int, gpu: Gpu) -> int:
    """Into how many parts the tokens of a chunk are split, so that the GPU has enough programs."""
    programs = max(1, triton.cdiv(entries, 32))
    wanted = triton.cdiv(4 * gpu.multiprocessors, programs)
    return max(1, min(wanted, triton.cdiv(tokens, padding(tokens))))


def gemm_configs(tokens: int, dtype: torch.dtype, gpu: Gpu) -> list[GemmConfig]:
    """The heuristic choice first; each fits the shared memory of ``gpu``."""
    block_m = padding(tokens)
    # Up to 32 rows per tile are the rows of one warp: wider tiles then give the others work.
    shapes = [(128, 64), (64, 64), (128, 32)] if block_m >= 64 else [(64, 128), (128, 64), (64, 64)]
    warps = 8 if block_m == 128 else 4
    size = dtype.itemsize
    found = []
    for block_n, depth in shapes:
        block_k = depth * 2 // size
        stage = (block_m + block_n) * block_k * size
        # The accumulator passes through shared memory once when it is transposed.
        stages = min(4, (gpu.shared_bytes - (8 << 10)) // stage)
        if stages >= 2:
            found.append(
                GemmConfig(block_m, block_n, block_k, 8, warps, stages, gpu.multiprocessors)
            )
    return found


#: Share of the FLOP/s of torch's GEMM that the kernels here are expected to reach.
_GEMM_EFFICIENCY = 0.75
_LAUNCH_SECONDS = 3e-6


def prefer_fused(tokens: int, d_in: int, d_out: int, dtype: torch.dtype, gpu: Gpu) -> bool:
    """Whether a fused GEMM and bypass is expected to beat torch's GEMM and a bypass kernel.

    torch's GEMM reaches more FLOP/s; the fused kernel saves writing and reading the product in
    float32, and a launch. ``d_out`` is the width of the output, y or dx.
    ``NEUROADA_TRITON_FUSED=0|1`` overrides the choice.
    """
    if dtype == torch.float64:
        return False
    forced = os.environ.get("NEUROADA_TRITON_FUSED")
    if forced is not None:
        if forced not in ("0", "1"):
            raise ValueError(f"NEUROADA_TRITON_FUSED: {forced!r}, expected 0 or 1")
        return forced == "1"
    if dtype == torch.float32:
        return False  # torch's GEMM is far ahead in float32, and TF32 is not the default
    if 0 in (tokens, d_in, d_out) or d_in % 16 or d_out % 16:
        return False  # nothing to do, or row strides that prevent vectorized loads
    size = dtype.itemsize
    dense = max(
        2 * tokens * d_in * d_out / gpu.flops,
        size * (tokens * (d_in + d_out) + d_in * d_out) / gpu.bandwidth,
    )
    config = gemm_configs(tokens, dtype, gpu)[0]
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(d_out, config.block_n)
    waves = triton.cdiv(tiles, gpu.multiprocessors)
    occupied = tiles / (waves * gpu.multiprocessors)
    fused = dense / (_GEMM_EFFICIENCY * occupied)
    return fused < dense + 2 * 4 * tokens * d_out / gpu.bandwidth + _LAUNCH_SECONDS


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which sums are taken."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """How a float32 GEMM may round its inputs, by torch's own setting."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
