"""Which modules of a model are adapted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from neuroada_kernels._sharding import is_sharded
from neuroada_kernels.config import ALL_LINEAR, NeuroAdaConfig, matches
from neuroada_kernels.nn._base import BypassLinear
from neuroada_kernels.nn._layer import BypassLayer
from neuroada_kernels.nn._weight import is_of
from neuroada_kernels.nn.bypass import NeuroAdaBypass
from neuroada_kernels.nn.experts import NeuroAdaExperts, is_experts, why_not_experts
from neuroada_kernels.nn.foreign import has_own_forward, is_base, is_library
from neuroada_kernels.replacing import check_hooks

#: The types that replace adapted modules.
_OURS = (BypassLayer, NeuroAdaExperts)
#: PEFT's replacements: adapter layers, and wrappers that train a full copy of a module.
_OF_PEFT = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
#: What torch.compile and checkpoint_wrapper name the module that they wrap.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A module's name without the parts that wrappers of submodules add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def find_targets(
    model: nn.Module, config: NeuroAdaConfig, *, adapted: bool = False
) -> dict[str, nn.Module]:
    """The modules that ``config`` selects, by every name that they have.

    If the model is ``adapted``, its NeuroAda layers count as the modules that they replaced.

    Raises
    ------
    TypeError, ValueError
        If a field of the config matches nothing, or a module that cannot be replaced.
    """
    named = outside_layers(model)
    chosen = _targeted(model, named, config.target_modules, adapted)
    if config.exclude_modules is not None:
        chosen -= _excluded(named, config.exclude_modules)
    if config.layers is not None:
        chosen &= _in_layers(named, chosen, config.layers)
    # A module with several names stays one module.
    targets = {name: module for name, module in named.items() if id(module) in chosen}
    new = {
        name: module
        for name, module in targets.items()
        if not (adapted and isinstance(module, _OURS))  # those were checked when they were adapted
    }
    if config.target_modules == ALL_LINEAR:
        _check_all(new, named)
    else:
        for name, module in new.items():
            check_target(name, module, named, by_name=True)
    _check_apart(targets)
    if not targets:
        raise ValueError(
            f"target_modules: nothing is left of them, expected at least one module{_hint(named)}"
        )
    check_k_pattern(config, targets)
    return targets


def _check_all(targets: Mapping[str, nn.Module], named: Mapping[str, nn.Module]) -> None:
    """Raise if linears cannot be replaced; the message tells how to exclude all of them.

    For ``"all-linear"`` only: named targets are checked one by one, and the first error is raised.
    """
    refused: dict[str, TypeError | ValueError] = {}
    for name, module in targets.items():
        try:
            check_target(name, module, named, by_name=False)
        except (TypeError, ValueError) as error:
            refused[name] = error
    if not refused:
        return
    kept = {name.rpartition(".")[2] for name in targets.keys() - refused.keys()}
    parts = {name: name.rpartition(".")[2] for name in refused}
    excluded = sorted({name if part in kept else part for name, part in parts.items()})
    first = next(iter(refused.values()))
    raise type(first)(
        f"{first}; adding {excluded} to exclude_modules leaves out all {len(refused)} of the "
        f"{len(targets)} linears that cannot be adapted"
    ) from first


def check_k_pattern(config: NeuroAdaConfig, targets: Iterable[str]) -> None:
    """Raise if a pattern of ``k_pattern`` matches no adapted name."""
    names = list(targets)
    for pattern in config.k_pattern:
        if not any(config.k_matches(pattern, name) for name in names):
            raise ValueError(f"k_pattern: {pattern!r} matches no module that is adapted")


def check_target(
    name: str, module: nn.Module, named: Mapping[str, nn.Module], *, by_name: bool
) -> None:
    """Raise unless ``module`` can be replaced or wrapped in the model with the modules ``named``.

    A module with a forward of its own has to be selected ``by_name``, unless its library is known.
    """
    kind = type(module).__name__
    if is_experts(module):
        reason = why_not_experts(module)
        if reason is not None:
            raise TypeError(f"{name}: {kind} {reason}")
        check_hooks(name, module)
        return
    if isinstance(module, BypassLayer):
        raise TypeError(f"{name}: {kind}, expected a module without a bypass{_hint(named)}")
    if not (isinstance(module, nn.Linear) or is_base(module)):
        raise TypeError(
            f"{name}: {kind}, expected torch.nn.Linear, or a module with in_features and "
            "out_features"
        )
    check_parent(name, named[name.rpartition(".")[0]])
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(f"{name}: {kind} has no weight yet, expected a model that was called once")
    if is_foreign(module):
        if not (by_name or is_library(module)):
            raise ValueError(
                f"{name}: {kind} has a forward of its own, expected its name in target_modules, "
                "to be wrapped as it is"
            )
        return
    if parametrize.is_parametrized(module):
        raise ValueError(f"{name}: has parametrizations, expected a weight of its own")
    if is_sharded(module._parameters.get("weight")):
        raise ValueError(
            f"{name}: its weight is sharded over processes, expected a whole one: adapt the model "
            "before fully_shard or parallelize_module, on the meta device where it is too large"
        )
    check_hooks(name, module)


def is_foreign(module: nn.Module) -> bool:
    """Whether ``module`` has to be wrapped, since its forward may differ from ``nn.Linear``'s."""
    return is_library(module) or not isinstance(module, nn.Linear) or has_own_forward(module)


