"""What the demo does, in order: pretrain, adapt, compare, merge; and the checks along the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module

import neuroada_kernels as nk
from neuroada_kernels.demo import compare, data, merging
from neuroada_kernels.demo.training import Schedule, bits_per_byte, train
from neuroada_kernels.demo.transformer import Config, Transformer, generate

#: Relative differences of float32 sums in another order: of a loss, and of a gradient of 1e4
#: products after all layers.
LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-4

#: As a share of the largest logit: merging rounds each changed weight once, by 6e-8 of itself.
LOGIT_BOUND = 1e-4

PROMPT = b"    def __init__(self, "


@dataclass(frozen=True)
class Settings:
    """Sizes of the models, the data and the runs.

    The learning rates of the deltas are the best of short pilot runs. They are large, because a few
    connections have to move as far as weights do.
    """

    config: Config
    batch: int
    compared_batch: int
    source_bytes: int
    held_out_windows: int
    pretrain: Schedule
    adapt: dict[int, Schedule]
    evaluations: int
    rounds: int
    sample_bytes: int
    seed: int

    @classmethod
    def full(cls, seed: int) -> Settings:
        """Some minutes on two cores."""
        return cls(
            config=Config(d_model=256, layers=4, heads=4, d_hidden=688, context=128),
            batch=8,
            compared_batch=8,
            source_bytes=1 << 20,
            held_out_windows=64,
            pretrain=Schedule(steps=400, learning_rate=1.5e-3, weight_decay=0.1),
            adapt={
                1: Schedule(steps=120, learning_rate=5e-2),
                8: Schedule(steps=120, learning_rate=2e-2),
            },
            evaluations=8,
            rounds=9,
            sample_bytes=100,
            seed=seed,
        )

    @classmethod
    def quick(cls, seed: int) -> Settings:
        """Some seconds, to see that everything runs."""
        return cls(
            config=Config(d_model=64, layers=2, heads=4, d_hidden=172, context=64),
            batch=16,
            compared_batch=2,
            source_bytes=1 << 18,
            held_out_windows=32,
            pretrain=Schedule(steps=60, learning_rate=5e-3, weight_decay=0.1),
            adapt={k: Schedule(steps=20, learning_rate=1e-2) for k in (1, 8)},
            evaluations=2,
            rounds=3,
            sample_bytes=20,
            seed=seed,
        )


@dataclass(frozen=True)
class Check:
    """Something that must hold; ``detail`` says with which numbers it does or does not."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Adapted:
    """How an adaptation went; losses are on held-out files, in bits per byte."""

    k: int
    trainable: int
    share: float
    loss_before: float
    loss_after: float
    curve: list[tuple[int, float]]  # steps done, loss


@dataclass
class Results:
    """Everything that is shown, as plain data."""

    settings: Settings
    corpus: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    documentation_loss: float = 0.0
    adapted: dict[int, Adapted] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, compare.Agreement] = field(default_factory=dict)
    compared: dict[str, compare.Measured] = field(default_factory=dict)
    merged: merging.Merged | None = None
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


#: Called with a stage's name, the steps done, the steps in all, and a short status.
Watch = Callable[[str, int, int, str], None]


