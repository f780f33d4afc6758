"""NeuroAda for PyTorch: k trainable bypass connections per neuron, beside a frozen linear.

``NeuroAdaLinear`` replaces ``nn.Linear``; its kernels materialize neither ``W + delta`` nor a
gradient of W's shape. Zhang et al., NeuroAda, EMNLP 2025 (arXiv 2510.18940).
"""

from neuroada_kernels import backends as _backends  # noqa: F401 - registers them
from neuroada_kernels import functional, reference
from neuroada_kernels._registry import BackendError, available_backends, use_backend
from neuroada_kernels._version import __version__
from neuroada_kernels.adapters import load_adapter, save_adapter
from neuroada_kernels.adding import add_adapter, add_weighted_adapter
from neuroada_kernels.config import NeuroAdaConfig
from neuroada_kernels.model import AdaptSummary, adapt, select_connections
from neuroada_kernels.model_merge import merge, merge_requantized, unmerge
from neuroada_kernels.named import (
    active_adapter,
    adapter_names,
    disable_adapter,
    rows_of,
    set_adapter,
    set_requires_grad,
)
from neuroada_kernels.nn import (
    NeuroAdaBypass,
    NeuroAdaExperts,
    NeuroAdaLinear,
    ReferenceNeuroAdaLinear,
    Requantization,
)
from neuroada_kernels.plan import check_index, make_plan, order_slots
from neuroada_kernels.selection import select
from neuroada_kernels.siblings import set_save_activations
from neuroada_kernels.strategies import resident, set_strategy
from neuroada_kernels.unloading import delete_adapter, unload

__all__ = [
    "AdaptSummary",
    "BackendError",
    "NeuroAdaBypass",
    "NeuroAdaConfig",
    "NeuroAdaExperts",
    "NeuroAdaLinear",
    "ReferenceNeuroAdaLinear",
    "Requantization",
    "__version__",
    "active_adapter",
    "adapt",
    "adapter_names",
    "add_adapter",
    "add_weighted_adapter",
    "available_backends",
    "check_index",
    "delete_adapter",
    "disable_adapter",
    "functional",
    "load_adapter",
    "make_plan",
    "merge",
    "merge_requantized",
    "order_slots",
    "reference",
    "resident",
    "rows_of",
    "save_adapter",
    "select",
    "select_connections",
    "set_adapter",
    "set_requires_grad",
    "set_save_activations",
    "set_strategy",
    "unload",
    "unmerge",
    "use_backend",
]
