"""Training steps of a whole transformer, by method: behind ``neuroada bench model``.

A Llama with random weights, Llama-3-8B's sizes on a GPU and a scaled one on the CPU; nothing is
downloaded. Each method is checked before it is timed (:mod:`method_checks`), in each mode: plain,
with gradient checkpointing, by torch.compile, with both. On the CPU a few methods at a time run
interleaved with the frozen model, and a ratio is taken round by round; on a GPU, whose memory holds
one model, they run one after another.

A row of the results has ``mode``, ``method``, its ``source`` (a package, or ``"stand-in"``) and
either ``skipped``, the reason, or:

- ``trainable``: number of trained values; ``checks``: relative errors, see ``check_adapted``;
- ``step_ms``: quartiles, ``samples_ms``: each round; ``tokens_per_second``: by the median;
- ``ratio_to_frozen``: quartiles, or None without frozen; ``paired``: whether taken round by round,
  over ``frozen_samples_ms`` of the frozen model;
- ``held_bytes``: what stays between steps (weights, adapter, state of AdamW); ``step_bytes``: the
  peak that a step adds to it; ``peak_bytes``: their sum;
- ``graph_breaks``: of torch.compile, None in other modes; ``losses``: of each step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console

from neuroada_kernels import available_backends
from neuroada_kernels.benchmarks.allocations import loaded_for_good
from neuroada_kernels.benchmarks.llama import Sizes
from neuroada_kernels.benchmarks.method_checks import WrongMethodError
from neuroada_kernels.benchmarks.methods import LEFT_OUT, METHODS, package_version, why_not
from neuroada_kernels.benchmarks.model_report import described, page, table
from neuroada_kernels.benchmarks.options import add_outputs, positive, progress_bar, threads
from neuroada_kernels.benchmarks.records import Records, RecordsError, Row
from neuroada_kernels.benchmarks.timing import Quartiles, measure, paired_ratio
from neuroada_kernels.benchmarks.training_step import (
    MODES,
    Prepared,
    References,
    World,
    free,
    prepare,
    references,
    step_bytes,
)

KIND = "model"
BASELINE = "frozen"
#: The world's defaults; `--quick` is for a CPU.
FULL = World(Sizes(1024, 3584, 4, 8, 2, 4096), 512, 1, 8, torch.float32)
QUICK = World(Sizes(256, 896, 2, 4, 1, 1024), 256, 1, 8, torch.float32)
ON_GPU = World(Sizes(), 4096, 1, 20, torch.bfloat16, "cuda")
#: Compiling dominates the time of a quick run, so it compiles one method of each kind.
QUICK_COMPILED = (
    "frozen",
    "neuroada",
    "neuroada-resident",
    "materialised",
    "peft-lora-r16",
    "full",
)
#: Methods that are held in memory at once, beside the frozen one.
TOGETHER = 3


class Suite:
    """The requested rows; those that the records lack are measured.

    ``tick`` is called with the number of rows that are done, and what is being done.
    """

    def __init__(
        self,
        world: World,
        records: Records,
        asked: dict[str, list[str]],
        rounds: int,
        warmup: int,
        tick: Callable[[int, str], None] = lambda done, doing: None,
    ) -> None:
        self.world, self.records, self.asked = world, records, asked  # asked: methods by mode
        self.rounds, self.warmup, self._tick = rounds, warmup, tick

    @property
    def keys(self) -> list[str]:
        return [f"{mode}/{method}" for mode, methods in self.asked.items() for method in methods]

    @property
    def rows(self) -> list[Row]:
        """The requested rows that are done, in the requested order."""
        return [self.records.rows[key] for key in self.keys if key in self.records.rows]

    def run(self) -> None:
        with loaded_for_good():
            self._run_all()

    def _run_all(self) -> None:
        for mode, methods in self.asked.items():
            for method in methods:
                reason = why_not(method)
                if reason is not None:
                    self._skip(mode, method, reason)
            missing = [m for m in methods if f"{mode}/{m}" not in self.records.rows]
            if missing:
                self._run_mode(mode, missing)

    def _run_mode(self, mode: str, missing: list[str]) -> None:
        self._say(mode, "what the others are checked against")
        known = references(self.world, MODES[mode])
        for group in self._groups(missing):
            free(self.world.device)
            prepared = self._prepare(mode, group, known)
            if prepared:
                self._measure(mode, prepared)

    def _groups(self, missing: list[str]) -> list[list[str]]:
        """Methods that run interleaved, each group with the baseline; single ones on a GPU."""
        if self.world.device != "cpu":
            return [[method] for method in missing]
        others = [method for method in missing if method != BASELINE]
        starts = range(0, max(1, len(others)), TOGETHER)
        return [[BASELINE, *others[start : start + TOGETHER]] for start in starts]

    def _prepare(self, mode: str, group: list[str], known: References) -> dict[str, Prepared]:
        prepared = {}
        for method in group:
            self._say(mode, method)
            try:
                prepared[method] = prepare(method, self.world, MODES[mode], known)
            except WrongMethodError:
                raise
            except Exception as error:
                # Out of memory and failed compilation are reported as limits; the rest are defects.
                if not (MODES[mode].compiled or isinstance(error, torch.OutOfMemoryError)):
                    raise
                self._skip(mode, method, _first_line(error))
        return prepared

    def _measure(self, mode: str, prepared: dict[str, Prepared]) -> None:
        steps = {method: found.step for method, found in prepared.items()}
        try:
            timings = measure(
                steps,
                self.rounds,
                warmup=self.warmup,
                between=lambda: self._say(mode, ", ".join(steps)),
            )
            beside = {m: step_bytes(step, self.world.device) for m, step in steps.items()}
        except torch.OutOfMemoryError as error:
            for method in prepared:
                self._skip(mode, method, _first_line(error))
            return
        samples = {m: [ns / 1e6 for ns in timed.total] for m, timed in timings.items()}
        for method, found in prepared.items():
            row = {
                **_about(mode, method),
                **self._times(mode, samples[method], samples.get(BASELINE)),
                "trainable": found.trainable,
                "held_bytes": found.held_bytes,
                "step_bytes": beside[method],
                "peak_bytes": found.held_bytes + beside[method],
                "checks": found.checks,
                "graph_breaks": found.graph_breaks,
                "losses": found.step.losses,
            }
            self._add(row)

    def _times(self, mode: str, samples: list[float], beside: list[float] | None) -> Row:
        """``beside``: the baseline's samples of the same rounds, if it ran in them."""
        frozen = beside or self._before(mode, len(samples))
        step = Quartiles.of(samples)
        return {
            "step_ms": asdict(step),
            "samples_ms": samples,
            "tokens_per_second": self.world.tokens / step.median * 1e3,
            "ratio_to_frozen": None if frozen is None else asdict(paired_ratio(samples, frozen)),
            "paired": beside is not None,
            "frozen_samples_ms": beside,
        }

    def _before(self, mode: str, rounds: int) -> list[float] | None:
        """The baseline's stored median, ``rounds`` times; None if it was not measured."""
        row = self.records.rows.get(f"{mode}/{BASELINE}", {})
        return [row["step_ms"]["median"]] * rounds if "step_ms" in row else None

    def _skip(self, mode: str, method: str, reason: str) -> None:
        self._add({**_about(mode, method), "skipped": reason})

    def _add(self, row: Row) -> None:
        key = f"{row['mode']}/{row['method']}"
        if key in self.keys:  # the baseline also runs when not requested
            self.records.once(key, lambda: row)

    def _say(self, mode: str, doing: str) -> None:
        self._tick(len(self.rows), f"{mode}: {doing}")


