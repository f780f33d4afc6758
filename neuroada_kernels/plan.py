"""The index: its checks, and the plan that sorts its entries by column.

A plan is one int32 tensor, so that it is passed as one argument: ``column_start [d_in + 1]``,
``split [SPLITS + 1]`` (columns that divide the work into equal parts), ``order`` (in which the CUDA
kernels read columns and entries; zeros if there is none) and ``entry [live]`` (``j * k + s`` of
every connection, sorted by column, ascending within a column or in that order).
``csrc/include/neuroada/planner.h`` defines the same layout for C++.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from neuroada_kernels import _extension
from neuroada_kernels._dtypes import FLOATING
from neuroada_kernels._tracing import has_no_values

SPLITS = 64

_ORDER_FACTS, _ORDER_WINDOW = 4, 64

#: Kept columns are padded to a multiple of 8, 16 bytes in 16 bits, if d_in is at least 1024.
_MULTIPLE, _FEW = 8, 1024


def check_index(index: Tensor, d_in: int) -> int:
    """Check ``index [d_out, k]`` and return its number of connections.

    Raises
    ------
    TypeError
        If ``index`` is not an int32 tensor.
    ValueError
        If it is no matrix, has no values, or has a column that is out of range or occurs twice in
        its row. -1 marks a slot without a connection and may repeat.
    RuntimeError
        If it is on a GPU while a CUDA graph is being captured.
    """
    check_index_form(index, d_in)
    _check_readable(index)
    if index.device.type == "cpu" and _extension.module is not None:
        live, error = _extension.module.check_index(_buffer(index), *index.shape, d_in)
        if error:
            raise ValueError(f"index: {error}")
        return int(live)
    ordered = index.sort(dim=1).values
    out_of_range = ((index < -1) | (index >= d_in)).any(1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    wrong_rows = (out_of_range | repeated).nonzero()
    if len(wrong_rows):
        row = int(wrong_rows[0])
        raise ValueError(f"index: {_first_fault(index[row].tolist(), row, d_in)}")
    return int((index >= 0).sum())


def _check_readable(index: Tensor) -> None:
    """Raise during CUDA graph capture, where values cannot be read, or if there are no values."""
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "index: cannot be checked or planned while a CUDA graph is captured; run the layer "
            "once before, or give the function its plan"
        )
    if has_no_values(index):
        raise ValueError("index: is a fake tensor, expected values")


def _first_fault(columns: list[int], row: int, d_in: int) -> str:
    """The message for an invalid row, the same as the C++ planner's."""
    seen: set[int] = set()
    for column in columns:
        if column < -1 or column >= d_in:
            return f"column {column} in row {row} is out of range for a weight with {d_in} inputs"
        if column in seen:
            return f"column {column} stands twice in row {row}, expected distinct columns"
        if column >= 0:
            seen.add(column)
    raise AssertionError(f"row {row} has no fault")


def check_index_form(index: Tensor, d_in: int) -> None:
    """The checks of :func:`check_index` that read no value of the index."""
    _check_matrix(index)
    if not 1 <= index.shape[1] <= d_in:
        raise ValueError(
            f"index: {index.shape[1]} connections per neuron, expected 1 to {d_in}, the inputs"
        )
    if index.numel() >= 2**31:
        raise ValueError(f"index: {index.numel()} connections, expected fewer than 2^31")


def _check_matrix(index: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"index: {type(index).__name__}, expected an int32 tensor")
    if index.dtype != torch.int32:
        raise TypeError(f"index: dtype {index.dtype}, expected torch.int32")
    if index.dim() != 2:
        raise ValueError(f"index: shape {list(index.shape)}, expected [d_out, k]")
    if index.is_meta:
        raise ValueError("index: is on the meta device, expected values")


def plan_size(d_in: int, live: int) -> int:
    """The number of values in the plan of ``live`` connections into ``d_in`` columns."""
    return sum(_sizes_without_entries(d_in)) + live


