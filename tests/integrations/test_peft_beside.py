"""``adapt`` of a model that another method of PEFT is in: what that trains is left alone."""

from __future__ import annotations

import pytest
import torch
from small_llama import batch, llama
from torch import nn

import neuroada_kernels as nk

peft = pytest.importorskip("peft")


def wrapped(**options) -> nn.Module:
    model = nn.Sequential()
    model.up, model.down, model.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
    config = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"], **options)
    return peft.get_peft_model(model, config)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_all_linear_leaves_adapters_of_peft_alone(options):
    model = wrapped(**options)
    theirs = trainable(model)
    assert len(theirs) == (5 if options else 4)
    summary = nk.adapt(model, k=2, target_modules="all-linear")
    at = "base_model.model"
    assert summary.modules == (f"{at}.up.base_layer", f"{at}.down")
    assert trainable(model) == theirs | {f"{name}.delta" for name in summary.modules}
    model(torch.randn(3, 16)).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    ("method", "options", "parameters"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 4}, 1),
        # Both have linears of their own.
        ("PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True}, 5),
        ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}, 7),
        ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}, 2),
    ],
)
def test_all_linear_leaves_prompts_of_peft_alone(method, options, parameters):
    base = llama()
    linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = getattr(peft, method)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, config)
    theirs = trainable(model)
    assert len(theirs) == parameters
    summary = nk.adapt(model, k=2, target_modules="all-linear")
    assert len(summary.modules) == len(linears) - 1  # all but the head
    assert trainable(model) == theirs | {f"{name}.delta" for name in summary.modules}
    tokens = batch(0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_adapters_of_peft_stay_frozen_and_are_adapted_by_name():
    model = wrapped()
    model.requires_grad_(False)
    summary = nk.adapt(model, k=2, target_modules=["lora_A.default", "down"])
    names = {"base_model.model.up.lora_A.default", "base_model.model.down"}
    assert set(summary.modules) == names
    assert trainable(model) == {f"{name}.delta" for name in names}


def test_a_model_of_adapters_alone_has_nothing_to_adapt():
    model = nn.Sequential(nn.Linear(4, 4))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    lora = nn.ModuleList([model.base_model.model[0]])
    lora[0].base_layer = nn.Identity()
    with pytest.raises(ValueError, match=r"target_modules: the model has no torch\.nn\.Linear"):
        nk.adapt(lora)