def _about(mode: str, method: str) -> Row:
    return {"mode": mode, **asdict(MODES[mode]), "method": method, "source": METHODS[method].source}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def main(argv: list[str] | None = None) -> int:
    """Measure what is requested and missing; returns 1 if a method is wrong or none could run."""
    parser = _parser()
    options = parser.parse_args(argv)
    world = _world(options, parser)
    console = Console()
    with threads(options.threads):
        try:
            records = Records.open(
                KIND, _command(options), _settings(options, world), options.json, world.device
            )
            suite = Suite(world, records, _asked(options), options.steps, options.warmup)
            _run(suite, console)
        except RecordsError as error:
            parser.error(str(error))
        except WrongMethodError as error:
            console.print(f"wrong: {error}", markup=False)
            return 1
    for mode in suite.asked:
        console.print(table(mode, [row for row in suite.rows if row["mode"] == mode]))
    for line in described(records, suite.rows):
        console.print(line, markup=False, highlight=False)
    if options.html is not None:
        page(records, options.html)
    return int(all("skipped" in row for row in suite.rows))


def _run(suite: Suite, console: Console) -> None:
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(suite.keys))
        suite._tick = lambda done, doing: progress.update(
            bar, completed=done, description=doing, refresh=True
        )
        suite.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuroada bench model",
        description="Time training steps of a randomly initialised Llama, and take their memory.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--quick", action="store_true", help="a smaller model; few methods compiled")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add(
        "--modes",
        nargs="+",
        choices=MODES,
        help="default: all; quick, the first three; on a GPU, plain",
    )
    add("--backend", help="of NeuroAda; default: the one chosen automatically")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: float32, on a GPU bfloat16",
    )
    for name in ("k", "sequence", "batch", *asdict(FULL.sizes)):
        full, quick, gpu = (_setting(world, name) for world in (FULL, QUICK, ON_GPU))
        default = f"default: {full}, quick {quick}, on a GPU {gpu}"
        add(f"--{name.replace('_', '-')}", type=positive, metavar="N", help=default)
    add("--steps", type=positive, default=9, metavar="N", help="that count; default: 9")
    add("--warmup", type=positive, default=2, metavar="N", help="that do not; default: 2")
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add_outputs(parser)
    return parser


