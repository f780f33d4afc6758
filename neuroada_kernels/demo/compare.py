"""The same training step in four implementations: checked to agree, then timed, with memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroada_kernels import NeuroAdaLinear, ReferenceNeuroAdaLinear, use_backend
from neuroada_kernels.benchmarks.baselines import MaskedDenseLinear
from neuroada_kernels.benchmarks.timing import Quartiles, paired_ratio
from neuroada_kernels.demo.memory import StepMemory, measure_memory
from neuroada_kernels.demo.training import make_optimizer
from neuroada_kernels.demo.transformer import Transformer, loss_of
from neuroada_kernels.testing import Inputs, rms_error

#: Small, as steps start from trained deltas: all rounds compute about the same.
LEARNING_RATE = 1e-4


@dataclass
class Variant:
    """A way to train the model, with an optimiser of its own."""

    label: str
    model: Transformer
    backend: str | None = None

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.trained, LEARNING_RATE)

    def loss_and_gradients(self, window: Tensor) -> Tensor:
        serving: AbstractContextManager[None] = (
            use_backend(self.backend) if self.backend else nullcontext()
        )
        with serving:
            loss = loss_of(self.model, window)
            loss.backward()
        return loss.detach()

    def step(self, window: Tensor) -> None:
        """A training step; its gradients stay until the next step."""
        self.optimizer.zero_grad()
        self.loss_and_gradients(window)
        self.optimizer.step()


def make_variants(adapted: Transformer) -> dict[str, Variant]:
    """Variants that start from copies of ``adapted``, trained deltas included."""
    return {
        "kernels": Variant("NeuroAda kernels", copy.deepcopy(adapted)),
        "eager": Variant("pure-PyTorch backend", copy.deepcopy(adapted), backend="eager"),
        "reference": Variant("reference layer", _replaced(adapted, _as_reference)),
        "masked": Variant("masked dense", _replaced(adapted, _as_masked)),
    }


def _replaced(adapted: Transformer, convert: Callable[[NeuroAdaLinear], nn.Module]) -> Transformer:
    model = copy.deepcopy(adapted)
    for name, layer in list(_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, convert(layer))
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, NeuroAdaLinear]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, NeuroAdaLinear))


def _as_reference(layer: NeuroAdaLinear) -> nn.Module:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = layer.weight
    reference = ReferenceNeuroAdaLinear.from_linear(linear, index=layer.index)
    reference.delta = layer.delta
    return reference


def _as_masked(layer: NeuroAdaLinear) -> nn.Module:
    no_tokens = torch.empty(0)
    masked: nn.Module = MaskedDenseLinear(
        Inputs(no_tokens, layer.weight, layer.index, layer.delta.detach(), None, no_tokens)
    )
    return masked


@dataclass(frozen=True)
class Agreement:
    """A variant's first step, compared with that of the reference layer."""

    loss: float  # nats
    loss_difference: float  # relative
    gradient_difference: float  # relative RMS over all chosen connections


def compare_first_step(variants: dict[str, Variant], window: Tensor) -> dict[str, Agreement]:
    """Loss and gradients of every variant before any of them has stepped."""
    losses = {name: v.loss_and_gradients(window) for name, v in variants.items()}
    index = {name: layer.index for name, layer in _layers(variants["kernels"].model)}
    gradients = {name: _chosen_gradients(v.model, index) for name, v in variants.items()}
    loss, gradient = losses["reference"], gradients["reference"]
    return {
        name: Agreement(
            loss=float(losses[name]),
            loss_difference=float((losses[name] - loss).abs() / loss),
            gradient_difference=rms_error(gradients[name], gradient),
        )
        for name in variants
    }


def _chosen_gradients(model: nn.Module, index: dict[str, Tensor]) -> Tensor:
    parts = []
    for name, columns in index.items():
        layer = model.get_submodule(name)
        if isinstance(layer, MaskedDenseLinear):
            gradient = layer.weight.grad
            assert gradient is not None
            parts.append(gradient.gather(1, columns.long()))
        else:
            gradient = layer.get_parameter("delta").grad
            assert gradient is not None
            parts.append(gradient)
    return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True)
class Measured:
    """Speed and memory of a variant; ``relative_speed`` is over the kernels' in the same round."""

    label: str
    tokens_per_second: Quartiles
    relative_speed: Quartiles
    memory: StepMemory


def measure(
    variants: dict[str, Variant], window: Tensor, rounds: int, after_step: Callable[[str], None]
) -> dict[str, Measured]:
    """Measure the memory of a step of each, then time them interleaved: A B C D A B C D."""
    memory = {}
    for name, variant in variants.items():
        variant.step(window)  # makes the optimiser's state, and fills every cache
        memory[name] = measure_memory(variant.model, variant.optimizer, variant.step, window)
        after_step(variant.label)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant.step(window)
            seconds[name].append(time.perf_counter() - start)
            after_step(variant.label)
    tokens = window[:, 1:].numel()
    return {
        name: Measured(
            variant.label,
            Quartiles.of([tokens / s for s in seconds[name]]),
            paired_ratio(seconds["kernels"], seconds[name]),
            memory[name],
        )
        for name, variant in variants.items()
    }
