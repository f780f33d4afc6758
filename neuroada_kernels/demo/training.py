"""The training loop, and the loss on held-out bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuroada_kernels.demo.transformer import loss_of


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine decay to a tenth of the rate."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.1

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


class Drawn(Protocol):
    """A source of batches, such as :class:`neuroada_kernels.demo.data.Batches`."""

    def draw(self) -> Any: ...


def train(
    model: nn.Module,
    batches: Drawn,
    schedule: Schedule,
    after_step: Callable[[int, float], None],
    loss_of: Callable[[nn.Module, Any], Tensor] = loss_of,
) -> None:
    """Train what requires grad; ``after_step`` gets the steps done and the loss in bits."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, schedule.learning_rate, schedule.weight_decay)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(model, batches.draw())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step(step + 1, loss.item() / math.log(2))


def make_optimizer(
    parameters: list[nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """Fused AdamW, the fastest that torch has for dense and sparse training alike."""
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor, batch: int = 16) -> float:
    """Mean loss over ``windows [n, context + 1]``."""
    losses = [loss_of(model, part) * len(part) for part in windows.split(batch)]
    return float(torch.stack(losses).sum()) / len(windows) / math.log(2)
