"""Training by Hugging Face's Trainer and accelerate, and resuming where a checkpoint left it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from small_llama import batch, llama, logits, loss_of, trainable
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import neuroada_kernels as nk
from neuroada_kernels.integrations.peft import NeuroAdaPeftConfig

STEPS, SAVED = 8, 5


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = batch(row, rows=1)[0]
        return {"input_ids": tokens, "labels": tokens}


def with_peft(seed: int) -> nn.Module:
    """Connections by a seed, so that a run which resumes has to take those of the checkpoint."""
    return get_peft_model(llama(), NeuroAdaPeftConfig(k=4, selection="random", seed=seed))


def with_adapt(seed: int) -> nn.Module:
    model = llama()
    nk.adapt(model, k=4, selection="random", seed=seed)
    return model


def trained(model: nn.Module, folder: Path, checkpoint: Path | None = None) -> list[float]:
    """The losses of the steps that this run made."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=SAVED,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0 if checkpoint is None else SAVED :]


@pytest.mark.parametrize(
    ("adapt", "file"),
    [(with_peft, "adapter_model.safetensors"), (with_adapt, "model.safetensors")],
)
def test_a_run_that_resumes_has_the_same_losses(adapt, file, tmp_path):
    whole = adapt(1)
    before = {name: t.clone() for name, t in whole.state_dict().items()}
    losses = trained(whole, tmp_path)
    resumed = adapt(2)
    rest = trained(resumed, tmp_path / "resumed", tmp_path / f"checkpoint-{SAVED}")
    assert len(losses) == STEPS
    assert rest == losses[SAVED:]
    assert logits(resumed).equal(logits(whole))
    assert losses[-1] < losses[0]
    saved = {path.name for path in (tmp_path / f"checkpoint-{SAVED}").iterdir()}
    assert {"adapter_model.safetensors", "model.safetensors"} & saved == {file}
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(before[name]) == ("delta" not in name), name


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Precision and device are chosen once in a process, by the Trainer of another test too."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def accelerated(model: nn.Module, folder: Path, first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last`` of a run, from the state in ``folder``; and that saved there."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if first:
        accelerator.load_state(str(folder))
    losses = []
    for step in range(first, last):
        loss = loss_of(model, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_state(str(folder))
    return losses


@pytest.mark.parametrize("adapt", [with_peft, with_adapt])
@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_resumes_to_the_same_losses(adapt, tmp_path):
    whole = accelerated(adapt(1), tmp_path / "whole", 0, STEPS)
    first = accelerated(adapt(1), tmp_path / "part", 0, SAVED)
    rest = accelerated(adapt(2), tmp_path / "part", SAVED, STEPS)
    assert first + rest == whole
    assert whole[-1] < whole[0]
