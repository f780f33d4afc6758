"""Operations on whole models: replace linears, choose connections, count parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from neuroada_kernels._models import (
    check_not_replicated,
    find_layers,
    layers_in,
    outside_inference_mode,
    unwrapped,
)
from neuroada_kernels.arguments import check_selection, config_of
from neuroada_kernels.choices import each_choice
from neuroada_kernels.config import ALL_LINEAR, NeuroAdaConfig
from neuroada_kernels.freezing import (
    check_biases_train,
    deltas_of,
    freeze,
    grad_flags_kept_on_error,
)
from neuroada_kernels.gradient import SCORE_BYTES, Loss
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._bitsandbytes import elements, packing_kept
from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn._named import DEFAULT, NamedLayer
from neuroada_kernels.nn._strategy import refusal
from neuroada_kernels.nn.bypass import NeuroAdaBypass
from neuroada_kernels.nn.experts import STACKS, NeuroAdaExperts, is_experts
from neuroada_kernels.nn.linear import NeuroAdaLinear
from neuroada_kernels.replacing import hand_on_attributes
from neuroada_kernels.siblings import check_siblings, link_siblings
from neuroada_kernels.strategies import shared_weights
from neuroada_kernels.targets import (
    errors_name,
    find_targets,
    is_foreign,
)


@dataclass(frozen=True)
class AdaptSummary:
    """What :func:`adapt` did.

    Attributes
    ----------
    modules : tuple of str
        Names of the adapted modules.
    trainable : int
        Number of trainable parameters: connections, and biases if they train.
    total : int
        Number of parameters including deltas; 4-bit weights count values, not bytes.
    adapter_bytes : int
        Bytes of all deltas and indices in memory.
    optimizer_bytes : int
        Bytes of AdamW's state: two values per trainable parameter, in its dtype.
    resident : tuple of str
        Names of the modules that train by the strategy ``"resident"``.
    refused : mapping
        For each module for which ``"auto"`` chose ``"bypass"``: name to reason.
    """

    modules: tuple[str, ...]
    trainable: int
    total: int
    adapter_bytes: int
    optimizer_bytes: int
    resident: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Trainable fraction of all parameters, from 0 to 1."""
        return self.trainable / self.total

    @classmethod
    def of(
        cls, model: nn.Module, modules: tuple[str, ...], adapter: str | None = None
    ) -> AdaptSummary:
        """The summary of ``adapter``, by default the active one, of these modules."""
        having = [
            (layer, name)
            for layer in find_layers(model).values()
            if (name := adapter or layer.active_adapter) in layer.adapter_names
        ]
        held = [layer.holder_of(name) for layer, name in having]
        deltas = deltas_of(model)
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in deltas]
        named = {
            name: layer
            for name in modules
            if isinstance(layer := model.get_submodule(name), NamedLayer)
        }
        return cls(
            modules=modules,
            trainable=sum(layer.count_of(name) for layer, name in having)
            + sum(p.numel() for p in others),
            total=sum(elements(p) for p in model.parameters()),
            adapter_bytes=sum(each.delta.nbytes + each.index.nbytes for each in held),
            optimizer_bytes=2 * sum(p.nbytes for p in (*others, *(each.delta for each in held))),
            resident=tuple(n for n, layer in named.items() if layer.strategy == "resident"),
            refused={n: why for n, layer in named.items() if (why := layer.strategy_reason)},
        )

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} modules adapted; {self.trainable:,} of {self.total:,} "
            f"parameters train ({self.share:.3%}); {_size(self.adapter_bytes)} of adapter, "
            f"{_size(self.optimizer_bytes)} of AdamW's state"
            + (f"; {len(self.resident)} resident" if self.resident or self.refused else "")
            + "".join(f"; {name} by bypass: {reason}" for name, reason in self.refused.items())
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


@overload
def adapt(
    model: nn.Module,
    config: NeuroAdaConfig,
    *,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    score_bytes: int = SCORE_BYTES,
    layer_type: type[BypassLinear] = NeuroAdaLinear,
    progress: bool | None = None,
) -> AdaptSummary: ...


