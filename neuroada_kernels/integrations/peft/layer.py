"""A linear of any library with the bypasses of any number of adapters beside it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from neuroada_kernels import functional, ops
from neuroada_kernels.integrations.peft._bases import features_of, float_weight, is_plain
from neuroada_kernels.integrations.peft._storage import DeltaDict, IndexDict
from neuroada_kernels.integrations.peft.config import NeuroAdaPeftConfig
from neuroada_kernels.nn._offloaded import OffloadedWeight, offloading_hook
from neuroada_kernels.nn._siblings import Siblings
from neuroada_kernels.plan import order_slots
from neuroada_kernels.selection import select


class NeuroAdaPeftLayer(BaseTunerLayer):
    """PEFT's layer interface: adapters that are added, moved, merged and deleted by name.

    Attributes
    ----------
    neuroada_delta : DeltaDict
        Adapter to its parameter ``[d_out, k]``, of the config's ``delta_dtype``.
    neuroada_index : IndexDict
        Adapter to its persistent buffer, int32 ``[d_out, k]``; -1 in a slot without a connection.
    """

    adapter_layer_names = ("neuroada_delta",)
    other_param_names = ("neuroada_index",)

    base_layer: nn.Module
    in_features: int
    out_features: int
    active_adapters: list[str]

    def _adopt(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.in_features, self.out_features = features_of(base)
        self.neuroada_delta = DeltaDict()
        self.neuroada_index = IndexDict(self.in_features)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Per merged adapter, in merge order: its index, and the values that W had there.
        self._originals: list[tuple[Tensor, Tensor]] = []

    def update_layer(self, adapter_name: str, config: NeuroAdaPeftConfig, key: str) -> None:
        """Add an adapter: a delta of zeros at the connections that ``config`` chooses.

        With ``inference_mode`` or ``low_cpu_mem_usage`` the adapter is loaded next, so nothing is
        chosen: it has no connections until it is loaded.
        """
        settings = config.neuroada
        shape = (self.out_features, settings.k_of(key))
        device = torch.device("meta") if _new_is_meta() else self._base_device()
        if device.type == "meta":
            index = torch.empty(shape, dtype=torch.int32, device=device)
        elif config.inference_mode:
            index = torch.full(shape, -1, dtype=torch.int32, device=device)
        else:
            weight = self._weight_to_choose_by(settings.selection)
            index = select(
                weight,
                shape[1],
                settings.selection,
                generator=settings.generator_of(key),
                neuron_fraction=settings.neuron_fraction,
            )
            index = order_slots(index).to(device)
        delta = torch.zeros(shape, dtype=settings.torch_delta_dtype, device=device)
        self.neuroada_delta[adapter_name] = nn.Parameter(delta)
        self.neuroada_index.add(adapter_name, index, settings.save_activations)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's ``set_adapter``; what is kept of x is then decided for the active adapters."""
        super().set_adapter(adapter_names, inference_mode)
        self.neuroada_index.activate(self.active_adapters)

    def join(self, siblings: Siblings) -> None:
        """Join the layers that read the same x; the caller has to call ``settle`` afterwards."""
        self.neuroada_index.join(siblings)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add deltas to the chosen entries of the base's weight; the old entries are kept.

        If it raises, no further adapter counts as merged.

        Parameters
        ----------
        safe_merge : bool
            Change nothing where a merged entry would not be finite.
        adapter_names : list of str, optional
            Which adapters; by default the active ones.

        Raises
        ------
        ValueError
            With ``safe_merge``, where an entry would be NaN or infinite.
        TypeError
            If the base's weight cannot be written: its quantisation does not support merging.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.neuroada_delta]
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        weight, before = self._writable_weight(), len(self.merged_adapters)
        try:
            self._merge_into_weight(weight, names)
            self._write_back(weight)
        except BaseException:
            self._restore_weight(weight, before)
            raise

    def unmerge(self) -> None:
        """Restore the original entries of the base's weight, bit for bit.

        A quantised weight is quantised again instead, which rounds as merging did.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self._writable_weight()
        self._restore(weight, 0)
        self._write_back(weight)
        self._forget(0)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise where an entry of the merged weight would not be finite; nothing changes."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.neuroada_delta and n not in self.merged_adapters]
        offloaded, before = self._offloaded(), len(self.merged_adapters)
        weight = offloaded.rows(slice(None)).clone() if offloaded else self._writable_weight()
        try:
            for name in names:
                self._merge_into_weight(weight, [name])
                entries = ops.gather(weight, self.neuroada_index[name])
                if not bool(entries.isfinite().all()):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be "
                        "broken"
                    )
        finally:
            self._restore_weight(weight, before)

    def _merge_into_weight(self, weight: Tensor, names: list[str]) -> None:
        for name in names:
            index: Tensor = self.neuroada_index[name].clone()
            original = ops.merge_(weight, index, self.neuroada_delta[name].detach())
            self._originals.append((index, original))
            self.merged_adapters.append(name)

    def _restore_weight(self, weight: Tensor, count: int) -> None:
        """Undo all but the first ``count`` merges."""
        self._restore(weight, count)
        self._forget(count)

    def _restore(self, weight: Tensor, count: int) -> None:
        """Restore what all but the first ``count`` merges changed, the last one first."""
        for index, original in reversed(self._originals[count:]):
            ops.unmerge_(weight, index.to(weight.device), original.to(weight))

    def _forget(self, count: int) -> None:
        del self._originals[count:], self.merged_adapters[count:]

    def _writable_weight(self) -> Tensor:
        """W ``[d_out, d_in]``: the base's own storage, or a dequantised copy of a quantised one."""
        backend = self.quantization_backend
        if backend is not None:
            if not backend.supports_merge:
                raise TypeError(
                    f"base_layer: a {backend.backend_name} weight, which cannot be merged into"
                )
            return backend.get_base_weight(self.get_base_layer()).clone()
        return float_weight(self.get_base_layer())

    def _write_back(self, weight: Tensor) -> None:
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight)

    def _weight_to_choose_by(self, selection: str) -> Tensor:
        """W ``[d_out, d_in]``, or only its shape where values do not matter."""
        if selection == "random":
            shape = (self.out_features, self.in_features)
            return torch.zeros((), device=self._base_device()).expand(shape)
        if self.merged:
            raise RuntimeError(
                f"base_layer: {', '.join(self.merged_adapters)} merged into it, unmerge first: "
                "connections are chosen by the base's weight"
            )
        base, backend = self.get_base_layer(), self.quantization_backend
        if (offloaded := self._offloaded()) is not None:
            return offloaded.rows(slice(None))
        return float_weight(base) if backend is None else backend.get_base_weight(base)

    def _offloaded(self) -> OffloadedWeight | None:
        """The base's weight if accelerate has offloaded it; PEFT itself loads it for merging."""
        base = self.get_base_layer()
        return None if offloading_hook(base) is None else OffloadedWeight(base)

    def _base_device(self) -> torch.device:
        if (offloaded := self._offloaded()) is not None:
            return offloaded.device
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None:
            tensors = [*self.get_base_layer().parameters(), *self.get_base_layer().buffers()]
            device = tensors[0].device if tensors else torch.device("cpu")
        return device

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move a loaded adapter; PEFT's own method would also cast delta to the base's dtype."""
        if adapter_name not in self.neuroada_delta:
            return
        device = self._base_device() if device is None else device
        delta, index = self.neuroada_delta[adapter_name], self.neuroada_index[adapter_name]
        if delta.is_meta or index.is_meta or device.type == "meta":
            return
        if delta.device != device:
            moved = nn.Parameter(delta.detach().to(device), delta.requires_grad)
            self.neuroada_delta[adapter_name] = moved
        self.neuroada_index[adapter_name] = index.to(device)


class NeuroAdaPeftLinear(nn.Module, NeuroAdaPeftLayer):
    """The layer that replaces a linear.

    ``y[t, j] = base(x)[t, j] + sum over active adapters, s of delta[j, s] x[t, index[j, s]]``.
    Over a plain ``nn.Linear`` the GEMM and the first adapter are one fused call. Neither forward
    nor backward allocates a tensor of the weight's size.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: NeuroAdaPeftConfig,
        key: str,
        **quantization: Any,
    ) -> None:
        super().__init__()
        self._adopt(base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, key)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """``y [..., d_out]`` of ``x [..., d_in]``; further arguments go to the base.

        Parameters
        ----------
        x : Tensor
            Shape ``[..., d_in]``.
        adapter_names : list of str, optional
            An adapter for each row of the batch, or ``"__base__"`` for none.

        Raises
        ------
        ValueError
            If ``adapter_names`` is not one name per row, or is given while adapters are merged.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.neuroada_delta]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if not args and not kwargs and is_plain(self.base_layer):
            y = self._fused(x, names.pop(0))
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = self._add_bypass(y, x, name)
        return y

    def _fused(self, x: Tensor, name: str) -> Tensor:
        base: Any = self.base_layer
        own = self.neuroada_index[name], self.neuroada_delta[name]
        plan = self.neuroada_index.plan(name)
        functional.check_linear(x, base.weight, *own, base.bias, plan)
        kept = self.neuroada_index.keep(name, x, own[1])
        return functional.apply_linear(x, base.weight, *own, base.bias, plan, kept)

    def _add_bypass(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        own = self.neuroada_index[name], self.neuroada_delta[name]
        plan = self.neuroada_index.plan(name)
        kept = self.neuroada_index.keep(name, x, own[1], y.dtype)
        return functional.apply_bypass(y, x.to(y.dtype), *own, plan, kept)

    def _mixed_batch_forward(
        self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.neuroada_delta:
                rows = [row for row, its_name in enumerate(adapter_names) if its_name == name]
                chosen = torch.tensor(rows, device=x.device)
                y = y.index_copy(0, chosen, self._add_bypass(y[chosen], x[chosen], name))
        return y

    def extra_repr(self) -> str:
        counts = {name: index.shape[1] for name, index in self.neuroada_index.items()}
        return f"in_features={self.in_features}, out_features={self.out_features}, k={counts}"

    def __repr__(self) -> str:
        return "neuroada." + super().__repr__()


def check_choosable(
    name: str, base: nn.Module, config: NeuroAdaPeftConfig, **quantization: Any
) -> None:
    """Raise if connections are to be chosen by a quantised weight that cannot be read.

    Raises
    ------
    ValueError
        In that case, with the name of the module.
    """
    backend = resolve_quantization_backend(base, **quantization)
    by_value = config.selection != "random" and not config.inference_mode
    if by_value and backend is not None and not backend.supports_merge:
        raise ValueError(
            f"selection: {config.selection!r} for {name}, whose {backend.backend_name} weight "
            "cannot be read, expected 'random'; set_connections then puts in what was chosen by "
            "the weight before it was quantised"
        )


def _new_is_meta() -> bool:
    """Whether new parameters are made on the meta device, as under ``low_cpu_mem_usage``."""
    probe: Tensor = nn.Linear(1, 1, bias=False).weight
    return probe.is_meta
