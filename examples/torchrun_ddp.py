"""Data parallelism: each process has the whole model and its own rows.

    torchrun --nproc-per-node 2 examples/torchrun_ddp.py

Only gradients of deltas are communicated, a few thousandths of the model.
"""

from __future__ import annotations

import argparse
import datetime

import torch
import torch.distributed as dist
from tiny_transformer import batch, loss_of, pretrained
from torch.nn.parallel import DistributedDataParallel

import neuroada_kernels as nk
from neuroada_kernels.distributed import broadcast_adapter


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
    summary = nk.adapt(model, k=4)
    broadcast_adapter(model)  # the same connections everywhere, once
    # So buffers need not be broadcast in each forward. Newer torch: forward_sync_buffers=False.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    if rank == 0:
        print(summary)

    for step in range(args.steps):
        optimizer.zero_grad()
        loss = loss_of(wrapped, batch(step, rank, ranks).to(device))
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step} loss {loss.item() / ranks:.6f}")

    if rank == 0:  # all ranks have the same adapter
        nk.save_adapter(wrapped, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
