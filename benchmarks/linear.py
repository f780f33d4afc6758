"""The micro benchmark of the linear layers, behind the command ``neuroada bench``.

Forward and backward of every candidate at every case, interleaved, each checked before it is timed.
With ``--memory`` nothing is timed, see :mod:`neuroada_kernels.benchmarks.block`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from rich.console import Console

from neuroada_kernels import BackendError
from neuroada_kernels.benchmarks import block
from neuroada_kernels.benchmarks.bars import judge, status
from neuroada_kernels.benchmarks.candidates import (
    Candidate,
    Exact,
    Run,
    automatic,
    bench_inputs,
    prepare,
    table,
)
from neuroada_kernels.benchmarks.measurement import Measurement
from neuroada_kernels.benchmarks.memory import measure_memory
from neuroada_kernels.benchmarks.options import output_file, positive, progress_bar, threads
from neuroada_kernels.benchmarks.report import (
    Results,
    print_environment,
    print_results,
    write_json,
    write_png,
)
from neuroada_kernels.benchmarks.timing import MIN_ROUNDS, host_cost, measure, paired_ratio
from neuroada_kernels.benchmarks.timing_gpu import measure_on_gpu
from neuroada_kernels.testing import BENCH_CASES, GPU_BENCH_CASES, Case

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ROUNDS = 15
_WARMUP = 2


def measure_case(
    case: Case,
    dtype: str,
    candidates: Iterable[Candidate],
    rounds: int,
    *,
    device: str = "cpu",
    results: Results,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Add to ``results`` a measurement of each candidate, ``frozen`` among them.

    Raises
    ------
    WrongCandidateError
        If a candidate is wrong; then nothing of the case is timed.
    """
    inputs = bench_inputs(case, getattr(torch, dtype), device)
    exact = Exact(inputs)
    runs: dict[str, Run] = {}
    for candidate in candidates:
        try:
            runs[candidate.name] = prepare(candidate, inputs, exact)
        except BackendError as error:
            results.skipped.append(
                {
                    "case": case.name,
                    "dtype": dtype,
                    "candidate": candidate.name,
                    "reason": str(error),
                }
            )
    del exact
    chosen = automatic(inputs)
    timed = measure_on_gpu if device == "cuda" else measure
    timings = timed(runs, rounds, warmup=_WARMUP, between=between)
    for name, run in runs.items():
        results.measurements.append(
            Measurement(
                case=case,
                dtype=dtype,
                candidate=name,
                backend=run.candidate.backend,
                automatic=name == chosen,
                timings=timings[name],
                ratio=paired_ratio(timings[name].total, timings["frozen"].total),
                work=run.candidate.work(inputs),
                memory=measure_memory(run),
            )
        )


def main(argv: list[str] | None = None) -> int:
    """Run the suite as the arguments say; 1 where ``--assert-bars`` finds a bar missed."""
    parser = _parser()
    options = parser.parse_args(argv)
    _complete(options, parser)
    console = Console()
    if options.memory:
        found = block.run(options.device, options.dtypes, console)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    with threads(options.threads):
        print_environment(console, options.device)
        results = _measure_all(options, console)
        if options.host_cost:
            results.host = host_cost(options.rounds, device=options.device)
        if options.assert_bars:
            results.verdicts = judge(results.measurements, results.host)
        print_results(results, console)
        if options.json is not None:
            write_json(results, options.json)
        if options.png is not None:
            write_png(results.measurements, options.png, options.device)
    return status(results.verdicts) if options.assert_bars else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuroada bench",
        description="Time forward and backward of the NeuroAda linear, interleaved with the "
        "frozen linear and with other methods. Every candidate is checked first.",
    )
    known = [name for name in table() if name != "frozen"]
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--quick", action="store_true", help=f"two cases, float32, {MIN_ROUNDS} rounds")
    add("--cases", nargs="+", metavar="TEXT", help="only cases with one of these in their name")
    add("--dtypes", nargs="+", choices=_DTYPES, help="default: float32 bfloat16")
    add("--k", nargs="+", type=positive, metavar="K", help="bypasses a neuron; default: 1 8 20")
    add("--candidates", nargs="+", choices=known, help="beside frozen; default: all")
    add("--rounds", type=positive, metavar="N", help=f"default: {_ROUNDS}")
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add("--json", type=output_file, metavar="FILE", help="write everything, samples included")
    add("--png", type=output_file, metavar="FILE", help="write a bar chart (needs matplotlib)")
    add("--memory", action="store_true", help="instead: what a block keeps for its backward")
    add("--host-cost", action="store_true", help="also the microseconds of a call at T = 1")
    add("--assert-bars", action="store_true", help="exit 1 where a bar is missed")
    return parser


def _complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in the defaults that depend on other options; refuse what would measure nothing."""
    options.rounds = options.rounds or (MIN_ROUNDS if options.quick else _ROUNDS)
    if options.assert_bars:
        options.host_cost = True
        if options.rounds < MIN_ROUNDS:
            parser.error(f"--rounds: {options.rounds}, expected at least {MIN_ROUNDS} for bars")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    if options.device == "cuda" and options.assert_bars:
        parser.error("--assert-bars: the bars are those of a CPU")
    if options.png is not None:
        _require_matplotlib(parser)
    on_gpu = options.device == "cuda"
    every_dtype = ["bfloat16"] if on_gpu else ["float32", "bfloat16"]
    options.dtypes = options.dtypes or (["float32"] if options.quick else every_dtype)
    known = GPU_BENCH_CASES if on_gpu else BENCH_CASES
    options.cases = _cases(known, options.quick, options.k, options.cases)
    if not options.cases:
        parser.error("--cases: none has such a name")
    names = set(options.candidates or table())
    options.candidates = [c for c in table().values() if c.name in names | {"frozen"}]


def _cases(
    known: Sequence[Case],
    quick: bool,
    k: Sequence[int] | None,
    filters: Sequence[str] | None,
) -> list[Case]:
    """The cases of the shared table, at other k where asked for."""
    shapes = list(dict.fromkeys(replace(case, k=1) for case in known))
    if quick:
        shapes = [shape for shape in shapes if shape.d_in == shape.d_out]
    every_k = k or ([8] if quick else list(dict.fromkeys(case.k for case in known)))
    cases = [replace(shape, k=k) for shape in shapes for k in every_k if k <= shape.d_in]
    return [c for c in cases if filters is None or any(text in c.name for text in filters)]


def _measure_all(options: argparse.Namespace, console: Console) -> Results:
    results = Results(options.rounds, options.device)
    work = [(case, dtype) for case in options.cases for dtype in options.dtypes]
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(work) * (options.rounds + _WARMUP))

        def between() -> None:
            progress.advance(task)
            progress.refresh()

        for case, dtype in work:
            progress.update(task, description=f"{case.name} {dtype}", refresh=True)
            measure_case(
                case,
                dtype,
                options.candidates,
                options.rounds,
                device=options.device,
                results=results,
                between=between,
            )
    return results


def _require_matplotlib(parser: argparse.ArgumentParser) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error("--png: matplotlib is missing, pip install 'neuroada-kernels[bench]'")


if __name__ == "__main__":
    sys.exit(main())
