"""Which connections of each neuron get a bypass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor, nn

from neuroada_kernels import _extension
from neuroada_kernels._dtypes import FLOATING, NAMES
from neuroada_kernels._tracing import has_no_values

#: Elements of the weight per block, so that no mask of the weight's size is allocated.
_BLOCK_ELEMENTS = 1 << 22

#: The number of each ranking in the C++ kernel.
_RANKINGS = {"scores": 0, "magnitude": 1, "smallest": 2}
_HAS_NAN = "{}: has NaN, expected numbers"

METHODS = ("magnitude", "smallest", "random", "scores")


class Rows(Protocol):
    """A weight that is read by ranges of rows, such as one that is dequantised block by block."""

    @property
    def shape(self) -> Sequence[int]:
        """``[d_out, d_in]``."""

    @property
    def device(self) -> torch.device:
        """The device of the values."""

    def rows(self, rows: slice) -> Tensor:
        """``W[rows]``, a floating dtype."""


def select(
    weight: Tensor,
    k: int,
    method: str = "magnitude",
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    neuron_fraction: float = 1.0,
) -> Tensor:
    """Choose ``k`` input connections of every neuron (row) of ``weight``.

    Ties go to the lower column, so that the choice is the same on every device; columns ascend
    within a row. Nothing of the weight's size is allocated.

    Parameters
    ----------
    weight : Tensor
        Shape ``[d_out, d_in]``, floating.
    k : int
        Connections per neuron, from 1 to ``d_in``.
    method : str
        ``"magnitude"`` (largest \\|W\\|, the paper's choice), ``"smallest"`` (smallest \\|W\\|),
        ``"random"``, or ``"scores"`` (largest of ``scores``). If ``scores`` is given,
        ``"magnitude"`` means ``"scores"``.
    scores : Tensor, optional
        Shape of ``weight``, any real dtype: magnitudes of gradients, activation-aware scores.
    generator : torch.Generator, optional
        For ``"random"`` and ``neuron_fraction``.
    neuron_fraction : float
        Fraction of the neurons, drawn at random, that get bypasses, in (0, 1]; at least one does.
        The rows of the others are filled with -1.

    Returns
    -------
    Tensor
        int32, shape ``[d_out, k]``, on the device of ``weight``.

    Raises
    ------
    TypeError
        If ``weight`` or ``scores`` is not a real tensor, or ``k`` no integer.
    ValueError
        If a shape, ``k``, ``method`` or ``neuron_fraction`` is not as expected, if values are
        NaN, or if ``weight`` is on the meta device.
    """
    check_weight(weight)
    return select_rows(
        _Matrix(weight), k, method, scores, generator, neuron_fraction=neuron_fraction
    )


def select_rows(
    weight: Rows,
    k: int,
    method: str = "magnitude",
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    neuron_fraction: float = 1.0,
) -> Tensor:
    """:func:`select` for a weight that is read a few rows at a time."""
    method = method_for(method, scores)
    check_arguments(weight.shape, k, method, scores, neuron_fraction)
    k = int(k)
    index = _compiled(weight, k, method, scores)
    if index is None:
        index = _by_blocks(weight, k, _scorer(weight, method, scores, generator))
    if neuron_fraction < 1:
        drawn = _drawn_neurons(weight.shape[0], neuron_fraction, generator)
        index[~drawn.to(weight.device)] = -1
    return index


def method_for(method: str, scores: Tensor | None) -> str:
    """``"scores"`` if scores are given with the default ``"magnitude"``, otherwise ``method``."""
    return "scores" if scores is not None and method == "magnitude" else method


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of rows of a weight ``[d_out, d_in]``, at most ``_BLOCK_ELEMENTS`` or one row each."""
    d_out, d_in = shape
    step = max(1, _BLOCK_ELEMENTS // d_in)
    for first in range(0, d_out, step):
        yield slice(first, min(first + step, d_out))


class _Matrix:
    """A tensor as :class:`Rows`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.shape, self.device = weight.shape, weight.device

    def rows(self, rows: slice) -> Tensor:
        return self.weight[rows]


def check_weight(weight: Tensor, *, values: bool = True) -> None:
    """Raise unless ``weight`` is a floating matrix, with values if ``values`` is true."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: {type(weight).__name__}, expected a tensor")
    if weight.dtype not in FLOATING:
        raise TypeError(f"weight: dtype {weight.dtype}, expected {NAMES}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: shape {list(weight.shape)}, expected [d_out, d_in]")
    if values and has_no_values(weight):
        kind = "on the meta device" if weight.is_meta else "a fake tensor"
        raise ValueError(f"weight: is {kind}, expected values")


def check_arguments(
    shape: Sequence[int], k: int, method: str, scores: Tensor | None, neuron_fraction: float
) -> None:
    """Raise unless the arguments of :func:`select` fit one another and a weight of that shape."""
    check_k(k, shape[1])
    if method not in METHODS:
        raise ValueError(f"method: {method!r}, expected one of {', '.join(METHODS)}")
    if (scores is not None) != (method == "scores"):
        raise ValueError(
            f"scores: {'given' if scores is not None else 'missing'} with method {method!r}"
        )
    if scores is not None:
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores: {type(scores).__name__}, expected a tensor")
        if scores.is_complex() or scores.dtype == torch.bool:
            raise TypeError(f"scores: dtype {scores.dtype}, expected a real dtype")
        if tuple(scores.shape) != tuple(shape):
            raise ValueError(
                f"scores: shape {list(scores.shape)}, expected {list(shape)}, as weight"
            )
        if scores.is_meta:
            raise ValueError("scores: is on the meta device, expected values")
    if isinstance(neuron_fraction, bool) or not isinstance(neuron_fraction, Real):
        raise TypeError(f"neuron_fraction: {neuron_fraction!r}, expected a number")
    if not 0 < neuron_fraction <= 1:
        raise ValueError(f"neuron_fraction: {neuron_fraction}, expected a share in (0, 1]")


def check_k(k: int, d_in: int) -> None:
    """Raise unless ``k`` is an integer from 1 to ``d_in``."""
    if not isinstance(k, Integral) or isinstance(k, bool):
        raise TypeError(f"k: {k!r}, expected an integer")
    if not 1 <= k <= d_in:
        raise ValueError(f"k: {k}, expected 1 to {d_in}, the inputs of the weight")


def _compiled(weight: Rows, k: int, method: str, scores: Tensor | None) -> Tensor | None:
    """The index by the C++ kernel, or None where it does not serve."""
    name, tensor = "scores", scores
    if scores is None:
        name, tensor = "weight", weight.weight if isinstance(weight, _Matrix) else None
    if (
        tensor is None
        or _extension.library_error is not None
        or method not in _RANKINGS
        or not (weight.device.type == "cpu" and tensor.is_cpu)
        or type(tensor) not in (Tensor, nn.Parameter)
        or tensor.dtype not in FLOATING
        or (tensor.shape[1] > 1 and tensor.stride(1) != 1)
    ):
        return None
    index: Tensor = torch.ops.neuroada_C.largest(tensor.detach(), k, _RANKINGS[method])
    if bool((index[:, 0] < 0).any()):
        raise ValueError(_HAS_NAN.format(name))
    return index


def _by_blocks(weight: Rows, k: int, score: Callable[[slice], Tensor]) -> Tensor:
    """The index in plain PyTorch, a block of rows at a time."""
    index = torch.empty(weight.shape[0], k, dtype=torch.int32, device=weight.device)
    for rows in row_blocks(weight.shape):
        index[rows] = _largest(score(rows), k)
    return index


def _scorer(
    weight: Rows, method: str, scores: Tensor | None, generator: torch.Generator | None
) -> Callable[[slice], Tensor]:
    """A function from a range of rows to their scores, of which the largest are chosen."""
    if scores is not None:
        return lambda rows: _without_nan("scores", scores.detach()[rows].to(weight.device))
    if method == "random":
        device = weight.device if generator is None else generator.device

        def draw(rows: slice) -> Tensor:
            shape = (rows.stop - rows.start, weight.shape[1])
            return torch.rand(shape, generator=generator, device=device).to(weight.device)

        return draw
    sign = -1 if method == "smallest" else 1
    return lambda rows: sign * _without_nan("weight", weight.rows(rows)).abs()


def _without_nan(name: str, block: Tensor) -> Tensor:
    if block.is_floating_point() and bool(block.isnan().any()):
        raise ValueError(_HAS_NAN.format(name))
    return block


def _largest(score: Tensor, k: int) -> Tensor:
    """Columns of the ``k`` largest scores of each row, ascending; ties go to the lower column."""
    if score.dtype in (torch.float16, torch.bfloat16):
        score = score.float()
    if score.dtype == torch.float32:
        return _largest_of_float32(score, k)
    least = score.topk(k, dim=1).values[:, -1:]
    above = score > least
    equal = score == least
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k).int()


def _largest_of_float32(score: Tensor, k: int) -> Tensor:
    """The same by distinct int64 keys that increase with the score and decrease with the column."""
    bits = (score + 0.0).view(torch.int32)  # -0.0 becomes +0.0
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    column = torch.arange(score.shape[1], device=score.device)
    key = (rank.long() << 32) - column
    return key.topk(k, dim=1, sorted=False).indices.int().sort(dim=1).values


def drawn_count(d_out: int, fraction: float) -> int:
    """The number of neurons that ``fraction`` selects, at least one."""
    return max(1, round(fraction * d_out))


def _drawn_neurons(d_out: int, fraction: float, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(d_out, generator=generator, device=device)
    drawn = torch.zeros(d_out, dtype=torch.bool, device=device)
    drawn[order[: drawn_count(d_out, fraction)]] = True
    return drawn
