"""Which modules of a model are adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from neuroada_kernels._sharding import is_sharded
from neuroada_kernels.config import ALL_LINEAR, NeuroAdaConfig, matches

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find_targets(model: nn.Module, config: NeuroAdaConfig) -> dict[str, nn.Linear]:
    """The modules that ``config`` means, by every name that they have.

    Raises
    ------
    TypeError, ValueError
        If a part of the config matches nothing, or a module that cannot be replaced.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    chosen = _targeted(model, named, config.target_modules)
    if config.exclude_modules is not None:
        chosen -= _excluded(named, config.exclude_modules)
    if config.layers is not None:
        chosen &= _in_layers(named, chosen, config.layers)
    # A module that stands under several names stays one module.
    targets = {
        name: check_target(name, module, named)
        for name, module in named.items()
        if id(module) in chosen
    }
    if not targets:
        raise ValueError("target_modules: nothing is left of them, expected at least one module")
    for pattern in config.k_pattern:
        if not any(config.k_matches(pattern, name) for name in targets):
            raise ValueError(f"k_pattern: {pattern!r} matches no module that is adapted")
    return targets


def check_target(name: str, module: nn.Module, named: Mapping[str, nn.Module]) -> nn.Linear:
    """``module``, once it is found to be a linear that can be replaced in the model ``named``."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name}: {type(module).__name__}, expected torch.nn.Linear")
    _check_parent(name, named[name.rpartition(".")[0]])
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        raise ValueError(f"{name}: {type(module).__name__} has a forward of its own")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(f"{name}: has hooks, which its replacement would lose")
    if is_sharded(module._parameters.get("weight")):
        raise ValueError(
            f"{name}: its weight is sharded over processes, expected a whole one: adapt the model "
            "before fully_shard or parallelize_module, on the meta device where it is too large"
        )
    return module


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, where the model tells of one."""
    find = getattr(model, "get_output_embeddings", None)
    if not callable(find):
        return None
    try:
        head = find()
    except (AttributeError, NotImplementedError):  # as models of transformers without a head do
        return None
    return head if isinstance(head, nn.Module) else None


def _targeted(
    model: nn.Module, named: Mapping[str, nn.Module], targets: str | Sequence[str]
) -> set[int]:
    linears = {name: m for name, m in named.items() if isinstance(m, nn.Linear) and name}
    if targets == ALL_LINEAR:
        head = output_head(model)
        if not linears:
            raise ValueError("target_modules: the model has no torch.nn.Linear inside")
        return {id(module) for module in linears.values() if module is not head}
    chosen = set()
    for target in [targets] if isinstance(targets, str) else [(target,) for target in targets]:
        found = {id(m) for name, m in named.items() if name and matches(name, target)}
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in linears})
            shown = target if isinstance(target, str) else target[0]
            raise ValueError(f"target_modules: {shown!r} matches nothing, expected of {ends}")
        chosen |= found
    return chosen


def _excluded(named: Mapping[str, nn.Module], excluded: str | Sequence[str]) -> set[int]:
    found = set()
    for pattern in [excluded] if isinstance(excluded, str) else [(name,) for name in excluded]:
        matched = {id(module) for name, module in named.items() if name and matches(name, pattern)}
        if not matched:
            shown = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(f"exclude_modules: {shown!r} matches nothing")
        found |= matched
    return found


def _in_layers(
    named: Mapping[str, nn.Module], chosen: set[int], layers: int | Sequence[int]
) -> set[int]:
    """The chosen modules of these layers: the first number in a name is its layer's."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    numbers = {
        name: next((int(part) for part in name.split(".") if part.isdecimal()), None)
        for name, module in named.items()
        if id(module) in chosen
    }
    missing = sorted(wanted - set(numbers.values()))
    if missing:
        raise ValueError(f"layers: no module of target_modules is in {missing}")
    return {id(named[name]) for name, number in numbers.items() if number in wanted}


def _check_parent(name: str, parent: nn.Module) -> None:
    """Refuse where a fused path of torch reads the weight itself and would skip the bypass."""
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"{name}: its parent {type(parent).__name__} reads the weight without calling the "
            "module, expected a parent that calls it"
        )
