"""The command ``neuroada bench peers-training``: PEFT's methods and ours by one Trainer.

A small Llama that reads bytes is pretrained here on CPython's documentation, then trained by each
method for the same number of steps on the source of its library, in the same order; both ship with
CPython. The learning rate of each is the best of a few on half of the held-out windows; results
are on the other half, of one run, not of several seeds as in ``neuroada bench quality``.

A row of the results has ``method``, its ``source`` (a package, or ``"stand-in"``) and either
``skipped``, the reason, or:

- ``trainable``: number of trained values; ``learning_rate``: the best of ``rates``, each with its
  ``validation`` loss; ``curve``: the loss of each step, in bits per byte; ``held_out``: that of
  held-out windows, ``before`` and ``after``;
- ``step_ms``: quartiles over short runs of the Trainer, ``samples_ms`` their medians;
  ``tokens_per_second`` by the median; ``ratio_to_full``: quartiles of the ratio to full
  fine-tuning, whose runs were interleaved with these (``full_samples_ms``);
- ``peak_bytes``: the peak memory, model, adapter, gradients and AdamW's state included;
- ``saved_bytes``: of all files of the saved adapter, ``saved_files`` each; ``round_trip``: the
  relative error of the logits after loading it into a fresh base.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from neuroada_kernels.benchmarks.allocations import loaded_for_good
from neuroada_kernels.benchmarks.llama import Sizes
from neuroada_kernels.benchmarks.method_checks import WrongMethodError
from neuroada_kernels.benchmarks.methods import LEFT_OUT, METHODS, package_version, why_not
from neuroada_kernels.benchmarks.model_report import described, mib, page, plain_table
from neuroada_kernels.benchmarks.options import add_outputs, positive, progress_bar, threads
from neuroada_kernels.benchmarks.peers.training import Budget, Peers
from neuroada_kernels.benchmarks.records import Records, RecordsError, Row

KIND = "peers-training"
FULL = Budget(Sizes(128, 256, 4, 4, 2, 256), steps=200, pretrain_steps=600)
QUICK = Budget(Sizes(64, 128, 2, 4, 2, 256), steps=40, pretrain_steps=150, rounds=5)
_HEADINGS = (
    "trains",
    "rate",
    "bits per\nbyte",
    "step\nms",
    "tokens\n/ s",
    "x\nfull",
    "peak\nMiB",
    "saved\nKiB",
)


def main(argv: list[str] | None = None) -> int:
    """Run what is requested and missing; returns 1 if a method is wrong or none could run."""
    parser = _parser()
    options = parser.parse_args(argv)
    for package in ("transformers", "accelerate"):
        if find_spec(package) is None:
            parser.error(f"{package} is missing: install the extra 'peft'")
    budget = QUICK if options.quick else FULL
    budget = replace(budget, steps=options.steps or budget.steps)
    methods = options.methods or list(METHODS)
    console = Console()
    from transformers.utils import logging

    logging.disable_progress_bar()  # of each file that is read or written
    with threads(options.threads):
        try:
            records = Records.open(KIND, _command(options), _settings(budget), options.json)
            _run(records, budget, methods, console)
        except RecordsError as error:
            parser.error(str(error))
        except WrongMethodError as error:
            console.print(f"wrong: {error}", markup=False)
            return 1
    rows = [records.rows[method] for method in methods]
    console.print(_table(rows))
    for line in described(records, rows):
        console.print(line, markup=False, highlight=False)
    if options.html is not None:
        page(records, options.html)
    return int(all("skipped" in row for row in rows))


def _run(records: Records, budget: Budget, methods: list[str], console: Console) -> None:
    with progress_bar(console) as progress, tempfile.TemporaryDirectory() as folder:
        bar = progress.add_task("pretraining", total=len(methods))
        progress.refresh()
        peers = cache(lambda: Peers(budget, Path(folder)))  # only where a row is missing
        for method in methods:
            records.once(method, partial(_row, peers, method))
            progress.update(bar, advance=1, description=f"after {method}", refresh=True)


def _row(peers: Callable[[], Peers], method: str) -> Row:
    about = {"method": method, "source": METHODS[method].source}
    reason = "nothing trains" if method == "frozen" else why_not(method)
    if reason is not None:
        return about | {"skipped": reason}
    found = peers()
    with loaded_for_good():  # the Trainer collects garbage after each run
        return about | found.measure(method)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuroada bench peers-training",
        description="Train a small Llama by each method through Hugging Face's Trainer.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller model and fewer steps")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--steps", type=positive, metavar="N", help=f"default: {FULL.steps}, quick {QUICK.steps}")
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add_outputs(parser)
    return parser


def _settings(budget: Budget) -> dict[str, Any]:
    versions = {name: package_version(name) for name in ("transformers", "peft", "accelerate")}
    return {**asdict(budget), **versions, "left_out": LEFT_OUT}


def _command(options: argparse.Namespace) -> str:
    words = ["neuroada bench peers-training", *(["--quick"] if options.quick else [])]
    words += [f"--{n} {v}" for n in ("steps", "threads") if (v := getattr(options, n)) is not None]
    return " ".join(words)


def _table(rows: list[Row]) -> Table:
    measured = [row for row in rows if "skipped" not in row]
    before = measured[0]["held_out"]["before"] if measured else float("nan")
    found: Table = plain_table(f"held out, before: {before:.3f} bits per byte", "method", _HEADINGS)
    for row in measured:
        found.add_row(
            row["method"],
            f"{row['trainable']:,}",
            f"{row['learning_rate']:g}",
            f"{row['held_out']['after']:.3f}",
            f"{row['step_ms']['median']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio_to_full']['median']:.2f}",
            mib(row["peak_bytes"]),
            f"{row['saved_bytes'] / 1024:.1f}",
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
