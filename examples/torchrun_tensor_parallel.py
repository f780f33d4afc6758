"""Tensor parallelism: each process has some of the heads and some of the MLP's neurons.

    torchrun --nproc-per-node 2 examples/torchrun_tensor_parallel.py

A connection trains in the process that has its weight. The processes all see the same rows.
"""

from __future__ import annotations

import argparse
import datetime

import torch
import torch.distributed as dist
from tiny_transformer import batch, loss_of, pretrained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import neuroada_kernels as nk
from neuroada_kernels.distributed import (
    NeuroAdaColwiseParallel,
    NeuroAdaRowwiseParallel,
    broadcast_adapter,
)

PLAN = {
    "blocks.*.q_proj": NeuroAdaColwiseParallel(),
    "blocks.*.k_proj": NeuroAdaColwiseParallel(),
    "blocks.*.v_proj": NeuroAdaColwiseParallel(),
    "blocks.*.o_proj": NeuroAdaRowwiseParallel(),
    "blocks.*.up_proj": NeuroAdaColwiseParallel(),
    "blocks.*.down_proj": NeuroAdaRowwiseParallel(),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--out", default="adapter.safetensors")
    args = options.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=5))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else "cpu"

    model = pretrained().to(device)
    summary = nk.adapt(model, k=4, exclude_modules=["head"])
    broadcast_adapter(model)
    parallelize_module(model, init_device_mesh("cuda" if on_gpu else "cpu", (ranks,)), PLAN)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    if rank == 0:
        print(summary)
        print(model.blocks[0].down_proj)

    for step in range(args.steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step).to(device))
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step} loss {loss.item():.6f}")

    nk.save_adapter(model, args.out)  # collective: the shards are all-gathered, rank 0 writes
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
