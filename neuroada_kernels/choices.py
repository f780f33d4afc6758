"""How the connections of each module are chosen, one module at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels._progress import progress_bar, worth_showing
from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.gradient import Loss, each_gradient
from neuroada_kernels.nn._deferred import Deferred
from neuroada_kernels.nn.experts import STACKS, NeuroAdaExperts, is_experts
from neuroada_kernels.nn.foreign import base_weight
from neuroada_kernels.targets import errors_name, is_foreign, plain_name


def each_choice(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: NeuroAdaConfig,
    *,
    scores: Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
    data: Iterable[Any] | None,
    loss: Loss | None,
    score_bytes: int,
    progress: bool | None,
) -> Iterator[tuple[str, Deferred]]:
    """Yields each name of ``modules`` with the choice that ``config`` makes there.

    The arguments are those of :func:`neuroada_kernels.adapt`, already checked for consistency.
    """
    sizes = {name: _size_of(name, module) for name, module in modules.items()}
    show = worth_showing(sum(sizes.values())) if progress is None else progress

    def choice(name: str, its_scores: Tensor | None) -> Deferred:
        method = config.selection if its_scores is None else "scores"
        drawn = generator or config.generator_of(plain_name(name))
        return Deferred(config.k_of(name), method, its_scores, drawn, config.neuron_fraction)

    if data is not None and loss is not None:
        for name, gradient in each_gradient(
            model, modules, data, loss, score_bytes=score_bytes, show_progress=show
        ):
            yield name, choice(name, gradient)
        return
    with progress_bar("selecting connections", sum(sizes.values()), show) as advance:
        for name, size in sizes.items():
            yield name, choice(name, None if scores is None else scores[name])
            advance(size)


def _size_of(name: str, module: nn.Module) -> int:
    """The number of elements of the module's weights."""
    if isinstance(module, NeuroAdaExperts):
        return sum(math.prod(stack.whole_shape) for stack in module.stacks.values())
    if is_experts(module):
        return sum(module.get_parameter(stack).numel() for stack in STACKS)
    if not is_foreign(module):
        return module.get_parameter("weight").numel()
    with errors_name(name):
        return math.prod(base_weight(module).shape)
