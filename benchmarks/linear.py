"""The suite of the linear layers, behind ``neuroada bench linear`` and plain ``neuroada bench``.

Forward and backward of every candidate at every case, interleaved, each checked before it is
timed: ratios to the frozen linear, rates, memory, host time, and how time grows with k and with T.
The file that ``--json`` writes has the common frame (:mod:`neuroada_kernels.benchmarks.records`);
:mod:`neuroada_kernels.benchmarks.linear_results` describes its rows. Its ``summary`` has the fits
and the bars.
With ``--memory`` nothing is timed, see :mod:`neuroada_kernels.benchmarks.block`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console

from neuroada_kernels import BackendError
from neuroada_kernels.benchmarks import block
from neuroada_kernels.benchmarks.bars import status
from neuroada_kernels.benchmarks.candidates import (
    Candidate,
    Run,
    automatic,
    bench_inputs,
    prepare,
    table,
)
from neuroada_kernels.benchmarks.exact import Exact
from neuroada_kernels.benchmarks.linear_results import HOST_COST, KIND, Results, Skipped, row_key
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.memory import measure_memory
from neuroada_kernels.benchmarks.options import (
    add_output,
    add_outputs,
    command_line,
    positive,
    progress_bar,
    threads,
)
from neuroada_kernels.benchmarks.records import Records, RecordsError, Row
from neuroada_kernels.benchmarks.report import print_environment, print_results, write_png
from neuroada_kernels.benchmarks.shapes import SWEEP_K, SWEEP_TOKENS, add_cases, bench_cases
from neuroada_kernels.benchmarks.timing import (
    MIN_ROUNDS,
    Quartiles,
    host_cost,
    host_times,
    measure,
    paired_ratio,
)
from neuroada_kernels.benchmarks.timing_gpu import measure_on_gpu, reason_not_captured
from neuroada_kernels.testing import BENCH_CASES, GPU_BENCH_CASES, Case, Inputs

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ROUNDS = 15
_WARMUP = 2
#: Exit status if --keep-going left out a candidate that failed; not used otherwise.
FAILED = 10
#: So little to compute that a step's time is Python and dispatch overhead.
_HOST_CASE = Case(tokens=1, d_in=64, d_out=64, k=1)


def measure_case(
    case: Case,
    dtype: str,
    candidates: Iterable[Candidate],
    rounds: int,
    *,
    device: str = "cpu",
    between: Callable[[], None] = lambda: None,
    keep_going: bool = False,
) -> list[Measurement | Skipped]:
    """A measurement of each candidate, ``frozen`` among them, in their order.

    ``keep_going``: one that is wrong, or cannot be built and run, is skipped as ``failed``.

    Raises
    ------
    WrongCandidateError
        If a candidate is wrong, unless ``keep_going``; then nothing of the case is timed.
    """
    inputs = bench_inputs(case, getattr(torch, dtype), device)
    candidates = list(candidates)
    runs, skipped = _prepare(candidates, inputs, device, keep_going)
    chosen = automatic(inputs)
    on_gpu = device == "cuda"
    timings = (measure_on_gpu if on_gpu else measure)(runs, rounds, warmup=_WARMUP, between=between)
    if on_gpu:
        host = host_times(runs, rounds, calls=1, settle=torch.cuda.synchronize)
    else:
        host = _host_us(tuple(runs), dtype, rounds)

    def result(name: str) -> Measurement | Skipped:
        if name in skipped:
            return Skipped(case, dtype, name, **skipped[name])
        return Measurement(
            case=case,
            dtype=dtype,
            candidate=name,
            backend=runs[name].candidate.backend,
            automatic=name == chosen,
            timings=timings[name],
            ratio=paired_ratio(timings[name].total, timings["frozen"].total),
            work=runs[name].candidate.work(inputs),
            memory=measure_memory(runs[name]),
            host_us=host[name],
        )

    return [result(candidate.name) for candidate in candidates]


def _prepare(
    candidates: Iterable[Candidate], inputs: Inputs, device: str, keep_going: bool
) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """The checked candidates that can be timed, and the reasons why the others cannot."""
    exact = Exact(inputs)
    runs: dict[str, Run] = {}
    skipped: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        try:
            run = prepare(candidate, inputs, exact)
        except BackendError as error:
            skipped[candidate.name] = {"reason": str(error)}
            continue
        except Exception as error:
            if not keep_going or candidate.name == "frozen":
                raise
            reason = f"{type(error).__name__}: {error}"
            skipped[candidate.name] = {"reason": reason, "failed": True}
            continue
        unfit = reason_not_captured(run) if device == "cuda" else None
        if unfit is None:
            runs[candidate.name] = run
        else:
            skipped[candidate.name] = {"reason": unfit}
    return runs, skipped


@lru_cache
def _host_us(names: tuple[str, ...], dtype: str, rounds: int) -> Mapping[str, Quartiles]:
    """The host's time of a step on a CPU, taken with next to nothing to compute."""
    inputs = bench_inputs(_HOST_CASE, getattr(torch, dtype))
    known = table()
    return dict(host_times({name: Run(known[name], inputs) for name in names}, rounds))


