"""One method's training by Hugging Face's Trainer: its curve, time, memory, and adapter on disk."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn

from neuroada_kernels.benchmarks.allocations import allocated_peak
from neuroada_kernels.benchmarks.llama import Sizes, build
from neuroada_kernels.benchmarks.method_checks import allowed, check_what_trains, refuse_beyond
from neuroada_kernels.benchmarks.methods import METHODS, shapes_of
from neuroada_kernels.benchmarks.peers.storage import storage
from neuroada_kernels.benchmarks.records import Row
from neuroada_kernels.benchmarks.timing import Quartiles, paired_ratio
from neuroada_kernels.demo import data
from neuroada_kernels.demo.training import Schedule, train
from neuroada_kernels.testing.tolerances import rms_error

#: All times are ratios to it: the frozen model, the baseline elsewhere, has nothing to train.
BASELINE = "full"


@dataclass(frozen=True)
class Budget:
    """The same for every method."""

    sizes: Sizes
    steps: int
    pretrain_steps: int
    pretrain_rate: float = 3e-3
    context: int = 128
    batch: int = 8
    k: int = 8
    # Each method takes its best rate, which should not be the smallest or the largest.
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    windows: int = 64  # held out, every other one for choosing the rate
    source_bytes: int = 1 << 21
    rounds: int = 9  # short runs that are timed
    round_steps: int = 8


class Peers:
    """The pretrained model and the text that it is adapted to; measures each method on them."""

    def __init__(self, budget: Budget, folder: Path) -> None:
        self.budget, self._folder = budget, folder
        self._base = _pretrained(budget)
        source = data.python_source(budget.source_bytes)
        count = budget.batch * budget.steps
        self._rows = _Rows(data.windows(source.train, count, budget.context - 1))
        held_out = data.windows(source.held_out, budget.windows, budget.context - 1)
        self._validation, self._test = held_out[::2], held_out[1::2]
        self._bits = self._bits_of(self._base, self._test)

    def measure(self, method: str) -> Row:
        """See :mod:`neuroada_kernels.benchmarks.peers.command`.

        Raises
        ------
        WrongMethodError
            If the method starts from another model, trains something else than it should, or if
            its adapter differs after saving and loading.
        """
        tried = {rate: self._search(method, rate) for rate in self.budget.rates}
        rate = min(tried, key=lambda rate: tried[rate] or math.inf)
        model, trainable = self._adapted(method)
        curve = self._train(model, rate, self.budget.steps).losses
        after = self._bits_of(model, self._test)
        files, error = self._round_trip(method, model)
        return {
            "trainable": trainable,
            "learning_rate": rate,
            "rates": [{"rate": rate, "validation": bits} for rate, bits in tried.items()],
            "curve": [loss / math.log(2) for loss in curve],
            "held_out": {"before": self._bits, "after": after},
            **self._times(method),
            "peak_bytes": allocated_peak(lambda: self._train(self._adapted(method)[0], rate, 3)),
            "saved_bytes": sum(files.values()),
            "saved_files": files,
            "round_trip": error,
        }

    def _search(self, method: str, rate: float) -> float | None:
        """Bits per byte of the validation windows, or None where training diverged."""
        model, _ = self._adapted(method)
        self._train(model, rate, self.budget.steps)
        bits = self._bits_of(model, self._validation)
        return bits if math.isfinite(bits) else None

    def _fresh(self) -> nn.Module:
        return copy.deepcopy(self._base)

    def _adapted(self, method: str) -> tuple[nn.Module, int]:
        """An adapted, checked model, and its number of trained values."""
        base = self._fresh()
        total = sum(parameter.numel() for parameter in base.parameters())
        expected = METHODS[method].expected(shapes_of(base), self.budget.k, total)
        torch.manual_seed(0)  # for what a method initialises at random
        model = METHODS[method].adapt(base, self.budget.k)
        error = abs(self._bits_of(model, self._test) - self._bits) / self._bits
        refuse_beyond(method, {"loss before training": error}, self._allowed)
        return model, check_what_trains(method, model, expected)

    @property
    def _allowed(self) -> float:
        limit: float = allowed(torch.float32, self.budget.sizes.layers)
        return limit

    @torch.no_grad()
    def _bits_of(self, model: nn.Module, tokens: Tensor) -> float:
        model.eval()
        losses: list[float] = [
            float(model(input_ids=part, labels=part).loss) * len(part)
            for part in tokens.split(self.budget.batch)
        ]
        model.train()
        bits: float = sum(losses) / len(tokens) / math.log(2)
        return bits

    def _train(self, model: nn.Module, rate: float, steps: int) -> _Run:
        """Train for ``steps`` steps, from the first batch on."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        run = _Run(steps)
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(self._folder / "trainer"),
                max_steps=steps,
                per_device_train_batch_size=self.budget.batch,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                optim="adamw_torch_fused",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=self._rows,
            callbacks=[run.callback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return run

    def _times(self, method: str) -> Row:
        """Short runs interleaved with full fine-tuning, so that both see the same drift.

        At the smallest rate: a step does the same work at any rate, but full fine-tuning diverges
        at the best rate of a method with few parameters, and diverged values took half as long
        again.
        """
        rate = min(self.budget.rates)
        models = {name: self._adapted(name)[0] for name in dict.fromkeys((BASELINE, method))}
        samples: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(self.budget.rounds):
            for name, model in models.items():
                run = self._train(model, rate, self.budget.round_steps)
                samples[name].append(statistics.median(run.step_ms))
        step = Quartiles.of(samples[method])
        tokens = self.budget.batch * self.budget.context
        return {
            "step_ms": asdict(step),
            "samples_ms": samples[method],
            "full_samples_ms": samples[BASELINE],
            "tokens_per_second": tokens / step.median * 1e3,
            "ratio_to_full": asdict(paired_ratio(samples[method], samples[BASELINE])),
        }

    def _round_trip(self, method: str, model: nn.Module) -> tuple[dict[str, int], float]:
        """Sizes of the saved files, and the relative error of the logits after loading."""
        folder = self._folder / method
        folder.mkdir()
        save, load = storage(method, self.budget.k)
        save(model, folder)
        error = rms_error(self._logits(load(self._fresh(), folder)), self._logits(model))
        refuse_beyond(method, {"logits after loading": error}, self._allowed)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.stat().st_size for path in files}, error

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        logits: Tensor = model.eval()(input_ids=self._test[: self.budget.batch]).logits
        return logits


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of text, in the form that transformers takes."""

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[row], "labels": self._windows[row]}


class _Run:
    """Records of a run of the Trainer: its losses and the end of each step."""

    def __init__(self, steps: int) -> None:
        self.losses: list[float] = []
        self._ends: list[int] = []

    @property
    def step_ms(self) -> list[float]:
        """Time between the ends of steps, data loading included; not of the first two."""
        pairs = itertools.pairwise(self._ends)
        return [(end - start) / 1e6 for start, end in pairs][1:]

    def callback(self) -> Any:
        from transformers import TrainerCallback

        ends = self._ends

        class Ends(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(perf_counter_ns())

        return Ends()


def _pretrained(budget: Budget) -> nn.Module:
    """A Llama of bytes, trained on CPython's documentation; frozen."""

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    model: nn.Module = build(budget.sizes, budget.context, torch.float32, "cpu")
    model.requires_grad_(True)
    documents = data.Batches(data.documentation().train, budget.batch, budget.context - 1, seed=0)
    schedule = Schedule(budget.pretrain_steps, budget.pretrain_rate, weight_decay=0.1)
    train(model, documents, schedule, lambda step, loss: None, loss_of)
    return model.requires_grad_(False)
