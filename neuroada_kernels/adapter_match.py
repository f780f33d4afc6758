"""Finds the modules and parameters that an adapter file is for, and checks that they fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from neuroada_kernels._dtypes import name_of
from neuroada_kernels.adapter_base import Base
from neuroada_kernels.adapter_file import AdaptedModule, Adapter
from neuroada_kernels.nn._named import NamedLayer
from neuroada_kernels.nn.bypass import NeuroAdaBypass
from neuroada_kernels.nn.experts import STACKS, NeuroAdaExperts, is_experts
from neuroada_kernels.nn.foreign import missing_library
from neuroada_kernels.targets import check_target, errors_name, plain_name


def new_experts(model: nn.Module, adapter: Adapter) -> dict[nn.Module, NeuroAdaExperts]:
    """The layers to replace experts whose stacks the file has, with placeholder indices."""
    found = {}
    for name, module in model.named_modules():
        known = [f"{plain_name(name)}.{stack}" in adapter.modules for stack in STACKS]
        if any(known) and is_experts(module):
            if not all(known):
                raise ValueError(
                    f"{name}: the adapter has one of {', '.join(STACKS)}, expected both"
                )
            with errors_name(name):
                index = {
                    stack: torch.zeros(
                        module.get_parameter(stack)[:, :, 0].numel(),
                        1,
                        dtype=torch.int32,
                        device="cpu",
                    )
                    for stack in STACKS
                }
                flags = [(p, p.requires_grad) for p in module.parameters()]
                found[module] = NeuroAdaExperts(module, index=index)
                for parameter, flag in flags:  # loading may still fail
                    parameter.requires_grad_(flag)
    return found


def find_modules(
    model: nn.Module,
    adapter: Adapter,
    experts: Mapping[nn.Module, NeuroAdaExperts],
    adapter_name: str,
) -> dict[str, nn.Module]:
    """The module of every name in the file, checked to be adapted or adaptable.

    Layers that the file does not have must not have an adapter ``adapter_name``.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    for name, module in list(named.items()):
        if module in experts:
            named |= {f"{name}.{stack}": part for stack, part in experts[module].stacks.items()}
    real = {plain_name(name): name for name in named}
    missing = sorted(adapter.modules.keys() - real.keys())
    if missing:
        raise ValueError(f"model: has no {some(missing)}, which the adapter is for")
    targets = {}
    for name in (name for name in real if name in adapter.modules):
        module = named[real[name]]
        if not isinstance(module, NamedLayer):
            if not name:
                raise ValueError("model: a single layer, expected a NeuroAda layer")
            check_target(real[name], module, named, by_name=True)
        elif module.merged:
            raise ValueError(f"{name}: is merged, unmerge first")
        targets[name] = module
    known = {id(module) for module in targets.values()}
    if len(known) < len(targets):
        raise ValueError("model: has one module where the adapter has two")
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, NamedLayer)
        and adapter_name in module.adapter_names
        and id(module) not in known
    ]
    if others:
        raise ValueError(f"model: adapted at {some(others)}, which the adapter does not know")
    return targets


def find_parameters(model: nn.Module, adapter: Adapter) -> dict[str, nn.Parameter]:
    found = parameters_of(model, once=False)
    missing = sorted(adapter.parameters.keys() - found.keys())
    if missing:
        raise ValueError(f"model: has no {some(missing)}, which the adapter has values of")
    return {name: found[name] for name in adapter.parameters}


def check_bases(
    adapter: Adapter,
    targets: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
    *,
    allow_mismatch: bool,
) -> None:
    """Raise unless the weights are those of the adapter; ``allow_mismatch`` checks shapes only."""
    differing = {n: _differences(n, targets[n], entry) for n, entry in adapter.modules.items()}
    differing |= {
        name: _parameter_differences(parameters[name], tensor)
        for name, tensor in adapter.parameters.items()
    }
    wrong = {name: what for name, what in differing.items() if what}
    fatal = {name: what for name, what in wrong.items() if what[0].startswith("shape")}
    shown = fatal if allow_mismatch else wrong
    if shown:
        words = [f"{name}: {', '.join(what)}" for name, what in shown.items()]
        hint = "" if fatal else "; allow_mismatch=True loads it all the same"
        raise ValueError(f"model: not what the adapter is for: {some(words, '; ')}{hint}")


def _differences(name: str, module: nn.Module, entry: AdaptedModule) -> list[str]:
    with errors_name(name):
        base = Base.of(module)
    if base.shape != entry.base.shape:
        return [f"shape {list(base.shape)}, expected {list(entry.base.shape)}"]
    differences = entry.base.differences(base.fingerprint(entry.index))
    if base.kind != entry.base.kind and (missing := missing_library(entry.base.kind or "")):
        differences.append(missing)
    return differences


def _parameter_differences(parameter: Tensor, saved: Tensor) -> list[str]:
    return [
        f"{name} {actual}, expected {expected}"
        for name, actual, expected in (
            ("shape", list(parameter.shape), list(saved.shape)),
            ("dtype", name_of(parameter.dtype), name_of(saved.dtype)),
        )
        if actual != expected
    ]


def parameters_of(model: nn.Module, *, once: bool) -> dict[str, nn.Parameter]:
    """The parameters, by their names in the base model, where no layer is wrapped.

    A parameter with several names is under each, or with ``once`` under the first.
    """
    wrappers = (NeuroAdaBypass, NeuroAdaExperts)
    named = model.named_modules(remove_duplicate=False)
    wrapped = {f"{name}.base.": f"{name}." for name, m in named if isinstance(m, wrappers)}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=once):
        for inside, outside in wrapped.items():
            if name.startswith(inside):
                name = outside + name.removeprefix(inside)
        found[plain_name(name)] = parameter
    return found


def some(words: list[str], separator: str = ", ") -> str:
    """The first three words, and the number of the others."""
    more = len(words) - 3
    return separator.join(words[:3]) + (f" and {more} more" if more > 0 else "")
