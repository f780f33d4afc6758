"""The methods that train a whole model, each adapting the same linears, and what each should train.

Those of PEFT come from PEFT itself. Those without a package are our own, marked as stand-ins: the
frozen model, full fine-tuning, the materialised scheme of the method's authors, and mask-based
tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.baselines import MaskedDenseLinear, MaterialisedLinear
from neuroada_kernels.benchmarks.llama import LINEARS, adapted_linears
from neuroada_kernels.model import replace
from neuroada_kernels.testing import Inputs

OURS = "neuroada_kernels"
PEFT = "peft"
STAND_IN = "stand-in"

#: ``[d_out, d_in]`` of each linear, by name.
Shapes = Mapping[str, tuple[int, int]]

#: Packages that are no method of this suite, and why.
LEFT_OUT = {
    "unsloth": "replaces the model's code by its own for a GPU; there is none for a CPU",
    "liger": "kernels for norms, rotary embedding and loss, on a GPU alone: every method would "
    "take them alike",
}


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Parameters
    ----------
    source : str
        The package that it comes from, or :data:`STAND_IN`.
    adapt : callable
        From a frozen model and k to the model to train; it may be the same one, changed.
    numbers : callable
        From a linear's name, shape and k to its number of trained values; None if the whole
        model trains.
    trains : str
        A regular expression that only the names of trained parameters match.
    chosen : bool
        Whether it trains NeuroAda's selection, so that gradients can be compared.
    """

    source: str
    adapt: Callable[[nn.Module, int], nn.Module]
    numbers: Callable[[str, tuple[int, int], int], int] | None
    trains: str
    chosen: bool = False

    def expected(self, shapes: Shapes, k: int, total: int) -> int:
        """The number of values that should train, of a model with ``total`` parameters."""
        if self.numbers is None:
            return total
        return sum(self.numbers(name, shape, k) for name, shape in shapes.items())


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes of the linears of a plain Llama, by name."""
    return {n: (m.out_features, m.in_features) for n, m in adapted_linears(model).items()}


def why_not(name: str) -> str | None:
    """Why a method cannot be run here, or None."""
    if METHODS[name].source == PEFT or name == "neuroada-peft":
        if find_spec("peft") is None:
            return "peft is missing: install the extra 'peft'"
        import peft

        if name == "peft-supertuning" and not hasattr(peft, "SupertuningConfig"):
            return f"peft {peft.__version__} has no Super-Tuning"
    return None


def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def plain_name(name: str) -> str:
    """The name of a parameter or module in the model before it is adapted."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _frozen(model: nn.Module, k: int) -> nn.Module:
    return model


def _full(model: nn.Module, k: int) -> nn.Module:
    return model.requires_grad_(True)


def _neuroada(**options: str) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(model: nn.Module, k: int) -> nn.Module:
        config = nk.NeuroAdaConfig(k=k, target_modules=LINEARS, **options)  # type: ignore[arg-type]
        nk.adapt(model, config, progress=False)
        return model

    return adapt


def _neuroada_peft(model: nn.Module, k: int) -> nn.Module:
    from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig

    return _with_peft(model, NeuroAdaPeftConfig(k=k, target_modules=LINEARS))


def _stand_in(make: Callable[[Inputs], nn.Module]) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(model: nn.Module, k: int) -> nn.Module:
        for name in adapted_linears(model):  # one by one, so that a copied weight is freed
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            replace(model, {linear: make(_inputs(linear, k))})
        return model

    return adapt


def _inputs(linear: nn.Linear, k: int) -> Inputs:
    """The inputs of a stand-in for a layer: no x, no gradient, and a bypass of zeros."""
    weight = linear.weight.detach()
    index = nk.select(weight, k)
    delta = torch.zeros(index.shape, device=weight.device)
    return Inputs(weight.new_empty(0), weight, index, delta, None, weight.new_empty(0))


def _with_peft(model: nn.Module, config: object) -> nn.Module:
    from peft import get_peft_model

    # The adapter in the model's dtype: PEFT's own default for a 16-bit model costs more.
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return adapted


def _lora(r: int, dora: bool = False) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(model: nn.Module, k: int) -> nn.Module:
        from peft import LoraConfig

        config = LoraConfig(
            r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=LINEARS, use_dora=dora
        )
        return _with_peft(model, config)

    return adapt


def _ia3(model: nn.Module, k: int) -> nn.Module:
    from peft import IA3Config

    return _with_peft(model, IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]))


def _shira(model: nn.Module, k: int) -> nn.Module:
    from peft import ShiraConfig

    return _with_peft(model, ShiraConfig(r=SHIRA_RANK, target_modules=LINEARS, random_seed=0))


def _supertuning(model: nn.Module, k: int) -> nn.Module:
    from peft import SupertuningConfig

    config = SupertuningConfig(sparsity=SUPERTUNING_SPARSITY, target_modules=LINEARS)
    return _with_peft(model, config)


#: As many numbers as LoRA of this rank.
SHIRA_RANK = 8
#: Its package's default: 1 % of each weight trains.
SUPERTUNING_SPARSITY = 0.99


def _bypasses(name: str, shape: tuple[int, int], k: int) -> int:
    return shape[0] * k


def _of_rank(r: int) -> Callable[[str, tuple[int, int], int], int]:
    return lambda name, shape, k: r * sum(shape)


_DELTA = r"delta(\.default)?$"

METHODS: dict[str, Method] = {
    "frozen": Method(STAND_IN, _frozen, lambda *_: 0, "^$"),
    "neuroada": Method(OURS, _neuroada(), _bypasses, _DELTA, chosen=True),
    "neuroada-resident": Method(
        OURS, _neuroada(strategy="resident"), _bypasses, _DELTA, chosen=True
    ),
    "neuroada-compact": Method(
        OURS, _neuroada(save_activations="compact"), _bypasses, _DELTA, chosen=True
    ),
    "neuroada-peft": Method(OURS, _neuroada_peft, _bypasses, _DELTA, chosen=True),
    "materialised": Method(STAND_IN, _stand_in(MaterialisedLinear), _bypasses, _DELTA, chosen=True),
    "masked-dense": Method(
        STAND_IN,
        _stand_in(MaskedDenseLinear),
        lambda name, shape, k: shape[0] * shape[1],
        r"_proj\.weight$",
        chosen=True,
    ),
    **{f"peft-lora-r{r}": Method(PEFT, _lora(r), _of_rank(r), "lora_[AB]") for r in (8, 16, 64)},
    "peft-dora-r16": Method(
        PEFT,
        _lora(16, dora=True),
        lambda name, shape, k: 16 * sum(shape) + shape[0],
        "lora_([AB]|magnitude_vector)",
    ),
    "peft-ia3": Method(
        PEFT, _ia3, lambda name, shape, k: shape[name.endswith("down_proj")], "ia3_l"
    ),
    f"peft-shira-r{SHIRA_RANK}": Method(PEFT, _shira, _of_rank(SHIRA_RANK), "shira_weight"),
    "peft-supertuning": Method(
        PEFT,
        _supertuning,
        lambda name, shape, k: int(shape[0] * shape[1] * (1 - SUPERTUNING_SPARSITY)),
        "supertuning_values",
    ),
    "full": Method(STAND_IN, _full, None, "."),
}


def training(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
