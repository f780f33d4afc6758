"""Whole models: replace their linears, merge, unmerge, count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from neuroada_kernels._progress import progress_bar, worth_showing
from neuroada_kernels.config import ALL_LINEAR, NeuroAdaConfig
from neuroada_kernels.gradient import SCORE_BYTES, Loss, each_gradient
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._strategy import refusal
from neuroada_kernels.nn.linear import NeuroAdaLinear
from neuroada_kernels.strategies import shared_weights
from neuroada_kernels.targets import find_targets


@dataclass(frozen=True)
class AdaptSummary:
    """What :func:`adapt` did.

    Attributes
    ----------
    modules : tuple of str
        Names of the adapted modules.
    trainable : int
        Parameters that train: connections, and biases where these do.
    total : int
        All parameters of the model, deltas included.
    adapter_bytes : int
        Bytes of all deltas and indices in memory.
    optimizer_bytes : int
        Bytes of AdamW's state: two numbers for each one that trains, in its dtype.
    resident : tuple of str
        Names of those that train by the strategy ``"resident"``.
    refused : mapping
        Of those for which ``"auto"`` came to ``"bypass"``: name to reason.
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
        """Trainable share of all parameters, from 0 to 1."""
        return self.trainable / self.total

    @classmethod
    def of(cls, model: nn.Module, modules: tuple[str, ...]) -> AdaptSummary:
        """The summary of an adapted model, which names these modules."""
        layers = list(_layers(model))
        named = {
            name: layer
            for name in modules
            if isinstance(layer := model.get_submodule(name), BypassLinear)
        }
        deltas = {id(layer.delta) for layer in layers}
        trained = [p for p in model.parameters() if p.requires_grad]
        return cls(
            modules=modules,
            trainable=sum(layer.connections for layer in layers)
            + sum(p.numel() for p in trained if id(p) not in deltas),
            total=sum(p.numel() for p in model.parameters()),
            adapter_bytes=sum(layer.delta.nbytes + layer.index.nbytes for layer in layers),
            optimizer_bytes=2 * sum(p.nbytes for p in trained),
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
    layers: int | Sequence[int] | None = None,
    seed: int = 0,
    k_pattern: Mapping[str, int] | None = None,
) -> AdaptSummary: ...


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

    ``adapt(model, config)``, or ``adapt(model, k, target_modules, ...)`` with the fields of
    :class:`NeuroAdaConfig` as arguments. A model on the meta device can be adapted before its
    weights have values; :func:`select_connections` chooses the connections when they do.

    Parameters
    ----------
    model : nn.Module
        The model; its tensors are shared with the new layers, never copied.
    config : NeuroAdaConfig
        What to adapt, and how; kept as ``model.neuroada_config``.
    k : int
        Connections a neuron.
    target_modules : str or sequence of str
        Names, their last parts, a regular expression, or ``"all-linear"``.
    **options
        Any other field of :class:`NeuroAdaConfig`: ``selection``, ``bias``, ``strategy``, ...
    scores : mapping, optional
        Module name to scores of its weight's shape, for ``selection="scores"``.
    generator : torch.Generator, optional
        For what is random, instead of the config's seed.
    data : iterable, optional
        Batches, for ``selection="gradient"``: a DataLoader, or a list.
    loss : callable, optional
        From the model and a batch to a scalar, for ``selection="gradient"``.
    score_bytes : int
        Memory for the gradients that ``selection="gradient"`` looks at together. The data is gone
        through once for each so many bytes of weights in float32.
    layer_type : type
        The layer to put in, :class:`ReferenceNeuroAdaLinear` for comparisons.
    progress : bool, optional
        Show a progress bar; by default for models of a billion parameters, on a terminal.

    Returns
    -------
    AdaptSummary

    Raises
    ------
    TypeError, ValueError
        If a target matches nothing or something that is no ``nn.Linear``, if a matched module is
        read by its parent in a way that would pass the bypass by, if a weight may not be
        resident, or if an argument is not as expected. The model is unchanged then.
    """
    config = _config_of(arguments, options, scores)
    _check_data(config, data, loss)
    targets = find_targets(model, config)
    if scores is not None:
        _check_scores(scores, targets)
    linears = _once(targets)
    elements = sum(linear.weight.numel() for linear in linears.values())
    show = worth_showing(elements) if progress is None else progress
    shared = {} if config.strategy == "bypass" else shared_weights(model, linears.values())
    layers: dict[nn.Module, BypassLinear] = {}

    def adapt_one(name: str, scores: Tensor | None) -> None:
        linear = linears[name]
        with errors_name(name):
            layers[linear] = layer_type.from_linear(
                linear,
                config.k_of(name),
                selection="scores" if scores is not None else config.selection,
                scores=scores,
                generator=generator or config.generator_of(name),
                neuron_fraction=config.neuron_fraction,
                delta_dtype=config.torch_delta_dtype,
            )
            if config.strategy == "resident" and not linear.weight.is_meta:
                reason = shared.get(linear) or layers[linear]._why_not_resident()
                if reason is not None:
                    raise ValueError(refusal(reason))

    with grad_flags_kept_on_error(model):
        if data is not None and loss is not None:
            for name, gradient in each_gradient(
                model, linears, data, loss, score_bytes=score_bytes, show_progress=show
            ):
                adapt_one(name, gradient)
        else:
            with progress_bar("selecting connections", elements, show) as advance:
                for name, linear in linears.items():
                    adapt_one(name, None if scores is None else scores[name])
                    advance(linear.weight.numel())
    replace(model, layers)
    for module, layer in layers.items():
        layer._set_strategy(config.strategy, shared.get(module))
    _freeze(model, config)
    keep_config(model, config)
    return AdaptSummary.of(model, tuple(targets))


def select_connections(model: nn.Module) -> list[str]:
    """Choose the connections of layers that were adapted on the meta device.

    To be called once their weights have values, or after each shard of them: a layer whose weight
    has none yet is left to the next call. Deltas become zero with it.

    Returns
    -------
    list of str
        Names of the layers that still wait.

    Raises
    ------
    ValueError
        If a weight has NaN, or may not be resident though that was asked for.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BypassLinear)}
    ready = [m for m in layers.values() if not (m.index.is_meta and m.weight.is_meta)]
    shared = shared_weights(model, ready)
    waiting = []
    for name, layer in layers.items():
        with errors_name(name):
            if not layer.select_connections(shared.get(layer)):
                waiting.append(name)
    return waiting


