"""The order of runs: for each variant a search of the learning rate, then a run for each seed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from neuroada_kernels.benchmarks.html.quality import framed, run_key
from neuroada_kernels.benchmarks.quality.methods import Given, adapt, why_not
from neuroada_kernels.benchmarks.quality.settings import Settings
from neuroada_kernels.benchmarks.quality.tasks import Task, World, make_tasks
from neuroada_kernels.benchmarks.quality.variants import Variant, groups, unique
from neuroada_kernels.benchmarks.records import Records, Row
from neuroada_kernels.demo.training import train

#: Seed of the learning-rate searches; no result is of this seed.
SEARCH_SEED = 1000
#: Batches over which gradients are accumulated, if a variant selects by them.
GRADIENT_BATCHES = 4
#: Facts that the runs of a file share: with others, pretraining may end differently.
SAME = ("package", "torch", "cpu", "environment")

Part = Literal["search", "test"]


@dataclass(frozen=True)
class Key:
    """Identifies a training; as text, the key of its row."""

    task: str
    variant: str
    part: Part
    rate: float | None
    seed: int

    def __str__(self) -> str:
        key: str = run_key(asdict(self))
        return key


@dataclass(frozen=True)
class Run(Key):
    """One training; the loss is on validation data in a search, and on test data after it."""

    trainable: int
    loss: float | None
    accuracy: float | None
    seconds: float

    @classmethod
    def of(cls, row: Row) -> Run:
        return cls(**{name: value for name, value in row.items() if name != "key"})


def open_records(
    settings: Settings, path: Path | None = None, command: str = "neuroada bench quality"
) -> Records:
    """The records of the runs in ``path``, or empty ones.

    Raises
    ------
    RecordsError
        If the file holds something else, or runs of other settings.
    """
    given = settings.as_dict()
    return Records.open("quality", command, given, path, same=SAME, framed=framed)


def pick(searched: Iterable[Run]) -> float | None:
    """The learning rate of the lowest loss, the smaller one of equals; None where all diverged."""
    candidates = [
        (run.loss, run.rate)
        for run in searched
        if run.part == "search" and run.loss is not None and run.rate is not None
    ]
    return min(candidates)[1] if candidates else None


#: Called after each run with the runs done, the runs in all, and the name of this one.
Watch = Callable[[int, int, str], None]


class Suite:
    """Runs what ``records`` lack, task after task."""

    def __init__(self, settings: Settings, records: Records, tasks: Sequence[str] = ()) -> None:
        self.settings, self.records = settings, records
        self.skipped: dict[str, str] = {}  # variant to reason
        every = make_tasks(settings)
        unknown = sorted(set(tasks) - every.keys())
        if unknown:
            raise ValueError(f"tasks: {unknown}, expected of {list(every)}")
        self.tasks = [every[name] for name in tasks or every]
        self._worlds: dict[tuple[str, int], World] = {}
        self._done = 0

    @property
    def runs(self) -> list[Run]:
        """The finished runs."""
        return [Run.of(row) for row in self.records.rows.values()]

    def variants(self, task: Task) -> list[Variant]:
        """The variants of a task that this installation can run."""
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
                    self.skipped[variant.name] = reason

    def _compare(self, task: Task, variant: Variant, watch: Watch) -> None:
        rate = None if variant.method == "frozen" else self._search(task, variant, watch)
        for seed in range(self.settings.seeds):
            self._once(task, variant, Key(task.name, variant.name, "test", rate, seed), watch)

    def _search(self, task: Task, variant: Variant, watch: Watch) -> float:
        """The best rate; if all diverge, the smallest, so that its runs show the divergence."""
        rates = self.settings.rates
        keys = [Key(task.name, variant.name, "search", rate, SEARCH_SEED) for rate in rates]
        rate = pick([self._once(task, variant, key, watch) for key in keys])
        return min(rates) if rate is None else rate

    def _once(self, task: Task, variant: Variant, key: Key, watch: Watch) -> Run:
        """The run of that key: the stored one, or a new one."""
        run = Run.of(self.records.once(str(key), lambda: asdict(self._train(task, variant, key))))
        self._done += 1
        watch(self._done, self.total, f"{task.name}: {variant.name}")
        return run

    def _train(self, task: Task, variant: Variant, key: Key) -> Run:
        world = self._world(task, key.seed)
        start = time.perf_counter()
        # Sparse tensors, as SHiRA makes, warn unless their checks are explicitly set.
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
