"""DeepSpeed ZeRO-3: every parameter split over the processes, each of which has its own rows.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/deepspeed_zero3.py
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
import torch.distributed as dist
from tiny_transformer import batch, loss_of, pretrained

import neuroada_kernels as nk
from neuroada_kernels.distributed import broadcast_adapter


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--out", default="adapter.safetensors")
    args = options.parse_args()

    on_gpu = torch.cuda.is_available()
    deepspeed.init_distributed("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    model = pretrained()
    summary = nk.adapt(model, k=4)
    broadcast_adapter(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    config = {
        "train_micro_batch_size_per_gpu": 16 // ranks,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if rank == 0:
        print(summary)

    for step in range(args.steps):
        loss = loss_of(engine, batch(step, rank, ranks).to(engine.device))
        engine.backward(loss)
        engine.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step} loss {loss.item() / ranks:.6f}")

    # Within the block the parameters are all-gathered, so that rank 0 can save them.
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if rank == 0:
            nk.save_adapter(model, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
