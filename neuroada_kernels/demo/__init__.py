"""``neuroada demo``: train a small language model, adapt it, compare, merge, and check it all.

Runs on the CPU in a few minutes. All text comes with CPython; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from neuroada_kernels.benchmarks.options import positive, threads
from neuroada_kernels.demo.data import Corpus, documentation, python_source
from neuroada_kernels.demo.experiment import Experiment, Results, Settings
from neuroada_kernels.demo.figure import write_figure
from neuroada_kernels.demo.report import show, write_json


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status is 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="neuroada demo", description=(__doc__ or "").strip())
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, help="threads of PyTorch (its own choice)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in some seconds")
    arguments = parser.parse_args(argv)
    console = Console()
    seed = arguments.seed
    settings = Settings.quick(seed) if arguments.quick else Settings.full(seed)
    try:
        texts = documentation(), python_source(settings.source_bytes)
    except (ModuleNotFoundError, ValueError) as error:
        console.print(f"This Python came without its library's text: {error}", style="bold red")
        return 1
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    with threads(arguments.threads):
        results = _run(settings, *texts, console)
        write_json(results, arguments.output / "demo.json")
    show(results, console)
    _write_figure(results, arguments.output / "demo.png", console)
    console.print(f"\nWritten to {arguments.output} in {sum(results.seconds.values()):.0f} s.")
    for check in results.failed:
        console.print(f"FAILED: {check.name}: {check.detail}", style="bold red")
    return 1 if results.failed else 0


def _run(settings: Settings, documents: Corpus, source: Corpus, console: Console) -> Results:
    bars: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as progress:

        def watch(title: str, done: int, total: int, note: str) -> None:
            if title not in bars:
                bars[title] = progress.add_task(title, total=total, note=note)
            progress.update(bars[title], completed=done, note=note)

        return Experiment(settings, documents, source, watch).run()


def _write_figure(results: Results, path: Path, console: Console) -> None:
    if not results.compared:
        console.print("No figure: there is nothing to compare.")
        return
    try:
        write_figure(results, path)
    except ImportError:
        console.print("No figure: matplotlib is missing (install the extra 'bench').")
