"""Training steps of a whole model by a method: prepared, checked, measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.allocations import allocated_peak, held_after
from neuroada_kernels.benchmarks.llama import Sizes, build
from neuroada_kernels.benchmarks.method_checks import (
    Facts,
    allowed,
    check_adapted,
    check_compiled,
    check_drop,
    check_step,
    fingerprints,
    take_facts,
)
from neuroada_kernels.benchmarks.methods import METHODS, shapes_of, training


@dataclass(frozen=True)
class Mode:
    """How a model runs, for every method."""

    checkpointing: bool = False
    compiled: bool = False


MODES = {
    "plain": Mode(),
    "checkpointed": Mode(checkpointing=True),
    "compiled": Mode(compiled=True),
    "compiled-checkpointed": Mode(checkpointing=True, compiled=True),
}


@dataclass(frozen=True)
class World:
    """What all methods have in common."""

    sizes: Sizes
    sequence: int
    batch: int
    k: int
    dtype: torch.dtype
    device: str = "cpu"
    backend: str | None = None  # of NeuroAda; None chooses automatically

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


@dataclass
class TrainingStep:
    """Forward, backward and AdamW, as :class:`neuroada_kernels.benchmarks.timing.Step`.

    The embeddings' output requires grad in every method, so that frozen has a backward.
    """

    model: nn.Module
    embeddings: Tensor  # [batch, sequence, hidden], requires grad
    labels: Tensor  # int64, [batch, sequence]
    backend: str | None
    optimizer: torch.optim.Optimizer | None = None
    losses: list[float] = field(default_factory=list)
    _inputs: Tensor | None = None

    def serving(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend is None else nk.use_backend(self.backend)

    def forward(self) -> Tensor:
        self._inputs = self._embedded()
        loss: Tensor = self.model(inputs_embeds=self._inputs, labels=self.labels).loss
        return loss

    def _embedded(self) -> Tensor:
        """The stored embeddings, or computed anew if their weight trains."""
        module = self.model.get_input_embeddings()  # type: ignore[operator]
        if not module.weight.requires_grad:
            return self.embeddings
        inputs: Tensor = module(self.labels)
        inputs.retain_grad()
        return inputs

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Backward and update; reading the loss last, as a training loop does, waits for a GPU."""
        y.backward()
        self.update()
        self.losses.append(y.item())
        return ()

    def update(self) -> None:
        """A step of the optimizer, if anything trains; then all gradients are freed."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.embeddings.grad = self._inputs = None

    def run(self) -> None:
        with self.serving():
            self.backward(self.forward())

    def facts(self) -> Facts:
        """Loss and gradients in the present state, which does not change."""
        with self.serving():
            loss = self.forward()
            assert self._inputs is not None
            found = take_facts(self.model, loss, self._inputs)
        self.model.zero_grad()
        self.embeddings.grad = self._inputs = None
        return found

    def drop(self) -> float:
        """The drop of the loss after a step along the negative gradient, which is then undone.

        The step is so long that, to first order, the loss would fall by a tenth.
        """
        trained = list(training(self.model).values())
        before = [parameter.detach().clone() for parameter in trained]
        with self.serving():
            loss = self.forward()
            loss.backward()
            gradients = [p.grad for p in trained if p.grad is not None]
            slope = sum(float(gradient.float().square().sum()) for gradient in gradients)
            with torch.no_grad():
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.sub_(gradient, alpha=loss.item() / 10 / slope)
                after = self.forward().item()
                for parameter, value in zip(trained, before, strict=True):
                    parameter.copy_(value)
        self.model.zero_grad()
        self.embeddings.grad = self._inputs = None
        return loss.item() - after


@dataclass(frozen=True)
class References:
    """What the frozen model computes; of the materialised scheme, the gradients and the drop.

    The latter two are None if that scheme does not fit in memory.
    """

    frozen: Facts
    gradients: dict[str, Tensor] | None
    drop: float | None


@dataclass(frozen=True)
class Prepared:
    """A step that was checked and has run once; ``held_bytes`` is what stays between steps."""

    step: TrainingStep
    trainable: int
    held_bytes: int
    checks: dict[str, float | None]
    graph_breaks: int | None  # of torch.compile; None in other modes


def references(world: World, mode: Mode) -> References:
    """The references for a mode: the materialised scheme may fit only with checkpointing."""
    frozen = _build(world, mode, "frozen")[0].facts()
    free(world.device)
    try:
        step = _build(world, mode, "materialised")[0]
        return References(frozen, step.facts().chosen, step.drop())
    except torch.OutOfMemoryError:
        return References(frozen, None, None)


def prepare(method: str, world: World, mode: Mode, known: References) -> Prepared:
    """Adapt a model and check it before, in and after its first step; compile it if the mode does.

    Raises
    ------
    WrongMethodError
        If the method computes something else than it should.
    """
    checks: dict[str, float | None] = {}

    def ready() -> TrainingStep:
        step, before, expected = _build(world, mode, method)
        checks.update(check_adapted(method, step.model, step.facts(), known, world.dtype, expected))
        if METHODS[method].chosen and known.drop is not None:
            check_drop(method, step.drop(), known.drop, allowed(world.dtype, world.sizes.layers))
        step.run()
        check_step(method, step.model, before)
        return step

    step, held = _held(ready, world.device)
    breaks = None
    if mode.compiled:
        eager = step.facts()
        counters["graph_break"].clear()
        step.model.compile()
        checks["compiled"] = check_compiled(
            method, step.facts(), eager, world.dtype, world.sizes.layers
        )
        breaks = sum(counters["graph_break"].values())
    trainable = sum(p.numel() for p in training(step.model).values())
    return Prepared(step, trainable, held, checks, breaks)


def free(device: str) -> None:
    """Free unused models, which are reference cycles and are referred to by compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def step_bytes(step: TrainingStep, device: str) -> int:
    """The peak bytes that a step adds to what stays between steps."""
    if device == "cpu":
        peak: int = allocated_peak(step.run)
        return peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _build(world: World, mode: Mode, method: str) -> tuple[TrainingStep, dict[str, int], int]:
    """A step of the adapted model, the plain one's fingerprints, the number of trained values."""
    model = build(world.sizes, world.sequence, world.dtype, world.device)
    if mode.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = fingerprints(model)
    total = sum(p.numel() for p in model.parameters())
    expected = METHODS[method].expected(shapes_of(model), world.k, total)
    generator = torch.Generator(world.device).manual_seed(1)
    labels = torch.randint(
        world.sizes.vocabulary,
        (world.batch, world.sequence),
        generator=generator,
        device=world.device,
    )
    embeddings = model.get_input_embeddings()(labels).detach().requires_grad_()
    adapted = METHODS[method].adapt(model, world.k)
    trained = list(training(adapted).values())
    # No weight decay: it would change a masked weight outside of its mask.
    optimizer = (
        torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True) if trained else None
    )
    return TrainingStep(adapted, embeddings, labels, world.backend, optimizer), before, expected


def _held(ready: Callable[[], TrainingStep], device: str) -> tuple[TrainingStep, int]:
    if device == "cpu":
        return held_after(ready)  # type: ignore[no-any-return]
    before = torch.cuda.memory_allocated()
    step = ready()
    torch.cuda.synchronize()
    return step, torch.cuda.memory_allocated() - before
