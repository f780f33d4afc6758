"""NeuroAda through PEFT and Hugging Face's Trainer, with the checkpoints that those write.

    python examples/peft_trainer.py

Trains, saves, loads the adapter beside a second one, serves a batch whose rows use different
adapters, and merges. Some seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from byte_llama import ByteTokenizer, Topics, base_model
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("peft-trainer"))
    arguments = parser.parse_args(argv)
    tokenizer = ByteTokenizer()

    config = NeuroAdaPeftConfig(k=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-2,
            logging_steps=10,
            save_steps=arguments.steps,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Topics(tokenizer),
    )
    trainer.train()
    model.save_pretrained(arguments.out / "adapter")

    served = PeftModel.from_pretrained(base_model(), arguments.out / "adapter").eval()
    served.add_adapter("untrained", NeuroAdaPeftConfig(k=1))
    prompts = torch.tensor([tokenizer.encode("The statement ")] * 3)
    names = ["default", "untrained", "__base__"]
    mixed = served.generate(
        input_ids=prompts, adapter_names=names, max_new_tokens=40, do_sample=False
    )
    for name, row in zip(names, mixed.tolist(), strict=True):
        print(f"{name}: {tokenizer.decode(row)!r}")

    merged = served.merge_and_unload(safe_merge=True)  # the plain Llama with one adapter merged
    tokens = merged.generate(input_ids=prompts[:1], max_new_tokens=40, do_sample=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return {"losses": losses, "mixed": mixed, "merged": tokens, "model": merged}


if __name__ == "__main__":
    main()
