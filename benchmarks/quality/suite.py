"""The order of things: for each variant a search of the learning rate, then a run for each seed."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from neuroada_kernels._files import replacing
from neuroada_kernels.benchmarks.environment import environment
from neuroada_kernels.benchmarks.quality.methods import Given, adapt, why_not
from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.tasks import Task, World, make_tasks
from neuroada_kernels.benchmarks.quality.variants import Variant, groups, unique
from neuroada_kernels.demo.training import train

#: Learning rates are searched with a seed that no result is of.
SEARCH_SEED = 1000
#: Batches over which gradients are gathered, where a variant selects by them.
GRADIENT_BATCHES = 4

Part = Literal["search", "test"]


@dataclass(frozen=True)
class Run:
    """One training; the loss is on validation data in a search, and on test data after it."""

    task: str
    variant: str
    part: Part
    rate: float | None
    seed: int
    trainable: int
    loss: float | None
    accuracy: float | None
    seconds: float

    @property
    def key(self) -> Key:
        return Key(self.task, self.variant, self.part, self.rate, self.seed)


@dataclass(frozen=True)
class Key:
    """What tells a run from all others."""

    task: str
    variant: str
    part: Part
    rate: float | None
    seed: int


class ResumeError(ValueError):
    """A results file cannot be gone on with."""


@dataclass
class Store:
    """Finished runs; written to ``path`` after each, as a whole, so that it is always valid."""

    settings: dict[str, Any]
    path: Path | None = None
    runs: dict[Key, Run] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # variant to reason
    sessions: list[dict[str, Any]] = field(default_factory=list)  # where the suite ran
    summary: list[dict[str, Any]] = field(default_factory=list)  # when all is done

    @classmethod
    def open(cls, settings: Settings, path: Path | None) -> Store:
        """What ``path`` holds already, or nothing.

        Raises
        ------
        ResumeError
            If it holds something else, or runs of other settings.
        """
        store = cls(settings.as_dict(), path)
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text())
                same = found["settings"] == store.settings
                store.runs = {run.key: run for run in (Run(**row) for row in found["runs"])}
                store.sessions = found["sessions"]
            except (KeyError, TypeError, ValueError) as error:
                raise ResumeError(f"{path}: holds no runs of this suite ({error!r})") from error
            if not same:
                raise ResumeError(f"{path}: holds runs of other settings, expected the same ones")
        return store

    def open_session(self) -> None:
        """Note where it runs: to be called before the first new run.

        Raises
        ------
        ResumeError
            If earlier runs come from where the same pretraining may end elsewhere.
        """
        here = environment()
        for fact in ("package", "torch", "cpu"):
            before = {session[fact] for session in self.sessions} - {here[fact]}
            if before:
                raise ResumeError(
                    f"{self.path}: has runs of {fact} {before.pop()}, expected {here[fact]}"
                )
        self.sessions.append(here)

    def add(self, run: Run) -> None:
        self.runs[run.key] = run
        self.write()

    def write(self) -> None:
        if self.path is not None:
            with replacing(self.path) as new:
                new.write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def as_dict(self) -> dict[str, Any]:
        return {
            "sessions": self.sessions,
            "settings": self.settings,
            "skipped": self.skipped,
            "summary": self.summary,
            "runs": [asdict(run) for run in self.runs.values()],
        }


def pick(searched: Iterable[Run]) -> float | None:
    """The learning rate of the lowest loss, the smaller one of equals; None where all diverged."""
    candidates = [
        (run.loss, run.rate)
        for run in searched
        if run.part == "search" and run.loss is not None and run.rate is not None
    ]
    return min(candidates)[1] if candidates else None


#: Called after each run with the runs done, how many there are in all, and what was done.
Watch = Callable[[int, int, str], None]


class Suite:
    """Runs what ``store`` lacks, task after task."""

    def __init__(self, settings: Settings, store: Store, tasks: Sequence[str] = ()) -> None:
        self.settings, self.store = settings, store
        every = make_tasks(settings)
        unknown = sorted(set(tasks) - every.keys())
        if unknown:
            raise ValueError(f"tasks: {unknown}, expected of {list(every)}")
        self.tasks = [every[name] for name in tasks or every]
        self._worlds: dict[tuple[str, int], World] = {}
        self._done = 0

    def variants(self, task: Task) -> list[Variant]:
        """What is run of a task: without what this installation cannot run."""
        return [v for v in unique(groups(task.name, self.settings)) if why_not(v) is None]

    @property
    def total(self) -> int:
        """Runs in all; those of frozen need no search."""
        each = len(self.settings.rates) + self.settings.seeds
        return sum(
            self.settings.seeds if variant.method == "frozen" else each
            for task in self.tasks
            for variant in self.variants(task)
        )

    def run(self, watch: Watch) -> None:
        for task in self.tasks:
            for variant in unique(groups(task.name, self.settings)):
                reason = why_not(variant)
                if reason is None:
                    self._compare(task, variant, watch)
                else:
                    self.store.skipped[variant.name] = reason
        self.store.write()

    def _compare(self, task: Task, variant: Variant, watch: Watch) -> None:
        rate = None if variant.method == "frozen" else self._search(task, variant, watch)
        for seed in range(self.settings.seeds):
            self._once(task, variant, Key(task.name, variant.name, "test", rate, seed), watch)

    def _search(self, task: Task, variant: Variant, watch: Watch) -> float:
        """Where every rate diverges, the smallest: its result is that it diverges."""
        rates = self.settings.rates
        keys = [Key(task.name, variant.name, "search", rate, SEARCH_SEED) for rate in rates]
        rate = pick([self._once(task, variant, key, watch) for key in keys])
        return min(rates) if rate is None else rate

    def _once(self, task: Task, variant: Variant, key: Key, watch: Watch) -> Run:
        """The run of that key: the stored one, or a new one."""
        if key not in self.store.runs:
            if not self._worlds:  # the first run that is new
                self.store.open_session()
            self.store.add(self._train(task, variant, key))
        run = self.store.runs[key]
        self._done += 1
        watch(self._done, self.total, f"{task.name}: {variant.name}")
        return run

    def _train(self, task: Task, variant: Variant, key: Key) -> Run:
        world = self._world(task, key.seed)
        start = time.perf_counter()
        # SHiRA's sparse tensors warn unless somebody decides about checks of them.
        unchecked = torch.sparse.check_sparse_tensor_invariants(enable=False)
        with torch.random.fork_rng(devices=[]), unchecked:
            torch.manual_seed(key.seed)
            model = copy.deepcopy(world.model).to(getattr(torch, variant.model_dtype))
            batches = world.batches(key.seed + 1)
            data = [batches.draw() for _ in range(GRADIENT_BATCHES)]
            trainable = adapt(model, variant, Given(key.seed, data, task.loss))
            if key.rate is not None:
                drawn = world.batches(key.seed)
                train(model, drawn, task.schedule(key.rate), lambda *_: None, task.loss)
        held_out = world.validation if key.part == "search" else world.test
        score = task.score(model, held_out)
        seconds = time.perf_counter() - start
        return Run(**asdict(key), trainable=trainable, **asdict(score), seconds=round(seconds, 3))

    def _world(self, task: Task, seed: int) -> World:
        name = (task.name, seed)
        if name not in self._worlds:
            self._worlds[name] = task.world(seed)
        return self._worlds[name]
