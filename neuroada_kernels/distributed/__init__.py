"""Training in several processes: DDP, FSDP2 and tensor parallelism; see ``docs/distributed.md``."""

from neuroada_kernels.distributed.replicas import broadcast_adapter, replicate_trained
from neuroada_kernels.distributed.tensor_parallel import (
    NeuroAdaColwiseParallel,
    NeuroAdaRowwiseParallel,
)

__all__ = [
    "NeuroAdaColwiseParallel",
    "NeuroAdaRowwiseParallel",
    "broadcast_adapter",
    "replicate_trained",
]