def main(argv: list[str] | None = None) -> int:
    """Run the suite as the arguments say; returns 1 if ``--assert-bars`` finds a bar missed.

    Returns :data:`FAILED` if ``--keep-going`` left out a candidate that is wrong or could not run.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    _complete(options, parser)
    command = command_line("linear", argv)
    console = Console()
    if options.memory:
        found = block.run(options.device, options.dtypes, console)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    with threads(options.threads):
        print_environment(console, options.device)
        try:
            settings = _settings(options)
            records = Records.open(KIND, command, settings, options.json, options.device)
            _measure_all(options, records, console)
        except RecordsError as error:
            parser.error(f"--json: {error}")
        results = Results.of(list(records.rows.values()))
        if options.assert_bars:
            results.judge()
        records.summary = results.summary()
        records.write()
        print_results(results, console)
        if options.png is not None:
            write_png(results.measurements, options.png, options.device)
        if options.html is not None:
            from neuroada_kernels.benchmarks.html import write_html

            write_html({(options.json or options.html).name: records.as_dict()}, options.html)
    missed = status(results.verdicts) if options.assert_bars else 0
    return missed or FAILED * any(skip.failed for skip in results.skipped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuroada bench linear",
        description="Time forward and backward of the NeuroAda linear, interleaved with the "
        "frozen linear and with other methods. Every candidate is checked first.",
    )
    known = table()
    others = [name for name in known if name != "frozen"]
    peers = [name for name in others if known[name].peer]
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--quick", action="store_true", help=f"two cases, float32, {MIN_ROUNDS} rounds")
    add_cases(parser, tokens="the table's, 512 or 16")
    add(
        "--sweep",
        choices=("k", "tokens"),
        help=f"how time grows: over k from {SWEEP_K[0]} to {SWEEP_K[-1]}, or over T from "
        f"{SWEEP_TOKENS[0]} to {SWEEP_TOKENS[-1]}, where --k or --tokens does not say",
    )
    add("--dtypes", nargs="+", choices=_DTYPES, help="default: float32 bfloat16")
    add(
        "--candidates",
        nargs="+",
        choices=others,
        metavar="NAME",
        help="beside frozen; default: all of " + ", ".join(n for n in others if n not in peers),
    )
    add("--peers", action="store_true", help=f"also {', '.join(peers)}")
    add("--rounds", type=positive, metavar="N", help=f"default: {_ROUNDS}")
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add(
        "--keep-going",
        action="store_true",
        help=f"leave out a candidate that is wrong or fails, and exit {FAILED}; default: stop",
    )
    add_outputs(parser)
    add_output(parser, "--png", "write a bar chart (needs matplotlib)")
    add("--memory", action="store_true", help="alias of neuroada bench memory --block")
    add("--host-cost", action="store_true", help="also the microseconds of a call at T = 1")
    add("--assert-bars", action="store_true", help="exit 1 where a bar is missed")
    return parser


def _complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in the defaults that depend on other options; reject options that measure nothing."""
    options.rounds = options.rounds or (MIN_ROUNDS if options.quick else _ROUNDS)
    if options.assert_bars:
        options.host_cost = True
        if options.rounds < MIN_ROUNDS:
            parser.error(f"--rounds: {options.rounds}, expected at least {MIN_ROUNDS} for bars")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    if options.device == "cuda" and options.assert_bars:
        parser.error("--assert-bars: those of a CPU, see neuroada bench gpu-bars for a GPU's")
    _require_matplotlib(options, parser)
    on_gpu = options.device == "cuda"
    every_dtype = ["bfloat16"] if on_gpu else ["float32", "bfloat16"]
    options.dtypes = options.dtypes or (["float32"] if options.quick else every_dtype)
    options.cases = bench_cases(
        GPU_BENCH_CASES if on_gpu else BENCH_CASES,
        quick=options.quick,
        shapes=[shape for shapes in options.shapes or () for shape in shapes],
        tokens=options.tokens,
        k=options.k,
        sweep=options.sweep,
        filters=options.cases,
    )
    if not options.cases:
        parser.error("--cases, --shapes, --k: no such case, or k larger than its d_in")
    options.candidates = _candidates(options.candidates, options.peers)


def _candidates(names: Sequence[str] | None, peers: bool) -> list[Candidate]:
    """The frozen linear, the named candidates or else the default ones, and the peers if given."""
    named = {"frozen", *(names or ())}
    return [
        row
        for row in table().values()
        if row.name in named or (peers if row.peer else names is None)
    ]


def _settings(options: argparse.Namespace) -> dict[str, object]:
    """What the rows of one file share."""
    return {
        "rounds": options.rounds,
        "device": options.device,
        "candidates": [candidate.name for candidate in options.candidates],
    }


def _measure_all(options: argparse.Namespace, records: Records, console: Console) -> None:
    work = [(case, dtype) for case in options.cases for dtype in options.dtypes]
    each = options.rounds + _WARMUP
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(work) * each)

        def between() -> None:
            progress.advance(task)
            progress.refresh()

        for number, (case, dtype) in enumerate(work):
            name = f"{case.name} {dtype}"
            progress.update(task, completed=number * each, description=name, refresh=True)
            keys = [row_key(case, dtype, candidate.name) for candidate in options.candidates]
            records.group(keys, partial(_rows, case, dtype, options, between))
    if options.host_cost:
        records.once(
            HOST_COST,
            lambda: {"host_cost": asdict(host_cost(options.rounds, device=options.device))},
        )


def _rows(
    case: Case, dtype: str, options: argparse.Namespace, between: Callable[[], None]
) -> list[Row]:
    found = measure_case(
        case,
        dtype,
        options.candidates,
        options.rounds,
        device=options.device,
        between=between,
        keep_going=options.keep_going,
    )
    return [each.as_dict() for each in found]


def _require_matplotlib(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for option in ("png", "html"):
        if getattr(options, option) is not None and find_spec("matplotlib") is None:
            parser.error(f"--{option}: matplotlib is missing, install the extra 'bench'")


if __name__ == "__main__":
    sys.exit(main())
