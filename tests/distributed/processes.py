"""What runs in the processes of a test, and how they are started.

They are forked from a server that has imported torch once, so that a start costs little. If one
raises, the others are terminated; if one hangs, the timeout of the process group makes it raise.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_transformer
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

import neuroada_kernels as nk
import neuroada_kernels.distributed

STEPS, ROWS, LR = 10, 8, 0.02
TIMEOUT = datetime.timedelta(seconds=240)
Check = Callable[[Path], None]
#: Imports of the server, which lacks the paths of the tests. An optimiser imports the last one.
PRELOADED = [
    "neuroada_kernels.distributed",
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch._dynamo",
]


def run_in_processes(check: Check, count: int, folder: Path) -> None:
    """Run ``check(folder)`` in ``count`` processes of one group."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _process, (check, count, folder), count, start_method="forkserver"
    )


def _process(rank: int, check: Check, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    with process_group(rank, count, folder):
        check(folder)
        dist.barrier()


@contextmanager
def process_group(rank: int, count: int, folder: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
    )
    yield
    dist.destroy_process_group()  # not after an error, where it would wait for the others


def adapted(dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    """The same model in every process; deltas have its precision, so that curves agree closely."""
    torch.manual_seed(0)
    model = small_transformer.Transformer().to(dtype)
    options.setdefault("delta_dtype", torch.float32 if dtype == torch.bfloat16 else dtype)
    nk.adapt(model, **{"k": 4, **options})
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(small_transformer.trained(model).values(), lr=LR)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1]).flatten(0, 1)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), rows[:, 1:].flatten()
    )


def own_rows(step: int) -> Tensor:
    """The share of a step's batch that is this process's."""
    return small_transformer.batch(step, ROWS).chunk(dist.get_world_size())[dist.get_rank()]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rows_of: Callable[[int], Tensor] = lambda step: small_transformer.batch(step, ROWS),
    steps: range = range(STEPS),
) -> list[float]:
    """The loss of each step, over the whole batch."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, rows_of(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_shared(model: nn.Module, optimizer=None, steps: range = range(STEPS)) -> list[float]:
    """The same, each process with its own rows."""
    losses = torch.tensor(
        train(model, optimizer, rows_of=own_rows, steps=steps), dtype=torch.float64
    )
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def assert_same_curve(curve: list[float], expected: list[float], allowed: float = 1e-12) -> None:
    assert expected[-1] < 0.9 * expected[0], "a run that learns nothing shows nothing"
    curves = (torch.tensor(losses, dtype=torch.float64) for losses in (curve, expected))
    torch.testing.assert_close(*curves, rtol=allowed, atol=0)


def assert_same_everywhere(tensor: Tensor) -> None:
    first = tensor.detach().clone()
    dist.broadcast(first, src=0)
    assert torch.equal(first, tensor)


def layers(model: nn.Module) -> dict[str, nk.NeuroAdaLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nk.NeuroAdaLinear)}


def connections(layer: nk.NeuroAdaLinear) -> Tensor:
    """The unsharded layer's delta, scattered to ``[d_out, d_in]``, as slots have no order."""
    index, delta = layer.whole_connections()
    dense = torch.zeros(layer.weight.shape, dtype=delta.dtype)
    live = index >= 0
    row = live.nonzero()[:, 0]
    dense[row, index[live].long()] = delta[live]
    return dense


def assert_same_adapter(model: nn.Module, expected: nn.Module, allowed: float = 1e-9) -> None:
    others = layers(expected)
    assert layers(model).keys() == others.keys()
    for name, layer in layers(model).items():
        torch.testing.assert_close(
            connections(layer), connections(others[name]), rtol=allowed, atol=1e-12
        )


def assert_saved_and_loaded(model: nn.Module, folder: Path, other: nn.Module) -> None:
    """Save a sharded ``model`` to one file, and load it both into one process and into shards."""
    path = folder / "adapter.safetensors"
    nk.save_adapter(model, path)
    whole = adapted(bias="all", selection="random")
    nk.load_adapter(whole, path)
    assert_same_adapter(model, whole, 0)
    nk.load_adapter(other, path)
    assert_same_adapter(other, whole, 0)
    rows = own_rows(0)
    torch.testing.assert_close(loss_of(other, rows), loss_of(model, rows), rtol=0, atol=0)
    folder_error = ValueError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(folder_error, match="folder"):
        nk.save_adapter(model, folder)
