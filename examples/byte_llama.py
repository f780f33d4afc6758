"""What the examples train: a small Llama with random weights, on text that ships with Python.

In applications use ``AutoModelForCausalLM.from_pretrained`` and a data set instead. These need no
download, and train in seconds on a CPU.
"""

from __future__ import annotations

import pydoc_data.topics

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 64


class ByteTokenizer:
    """A token for each byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Topics(torch.utils.data.Dataset):
    """The help on Python's keywords, cut into rows of ``LENGTH`` tokens, in a random order."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        text = "\n".join(pydoc_data.topics.topics.values())
        tokens = torch.tensor(tokenizer.encode(text))
        rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        self.rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[row], "labels": self.rows[row]}


def base_model() -> LlamaForCausalLM:
    """The same model each time, as if it were loaded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.1,  # so that frozen random layers have useful features
    )
    return LlamaForCausalLM(config)