def layer_number(name: str) -> int | None:
    """The number of the layer that contains the named module: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def outside_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by every name that they have, except those inside NeuroAda layers."""
    named = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{n}." if n else "" for n, m in named.items() if isinstance(m, _OURS))
    return {n: m for n, m in named.items() if not (n and n.startswith(inside))}


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head, from hidden states to logits, if ``get_output_embeddings`` returns it."""
    find = getattr(model, "get_output_embeddings", None)
    if not callable(find):
        return None
    try:
        head = find()
    except (AttributeError, NotImplementedError):  # transformers models without a head
        return None
    return head if isinstance(head, nn.Module) else None


def modules_of_peft(model: nn.Module) -> set[nn.Module]:
    """The modules that PEFT has added to the model: LoRA's, full copies, prompts.

    A PEFT layer holds the module that it wraps as ``base_layer``. If PEFT trains a copy, the
    forward bypasses the original module, and both count as PEFT's. An attention with an adaption
    prompt wraps the model's own attention; only the wrapper counts.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        if any(is_of(module, "peft", kind) for kind in _OF_PEFT):
            base = getattr(module, "base_layer", None)
            children = (child for child in module.children() if child is not base)
            found.update(part for child in children for part in child.modules())
        elif is_of(module, "peft", "BasePromptEncoder"):
            found.update(module.modules())
        elif is_of(module, "peft", "_BaseAdaptedAttention"):
            found.add(module)
    return found


def _is_linear(module: nn.Module, adapted: bool) -> bool:
    """Whether ``"all-linear"`` includes it."""
    if adapted and isinstance(module, BypassLinear):
        return True
    if adapted and isinstance(module, NeuroAdaBypass):
        module = module.base
    return isinstance(module, nn.Linear) or is_library(module)


def _targeted(
    model: nn.Module, named: Mapping[str, nn.Module], targets: str | Sequence[str], adapted: bool
) -> set[int]:
    linears = {name: m for name, m in named.items() if name and _is_linear(m, adapted)}
    if targets == ALL_LINEAR:
        head, others = output_head(model), modules_of_peft(model)
        linears = {name: m for name, m in linears.items() if m not in others}
        if not linears:
            raise ValueError(
                f"target_modules: the model has no torch.nn.Linear inside{_hint(named)}"
            )
        return {id(module) for module in linears.values() if module is not head}
    chosen = set()
    for target in [targets] if isinstance(targets, str) else [(target,) for target in targets]:
        found = {id(m) for name, m in named.items() if name and matches(name, target)}
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"target_modules: {_unmatched(target, named)}, expected of {ends}")
        chosen |= found
    return chosen


def _excluded(named: Mapping[str, nn.Module], excluded: str | Sequence[str]) -> set[int]:
    found = set()
    for pattern in [excluded] if isinstance(excluded, str) else [(name,) for name in excluded]:
        matched = {id(module) for name, module in named.items() if name and matches(name, pattern)}
        if not matched:
            raise ValueError(f"exclude_modules: {_unmatched(pattern, named)}")
        found |= matched
    return found


def _hint(named: Mapping[str, nn.Module]) -> str:
    """A hint for error messages if the model is adapted already."""
    adapted = any(isinstance(module, _OURS) for module in named.values())
    return "; add_adapter gives an adapted model another adapter" if adapted else ""


def _unmatched(pattern: str | tuple[str], names: Iterable[str]) -> str:
    """The error text for a pattern without a match; explains a name's last part given as regex."""
    if isinstance(pattern, str) and any(matches(name, (pattern,)) for name in names):
        return (
            f"{pattern!r} matches nothing, as a regular expression for whole names; the list "
            f"[{pattern!r}] matches last parts"
        )
    return f"{pattern if isinstance(pattern, str) else pattern[0]!r} matches nothing"


def _in_layers(
    named: Mapping[str, nn.Module], chosen: set[int], layers: int | Sequence[int]
) -> set[int]:
    """The chosen modules that are in ``layers``."""
    names = [name for name, module in named.items() if id(module) in chosen]
    return {id(named[name]) for name in in_layers(names, layers)}


def in_layers(names: Iterable[str], layers: int | Sequence[int]) -> list[str]:
    """The names that are in ``layers``; raises if one of the layers has none."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    numbers = {name: layer_number(name) for name in names}
    missing = sorted(wanted - set(numbers.values()))
    if missing:
        raise ValueError(f"layers: no module of target_modules is in {missing}")
    return [name for name, number in numbers.items() if number in wanted]


def _check_apart(targets: Mapping[str, nn.Module]) -> None:
    """Raise if a target is inside another one, since wrapping the outer one moves the inner."""
    for name in targets:
        parts = name.split(".")
        for n in range(1, len(parts)):
            outer = ".".join(parts[:n])
            if outer in targets:
                raise ValueError(f"{name}: lies in {outer}, which is a target too")


def check_parent(name: str, parent: nn.Module) -> None:
    """Raise if a fused path of torch reads the weight directly and would skip the bypass."""
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"{name}: its parent {type(parent).__name__} reads the weight without calling the "
            "module, expected a parent that calls it; exclude_modules leaves it out"
        )


@contextlib.contextmanager
def errors_name(module: str) -> Iterator[None]:
    """Prefix TypeErrors and ValueErrors of the block with the name of the module."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{module}: {error}") from error
