"""Other methods' linears from PEFT, each with what it must compute.

All have the weight of :class:`neuroada_kernels.testing.Inputs`, adapters in its dtype (PEFT's
default for a 16-bit model, float32 adapters, costs more), and adapters as large as the dense
product, so that an error in them is seen. PEFT is imported when a layer is built.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neuroada_kernels.benchmarks.exact import Exact, Expected
from neuroada_kernels.testing import Inputs

if TYPE_CHECKING:
    from peft import PeftConfig


class PeftLinear(nn.Module):
    """A frozen linear that ``config`` adapts."""

    def __init__(self, inputs: Inputs, config: PeftConfig) -> None:
        from peft import get_peft_model

        super().__init__()
        d_out, d_in = inputs.weight.shape
        linear = nn.Linear(d_in, d_out, inputs.bias is not None, "meta")
        linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
        if inputs.bias is not None:
            linear.bias = nn.Parameter(inputs.bias, requires_grad=False)
        config.target_modules = {"0"}
        model = get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
        self.layer: Any = model.base_model.model[0].to(inputs.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def expected(self, exact: Exact) -> Expected:
        raise NotImplementedError


class PeftLoRALinear(PeftLinear):
    """LoRA of rank ``r``; with ``dora``, its weight-decomposed form."""

    def __init__(self, inputs: Inputs, r: int, dora: bool = False) -> None:
        from peft import LoraConfig

        super().__init__(inputs, LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, use_dora=dora))
        self.scaling: float = self.layer.scaling["default"]
        self.lora_A: nn.Parameter = self.layer.lora_A["default"].weight
        self.lora_B: nn.Parameter = self.layer.lora_B["default"].weight
        with torch.no_grad():
            self.lora_A.normal_(std=inputs.weight.shape[1] ** -0.5)
            self.lora_B.normal_(std=r**-0.5 / self.scaling)

    def expected(self, exact: Exact) -> Expected:
        return exact.lora(_wide(self.lora_A), _wide(self.lora_B), self.scaling)


class PeftDoRALinear(PeftLoRALinear):
    """DoRA: LoRA with a magnitude for each row."""

    def __init__(self, inputs: Inputs, r: int) -> None:
        super().__init__(inputs, r, dora=True)
        self.magnitude: nn.Parameter = self.layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            # As far from the rows' norms as training may take it.
            self.magnitude.mul_(torch.rand_like(self.magnitude) + 0.5)

    def expected(self, exact: Exact) -> Expected:
        a, b, magnitude = _wide(self.lora_A), _wide(self.lora_B), _wide(self.magnitude)
        return exact.dora(a, b, magnitude, self.scaling)


class PeftIA3Linear(PeftLinear):
    """IA3: a factor for each output."""

    def __init__(self, inputs: Inputs) -> None:
        from peft import IA3Config

        super().__init__(inputs, IA3Config(feedforward_modules=[]))
        self.scale: nn.Parameter = self.layer.ia3_l["default"]
        with torch.no_grad():
            self.scale.normal_()

    def expected(self, exact: Exact) -> Expected:
        return exact.ia3(_wide(self.scale))


class PeftSHiRALinear(PeftLinear):
    """About as many entries as NeuroAda has, anywhere in the weight by PEFT's own random mask."""

    def __init__(self, inputs: Inputs) -> None:
        from peft import ShiraConfig

        rank = shira_rank(inputs)
        super().__init__(inputs, ShiraConfig(r=rank, mask_type="random", random_seed=0))
        self.values: nn.Parameter = self.layer.shira_weight["default"]
        _draw(self.values, inputs)
        with warnings.catch_warnings():
            # torch warns once that PEFT's sparse tensor is not checked.
            warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
            self.layer.get_delta_weight("default")

    def expected(self, exact: Exact) -> Expected:
        rows, columns = self.layer.shira_indices["default"].long().to(self.values.device)
        return exact.sparse(rows * exact.weight.shape[1] + columns, _wide(self.values))


class PeftSupertuningLinear(PeftLinear):
    """The ``d_out * k`` largest entries of the whole weight, as many as NeuroAda's."""

    def __init__(self, inputs: Inputs) -> None:
        from peft import SupertuningConfig

        # PEFT rounds the number of entries down; half an entry more makes it exact.
        share = (inputs.index.numel() + 0.5) / inputs.weight.numel()
        super().__init__(inputs, SupertuningConfig(sparsity=max(0.0, 1 - share)))
        self.values: nn.Parameter = self.layer.supertuning_values["default"]
        _draw(self.values, inputs)

    def expected(self, exact: Exact) -> Expected:
        return exact.sparse(self.layer.supertuning_indices["default"].long(), _wide(self.values))


def shira_rank(inputs: Inputs) -> int:
    """The rank whose ``r (d_in + d_out)`` entries in PEFT come closest to ours."""
    return max(1, round(inputs.index.numel() / sum(inputs.weight.shape)))


def _draw(values: nn.Parameter, inputs: Inputs) -> None:
    with torch.no_grad():
        values.normal_(std=(values.numel() / inputs.weight.shape[0]) ** -0.5)


def _wide(values: Tensor) -> Tensor:
    return values.detach().double()
