"""A small transformer and its training, for tests of whole runs.

As a script, ``python small_transformer.py BASE FOLDER``, it trains a resident model on the base in
a file until it is killed, and saves adapter and optimiser to the folder after every step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuroada_kernels as nk

TOKENS, WIDTH, HEADS, BATCH, LENGTH = 24, 32, 4, 6, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Transformer(nn.Module):
    """``checkpointing`` is None, or the ``use_reentrant`` with which every block is recomputed."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS)
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).detach().requires_grad_()  # as reentrant checkpointing requires
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(x)


def batch(step: int, rows: int = BATCH) -> Tensor:
    """Rows that count upwards from a random token, for the next token to be guessed."""
    first = torch.randint(TOKENS, (rows, 1), generator=torch.Generator().manual_seed(step))
    return (first + torch.arange(LENGTH + 1)) % TOKENS


def loss_of(model: nn.Module, step: int) -> Tensor:
    rows = batch(step)
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0) -> Iterator[float]:
    """The loss of each step, yielded after its update."""
    step = first
    while True:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        step += 1
        yield loss.item()


def adapted(checkpointing: bool | None = None, dtype=torch.float32, **options) -> nn.Module:
    """The same model each time, k = 4."""
    torch.manual_seed(0)
    model = Transformer(checkpointing).to(dtype)
    nk.adapt(model, k=4, **options)
    return model


def from_file(base: str, **options) -> nn.Module:
    """The model with weights memory-mapped from the file, not copied."""
    model = Transformer()
    model.load_state_dict(torch.load(base, mmap=True), assign=True)
    nk.adapt(model, k=4, **options)
    return model


def main() -> None:
    base, folder = sys.argv[1:]
    model = from_file(base, strategy="resident")
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.02)
    for number, _ in enumerate(training(model, optimizer), 1):
        torch.save(optimizer.state_dict(), f"{folder}/{number}.optimizer")
        nk.save_adapter(model, f"{folder}/{number}.safetensors")
        print(number, flush=True)


if __name__ == "__main__":
    main()
