"""The tasks: the pretrained model, the data to adapt to, and held-out data.

Held-out data has two parts: learning rates are chosen on ``validation``, results are on ``test``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroada_kernels.benchmarks.quality.settings import DigitsSettings, Settings, TextSettings
from neuroada_kernels.demo import data
from neuroada_kernels.demo.training import Drawn, Schedule, bits_per_byte, train
from neuroada_kernels.demo.transformer import Transformer, loss_of


@dataclass(frozen=True)
class Score:
    """``loss`` is None if it is not finite, because training diverged."""

    loss: float | None
    accuracy: float | None = None

    @classmethod
    def of(cls, loss: float, accuracy: float | None = None) -> Score:
        return cls(loss if math.isfinite(loss) else None, accuracy)


@dataclass(frozen=True)
class World:
    """A pretrained model, and the domain that it is adapted to."""

    model: nn.Module
    batches: Callable[[int], Drawn]  # by seed
    validation: Any
    test: Any


class Task(Protocol):
    """``world`` may be the same for all seeds; ``schedule`` is that of adapting."""

    name: str
    unit: str

    def world(self, seed: int) -> World: ...

    def schedule(self, rate: float) -> Schedule: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def score(self, model: nn.Module, held_out: Any) -> Score: ...


class TextTask:
    """Documentation to Python source: one pretrained model, adapted in each seed's own order."""

    name = "text"
    unit = "bits per byte"

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self._world = cache(self._make_world)

    def world(self, seed: int) -> World:
        return self._world()

    def schedule(self, rate: float) -> Schedule:
        return Schedule(self.settings.steps, rate)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch)

    def score(self, model: nn.Module, held_out: Any) -> Score:
        return Score.of(bits_per_byte(model, held_out))

    def _make_world(self) -> World:
        settings = self.settings
        context = settings.model.context
        model = Transformer(settings.model, seed=0)
        documents = data.Batches(data.documentation().train, settings.batch, context, seed=0)
        schedule = Schedule(settings.pretrain_steps, settings.pretrain_rate, weight_decay=0.1)
        train(model, documents, schedule, lambda step, loss: None)
        source = data.python_source(settings.source_bytes)
        files = list(source.held_out.items())

        def windows(part: list[tuple[str, bytes]]) -> Tensor:
            return data.windows(dict(part), settings.windows, context)

        return World(
            model,
            lambda seed: data.Batches(source.train, settings.batch, context, seed),
            validation=windows(files[::2]),
            test=windows(files[1::2]),
        )


class DigitsTask:
    """Upright digits to shifted ones, each seed with its own split and its own pretrained MLP.

    The test images are the same for all seeds, so that no search sees one.
    """

    unit = "nats"

    def __init__(self, settings: DigitsSettings, shift: str) -> None:
        self.settings, self._shift = settings, SHIFTS[shift]
        self.name = f"digits, {shift}"

    def world(self, seed: int) -> World:
        settings = self.settings
        generator = torch.Generator().manual_seed(seed)
        parts = [settings.pretrain_images, settings.images, settings.held_out]
        upright, few, validation, test = _digits(generator, parts)
        model = _mlp(settings.width, generator)
        schedule = Schedule(settings.pretrain_steps, settings.pretrain_rate, weight_decay=0.1)
        batches = _Images(upright, settings.batch, seed)
        train(model, batches, schedule, lambda step, loss: None, self.loss)

        def shifted(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            images, labels = part
            return self._shift(images, generator), labels

        few = shifted(few)
        return World(
            model,
            lambda seed: _Images(few, settings.batch, seed),
            validation=shifted(validation),
            test=shifted(test),
        )

    def schedule(self, rate: float) -> Schedule:
        return Schedule(self.settings.steps, rate)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def score(self, model: nn.Module, held_out: Any) -> Score:
        images, labels = held_out
        logits = model(images)
        loss = F.cross_entropy(logits, labels).item()
        return Score.of(loss, (logits.argmax(1) == labels).float().mean().item())


class _Images:
    """Batches drawn at random from ``images [n, 64]`` and ``labels [n]``."""

    def __init__(self, part: tuple[Tensor, Tensor], batch: int, seed: int) -> None:
        self._part, self._batch = part, batch
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        images, labels = self._part
        chosen = torch.randint(len(images), (self._batch,), generator=self._generator)
        return images[chosen], labels[chosen]


#: Shifts of images ``[n, 64]`` with values from 0 to 1.
SHIFTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "rotated": lambda images, generator: images.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1),
    "inverted": lambda images, generator: 1 - images,
    "noisy": lambda images, generator: (
        images + 0.5 * torch.randn(images.shape, generator=generator)
    ),
}


def _digits(generator: torch.Generator, parts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Disjoint parts of the digits, drawn by ``generator``, and the rest, which is fixed."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order[: sum(parts)] = order[torch.randperm(sum(parts), generator=generator)]
    images = torch.tensor(pixels, dtype=torch.float32)[order] / 16
    sizes = [*parts, len(labels) - sum(parts)]
    split = images.split(sizes), torch.tensor(labels).long()[order].split(sizes)
    return list(zip(*split, strict=True))


def _mlp(width: int, generator: torch.Generator) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
    return model


def make_tasks(settings: Settings) -> dict[str, Task]:
    """The tasks by name, text first."""
    every: list[Task] = [TextTask(settings.text)]
    every += [DigitsTask(settings.digits, shift) for shift in settings.digits.shifts]
    return {task.name: task for task in every}
