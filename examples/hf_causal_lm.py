"""A causal language model of transformers, adapted by ``nk.adapt``: from training to inference.

    python examples/hf_causal_lm.py

Adapts, trains in a plain loop, saves the adapter, loads it into another copy of the base,
merges it there, and generates. Some seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from byte_llama import ByteTokenizer, Topics, base_model

import neuroada_kernels as nk


def train(model: torch.nn.Module, rows: Topics, steps: int) -> list[float]:
    loader = torch.utils.data.DataLoader(rows, batch_size=16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for step, batch in zip(range(steps), loader, strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("adapter.safetensors"))
    arguments = parser.parse_args(argv)
    tokenizer = ByteTokenizer()
    model = base_model()

    print(nk.adapt(model, nk.NeuroAdaConfig(k=8, target_modules="all-linear")))
    losses = train(model, Topics(tokenizer), arguments.steps)
    nk.save_adapter(model, arguments.out)

    served = base_model().eval()
    nk.load_adapter(served, arguments.out)
    prompt = torch.tensor([tokenizer.encode("The statement ")])
    logits = served(prompt).logits
    nk.merge(served)  # no overhead left
    difference = (served(prompt).logits - logits).abs().max().item()
    tokens = served.generate(prompt, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(tokens[0].tolist())

    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; merging changed a logit by {difference:.1e}")
    print(repr(text))
    return {"losses": losses, "difference": difference, "text": text}


if __name__ == "__main__":
    main()