@overload
def adapt(
    model: nn.Module,
    k: int = 1,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    score_bytes: int = SCORE_BYTES,
    layer_type: type[BypassLinear] = NeuroAdaLinear,
    progress: bool | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    selection: str = "magnitude",
    neuron_fraction: float = 1.0,
    bias: str = "none",
    delta_dtype: str | torch.dtype = "float32",
    strategy: str = "bypass",
    save_activations: str = "auto",
    siblings: Sequence[Sequence[str]] | None = None,
    layers: int | Sequence[int] | None = None,
    seed: int = 0,
    k_pattern: Mapping[str, int] | None = None,
) -> AdaptSummary: ...


@outside_inference_mode
def adapt(
    model: nn.Module,
    *arguments: Any,
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    score_bytes: int = SCORE_BYTES,
    layer_type: type[BypassLinear] = NeuroAdaLinear,
    progress: bool | None = None,
    **options: Any,
) -> AdaptSummary:
    """Replace linears of ``model`` in place, and freeze everything but what the adapter trains.

    Modules that PEFT has added before, such as LoRA matrices or prompts, keep their
    ``requires_grad`` flags; ``"all-linear"`` leaves them out.

    ``adapt(model, config)``, or ``adapt(model, k, target_modules, ...)`` with the fields of
    :class:`NeuroAdaConfig` as arguments. A model on the meta device can be adapted before its
    weights have values; :func:`select_connections` chooses the connections when they do.

    Parameters
    ----------
    model : nn.Module
        The model; the new layers share its tensors, without copies.
    config : NeuroAdaConfig
        What to adapt, and how; stored as ``model.neuroada_config``.
    k : int
        Connections per neuron.
    target_modules : str or sequence of str
        Names, their last parts, a regular expression, or ``"all-linear"``.
    **options
        Any other field of :class:`NeuroAdaConfig`: ``selection``, ``bias``, ``strategy``, ...
    scores : mapping, optional
        Module name to scores of its weight's shape, for ``selection="scores"``.
    generator : torch.Generator, optional
        For random choices, instead of the config's seed.
    data : iterable, optional
        Batches, for ``selection="gradient"``: a DataLoader, or a list.
    loss : callable, optional
        From the model and a batch to a scalar, for ``selection="gradient"``.
    score_bytes : int
        Memory for the gradients that ``selection="gradient"`` accumulates at a time. There is one
        pass over the data per group of weights whose float32 gradients fit.
    layer_type : type
        Type of the new layers; :class:`ReferenceNeuroAdaLinear` for comparisons. A module whose
        forward differs from ``nn.Linear``'s is wrapped in a :class:`NeuroAdaBypass` instead.
    progress : bool, optional
        Show a progress bar; by default for models of a billion parameters, on a terminal.

    Returns
    -------
    AdaptSummary

    Raises
    ------
    TypeError, ValueError
        If a target matches nothing or a module that is no linear layer, if a matched module has
        hooks or a parent that reads its weight directly and would skip the bypass, if a weight may
        not be resident, or if an argument is not as expected. The model is unchanged then.
    """
    config = config_of(arguments, options, scores, data, loss)
    check_not_replicated(model)
    model = unwrapped(model)
    _check_unnamed(model)
    targets = find_targets(model, config)
    check_selection(config, targets, scores)
    check_siblings(targets, config.siblings)
    if config.bias == "all":
        check_biases_train(model)
    modules = once(targets)
    shared = {} if config.strategy == "bypass" else shared_weights(model, modules.values())
    layers: dict[nn.Module, NamedLayer | NeuroAdaExperts] = {}
    choices = each_choice(
        model,
        modules,
        config,
        scores=scores,
        generator=generator,
        data=data,
        loss=loss,
        score_bytes=score_bytes,
        progress=progress,
    )
    # Also for 4-bit modules that are not adapted: a gradient has to pass through them.
    with grad_flags_kept_on_error(model), packing_kept(model):
        for name, choice in choices:
            module = modules[name]
            with errors_name(name):
                layers[module] = chosen_layer(module, choice, config, layer_type)
                for part in parts_of(layers[module]):
                    if config.strategy == "resident" and not part.deferred:
                        reason = shared.get(module) or part._why_not_resident()
                        if reason is not None:
                            raise ValueError(refusal(reason))
    replace(model, layers)
    link_siblings(model, config.siblings)
    for module, layer in layers.items():
        for part in parts_of(layer):
            part._set_strategy(config.strategy, shared.get(module))
    freeze(model, config)
    keep_config(model, config)
    return AdaptSummary.of(model, with_stacks(model, targets))