def _sizes_without_entries(d_in: int) -> tuple[int, int, int]:
    windows = -(-d_in // _ORDER_WINDOW)
    return d_in + 1, SPLITS + 1, _ORDER_FACTS + windows * _ORDER_WINDOW


def make_plan(index: Tensor, d_in: int, *, ordered: bool = True) -> Tensor:
    """The plan of a checked index, on its device.

    Parameters
    ----------
    index : Tensor
        int32, shape ``[d_out, k]``.
    d_in : int
        Number of inputs of the weight.
    ordered : bool
        Whether to sort the plan into the order in which the CUDA kernels read it, on GPUs where
        they serve by default. That takes longer than a single backward saves. No effect elsewhere.

    Raises
    ------
    TypeError, ValueError
        If ``index`` is no such tensor.
    RuntimeError
        If it is on a GPU while a CUDA graph is being captured.
    """
    check_index_form(index, d_in)
    _check_readable(index)
    if index.device.type == "cpu" and _extension.module is not None:
        live = count_connections(index, d_in)
        plan = torch.empty(plan_size(d_in, live), dtype=torch.int32, device="cpu")
        _extension.module.plan_index(_buffer(index), *index.shape, d_in, _buffer(plan))
        return plan
    columns = index.flatten().long()
    entry = torch.argsort(columns, stable=True)[int((columns < 0).sum()) :]
    counts = torch.bincount(columns[columns >= 0], minlength=d_in)
    column_start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # [d_in + 1]
    work = column_start + torch.arange(d_in + 1, device=index.device)
    parts = torch.arange(SPLITS + 1, device=index.device) * work[-1]
    split = torch.searchsorted(work * SPLITS, parts)
    order = counts.new_zeros(_sizes_without_entries(d_in)[-1])
    plan = torch.cat([column_start, split, order, entry]).int()
    return _in_order(plan, index, d_in) if ordered and index.is_cuda else plan


def _in_order(plan: Tensor, index: Tensor, d_in: int) -> Tensor:
    """The plan in the order in which the CUDA kernels read it, where they serve by default.

    ``NEUROADA_CUDA_ORDER=0`` returns it unchanged.
    """
    serves = _extension.serves_by_default(plan.device.index)
    if not serves or _extension.env_flag("NEUROADA_CUDA_ORDER") is False:
        return plan
    ordered = plan.clone()
    torch.ops.neuroada_C.order_plan.default(plan, d_in, *index.shape, ordered)
    return ordered


def is_plan_of(plan: Tensor, index: Tensor, d_in: int) -> bool:
    """Whether ``plan`` is a plan of the checked ``index [d_out, k]``, in any order of entries.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`make_plan`, and if the two are not on the same device.
    """
    made = make_plan(index, d_in, ordered=False)
    if plan.shape != made.shape:
        return False
    found, expected = plan_parts(plan, d_in), plan_parts(made, d_in)
    if not found.column_start.equal(expected.column_start):
        return False
    # Sort by column, then ascending within a column, as the entries of the new plan are.
    counts = expected.column_start.diff()
    column = torch.arange(d_in, device=made.device).repeat_interleave(counts)
    key = column * index.numel()
    return bool((key + found.entry).sort().values.equal(key + expected.entry))


def count_connections(index: Tensor, d_in: int) -> int:
    """The number of connections in ``index [d_out, k]``.

    On a CPU by one thread: waking others takes longer than counting, by milliseconds on a virtual
    machine, and a model has hundreds of layers.
    """
    on_cpu = index.device.type == "cpu" and not has_no_values(index)
    if on_cpu and _extension.module is not None:
        live, error = _extension.module.check_index(_buffer(index), *index.shape, d_in)
        if not error:
            return int(live)
    return int((index >= 0).sum())


def checksum(plan: Tensor) -> int | None:
    """A checksum of the plan's values, None if they cannot be read now; on a CPU by one thread."""
    if type(plan) is not Tensor or plan.is_meta or is_wrapped(plan):
        return None
    if plan.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return zlib.crc32(_buffer(plan)) if plan.is_cpu else int(plan.sum())


class Planned:
    """The index that was planned, identified by tensor, address and version counter.

    It keeps the storage alive, so that no other index assigned through ``.data`` can reuse its
    address and match. A copy of it, deep or pickled, matches no index.
    """

    __slots__ = ("_identity", "_memory")

    def __init__(self, index: Tensor | None = None) -> None:
        if index is not None and index.is_meta:
            index = None
        self._identity = None if index is None else _identity_of(index)
        self._memory = None if index is None else index.untyped_storage()

    def is_still(self, index: Tensor) -> bool:
        """Whether ``index`` is the planned one and was not written since."""
        identity = self._identity
        # Another index may be a wrapper without a data pointer.
        if identity is None or identity[0] != id(index) or index.is_meta:
            return False
        # _identity_of() inlined: one call less in a forward that starts with cold caches.
        version = -1 if index.is_inference() else index._version
        return identity[1] == index.data_ptr() and identity[2] == version

    def __reduce__(self) -> tuple[type[Planned], tuple[()]]:
        return Planned, ()


def is_wrapped(index: Tensor) -> bool:
    """Whether ``index`` is wrapped by ``torch.func`` or fake, so that its values cannot be read.

    The plain PyTorch formula that runs there needs no plan, and neither does an op's fake.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(index) or has_no_values(index)


def _identity_of(index: Tensor) -> tuple[int, int, int]:
    """Id, address and version of ``index``; -1 for an inference tensor, which has no version."""
    return id(index), index.data_ptr(), -1 if index.is_inference() else index._version


def order_slots(index: Tensor) -> Tensor:
    """``index`` with each row in the order that a GPU gathers fastest.

    Eight neurons, every second of sixteen, read their columns of one slot at once, from eight
    16-byte banks of shared memory; the permutation reduces bank conflicts. The connections of a
    neuron do not change, and the order depends only on the index. Without the C++ extension the
    rows stay as they are, which is equally correct.

    Parameters
    ----------
    index : Tensor
        int32, shape ``[d_out, k]``, on any device; not changed.

    Returns
    -------
    Tensor
        The same shape, on the same device.

    Raises
    ------
    TypeError, ValueError
        If ``index`` is no int32 matrix with values.
    """
    _check_matrix(index)
    if _extension.module is None or index.shape[1] == 1:
        return index
    return order_slots_(index.to("cpu", copy=True).contiguous()).to(index.device)


def order_slots_(index: Tensor) -> Tensor:
    """:func:`order_slots` of a contiguous index on the CPU, in place."""
    if _extension.module is not None and index.shape[1] > 1:
        _extension.module.order_slots(_buffer(index), *index.shape)
    return index


def chosen_columns(indices: Iterable[Tensor], d_in: int) -> Tensor:
    """The columns that occur in any of some checked indices, int32, ascending.

    At least one column, so that a matrix of them is never empty. If ``d_in`` is a multiple of 8 and
    at least 1024, up to seven unused columns pad the count to a multiple of 8, unless that would
    keep all columns: GPUs copy rows of 16-bit values in units of 8.
    """
    columns = [index[index >= 0] for index in indices]
    chosen = torch.zeros(d_in, dtype=torch.bool, device=columns[0].device)
    chosen[torch.cat(columns).long()] = True
    chosen[0] |= ~chosen.any()
    others = (~chosen).nonzero()[:, 0]
    count = d_in - others.shape[0]
    chosen[others[: filled_up(count, d_in) - count]] = True
    return chosen.nonzero()[:, 0].int()


def filled_up(count: int, d_in: int) -> int:
    """The number of columns of x that are kept if ``count`` were chosen."""
    filled = -(-count // _MULTIPLE) * _MULTIPLE
    return filled if filled < d_in and d_in % _MULTIPLE == 0 and d_in >= _FEW else count


def renumber(index: Tensor, columns: Tensor) -> Tensor:
    """``index [d_out, k]`` as positions in ``columns`` instead of columns of x; -1 stays -1.

    ``columns`` is from :func:`chosen_columns` and contains every column of ``index``.
    """
    place = torch.searchsorted(columns, index.clamp(min=0), out_int32=True)
    return torch.where(index >= 0, place, index)


def columns_of(x: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """``x[..., columns]`` in ``dtype``, detached; ``columns`` int32.

    Not traceable: uses the C++ or CUDA kernel where it serves, since torch's ``index_select``
    copies value by value.
    """
    x = x.detach()
    if type(x) is not Tensor or not x.is_contiguous() or not _copied_by_kernel(x):
        return traceable_columns_of(x, columns, dtype)
    # A view or a cast without effect is skipped: each is a call through the dispatcher.
    matrix = x if x.dim() == 2 else x.view(-1, x.shape[-1])
    kept: Tensor = torch.ops.neuroada_C.columns.default(matrix, columns)
    if x.dim() != 2:
        kept = kept.view(*x.shape[:-1], columns.shape[0])
    return kept if kept.dtype == dtype else kept.to(dtype)


def traceable_columns_of(x: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`columns_of` by torch ops alone."""
    return x.detach().index_select(x.dim() - 1, columns).to(dtype)


def _copied_by_kernel(x: Tensor) -> bool:
    """Whether the op ``columns`` has a kernel for the device and dtype of ``x``."""
    if x.dtype not in FLOATING:
        return False
    if x.is_cuda:
        return x.dtype != torch.float64 and _extension.serves_by_default(x.device.index)
    return x.is_cpu and _extension.library_error is None


class PlanParts(NamedTuple):
    """Views into a plan, without ``order``, which only the CUDA kernels read."""

    column_start: Tensor  # [d_in + 1]
    split: Tensor  # [SPLITS + 1]
    entry: Tensor  # [live]


def plan_parts(plan: Tensor, d_in: int) -> PlanParts:
    """The parts of a plan.

    Raises
    ------
    ValueError
        If ``plan`` is too short for a weight with ``d_in`` inputs.
    """
    live = plan.shape[0] - plan_size(d_in, 0)
    if live < 0:
        raise ValueError(
            f"plan: {plan.shape[0]} values, expected at least {plan_size(d_in, 0)} for {d_in} "
            "inputs"
        )
    column_start, split, _, entry = plan.split([*_sizes_without_entries(d_in), live])
    return PlanParts(column_start, split, entry)


def _buffer(tensor: Tensor) -> ctypes.Array[ctypes.c_int32]:
    """A CPU int32 tensor as a ctypes array for the buffer protocol; no copy if contiguous."""
    assert tensor.dtype == torch.int32
    dense = tensor.contiguous()
    view = (ctypes.c_int32 * dense.numel()).from_address(dense.data_ptr())
    view.owner = dense  # type: ignore[attr-defined]
    return view
