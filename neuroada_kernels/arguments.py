"""The arguments that ``adapt`` and ``add_adapter`` share, checked and normalized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.gradient import Loss
from neuroada_kernels.nn.experts import NeuroAdaExperts, is_experts


def config_of(
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    scores: Mapping[str, Tensor] | None,
    data: Iterable[Any] | None,
    loss: Loss | None,
) -> NeuroAdaConfig:
    """The given config, or one from separate arguments, checked against the other inputs."""
    config = options.get("config", arguments[0] if arguments else None)
    if isinstance(config, NeuroAdaConfig):
        if len(arguments) + len(options) > 1:
            raise TypeError("config: given together with its fields, expected one of the two")
    else:
        names = ("k", "target_modules")
        if len(arguments) > len(names):
            raise TypeError(
                f"config: {len(arguments)} arguments by place instead, expected k, target_modules"
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
    needs = (("scores", scores, "scores"), ("data", data, "gradient"), ("loss", loss, "gradient"))
    for argument, value, selection in needs:
        if (value is not None) != (config.selection == selection):
            word = "missing" if value is None else "given"
            raise ValueError(f"{argument}: {word} with selection {config.selection!r}")
    return config


def check_selection(
    config: NeuroAdaConfig, targets: Mapping[str, nn.Module], scores: Mapping[str, Tensor] | None
) -> None:
    """Raise if a target does not support the selection, or has no scores where scores are given."""
    for name, module in targets.items():
        experts = is_experts(module) or isinstance(module, NeuroAdaExperts)
        if experts and config.selection in ("scores", "gradient"):
            raise ValueError(
                f"{name}: stacked experts with selection {config.selection!r}, expected "
                "'magnitude', 'smallest' or 'random'"
            )
    if scores is None:
        return
    missing = sorted(targets.keys() - scores.keys())
    unknown = sorted(scores.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(f"scores: missing for targets {missing}, given for others {unknown}")
