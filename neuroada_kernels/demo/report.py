"""The demo's results as tables for the terminal and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroada_kernels.benchmarks.allocations import UNSEEN
from neuroada_kernels.demo.experiment import Results
from neuroada_kernels.info import facts

MASK_NOTE = "Masked dense holds its mask as float32: a bool one, a quarter of it, is slower."


def as_dict(results: Results) -> dict[str, Any]:
    """Everything shown, with the environment it was measured in."""
    plain = asdict(results)
    for name, measured in results.compared.items():
        memory = measured.memory
        plain["compared"][name]["memory"] |= {
            "training_state": memory.training_state,
            "total_peak": memory.total_peak,
        }
    return {
        "environment": facts(),
        "device": "cpu",
        "dtype": "float32",
        "seed": results.settings.seed,
        "passed": not results.failed,
        "memory_not_seen": UNSEEN,
        **plain,
    }


def write_json(results: Results, path: Path) -> None:
    path.write_text(json.dumps(as_dict(results), indent=2) + "\n")


def show(results: Results, console: Console) -> None:
    """Print the tables, the sample and the checks."""
    tables = [_adaptation(results), _merging(results)]
    if results.compared:
        tables.insert(1, _comparison(results))
    for table in tables:
        console.print(table)
        console.print()
    _show_samples(results, console)
    for check in results.checks:
        mark = Text("ok    ", "green") if check.passed else Text("FAILED", "bold red")
        console.print(Text.assemble(mark, f" {check.name}: ", (check.detail, "dim")))


def _adaptation(results: Results) -> Table:
    table = Table(title="Adapting to Python source (held out, bits per byte)")
    for heading in ("connections", "trainable", "share", "before", "after", "change"):
        table.add_column(heading, justify="right")
    for run in results.adapted.values():
        table.add_row(
            f"k = {run.k}",
            f"{run.trainable:,}",
            f"{run.share:.2%}",
            f"{run.loss_before:.3f}",
            f"{run.loss_after:.3f}",
            f"{run.loss_after - run.loss_before:+.3f}",
        )
    return table


def _comparison(results: Results) -> Table:
    k = max(results.adapted)
    table = Table(
        title=f"The same training step, k = {k}",
        caption=f"Peak without {UNSEEN}. {MASK_NOTE}",
    )
    table.add_column(no_wrap=True)
    for heading in ("tokens/s", "speed", "training state", "peak of a step"):
        table.add_column(heading, justify="right")
    for measured in results.compared.values():
        memory = measured.memory
        table.add_row(
            measured.label,
            f"{measured.tokens_per_second.median:,.0f}",
            f"{measured.relative_speed.median:.2f}x",
            f"{memory.training_state / 1e6:.1f} MB",
            f"{memory.total_peak / 1e6:.1f} MB",
        )
    return table


def _merging(results: Results) -> Table:
    merged = results.merged
    if merged is None:
        raise ValueError("results: have no merged model, expected a finished run")
    table = Table(title="Merging the model of the largest k")
    table.add_column()
    for heading in ("held out, bits per byte", "forward time, plain model = 1"):
        table.add_column(heading, justify="right")
    rows = (
        ("adapted", merged.loss_unmerged, merged.cost_unmerged),
        ("merged", merged.loss_merged, merged.cost_merged),
    )
    for name, loss, cost in rows:
        table.add_row(name, f"{loss:.4f}", f"{cost.median:.2f}")
    return table


def _show_samples(results: Results, console: Console) -> None:
    samples = dict(results.samples)
    prompt = samples.pop("prompt")
    for name, written in samples.items():
        shown = repr(prompt + written)[1:-1]
        console.print(Text.assemble((f"{name}: ", "bold"), shown))
    console.print()
