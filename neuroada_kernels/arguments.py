"""The arguments of :func:`neuroada_kernels.adapt`, checked and in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.gradient import Loss
from neuroada_kernels.nn.experts import NeuroAdaExperts, is_experts


def config_of(
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


def check_data(config: NeuroAdaConfig, data: Iterable[Any] | None, loss: Loss | None) -> None:
    needed = config.selection == "gradient"
    for argument, value in (("data", data), ("loss", loss)):
        if (value is not None) != needed:
            word = "missing" if value is None else "given"
            raise ValueError(f"{argument}: {word} with selection {config.selection!r}")


def check_selection(config: NeuroAdaConfig, targets: Mapping[str, nn.Module]) -> None:
    """Raise where connections are to be chosen in a way that a target does not know."""
    for name, module in targets.items():
        experts = is_experts(module) or isinstance(module, NeuroAdaExperts)
        if experts and config.selection in ("scores", "gradient"):
            raise ValueError(
                f"{name}: stacked experts with selection {config.selection!r}, expected "
                "'magnitude', 'smallest' or 'random'"
            )


def check_scores(scores: Mapping[str, Tensor], targets: Mapping[str, nn.Module]) -> None:
    """Raise unless every target has its own."""
    missing = sorted(targets.keys() - scores.keys())
    unknown = sorted(scores.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(f"scores: missing for targets {missing}, given for others {unknown}")