def merge(model: nn.Module) -> None:
    """Merge every NeuroAda layer of ``model`` into its weight; see ``NeuroAdaLinear.merge``."""
    for layer in _layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`, bit for bit."""
    # In reverse, so that weights which two layers share unwind as they were merged.
    for layer in reversed(list(_layers(model))):
        layer.unmerge()


def _layers(model: nn.Module) -> Iterator[BypassLinear]:
    return (module for module in model.modules() if isinstance(module, BypassLinear))


def replace(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put each layer where the module it stands for is, under every name that module has."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])


def _once(targets: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Each module under the first of its names."""
    first: dict[nn.Linear, str] = {}
    for name, linear in targets.items():
        first.setdefault(linear, name)
    return {name: linear for linear, name in first.items()}


def _config_of(
    arguments: tuple[Any, ...], options: dict[str, Any], scores: Mapping[str, Tensor] | None
) -> NeuroAdaConfig:
    """The config that was given, or that of the single arguments."""
    config = options.get("config", arguments[0] if arguments else None)
    if isinstance(config, NeuroAdaConfig):
        if len(arguments) + len(options) > 1:
            raise TypeError("config: given together with its fields, expected one of the two")
    else:
        names = ("k", "target_modules")
        if len(arguments) > len(names):
            raise TypeError(
                f"adapt: {len(arguments)} arguments by place, expected k, target_modules"
            )
        given = dict(zip(names, arguments, strict=False))
        twice = sorted(given.keys() & options.keys())
        if twice:
            raise TypeError(f"{twice[0]}: given twice")
        given |= {name: value for name, value in options.items() if name != "k_pattern"}
        if options.get("k_pattern") is not None:
            given["k_pattern"] = options["k_pattern"]
        if scores is not None and given.get("selection", "magnitude") == "magnitude":
            given["selection"] = "scores"
        config = NeuroAdaConfig(**given)
    if (scores is not None) != (config.selection == "scores"):
        word = "missing" if scores is None else "given"
        raise ValueError(f"scores: {word} with selection {config.selection!r}")
    return config


def keep_config(model: nn.Module, config: NeuroAdaConfig | None) -> None:
    """Keep how ``model`` was adapted as ``model.neuroada_config``, which travels with copies."""
    vars(model)["neuroada_config"] = config


def _check_data(config: NeuroAdaConfig, data: Iterable[Any] | None, loss: Loss | None) -> None:
    needed = config.selection == "gradient"
    for argument, value in (("data", data), ("loss", loss)):
        if (value is not None) != needed:
            word = "missing" if value is None else "given"
            raise ValueError(f"{argument}: {word} with selection {config.selection!r}")


def _freeze(model: nn.Module, config: NeuroAdaConfig) -> None:
    """Let nothing train but deltas, and biases where the config says so."""
    deltas = {id(layer.delta) for layer in _layers(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in deltas:
            is_bias = name.rpartition(".")[2].endswith("bias")
            parameter.requires_grad_(config.bias == "all" and is_bias)


def _check_scores(scores: Mapping[str, Tensor], targets: Mapping[str, nn.Linear]) -> None:
    """Raise unless every target has its own."""
    missing = sorted(targets.keys() - scores.keys())
    unknown = sorted(scores.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(f"scores: missing for targets {missing}, given for others {unknown}")


@contextlib.contextmanager
def errors_name(module: str) -> Iterator[None]:
    """Where the block raises for bad input, the message opens with the name of the module."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{module}: {error}") from error


@contextlib.contextmanager
def grad_flags_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Where the block raises, every parameter requires grad as it did before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