class Experiment:
    """Runs the stages, each of which uses the previous ones, and fills in ``results``."""

    def __init__(
        self, settings: Settings, documents: data.Corpus, source: data.Corpus, watch: Watch
    ) -> None:
        self.results = Results(settings)
        self.settings = settings
        self._watch = watch
        self.documents, self.source = documents, source
        self.results.corpus = {
            f"{name}_{part}": getattr(corpus, part)
            for name, corpus in (("documentation", self.documents), ("source", self.source))
            for part in ("train_bytes", "held_out_bytes")
        }
        self.held_out_documents = self._windows(self.documents)
        self.held_out_source = self._windows(self.source)
        self.pretrained = Transformer(settings.config, settings.seed)
        self.results.parameters = sum(p.numel() for p in self.pretrained.parameters())
        self.adapted: dict[int, Transformer] = {}

    def run(self) -> Results:
        for stage in (self.pretrain, self.adapt, self.sample, self.compare, self.merge):
            with self._timed(stage.__name__):
                stage()
        return self.results

    def pretrain(self) -> None:
        """Train all parameters on the documentation."""
        schedule = self.settings.pretrain
        title = "Pretrain on the documentation"
        train(
            self.pretrained,
            self._batches(self.documents),
            schedule,
            lambda step, loss: self._watch(title, step, schedule.steps, f"{loss:.2f} bits/byte"),
        )
        self.results.documentation_loss = bits_per_byte(self.pretrained, self.held_out_documents)

    def adapt(self) -> None:
        """Adapt to Python source, from the same pretrained model at every k."""
        before = bits_per_byte(self.pretrained, self.held_out_source)
        for k, schedule in self.settings.adapt.items():
            model = copy.deepcopy(self.pretrained)
            summary = nk.adapt(model, k)
            curve = [(0, before)]
            self._train_deltas(model, k, schedule, curve)
            self.adapted[k] = model
            self.results.adapted[k] = Adapted(
                k, summary.trainable, summary.share, before, curve[-1][1], curve
            )
            self._check(
                f"k = {k}: held-out loss on Python source falls",
                curve[-1][1] < before,
                f"{before:.3f} to {curve[-1][1]:.3f} bits/byte",
            )
            moved = _changed_parameters(self.pretrained, model)
            self._check(
                f"k = {k}: every pretrained weight is as it was",
                not moved,
                ", ".join(moved) or f"{self.results.parameters:,} bit for bit",
            )

    def _train_deltas(
        self, model: Transformer, k: int, schedule: Schedule, curve: list[tuple[int, float]]
    ) -> None:
        every = max(1, schedule.steps // self.settings.evaluations)

        def after_step(step: int, loss: float) -> None:
            if step % every == 0 or step == schedule.steps:
                curve.append((step, bits_per_byte(model, self.held_out_source)))
            title = f"Adapt to Python source, k = {k}"
            self._watch(title, step, schedule.steps, f"{curve[-1][1]:.2f} bits/byte held out")

        train(model, self._batches(self.source), schedule, after_step)

    def sample(self) -> None:
        """What the models write after the same prompt."""
        models = {"pretrained": self.pretrained}
        models |= {f"adapted, k = {k}": model for k, model in self.adapted.items()}
        self.results.samples["prompt"] = PROMPT.decode()
        for number, (name, model) in enumerate(models.items()):
            written = generate(model, PROMPT, self.settings.sample_bytes, self.settings.seed)
            self.results.samples[name] = written.decode(errors="replace")
            self._watch("Write a sample", number + 1, len(models), name)

    def compare(self) -> None:
        """Compare the same step at the largest k in four variants; time them only if all agree."""
        window = self._batches(self.source, self.settings.compared_batch).draw()
        variants = compare.make_variants(self.adapted[max(self.adapted)])
        self.results.agreement = compare.compare_first_step(variants, window)
        for name, found in self.results.agreement.items():
            self._check(
                f"{variants[name].label}: loss and gradients are those of the reference layer",
                found.loss_difference <= LOSS_BOUND and found.gradient_difference <= GRADIENT_BOUND,
                f"loss {found.loss:.6f} nats, off by {found.loss_difference:.0e}; "
                f"gradients by {found.gradient_difference:.0e}",
            )
        if not all(check.passed for check in self.results.checks[-len(variants) :]):
            return
        done = 0
        total = len(variants) * (self.settings.rounds + 1)

        def after_step(label: str) -> None:
            nonlocal done
            done += 1
            self._watch("Compare training steps", done, total, label)

        self.results.compared = compare.measure(variants, window, self.settings.rounds, after_step)

    def merge(self) -> None:
        """Merge the model of the largest k, compare, and undo it."""
        title = "Merge and unmerge"
        self._watch(title, 0, 1, "")
        found = merging.merge_and_undo(
            self.adapted[max(self.adapted)],
            self.pretrained,
            self.held_out_source,
            self.held_out_source[: self.settings.batch],
            self.settings.rounds,
        )
        self.results.merged = found
        self._check(
            "merged and unmerged logits agree",
            found.changed_weights > 0
            and found.largest_difference <= LOGIT_BOUND * found.largest_logit,
            f"largest difference {found.largest_difference:.1e} of logits up to "
            f"{found.largest_logit:.1f}; {found.changed_weights:,} weights changed",
        )
        self._check(
            "merged and unmerged held-out loss agree",
            abs(found.loss_merged - found.loss_unmerged) <= LOSS_BOUND * found.loss_unmerged,
            f"{found.loss_merged:.6f} and {found.loss_unmerged:.6f} bits/byte",
        )
        self._check(
            "unmerging restores every weight bit for bit",
            found.unrestored_weights == 0,
            f"{found.unrestored_weights:,} weights differ",
        )
        self._watch(title, 1, 1, "")

    def _batches(self, corpus: data.Corpus, batch: int | None = None) -> data.Batches:
        context = self.settings.config.context
        return data.Batches(corpus.train, batch or self.settings.batch, context, self.settings.seed)

    def _windows(self, corpus: data.Corpus) -> Tensor:
        settings = self.settings
        return data.windows(corpus.held_out, settings.held_out_windows, settings.config.context)

    def _check(self, name: str, passed: bool, detail: str) -> None:
        self.results.checks.append(Check(name, passed, detail))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.results.seconds[stage] = time.perf_counter() - start


def _changed_parameters(pretrained: Module, adapted: Module) -> list[str]:
    """Names of the parameters of ``pretrained`` that ``adapted`` does not hold bit for bit."""
    now = dict(adapted.named_parameters())
    return [name for name, p in pretrained.named_parameters() if not torch.equal(p, now[name])]