@outside_inference_mode
def select_connections(model: nn.Module) -> list[str]:
    """Choose the connections of layers that were adapted on the meta device.

    Call it once their weights have values, or after loading each checkpoint shard: a layer whose
    weight has no values yet is left to the next call. Deltas are set to zero.

    Returns
    -------
    list of str
        Names of the layers whose weights still have no values.

    Raises
    ------
    ValueError
        If the model has no NeuroAda layer, a weight has NaN, or a weight may not be resident
        although ``"resident"`` was requested.
    """
    layers = layers_in(model)
    ready = [m for m in layers.values() if not (m.index.is_meta and m.weight.is_meta)]
    shared = shared_weights(model, ready)
    waiting = []
    for name, layer in layers.items():
        with errors_name(name):
            if not layer.select_connections(shared.get(layer)):
                waiting.append(name)
    return waiting


def _check_unnamed(model: nn.Module) -> None:
    layers = find_layers(model).values()
    names = {name for layer in layers for name in layer.adapter_names} - {DEFAULT}
    if names:
        raise ValueError(f"model: has adapters by name, {sorted(names)}, expected add_adapter")


def parts_of(layer: NamedLayer | NeuroAdaExperts) -> list[NamedLayer]:
    """The layers that hold connections: ``layer`` itself, or its stacks of experts."""
    return [layer] if isinstance(layer, NamedLayer) else list(layer.stacks.values())


def with_stacks(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """The names, with each module of experts replaced by its stacks."""
    found: list[str] = []
    for name in names:
        experts = isinstance(model.get_submodule(name), NeuroAdaExperts)
        found += [f"{name}.{stack}" for stack in STACKS] if experts else [name]
    return tuple(found)


def replace(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each module in ``layers`` by its layer, under every name of the module."""
    for module, layer in layers.items():
        hand_on_attributes(module, layer)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])


def once(targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module under the first of its names."""
    first: dict[nn.Module, str] = {}
    for name, module in targets.items():
        first.setdefault(module, name)
    return {name: module for module, name in first.items()}


def chosen_layer(
    module: nn.Module,
    choice: Deferred,
    config: NeuroAdaConfig,
    layer_type: type[BypassLinear] = NeuroAdaLinear,
) -> NamedLayer | NeuroAdaExperts:
    """The layer that replaces ``module``, with connections by ``choice``."""
    return layer_over(
        module,
        choice.k,
        layer_type,
        selection=choice.method,
        scores=choice.scores,
        generator=choice.generator,
        neuron_fraction=choice.neuron_fraction,
        delta_dtype=config.torch_delta_dtype,
        save_activations=config.save_activations,
    )


def layer_over(
    module: nn.Module, k: int, layer_type: type[BypassLinear], **options: Any
) -> NamedLayer | NeuroAdaExperts:
    """The layer that replaces ``module``, or wraps it if its forward is not ``nn.Linear``'s."""
    if is_experts(module):
        options.pop("save_activations", None)  # each expert reads another x, saved in full
        if options.pop("scores", None) is not None:
            raise ValueError(
                "scores: for experts, expected selection by their weights or at random"
            )
        return NeuroAdaExperts(module, k, **options)
    if is_foreign(module):
        return NeuroAdaBypass(module, k, **options)
    assert isinstance(module, nn.Linear)
    layer = layer_type.from_linear(module, k, **options)
    assert isinstance(layer, NamedLayer)
    return layer


def keep_config(model: nn.Module, config: NeuroAdaConfig | None) -> None:
    """Store the config as ``model.neuroada_config``, which copies of the model inherit."""
    vars(model)["neuroada_config"] = config
