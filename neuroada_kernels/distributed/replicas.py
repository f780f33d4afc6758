"""Replicated state: connections, and trained parameters that are not sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuroada_kernels._models import find_layers, layers_in
from neuroada_kernels._sharding import is_sharded


def broadcast_adapter(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Broadcast the connections and the trained parameters of rank 0 to every process.

    Inactive adapters are included.

    Call this once in each process, on identically adapted models, before DDP, ``fully_shard`` or
    ``parallelize_module``. Selection by magnitude or at random gives every process the same
    connections anyway, for the same weights and seed. Selection by gradient does not if each
    process has its own data.

    Parameters
    ----------
    model : nn.Module
        The adapted model.
    group : ProcessGroup, optional
        The processes to synchronise; by default all.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer, if a parameter that trains is sharded already, if
        connections are not chosen yet, or a layer is merged; nothing is sent then. In every
        process, if they have not the same layers and adapters of the same k.
    """
    layers = layers_in(model).values()
    for layer in layers:
        if layer.deferred or layer.merged:
            state = "merged" if layer.merged else "not chosen yet"
            raise ValueError(f"model: has connections that are {state}, expected to train them")
    trained = list(_trained(model).values())
    if dist.get_world_size(group) < 0:  # not of this group
        return
    _check_alike(model, group)
    for layer in layers:
        for adapter in layer.adapter_names:
            held = layer.holder_of(adapter)
            index = held.index.clone()
            dist.broadcast(index, group=group, group_src=0)
            if not torch.equal(index, held.index):
                held.index = index
    deltas = [delta for layer in layers for delta in layer.deltas]
    for parameter in dict.fromkeys([*trained, *deltas]):
        dist.broadcast(parameter.detach(), group=group, group_src=0)
        # The broadcast does not do this; a resident layer detects a new delta by its version.
        torch.autograd.graph.increment_version(parameter)


def replicate_trained(
    model: nn.Module, group: dist.ProcessGroup | None = None
) -> set[nn.Parameter]:
    """Keep trained parameters replicated, beside frozen weights that ``fully_shard`` shards.

    Returns the parameters to pass to every ``fully_shard`` as ``ignored_params``, which then
    neither shards nor casts them: deltas stay float32 under any ``MixedPrecisionPolicy``. FSDP does
    not reduce the gradients of ignored parameters, so hooks registered here average them at the end
    of every backward, in one all-reduce.

    Parameters
    ----------
    model : nn.Module
        The adapted model, not yet sharded. Its deltas may be on the meta device.
    group : ProcessGroup, optional
        The data-parallel processes; by default all.

    Returns
    -------
    set of nn.Parameter

    Raises
    ------
    ValueError
        If nothing trains, if a trained parameter is sharded already, or if one other than an active
        adapter's delta is on the meta device.
    """
    trained, layers = _trained(model), list(find_layers(model).values())
    deltas = {id(layer.delta) for layer in layers}
    for name, parameter in trained.items():
        if parameter.is_meta and id(parameter) not in deltas:
            # Torch replaces it by another parameter when it gets values, without telling.
            raise ValueError(f"{name}: is on the meta device, expected values, as it trains")
    if dist.get_world_size(group) > 0:  # else not of this group
        averaging = _Averaging(list(trained.values()), group)
        for layer in layers:
            layer.averaging = averaging
    return set(trained.values())


def _check_alike(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Raise in every process if their models' tensors differ in what a broadcast needs."""
    own = {
        f"{name}.{adapter}": (str(held.delta.dtype), tuple(held.delta.shape))
        for name, layer in find_layers(model).items()
        for adapter in layer.adapter_names
        for held in [layer.holder_of(adapter)]
    }
    own |= {name: (str(p.dtype), tuple(p.shape)) for name, p in _trained(model).items()}
    all_own: list[dict[str, tuple[str, tuple[int, ...]]]]
    all_own = [{}] * dist.get_world_size(group)
    dist.all_gather_object(all_own, own, group=group)
    first = all_own[0]
    for rank, other in enumerate(all_own):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                forms = [
                    f"{o[name][1]} of {o[name][0]}" if name in o else "none" for o in (first, other)
                ]
                raise ValueError(
                    f"{name}: {forms[0]} on the first rank and {forms[1]} on rank {rank} of the "
                    "group, expected models that are adapted identically"
                )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model: has no parameter that trains, expected an adapted model")
    for name, parameter in trained.items():
        if is_sharded(parameter):
            raise ValueError(f"{name}: is sharded already, expected a whole parameter")
    return trained


class _Averaging:
    """Averages gradients over processes at the end of every backward that reaches a parameter.

    All gradients are sent each time, so that the message has the same length in every process,
    whichever parameters its backward reached. Where gradients accumulate over several backwards,
    those averaged before are equal in all processes, so averaging the sum again does not change
    them.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self._parameters: list[nn.Parameter] = []
        self._group = group
        self._backward: int | None = None  # id of the one that averages at its end
        for parameter in parameters:
            self.include(parameter)

    def include(self, parameter: nn.Parameter) -> None:
        """Average its gradient too, unless FSDP shards it, which then does so itself."""
        if not is_sharded(parameter) and all(known is not parameter for known in self._parameters):
            self._parameters.append(parameter)
            parameter.register_post_accumulate_grad_hook(self.on_gradient)

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Average the gradient of ``new`` instead; a sharded one is left to what shards it."""
        for i, parameter in enumerate(self._parameters):
            if parameter is old:
                if is_sharded(new):
                    del self._parameters[i]
                else:
                    self._parameters[i] = new
                    new.register_post_accumulate_grad_hook(self.on_gradient)
                return

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and pickles become None: the parameters of a copied model have no hooks."""
        return type(None), ()

    def on_gradient(self, _: Tensor) -> None:
        backward: int = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Set each gradient to the mean; it stays None if no process has one."""
        self._backward = None
        sums = self._sums()
        missing = [p.grad is None for p in self._parameters]
        reached = sums[: len(missing)].tolist() if any(missing) else None
        means = sums[len(missing) :].split([p.numel() for p in self._parameters])
        for i, (parameter, mean) in enumerate(zip(self._parameters, means, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif reached is not None and reached[i]:
                parameter.grad = mean.view_as(parameter).to(parameter.dtype, copy=True)

    def _sums(self) -> Tensor:
        """One row: the fraction of processes that have each gradient, then the mean gradients."""
        wide = any(p.dtype == torch.float64 for p in self._parameters)
        dtype = torch.float64 if wide else torch.float32
        device = self._parameters[0].device
        reached = [float(p.grad is not None) for p in self._parameters]
        parts = [torch.tensor(reached, dtype=dtype, device=device)]
        for p in self._parameters:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            parts.append(grad.flatten().to(dtype))
        row = torch.cat(parts).div_(dist.get_world_size(self._group))
        dist.all_reduce(row, group=self._group)
        return row
