"""The tuner: which modules get a layer, adapters per row of a batch, and what is checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from neuroada_kernels.config import ALL_LINEAR
from neuroada_kernels.integrations.peft._bases import features_of
from neuroada_kernels.integrations.peft._register import PREFIX
from neuroada_kernels.integrations.peft._weighted import add_weighted
from neuroada_kernels.integrations.peft.config import NeuroAdaPeftConfig
from neuroada_kernels.integrations.peft.layer import (
    NeuroAdaPeftLayer,
    NeuroAdaPeftLinear,
    check_choosable,
)
from neuroada_kernels.nn._bitsandbytes import keep_packing
from neuroada_kernels.nn._weight import is_of
from neuroada_kernels.plan import check_index, check_index_form
from neuroada_kernels.siblings import link
from neuroada_kernels.targets import check_k_pattern, check_parent, in_layers, layer_number

_ROOT = "base_model.model."  # PeftModel's prefix to the names of the model's modules


class NeuroAdaModel(BaseTuner):
    """A model with ``neuroada`` adapters, made by ``peft.get_peft_model``.

    Parameters
    ----------
    model : nn.Module
        The model; modules that the config targets are wrapped in place.
    config : NeuroAdaPeftConfig
        The adapter's config, or a dict of configs by adapter.
    adapter_name : str
        Name of the adapter.
    low_cpu_mem_usage : bool
        Make the adapter on the meta device, to be loaded later.
    """

    prefix = PREFIX
    tuner_layer_cls = NeuroAdaPeftLayer
    target_module_mapping: Mapping[str, Any] = {}

    @staticmethod
    def _check_target_module_exists(peft_config: NeuroAdaPeftConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if not found or peft_config.layers is None:
            return found
        layers = peft_config.layers
        return layer_number(key) in ({layers} if isinstance(layers, int) else layers)

    def _prepare_model(self, peft_config: NeuroAdaPeftConfig, model: nn.Module) -> None:
        """Reject what cannot be adapted, before PEFT changes anything."""
        named = dict(model.named_modules())
        _expand_all_linear(peft_config, model, named)
        settings = peft_config.neuroada
        inside = tuple(f"{n}." for n, m in named.items() if isinstance(m, BaseTunerLayer))
        targets = [
            name
            for name in named
            if name
            and not name.startswith(inside)
            and check_target_module_exists(peft_config, name)
        ]
        if targets and peft_config.layers is not None:
            targets = in_layers(targets, peft_config.layers)
        for name in targets:
            base, parent = named[name], named[name.rpartition(".")[0]]
            check_parent(name, parent)
            if isinstance(base, BaseTunerLayer):
                base = base.get_base_layer()
            d_in, _ = features_of(base)
            check_choosable(name, base, peft_config, **get_quantization_kwargs(model))
            if settings.k_of(name) > d_in:
                raise ValueError(f"k: {settings.k_of(name)}, expected 1 to {d_in} for {name}")
        if targets:
            check_k_pattern(settings, targets)
        if not peft_config.inference_mode:
            _check_unpacked(named)
        for module in named.values():  # also where only a gradient passes through
            keep_packing(module)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """PEFT's ``inject_adapter``; then links layers that read the same x to keep it once."""
        super().inject_adapter(model, *args, **kwargs)
        link(adapted_layers(model))

    def _create_and_replace(
        self,
        peft_config: NeuroAdaPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, NeuroAdaPeftLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = NeuroAdaPeftLinear(
            target, adapter_name, peft_config, current_key, **get_quantization_kwargs(self.model)
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an adapter added later stays frozen until it is set
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)  # no move: its tensors are on their device already

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Does nothing: the config sets delta's dtype, by default float32."""

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """PEFT's ``merge_adapter``; with ``safe_merge``, an error leaves all layers unchanged."""
        if safe_merge:
            self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """PEFT's ``unmerge_adapter``, last layer first, since two layers may share a weight."""
        for module in reversed(list(self.model.modules())):
            if isinstance(module, BaseTunerLayer):  # of any method, as in merging
                with onload_layer(module):
                    module.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_merge(adapter_names)
        model: nn.Module = super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
        )
        return model

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        for layer in adapted_layers(self.model).values():
            layer.check_merge(adapter_names)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter whose deltas are the weighted sum of other adapters' deltas.

        Parameters
        ----------
        adapters : sequence of str
            Adapters with the same connections, such as those of one base with one ``k``,
            selected by magnitude.
        weights : sequence of float
            One weight per adapter, of any sign.
        adapter_name : str
            Name of the new adapter, which is inactive and does not train.
        combination_type : str
            Must be ``"linear"``.

        Raises
        ------
        ValueError
            If an adapter does not exist; if the adapters have different connections; if the new
            name is taken; or if an adapter has trained biases or ``modules_to_save``.
        """
        if combination_type != "linear":
            raise ValueError(f"combination_type: {combination_type!r}, expected 'linear'")
        layers = adapted_layers(self.model)
        self.peft_config[adapter_name] = add_weighted(
            self.peft_config, layers, adapters, weights, adapter_name
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within the block, layers receive the ``adapter_names`` that the model was called with."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams")
        repeated = names
        if isinstance(beams, int) and beams > 1:  # each row is repeated for every beam
            repeated = [name for name in names for _ in range(beams)]
        encoder = _encoder_of(self.model)
        encoded = set() if encoder is None else set(encoder.modules())
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, NeuroAdaPeftLayer | AuxiliaryTrainingWrapper):
                    hook = _names_hook(names if module in encoded else repeated)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {n for layer in adapted_layers(self.model).values() for n in layer.neuroada_delta}
        unknown = sorted(set(names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping, after checking that every delta comes with its index."""
        for key in state_dict:
            if key.endswith(".neuroada_delta"):
                index = key.removesuffix("delta") + "index"
                if index not in state_dict:
                    raise ValueError(f"{index}: missing beside {key}, expected both")
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def _expand_all_linear(
    config: NeuroAdaPeftConfig, model: nn.Module, named: Mapping[str, nn.Module]
) -> None:
    """PEFT's expansion, except inside modules that another adapter trains in full."""
    if config.target_modules == ALL_LINEAR:
        _maybe_include_all_linear_layers(config, model)
        whole = tuple(f"{n}." for n, m in named.items() if isinstance(m, AuxiliaryTrainingWrapper))
        names = {name for name in config.target_modules if not name.startswith(whole)}
        config.target_modules = names  # type: ignore[assignment]


