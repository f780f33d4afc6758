"""A Llama with random weights that reads bytes, and text to train it on."""

from __future__ import annotations

import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import neuroada_kernels as nk

TEXT = "\n".join(pydoc_data.topics.topics.values()).encode()
BATCH, LENGTH = 4, 24


def llama(dtype: torch.dtype = torch.float32, **options: object) -> LlamaForCausalLM:
    """The same model each time, of 2 layers and 25,000 parameters, in evaluation mode."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options)).to(dtype).eval()


def batch(step: int, rows: int = BATCH) -> Tensor:
    """Rows of the text, different at each step."""
    places = torch.randint(
        len(TEXT) - LENGTH, (rows,), generator=torch.Generator().manual_seed(step)
    )
    return torch.tensor([list(TEXT[place : place + LENGTH]) for place in places.tolist()])


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The loss in the dtype of the model; transformers' own is always float32."""
    tokens = batch(step)
    scores = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch(0) if tokens is None else tokens).logits


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def give_values(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give values to every delta and whatever else trains, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += torch.randn(parameter.shape, generator=generator) / 8
    return model


def curve(model: nn.Module, steps: int, lr: float = 0.02) -> list[float]:
    """The losses of a training run."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layers(model: nn.Module) -> dict[str, nk.NeuroAdaLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nk.NeuroAdaLinear)}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of tensors whose bits differ from ``before``."""
    return {
        name
        for name, tensor in model.state_dict().items()
        if not tensor.view(torch.uint8).equal(before[name].view(torch.uint8))
    }
