"""Tensor parallelism: a layer that is sharded by neurons or by inputs.

The bypass is sharded as the weight is. Sharded by neurons (torch's "column-wise", which refers to
the transposed weight), each process has full rows of W, index and delta. Sharded by inputs
("row-wise"), it has some columns of W, and of every row the connections in these columns. Their
number differs from row to row, so they are packed to the front of ``[d_out, K]`` and the rest is
padded with -1, where K is the largest number in any row of any process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from neuroada_kernels import functional
from neuroada_kernels._sharding import is_sharded, local
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._named import DEFAULT
from neuroada_kernels.nn._strategy import refusal
from neuroada_kernels.nn.linear import NeuroAdaLinear

NEURONS, INPUTS = 0, 1  # dimensions of the weight


class NeuroAdaColwiseParallel(ColwiseParallel):
    """Shards a NeuroAda layer by neurons, and any other module as ``ColwiseParallel`` does.

    Arguments and layouts are those of ``torch.distributed.tensor.parallel.ColwiseParallel``:
    a replicated input, and an output that is sharded on its last dimension.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, BypassLinear):
            return _split_layer(module, device_mesh, NEURONS, self)
        return super()._apply(module, device_mesh)


class NeuroAdaRowwiseParallel(RowwiseParallel):
    """Shards a NeuroAda layer by inputs, and any other module as ``RowwiseParallel`` does.

    Arguments and layouts are those of ``torch.distributed.tensor.parallel.RowwiseParallel``:
    an input that is sharded on its last dimension, and a replicated output, summed over processes.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, BypassLinear):
            return _split_layer(module, device_mesh, INPUTS, self)
        return super()._apply(module, device_mesh)


@dataclass(frozen=True)
class _Split:
    """This process's shard of a layer, and the layouts of its input and output."""

    mesh: DeviceMesh
    dim: int
    shape: tuple[int, int]  # [d_out, d_in] of the unsharded weight
    source: int | None  # src_data_rank of distribute_tensor
    input_layouts: tuple[Placement, ...]
    output_layouts: tuple[Placement, ...]
    use_local_output: bool

    def range_of(self, rank: int) -> range:
        """The neurons or the inputs of a process: equal chunks, the last ones shorter."""
        size = self.shape[self.dim]
        chunk = -(-size // self.mesh.size())
        return range(min(rank * chunk, size), min((rank + 1) * chunk, size))

    @property
    def mine(self) -> range:
        return self.range_of(self.mesh.get_local_rank())

    @property
    def first_column(self) -> int:
        return self.mine.start if self.dim == INPUTS else 0

    def width(self, index: Tensor) -> int:
        """Slots per neuron in each process, for the unsharded ``index``."""
        if self.dim == NEURONS:
            return index.shape[1]
        counts = (_lying_in(index, self.range_of(rank)) for rank in range(self.mesh.size()))
        return max(1, *(int(count.sum(1).max()) for count in counts))

    def part(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """This process's shard of all connections; columns are relative to its first."""
        mine = self.mine
        if self.dim == NEURONS:
            return index[mine.start : mine.stop].clone(), delta[mine.start : mine.stop].clone()
        here = _lying_in(index, mine)
        slots = (~here).byte().argsort(dim=1, stable=True)[:, : self.width(index)]
        columns = torch.where(here, index - mine.start, -1).gather(1, slots)
        return columns, delta.masked_fill(~here, 0).gather(1, slots)

    def tensor(self, part: Tensor) -> DTensor:
        """All processes' shards ``[rows, slots]`` as one DTensor."""
        rows, slots = self.shape[0], part.shape[1] * (self.mesh.size() if self.dim == INPUTS else 1)
        return DTensor.from_local(
            part.contiguous(),
            self.mesh,
            [Shard(self.dim)],
            run_check=False,
            shape=torch.Size([rows, slots]),
            stride=(slots, 1),
        )


def _lying_in(index: Tensor, columns: range) -> Tensor:
    return (index >= columns.start) & (index < columns.stop)


class TensorParallelLinear(NeuroAdaLinear):
    """A layer that one of the styles has sharded; only ``parallelize_module`` makes one.

    ``weight``, ``bias`` and ``delta`` are DTensors. ``index``, ``in_features`` and
    ``out_features`` are those of this process's shard; columns are relative to its first.
    """

    _split: _Split

    def forward(self, x: Tensor) -> Tensor:
        """``y`` of ``x``, each in the layout of the style."""
        split = self._split
        y = super().forward(self._local_input(x))
        shape = torch.Size([*y.shape[:-1], split.shape[0]])
        placement = Shard(y.dim() - 1) if split.dim == NEURONS else Partial()
        out: Tensor = DTensor.from_local(
            y.contiguous(),
            split.mesh,
            [placement],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        ).redistribute(placements=split.output_layouts)
        if split.dim == INPUTS and self.bias is not None:
            out = out + self.bias.to(out.dtype)  # after the reduction, so that it is added once
        return local(out) if split.use_local_output else out

    def _local_input(self, x: Tensor) -> Tensor:
        split, last = self._split, x.dim() - 1
        whole = x
        if not isinstance(whole, DTensor):
            whole = DTensor.from_local(x, split.mesh, split.input_layouts, run_check=False)
        if split.dim == INPUTS:
            return whole.redistribute(placements=[Shard(last)]).to_local()
        # The gradient that comes back is a partial sum, over the neurons of this process.
        return whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def _bypass_forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._follow_index(self.index)
        bias = self.bias if self._split.dim == NEURONS else None
        return functional.apply_linear(
            x,
            local(self.weight),
            self.index,
            local(self.delta),
            None if bias is None else local(bias),
            self.plan,
        )

    def _is_planned(self) -> bool:
        # So x is kept by reference. Each layer's redistribution makes a new tensor of x, so that
        # siblings could neither share a copy nor detect what else keeps x.
        return False

    @property
    def connections(self) -> int:
        """Connections in all processes; a collective call."""
        return int((self.whole_connections()[0] >= 0).sum())

    @property
    def whole_shape(self) -> tuple[int, int]:
        return self._split.shape

    def whole_connections(self) -> tuple[Tensor, Tensor]:
        index, delta = self._columns().full_tensor(), self.delta.detach().full_tensor()  # type: ignore[attr-defined]
        k = max(1, int((index >= 0).sum(1).max()))
        slots = (index < 0).byte().argsort(dim=1, stable=True)[:, :k]
        return index.gather(1, slots), delta.gather(1, slots)

    def part_of_connections(self, index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        device = self.index.device
        _check_parts(self._split, index)
        columns, values = self._split.part(index.to(device), delta.to(device))
        return columns, self._split.tensor(values)

    def _columns(self) -> DTensor:
        """The index of all processes, with columns of the unsharded weight."""
        first = self._split.first_column
        return self._split.tensor(torch.where(self.index >= 0, self.index + first, -1))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "index"] = self._columns()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        index = state_dict.get(prefix + "index")
        if isinstance(index, DTensor):
            mine = index.redistribute(placements=[Shard(self._split.dim)]).to_local()
            columns = torch.where(mine >= 0, mine - self._split.first_column, -1)
            state_dict = {**state_dict, prefix + "index": columns}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        what = "neurons" if self._split.dim == NEURONS else "inputs"
        mine = self._split.mine
        return f"{super().extra_repr()}, {what} {mine.start} to {mine.stop - 1} of a whole"


def _split_layer(
    layer: BypassLinear, mesh: DeviceMesh, dim: int, style: ColwiseParallel | RowwiseParallel
) -> nn.Module:
    """Reduce ``layer`` to this process's shard, in place."""
    _check_layer(layer, mesh)
    source = style.src_data_rank
    d_out, d_in = layer.weight.shape
    layouts = (style.input_layouts, style.output_layouts, style.use_local_output)
    split = _Split(mesh, dim, (d_out, d_in), source, *layouts)
    index, delta = (
        distribute_tensor(t.detach(), mesh, [Replicate()], src_data_rank=source).to_local()
        for t in (layer.index, layer.delta)
    )
    _check_parts(split, index)
    columns, values = split.part(index, delta)
    placements = {"weight": Shard(dim), "bias": Shard(0) if dim == NEURONS else Replicate()}
    for name, placement in placements.items():
        parameter = layer._parameters[name]
        if parameter is not None:
            part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=source)
            setattr(layer, name, nn.Parameter(part, parameter.requires_grad))
    layer.__class__ = TensorParallelLinear
    assert isinstance(layer, TensorParallelLinear)
    layer._split = split
    layer._keep_columns(None)
    size = len(split.mine)
    layer.out_features, layer.in_features = (size, d_in) if dim == NEURONS else (d_out, size)
    layer.delta = nn.Parameter(split.tensor(values), layer.delta.requires_grad)
    layer.index = columns
    return layer


def _check_layer(layer: BypassLinear, mesh: DeviceMesh) -> None:
    if type(layer) is not NeuroAdaLinear:
        raise TypeError(f"module: {type(layer).__name__}, expected NeuroAdaLinear")
    if mesh.ndim != 1:
        raise ValueError(f"device_mesh: {mesh.ndim} dimensions, expected one of them")
    if is_sharded(layer.weight):
        raise ValueError("weight: is sharded already, expected a whole one")
    if layer.adapter_names != (DEFAULT,):
        names = list(layer.adapter_names)
        raise ValueError(f"module: has adapters by name, {names}, expected none but the default")
    if layer.strategy == "resident":
        raise ValueError(refusal("weight is to be split"))
    if layer.averaging is not None:
        raise ValueError("delta: replicate_trained averages it, expected one that is to be split")
    if layer.deferred or layer.merged:
        state = "merged" if layer.merged else "not chosen yet"
        raise ValueError(f"index: connections are {state}, expected to train them")


def _check_parts(split: _Split, index: Tensor) -> None:
    """Raise if a process's shard would be too small for a layer."""
    name = ("out_features", "in_features")[split.dim]
    least = len(split.range_of(split.mesh.size() - 1))
    needed = split.width(index) if split.dim == INPUTS else 1
    if least < needed:
        raise ValueError(
            f"{name}: {split.shape[split.dim]} over {split.mesh.size()} processes leave {least} to "
            f"the last, expected at least {needed}"
        )
