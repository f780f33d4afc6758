"""NeuroAda as a method of Hugging Face PEFT: importing this registers it as ``neuroada``.

``get_peft_model(model, NeuroAdaPeftConfig(k=8))`` then works as it does for LoRA. Saved adapters
load with ``PeftModel.from_pretrained`` in any process that has imported this.
"""

try:
    import peft as _peft
except ModuleNotFoundError as error:
    raise ImportError(
        f"neuroada_kernels.integrations.peft needs PEFT, and there is no {error.name}: "
        "install the extra 'peft'"
    ) from error

try:
    from neuroada_kernels.integrations.peft._register import register
    from neuroada_kernels.integrations.peft.config import NeuroAdaPeftConfig
    from neuroada_kernels.integrations.peft.layer import NeuroAdaPeftLayer, NeuroAdaPeftLinear
    from neuroada_kernels.integrations.peft.model import NeuroAdaModel, set_connections
except ImportError as error:
    raise ImportError(
        f"neuroada_kernels.integrations.peft needs PEFT 0.21.2 or a later 0.21, and peft "
        f"{_peft.__version__} differs: {error}"
    ) from error

register(NeuroAdaPeftConfig, NeuroAdaModel)

__all__ = [
    "NeuroAdaModel",
    "NeuroAdaPeftConfig",
    "NeuroAdaPeftLayer",
    "NeuroAdaPeftLinear",
    "set_connections",
]