def _setting(world: World, name: str) -> Any:
    return asdict(world.sizes).get(name, getattr(world, name, None))


def _world(options: argparse.Namespace, parser: argparse.ArgumentParser) -> World:
    """The world that the options describe; rejects early what would fail after minutes."""
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    if find_spec("transformers") is None:
        parser.error("transformers is missing: install the extra 'peft'")
    world = QUICK if options.quick else ON_GPU if on_gpu else FULL
    given = {name: value for name, value in vars(options).items() if value is not None}
    sizes = {name: given[name] for name in asdict(world.sizes) if name in given}
    rest = {name: given[name] for name in ("k", "sequence", "batch", "backend") if name in given}
    dtype = getattr(torch, given["dtype"]) if "dtype" in given else world.dtype
    world = replace(
        world, sizes=replace(world.sizes, **sizes), dtype=dtype, device=options.device, **rest
    )
    if (wrong := _wrong(world)) is not None:
        parser.error(wrong)
    return world


def _wrong(world: World) -> str | None:
    """Why a model of these sizes cannot be built or adapted, None if it can."""
    sizes, least = world.sizes, min(world.sizes.hidden, world.sizes.intermediate)
    if sizes.hidden % (2 * sizes.heads):
        return f"--hidden: {sizes.hidden}, expected a multiple of two times {sizes.heads} heads"
    if sizes.heads % sizes.kv_heads:
        return f"--heads: {sizes.heads}, expected a multiple of {sizes.kv_heads}, the kv heads"
    if world.k > least:
        return f"--k: {world.k}, expected at most {least}, the inputs of the narrowest linear"
    backends = available_backends()
    if world.backend is not None and backends.get(world.backend, "is unknown") is not None:
        reason = backends.get(world.backend, f"expected one of {', '.join(backends)}")
        return f"--backend {world.backend}: {reason}"
    return None


def _asked(options: argparse.Namespace) -> dict[str, list[str]]:
    """The requested methods by mode."""
    default = ["plain"] if options.device == "cuda" else list(MODES)[: 3 if options.quick else None]
    modes = options.modes or default
    methods = options.methods or list(METHODS)
    few = QUICK_COMPILED if options.quick and not options.methods else tuple(methods)
    return {
        mode: [method for method in methods if not MODES[mode].compiled or method in few]
        for mode in modes
    }


def _settings(options: argparse.Namespace, world: World) -> dict[str, Any]:
    return {
        **asdict(world),
        "dtype": str(world.dtype).removeprefix("torch."),
        "steps": options.steps,
        "warmup": options.warmup,
        "transformers": package_version("transformers"),
        "peft": package_version("peft"),
        "left_out": LEFT_OUT,
    }


def _command(options: argparse.Namespace) -> str:
    """The command that makes all of the rows, without the file's name."""
    words = ["neuroada bench model", *(["--quick"] if options.quick else [])]
    defaults = vars(_parser().parse_args([]))
    for name, value in vars(options).items():
        if name not in ("quick", "methods", "modes", "json", "html") and value != defaults[name]:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
