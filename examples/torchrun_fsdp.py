"""Frozen weights split over the processes (FSDP2), each of which has its own rows.

    torchrun --nproc-per-node 2 examples/torchrun_fsdp.py                    # deltas replicated
    torchrun --nproc-per-node 2 examples/torchrun_fsdp.py --deltas sharded

Replicated deltas stay float32 under mixed precision, and one message reduces their gradients.
Sharded deltas are stored only once; FSDP casts them as it gathers them, so that the forward reads
them in bfloat16.
"""

from __future__ import annotations

import argparse
import datetime

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from tiny_transformer import batch, loss_of, pretrained
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import neuroada_kernels as nk
from neuroada_kernels.distributed import broadcast_adapter, replicate_trained


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--deltas", choices=["whole", "sharded"], default="whole")
    options.add_argument("--out", default="adapter.safetensors")
    options.add_argument("--checkpoint", help="folder for torch.distributed.checkpoint")
    args = options.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=5))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else "cpu"

    model = pretrained().to(device)
    summary = nk.adapt(model, k=4)
    broadcast_adapter(model)
    whole = set()
    if args.deltas == "whole":
        whole = replicate_trained(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mp_policy=policy, ignored_params=whole)
    # After sharding, which replaces the parameters.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    if rank == 0:
        print(summary)

    for step in range(args.steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step, rank, ranks).to(device))
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step} loss {loss.item() / ranks:.6f}")

    nk.save_adapter(model, args.out)  # collective: rank 0 writes
    if args.checkpoint:
        adapter = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
        checkpoint.save(adapter, checkpoint_id=args.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
