"""NeuroAda as a method of Hugging Face PEFT: importing this registers it as ``neuroada``.

``get_peft_model(model, NeuroAdaPeftConfig(k=8))`` then does what it does for LoRA, and what it
saves loads with ``PeftModel.from_pretrained`` wherever this was imported before.
"""

try:
    import peft as _peft  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"neuroada_kernels.integrations.peft needs PEFT, and there is no {error.name}: "
        "pip install 'neuroada-kernels[peft]'"
    ) from error

from neuroada_kernels.integrations.peft._register import register
from neuroada_kernels.integrations.peft.config import NeuroAdaPeftConfig
from neuroada_kernels.integrations.peft.layer import NeuroAdaPeftLayer, NeuroAdaPeftLinear
from neuroada_kernels.integrations.peft.model import NeuroAdaModel, set_connections

register(NeuroAdaPeftConfig, NeuroAdaModel)

__all__ = [
    "NeuroAdaModel",
    "NeuroAdaPeftConfig",
    "NeuroAdaPeftLayer",
    "NeuroAdaPeftLinear",
    "set_connections",
]
