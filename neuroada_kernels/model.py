"""Whole models: replace their linears, merge, unmerge, count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._strategy import check_known, refusal
from neuroada_kernels.nn.linear import NeuroAdaLinear
from neuroada_kernels.strategies import shared_weights

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class AdaptSummary:
    """What :func:`adapt` did.

    ``modules`` are the replaced names; ``trainable`` counts connections (and nothing else trains),
    ``total`` all parameters of the model, ``delta`` included. ``resident`` are the names with that
    strategy, ``refused`` those for which ``"auto"`` came to ``"bypass"``, with the reason.
    """

    modules: tuple[str, ...]
    trainable: int
    total: int
    resident: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Trainable share of all parameters, from 0 to 1."""
        return self.trainable / self.total

    @classmethod
    def of(cls, model: nn.Module, modules: tuple[str, ...]) -> AdaptSummary:
        """The summary of a model whose modules of these names are adapted."""
        named = {name: model.get_submodule(name) for name in modules}
        layers = {name: m for name, m in named.items() if isinstance(m, BypassLinear)}
        return cls(
            modules=modules,
            trainable=sum(int((layer.index >= 0).sum()) for layer in {*layers.values()}),
            total=sum(p.numel() for p in model.parameters()),
            resident=tuple(n for n, layer in layers.items() if layer.strategy == "resident"),
            refused={n: why for n, layer in layers.items() if (why := layer.strategy_reason)},
        )

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} modules adapted; {self.trainable:,} of {self.total:,} "
            f"parameters train ({self.share:.3%})"
            + (f"; {len(self.resident)} resident" if self.resident or self.refused else "")
            + "".join(f"; {name} by bypass: {reason}" for name, reason in self.refused.items())
        )


def adapt(
    model: nn.Module,
    k: int = 1,
    target_modules: Sequence[str] | str = "all-linear",
    *,
    selection: str = "magnitude",
    scores: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    neuron_fraction: float = 1.0,
    delta_dtype: torch.dtype = torch.float32,
    strategy: str = "bypass",
    layer_type: type[BypassLinear] = NeuroAdaLinear,
) -> AdaptSummary:
    """Replace matching ``nn.Linear`` modules in place, and freeze everything but their deltas.

    Parameters
    ----------
    model : nn.Module
        The model; its tensors are shared with the new layers, never copied.
    k : int
        Connections a neuron.
    target_modules : sequence of str, or "all-linear"
        Names, or their last parts (``"q_proj"`` matches ``"layers.0.attn.q_proj"``);
        ``"all-linear"`` takes every ``nn.Linear``.
    selection, generator, neuron_fraction, delta_dtype
        As in :class:`NeuroAdaLinear`.
    scores : mapping, optional
        Module name to scores of its weight's shape, for ``selection="scores"``.
    strategy : str
        As in :class:`NeuroAdaLinear`. ``"resident"`` is refused where another module of the model
        reads a weight, as with tied embeddings; ``"auto"`` leaves such layers at ``"bypass"``.
    layer_type : type
        The layer to put in, :class:`ReferenceNeuroAdaLinear` for comparisons.

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
    check_known(strategy)
    targets = _find_targets(model, target_modules)
    if scores is not None:
        selection = _check_scores(scores, targets, selection)
    shared = {} if strategy == "bypass" else shared_weights(model, targets.values())
    layers: dict[nn.Module, BypassLinear] = {}
    with grad_flags_kept_on_error(model):
        for name, linear in targets.items():
            if linear in layers:
                continue
            try:
                layers[linear] = layer_type.from_linear(
                    linear,
                    k,
                    selection=selection,
                    scores=None if scores is None else scores[name],
                    generator=generator,
                    neuron_fraction=neuron_fraction,
                    delta_dtype=delta_dtype,
                )
                if strategy == "resident":
                    reason = shared.get(linear) or layers[linear]._why_not_resident()
                    if reason is not None:
                        raise ValueError(refusal(reason))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
    replace(model, layers)
    for module, layer in layers.items():
        layer._set_strategy(strategy, shared.get(module))
    trained_before = {id(layer.delta) for layer in _layers(model)}
    for parameter in model.parameters():
        if id(parameter) not in trained_before:
            parameter.requires_grad_(False)
    return AdaptSummary.of(model, tuple(targets))


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


def replace(model: nn.Module, layers: Mapping[nn.Module, BypassLinear]) -> None:
    """Put each layer where the module it stands for is, under every name that module has."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])


def _find_targets(model: nn.Module, target_modules: Sequence[str] | str) -> dict[str, nn.Linear]:
    """Matching modules by every name they have, each found to be a linear that can be replaced."""
    if isinstance(target_modules, str) and target_modules != "all-linear":
        raise TypeError(
            f"target_modules: {target_modules!r}, expected a list of names or 'all-linear'"
        )
    named = dict(model.named_modules(remove_duplicate=False))
    linears = {name: m for name, m in named.items() if isinstance(m, nn.Linear) and name}
    if target_modules == "all-linear":
        found: dict[str, nn.Module] = dict(linears)
    else:
        found = {}
        for target in target_modules:
            matches = [n for n in named if n and (n == target or n.endswith("." + target))]
            if not matches:
                ends = sorted({name.rpartition(".")[2] for name in linears})
                raise ValueError(f"target_modules: {target!r} matches nothing, expected of {ends}")
            chosen = {id(named[name]) for name in matches}
            # A module that stands under several names stays one module.
            found.update((name, m) for name, m in named.items() if id(m) in chosen)
    if not found:
        raise ValueError("target_modules: the model has no torch.nn.Linear inside")
    return {name: check_target(name, module, named) for name, module in found.items()}


def check_target(name: str, module: nn.Module, named: Mapping[str, nn.Module]) -> nn.Linear:
    """``module``, once it is found to be a linear that can be replaced in the model ``named``."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name}: {type(module).__name__}, expected torch.nn.Linear")
    _check_parent(name, named[name.rpartition(".")[0]])
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        raise ValueError(f"{name}: {type(module).__name__} has a forward of its own")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(f"{name}: has hooks, which its replacement would lose")
    return module


def _check_scores(
    scores: Mapping[str, Tensor], targets: Mapping[str, nn.Linear], selection: str
) -> str:
    """The selection method that goes with scores, once every target has its own."""
    if selection not in ("magnitude", "scores"):
        raise ValueError(f"scores: given with selection {selection!r}, expected 'scores'")
    missing = sorted(targets.keys() - scores.keys())
    unknown = sorted(scores.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(f"scores: missing for targets {missing}, given for others {unknown}")
    return "scores"


def _check_parent(name: str, parent: nn.Module) -> None:
    """Refuse where a fused path of torch reads the weight itself and would skip the bypass."""
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"{name}: its parent {type(parent).__name__} reads the weight without calling the "
            "module, expected a parent that calls it"
        )


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