def _check_unpacked(named: Mapping[str, nn.Module]) -> None:
    """Raise for weights that no longer give x a gradient."""
    for name, module in named.items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if is_of(module, "bitsandbytes", "Linear4bit") and getattr(
            state, "packing_format_for_cpu", False
        ):
            raise ValueError(
                f"{name}: Linear4bit was packed for inference by an evaluation on the CPU, "
                "expected a model that is adapted first; load it again"
            )


def adapted_layers(model: nn.Module) -> dict[str, NeuroAdaPeftLayer]:
    """The layers of a model, by the names that their modules had before PEFT wrapped it."""
    return {
        name.removeprefix(_ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, NeuroAdaPeftLayer)
    }


def set_connections(
    model: nn.Module, connections: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Set the connections of an adapter's layers to given ones, and their deltas to zero.

    Parameters
    ----------
    model : nn.Module
        A ``PeftModel``, or a model that an adapter was added to.
    connections : mapping
        Module name, as in the base model, to an index as ``neuroada_kernels.select`` returns it:
        int32 ``[d_out, k]``, with the config's ``k``.
    adapter_name : str
        The adapter.

    Raises
    ------
    TypeError, ValueError
        If a module has no such adapter, or an index does not fit it; nothing changes then.
    RuntimeError
        If a layer is merged.
    """
    layers = adapted_layers(model)
    for name, index in connections.items():
        layer = layers.get(name)
        if layer is None or adapter_name not in layer.neuroada_delta:
            raise ValueError(f"connections: {name} has no adapter {adapter_name!r}")
        if layer.merged:
            raise RuntimeError(f"connections: {name} is merged, unmerge first")
        try:
            _check_fits(index, layer, adapter_name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"connections: {name}: {error}") from None
    with torch.no_grad():
        for name, index in connections.items():
            delta = layers[name].neuroada_delta[adapter_name]
            layers[name].neuroada_index[adapter_name] = index.to(delta.device, copy=True)
            delta.zero_()


def _check_fits(index: Tensor, layer: NeuroAdaPeftLayer, adapter_name: str) -> None:
    check_index_form(index, layer.in_features)
    shape = layer.neuroada_delta[adapter_name].shape
    if index.shape != shape:
        raise ValueError(f"shape {list(index.shape)}, expected {list(shape)}")
    check_index(index, layer.in_features)


def _names_hook(names: Sequence[str]) -> Callable[..., Any]:
    return partial(_put_names, names=names)


def _put_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: Sequence[str]) -> Any:
    return args, kwargs | {"adapter_names": names}


def _encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder, whose rows are not repeated for beams."""
    find = getattr(model, "get_encoder", None)
    encoder = find() if callable(find) else None
    return None if encoder is model or not isinstance(encoder, nn.Module) else encoder
